"""Whether a picture of the shapes world shows what a caption says, and what an edited one kept, from its pixels alone.

The background is a plane fitted to the picture's border; what differs from it falls into connected pieces, and a connected
piece of several colours into one of each; each piece is compared with the three shapes at its own place, area and best turn,
and its colour with the ranges that the world draws from. Nothing is learned. What is smaller than LEAST_AREA is not seen,
nor a colour within BACKGROUND_LEVELS of the piece that it touches or of a shade of it. Works at any size from 16 px on.
"""

import math
import re
from collections import Counter
from colorsys import hsv_to_rgb
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from iomm.config import InputError
from iomm.engine.shapes.dataset import COLOURS, DIRECTION, PLACES, REACH, SHAPES, Scene, Shape

# A change of verdicts raises it, so that kept scores are found anew.
VERSION = 2
# Pixels to which every picture is brought; the smallest shape is then 29 wide.
SIDE = 128
# Distance from the background, or a piece's shades, in grey levels of 255, that is no noise (at
# most 8 a channel)
BACKGROUND_LEVELS = 40.0
# Of the picture; the smallest shape drawn has 0.033
LEAST_AREA = 0.012
# Intersection over union with the ideal shape; real ones at 32 px have 0.87 and more.
LEAST_OVERLAP = 0.80
# Distance from the nearest colour that the world draws.
COLOUR_LEVELS = 60.0
# Smaller over larger distance of two centres, up to which one is beside or above the other.
LEAN = 0.6
# What counts as unchanged by an edit: twice the largest difference from the scene that was found in 400
# real pictures, through the shapes VAE with noise of 0.1 in its latents (of unit variance), and blurred
# (64 -> 24 -> 64 px) with smooth noise of 10 grey levels. The background's tint is not judged: the VAE
# itself changes it by as much as the dataset's backgrounds differ in it.
# Between the centres, in parts of the side; measured 0.0073
KEPT_DISTANCE = 0.0146
# Larger over smaller area; measured 1.087
KEPT_AREA = 1.17
# Between the brightness of the backgrounds, of 255; measured 4.2
KEPT_LEVELS = 8.4

NUMBERS = {"two": 2, "three": 3}
ONE = rf"an? (?P<colour{{0}}>{'|'.join(COLOURS)}) (?P<shape{{0}}>{'|'.join(SHAPES)})"
CAPTION = re.compile(
    rf"(?P<number>two|three) (?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})s"
    rf"|{ONE.format(1)}(?: (?P<relation>and|{'|'.join(DIRECTION)}) {ONE.format(2)})?"
)
INSTRUCTION = re.compile(
    rf"make it ({'|'.join(COLOURS)})|add {ONE.format('')} ({'|'.join(PLACES)})"
)


@dataclass(frozen=True)
class Found:
    """One piece of a picture. x, y: its centre in parts of the side, y downwards; area in parts of the picture. colour or
    shape is None if it is none of the world's.
    """

    shape: str | None
    colour: str | None
    x: float
    y: float
    area: float


def parse(caption):
    """Caption -> ([(colour, shape) of each object, in order], "left of" .. "below", "and" or None). Raises InputError."""
    match = CAPTION.fullmatch(caption)
    if match is None:
        raise InputError(
            f"not a caption of the shapes world: {caption!r}; like 'a red circle left of a blue square'"
        )
    if match["number"]:
        return [(match["colour"], match["shape"])] * NUMBERS[match["number"]], None
    objects = [(match["colour1"], match["shape1"])]
    return (
        (objects + [(match["colour2"], match["shape2"])], match["relation"])
        if match["relation"]
        else (objects, None)
    )


def score(image, caption):
    """RGB PIL image or (H, W, 3) uint8, caption -> {"fits", "number", "colours", "shapes", "relation"}: bools.

    number: as many objects as named. colours, shapes: the named ones and no others, each as often as named. relation: None
    for a caption without one, else whether the two named objects lie so. fits: all of it, each colour on its shape.
    """
    found, (objects, relation) = look(image), parse(caption)
    seen = Counter((piece.colour, piece.shape) for piece in found)
    placed = None
    if relation not in (None, "and"):
        first, second = (
            [piece for piece in found if (piece.colour, piece.shape) == wanted]
            for wanted in objects
        )
        placed = any(lies(a, relation, b) for a, b in product(first, second) if a is not b)
    return {
        "fits": seen == Counter(objects) and placed is not False,
        "number": len(found) == len(objects),
        "colours": Counter(piece.colour for piece in found)
        == Counter(colour for colour, _ in objects),
        "shapes": Counter(piece.shape for piece in found) == Counter(shape for _, shape in objects),
        "relation": placed,
    }


