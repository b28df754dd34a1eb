"""The loss of rectified flow: squared error of the predicted velocity (Algorithm 1, step 8)."""

from iomm.kernels import triton_support
from iomm.kernels.dispatch import pick, register
from iomm.kernels.velocity_loss.fused import velocity_loss_triton
from iomm.kernels.velocity_loss.reference import velocity_loss_reference

# The reference comes first until a GPU has timed the other one: torch.compile and PyTorch's own reductions serve it.
register("velocity_loss", "reference", velocity_loss_reference)
register("velocity_loss", "triton", velocity_loss_triton, devices=triton_support.DEVICES,
         dtypes=triton_support.DTYPES, why_not=triton_support.why_not, note=triton_support.NOTE)


def velocity_loss(velocity_BNK, target_BNK):
    """(mean squared error, the same per sample (B,)), unitless, at least float32; differentiable in the velocity.

    Raises ValueError unless both have one shape (B, N, K)."""
    if velocity_BNK.dim() != 3 or velocity_BNK.shape != target_BNK.shape:
        raise ValueError(f"velocity and target must be (B, N, K) alike, "
                         f"got {tuple(velocity_BNK.shape)} and {tuple(target_BNK.shape)}")
    return pick("velocity_loss", velocity_BNK.device, velocity_BNK.dtype)(velocity_BNK, target_BNK)
