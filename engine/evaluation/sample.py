"""Pictures from a run: its newest checkpoint, conditions like those of its training; and its export.

Every PNG says in its text what it was drawn from and how: prompt, seed, steps, guidance, size, run, step, weights.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin

from iomm.config import InputError
from iomm.engine import builders
from iomm.engine.data.shards import Shards
from iomm.engine.data.source import ImageSource
from iomm.masking import visible_mask
from iomm.pipeline import CARD, Pipeline, height_width, image_grid, sample_pixels, to_images


def open_pipeline(run_dir, *, weights="ema", device="cpu"):
    """Folder of a run, or an exported one -> (Pipeline whose origin names run, step and weights; the run's config, or None).

    An exported folder has but one kind of weights. Raises InputError: no run, no checkpoint.
    """
    run_dir = Path(run_dir)
    if (run_dir / CARD).is_file():
        pipe = Pipeline.from_pretrained(run_dir, device=device)
        pipe.origin = pipe.origin or {"run": run_dir.as_posix()}
        return pipe, None
    config, model, manifest = builders.load_run(run_dir, weights=weights, device=device)
    origin = {
        "run": run_dir.as_posix(),
        "step": str(manifest["step"]),
        "weights": weights if manifest["ema"] else "raw",
    }
    return Pipeline(model, config.data.size_px, origin=origin), config


def draw_run(
    run_dir,
    *,
    num=16,
    steps=20,
    seed=0,
    prompts=(),
    guidance=1.0,
    shift=1.0,
    size=None,
    weights="ema",
    device="cpu",
    out=None,
    singles=False,
):
    """Writes a PNG grid and returns its path; with `singles` every picture too, in the folder of the grid's name. Its name has
    the first prompt's words, so that pictures of another prompt stay.

    With prompts: `num` pictures, the prompts in turn. Without: of a run on images, the first `num` of its order, below each
    its visible part, masked as in training, and what the model draws from that; of a run on pairs, pictures of its first
    captions.
    size: (height, width). Raises InputError: no run, no checkpoint.
    """
    if num < 1 or steps < 1:
        raise InputError(f"--num and --steps must be >= 1, got {num} and {steps}")
    pipe, config = open_pipeline(run_dir, weights=weights, device=device)
    words = in_a_name(*prompts[:1])
    if not prompts and config is None:
        raise InputError(
            f"{run_dir} is an exported folder, without data: say what to draw with --prompt"
        )
    if not prompts and config.train.data != "image":
        pairs = Shards(builders.prepare_data(config, progress=False, pairs=True))
        prompts = [pairs.caption(k) for k in range(min(num, len(pairs)))]
    if not prompts and (size or guidance != 1.0):
        raise InputError("--size and --guidance are for pictures from text: give --prompt")
    texts = [
        prompts[i % len(prompts)] if prompts else f"masked image {i} of the run" for i in range(num)
    ]
    if prompts:
        rows = {
            "drawn": pipe(texts, steps=steps, seed=seed, guidance=guidance, shift=shift, size=size)
        }
    else:
        rows = reconstruct(config, pipe.model, num, steps, seed, shift, device)
    step = f"step-{int(pipe.origin['step']):08d}-" if "step" in pipe.origin else ""
    path = png_path(out, run_dir, f"{step}{words}seed{seed}")
    facts = drawing_facts(
        pipe, size or pipe.size_px, steps=steps, seed=seed, guidance=guidance, shift=shift
    )
    save_grid(rows, texts, path, {**facts, "prompt": "\n".join(dict.fromkeys(texts))})
    for i, image in enumerate(rows["drawn"] if singles else ()):
        save_png(
            image, path.with_suffix("") / f"{i:04d}.png", {**facts, "prompt": texts[i], "image": i}
        )
    return path


def reconstruct(config, model, num, steps, seed, shift, device):
    """-> {"original", "visible", "drawn"}: the first num images of the run's order, what the MLLM
    sees of each, and what is drawn from that. PIL images.
    """
    mllm, _ = model.frozen
    shards = Shards(builders.prepare_data(config, progress=False))
    batch = next(
        iter(
            ImageSource(
                shards,
                seed=config.run.seed,
                global_batch=num,
                micro_batch=num,
                rank=0,
                world_size=1,
                size_px=config.data.size_px,
                vit_px=mllm.vit_px,
                device=torch.device(device),
                num_steps=1,
            )
        )
    )
    n_B = batch.n_B.to(device)
    condition = model.condition(batch.vit_pixels_BHWC, n_B)
    image_B = torch.arange(num, device=device)
    drawn = sample_pixels(
        model, condition, image_B, size_px=config.data.size_px, steps=steps, seed=seed, shift=shift
    )
    originals = to_images(batch.pixels_BCHW)
    visible = visible_parts(model, n_B, originals)
    return {"original": originals, "visible": visible, "drawn": to_images(drawn)}


def visible_parts(model, n_B: torch.Tensor, images: list[Image.Image]) -> list[Image.Image]:
    """Return the images of the sample numbers n_B as the MLLM sees them: hidden patches hatched.

    The mask is that of model.condition(..., n_B); the P image tokens are a square of patches, row
    by row.
    """
    mask, seed, num = model.recipe.mask, model.recipe.seed, model.frozen[0].num_image_tokens
    side = math.isqrt(num)
    visible_BYX = visible_mask(mask, seed, n_B, num).view(-1, side, side).cpu().numpy()
    shown = []
    for image, visible_YX in zip(images, visible_BYX, strict=True):
        pixels_HWC = np.array(image)
        y_HW, x_HW = np.indices(pixels_HWC.shape[:2])
        hidden_HW = ~visible_YX[y_HW * side // image.height, x_HW * side // image.width]
        # stripes, since an even grey could be the background of a picture
        stripe_HW = (y_HW + x_HW) // max(1, image.width // 32) % 2 == 0
        pixels_HWC[hidden_HW & stripe_HW] = 150
        pixels_HWC[hidden_HW & ~stripe_HW] = 185
        shown.append(Image.fromarray(pixels_HWC))
    return shown


def save_grid(
    rows: dict[str, list[Image.Image]], labels: list[str], path: Path, facts: dict, columns: int = 8
) -> None:
    """Write equally long rows of pictures as one PNG, `columns` pictures of each beneath another.

    Its text holds `facts` and, under "grid", the JSON that report.read_grid cuts it up by:
    {"columns", "rows": names of the rows, "labels": one for each picture of a row}.
    """
    columns = min(columns, len(labels))
    blank = Image.new("RGB", next(iter(rows.values()))[0].size, "white")
    cells = []
    for start in range(0, len(labels), columns):
        for images in rows.values():
            line = images[start : start + columns]
            cells += line + [blank] * (columns - len(line))
    grid = {"columns": columns, "rows": list(rows), "labels": labels}
    save_png(image_grid(cells, columns), path, {**facts, "grid": json.dumps(grid)})


def edit_run(
    run_dir,
    image,
    instruction,
    *,
    steps=20,
    seed=0,
    guidance=1.0,
    shift=1.0,
    size=None,
    weights="ema",
    device="cpu",
    out=None,
):
    """Image file and instruction -> path of the edited PNG. Raises InputError for a file that is no image."""
    picture = open_image(image)
    pipe, _ = open_pipeline(run_dir, weights=weights, device=device)
    path = png_path(out, run_dir, f"edited-{Path(image).stem}-{in_a_name(instruction)}seed{seed}")
    edited = pipe.edit(
        picture, instruction, steps=steps, seed=seed, guidance=guidance, shift=shift, size=size
    )
    facts = drawing_facts(
        pipe, size or pipe.size_px, steps=steps, seed=seed, guidance=guidance, shift=shift
    )
    save_png(edited, path, {**facts, "prompt": instruction, "source": Path(image).name})
    return path


def open_image(path):
    """Image file -> PIL image in RGB, upright as its EXIF says. Raises InputError."""
    try:
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"--image {path}: {error}") from error


def parse_size(text):
    """ "512" or "640x448" (width x height, in pixels) -> (height, width)."""
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if match is None:
        raise InputError(
            f"--size must be a side in pixels, as 512, or WIDTHxHEIGHT, as 640x448; got {text!r}"
        )
    return int(match[2] or match[1]), int(match[1])


def size_text(size):
    height, width = height_width(size)
    return f"{width}x{height}"


def drawing_facts(pipe, size, *, steps, seed, guidance, shift):
    """What the text of a PNG says of its origin and settings, beside the prompt."""
    return {
        **pipe.origin,
        "size": size_text(size),
        "steps": steps,
        "seed": seed,
        "guidance": f"{guidance:g}",
        "shift": shift,
    }


def save_png(image, path, facts):
    """Writes a PNG with {word: value} as its text, whatever the path's suffix."""
    text = PngImagePlugin.PngInfo()
    for word, value in facts.items():
        text.add_text(word, str(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG", pnginfo=text)


def in_a_name(text=""):
    """What a text gives a file's name: "make it red" -> "make-it-red-"; nothing -> ""."""
    words = "-".join(re.findall(r"\w+", text.lower()))[:40]
    return f"{words}-" if words else ""


def png_path(out, run_dir, name):
    """--out, which must be a PNG, or the place of such a picture in the run's folder."""
    path = Path(out) if out else Path(run_dir) / "samples" / f"{name}.png"
    if path.suffix.lower() != ".png":
        raise InputError(f"--out must end in .png, got {out}")
    return path


def export_run(run_dir, *, weights="ema", out=None):
    """Run folder -> folder that diffusers' from_pretrained and Pipeline.from_pretrained load: run/export/<weights>."""
    pipe, config = open_pipeline(run_dir, weights=weights)
    if config is None:
        raise InputError(f"{run_dir} is exported already")
    folder = Path(out) if out else Path(run_dir) / "export" / weights
    names = [
        Path(name).resolve() if Path(name).is_dir() else name
        for name in (builders.mllm_name(config), builders.vae_name(config))
    ]
    return pipe.save_pretrained(
        folder, mllm=names[0], vae=names[1], mllm_revision=config.model.mllm_revision
    )
