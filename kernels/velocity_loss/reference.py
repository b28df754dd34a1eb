"""The specification of the velocity loss."""

import torch


def velocity_loss_reference(velocity_BNK, target_BNK):
    """(loss, loss_B) as `velocity_loss` describes them."""
    dtype = torch.promote_types(velocity_BNK.dtype, torch.float32)
    loss_B = (velocity_BNK.to(dtype) - target_BNK.to(dtype)).square().mean(dim=(1, 2))
    return loss_B.mean(), loss_B
