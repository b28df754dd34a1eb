"""Tests of noisy_tokens: formula, token order, and equal noise on every backend."""

import pytest
import torch

from iomm.kernels import native
from iomm.kernels.noisy_tokens import noisy_tokens, noisy_tokens_reference, patch_tokens, unpatch
from iomm.kernels.philox import NOISE, normal

pytestmark = pytest.mark.usefixtures("poison")

SHAPES = [
    (1, 1, 2, 2, 2),
    (3, 5, 6, 10, 2),
    (2, 16, 8, 8, 2),
    (2, 3, 9, 6, 3),
    (2, 4, 5, 7, 1),
    (5, 16, 32, 32, 2),
]
needs_cpp = pytest.mark.skipif(native.why_not("cpu") is not None, reason=str(native.why_not("cpu")))


def inputs(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return latents, torch.rand(shape[0], generator=generator), torch.arange(shape[0]) + 2**35


def token_order(x, patch):
    """Return the tokens of (C, H, W) one value at a time: "c (h p) (w q) -> (h w) (c p q)"."""
    channels, height, width = x.shape
    corners = [(h, w) for h in range(0, height, patch) for w in range(0, width, patch)]
    values = [(c, p, q) for c in range(channels) for p in range(patch) for q in range(patch)]
    return torch.stack(
        [torch.stack([x[c, h + p, w + q] for c, p, q in values]) for h, w in corners]
    )


@pytest.mark.parametrize("shape", SHAPES[:5])
def test_formula_matches_in_float64(shape):
    *shape, patch = shape
    x, t, n = inputs(shape, torch.float64)
    noisy, target = noisy_tokens(x, t, 9, n, patch)
    z = normal(9, NOISE, n, x[0].numel()).double().view_as(x)
    for b in range(len(x)):
        time = t[b].double()
        torch.testing.assert_close(
            noisy[b], token_order((1 - time) * x[b] + time * z[b], patch), rtol=1e-6, atol=1e-6
        )
        torch.testing.assert_close(target[b], token_order(z[b] - x[b], patch), rtol=1e-6, atol=1e-6)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_cpp_matches_reference(shape, dtype):
    *shape, patch = shape
    x, t, n = inputs(shape, dtype)
    for actual, expected in zip(
        noisy_tokens(x, t, 2**63, n, patch),
        noisy_tokens_reference(x, t, 2**63, n, patch),
        strict=True,
    ):
        assert actual.dtype == dtype and actual.shape == expected.shape
        # The noise, at most 5.77, may differ by 2 ulp, and the sum by one rounding.
        torch.testing.assert_close(actual, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_time_one_gives_noise_and_time_zero_latents():
    x, _, n = inputs((2, 4, 4, 4))
    noisy, target = noisy_tokens(x, torch.tensor([0.0, 1.0]), 3, n)
    assert torch.equal(noisy[0], patch_tokens(x)[0])
    z = patch_tokens(normal(3, NOISE, n, 64).view_as(x))
    assert torch.equal(noisy[1], z[1])
    assert torch.equal(target, z - patch_tokens(x))


def test_sample_is_independent_of_batch():
    x, t, n = inputs((4, 3, 8, 8))
    whole = noisy_tokens(x, t, 3, n)
    part = noisy_tokens(x[1:3], t[1:3], 3, n[1:3])
    assert all(torch.equal(a[1:3], b) for a, b in zip(whole, part, strict=True))


@pytest.mark.parametrize("shape", [*SHAPES, (0, 4, 4, 4, 2)])
def test_unpatch_inverts_patch_tokens(shape):
    *shape, patch = shape
    x, _, _ = inputs(shape)
    tokens = patch_tokens(x, patch)
    assert all(torch.equal(tokens[b], token_order(x[b], patch)) for b in range(len(x)))
    assert torch.equal(unpatch(tokens, *shape[2:], patch), x)
    # Non-contiguous tokens.
    assert torch.equal(
        unpatch(tokens.repeat(1, 1, 2)[..., : tokens.shape[2]], *shape[2:], patch), x
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unpatch_gradient_is_patch_tokens(dtype):
    tokens = torch.randn(2, 6, 12, dtype=dtype, requires_grad=True)
    weight = torch.randn(2, 3, 4, 6, dtype=dtype)
    (unpatch(tokens, 4, 6) * weight).sum().backward()
    assert torch.equal(tokens.grad, patch_tokens(weight))


def test_unpatch_compiles_as_one_graph():
    tokens = torch.randn(2, 6, 12)
    compiled = torch.compile(
        lambda tokens: unpatch(tokens, 4, 6), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(tokens), unpatch(tokens, 4, 6))


def test_output_has_no_gradient_and_accepts_any_layout():
    x, t, n = inputs((2, 4, 6, 8))
    strided = x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1).requires_grad_()
    got, expected = noisy_tokens(strided, t, 1, n), noisy_tokens(x, t, 1, n)
    assert all(
        torch.equal(a, b) and not a.requires_grad for a, b in zip(got, expected, strict=True)
    )


@pytest.mark.parametrize(
    ("shape", "batch", "patch", "message"),
    [
        ((2, 3, 5, 4), 2, 2, "multiples"),
        ((2, 3, 4, 5), 2, 2, "multiples"),
        ((2, 3, 4, 4), 3, 2, "shape"),
        ((3, 4, 4), 3, 2, "B, C, H, W"),
        ((2, 3, 4, 4), 2, 0, "patches"),
    ],
)
def test_bad_input_raises_value_error(shape, batch, patch, message):
    with pytest.raises(ValueError, match=message):
        noisy_tokens(torch.zeros(shape), torch.zeros(batch), 0, torch.arange(batch), patch)


@pytest.mark.parametrize(
    ("shape", "height", "width"),
    [
        ((1, 4, 12), 4, 6),
        ((1, 4, 11), 4, 4),
        ((4, 12), 4, 4),
        ((1, 4, 12), 3, 4),
    ],
)
def test_unpatch_bad_tokens_raise_value_error(shape, height, width):
    with pytest.raises(ValueError, match="tokens"):
        unpatch(torch.zeros(shape), height, width)


@needs_cpp
def test_op_passes_opcheck():
    torch.library.opcheck(
        torch.ops.iomm.noisy_tokens.default, (*inputs((2, 4, 4, 4))[:2], 3, torch.arange(2), 2)
    )


def test_compiles_as_one_graph():
    x, t, n = inputs((2, 4, 4, 4))
    step = torch.compile(lambda x, t, n: noisy_tokens(x, t, 3, n), fullgraph=True, backend="eager")
    eager = noisy_tokens(x, t, 3, n)
    assert all(torch.equal(a, b) for a, b in zip(step(x, t, n), eager, strict=True))
