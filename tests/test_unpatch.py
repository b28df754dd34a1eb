"""Tokens back to latents: the same bits on every body, and a gradient. What it undoes is in test_noisy_tokens.py."""

import pytest
import torch

from iomm.kernels import native
from iomm.kernels.noisy_tokens import patch_tokens
from iomm.kernels.unpatch import unpatch
from iomm.kernels.unpatch.reference import unpatch_reference

pytestmark = pytest.mark.usefixtures("poison")

SHAPES = [(1, 1, 2, 2, 2), (3, 5, 6, 10, 2), (2, 16, 8, 8, 2), (2, 3, 9, 6, 3), (2, 4, 5, 7, 1), (5, 16, 32, 32, 2),
          (0, 4, 4, 4, 2)]
needs_cpp = pytest.mark.skipif(native.why_not("cpu") is not None, reason=str(native.why_not("cpu")))


def tokens_of(batch, channels, height, width, patch, dtype=torch.float32):
    shape = batch, (height // patch) * (width // patch), channels * patch**2
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_cpp_moves_the_same_bits(shape, dtype):
    tokens, (height, width, patch) = tokens_of(*shape, dtype), shape[2:]
    got = unpatch(tokens, height, width, patch)
    assert got.dtype == dtype and torch.equal(got, unpatch_reference(tokens, height, width, patch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_its_gradient_is_the_packing(dtype):
    tokens = tokens_of(2, 3, 4, 6, 2, dtype).requires_grad_()
    weight = torch.randn(2, 3, 4, 6, dtype=dtype)
    (unpatch(tokens, 4, 6) * weight).sum().backward()
    assert torch.equal(tokens.grad, patch_tokens(weight))


@needs_cpp
def test_op_is_registered_soundly():
    torch.library.opcheck(torch.ops.iomm.unpatch.default, (tokens_of(2, 3, 4, 6, 2).requires_grad_(), 4, 6, 2))


def test_compiles_as_one_graph():
    tokens = tokens_of(2, 3, 4, 6, 2)
    def step(tokens):
        return unpatch(tokens, 4, 6)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(tokens), step(tokens))
