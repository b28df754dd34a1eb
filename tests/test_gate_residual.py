"""gate_residual: bodies against the specification, values and every gradient."""

import pytest
import torch
from kernel_checks import cast, check_against, needs_triton

from iomm.kernels.gate_residual import gate_residual
from iomm.kernels.gate_residual.fused import gate_residual_triton
from iomm.kernels.gate_residual.reference import gate_residual_reference, gate_residual_torch

pytestmark = pytest.mark.usefixtures("poison")


def inputs(batch, length, width):
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(batch, length, width, generator=random, dtype=torch.float64) for _ in range(2))
    gate = torch.randn(batch, 3 * width, generator=random, dtype=torch.float64).chunk(3, -1)[1]
    return [x.requires_grad_(), gate.requires_grad_(), y.requires_grad_()]


def test_gradcheck_and_pytorchs_formula():
    tensors = inputs(2, 3, 4)
    assert torch.autograd.gradcheck(gate_residual_reference, tensors)
    torch.testing.assert_close(gate_residual_torch(*tensors), gate_residual_reference(*tensors), rtol=0, atol=1e-15)


@pytest.mark.parametrize("change", ["gate", "y", "dtype"])
def test_bad_input_is_a_value_error(change):
    x, gate, y = inputs(2, 3, 8)
    with pytest.raises(ValueError, match="must"):
        gate_residual(x, gate[:1] if change == "gate" else gate,
                      y[:, :2] if change == "y" else y.float() if change == "dtype" else y)


@needs_triton
@pytest.mark.parametrize("shape", [(2, 1, 64), (2, 33, 96), (1, 5, 1536), (2, 0, 8)])
def test_triton_values_and_every_gradient(shape):
    check_against(gate_residual_triton, gate_residual_reference, inputs(*shape))


@needs_triton
def test_triton_op_is_registered_soundly():
    torch.library.opcheck(torch.ops.iomm.gate_residual.default, tuple(cast(inputs(2, 3, 8))))


@needs_triton
def test_triton_compiles_as_one_graph(monkeypatch):
    monkeypatch.setenv("IOMM_KERNELS", "gate_residual:triton")
    tensors = cast(inputs(2, 3, 8))
    def step(*x):
        return gate_residual(*x).sin()
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(*tensors), step(*tensors))


def test_default_body_compiles_as_one_graph():
    tensors = cast(inputs(2, 3, 8), torch.float32, "cpu")
    def step(*x):
        return gate_residual(*x).sin()
    assert torch.equal(torch.compile(step, fullgraph=True, backend="eager")(*tensors), step(*tensors))
