"""The shapes dataset: rendered pictures of coloured shapes with captions, as JPEG in tars.

Every picture shows one to three shapes (circle, square, triangle) in one of eight colours. Exactly
one caption describes it. The captions are of GenEval's six kinds:

    single_object, colors     "a red circle"                           one shape
    counting                  "two red circles", "three blue squares"  equal shapes of one colour
    two_object, color_attr    "a red circle and a blue square"         two shapes on a diagonal
    position                  "a red circle left of a blue square"     two shapes on one axis

The kinds in one row test different abilities. In color_attr the two colours always differ. With two
shapes the caption names the larger one first, so the picture determines the caption.

Held-out combinations: every shape in a picture has a role (ROLES: alone, and, one of two, one of
three, left of, right of, above or below another). For each shape and role one of the eight colours
is held out: (colour + 3 shape + role) % 8 == 0, by the indices in COLOURS, SHAPES and ROLES. No
picture of the "train" split shows a held-out combination, and every picture of the "test" split
shows at least one. Each coloured shape and each role occurs in training, only not together.
"""

import io
import json
import math
import tarfile
from collections.abc import Iterable, Sequence
from colorsys import hsv_to_rgb
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw

from iomm.config import InputError, choice
from iomm.engine.data.atomic import folder_lock, whole_folder
from iomm.kernels.philox import EDIT, SCENE, uniform

# Increment it when the rendered pictures change. Older folders are then rendered again.
VERSION = 2
SHAPES = ("circle", "square", "triangle")
# Ranges of hue (degrees), saturation and value, far enough apart for the eye to distinguish.
COLOURS = {
    "red": ((-7, 5), (0.85, 1.0), (0.75, 0.95)),
    "green": ((112, 140), (0.75, 1.0), (0.5, 0.75)),
    "blue": ((216, 234), (0.8, 1.0), (0.7, 1.0)),
    "yellow": ((52, 58), (0.85, 1.0), (0.9, 1.0)),
    "orange": ((24, 32), (0.9, 1.0), (0.92, 1.0)),
    "purple": ((276, 294), (0.7, 0.95), (0.5, 0.75)),
    "white": ((0, 360), (0.0, 0.03), (0.94, 1.0)),
    "black": ((0, 360), (0.0, 0.2), (0.0, 0.1)),
}
ROLES = ("alone", "and", "two", "three", "left of", "right of", "above", "below")
OPPOSITE = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
    "and": "and",
}
DIRECTION = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
# The places that an edit names, as roles of the added shape.
PLACES = {"to the left": "left of", "to the right": "right of", "above": "above", "below": "below"}
KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SPLITS = ("train", "test")
MANIFEST = "manifest.json"
# Uniform numbers per scene.
NUM_DRAWS = 48
# Rendered at 4 times the side: every pixel is the mean of 16 points, which smooths the edges.
SUPERSAMPLE = 4
# Distance between a shape and the border, as a fraction of the side.
MARGIN = 0.03
# Distance from centre to corner, in radii. The areas of the three shapes are then within a fifth.
REACH = {"circle": 1.0, "square": 1.25, "triangle": 1.4}
# The test split starts at a scene number that no training picture has.
TEST_OFFSET = 1 << 62

T = TypeVar("T")


@dataclass(frozen=True)
class Shape:
    """One shape of a scene.

    Lengths are fractions of the picture's side, y points downwards, rgb is in 0..255.
    """

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    turn_degrees: float
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """The content of a picture. The shapes are in the order in which the caption names them."""

    kind: str
    caption: str
    shapes: tuple[Shape, ...]
    background_rgb: tuple[int, int, int]
    # Change of brightness from left to right and from top to bottom, in grey levels of 255.
    light: tuple[float, float]
    # Maximum of the noise, in grey levels of 255.
    noise_level: float
    noise_key: int


def held_out(colour: str, shape: str, role: str) -> bool:
    """Return whether this colour of a shape in this role is kept out of training."""
    return (tuple(COLOURS).index(colour) + 3 * SHAPES.index(shape) + ROLES.index(role)) % len(
        COLOURS
    ) == 0


