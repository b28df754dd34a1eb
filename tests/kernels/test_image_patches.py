"""Tests of image_patches: formula, order of a convolution, equal bits on every backend."""

import pytest
import torch
import torch.nn.functional as F

from iomm.kernels import native
from iomm.kernels.image_patches import image_patches, normalised

pytestmark = pytest.mark.usefixtures("poison")

NORM = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SIZES = [
    (1, 14, 14, 14),
    (3, 28, 70, 14),
    (2, 6, 10, 2),
    (1, 5, 7, 1),
    (2, 48, 32, 16),
    (1, 9, 21, 3),
]
needs_cpp = pytest.mark.skipif(native.why_not("cpu") is not None, reason=str(native.why_not("cpu")))


def pixels_of(batch, height, width):
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, height, width, 3), generator=random, dtype=torch.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_patches_match_formula_and_unfold_order(size):
    *shape, patch = size
    pixels = pixels_of(*shape)
    patches = image_patches(pixels, patch, **NORM, dtype=torch.float32)
    exact = pixels.permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(NORM[name]).double()[:, None, None] for name in ("mean", "std"))
    exact = (exact - mean) / std
    torch.testing.assert_close(normalised(pixels, **NORM).double(), exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        patches.double(), F.unfold(exact, patch, stride=patch).transpose(1, 2), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_layer_on_patches_matches_convolution(dtype):
    weight = torch.randn(
        5, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    pixels = pixels_of(2, 8, 12)
    patches = image_patches(pixels, 4, **NORM, dtype=dtype)
    expected = (
        F.conv2d(normalised(pixels, **NORM).double(), weight, stride=4).flatten(2).transpose(1, 2)
    )
    torch.testing.assert_close(patches.double() @ weight.flatten(1).T, expected, rtol=0, atol=1e-12)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_cpp_matches_reference_bitwise(size, dtype, monkeypatch):
    *shape, patch = size
    results = []
    for backend in ("cpp", "reference"):
        monkeypatch.setenv("IOMM_KERNELS", f"image_patches:{backend}")
        results.append(image_patches(pixels_of(*shape), patch, **NORM, dtype=dtype))
    assert (
        results[0].dtype == dtype and results[0].shape == results[1].shape and torch.equal(*results)
    )


def test_empty_batch_and_strided_layout():
    assert image_patches(pixels_of(0, 4, 4), 2, **NORM, dtype=torch.bfloat16).shape == (0, 4, 12)
    pixels = pixels_of(2, 4, 6)
    planar = pixels.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    got, expected = (image_patches(x, 2, **NORM, dtype=torch.float32) for x in (planar, pixels))
    assert torch.equal(got, expected) and torch.equal(
        normalised(planar, **NORM), normalised(pixels, **NORM)
    )


@pytest.mark.parametrize(
    ("pixels", "options", "message"),
    [
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), {}, "pixels must"),
        (torch.zeros(1, 4, 4, 3), {}, "pixels must"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), {}, "pixels must"),
        (torch.zeros(1, 4, 5, 3, dtype=torch.uint8), {}, "multiples"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), {"dtype": torch.int8}, "dtype"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), {"std": (1, 0, 1)}, "std"),
    ],
)
def test_bad_input_raises_value_error(pixels, options, message):
    with pytest.raises(ValueError, match=message):
        image_patches(pixels, 2, **{**NORM, "dtype": torch.float32, **options})


@needs_cpp
def test_op_passes_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        arguments = pixels_of(2, 4, 6), 2, [0.1, 0.2, 0.3], [1.0, 2.0, 3.0], dtype
        torch.library.opcheck(torch.ops.iomm.image_patches.default, arguments)


def test_compiles_as_one_graph():
    pixels = pixels_of(2, 4, 6)

    def step(pixels):
        return image_patches(pixels, 2, **NORM, dtype=torch.float32)

    assert torch.equal(
        torch.compile(step, fullgraph=True, backend="aot_eager")(pixels), step(pixels)
    )
