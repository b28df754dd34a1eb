"""Test of a small generator with Triton backends against PyTorch's: losses and gradients."""

import torch
from kernel_checks import DEVICE, HALF, needs_triton

from iomm.config import GeneratorConfig
from iomm.flow import velocity_loss
from iomm.generator import new_generator

OPS = "norm_modulate", "qk_norm_rope"
CONFIG = GeneratorConfig(width=64, num_heads=2, num_blocks=2, token_dim=16, condition_dim=24)


def train(num_steps=3):
    """Return the losses of a few SGD steps and the gradients of the last step.

    The last layer and the gates start at zero, so most weights get their first nonzero gradient
    in the third step.
    """
    model = new_generator(CONFIG, 0).to(DEVICE, HALF)
    random = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(num_steps):
        shapes = (2, 9, 16), (2, 5, 24), (2, 9, 16)
        noisy, condition, target = (
            torch.randn(shape, generator=random).to(DEVICE, HALF) for shape in shapes
        )
        time = torch.rand(2, generator=random).to(DEVICE)
        loss, _ = velocity_loss(model(noisy, time, condition, (3, 3)), target)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        losses.append(loss.item())
    return losses, [parameter.grad for parameter in model.parameters()]


@needs_triton
def test_triton_training_matches_pytorch(monkeypatch):
    monkeypatch.setenv("IOMM_KERNELS", ",".join(f"{op}:torch" for op in OPS))
    losses, gradients = train()
    monkeypatch.setenv("IOMM_KERNELS", ",".join(f"{op}:triton" for op in OPS))
    triton_losses, triton_gradients = train()
    slack = 30 * torch.finfo(HALF).eps
    assert max(abs(a - b) for a, b in zip(triton_losses, losses, strict=True)) <= slack * losses[0]
    assert losses[0] != losses[-1]
    for actual, expected in zip(triton_gradients, gradients, strict=True):
        assert (actual - expected).abs().max() <= slack * max(g.abs().max() for g in gradients)
    again, _ = train()
    assert triton_losses == again
