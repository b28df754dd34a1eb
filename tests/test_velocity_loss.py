"""velocity_loss: bodies against the specification, both outputs and the gradient."""

import pytest
import torch
from kernel_checks import cast, check_against, needs_triton

from iomm.kernels.velocity_loss import velocity_loss
from iomm.kernels.velocity_loss.fused import velocity_loss_triton
from iomm.kernels.velocity_loss.reference import velocity_loss_reference

pytestmark = pytest.mark.usefixtures("poison")


def inputs(*shape):
    random = torch.Generator().manual_seed(0)
    velocity, target = (torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(2))
    return [velocity.requires_grad_(), target]


def test_gradcheck_and_formula():
    velocity, target = inputs(2, 3, 4)
    assert torch.autograd.gradcheck(velocity_loss_reference, (velocity, target))
    loss, loss_B = velocity_loss(velocity, target)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(velocity, target), rtol=1e-14, atol=0)
    torch.testing.assert_close(loss_B.mean(), loss, rtol=1e-14, atol=0)


def test_bad_input_is_a_value_error():
    with pytest.raises(ValueError, match="alike"):
        velocity_loss(torch.zeros(2, 3, 4), torch.zeros(2, 4, 3))


@needs_triton
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 65, 64), (2, 128, 64), (2, 5, 12)])
def test_triton_values_and_gradient(shape):
    check_against(velocity_loss_triton, velocity_loss_reference, inputs(*shape))


@needs_triton
def test_triton_gives_no_gradient_to_a_target():
    with pytest.raises(ValueError, match="detach"):
        velocity_loss_triton(*(x.detach().requires_grad_() for x in cast(inputs(1, 2, 4))))


@needs_triton
def test_triton_op_is_registered_soundly():
    torch.library.opcheck(torch.ops.iomm.velocity_loss.default, tuple(cast(inputs(2, 3, 8))))


@needs_triton
def test_triton_compiles_as_one_graph(monkeypatch):
    monkeypatch.setenv("IOMM_KERNELS", "velocity_loss:triton")
    tensors = cast(inputs(2, 3, 8))
    def step(*x):
        return velocity_loss(*x)[0] * 3
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(*tensors), step(*tensors))


def test_default_body_compiles_as_one_graph():
    tensors = cast(inputs(2, 3, 8), torch.float32, "cpu")
    def step(*x):
        return velocity_loss(*x)[0] * 3
    assert torch.equal(torch.compile(step, fullgraph=True, backend="eager")(*tensors), step(*tensors))