def scene(seed: int, i: int, split: str = "train", kind: str | None = None) -> Scene:
    """Return scene i (>= 0) of a split, a pure function of the arguments.

    The kind is drawn at random unless it is given.

    Raises:
        InputError: for an unknown split or kind, or a negative scene number.
    """
    choice("split", split, SPLITS)
    if not 0 <= i < TEST_OFFSET:
        raise InputError(f"a scene number must be >= 0, got {i}")
    n = i + (TEST_OFFSET if split == "test" else 0)
    draws = _Draws(uniform(seed, SCENE, torch.tensor([n]), NUM_DRAWS)[0].tolist())
    drawn_kind = draws.pick(KINDS)
    kind = kind or drawn_kind
    choice("kind", kind, KINDS)
    if kind in ("single_object", "colors"):
        shapes, caption = _single(draws, split)
    elif kind == "counting":
        shapes, caption = _counted(draws, split)
    else:
        shapes, caption = _pair(draws, split, kind)
    grey = draws.between(0.42, 0.72)
    background = tuple(round(255 * (grey + draws.between(-0.04, 0.04))) for _ in range(3))
    return Scene(
        kind=kind,
        caption=caption,
        shapes=shapes,
        background_rgb=background,
        light=(draws.between(-10, 10), draws.between(-10, 10)),
        noise_level=draws.between(2, 8),
        noise_key=int(draws.between(0, 1 << 24)),
    )


def edit(picture: Scene, seed: int, n: int, split: str = "train") -> tuple[str, str]:
    """Return edit n of a seed for a scene of one shape: its instruction and the target caption.

    The instruction reads "make it red" or "add a blue square to the left". The edit is a pure
    function of the arguments. In the "train" split the target shows no held-out combination. In the
    "test" split, whose pictures already show one, every combination may occur.
    """
    draws = _Draws(uniform(seed, EDIT, torch.tensor([n]), 5)[0].tolist())
    known = split == "train"
    (before,) = picture.shapes
    if draws.pick((True, False)):
        colour = _colour(
            draws, before.shape, "alone", novel=False, known=known, taken=before.colour
        )
        return f"make it {colour}", _name(colour, before.shape)
    place = draws.pick(
        [
            place
            for place, role in PLACES.items()
            if not (known and held_out(before.colour, before.shape, OPPOSITE[role]))
        ]
    )
    shape = draws.pick(tuple(shape for shape in SHAPES if shape != before.shape))
    colour = _colour(draws, shape, PLACES[place], novel=False, known=known)
    name = _name(colour, shape)
    return f"add {name} {place}", f"{name} {PLACES[place]} {_name(before.colour, before.shape)}"


