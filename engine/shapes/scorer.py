"""Score a picture of the shapes dataset against a caption or an edit, from its pixels only.

The background is a plane fitted to the picture's border. Pixels that differ from it form connected
components, and a component of several colours is split by colour. Each component is compared with
the three shapes at its own centre and area and at the best of several rotations, and its colour
with the ranges of the dataset. Nothing is learned.

Two things are not detected: components smaller than LEAST_AREA, and colours within
BACKGROUND_LEVELS of the component that they touch or of a shade of it. Pictures of any size from
16 px work.
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

# Increment it when the scores change. Cached scores are then recomputed.
VERSION = 2
# Every picture is resized to this side in pixels. The smallest shape is then 29 px wide.
SIDE = 128
# Distance from the background, or from the shades of a component, in grey levels of 255, above
# which a difference is not noise. The dataset's noise is at most 8 per channel.
BACKGROUND_LEVELS = 40.0
# Fraction of the picture. The smallest rendered shape covers 0.033.
LEAST_AREA = 0.012
# Intersection over union with the ideal shape. Rendered shapes at 32 px have at least 0.87.
LEAST_OVERLAP = 0.80
# Largest distance from the nearest colour of the dataset, in grey levels of 255.
COLOUR_LEVELS = 60.0
# Largest ratio between the offsets of two centres across and along an axis at which the objects
# still count as left, right, above or below.
LEAN = 0.6
# Tolerances within which an edit leaves something unchanged. Each is twice the largest difference
# from the scene that was measured in 400 rendered pictures, once through the shapes VAE with noise
# of 0.1 in its latents (of unit variance), and once blurred (64 -> 24 -> 64 px) with smooth noise
# of 10 grey levels. The background's tint is not scored: the VAE alone changes it by as much as the
# dataset's backgrounds differ in it. Distance between the centres, as a fraction of the side.
# Measured: 0.0073.
KEPT_DISTANCE = 0.0146
# Ratio of the larger area to the smaller. Measured: 1.087.
KEPT_AREA = 1.17
# Difference in brightness between the backgrounds, in grey levels of 255. Measured: 4.2.
KEPT_LEVELS = 8.4

NUMBERS = {"two": 2, "three": 3}
OBJECT = rf"an? (?P<colour{{0}}>{'|'.join(COLOURS)}) (?P<shape{{0}}>{'|'.join(SHAPES)})"
CAPTION = re.compile(
    rf"(?P<number>two|three) (?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})s"
    rf"|{OBJECT.format(1)}(?: (?P<relation>and|{'|'.join(DIRECTION)}) {OBJECT.format(2)})?"
)
INSTRUCTION = re.compile(
    rf"make it ({'|'.join(COLOURS)})|add {OBJECT.format('')} ({'|'.join(PLACES)})"
)


@dataclass(frozen=True)
class Detection:
    """One object found in a picture.

    x and y are its centre in fractions of the side, y downwards. area is a fraction of the picture.
    colour or shape is None if it is not one of the dataset's.
    """

    shape: str | None
    colour: str | None
    x: float
    y: float
    area: float


def parse(caption: str) -> tuple[list[tuple[str, str]], str | None]:
    """Return the (colour, shape) of each object in a caption, in order, and their relation.

    The relation is "left of", "right of", "above", "below", "and", or None for a caption without
    one.

    Raises:
        InputError: for a caption that the dataset cannot contain.
    """
    match = CAPTION.fullmatch(caption)
    if match is None:
        raise InputError(
            f"not a caption of the shapes dataset: {caption!r}. Expected one such as "
            "'a red circle left of a blue square'."
        )
    if match["number"]:
        return [(match["colour"], match["shape"])] * NUMBERS[match["number"]], None
    objects = [(match["colour1"], match["shape1"])]
    if match["relation"]:
        objects.append((match["colour2"], match["shape2"]))
    return objects, match["relation"]


def score(image: Image.Image | np.ndarray, caption: str) -> dict[str, bool | None]:
    """Return which parts of a caption a picture shows.

    Args:
        image: RGB picture or (H, W, 3) uint8.
        caption: a caption of the dataset.

    Returns:
        "number": the picture shows as many objects as the caption names; "colours", "shapes": the
        named ones and no others, each the right number of times; "relation": the two objects are
        placed as named (None for a caption without a relation); "fits": all of these, with each
        colour on its shape.

    Raises:
        InputError: for a caption of another dataset, or a picture that is not 8-bit RGB.
    """
    found = find_objects(image)
    objects, relation = parse(caption)
    seen = Counter((detection.colour, detection.shape) for detection in found)
    placed = None
    if relation not in (None, "and"):
        first, second = (
            [detection for detection in found if (detection.colour, detection.shape) == named]
            for named in objects
        )
        placed = any(
            relation_holds(a, relation, b) for a, b in product(first, second) if a is not b
        )
    return {
        "fits": seen == Counter(objects) and placed is not False,
        "number": len(found) == len(objects),
        "colours": Counter(detection.colour for detection in found)
        == Counter(colour for colour, _ in objects),
        "shapes": Counter(detection.shape for detection in found)
        == Counter(shape for _, shape in objects),
        "relation": placed,
    }


def score_edit(
    image: Image.Image | np.ndarray, before: Scene, instruction: str
) -> dict[str, bool | None]:
    """Return what an edited picture preserves of its source, a scene with one shape.

    "make it red" may change only the colour. "add a blue square to the left" may add one object,
    and may move and resize the original one, because the dataset shows pairs of a larger and a
    smaller shape at a distance for which most single shapes leave no room.

    Args:
        image: RGB picture or (H, W, 3) uint8, the result of the edit.
        before: the scene of the source picture.
        instruction: an instruction of dataset.edit.

    Returns:
        "object": the shape is still present (after "add" in its colour), with no more objects than
        requested; "place" and "size": its centre and area are within KEPT_DISTANCE and KEPT_AREA
        (None after "add"); "background": its brightness is within KEPT_LEVELS; "kept": all of
        these.

    Raises:
        InputError: for an instruction of another dataset, or a picture that is not 8-bit RGB.
    """
    match = INSTRUCTION.fullmatch(instruction)
    if match is None:
        raise InputError(
            f"not an instruction of the shapes dataset: {instruction!r}. Expected "
            "'make it red' or 'add a blue square to the left'."
        )
    (source,) = before.shapes
    found = find_objects(image)
    scores = dict.fromkeys(("object", "place", "size"))
    if match[1]:
        scores["object"] = [detection.shape for detection in found] == [source.shape]
        scores["place"] = scores["size"] = False
        if len(found) == 1:
            (detection,) = found
            ratio = detection.area / area_of(source)
            distance = math.hypot(detection.x - source.x, detection.y - source.y)
            scores["place"] = distance <= KEPT_DISTANCE
            scores["size"] = max(ratio, 1 / ratio) <= KEPT_AREA
    else:
        same = [
            (detection.shape, detection.colour) == (source.shape, source.colour)
            for detection in found
        ]
        scores["object"] = any(same) and len(found) <= 2
    background_HWC = fit_background(resized(np.asarray(image)))
    levels = background_HWC.mean() - np.mean(before.background_rgb)
    scores["background"] = bool(abs(levels) <= KEPT_LEVELS)
    return {**scores, "kept": all(part is not False for part in scores.values())}


def area_of(shape: Shape) -> float:
    """Return the area of a shape as a fraction of the picture."""
    if shape.shape == "circle":
        return math.pi * shape.radius**2
    corners = 3 if shape.shape == "triangle" else 4
    reach = shape.radius * REACH[shape.shape]
    # The sum of the triangles between the centre and two neighbouring corners, at distance `reach`.
    return corners / 2 * reach**2 * math.sin(2 * math.pi / corners)


def relation_holds(a: Detection, relation: str, b: Detection) -> bool:
    """Return whether a is "left of", "right of", "above" or "below" b, and not diagonal to it."""
    dx, dy = a.x - b.x, a.y - b.y
    along, across = (dx, dy) if DIRECTION[relation][0] else (dy, dx)
    return along * sum(DIRECTION[relation]) > 0 and abs(across) <= LEAN * abs(along)


def find_objects(image: Image.Image | np.ndarray) -> list[Detection]:
    """Return the objects of an RGB picture or (H, W, 3) uint8, from left to right."""
    pixels_HWC = resized(np.asarray(image))
    background_HWC = fit_background(pixels_HWC)
    contrast_HWC = pixels_HWC - background_HWC
    labels_HW = label_components(np.linalg.norm(contrast_HWC, axis=-1) > BACKGROUND_LEVELS)
    found = []
    pending = [labels_HW == label for label in np.unique(labels_HW[labels_HW > 0])]
    while pending:
        inside_HW = pending.pop()
        if inside_HW.mean() < LEAST_AREA:
            continue
        rgb = np.median(pixels_HWC[inside_HW], axis=0)
        # The edge is where a pixel is half background and half object. The threshold above is
        # nearer to the background.
        direction = rgb - background_HWC[inside_HW].mean(0)
        along_HW = (contrast_HWC @ direction) / (direction @ direction)
        # The colours of an edge are between background and object. Pixels away from that line have
        # another colour and belong to an object that touches or covers this one.
        residual_HWC = contrast_HWC - along_HW.clip(0)[..., None] * direction
        other_colour_HW = np.linalg.norm(residual_HWC, axis=-1) > BACKGROUND_LEVELS
        other_HW = inside_HW & other_colour_HW
        inside_HW = inside_HW & (along_HW > 0.5) & ~other_colour_HW
        if inside_HW.mean() >= LEAST_AREA:
            y, x = (float(axis.mean()) for axis in np.nonzero(inside_HW))
            found.append(
                Detection(
                    shape=classify_shape(inside_HW),
                    colour=classify_colour(rgb),
                    x=(x + 0.5) / SIDE,
                    y=(y + 0.5) / SIDE,
                    area=float(inside_HW.mean()),
                )
            )
            pending.append(other_HW)
    return sorted(found, key=lambda detection: detection.x)


def resized(pixels_HWC: np.ndarray) -> np.ndarray:
    """Resize (H, W, 3) uint8 by cubic interpolation to (SIDE, SIDE, 3) float32 in 0..255."""
    if pixels_HWC.ndim != 3 or pixels_HWC.shape[2] != 3 or pixels_HWC.dtype != np.uint8:
        raise InputError(
            "a picture to score must be RGB with 8 bits per channel, "
            f"got {pixels_HWC.dtype} of shape {pixels_HWC.shape}"
        )
    image_1CHW = torch.from_numpy(np.array(pixels_HWC)).permute(2, 0, 1)[None].float()
    if image_1CHW.shape[-2:] != (SIDE, SIDE):
        image_1CHW = F.interpolate(image_1CHW, size=(SIDE, SIDE), mode="bicubic", antialias=True)
    return image_1CHW[0].permute(1, 2, 0).numpy()


def fit_background(pixels_HWC: np.ndarray, trims: int = 4) -> np.ndarray:
    """Return the background (SIDE, SIDE, 3) as a plane a + b x + c y per channel.

    The fit is least squares over the border. It is repeated `trims` times, each time without the
    farthest quarter of the border, because a shape that touches the border would tilt the plane.
    """
    rows, columns = np.mgrid[:SIDE, :SIDE] / (SIDE - 1) - 0.5
    terms_HWT = np.stack((np.ones_like(rows), rows, columns), axis=-1)
    border_HW = np.ones((SIDE, SIDE), bool)
    border_HW[4:-4, 4:-4] = False
    terms_KT, pixels_KC = terms_HWT[border_HW], pixels_HWC[border_HW]
    used_K = np.linalg.norm(pixels_KC - np.median(pixels_KC, axis=0), axis=1) < (
        2 * BACKGROUND_LEVELS
    )
    for _ in range(trims):
        solution_TC = np.linalg.lstsq(terms_KT[used_K], pixels_KC[used_K], rcond=None)[0]
        distance_K = np.linalg.norm(pixels_KC - terms_KT @ solution_TC, axis=1)
        used_K = distance_K <= np.quantile(distance_K, 0.75)
    return terms_HWT @ solution_TC


def label_components(mask_HW: np.ndarray) -> np.ndarray:
    """Label the 8-connected components of a (H, W) bool mask, 0 outside the mask.

    Every pixel starts with its own index, and the largest index spreads until nothing changes.
    """
    mask = torch.from_numpy(mask_HW)
    labels = torch.arange(1, mask.numel() + 1, dtype=torch.float32).view(mask.shape) * mask
    while True:
        spread = F.max_pool2d(labels[None, None], 3, stride=1, padding=1)[0, 0] * mask
        if torch.equal(spread, labels):
            return labels.numpy()
        # All pixels that share an index are in one component. Hence the largest neighbouring index
        # of any of them replaces the index of all.
        largest = F.pad(spread.flatten(), (1, 0)).scatter_reduce(
            0, labels.long().flatten(), spread.flatten(), "amax"
        )
        labels = largest[largest[spread.long()].long()]


def classify_shape(inside_HW: np.ndarray) -> str | None:
    """Return the shape that a component overlaps best, or None below LEAST_OVERLAP.

    The ideal shapes have the component's centre and area, and are rotated by up to 8 degrees.
    """
    rows, columns = np.nonzero(inside_HW)
    y_HW, x_HW = np.mgrid[:SIDE, :SIDE].astype(np.float64)
    y_HW, x_HW = y_HW - rows.mean(), x_HW - columns.mean()
    overlaps = {
        shape: max(
            overlap(inside_HW, ideal_mask(shape, len(rows), y_HW, x_HW, turn_degrees))
            for turn_degrees in ((0,) if shape == "circle" else range(-8, 9, 4))
        )
        for shape in SHAPES
    }
    best = max(overlaps, key=overlaps.get)
    return best if overlaps[best] >= LEAST_OVERLAP else None


def overlap(a_HW: np.ndarray, b_HW: np.ndarray) -> float:
    """Return the intersection over union of two masks."""
    return (a_HW & b_HW).sum() / (a_HW | b_HW).sum()


def ideal_mask(
    shape: str, area: int, y_HW: np.ndarray, x_HW: np.ndarray, turn_degrees: float
) -> np.ndarray:
    """Return the (H, W) mask of a shape.

    Args:
        shape: one of SHAPES.
        area: its number of pixels.
        y_HW: distance of each pixel below the centre.
        x_HW: distance of each pixel to the right of the centre.
        turn_degrees: rotation, ignored for a circle.
    """
    if shape == "circle":
        return x_HW**2 + y_HW**2 <= area / math.pi
    corners = 3 if shape == "triangle" else 4
    # A regular polygon of n corners and area A has the inner radius sqrt(A / (n tan(pi / n))).
    inner, inside_HW = math.sqrt(area / (corners * math.tan(math.pi / corners))), True
    for i in range(corners):
        # Direction from the centre to the middle of a side. The first side is at the bottom.
        angle = math.radians(90 + turn_degrees + 360 * i / corners)
        inside_HW = inside_HW & (x_HW * math.cos(angle) + y_HW * math.sin(angle) <= inner)
    return inside_HW


def colour_table() -> tuple[list[str], np.ndarray]:
    """Return the names (K) and RGB values (K, 3) of a sample of the dataset's colours.

    Each colour contributes 5 values in each of its three ranges.
    """
    names, rows = [], []
    for name, ranges in COLOURS.items():
        for hue, saturation, value in product(*(np.linspace(low, high, 5) for low, high in ranges)):
            names.append(name)
            rows.append([255 * level for level in hsv_to_rgb(hue / 360 % 1, saturation, value)])
    return names, np.array(rows)


COLOUR_NAMES, COLOUR_TABLE_K3 = colour_table()


def classify_colour(rgb: np.ndarray) -> str | None:
    """Return the dataset's colour nearest to rgb (3,) in 0..255, or None beyond COLOUR_LEVELS."""
    distance_K = np.linalg.norm(COLOUR_TABLE_K3 - rgb, axis=1)
    nearest = int(distance_K.argmin())
    return COLOUR_NAMES[nearest] if distance_K[nearest] <= COLOUR_LEVELS else None
