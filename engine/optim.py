"""The optimizer and its learning rate."""

import torch


def make_optimizer(parameters, config):
    """AdamW over the flat fp32 shards. Fused: under ZeRO-3 a rank holds one flat tensor a sub-group."""
    return torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, eps=config.eps,
                             weight_decay=config.weight_decay, fused=True)


def learning_rate(step, config):
    """Rate of step 0, 1, ...: linear warm-up over warmup_steps, then constant."""
    return config.lr * min(1.0, (step + 1) / (config.warmup_steps + 1))
