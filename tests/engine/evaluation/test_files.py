"""Files of `iomm sample` and `iomm edit`: images that they read, names and PNGs that they write."""

import json
import os

import numpy as np
import pytest
from PIL import Image, ImageDraw
from toy_models import build

from iomm.config import InputError
from iomm.engine.cli import main
from iomm.engine.data.decode import upright
from iomm.engine.data.index import build as build_index
from iomm.engine.data.shards import Shards
from iomm.engine.evaluation import sample
from iomm.engine.evaluation.sample import hash_of, open_image, save_png
from iomm.pipeline import Pipeline


def noise(mode="RGB", size=(48, 40)):
    width, height = size
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    image = Image.fromarray(pixels.squeeze())
    return image.convert(mode) if image.mode != mode else image


def circle():
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill=(255, 0, 0, 255))
    return image


def grey_16():
    grey = np.full((64, 64), 30000, np.uint16)
    grey[16:48, 16:48] = 50000
    return Image.fromarray(grey)


def turned():
    image = noise()
    image.getexif()[0x0112] = 6
    return image


IMAGES = {
    "transparent.png": circle,
    "transparent.webp": circle,
    "grey 16.png": grey_16,
    "turned.jpg": turned,
    "palette.png": lambda: circle().quantize(16),
    "grey.jpg": lambda: noise("L"),
    "cmyk.jpg": lambda: noise("CMYK"),
    "two channels.png": lambda: circle().convert("LA"),
    # Its bytes decide, not its name.
    "photo.png": noise,
}


def write(folder, name):
    image = IMAGES[name]()
    kind = {"photo.png": "JPEG"}.get(name)
    options = {"exif": image.getexif()} if name == "turned.jpg" else {}
    image.save(folder / name, kind, **options)
    return folder / name


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_read_as_training_reads_it(name, tmp_path):
    (tmp_path / "photos").mkdir()
    path = write(tmp_path / "photos", name)
    index = build_index(tmp_path / "photos", tmp_path / "index", progress=False, workers=1)
    shards = Shards(index)
    trained = upright(shards.decodable_bytes(0))
    image = open_image(path)
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), trained)
    if name.startswith("transparent"):
        assert image.getpixel((0, 0)) == (255, 255, 255)
    if name == "turned.jpg":
        assert image.size == (40, 48)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n", "unsupported"),
        (b"", "truncated"),
        (b"hello, I am a text file", "not image"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "truncated"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, ""),
    ],
)
def test_what_training_would_reject_is_refused(data, message, tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    with pytest.raises(InputError) as error:
        open_image(path)
    text = str(error.value)
    assert text.startswith(f"--image {path} is not an image that training would read (")
    assert message in text and "Convert it to a JPEG or PNG" in text and "\n" not in text
    for missing in (tmp_path / "none.png", tmp_path, tmp_path / ("n" * 300)):
        with pytest.raises(InputError, match="cannot be read: "):
            open_image(missing)


@pytest.fixture(scope="module")
def export(mllm, mllm_folder, tmp_path_factory):
    """Return the folder of an exported model and the options with which it is loaded."""
    origin = {"run": "/home/me/runs/tiny", "step": "7", "weights": "ema"}
    pipe = Pipeline(build(mllm), 16, origin=origin)
    folder = tmp_path_factory.mktemp("export")
    pipe.save_pretrained(folder, mllm=mllm_folder, vae="pixel:4")
    return folder, ["--run", str(folder), "--mllm", str(mllm_folder)]


def draw(export, *words):
    before = set((export[0] / "samples").glob("*.png"))
    assert main([*words[:1], *export[1], "--steps", "1", *words[1:]]) == 0
    return [path.name for path in set((export[0] / "samples").glob("*.png")) - before]


def test_pictures_of_other_settings_have_other_names(export):
    long = "a red circle above a large blue square on a green field"
    calls = [
        ["--prompt", f"{long} at noon", "--num", "1"],
        ["--prompt", f"{long} at night", "--num", "1"],
        ["--prompt", f"{long} at noon", "--num", "2"],
        ["--prompt", f"{long} at noon", "--num", "1", "--guidance", "2"],
        ["--prompt", f"{long} at noon", "--num", "1", "--shift", "3"],
        ["--prompt", f"{long} at noon", "--num", "1", "--size", "32x16"],
        ["--prompt", f"{long} at noon", "--prompt", "x", "--num", "2"],
    ]
    names = [draw(export, "sample", *words) for words in calls]
    assert all(len(name) == 1 for name in names)
    assert all("-a-red-circle-above" in name for (name,) in names)
    # The same picture replaces itself.
    assert draw(export, "sample", *calls[0]) == []


def test_names_of_edits_fit_and_differ_by_image(export, tmp_path):
    for number, stem in enumerate(("n" * 240, "字" * 80, "n" * 240)):
        (tmp_path / str(number)).mkdir()
        path = tmp_path / str(number) / f"{stem}.png"
        noise(size=(16 + number, 16)).save(path)
        (name,) = draw(export, "edit", "--image", str(path), "--instruction", "make it 红 " * 8)
        assert name.startswith("edited-") and len(os.fsencode(name)) <= 200


def test_hash_covers_every_fact_but_the_folder():
    facts = {"run": "a", "step": "1", "guidance": "2"}
    assert hash_of(facts, ["x"]) == hash_of(facts | {"run": "b"}, ["x"])
    others = [hash_of(facts | {"step": "2"}, ["x"]), hash_of(facts, ["y"]), hash_of(facts, "x")]
    assert len({hash_of(facts, ["x"]), *others}) == 4


def test_a_png_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_png(noise(), path, {"seed": 1})
    before = path.read_bytes()

    def fail(self, file, **settings):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space"):
        save_png(noise(), path, {"seed": 2})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]
    # A name of the longest length can be written, too.
    monkeypatch.undo()
    save_png(noise(), tmp_path / ("n" * 251 + ".png"), {})


def test_an_export_is_whole_and_keeps_samples(export, tmp_path, monkeypatch):
    pipe = Pipeline.from_pretrained(export[0], device="cpu", mllm=export[1][3])
    config = sample.builders.load_config(
        "demo", ["model.vae=pixel:4", f"model.mllm={export[1][3]}"]
    )
    monkeypatch.setattr(sample, "open_pipeline", lambda run, **names: (pipe, config))
    out = sample.export_run(tmp_path / "run")
    assert out == tmp_path / "run/export/ema" and json.loads((out / "iomm.json").read_text())
    (out / "samples").mkdir()
    (out / "samples/0.png").touch()
    sample.export_run(tmp_path / "run")
    assert (out / "samples/0.png").is_file()
    files = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}

    def fail(folder, **settings):
        (folder / "half.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipe, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space"):
        sample.export_run(tmp_path / "run")
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == files
    assert os.listdir(out.parent) == ["ema"]
