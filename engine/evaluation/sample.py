"""Sample, edit and export from a run's newest checkpoint, or from an exported folder.

Conditions are built as in the run's training. The text chunks of every PNG record its inputs and
settings: prompt, seed, steps, guidance, size, run, step, weights.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from iomm import lora
from iomm.caption_limit import CaptionLimit
from iomm.config import InputError
from iomm.engine import builders
from iomm.engine.config import RunConfig
from iomm.engine.data.atomic import whole_file, whole_folder
from iomm.engine.data.decode import DecodeError, as_trained
from iomm.engine.data.image import MAX_PIXELS, Rejected
from iomm.engine.data.shards import Shards
from iomm.engine.data.source import ImageSource
from iomm.masking import visible_mask
from iomm.model import IOMM
from iomm.pipeline import CARD, Pipeline, height_width, image_grid, sample_pixels, to_images


def open_pipeline(
    run_dir: str | Path,
    *,
    weights: str = "ema",
    device: str | torch.device = "cpu",
    mllm: str | None = None,
    vae: str | None = None,
) -> tuple[Pipeline, RunConfig | None]:
    """Load the pipeline of a run's newest intact checkpoint, or of an exported folder.

    mllm and vae replace the names in the run's config or in the exported folder.

    Returns:
        The pipeline, whose `origin` names run, step and weights, and the run's config. The config
        is None for an exported folder, which has only one kind of weights, so `weights` is ignored.

    Raises:
        InputError: if `run_dir` is not a run or has no intact checkpoint.
    """
    run_dir = Path(run_dir)
    if (run_dir / CARD).is_file():
        pipe = Pipeline.from_pretrained(run_dir, device=device, mllm=mllm, vae=vae)
        pipe.origin = pipe.origin or {"run": run_dir.as_posix()}
        return pipe, None
    config, model, manifest = builders.load_run(
        run_dir, weights=weights, device=device, mllm=mllm, vae=vae
    )
    origin = {
        "run": run_dir.as_posix(),
        "step": str(manifest["step"]),
        "weights": weights if manifest["ema"] else "raw",
    }
    return Pipeline(model, config.data.size_px, origin=origin), config


def sample_run(
    run_dir: str | Path,
    *,
    num: int = 16,
    steps: int = 20,
    seed: int = 0,
    prompts: Sequence[str] = (),
    guidance: float = 1.0,
    shift: float | str = 1.0,
    size: tuple[int, int] | None = None,
    weights: str = "ema",
    device: str | torch.device = "cpu",
    out: str | Path | None = None,
    singles: bool = False,
    mllm: str | None = None,
    vae: str | None = None,
) -> Path:
    """Sample images from a run, write them as a PNG grid, and return its path.

    With prompts, `num` images use them in turn. Without prompts the result depends on the run. A
    run on images shows the first `num` of its order, the visible part of each, masked as in
    training, and the model's reconstruction from that part. A run on pairs shows samples of its
    first captions.

    Args:
        run_dir: folder of a run, or an exported one.
        num: number of images.
        steps: sampler steps.
        seed: seed of the noise.
        prompts: texts to sample from.
        guidance: classifier-free guidance, 1 for none.
        shift: time shift of the sampler, see the pipeline.
        size: (height, width) in pixels, by default the run's.
        weights: "ema" or "raw".
        device: device of the model.
        out: path of the PNG. The default name in the run's folder contains the first words of the
            first prompt and a hash of all settings, so that no grid overwrites another one.
        singles: also write every image as a PNG, into a folder with the name of the grid.
        mllm: MLLM to use instead of the one that the run names.
        vae: VAE to use instead of the one that the run names.

    Raises:
        InputError: if `run_dir` is not a run, has no intact checkpoint, or if the settings are
            invalid.
    """
    if num < 1 or steps < 1:
        raise InputError(f"--num and --steps must be >= 1, got {num} and {steps}")
    if len(prompts) > num:
        raise InputError(
            f"--num is {num}, but {len(prompts)} prompts were given: give --num {len(prompts)}, or "
            "leave it out"
        )
    pipe, config = open_pipeline(run_dir, weights=weights, device=device, mllm=mllm, vae=vae)
    words = slug(*prompts[:1])
    if not prompts and config is None:
        raise InputError(
            f"{run_dir} is an exported folder without training data: give a --prompt to sample from"
        )
    if not prompts and config.train.data != "image":
        pairs = Shards(builders.prepare_data(config, progress=False, pairs=True))
        builders.check_data(config, pipe.origin["step"], pairs=pairs)
        limit = CaptionLimit(pipe.model.frozen[0], config.adapter, config.prompt)
        prompts = [limit.cut(pairs.caption(k)) for k in range(min(num, len(pairs)))]
    if not prompts and (size or guidance != 1.0):
        raise InputError("--size and --guidance apply only to samples from text: give a --prompt")
    if prompts:
        texts = [prompts[i % len(prompts)] for i in range(num)]
        # The row names are stored in the PNG, where the report reads them.
        rows = {
            "drawn": pipe(texts, steps=steps, seed=seed, guidance=guidance, shift=shift, size=size)
        }
    else:
        texts = [f"masked image {i} of the run" for i in range(num)]
        rows = reconstruct(config, pipe.model, num, steps, seed, shift, device, pipe.origin["step"])
    step = f"step-{int(pipe.origin['step']):08d}-" if "step" in pipe.origin else ""
    metadata = sampling_metadata(
        pipe, size or pipe.size_px, steps=steps, seed=seed, guidance=guidance, shift=shift
    )
    path = png_path(out, run_dir, f"{step}{words}seed{seed}-{hash_of(metadata, texts)}")
    save_grid(rows, texts, path, {**metadata, "prompt": "\n".join(dict.fromkeys(texts))})
    if singles:
        folder = path.with_suffix("")
        for i, image in enumerate(rows["drawn"]):
            save_png(image, folder / f"{i:04d}.png", {**metadata, "prompt": texts[i], "image": i})
    return path


def reconstruct(
    config: RunConfig,
    model: IOMM,
    num: int,
    steps: int,
    seed: int,
    shift: float | str,
    device: str | torch.device,
    step: str,
) -> dict[str, list[Image.Image]]:
    """Reconstruct the first `num` images of a run's order from their visible parts.

    step: the model's step. Its checkpoint records the images that the run was trained on.

    Returns:
        {"original": the images, "visible": the parts that the MLLM sees, "drawn": the model's
        samples}.
    """
    mllm, _ = model.frozen
    shards = Shards(builders.prepare_data(config, progress=False))
    builders.check_data(config, step, images=shards)
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
    condition = model.condition(batch.vit_pixels_BHWC, batch.n_B)
    image_B = torch.arange(num, device=device)
    samples = sample_pixels(
        model, condition, image_B, size_px=config.data.size_px, steps=steps, seed=seed, shift=shift
    )
    originals = to_images(batch.pixels_BCHW)
    visible = visible_parts(model, batch.n_B, originals)
    return {"original": originals, "visible": visible, "drawn": to_images(samples)}


def visible_parts(model: IOMM, n_B: Tensor, images: list[Image.Image]) -> list[Image.Image]:
    """Return the images of the sample numbers n_B as the MLLM sees them.

    Hidden patches are hatched. The mask is the one that model.condition(..., n_B) uses. The P image
    tokens form a square of patches, row by row.
    """
    mask, seed, num = model.recipe.mask, model.recipe.seed, model.frozen[0].num_image_tokens
    side = math.isqrt(num)
    visible_BYX = visible_mask(mask, seed, n_B.cpu(), num).view(-1, side, side).numpy()
    shown = []
    for image, visible_YX in zip(images, visible_BYX, strict=True):
        pixels_HWC = np.array(image)
        y_HW, x_HW = np.indices(pixels_HWC.shape[:2])
        hidden_HW = ~visible_YX[y_HW * side // image.height, x_HW * side // image.width]
        # Stripes, because an even grey could be the background of a picture.
        stripe_HW = (y_HW + x_HW) // max(1, image.width // 32) % 2 == 0
        pixels_HWC[hidden_HW & stripe_HW] = 150
        pixels_HWC[hidden_HW & ~stripe_HW] = 185
        shown.append(Image.fromarray(pixels_HWC))
    return shown


def save_grid(
    rows: dict[str, list[Image.Image]],
    labels: list[str],
    path: Path,
    metadata: dict[str, Any],
    columns: int = 8,
) -> None:
    """Write rows of pictures, all of the same length, as one PNG grid.

    The grid shows `columns` pictures of each row below each other, then the next ones. Its text
    chunks hold `metadata` and, under "grid", the JSON with which report.read_grid splits it again:
    {"columns", "rows": names of the rows, "labels": one for each picture of a row}.

    Args:
        rows: {name of the row: pictures}.
        labels: one for each picture of a row.
        path: file to write.
        metadata: text chunks.
        columns: maximum number of columns.
    """
    columns = min(columns, len(labels))
    blank = Image.new("RGB", next(iter(rows.values()))[0].size, "white")
    cells = []
    for start in range(0, len(labels), columns):
        for images in rows.values():
            line = images[start : start + columns]
            cells += line + [blank] * (columns - len(line))
    grid = {"columns": columns, "rows": list(rows), "labels": labels}
    save_png(image_grid(cells, columns), path, {**metadata, "grid": json.dumps(grid)})


def edit_run(
    run_dir: str | Path,
    image: str | Path,
    instruction: str,
    *,
    steps: int = 20,
    seed: int = 0,
    guidance: float = 1.0,
    shift: float | str = 1.0,
    size: tuple[int, int] | None = None,
    weights: str = "ema",
    device: str | torch.device = "cpu",
    out: str | Path | None = None,
    mllm: str | None = None,
    vae: str | None = None,
) -> Path:
    """Edit an image file by an instruction, write the result as a PNG, and return its path.

    Args:
        run_dir: folder of a run, or an exported one.
        image: image file.
        instruction: text of the edit.
        steps: sampler steps.
        seed: seed of the noise.
        guidance: classifier-free guidance, 1 for none.
        shift: time shift of the sampler, see the pipeline.
        size: (height, width) in pixels, by default the run's.
        weights: "ema" or "raw".
        device: device of the model.
        out: path of the PNG, by default in the run's folder.
        mllm: MLLM to use instead of the one that the run names.
        vae: VAE to use instead of the one that the run names.

    Raises:
        InputError: if `image` is not an image, or as in open_pipeline.
    """
    picture = open_image(image)
    pipe, _ = open_pipeline(run_dir, weights=weights, device=device, mllm=mllm, vae=vae)
    edited = pipe.edit(
        picture, instruction, steps=steps, seed=seed, guidance=guidance, shift=shift, size=size
    )
    metadata = sampling_metadata(
        pipe, size or pipe.size_px, steps=steps, seed=seed, guidance=guidance, shift=shift
    )
    metadata |= {"prompt": instruction, "source": Path(image).name}
    name = f"edited-{shortened(Path(image).stem)}-{slug(instruction)}seed{seed}"
    content = hashlib.sha256(picture.tobytes()).hexdigest()
    path = png_path(out, run_dir, f"{name}-{hash_of(metadata, content)}")
    save_png(edited, path, metadata)
    return path


def open_image(path: str | Path, name: str = "--image") -> Image.Image:
    """Read an image file in RGB, as training reads its images. Raises InputError.

    name: what the error calls the file.
    """
    try:
        return as_trained(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{name} {path} cannot be read: {error.strerror}") from error
    except (Rejected, DecodeError) as error:
        reason = getattr(error, "reason", "damaged").replace("_", " ")
        raise InputError(
            f"{name} {path} is not an image that training would read ({reason}: {error}). Convert "
            "it to a JPEG or PNG file"
        ) from error


def parse_size(text: str) -> tuple[int, int]:
    """Parse "512" or "640x448" (width x height, in pixels) to (height, width)."""
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if match is None:
        raise InputError(
            "--size must be a side in pixels such as 512, or WIDTHxHEIGHT such as 640x448, "
            f"got {text!r}"
        )
    height, width = int(match[2] or match[1]), int(match[1])
    if height * width > MAX_PIXELS:
        raise InputError(f"--size must be at most {MAX_PIXELS:,} pixels in all, got {text}")
    return height, width


def size_text(size: int | tuple[int, int]) -> str:
    """Return the size of an image as "WIDTHxHEIGHT"."""
    height, width = height_width(size)
    return f"{width}x{height}"


def sampling_metadata(
    pipe: Pipeline,
    size: int | tuple[int, int],
    *,
    steps: int,
    seed: int,
    guidance: float,
    shift: float | str,
) -> dict[str, Any]:
    """Return the text chunks of a PNG that record its origin and settings, without the prompt."""
    return {
        **pipe.origin,
        "size": size_text(size),
        "steps": steps,
        "seed": seed,
        "guidance": f"{guidance:g}",
        "shift": shift,
    }


def save_png(image: Image.Image, path: Path, metadata: dict[str, Any]) -> None:
    """Write a PNG with `metadata` as text chunks, whatever the path's suffix."""
    text = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        text.add_text(key, str(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        image.save(partial, format="PNG", pnginfo=text)


def slug(text: str = "") -> str:
    """Return a text as part of a file name: "make it red" -> "make-it-red-", "" -> ""."""
    words = shortened("-".join(re.findall(r"\w+", text.lower()))[:40])
    return f"{words}-" if words else ""


def shortened(name: str, num_bytes: int = 80) -> str:
    """Return the start of a name. A file system allows 255 bytes for the name of a file."""
    return os.fsdecode(os.fsencode(name)[:num_bytes]).encode(errors="ignore").decode()


def hash_of(metadata: dict[str, Any], *facts: object) -> str:
    """Return a short hash of everything that determines a picture but the folder of the run."""
    known = {key: str(value) for key, value in metadata.items() if key != "run"}
    text = json.dumps([known, *facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def png_path(out: str | Path | None, run_dir: str | Path, name: str) -> Path:
    """Return --out, which must be a PNG, or by default a path in the run's folder."""
    path = Path(out) if out else Path(run_dir) / "samples" / f"{name}.png"
    if path.suffix.lower() != ".png":
        raise InputError(f"--out must end in .png, got {out}")
    return path


def export_run(
    run_dir: str | Path,
    *,
    weights: str = "ema",
    out: str | Path | None = None,
    merge: bool = False,
    mllm: str | None = None,
    vae: str | None = None,
) -> Path:
    """Export a run for diffusers' from_pretrained and for Pipeline.from_pretrained.

    Of a run with LoRA, only A and B are exported, as a file for diffusers' load_lora_weights. With
    `merge` they are merged into the base, and the result is that of a run without LoRA. mllm and
    vae replace the names in the run's config.

    Returns:
        The folder, by default run_dir/export/<weights> or run_dir/export/<weights>-merged, or the
        LoRA file.

    Raises:
        InputError: run_dir is an exported folder, or `merge` is given and the run has no LoRA.
    """
    pipe, config = open_pipeline(run_dir, weights=weights, mllm=mllm, vae=vae)
    if config is None:
        raise InputError(f"{run_dir} is already an exported folder: give the folder of a run")
    if merge and not config.lora.rank:
        raise InputError(f"{run_dir} is a run without LoRA: leave --merge out")
    name = f"{weights}-merged" if merge else weights
    folder = Path(out) if out else Path(run_dir) / "export" / name
    if config.lora.rank and not merge:
        pipe.origin["base"] = config.run.init
        with whole_folder(folder, lora.FILE) as fresh:
            pipe.save_lora(fresh)
        return folder / lora.FILE
    with whole_folder(folder, CARD, keep=("samples",)) as fresh:
        pipe.save_pretrained(
            fresh,
            mllm=config.model.mllm,
            vae=config.model.vae,
            mllm_revision=config.model.mllm_revision,
        )
    return folder
