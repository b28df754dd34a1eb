"""The Triton body as a custom op with its own backward; the gradient of x is the one that comes in."""

import torch

from iomm.kernels.triton_support import power_of_2, warps_for

ROWS_FORWARD, ROWS_BACKWARD = 4, 32    # rows of a program; 32 make the partial sums 1/16 of what is read


def gate_residual_triton(x_BLD, gate_BD, y_BLD):
    """(B, L, D) as `gate_residual` describes it."""
    gate_BD = gate_BD if gate_BD.stride(-1) == 1 else gate_BD.contiguous()
    return _forward(x_BLD.contiguous(), gate_BD, y_BLD.contiguous())


@torch.library.custom_op("iomm::gate_residual", mutates_args=(), device_types=("cpu", "cuda"))
def _forward(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    from iomm.kernels.gate_residual.kernels import forward_kernel
    num_samples, num_rows, width = x.shape
    out = torch.empty_like(x)
    if x.numel():
        forward_kernel[(-(-num_rows // ROWS_FORWARD), num_samples)](
            x, gate, y, out, num_rows, gate.stride(0), D=width, BLOCK=power_of_2(width), ROWS=ROWS_FORWARD,
            num_warps=warps_for(width))
    return out


@_forward.register_fake
def _(x, gate, y):
    return torch.empty_like(x)


@torch.library.custom_op("iomm::gate_residual_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _backward(grad: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and y."""
    from iomm.kernels.gate_residual.kernels import backward_kernel
    num_samples, num_rows, width = y.shape
    chunks = -(-num_rows // ROWS_BACKWARD)
    dy = torch.empty_like(y)
    sums = torch.empty(num_samples, chunks, width, dtype=torch.float32, device=y.device)
    if y.numel():
        backward_kernel[(chunks, num_samples)](
            grad, gate, y, dy, sums, num_rows, gate.stride(0), D=width, BLOCK=power_of_2(width), ROWS=ROWS_BACKWARD,
            num_warps=warps_for(width))
    return sums.sum(1).to(y.dtype), dy


@_backward.register_fake
def _(grad, gate, y):
    return y.new_empty(y.shape[0], y.shape[2]), torch.empty_like(y)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _differentiate(ctx, grad):
    return grad, *_backward(grad.contiguous(), *ctx.saved_tensors)


_forward.register_autograd(_differentiate, setup_context=_save)