def render(scene: Scene, size_px: int = 64) -> Image.Image:
    """Render a scene as an RGB picture of size_px x size_px.

    Shapes have smooth edges, the light changes linearly across the picture, and the noise is
    slight.
    """
    side = size_px * SUPERSAMPLE
    canvas = Image.new("RGB", (side, side), scene.background_rgb)
    pen = ImageDraw.Draw(canvas)
    for shape in scene.shapes:
        x, y, radius = shape.x * side, shape.y * side, shape.radius * side
        if shape.shape == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shape.rgb)
        else:
            corners_degrees = (-90, 30, 150) if shape.shape == "triangle" else (-135, -45, 45, 135)
            angles = [math.radians(corner + shape.turn_degrees) for corner in corners_degrees]
            reach = radius * REACH[shape.shape]
            pen.polygon(
                [(x + reach * math.cos(a), y + reach * math.sin(a)) for a in angles], fill=shape.rgb
            )
    pixels = np.asarray(canvas.reduce(SUPERSAMPLE), dtype=np.float32)
    ramp = np.linspace(-0.5, 0.5, size_px, dtype=np.float32)
    light = scene.light[0] * ramp[None, :, None] + scene.light[1] * ramp[:, None, None]
    # Raw Philox words instead of numpy's distributions: numpy guarantees only the words to stay the
    # same between versions.
    words = np.random.Philox(key=scene.noise_key).random_raw(-(-pixels.size * 2 // 8))
    noise = (
        words.view(np.uint8)[: pixels.size * 2].reshape(2, *pixels.shape).astype(np.float32).sum(0)
        / 255
        - 1
    )
    return Image.fromarray(
        (pixels + light + scene.noise_level * noise).round().clip(0, 255).astype(np.uint8)
    )


def write_dataset(
    folder: str | Path,
    num_images: int = 4096,
    size_px: int = 64,
    seed: int = 0,
    shard_size: int = 1024,
    split: str = "train",
) -> list[Path]:
    """Render a dataset into tars and return their paths.

    A sample consists of 000000.jpg, 000000.txt (the caption) and 000000.json (the scene). A
    complete folder with the same settings is left unchanged, one with other settings is replaced.
    The folder appears only once it is complete. If several processes call this at once, one of them
    renders and the others wait.

    Args:
        folder: folder of the tars.
        num_images: number of samples.
        size_px: side of the pictures, at least 16.
        seed: seed of the scenes.
        shard_size: samples per tar.
        split: "train" or "test", see the module's docstring.

    Raises:
        InputError: for invalid settings, or if `folder` holds anything but a dataset.
    """
    folder = Path(folder).absolute()
    if num_images < 1 or shard_size < 1 or size_px < 16:
        raise InputError(
            "the shapes dataset needs num_images >= 1, shard_size >= 1 and size_px >= 16, "
            f"got num_images={num_images}, shard_size={shard_size}, size_px={size_px}"
        )
    settings, names = _contents(num_images, size_px, seed, shard_size, split)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder.parent):
        if not _is_complete(folder, settings, names):
            with whole_folder(folder, MANIFEST) as fresh:
                for shard, name in enumerate(names):
                    first = shard * shard_size
                    numbers = range(first, min(first + shard_size, num_images))
                    _write_shard(fresh / name, seed, numbers, size_px, split)
                sizes = {name: (fresh / name).stat().st_size for name in names}
                (fresh / MANIFEST).write_text(
                    json.dumps({"settings": settings, "bytes": sizes}, indent=1)
                )
    return [folder / name for name in names]


def is_dataset(
    folder: str | Path,
    num_images: int = 4096,
    size_px: int = 64,
    seed: int = 0,
    shard_size: int = 1024,
    split: str = "train",
) -> bool:
    """Return whether write_dataset with the same arguments would leave the folder unchanged."""
    return _is_complete(Path(folder), *_contents(num_images, size_px, seed, shard_size, split))


def _contents(
    num_images: int, size_px: int, seed: int, shard_size: int, split: str
) -> tuple[dict[str, int | str], list[str]]:
    """Return the settings of a dataset, as its manifest has them, and the names of its tars."""
    settings = {
        "version": VERSION,
        "num_images": num_images,
        "size_px": size_px,
        "seed": seed,
        "shard_size": shard_size,
        "split": split,
    }
    return settings, [f"{shard:05d}.tar" for shard in range(-(-num_images // shard_size))]


def _write_shard(path: Path, seed: int, numbers: range, size_px: int, split: str) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in numbers:
            picture = scene(seed, i, split)
            jpeg = io.BytesIO()
            # Full chroma resolution: at 64 px the usual halving would smear a colour over a tenth
            # of a shape.
            render(picture, size_px).save(jpeg, "JPEG", quality=92, subsampling=0)
            for suffix, data in (
                ("jpg", jpeg.getvalue()),
                ("txt", picture.caption.encode()),
                ("json", json.dumps(asdict(picture)).encode()),
            ):
                # The modification time stays 0, so equal settings give equal bytes.
                member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _is_complete(folder: Path, settings: dict, names: list[str]) -> bool:
    """Return whether the folder holds all tars, at full size, rendered with these settings."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return manifest["settings"] == settings and all(
            (folder / name).stat().st_size == manifest["bytes"][name] for name in names
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


class _Draws:
    """A stream of uniform numbers in [0, 1). Every call consumes one."""

    def __init__(self, values: Iterable[float]):
        self._values = iter(values)

    def between(self, low: float, high: float) -> float:
        """Return a number in [low, high)."""
        return low + (high - low) * next(self._values)

    def pick(self, options: Sequence[T]) -> T:
        """Return one of the options."""
        return options[int(next(self._values) * len(options))]


def _single(draws: _Draws, split: str) -> tuple[tuple[Shape, ...], str]:
    shape = draws.pick(SHAPES)
    colour = _colour(draws, shape, "alone", novel=split == "test")
    radius = draws.between(0.17, 0.28)
    low = radius * REACH[shape] + MARGIN
    x, y = draws.between(low, 1 - low), draws.between(low, 1 - low)
    return (_shape(draws, shape, colour, x, y, radius),), _name(colour, shape)


def _counted(draws: _Draws, split: str) -> tuple[tuple[Shape, ...], str]:
    number = draws.pick((2, 3))
    role = ROLES[number]
    shape = draws.pick(SHAPES)
    colour = _colour(draws, shape, role, novel=split == "test")
    radius = draws.between(0.125, 0.145)
    # Each shape has its own quarter of the picture, so they never touch. The other quarters stay
    # empty.
    quarters = [(0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74)]
    for _ in range(4 - number):
        quarters.remove(draws.pick(quarters))
    slack = 0.23 - radius * REACH[shape]
    places = [
        (x + draws.between(-slack, slack), y + draws.between(-slack, slack)) for x, y in quarters
    ]
    shapes = tuple(_shape(draws, shape, colour, x, y, radius) for x, y in places)
    return shapes, f"{role} {colour} {shape}s"


def _pair(draws: _Draws, split: str, kind: str) -> tuple[tuple[Shape, ...], str]:
    role = draws.pick(tuple(DIRECTION)) if kind == "position" else "and"
    first = draws.pick(SHAPES)
    second = draws.pick(tuple(shape for shape in SHAPES if shape != first))
    novel = draws.pick(((True, False), (False, True))) if split == "test" else (False, False)
    colours = [None, None]
    # In color_attr the colours differ. The held-out one has a single candidate, so it is picked
    # first.
    for which in sorted((0, 1), key=lambda which: not novel[which]):
        shape, its_role = ((first, role), (second, OPPOSITE[role]))[which]
        taken = colours[1 - which] if kind == "color_attr" else None
        colours[which] = _colour(
            draws, shape, its_role, novel=novel[which], known=split == "train", taken=taken
        )
    large, small = draws.between(0.165, 0.185), draws.between(0.115, 0.13)
    distance = draws.between(0.44, 0.49)
    lean = math.radians(draws.between(-10, 10))
    if role == "and":
        angle = math.radians(draws.pick((45, 135, 225, 315))) + lean
    else:
        angle = math.atan2(DIRECTION[role][1], DIRECTION[role][0]) + 0.8 * lean
    dx, dy = distance * math.cos(angle), distance * math.sin(angle)
    reach = large * REACH[first], small * REACH[second]
    # With the second shape at the origin, the first is at (dx, dy). One common shift then moves
    # both to a random place inside the borders.
    x, y = (_between_borders(draws, ((d, reach[0]), (0.0, reach[1]))) for d in (dx, dy))
    shapes = (
        _shape(draws, first, colours[0], x + dx, y + dy, large),
        _shape(draws, second, colours[1], x, y, small),
    )
    return shapes, f"{_name(colours[0], first)} {role} {_name(colours[1], second)}"


def _between_borders(draws: _Draws, places: Iterable[tuple[float, float]]) -> float:
    """Draw a shift along one axis that keeps every (centre, reach) inside the picture."""
    low = max(MARGIN + reach - centre for centre, reach in places)
    high = min(1 - MARGIN - reach - centre for centre, reach in places)
    return draws.between(low, high)


def _colour(
    draws: _Draws,
    shape: str,
    role: str,
    *,
    novel: bool,
    known: bool = True,
    taken: str | None = None,
) -> str:
    """Draw a colour for a shape in a role, different from `taken`.

    `novel` selects the held-out colour. Otherwise `known` excludes it, and without either any
    colour may be drawn.
    """
    excluded = [colour for colour in COLOURS if held_out(colour, shape, role)]
    if novel:
        options = excluded
    else:
        options = [colour for colour in COLOURS if not (known and colour in excluded)]
    return draws.pick([colour for colour in options if colour != taken])


def _name(colour: str, shape: str) -> str:
    """Return the noun phrase of a shape, such as "an orange square"."""
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"


def _shape(draws: _Draws, shape: str, colour: str, x: float, y: float, radius: float) -> Shape:
    """Draw the shade and the rotation of a shape."""
    hue, saturation, value = (draws.between(low, high) for low, high in COLOURS[colour])
    rgb = tuple(round(255 * level) for level in hsv_to_rgb(hue / 360 % 1, saturation, value))
    return Shape(
        shape=shape,
        colour=colour,
        x=x,
        y=y,
        radius=radius,
        turn_degrees=draws.between(-6, 6),
        rgb=rgb,
    )
