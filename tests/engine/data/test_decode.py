"""Decoding with DALI compared to Pillow: photographs, colour modes, orientation, batches."""

import io
import threading
import time

import numpy as np
import pytest
import torch
from launches import PIXELS
from PIL import Image, ImageFilter, ImageOps
from toy_models import autoencoder

from iomm.config import InputError
from iomm.engine.builders import pixel_dtype
from iomm.engine.config import load_config
from iomm.engine.data import decode as decode_module
from iomm.engine.data.decode import DecodeError, Decoder, Encoded, decoded_sizes
from iomm.engine.data.image import check_image
from iomm.vae import FluxVAE, load_vae

CPU = torch.device("cpu")


def photograph(width, height, seed=0):
    """Return an image with soft shading, hard edges and fine texture.

    They reveal the errors of a resize filter.
    """
    random = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3), dtype=np.float32)
    for cells, strength in ((3, 120), (9, 60), (40, 40)):
        coarse = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += (
            strength
            / 128
            * (np.asarray(coarse.resize((width, height), Image.BICUBIC), dtype=np.float32) - 128)
        )
    y, x = np.mgrid[:height, :width]
    pixels[(x * 0.3 + y) % 90 < 30] *= -0.7
    grain = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).filter(
        ImageFilter.GaussianBlur(0.8)
    )
    pixels += 0.5 * (np.asarray(grain, dtype=np.float32) - 128)
    return Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8))


@pytest.fixture(params=["dali", "pillow"])
def backend(request, monkeypatch):
    """Run a test with DALI, and again as if DALI were not installed."""
    if request.param == "pillow":
        monkeypatch.setattr("iomm.engine.data.decode.fn", None)


def encode(image, kind="JPEG", **options):
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 90} | options if kind == "JPEG" else options))
    return out.getvalue()


