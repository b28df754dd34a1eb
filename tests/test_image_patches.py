"""Pixels to ViT patches and VAE pixels: the formula, the order of a convolution, the same bits on every body."""

import pytest
import torch
import torch.nn.functional as F

from iomm.kernels import native
from iomm.kernels.image_patches import image_patches

pytestmark = pytest.mark.usefixtures("poison")

NORM = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SIZES = [(1, 14, 14, 14), (3, 28, 70, 14), (2, 6, 10, 2), (1, 5, 7, 1), (2, 48, 32, 16), (1, 9, 21, 3)]
needs_cpp = pytest.mark.skipif(native.why_not("cpu") is not None, reason=str(native.why_not("cpu")))


def pixels_of(kind, batch, height, width):
    random = torch.Generator().manual_seed(0)
    if kind == "uint8":
        return torch.randint(0, 256, (batch, height, width, 3), generator=random, dtype=torch.uint8)
    return torch.rand(batch, 3, height, width, generator=random).mul(2).sub(1).to(getattr(torch, kind))


@pytest.mark.parametrize("size", SIZES)
def test_formula_and_order(size):
    *shape, patch = size
    pixels = pixels_of("uint8", *shape)
    patches, vae = image_patches(pixels, patch, **NORM, dtype=torch.float32)
    exact = pixels.permute(0, 3, 1, 2).double() / 255
    torch.testing.assert_close(vae.double(), exact * 2 - 1, rtol=0, atol=1e-6)
    mean, std = (torch.tensor(NORM[name]).double()[:, None, None] for name in ("mean", "std"))
    wanted = F.unfold((exact - mean) / std, patch, stride=patch).transpose(1, 2)
    torch.testing.assert_close(patches.double(), wanted, rtol=0, atol=1e-6)


def test_a_linear_layer_on_patches_is_the_convolution():
    weight = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pixels = pixels_of("float32", 2, 8, 12)
    patches, vae = image_patches(pixels, 4, mean=(0.5,) * 3, std=(0.5,) * 3, dtype=torch.float32)
    assert torch.equal(vae, pixels)
    wanted = F.conv2d(pixels.double(), weight, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patches.double() @ weight.flatten(1).T, wanted, rtol=0, atol=1e-5)


@needs_cpp
@pytest.mark.parametrize("kind", ["uint8", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_cpp_is_the_reference_bit_by_bit(size, dtype, kind, monkeypatch):
    *shape, patch = size
    results = []
    for body in ("cpp", "reference"):
        monkeypatch.setenv("IOMM_KERNELS", f"image_patches:{body}")
        results.append(image_patches(pixels_of(kind, *shape), patch, **NORM, dtype=dtype))
    for mine, specified in zip(*results):
        assert mine.dtype == dtype and mine.shape == specified.shape and torch.equal(mine, specified)


def test_without_vae_pixels_and_without_images():
    patches, vae = image_patches(pixels_of("uint8", 1, 4, 4), 2, **NORM, vae=False)
    assert vae is None and patches.shape == (1, 4, 12) and patches.dtype == torch.bfloat16
    patches, vae = image_patches(pixels_of("uint8", 0, 4, 4), 2, **NORM)
    assert patches.shape == (0, 4, 12) and vae.shape == (0, 3, 4, 4)


@pytest.mark.parametrize(("pixels", "options", "message"), [
    (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), {}, "pixels must"), (torch.zeros(1, 4, 4, 3), {}, "pixels must"),
    (torch.zeros(1, 3, 4, 5), {}, "multiples"), (torch.zeros(1, 3, 4, 4), {"dtype": torch.float16}, "dtype"),
    (torch.zeros(1, 3, 4, 4), {"std": (1, 0, 1)}, "std"),
    (torch.zeros(1, 3, 4, 4, dtype=torch.int32), {}, "pixels must"),
])
def test_bad_input_is_a_value_error(pixels, options, message):
    with pytest.raises(ValueError, match=message):
        image_patches(pixels, 2, **{**NORM, **options})


@needs_cpp
def test_op_is_registered_soundly():
    for vae in (True, False):
        arguments = pixels_of("uint8", 2, 4, 6), 2, [0.1, 0.2, 0.3], [1.0, 2.0, 3.0], torch.bfloat16, vae
        torch.library.opcheck(torch.ops.iomm.image_patches.default, arguments)


def test_compiles_as_one_graph():
    pixels = pixels_of("uint8", 2, 4, 6)
    def step(pixels):
        return image_patches(pixels, 2, **NORM)
    for mine, eager in zip(torch.compile(step, fullgraph=True, backend="aot_eager")(pixels), step(pixels)):
        assert torch.equal(mine, eager)
