"""Pictures from a run: its newest checkpoint, conditions like those of its training, one PNG grid; and its export."""

from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from iomm.config import InputError
from iomm.engine import parts
from iomm.engine.data.shards import Shards
from iomm.engine.data.source import ImageSource
from iomm.masking import visible_mask
from iomm.mllm import RECONSTRUCT
from iomm.pipeline import Pipeline, draw, image_grid, to_images


def draw_run(run_dir, *, num=16, steps=20, seed=0, prompts=(), guidance=1.0, weights="ema", device="cpu", out=None):
    """Writes a PNG grid and returns its path.

    With prompts: `num` pictures, the prompts in turn. Without: of a run on images, the first `num` of its order, masked as
    in training, each above what the model draws from what is left; of a run on pairs, pictures of its first captions. Raises InputError: no run, no checkpoint."""
    if num < 1 or steps < 1:
        raise InputError(f"--num and --steps must be >= 1, got {num} and {steps}")
    config, model, manifest = parts.load_run(run_dir, weights=weights, device=device)
    size_px, columns = config.data.size_px, min(8, num)
    if not prompts and config.train.data != "image":
        pairs = Shards(parts.prepare_data(config, progress=False, pairs=True))
        prompts = [pairs.caption(k) for k in range(min(num, len(pairs)))]
    if prompts:
        texts = [prompts[i % len(prompts)] for i in range(num)]
        images = Pipeline(model, size_px)(texts, steps=steps, seed=seed, guidance=guidance)
    else:
        references, drawn = reconstruct(config, model, num, steps, seed, device)
        images = [image for start in range(0, num, columns) for row in (references, drawn)
                  for image in row[start:start + columns]]
    path = Path(out) if out else Path(run_dir) / "samples" / f"step-{manifest['step']:08d}-seed{seed}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid(images, columns).save(path)
    return path


def reconstruct(config, model, num, steps, seed, device):
    """-> (the first num images of the run's order, what is drawn of them from their visible tokens), PIL images."""
    mllm, _ = model.frozen
    shards = Shards(parts.prepare_data(config, progress=False))
    batch = next(iter(ImageSource(
        shards, seed=config.run.seed, global_batch=num, micro_batch=num, rank=0, world_size=1, size_px=config.data.size_px,
        vit_px=mllm.vit_px, device=torch.device(device), num_steps=1)))
    visible = visible_mask(config.mask, config.run.seed, batch.n_B.to(device), mllm.num_image_tokens)
    condition = mllm.condition([RECONSTRUCT] * num, mllm.image_tokens(batch.vit_pixels_BCHW), visible=visible,
                               mode=config.mask.mode, positions=config.mask.positions)
    image_B = torch.arange(num, device=device)
    drawn = draw(model, condition, image_B, size_px=config.data.size_px, steps=steps, seed=seed)
    return to_images(batch.pixels_BCHW), to_images(drawn)


def edit_run(run_dir, image, instruction, *, steps=20, seed=0, guidance=1.0, weights="ema", device="cpu", out=None):
    """Image file and instruction -> path of the edited PNG. Raises InputError for a file that is no image."""
    try:
        picture = Image.open(image).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"--image {image}: {error}") from error
    config, model, _ = parts.load_run(run_dir, weights=weights, device=device)
    path = Path(out) if out else Path(run_dir) / "samples" / f"edited-{Path(image).stem}-seed{seed}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Pipeline(model, config.data.size_px).edit(picture, instruction, steps=steps, seed=seed, guidance=guidance).save(path)
    return path


def export_run(run_dir, *, weights="ema", out=None):
    """Run folder -> folder that diffusers' from_pretrained and Pipeline.from_pretrained load: run/export/<weights>."""
    config, model, _ = parts.load_run(run_dir, weights=weights)
    folder = Path(out) if out else Path(run_dir) / "export" / weights
    names = [Path(name).resolve() if Path(name).is_dir() else name for name in (parts.prepare_mllm(config), config.model.vae)]
    return Pipeline(model, config.data.size_px).save_pretrained(
        folder, mllm=names[0], vae=names[1], mllm_revision=config.model.mllm_revision)
