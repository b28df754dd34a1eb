"""What the tests of Triton bodies share: where they run, and how large an error may be."""

import pytest
import torch

from iomm.kernels.triton_ops import support as triton_support

ON_GPU = torch.cuda.is_available() and not triton_support.INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
# bf16 products are garbage in Triton's interpreter
HALF = torch.bfloat16 if ON_GPU else torch.float32
# In float32 a softmax by powers of 2 was off by 2.2 times what one by exp is.
SLACK = 2.0 if ON_GPU else 4.0
needs_triton = pytest.mark.skipif(
    triton_support.why_not() is not None or not (ON_GPU or triton_support.INTERPRETED),
    reason="runs on a GPU, or with TRITON_INTERPRET=1 as tests/kernels/test_interpreter.py does",
)


def assert_no_worse(got, same_dtype, exact, slack=SLACK):
    """The error may be `slack` times the specification's in the same dtype, plus one ulp of the largest value."""
    assert got.shape == exact.shape and got.dtype == same_dtype.dtype
    if not exact.numel():
        return
    got, same_dtype, exact = (x.detach().cpu().double() for x in (got, same_dtype.float(), exact))
    ulp = torch.finfo(HALF).eps * exact.abs().max()
    budget = slack * (same_dtype - exact).abs().max() + ulp
    error = (got - exact).abs().max()
    assert error <= budget, f"error {error:.2e} > budget {budget:.2e}"


def cast(tensors, dtype=HALF, device=DEVICE):
    """Leaves of their own in another dtype, on the device; what is no floating tensor only moves, None stays."""

    def one(x):
        if not isinstance(x, torch.Tensor):
            return x
        moved = x.detach().to(device, dtype) if x.is_floating_point() else x.to(device)
        return moved.requires_grad_(x.requires_grad) if x.is_floating_point() else moved

    return [one(x) for x in tensors]


def outputs_and_gradients(run, inputs):
    """Outputs of run(*inputs), then the gradients of all inputs that want one, for fixed weights on the outputs."""
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


def check_against(body, reference, inputs):
    """`body` on HALF inputs against `reference` in float64, values and every gradient, by `assert_no_worse`."""
    exact = outputs_and_gradients(reference, cast(inputs, torch.float64, "cpu"))
    same_dtype = outputs_and_gradients(reference, cast(inputs))
    got = outputs_and_gradients(body, cast(inputs))
    for mine, theirs, wanted in zip(got, same_dtype, exact, strict=True):
        assert_no_worse(mine, theirs, wanted)
    again = outputs_and_gradients(body, cast(inputs))
    assert all(torch.equal(one, two) for one, two in zip(got, again)), "two runs differ"
