"""The Triton body as a custom op with its own backward. The error v - target is kept in the velocity's dtype.

The error and not the finished gradient is kept, as the factor 2 / (B N K) alone, 1e-6 at B = 32, would fall below
float16's smallest normal number."""

import torch

BLOCK, WARPS = 4096, 8


def velocity_loss_triton(velocity_BNK, target_BNK):
    """(loss, loss_B) as `velocity_loss` describes them; no gradient for the target: ValueError if it wants one."""
    if target_BNK.requires_grad:
        raise ValueError("velocity_loss:triton gives the target no gradient: detach it, or choose another body")
    loss_B, _ = _forward(velocity_BNK.contiguous(), target_BNK.contiguous())
    return loss_B.mean(), loss_B


@torch.library.custom_op("iomm::velocity_loss", mutates_args=(), device_types=("cpu", "cuda"))
def _forward(velocity: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss (B,) float32, error (B, N, K))."""
    from iomm.kernels.velocity_loss.kernels import forward_kernel
    num_values, error = velocity[0].numel() if len(velocity) else 0, torch.empty_like(velocity)
    chunks = -(-num_values // BLOCK)
    sums = torch.empty(len(velocity), chunks, dtype=torch.float32, device=velocity.device)
    if velocity.numel():
        forward_kernel[(chunks, len(velocity))](velocity, target, error, sums, num_values, BLOCK=BLOCK, num_warps=WARPS)
    return sums.sum(1) / num_values if num_values else sums.sum(1), error


@_forward.register_fake
def _(velocity, target):
    return velocity.new_empty(velocity.shape[0], dtype=torch.float32), torch.empty_like(velocity)


@torch.library.custom_op("iomm::velocity_loss_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _backward(grad_B: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    from iomm.kernels.velocity_loss.kernels import backward_kernel
    grad = torch.empty_like(error)
    if error.numel():
        num_values = error[0].numel()
        factor = grad_B.float() * (2 / num_values)
        backward_kernel[(-(-num_values // BLOCK), len(error))](
            error, factor, grad, num_values, BLOCK=BLOCK, num_warps=WARPS)
    return grad


@_backward.register_fake
def _(grad_B, error):
    return torch.empty_like(error)


def _save(ctx, inputs, output):
    ctx.save_for_backward(output[1])


def _differentiate(ctx, grad_B, _):
    return _backward(grad_B, *ctx.saved_tensors), None


_forward.register_autograd(_differentiate, setup_context=_save)
