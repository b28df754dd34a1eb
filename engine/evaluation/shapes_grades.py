"""How well a model draws the shapes world: pictures from captions, from pictures with hidden tokens, and from edits, each
decided by score.py, a row a kind.
"""

import json
from colorsys import hsv_to_rgb
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from iomm.config import InputError, choice
from iomm.engine.builders import load_run
from iomm.engine.shapes.dataset import COLOURS, DIRECTION, KINDS, Scene, draw, edit, scene
from iomm.engine.shapes.mllm import vit_bytes, vit_pixels
from iomm.engine.shapes.scorer import kept, parse, score
from iomm.masking import visible_mask
from iomm.mllm import RECONSTRUCT
from iomm.model import IOMM
from iomm.pipeline import sample_pixels, to_images

# What the model is shown: a caption; a picture, masked as in training; a picture and an instruction.
WAYS = ("text", "image", "edit")
# What score() answers
ASKED = ("fits", "number", "colours", "shapes", "relation")
# Of an edit also what kept() answers, and "edited": it fits and keeps the rest.
ASKED_OF_EDITS = (*ASKED, "edited", "kept", "object", "place", "size", "background")
# By way, wherever models are compared.
GUIDANCE = {"text": 2.0, "image": 1.0, "edit": 2.0}
# Of the scenes that are asked for: pictures that no run is trained on.
SEED = 2**32


class Tasks(NamedTuple):
    """What a model is asked for, a row a picture: lists of equal length."""

    kinds: list[str]
    # What the model reads.
    texts: list[str]
    # What its pictures must fit.
    captions: list[str]
    # Of the pictures that it is shown; for "text" those of the captions.
    scenes: list[Scene]
    # Scene and instruction, for "edit"
    edited: list[tuple[Scene, str]] | None = None


