"""Grade a model on the shapes dataset: its samples, scored by kind of picture.

The samples come from captions, from pictures with hidden tokens, and from edits. shapes/scorer.py
scores each of them, and every kind of picture becomes a row of a table.
"""

import json
from collections.abc import Iterable, Sequence
from colorsys import hsv_to_rgb
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from iomm.config import InputError, choice
from iomm.engine.builders import load_run
from iomm.engine.shapes.dataset import COLOURS, DIRECTION, KINDS, Scene, edit, render, scene
from iomm.engine.shapes.mllm import vit_bytes, vit_pixels
from iomm.engine.shapes.scorer import parse, score, score_edit
from iomm.masking import visible_mask
from iomm.model import IOMM
from iomm.pipeline import sample_pixels, to_images
from iomm.vae import Latents

# What the model is conditioned on: a caption; a picture, masked as in training; a picture and an
# instruction.
TASKS = ("text", "image", "edit")
# The keys of score().
SCORE_KEYS = ("fits", "number", "colours", "shapes", "relation")
# Edits have the keys of score_edit() too, and "edited": the picture fits and preserves the rest.
EDIT_SCORE_KEYS = (*SCORE_KEYS, "edited", "kept", "object", "place", "size", "background")
# Guidance by task, wherever models are compared.
GUIDANCE = {"text": 2.0, "image": 1.0, "edit": 2.0}
# Added to the seeds of the scenes, so that no run is trained on these pictures.
SEED = 2**32


class Requests(NamedTuple):
    """The inputs and targets of a grade: lists with one entry per picture."""

    # Rows of the table.
    kinds: list[str]
    # What the model reads.
    texts: list[str]
    # What its samples must fit.
    captions: list[str]
    # The pictures that the model is shown. For "text", the scenes of the captions.
    scenes: list[Scene]
    # For "edit": source scene and instruction.
    edited: list[tuple[Scene, str]] | None = None