def by_pillow(data, size_px, vit_px, flip=False):
    """Return what Decoder must return, computed with Pillow: levels 0..255 for VAE and ViT."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    scale = size_px / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.BICUBIC)
    left, top = ((side - size_px) // 2 for side in image.size)
    image = image.crop((left, top, left + size_px, top + size_px))
    image = ImageOps.mirror(image) if flip else image
    return np.asarray(image, dtype=np.float32), np.asarray(
        image.resize((vit_px, vit_px), Image.BICUBIC), dtype=np.float32
    )


def batch(images, size_px, flips=None, places=None, has_image=None):
    """Return an Encoded batch, by default of centred crops that the ViT sees, not mirrored."""
    size_px = size_px if isinstance(size_px, tuple) else (size_px, size_px)
    return Encoded(
        images,
        np.zeros(len(images), bool) if flips is None else np.asarray(flips),
        np.full((len(images), 2), 0.5, np.float32)
        if places is None
        else np.asarray(places, np.float32),
        np.ones(len(images), bool) if has_image is None else np.asarray(has_image),
        size_px,
    )


def decode(images, size_px=96, vit_px=56, flips=None, batch_size=None, resize="dali", **options):
    """Return levels 0..255, (B, size, size, 3), of both outputs."""
    flips = np.zeros(len(images), dtype=bool) if flips is None else flips
    size = batch_size or len(images)
    batches = [
        batch(images[i : i + size], size_px, flips[i : i + size], **options)
        for i in range(0, len(images), size)
    ]
    pixels, vit_pixels = (
        torch.cat(parts)
        for parts in zip(*Decoder(size, vit_px, CPU, resize=resize)(batches), strict=True)
    )
    assert pixels.dtype == torch.float32 and vit_pixels.dtype == torch.uint8
    return ((pixels + 1) / 2 * 255).permute(0, 2, 3, 1).numpy(), vit_pixels.float().numpy()


def mean_error(got, expected):
    return np.abs(got - expected).mean()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("resize", ["dali", "torch"])
def test_photographs_match_pillow(resize):
    """The mean absolute error of both outputs is below half a grey level of 255.

    This holds at every size, aspect ratio, subsampling and JPEG process.
    """
    image_sizes = [(640, 480), (481, 640), (333, 517), (96, 96), (97, 211), (1200, 301), (70, 60)]
    options = [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"subsampling": 2, "progressive": True},
    ]
    images = [
        encode(photograph(*size, seed), **option)
        for seed, size in enumerate(image_sizes)
        for option in options
    ]
    flips = np.arange(len(images)) % 3 == 1
    pixels, vit_pixels = decode(images, flips=flips, resize=resize)
    for data, flip, got, vit_got in zip(images, flips, pixels, vit_pixels, strict=True):
        expected, vit_expected = by_pillow(data, 96, 56, flip)
        assert mean_error(got, expected) < 0.5 and mean_error(vit_got, vit_expected) < 0.5


@pytest.mark.usefixtures("backend")
def test_png_and_webp_match_pillow():
    image = photograph(200, 150)
    images = [encode(image, "PNG"), encode(image, "WEBP", lossless=True)]
    for data, got in zip(images, decode(images)[0], strict=True):
        assert mean_error(got, by_pillow(data, 96, 56)[0]) < 0.5


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    "mode, kind", [("L", "JPEG"), ("CMYK", "JPEG"), ("L", "PNG"), ("P", "PNG"), ("1", "PNG")]
)
def test_colour_modes_become_rgb(mode, kind):
    image = photograph(128, 160)
    # Without dither. On its noise, Pillow's rounding between the two passes would cost two levels.
    if mode == "1":
        image = image.convert("L").point(lambda level: 255 * (level > 128))
    data = encode(image.convert(mode), kind)
    assert mean_error(decode([data])[0][0], by_pillow(data, 96, 56)[0]) < 1.0


@pytest.mark.usefixtures("backend")
def test_sixteen_bit_grey_is_scaled():
    levels = np.asarray(photograph(96, 96).convert("L"))
    data = encode(Image.fromarray(levels.astype(np.uint16) * 257), "PNG")
    assert mean_error(decode([data])[0][0], levels[:, :, None].repeat(3, 2)) < 0.6


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    image = photograph(160, 120)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(image, exif=exif)
    assert mean_error(decode([data])[0][0], by_pillow(data, 96, 56)[0]) < 0.5


def test_range_of_the_outputs():
    white, black = (
        encode(Image.new("RGB", (64, 64), level), "PNG") for level in ("white", "black")
    )
    ((pixels, vit_pixels),) = Decoder(2, 16, CPU)([batch([white, black], 32, [False, True])])
    assert torch.equal(pixels[0], torch.ones(3, 32, 32)) and torch.equal(
        pixels[1], -torch.ones(3, 32, 32)
    )
    assert vit_pixels.shape == (2, 16, 16, 3) and vit_pixels.is_contiguous()
    assert (vit_pixels[0] == 255).all() and (vit_pixels[1] == 0).all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("num_batches", [0, 1, 2, 7])
def test_batches_are_read_once_and_in_order(num_batches):
    taken = []

    def batches():
        for level in range(num_batches):
            taken.append(level)
            yield batch([encode(Image.new("RGB", (40, 40), (10 * level,) * 3), "PNG")], 32)

    got = list(Decoder(1, 16, CPU)(batches()))
    assert taken == list(range(num_batches))
    # Compared after the last batch, because a later batch must not overwrite an earlier one.
    assert [round(float((pixels.mean() + 1) / 2 * 255)) for pixels, _ in got] == [
        10 * level for level in taken
    ]


@pytest.mark.usefixtures("backend")
def test_pixels_do_not_depend_on_the_batch():
    images = [encode(photograph(120 + 7 * seed, 150, seed)) for seed in range(8)]
    one, four = decode(images, batch_size=1), decode(images, batch_size=4)
    assert np.array_equal(one[0], four[0]) and np.array_equal(one[1], four[1])


@pytest.mark.usefixtures("backend")
def test_error_of_the_source_is_raised_unchanged():
    def batches():
        yield batch([encode(photograph(50, 50))], 32)
        raise InputError("shard 7 changed")

    with pytest.raises(InputError, match=r"^shard 7 changed$"):
        list(Decoder(1, 16, CPU)(batches()))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kept_bytes", [0.02, 0.5, 0.95])
def test_undecodable_image_raises_when_its_batch_is_due(kept_bytes):
    good = encode(photograph(150, 150))
    bad = good[: int(kept_bytes * len(good))]
    decoder = Decoder(3, 16, CPU)
    decoded = decoder([batch(images, 32) for images in ([good] * 3, [good, good, bad], [good] * 3)])
    next(decoded)
    with pytest.raises(DecodeError):
        next(decoded)
    assert decoded_sizes([good, bad, b"", good]) == [(150, 150), None, None, (150, 150)]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("resize", ["dali", "torch"])
def test_crop_is_at_its_place_for_any_size(resize):
    """Wide and tall targets, at corners and in between, match Pillow."""
    image = photograph(300, 200)
    data = encode(image, "PNG")
    for size_px, place in (
        ((64, 128), (0.0, 0.0)),
        ((128, 64), (1.0, 1.0)),
        ((96, 96), (0.25, 0.5)),
        ((96, 96), (1.0, 0.0)),
    ):
        height, width = size_px
        scale = max(height / 200, width / 300)
        resized = image.resize((round(300 * scale), round(200 * scale)), Image.BICUBIC)
        left, top = (
            int((side - crop) * at)
            for side, crop, at in zip(resized.size, (width, height), place, strict=True)
        )
        expected = resized.crop((left, top, left + width, top + height))
        pixels, vit_pixels = decode([data], size_px, 56, places=[place], resize=resize)
        assert mean_error(pixels[0], np.asarray(expected, np.float32)) < 0.5
        assert (
            mean_error(
                vit_pixels[0], np.asarray(expected.resize((56, 56), Image.BICUBIC), np.float32)
            )
            < 0.5
        )


@pytest.mark.parametrize("resize", ["dali", "torch"])
def test_bf16_is_rounded_float32_and_vae_pixels_are_optional(resize):
    images = [encode(photograph(120 + 7 * seed, 150, seed)) for seed in range(3)]
    encoded = batch(images, 96, [True, False, True], has_image=[True, False, True])
    ((pixels, vit_pixels),) = Decoder(3, 56, CPU, resize=resize)([encoded])
    ((half, vit_half),) = Decoder(3, 56, CPU, dtype=torch.bfloat16, resize=resize)([encoded])
    assert half.dtype == torch.bfloat16 and vit_half.dtype == torch.uint8
    assert torch.equal(half, pixels.bfloat16()) and torch.equal(vit_half, vit_pixels)
    ((no_pixels, vit_only),) = Decoder(3, 56, CPU, vae_pixels=False, resize=resize)([encoded])
    # The ViT sees two of the three samples.
    assert no_pixels is None and torch.equal(vit_only, vit_pixels) and len(vit_only) == 2


@pytest.fixture
def sent(monkeypatch):
    """Run as for a GPU without DALI; "copies" stay on the CPU. Return the tensors sent so far."""
    found = []
    monkeypatch.setattr("iomm.engine.data.decode.fn", None)
    monkeypatch.setattr(
        "iomm.engine.data.decode.send", lambda host, device: found.append(host) or host.clone()
    )
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_gets_bytes_and_computes_the_same_pixels(sent, dtype):
    """A quarter of the bytes of float32 pixels, and the same bits."""
    images = [encode(photograph(120 + 7 * seed, 150, seed)) for seed in range(3)]
    encoded = batch(
        images,
        (64, 96),
        [True, False, True],
        places=[(0.0, 0.0), (1.0, 1.0), (0.3, 0.6)],
        has_image=[True, False, True],
    )
    ((pixels, vit_pixels),) = Decoder(3, 56, "meta", dtype=dtype)([encoded])
    assert [host.dtype for host in sent] == [torch.uint8] * 2
    assert sum(host.nbytes for host in sent) == 3 * (3 * 64 * 96) + 2 * (3 * 56 * 56)
    ((expected, vit_expected),) = Decoder(3, 56, CPU, dtype=dtype)([encoded])
    assert torch.equal(vit_pixels, vit_expected)
    assert pixels.dtype == dtype and pixels.is_contiguous() and torch.equal(pixels, expected)
    ((none, vit_only),) = Decoder(3, 56, "meta", vae_pixels=False)([encoded])
    assert none is None and torch.equal(vit_only, vit_expected)


@pytest.mark.parametrize(
    ("device", "vae", "precision", "expected"),
    [
        ("cuda", torch.bfloat16, "fp32", torch.bfloat16),
        ("cuda", torch.float32, "fp32", torch.float32),
        ("cuda", None, "fp32", torch.float32),
        ("cpu", torch.bfloat16, "fp32", torch.float32),
        ("cpu", None, "bf16", torch.bfloat16),
    ],
)
def test_pixels_are_bf16_where_the_autoencoder_rounds_them(device, vae, precision, expected):
    """Otherwise they keep float32, as pixels may be the latents, and a CPU would copy them."""
    config = load_config(PIXELS, [f"data.precision={precision}"])
    # None: no autoencoder.
    vae = load_vae("pixel:4") if vae is None else FluxVAE(autoencoder().to(vae))
    assert pixel_dtype(config, vae, torch.device(device)) == expected


def test_every_byte_is_scaled_as_on_the_cpu():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 4, 64, 1).expand(1, 4, 64, 3)
    expected = torch.empty(3, 4, 64)
    decode_module.write_vae(levels.permute(0, 3, 1, 2), False, expected)
    assert torch.equal(decode_module.scaled(levels, torch.float32)[0], expected)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_threads_resize_ahead_and_errors_come_with_their_batch(sent, device, monkeypatch):
    """The next `prefetch` batches are ready before they are asked for, and the next one is sent."""
    finished = threading.Semaphore(0)
    write = Decoder._write_vit

    def count(*args):
        write(*args)
        finished.release()

    monkeypatch.setattr(Decoder, "_write_vit", count)
    good, bad = encode(photograph(80, 60)), encode(photograph(80, 60))[:300]
    batches = [*[batch([good] * 2, 48)] * 3, batch([good, bad], 48)]
    decoded = Decoder(2, 32, device, prefetch=2)(batches)
    first = next(decoded)
    for _ in range(6):
        assert finished.acquire(timeout=60)
    # The last image is written, but its thread may not have returned.
    time.sleep(0.1)
    second = next(decoded)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # Three batches of two tensors, though only two batches were asked for.
    assert len(sent) == (6 if device == "meta" else 0)
    next(decoded)
    with pytest.raises(DecodeError):
        next(decoded)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_index_and_decoder_agree_on_size_and_orientation(kind):
    """The size in the index is the size that DALI decodes.

    20 sizes x 8 orientations of each format.
    """
    random = np.random.default_rng(0)
    images = []
    indexed = []
    for width, height in random.integers(32, 120, (20, 2)).tolist():
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[0x0112] = orientation
            data = encode(
                Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)),
                kind,
                exif=exif,
            )
            info = check_image(data, min_size_px=32, max_aspect=10)
            images.append(data)
            indexed.append((info.height, info.width))
            assert ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size == (
                info.width,
                info.height,
            )
    assert decoded_sizes(images) == indexed
    # The pixels of a photograph of each orientation match within 2/255 on average.
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(photograph(160, 120), kind, exif=exif)
        assert mean_error(decode([data])[0][0], by_pillow(data, 96, 56)[0]) < 2