def edits(num: int, split: str, seed: int = 0) -> list[tuple[Scene, str, str]]:
    """Return (scene of one shape, instruction, caption of what it asks for): half "make", half "add"."""
    found = {"make": [], "add": []}
    i = 0
    while min(map(len, found.values())) < num // 2:
        picture = scene(SEED + seed, i, split, "single_object")
        text, caption = edit(picture, SEED + seed, i, split)
        found[text.split()[0]].append((picture, text, caption))
        i += 1
    return [one for kind in found.values() for one in kind[: num // 2]]


def tasks(way: str, split: str, per_kind: int, seed: int = 0) -> Tasks:
    """Return the tasks of a seed, the same for every model; as many edits as captions of all kinds."""
    choice("way", way, WAYS)
    if per_kind < 1:
        raise InputError(f"pictures per kind must be >= 1, got {per_kind}")
    if way == "edit":
        scenes, texts, captions = zip(*edits(per_kind * len(KINDS), split, seed))
        kinds = [text.split()[0] for text in texts]
        return Tasks(kinds, list(texts), list(captions), list(scenes), list(zip(scenes, texts)))
    kinds = [kind for kind in KINDS for _ in range(per_kind)]
    scenes = [scene(SEED + seed, i, split, kind) for i, kind in enumerate(kinds)]
    captions = [picture.caption for picture in scenes]
    return Tasks(kinds, captions if way == "text" else [RECONSTRUCT] * len(kinds), captions, scenes)


@torch.no_grad()
def grade(
    model: IOMM,
    size_px: int,
    way: str = "text",
    *,
    split: str = "train",
    per_kind: int = 8,
    steps: int = 20,
    guidance: float = 1.0,
    seed: int = 0,
    batch: int = 64,
) -> tuple[dict[str, dict], list[Image.Image]]:
    """Return the scores by kind, and the pictures that the model drew for them, in order.

    Args:
        model: not sharded.
        way: one of WAYS; there are as many edits, half "make", half "add", as captions of all kinds.
        split: "train" asks for pictures like those of training, "test" for combinations of colour,
            shape and role that training never shows.
        seed: of scenes, noise and masks, which do not depend on the model.

    Returns:
        {kind: {"fits": share, "number": share, ...; "pictures": how many}}, PIL images.

    Raises:
        InputError: for unknown ways and splits.
    """
    mllm, device = model.frozen[0], model.generator.final.weight.device
    asked, pictures = tasks(way, split, per_kind, seed), []
    for start in range(0, len(asked.texts), batch):
        part = slice(start, start + batch)
        n_B = torch.arange(len(asked.texts), device=device)[part]
        tokens_BPD = visible = None
        if way != "text":
            shown = [
                vit_pixels(draw(picture), mllm.vit_px, size_px) for picture in asked.scenes[part]
            ]
            tokens_BPD = mllm.image_tokens(torch.stack(shown).to(device))
        if way == "image":
            visible = visible_mask(model.recipe.mask, seed, n_B, mllm.num_image_tokens)
        condition = mllm.condition(
            asked.texts[part],
            tokens_BPD,
            visible=visible,
            mode=model.recipe.mask.mode,
            positions=model.recipe.mask.positions,
        )
        pictures += to_images(
            sample_pixels(
                model, condition, n_B, size_px=size_px, steps=steps, guidance=guidance, seed=seed
            )
        )
    return judged(asked.kinds, pictures, asked.captions, asked.edited), pictures


@torch.no_grad()
def ceiling(
    size_px: int,
    way: str = "text",
    *,
    split: str = "train",
    per_kind: int = 8,
    seed: int = 0,
    vae=None,
    device: str = "cpu",
) -> dict[str, dict]:
    """Return grade()'s table of the real pictures, through the autoencoder if one is given.

    This is the limit for a model that draws perfectly: what the scorer and the VAE lose is lost for
    every model.
    """
    asked = tasks(way, split, per_kind, seed)
    scenes = (
        list(map(real_edit, asked.scenes, asked.texts, asked.captions))
        if way == "edit"
        else asked.scenes
    )
    pictures = []
    for picture in scenes:
        pixels_CHW = vit_bytes(draw(picture), size_px).to(device) / 127.5 - 1
        decoded = pixels_CHW[None] if vae is None else vae.decode(vae.encode(pixels_CHW[None]))
        pictures += to_images(decoded)
    return judged(asked.kinds, pictures, asked.captions, asked.edited)


def real_edit(before: Scene, instruction: str, caption: str) -> Scene:
    """Return the scene that an edit of a scene with one shape asks for, background and noise as before.

    "make" gives the shape another colour. After "add" the two shapes lie in the middle, with the sizes
    and the distance that the dataset gives such a pair.
    """
    (source,) = before.shapes
    objects, relation = parse(caption)
    if instruction.startswith("make"):
        colour = objects[0][0]
        after = (replace(source, colour=colour, rgb=middle_of(colour)),)
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
            rgb=middle_of(colour),
        )
        after = added, replace(source, x=0.5 - dx, y=0.5 - dy, radius=0.122)
    return replace(before, caption=caption, shapes=after)


def middle_of(colour: str) -> tuple[int, int, int]:
    """Return the middle of the dataset's range of a colour, RGB in 0..255."""
    hue, saturation, value = (sum(ends) / 2 for ends in COLOURS[colour])
    return tuple(round(255 * level) for level in hsv_to_rgb(hue / 360 % 1, saturation, value))


def judged(
    kinds: list[str],
    pictures: list,
    captions: list[str],
    edited: list[tuple[Scene, str]] | None = None,
) -> dict[str, dict]:
    """Return {kind: {"fits": share, "number": share, ...; "pictures": how many}} of the pictures.

    edited: the scene that each picture was made from and the instruction, if the pictures are edits.
    """
    rows = {}
    for i, (kind, picture, caption) in enumerate(zip(kinds, pictures, captions)):
        verdict = score(picture, caption)
        if edited is not None:
            verdict |= kept(picture, *edited[i])
            verdict["edited"] = verdict["fits"] and verdict["kept"]
        rows.setdefault(kind, []).append(verdict)
    keys = ASKED if edited is None else ASKED_OF_EDITS
    return {
        kind: {**{key: mean(row[key] for row in found) for key in keys}, "pictures": len(found)}
        for kind, found in rows.items()
    }


def grade_run(run_dir, *, per_kind=16, steps=20, device="cpu"):
    """Run folder -> text: grades of its newest weights on masked images and on captions like those of training, a line a kind,
    and of real pictures. Writes run_dir/scores.json, {way: grade's table}.
    """
    config, model, _ = load_run(run_dir, device=device)
    size_px = config.data.size_px
    found = {
        way: grade(model, size_px, way, per_kind=per_kind, steps=steps, guidance=GUIDANCE[way])[0]
        for way in ("image", "text")
    }
    found["real"] = ceiling(size_px, per_kind=per_kind, vae=model.frozen[1], device=device)
    (Path(run_dir) / "scores.json").write_text(json.dumps(found, indent=1) + "\n")
    return "\n".join(
        f"scores, {shown}\n{describe(found[way])}"
        for way, shown in (
            ("image", "masked images drawn whole"),
            ("text", f"captions drawn, guidance {GUIDANCE['text']:g}"),
            ("real", f"real pictures at {size_px} px, through the VAE"),
        )
    )


def mean(values):
    """Share of True, of those that are not None; None if all are."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def overall(table, key="fits"):
    """Mean over all pictures of a grade's table."""
    asked = [row for row in table.values() if row[key] is not None]
    return sum(row[key] * row["pictures"] for row in asked) / sum(row["pictures"] for row in asked)


def describe(table):
    """A grade's table as text, a line a kind."""
    keys = [key for key in next(iter(table.values())) if key != "pictures"]
    lines = [f"{'':<14}" + "".join(f"{key:>12}" for key in keys)]
    for kind, row in table.items():
        shown = ("-" if row[key] is None else f"{row[key]:.2f}" for key in keys)
        lines.append(f"{kind:<14}" + "".join(f"{share:>12}" for share in shown))
    over_all = ("-" if key == "relation" else f"{overall(table, key):.2f}" for key in keys)
    lines.append(f"{'all':<14}" + "".join(f"{share:>12}" for share in over_all))
    return "\n".join(lines)