def kept(
    image: Image.Image | np.ndarray, before: Scene, instruction: str
) -> dict[str, bool | None]:
    """Return what an edited picture kept of the scene with one shape that it was made from.

    "make it red" may change the colour alone. "add a blue square to the left" may add one object, and
    may move and resize the one before: the dataset shows a smaller shape beside a larger one, at a
    distance that most single shapes leave no room for.

    Args:
        image: RGB picture or (H, W, 3) uint8, the result of the edit.
        before: the scene of the source picture.
        instruction: an instruction of world.edit.

    Returns:
        "object": the shape is still there (after "add" in its colour), with no more objects than
        asked for; "place" and "size": its centre and area are within KEPT_DISTANCE and KEPT_AREA
        (None after "add"); "background": its brightness is within KEPT_LEVELS; "kept": all of these.

    Raises:
        InputError: for an instruction of another dataset.
    """
    match = INSTRUCTION.fullmatch(instruction)
    if match is None:
        raise InputError(
            f"not an instruction of the shapes dataset: {instruction!r}. Expected "
            "'make it red' or 'add a blue square to the left'."
        )
    (source,) = before.shapes
    found = look(image)
    verdict = dict.fromkeys(("object", "place", "size"))
    if match[1]:
        verdict["object"] = [piece.shape for piece in found] == [source.shape]
        verdict["place"] = verdict["size"] = False
        if len(found) == 1:
            (piece,) = found
            ratio = piece.area / area_of(source)
            distance = math.hypot(piece.x - source.x, piece.y - source.y)
            verdict["place"] = distance <= KEPT_DISTANCE
            verdict["size"] = max(ratio, 1 / ratio) <= KEPT_AREA
    else:
        same = [(piece.shape, piece.colour) == (source.shape, source.colour) for piece in found]
        verdict["object"] = any(same) and len(found) <= 2
    levels = plane(enlarged(np.asarray(image))).mean() - np.mean(before.background_rgb)
    verdict["background"] = bool(abs(levels) <= KEPT_LEVELS)
    return {**verdict, "kept": all(part is not False for part in verdict.values())}


def area_of(shape: Shape) -> float:
    """Return the area of a shape in parts of the picture."""
    if shape.shape == "circle":
        return math.pi * shape.radius**2
    corners = 3 if shape.shape == "triangle" else 4
    reach = shape.radius * REACH[shape.shape]
    # n triangles between the centre and two corners at the distance `reach`
    return corners / 2 * reach**2 * math.sin(2 * math.pi / corners)


def lies(a, relation, b):
    """Whether piece a lies `relation` ("left of" ...) piece b, and not diagonally."""
    dx, dy = a.x - b.x, a.y - b.y
    along, across = (dx, dy) if DIRECTION[relation][0] else (dy, dx)
    return along * sum(DIRECTION[relation]) > 0 and abs(across) <= LEAN * abs(along)


def look(image):
    """RGB PIL image or (H, W, 3) uint8 -> [Found], from left to right."""
    pixels_HWC = enlarged(np.asarray(image))
    background_HWC = plane(pixels_HWC)
    away_HWC = pixels_HWC - background_HWC
    labels_HW, found = pieces(np.linalg.norm(away_HWC, axis=-1) > BACKGROUND_LEVELS), []
    waiting = [labels_HW == label for label in np.unique(labels_HW[labels_HW > 0])]
    while waiting:
        inside_HW = waiting.pop()
        if inside_HW.mean() < LEAST_AREA:
            continue
        rgb = np.median(pixels_HWC[inside_HW], axis=0)
        # the edge stands where a pixel is half background, half piece; the threshold above is nearer to the background
        towards = rgb - background_HWC[inside_HW].mean(0)
        along_HW = (away_HWC @ towards) / (towards @ towards)
        # an edge's colours lie between background and piece; what lies aside is of another colour and touches or covers this one
        aside_HW = (
            np.linalg.norm(away_HWC - along_HW.clip(0)[..., None] * towards, axis=-1)
            > BACKGROUND_LEVELS
        )
        other_HW, inside_HW = inside_HW & aside_HW, inside_HW & (along_HW > 0.5) & ~aside_HW
        if inside_HW.mean() >= LEAST_AREA:
            y, x = (float(axis.mean()) for axis in np.nonzero(inside_HW))
            found.append(
                Found(
                    shape=shape_of(inside_HW),
                    colour=colour_of(rgb),
                    x=(x + 0.5) / SIDE,
                    y=(y + 0.5) / SIDE,
                    area=float(inside_HW.mean()),
                )
            )
            waiting.append(other_HW)
    return sorted(found, key=lambda piece: piece.x)


