"""Tests of the CUDA kernels in csrc/ without a GPU.

g++ compiles them against cuda_on_cpu.h, and their results are compared with the specification.
Races, memory models and speed can only be tested on a GPU (benchmarks/ops.py --gpu).
"""

import ctypes
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from iomm.kernels.image_patches import image_patches_reference
from iomm.kernels.noisy_tokens import noisy_tokens_reference
from iomm.kernels.philox import philox_reference
from iomm.kernels.visible_tokens import visible_tokens_reference

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = torch.tensor([0, 5, 2**33, 11, 2**40 + 7])

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def as_cpp(source):
    """Return CUDA source as C++, with launches and dynamic shared memory rewritten for g++."""
    source = source.replace("#include <cuda_runtime.h>", '#include "cuda_on_cpu.h"')
    source = re.sub(r"extern __shared__ uint4 (\w+)\[\];", r"uint4* \1 = on_cpu::shared;", source)
    launch = re.compile(
        r"(\w+(?:<[\w:, ]+>)?)<<<(.*?), ([^,]+), ([^,]+), [^,>]+>>>\((.*?)\);\n", re.DOTALL
    )
    source, count = launch.subn(r"on_cpu::launch(\2, \3, \4, [&] { \1(\5); });\n", source)
    assert count and "<<<" not in source
    return source


@pytest.fixture(scope="module")
def entry(tmp_path_factory):
    """Return a function that maps a name to the C entry point iomm_<name>_cuda."""
    folder, libraries = tmp_path_factory.mktemp("cuda"), {}

    def find(name):
        stem = "philox" if name.startswith("philox") else name
        if stem not in libraries:
            (folder / f"{stem}.cpp").write_text(as_cpp((ROOT / "csrc" / f"{stem}.cu").read_text()))
            flags = [
                "-O1",
                "-std=c++17",
                "-fPIC",
                "-shared",
                "-ffp-contract=off",
                "-DIOMM_SOURCE_HASH=x",
                f"-I{ROOT / 'csrc'}",
                f"-I{ROOT / 'tests/helpers'}",
            ]
            files = [str(folder / f"{stem}.cpp"), "-o", str(folder / f"{stem}.so")]
            result = subprocess.run(["g++", *flags, *files], capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            libraries[stem] = ctypes.CDLL(str(folder / f"{stem}.so"))
        function = getattr(libraries[stem], f"iomm_{name}_cuda")

        def call(*arguments):
            values = []
            for argument in arguments:
                if isinstance(argument, torch.Tensor):
                    assert argument.is_contiguous()
                    values.append(ctypes.c_void_p(argument.data_ptr()))
                elif argument is None:
                    values.append(ctypes.c_void_p())
                else:
                    kind = ctypes.c_double if isinstance(argument, float) else ctypes.c_int64
                    values.append(kind(argument))
            assert function(*values, ctypes.c_void_p()) == 0

        return call

    return find


def poisoned(*shape, dtype):
    return torch.full(
        shape, float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min, dtype=dtype
    )


@pytest.mark.parametrize("count", [1, 257])
def test_philox_matches_reference(entry, count):
    for kind, tolerance in (("uniform", 0), ("normal", 3e-7)):
        out = poisoned(5, count, dtype=torch.float32)
        entry(f"philox_{kind}")(9, 2, SAMPLES, 5, count, out)
        expected = philox_reference(kind, 9, 2, SAMPLES, count)
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance / 100)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(
    ("batch", "num_tokens", "ratio", "capacity"),
    [
        (5, 256, 0.85, 250),
        (5, 63, 0.5, 100),
        (33, 40, 0.85, 250),
        (3, 1, 0.4, 3),
        (2, 130, 0.0, 260),
        (2, 40, 1.0, 7),
    ],
)
def test_visible_tokens_match_reference(entry, batch, num_tokens, ratio, capacity, fixed):
    n = torch.arange(batch) + 2**35
    index, position = (poisoned(capacity, dtype=torch.int64) for _ in range(2))
    offsets, overflow = poisoned(batch + 1, dtype=torch.int32), poisoned(1, dtype=torch.int64)
    num_visible = round((1 - ratio) * num_tokens) if fixed else -1
    entry("visible_tokens")(
        9,
        n,
        batch,
        num_tokens,
        math.ceil(ratio * 2**24),
        num_visible,
        capacity,
        index,
        offsets,
        position,
        overflow,
    )
    reference = visible_tokens_reference(9, n, num_tokens, ratio, fixed, capacity)
    for actual, expected in zip((index, offsets, position, overflow), reference, strict=True):
        assert torch.equal(actual, expected)


# The first three shapes use the tiled kernel (the second with a last tile of 4), the others the
# per-value kernel.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [(1, 16, 4, 64, 2), (2, 16, 2, 68, 2), (1, 4, 2, 8, 2), (2, 3, 4, 6, 2), (1, 5, 9, 6, 3)],
)
def test_noisy_tokens_match_reference(entry, shape, dtype):
    batch, channels, height, width, patch = shape
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, channels, height, width, generator=random).to(dtype)
    t, n = torch.rand(batch, generator=random), SAMPLES[:batch].contiguous()
    size = batch, (height // patch) * (width // patch), channels * patch**2
    noisy, target = (poisoned(*size, dtype=dtype) for _ in range(2))
    bf16 = int(dtype == torch.bfloat16)
    entry("noisy_tokens")(
        latents, t, 9, n, batch, channels, height, width, patch, bf16, noisy, target
    )
    reference = noisy_tokens_reference(latents, t, 9, n, patch)
    for actual, expected in zip((noisy, target), reference, strict=True):
        torch.testing.assert_close(actual, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "size", [(1, 28, 280, 14), (1, 6, 10, 2), (1, 21, 7, 7), (1, 14, 28, 14), (2, 9, 6, 3)]
)
def test_image_patches_match_reference(entry, size, dtype):
    batch, height, width, patch = size
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch, height, width, 3), generator=random, dtype=torch.uint8)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    patches = poisoned(batch, (height // patch) * (width // patch), 3 * patch**2, dtype=dtype)
    entry("image_patches")(
        pixels,
        batch,
        height,
        width,
        patch,
        *(255 * m for m in mean),
        *(1 / (255 * s) for s in std),
        int(dtype == torch.bfloat16),
        patches,
    )
    assert torch.equal(patches, image_patches_reference(pixels, patch, mean, std, dtype))


def test_every_cuda_source_is_tested():
    assert {path.stem for path in (ROOT / "csrc").glob("*.cu")} == {
        "philox",
        "visible_tokens",
        "noisy_tokens",
        "image_patches",
    }
