"""Pictures from a run: its newest checkpoint, conditions like those of its training, one PNG grid."""

from pathlib import Path

import torch

from iomm.config import InputError
from iomm.engine import parts
from iomm.engine.data.shards import Shards
from iomm.engine.data.source import ImageSource
from iomm.masking import visible_mask
from iomm.mllm import RECONSTRUCT
from iomm.pipeline import draw, image_grid, to_images


def draw_run(run_dir, *, num=16, steps=20, seed=0, prompts=(), weights="ema", device="cpu", out=None):
    """Writes a PNG grid and returns its path.

    Without prompts: the first `num` images of the run's order, masked as in training, each above what the model draws
    from what is left. With prompts: `num` pictures, the prompts in turn. Raises InputError: no run, no checkpoint."""
    if num < 1 or steps < 1:
        raise InputError(f"--num and --steps must be >= 1, got {num} and {steps}")
    config, folder = parts.read_run(run_dir)
    model = parts.build_model(config, parts.prepare_mllm(config), device).to(device)
    manifest = parts.load_weights(model, folder, weights)
    mllm, _ = model.frozen
    size_px, image_B = config.data.size_px, torch.arange(num, device=device)
    if prompts:
        condition, references = mllm.condition([prompts[i % len(prompts)] for i in range(num)]), []
    else:
        shards = Shards(parts.prepare_data(config, progress=False))
        batch = next(iter(ImageSource(
            shards, seed=config.run.seed, global_batch=num, micro_batch=num, rank=0, world_size=1, size_px=size_px,
            vit_px=mllm.vit_px, device=torch.device(device), num_steps=1)))
        visible = visible_mask(config.mask, config.run.seed, batch.n_B.to(device), mllm.num_image_tokens)
        condition = mllm.condition([RECONSTRUCT] * num, mllm.image_tokens(batch.vit_pixels_BCHW), visible=visible,
                                   mode=config.mask.mode, positions=config.mask.positions)
        references = to_images(batch.pixels_BCHW)
    drawn = to_images(draw(model, condition, image_B, size_px=size_px, steps=steps, seed=seed))
    columns = min(8, num)
    rows = [image for start in range(0, num, columns) for images in (references, drawn)
            for image in images[start:start + columns]]
    path = Path(out) if out else Path(run_dir) / "samples" / f"step-{manifest['step']:08d}-seed{seed}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid(rows, columns).save(path)
    return path
