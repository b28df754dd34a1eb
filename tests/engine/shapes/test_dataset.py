"""The shapes dataset: captions fit pictures, combinations are held out, tars appear atomically."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iomm.config import InputError
from iomm.engine.shapes.dataset import (
    COLOURS,
    KINDS,
    OPPOSITE,
    ROLES,
    SHAPES,
    held_out,
    render,
    scene,
    write_dataset,
)

ROOT = Path(__file__).resolve().parents[3]


def roles(picture):
    """Return the role of each shape of a scene, derived only from the geometry."""
    shapes = picture.shapes
    if len(shapes) == 1:
        return ("alone",)
    if len({(shape.shape, shape.colour) for shape in shapes}) == 1:
        return (ROLES[len(shapes)],) * len(shapes)
    dx, dy = shapes[0].x - shapes[1].x, shapes[0].y - shapes[1].y
    if max(abs(dx), abs(dy)) < 3 * min(abs(dx), abs(dy)):
        return "and", "and"
    first = (
        ("left of" if dx < 0 else "right of")
        if abs(dx) > abs(dy)
        else ("above" if dy < 0 else "below")
    )
    return first, OPPOSITE[first]


def caption_of(picture):
    """Return the caption of a scene, derived only from the geometry."""
    names = [
        f"{'an' if shape.colour == 'orange' else 'a'} {shape.colour} {shape.shape}"
        for shape in picture.shapes
    ]
    role = roles(picture)[0]
    if role == "alone":
        return names[0]
    if role in ("two", "three"):
        return f"{role} {picture.shapes[0].colour} {picture.shapes[0].shape}s"
    return f"{names[0]} {role} {names[1]}"


@pytest.fixture(scope="module")
def pictures():
    return {split: [scene(5, i, split) for i in range(3000)] for split in ("train", "test")}


def test_caption_follows_from_geometry(pictures):
    for picture in pictures["train"] + pictures["test"]:
        assert picture.caption == caption_of(picture)
        if picture.kind in ("two_object", "color_attr", "position"):
            assert picture.shapes[0].radius > 1.25 * picture.shapes[1].radius
            assert picture.shapes[0].shape != picture.shapes[1].shape
        if picture.kind == "color_attr":
            assert picture.shapes[0].colour != picture.shapes[1].colour


def test_train_split_has_all_other_combinations(pictures):
    for split in pictures.values():
        counts = Counter(picture.kind for picture in split)
        assert set(counts) == set(KINDS) and min(counts.values()) > 400
    seen = {
        (shape.colour, shape.shape, role)
        for picture in pictures["train"]
        for shape, role in zip(picture.shapes, roles(picture), strict=True)
    }
    everything = {(colour, shape, role) for colour in COLOURS for shape in SHAPES for role in ROLES}
    assert seen == {combination for combination in everything if not held_out(*combination)}


def test_held_out_combinations_only_in_test_split(pictures):
    novel = {
        split: [
            any(
                held_out(shape.colour, shape.shape, role)
                for shape, role in zip(picture.shapes, roles(picture), strict=True)
            )
            for picture in some
        ]
        for split, some in pictures.items()
    }
    assert not any(novel["train"]) and all(novel["test"])
    assert not {picture.caption for picture in pictures["train"]} & {
        picture.caption for picture in pictures["test"]
    }
    for shape in SHAPES:
        for role in ROLES:
            assert sum(held_out(colour, shape, role) for colour in COLOURS) == 1


def test_shapes_touch_neither_border_nor_each_other(pictures):
    for picture in pictures["train"][:60] + pictures["test"][:60]:
        pixels = np.asarray(render(picture, 96), dtype=int)
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        # The light changes a level by up to 10, the noise by up to 8.
        assert np.abs(edge - picture.background_rgb).max() < 25
        background = np.abs(pixels - np.array(picture.background_rgb)).max(-1) < 25
        assert _num_regions(~background) == len(picture.shapes)


def _num_regions(mask):
    """Return the number of connected regions of at least 9 pixels. Noise makes smaller ones."""
    mask, regions = mask.copy(), 0
    for start in np.argwhere(mask):
        stack, size = [tuple(start)], 0
        while stack:
            y, x = stack.pop()
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x]:
                mask[y, x], size = False, size + 1
                stack += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        regions += size >= 9
    return regions


def test_scene_is_pure_function_of_seed_and_number():
    assert scene(3, 17) == scene(3, 17) != scene(4, 17)
    assert scene(3, 17) != scene(3, 18) and scene(3, 17, "test") != scene(3, 17)
    assert scene(3, 17, kind="counting").kind == "counting"
    assert render(scene(3, 17), 64).tobytes() == render(scene(3, 17), 64).tobytes()
    # A change of these captions requires a new VERSION.
    assert [scene(0, i).caption for i in range(4)] == PINNED


PINNED = [
    "a purple circle and a yellow triangle",
    "a white circle below an orange square",
    "a purple circle",
    "a black triangle and a red circle",
]


def test_write_dataset_writes_keeps_and_repairs_tars(tmp_path):
    paths = write_dataset(tmp_path / "shapes", num_images=10, size_px=48, seed=1, shard_size=4)
    assert [path.name for path in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    samples = {}
    for path in paths:
        with tarfile.open(path) as tar:
            samples |= {member.name: tar.extractfile(member).read() for member in tar}
    assert sorted(samples) == sorted(
        f"{i:06d}.{suffix}" for i in range(10) for suffix in ("jpg", "txt", "json")
    )
    for i in range(10):
        expected = scene(1, i)
        image = Image.open(io.BytesIO(samples[f"{i:06d}.jpg"]))
        assert image.format == "JPEG" and image.size == (48, 48)
        assert (
            np.abs(
                np.asarray(image, dtype=int) - np.asarray(render(expected, 48), dtype=int)
            ).mean()
            < 4
        )
        assert (
            samples[f"{i:06d}.txt"].decode()
            == expected.caption
            == json.loads(samples[f"{i:06d}.json"])["caption"]
        )

    times = [path.stat().st_mtime_ns for path in paths]
    before = [path.read_bytes() for path in paths]
    write_dataset(tmp_path / "shapes", num_images=10, size_px=48, seed=1, shard_size=4)
    # A complete folder is unchanged.
    assert [path.stat().st_mtime_ns for path in paths] == times
    paths[1].write_bytes(b"cut")
    write_dataset(tmp_path / "shapes", num_images=10, size_px=48, seed=1, shard_size=4)
    # A damaged folder is rendered again, with the same bytes.
    assert [path.read_bytes() for path in paths] == before
    assert (
        len(write_dataset(tmp_path / "shapes", num_images=3, size_px=48, seed=1, shard_size=4)) == 1
    )
    assert sorted(os.listdir(tmp_path)) == ["shapes"]
    assert sorted(os.listdir(tmp_path / "shapes")) == ["00000.tar", "manifest.json"]


def test_killed_writer_leaves_no_partial_dataset(tmp_path):
    folder = str(tmp_path / "shapes")
    code = (
        "from iomm.engine.shapes.dataset import write_dataset; "
        f"write_dataset({folder!r}, num_images=200_000)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".shapes.*/00000.tar")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "shapes").exists()
    assert write_dataset(tmp_path / "shapes", num_images=2)[0].exists()


def test_concurrent_writers_render_once(tmp_path):
    """The second writer does not replace the tars of the first."""
    folder = str(tmp_path / "shapes")
    code = (
        "from iomm.engine.shapes.dataset import write_dataset; "
        f"print(write_dataset({folder!r}, 64)[0].stat().st_ino)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    inodes = [process.communicate(timeout=120)[0] for process in processes]
    assert not any(process.returncode for process in processes) and inodes[0] == inodes[1]
    assert os.listdir(tmp_path) == ["shapes"]


def test_write_dataset_refuses_a_foreign_folder(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds other files"):
        write_dataset(tmp_path, num_images=2)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_invalid_arguments_raise_input_error(tmp_path):
    with pytest.raises(InputError, match="split must be one of train, test"):
        scene(0, 0, "valid")
    with pytest.raises(InputError, match="kind must be one of"):
        scene(0, 0, kind="editing")
    with pytest.raises(InputError, match="scene number"):
        scene(0, -1)
    with pytest.raises(InputError, match="num_images"):
        write_dataset(tmp_path / "w", num_images=0)