def enlarged(pixels_HWC):
    """(H, W, 3) uint8 -> (SIDE, SIDE, 3) float32 by cubic interpolation, in 0..255."""
    if pixels_HWC.ndim != 3 or pixels_HWC.shape[2] != 3 or pixels_HWC.dtype != np.uint8:
        raise InputError(
            f"a picture to score must be RGB, 8 bits a channel; got {pixels_HWC.dtype} of shape {pixels_HWC.shape}"
        )
    image_1CHW = torch.from_numpy(np.array(pixels_HWC)).permute(2, 0, 1)[None].float()
    if image_1CHW.shape[-2:] != (SIDE, SIDE):
        image_1CHW = F.interpolate(image_1CHW, size=(SIDE, SIDE), mode="bicubic", antialias=True)
    return image_1CHW[0].permute(1, 2, 0).numpy()


def plane(pixels_HWC, trims=4):
    """The background a + b x + c y of each channel: least squares over the border, its farthest quarter left out anew a few
    times, so that a shape which touches the border does not bend it.
    """
    rows, columns = np.mgrid[:SIDE, :SIDE] / (SIDE - 1) - 0.5
    terms_HWT = np.stack((np.ones_like(rows), rows, columns), axis=-1)
    border_HW = np.ones((SIDE, SIDE), bool)
    border_HW[4:-4, 4:-4] = False
    terms_KT, pixels_KC = terms_HWT[border_HW], pixels_HWC[border_HW]
    kept = np.linalg.norm(pixels_KC - np.median(pixels_KC, axis=0), axis=1) < 2 * BACKGROUND_LEVELS
    for _ in range(trims):
        solution_TC = np.linalg.lstsq(terms_KT[kept], pixels_KC[kept], rcond=None)[0]
        distance_K = np.linalg.norm(pixels_KC - terms_KT @ solution_TC, axis=1)
        kept = distance_K <= np.quantile(distance_K, 0.75)
    return terms_HWT @ solution_TC


def pieces(inside_HW):
    """(H, W) bool -> int labels of its 8-connected pieces, 0 outside: the largest index spreads until nothing changes."""
    inside = torch.from_numpy(inside_HW)
    labels = torch.arange(1, inside.numel() + 1, dtype=torch.float32).view(inside.shape) * inside
    while True:
        spread = F.max_pool2d(labels[None, None], 3, stride=1, padding=1)[0, 0] * inside
        if torch.equal(spread, labels):
            return labels.numpy()
        # an index names a pixel of the same piece: the largest met anywhere along what was one index so far leads all of it on
        met = F.pad(spread.flatten(), (1, 0)).scatter_reduce(
            0, labels.long().flatten(), spread.flatten(), "amax"
        )
        labels = met[met[spread.long()].long()]


def shape_of(inside_HW):
    """The shape that this piece overlaps best, at its centre and area and turned by up to 8 degrees, or None."""
    rows, columns = np.nonzero(inside_HW)
    y_HW, x_HW = np.mgrid[:SIDE, :SIDE].astype(np.float64)
    y_HW, x_HW = y_HW - rows.mean(), x_HW - columns.mean()
    overlaps = {
        shape: max(
            overlap(inside_HW, ideal(shape, len(rows), y_HW, x_HW, turn))
            for turn in ((0,) if shape == "circle" else range(-8, 9, 4))
        )
        for shape in SHAPES
    }
    best = max(overlaps, key=overlaps.get)
    return best if overlaps[best] >= LEAST_OVERLAP else None


def overlap(a_HW, b_HW):
    """Intersection over union."""
    return (a_HW & b_HW).sum() / (a_HW | b_HW).sum()


def ideal(shape, area, y_HW, x_HW, turn_degrees):
    """(H, W) bool, the pixels of a shape of so many pixels; y, x: from its centre."""
    if shape == "circle":
        return x_HW**2 + y_HW**2 <= area / math.pi
    corners = 3 if shape == "triangle" else 4
    # a regular polygon of n corners and area A has the inner radius sqrt(A / (n tan(pi / n)))
    inner, inside_HW = math.sqrt(area / (corners * math.tan(math.pi / corners))), True
    for i in range(corners):
        # Of a side; the first one lies below.
        angle = math.radians(90 + turn_degrees + 360 * i / corners)
        inside_HW = inside_HW & (x_HW * math.cos(angle) + y_HW * math.sin(angle) <= inner)
    return inside_HW


def colour_table():
    """(K, 3) colours that the world draws, and whose each is: 5 values in each of its three ranges."""
    names, rows = [], []
    for name, ranges in COLOURS.items():
        for hue, saturation, value in product(*(np.linspace(low, high, 5) for low, high in ranges)):
            names.append(name)
            rows.append([255 * level for level in hsv_to_rgb(hue / 360 % 1, saturation, value)])
    return names, np.array(rows)


NAMES, DRAWN_K3 = colour_table()


def colour_of(rgb):
    """(3,) in 0..255 -> the nearest colour of the world, or None if none is near."""
    distance_K = np.linalg.norm(DRAWN_K3 - rgb, axis=1)
    nearest = int(distance_K.argmin())
    return NAMES[nearest] if distance_K[nearest] <= COLOUR_LEVELS else None