def edits(num: int, split: str, seed: int = 0) -> list[tuple[Scene, str, str]]:
    """Return `num` edits: (scene of one shape, instruction, caption of the result).

    The first half are "make" instructions, the second half "add".
    """
    found = {"make": [], "add": []}
    i = 0
    while min(map(len, found.values())) < num // 2:
        picture = scene(SEED + seed, i, split, "single_object")
        text, caption = edit(picture, SEED + seed, i, split)
        found[text.split()[0]].append((picture, text, caption))
        i += 1
    return [one for kind in found.values() for one in kind[: num // 2]]


def requests(task: str, split: str, per_kind: int, seed: int = 0) -> Requests:
    """Return the requests of a seed, the same for every model.

    There are as many edits as captions of all kinds. Raises InputError for an unknown task or
    split, or for per_kind < 1.
    """
    choice("task", task, TASKS)
    if per_kind < 1:
        raise InputError(f"pictures per kind must be >= 1, got {per_kind}")
    if task == "edit":
        scenes, texts, captions = zip(*edits(per_kind * len(KINDS), split, seed), strict=True)
        kinds = [text.split()[0] for text in texts]
        edited = list(zip(scenes, texts, strict=True))
        return Requests(kinds, list(texts), list(captions), list(scenes), edited)
    kinds = [kind for kind in KINDS for _ in range(per_kind)]
    scenes = [scene(SEED + seed, i, split, kind) for i, kind in enumerate(kinds)]
    captions = [picture.caption for picture in scenes]
    return Requests(kinds, captions, captions, scenes)


@torch.no_grad()
def grade(
    model: IOMM,
    size_px: int,
    task: str = "text",
    *,
    split: str = "train",
    per_kind: int = 8,
    steps: int = 20,
    guidance: float = 1.0,
    seed: int = 0,
    batch: int = 64,
) -> tuple[dict[str, dict], list[Image.Image]]:
    """Return the scores of a model by kind, and the samples that were scored, in order.

    Args:
        model: the model, not sharded.
        size_px: side of the samples.
        task: one of TASKS. There are as many edits, half "make", half "add", as captions of all
            kinds.
        split: "train" requests pictures like those of training, "test" combinations of colour,
            shape and role that never occur in training.
        per_kind: pictures per kind.
        steps: sampler steps.
        guidance: classifier-free guidance, 1 for none.
        seed: seed of scenes, noise and masks, which do not depend on the model.
        batch: samples per forward pass.

    Returns:
        {kind: {"fits": share, "number": share, ..., "pictures": count}} and the PIL images.

    Raises:
        InputError: for an unknown task or split, or per_kind < 1.
    """
    mllm, device = model.frozen[0], model.generator.final.weight.device
    wanted = requests(task, split, per_kind, seed)
    pictures = []
    for start in range(0, len(wanted.texts), batch):
        part = slice(start, start + batch)
        n_B = torch.arange(len(wanted.texts))[part]
        tokens_BPD = visible = None
        if task != "text":
            shown = [
                vit_pixels(render(picture), mllm.vit_px, size_px) for picture in wanted.scenes[part]
            ]
            tokens_BPD = mllm.image_tokens(torch.stack(shown).to(device))
        if task == "image":
            visible = visible_mask(model.recipe.mask, seed, n_B, mllm.num_image_tokens)
        texts = wanted.texts[part]
        if task == "text":
            texts = [model.recipe.prompt.text_of(caption) for caption in texts]
        elif task == "image":
            texts = model.reconstruct_prompts(n_B)
        condition = mllm.condition(
            texts,
            tokens_BPD,
            visible=visible,
            mode=model.recipe.mask.mode,
            positions=model.recipe.mask.positions,
        )
        pixels_BCHW = sample_pixels(
            model,
            condition,
            n_B.to(device),
            size_px=size_px,
            steps=steps,
            guidance=guidance,
            seed=seed,
        )
        pictures += to_images(pixels_BCHW)
    return score_table(wanted.kinds, pictures, wanted.captions, wanted.edited), pictures


@torch.no_grad()
def ceiling(
    size_px: int,
    task: str = "text",
    *,
    split: str = "train",
    per_kind: int = 8,
    seed: int = 0,
    vae: Latents | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, dict]:
    """Return grade()'s table for the rendered pictures, passed through the VAE if one is given.

    This is the upper limit for a perfect model, because the errors of the scorer and of the VAE
    affect every model.

    Args:
        size_px: side of the pictures.
        task: one of TASKS.
        split: as in grade().
        per_kind: pictures per kind.
        seed: seed of the scenes.
        vae: the VAE.
        device: device of the VAE.
    """
    wanted = requests(task, split, per_kind, seed)
    scenes = wanted.scenes
    if task == "edit":
        scenes = list(map(real_edit, wanted.scenes, wanted.texts, wanted.captions))
    pictures = []
    for picture in scenes:
        pixels_1CHW = (vit_bytes(render(picture), size_px).to(device) / 127.5 - 1)[None]
        if vae is not None:
            pixels_1CHW = vae.decode(vae.encode(pixels_1CHW))
        pictures += to_images(pixels_1CHW)
    return score_table(wanted.kinds, pictures, wanted.captions, wanted.edited)


def real_edit(before: Scene, instruction: str, caption: str) -> Scene:
    """Return the scene that a correct edit of a scene with one shape shows.

    Background and noise stay the same. "make" gives the shape another colour. After "add" the two
    shapes are in the middle, with the sizes and the distance that the dataset gives its pairs.
    """
    (source,) = before.shapes
    objects, relation = parse(caption)
    if instruction.startswith("make"):
        colour = objects[0][0]
        after = (replace(source, colour=colour, rgb=central_rgb(colour)),)
    else:
        (colour, shape), _ = objects
        dx, dy = (0.23 * step for step in DIRECTION[relation])
        added = replace(
            source,
            shape=shape,
            colour=colour,
            x=0.5 + dx,
            y=0.5 + dy,
            radius=0.175,
            rgb=central_rgb(colour),
        )
        after = added, replace(source, x=0.5 - dx, y=0.5 - dy, radius=0.122)
    return replace(before, caption=caption, shapes=after)


def central_rgb(colour: str) -> tuple[int, int, int]:
    """Return the centre of the dataset's range of a colour, RGB in 0..255."""
    hue, saturation, value = (sum(ends) / 2 for ends in COLOURS[colour])
    return tuple(round(255 * level) for level in hsv_to_rgb(hue / 360 % 1, saturation, value))


def score_table(
    kinds: Sequence[str],
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    edited: Sequence[tuple[Scene, str]] | None = None,
) -> dict[str, dict]:
    """Score pictures and return {kind: {"fits": share, "number": share, ..., "pictures": count}}.

    edited: the source scene and the instruction of each picture, if the pictures are edits.
    """
    rows = {}
    for i, (kind, picture, caption) in enumerate(zip(kinds, pictures, captions, strict=True)):
        scores = score(picture, caption)
        if edited is not None:
            scores |= score_edit(picture, *edited[i])
            scores["edited"] = scores["fits"] and scores["kept"]
        rows.setdefault(kind, []).append(scores)
    keys = SCORE_KEYS if edited is None else EDIT_SCORE_KEYS
    return {
        kind: {**{key: mean(row[key] for row in found) for key in keys}, "pictures": len(found)}
        for kind, found in rows.items()
    }


def grade_run(
    run_dir: str | Path,
    *,
    per_kind: int = 16,
    steps: int = 20,
    device: str | torch.device = "cpu",
) -> str:
    """Grade the newest weights of a run and return the tables as text.

    There are three tables, with a line per kind: masked images and captions like those of training,
    and rendered pictures. The tables are also written to run_dir/scores.json as {"image", "text",
    "real"}.
    """
    config, model, _ = load_run(run_dir, device=device)
    size_px = config.data.size_px
    tables = {
        task: grade(model, size_px, task, per_kind=per_kind, steps=steps, guidance=GUIDANCE[task])[
            0
        ]
        for task in ("image", "text")
    }
    tables["real"] = ceiling(size_px, per_kind=per_kind, vae=model.frozen[1], device=device)
    (Path(run_dir) / "scores.json").write_text(json.dumps(tables, indent=1) + "\n")
    return "\n".join(
        f"scores, {title}\n{describe(tables[key])}"
        for key, title in (
            ("image", "samples from masked images"),
            ("text", f"samples from captions, guidance {GUIDANCE['text']:g}"),
            ("real", f"rendered pictures at {size_px} px, through the VAE"),
        )
    )


def mean(values: Iterable[bool | None]) -> float | None:
    """Return the share of True among the values that are not None, or None if all are None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def overall(table: dict[str, dict], key: str = "fits") -> float:
    """Return a score's mean over all pictures of a table."""
    rows = [row for row in table.values() if row[key] is not None]
    return sum(row[key] * row["pictures"] for row in rows) / sum(row["pictures"] for row in rows)


def describe(table: dict[str, dict]) -> str:
    """Return a table as text, with a line per kind and one for all pictures."""
    keys = [key for key in next(iter(table.values())) if key != "pictures"]
    lines = [f"{'':<14}" + "".join(f"{key:>12}" for key in keys)]
    for kind, row in table.items():
        cells = ("-" if row[key] is None else f"{row[key]:.2f}" for key in keys)
        lines.append(f"{kind:<14}" + "".join(f"{cell:>12}" for cell in cells))
    cells = ("-" if key == "relation" else f"{overall(table, key):.2f}" for key in keys)
    lines.append(f"{'all':<14}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)
