"""Device, dtypes and error budget of the Triton backend tests."""

import pytest
import torch

from iomm.kernels.triton_ops import support as triton_support

ON_GPU = torch.cuda.is_available() and not triton_support.INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
# bf16 products are garbage in Triton's interpreter.
HALF = torch.bfloat16 if ON_GPU else torch.float32
# In float32 the error of a softmax with exp2 was 2.2 times that of a softmax with exp.
SLACK = 2.0 if ON_GPU else 4.0
needs_triton = pytest.mark.skipif(
    triton_support.why_not() is not None or not (ON_GPU or triton_support.INTERPRETED),
    reason="needs a GPU or TRITON_INTERPRET=1 (see tests/kernels/test_interpreter.py)",
)


def assert_no_worse(got, same_dtype, exact, slack=SLACK):
    """Assert that the error is at most `slack` times that of `same_dtype`.

    `same_dtype` is the specification in the dtype of `got`, and `exact` the specification in
    float64. One ulp of the largest value is added to the budget.
    """
    assert got.shape == exact.shape and got.dtype == same_dtype.dtype
    if not exact.numel():
        return
    got, same_dtype, exact = (x.detach().cpu().double() for x in (got, same_dtype.float(), exact))
    ulp = torch.finfo(HALF).eps * exact.abs().max()
    budget = slack * (same_dtype - exact).abs().max() + ulp
    error = (got - exact).abs().max()
    assert error <= budget, f"error {error:.2e} > budget {budget:.2e}"


def cast(tensors, dtype=HALF, device=DEVICE):
    """Return copies of the tensors on a device, as leaves.

    Floating-point tensors are converted to `dtype`. Others are only moved. Anything else is
    returned unchanged.
    """

    def one(x):
        if not isinstance(x, torch.Tensor):
            return x
        moved = x.detach().to(device, dtype) if x.is_floating_point() else x.to(device)
        return moved.requires_grad_(x.requires_grad) if x.is_floating_point() else moved

    return [one(x) for x in tensors]


def outputs_and_gradients(run, inputs):
    """Return the outputs of run(*inputs), then the gradients of all inputs that require one.

    The differentiated scalar is a sum of the outputs with fixed random weights.
    """
    outputs = run(*inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    total = 0
    for index, out in enumerate(outputs):
        weight = torch.randn(
            out.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64
        )
        total = total + (out * weight.to(out.device, out.dtype)).sum()
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    return outputs + list(torch.autograd.grad(total, leaves, materialize_grads=True))


def check_against(backend, reference, inputs):
    """Compare the values and gradients of `backend` with `reference`.

    The backend gets HALF inputs, the exact reference float64 ones. The error budget is that of
    `assert_no_worse`. Two runs must return the same bits.
    """
    exact = outputs_and_gradients(reference, cast(inputs, torch.float64, "cpu"))
    same_dtype = outputs_and_gradients(reference, cast(inputs))
    got = outputs_and_gradients(backend, cast(inputs))
    for actual, low, expected in zip(got, same_dtype, exact, strict=True):
        assert_no_worse(actual, low, expected)
    again = outputs_and_gradients(backend, cast(inputs))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"
