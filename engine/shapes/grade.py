"""How well a model draws the shapes world: pictures from captions, from pictures with hidden tokens, and from edits, each
decided by score.py, a row a kind."""

import json
from pathlib import Path

import torch

from iomm.config import InputError, choice
from iomm.engine.parts import load_run
from iomm.engine.shapes.mllm import vit_bytes, vit_pixels
from iomm.engine.shapes.score import score
from iomm.engine.shapes.world import KINDS, draw, edit, scene
from iomm.masking import visible_mask
from iomm.mllm import RECONSTRUCT
from iomm.pipeline import draw as draw_pixels
from iomm.pipeline import to_images

WAYS = ("text", "image", "edit")     # what the model is shown: a caption; a picture, masked as in training; picture and instruction
ASKED = ("fits", "number", "colours", "shapes", "relation")      # what score() answers
GUIDANCE = {"text": 2.0, "image": 1.0, "edit": 2.0}              # by way, wherever models are compared
SEED = 2**32                         # of the scenes that are asked for: pictures that no run is trained on


def asked_for(kinds, split, per_kind):
    """The scenes that every model is asked for, per_kind of each kind."""
    return [scene(SEED, i, split, kind) for i, kind in enumerate(kind for kind in kinds for _ in range(per_kind))]


def edits(num, split):
    """[(scene of one shape, instruction, caption of what it asks for)], the same for every model: half "make", half "add"."""
    found, i = {"make": [], "add": []}, 0
    while min(map(len, found.values())) < num // 2:
        picture = scene(SEED, i, split, "single_object")
        text, caption = edit(picture, SEED, i, split)
        found[text.split()[0]].append((picture, text, caption))
        i += 1
    return [one for kind in found.values() for one in kind[:num // 2]]


def tasks(model, way, split, per_kind, size_px):
    """-> (kinds, [text], vit pixels or None, captions that the pictures must fit) of what the model will be asked."""
    choice("way", way, WAYS)
    scenes = asked_for(KINDS, split, per_kind)
    kinds, texts, captions = zip(*((picture.kind, RECONSTRUCT, picture.caption) for picture in scenes))
    if way == "text":
        return kinds, list(captions), None, captions
    if way == "edit":
        scenes, texts, captions = zip(*edits(len(scenes), split))
        kinds = [text.split()[0] for text in texts]
    pixels_ICHW = torch.stack([vit_pixels(draw(picture), model.frozen[0].vit_px, size_px) for picture in scenes])
    return kinds, list(texts), pixels_ICHW, captions


@torch.no_grad()
def grade(model, size_px, way="text", *, split="train", per_kind=8, steps=20, guidance=1.0, seed=0, batch=64):
    """IOMM, not sharded -> ({kind: {"fits": share, "number": share, ...; "pictures": how many}}, the pictures, PIL, in order).

    way: one of WAYS; there are as many edits, half "make", half "add", as captions of all kinds. split: "train" asks for
    pictures like those of training, "test" for combinations never seen there. Noise and masks belong to (seed, picture).
    Raises InputError for unknown ways and splits."""
    if per_kind < 1:
        raise InputError(f"pictures per kind must be >= 1, got {per_kind}")
    mllm, device = model.frozen[0], model.generator.final.weight.device
    kinds, texts, pixels_ICHW, captions = tasks(model, way, split, per_kind, size_px)
    pictures = []
    for start in range(0, len(texts), batch):
        part = slice(start, start + batch)
        n_B = torch.arange(len(texts), device=device)[part]
        tokens_BPD = visible = None
        if pixels_ICHW is not None:
            tokens_BPD = mllm.image_tokens(pixels_ICHW[part].to(device))
        if way == "image":
            visible = visible_mask(model.recipe.mask, seed, n_B, mllm.num_image_tokens)
        condition = mllm.condition(texts[part], tokens_BPD, visible=visible, mode=model.recipe.mask.mode,
                                   positions=model.recipe.mask.positions)
        pictures += to_images(draw_pixels(model, condition, n_B, size_px=size_px, steps=steps, guidance=guidance, seed=seed))
    return judged(kinds, pictures, captions), pictures


def ceiling(size_px, split="train", per_kind=8):
    """grade()'s table of the real pictures, made as small as a model's: what a model that draws perfectly would get."""
    scenes = asked_for(KINDS, split, per_kind)
    pictures = [vit_bytes(draw(picture), size_px).permute(1, 2, 0).numpy() for picture in scenes]
    return judged([picture.kind for picture in scenes], pictures, [picture.caption for picture in scenes])


def judged(kinds, pictures, captions):
    """Of equally long lists -> {kind: {"fits": share, "number": share, ...; "pictures": how many}}."""
    rows = {}
    for kind, picture, caption in zip(kinds, pictures, captions):
        rows.setdefault(kind, []).append(score(picture, caption))
    return {kind: {**{key: mean(row[key] for row in found) for key in ASKED}, "pictures": len(found)} for kind, found in rows.items()}


def grade_run(run_dir, *, per_kind=8, steps=20, device="cpu"):
    """Run folder -> text: grades of its newest weights on masked images and on captions like those of training, a line a kind,
    and of real pictures. Writes run_dir/scores.json, {way: grade's table}."""
    config, model, _ = load_run(run_dir, device=device)
    size_px = config.data.size_px
    found = {way: grade(model, size_px, way, per_kind=per_kind, steps=steps, guidance=GUIDANCE[way])[0]
             for way in ("image", "text")}
    found["real"] = ceiling(size_px, per_kind=per_kind)
    (Path(run_dir) / "scores.json").write_text(json.dumps(found, indent=1) + "\n")
    return "\n".join(f"scores, {shown}\n{describe(found[way])}" for way, shown in
                     (("image", "masked images drawn whole"), ("text", f"captions drawn, guidance {GUIDANCE['text']:g}"),
                      ("real", f"real pictures at {size_px} px")))


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
    lines = [f"{'':<14}" + "".join(f"{key:>10}" for key in ASKED)]
    for kind, row in table.items():
        lines.append(f"{kind:<14}" + "".join(f"{'-' if row[key] is None else format(row[key], '.2f'):>10}" for key in ASKED))
    lines.append(f"{'all':<14}" + "".join(f"{overall(table, key):>10.2f}" for key in ASKED[:-1]))
    return "\n".join(lines)
