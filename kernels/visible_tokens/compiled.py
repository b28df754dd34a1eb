"""The C++ and CUDA bodies: one custom op, the library is chosen by the device."""

import math

import torch

from iomm.kernels import native


def visible_tokens_compiled(seed, n_B, num_tokens, ratio, fixed, capacity):
    """(index, offsets, position, overflow) as `visible_tokens_packed` describes them; capacity None: as many as there
    are, which the host waits for."""
    if capacity is not None:
        return _packed(seed, n_B, num_tokens, ratio, fixed, capacity)
    return (*_counted(seed, n_B, num_tokens, ratio, fixed), None)


@torch.library.custom_op("iomm::visible_tokens_packed", mutates_args=(), device_types=("cpu", "cuda"))
def _packed(
    seed: int, n_B: torch.Tensor, num_tokens: int, ratio: float, fixed: bool, capacity: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    num_samples, device = len(n_B), n_B.device
    num_visible = round((1 - ratio) * num_tokens) if fixed else -1
    # u = k * 2^-24 lies below the ratio exactly where k < ceil(ratio * 2^24): no rounding decides about a token.
    threshold = math.ceil(ratio * 2**24)
    index = torch.empty(capacity, dtype=torch.int64, device=device)
    position = torch.empty(capacity, dtype=torch.int64, device=device)
    offsets = torch.empty(num_samples + 1, dtype=torch.int32, device=device)
    overflow = torch.empty(1, dtype=torch.int64, device=device)
    native.launch(device, "iomm_visible_tokens", seed, n_B, num_samples, num_tokens, threshold, num_visible, capacity,
                  index, offsets, position, overflow)
    return index, offsets, position, overflow


@_packed.register_fake
def _(seed, n_B, num_tokens, ratio, fixed, capacity):
    index = n_B.new_empty(capacity)
    return index, n_B.new_empty(n_B.shape[0] + 1, dtype=torch.int32), torch.empty_like(index), n_B.new_empty(1)


@torch.library.custom_op("iomm::visible_tokens", mutates_args=(), device_types=("cpu", "cuda"))
def _counted(
    seed: int, n_B: torch.Tensor, num_tokens: int, ratio: float, fixed: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index, offsets, position, _ = _packed(seed, n_B, num_tokens, ratio, fixed, len(n_B) * num_tokens)
    total = int(offsets[-1])
    # Copies, so that the B * P buffers are not kept alive by a tenth of them.
    return index[:total].clone(), offsets, position[:total].clone()


@_counted.register_fake
def _(seed, n_B, num_tokens, ratio, fixed):
    total = torch.library.get_ctx().new_dynamic_size()
    index = n_B.new_empty(total)
    return index, n_B.new_empty(n_B.shape[0] + 1, dtype=torch.int32), torch.empty_like(index)
