"""Tests of norm_modulate: backends against the specification, values and every gradient."""

import pytest
import torch
from kernel_checks import cast, check_against, needs_triton

from iomm.kernels.norm_modulate import (
    norm_modulate,
    norm_modulate_reference,
    norm_modulate_torch,
    norm_modulate_triton,
)

pytestmark = pytest.mark.usefixtures("poison")


def inputs(batch, length, width, shift=True):
    """Return x, shift and scale.

    The mean of x is far from 0. Shift and scale are slices of one tensor, as in the blocks.
    """
    random = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, width, generator=random, dtype=torch.float64) * 2 + 1
    modulation = torch.randn(batch, 2 * width, generator=random, dtype=torch.float64)
    first, second = modulation.chunk(2, -1)
    return [x.requires_grad_(), first.requires_grad_() if shift else None, second.requires_grad_()]


@pytest.mark.parametrize("layer", [True, False])
def test_reference_passes_gradcheck_and_matches_torch(layer):
    tensors = inputs(2, 3, 5)

    def run(*x):
        return norm_modulate_reference(*x, layer, 1e-6)

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradcheck(lambda x, scale: run(x, None, scale), (tensors[0], tensors[2]))
    torch.testing.assert_close(
        norm_modulate_torch(*tensors, layer, 1e-6), run(*tensors), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        norm_modulate_torch(tensors[0], None, tensors[2], layer, 1e-6),
        run(tensors[0], None, tensors[2]),
        rtol=1e-12,
        atol=1e-12,
    )


def test_rows_are_normalised():
    x, *_ = inputs(2, 3, 64)
    zeros = torch.zeros(2, 64, dtype=torch.float64)
    out = norm_modulate(x, zeros, zeros)
    assert out.mean(-1).abs().max() < 1e-12 and (out.square().mean(-1) - 1).abs().max() < 1e-5
    out = norm_modulate(x, None, zeros, kind="rms")
    assert out.mean(-1).abs().min() > 1e-2 and (out.square().mean(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("change", ["shift", "scale", "dtype", "kind"])
def test_bad_input_raises_value_error(change):
    x, shift, scale = inputs(2, 3, 8)
    with pytest.raises(ValueError, match="must"):
        norm_modulate(
            x,
            shift[:, :4] if change == "shift" else shift,
            scale[:1] if change == "scale" else scale.float() if change == "dtype" else scale,
            kind="batch" if change == "kind" else "layer",
        )


@needs_triton
@pytest.mark.parametrize("layer", [True, False])
@pytest.mark.parametrize("shape", [(2, 1, 64), (2, 33, 96), (1, 5, 1536), (2, 0, 8)])
def test_triton_values_and_gradients_match(shape, layer):
    for shift in (True, False):
        check_against(
            lambda *x: norm_modulate_triton(*x, layer, 1e-6),
            lambda *x: norm_modulate_reference(*x, layer, 1e-6),
            inputs(*shape, shift=shift),
        )


@needs_triton
def test_triton_op_passes_opcheck():
    for shift in (True, False):
        torch.library.opcheck(
            torch.ops.iomm.norm_modulate.default, (*cast(inputs(2, 3, 8, shift)), True, 1e-6)
        )


@needs_triton
def test_triton_compiles_as_one_graph(monkeypatch):
    monkeypatch.setenv("IOMM_KERNELS", "norm_modulate:triton")
    tensors = cast(inputs(2, 3, 8))

    def step(*x):
        return norm_modulate(*x).sin()

    assert torch.equal(
        torch.compile(step, fullgraph=True, backend="aot_eager")(*tensors), step(*tensors)
    )


def test_default_backend_compiles_as_one_graph():
    tensors = cast(inputs(2, 3, 8), torch.float32, "cpu")

    def step(*x):
        return norm_modulate(*x).sin()

    assert torch.equal(
        torch.compile(step, fullgraph=True, backend="eager")(*tensors), step(*tensors)
    )
