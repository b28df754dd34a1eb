"""The image tokens that the MLLM sees: a mask drawn per sample, as packed indices.

This is the only place where the mask of Algorithm 1 (step 4) is drawn. `visible_tokens` counts first and returns as many
rows as there are; `visible_tokens_packed` returns a fixed number of them and never waits.
"""

import math

import torch

from iomm.kernels import native
from iomm.kernels.dispatch import pick, register
from iomm.kernels.philox import MASK, checked_seed, philox_reference


def _checked(seed, n_B, num_tokens, ratio, count):
    """The seed as signed 64-bit int. Raises ValueError on bad input."""
    seed = checked_seed(seed, n_B)
    if not 1 <= num_tokens < 2**31 or len(n_B) * num_tokens >= 2**31:
        raise ValueError(
            f"num_tokens must be at least 1, and B times it below 2^31, got {num_tokens} and B {len(n_B)}"
        )
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio must be between 0 and 1, got {ratio}")
    if count not in ("bernoulli", "fixed"):
        raise ValueError(f"count must be bernoulli or fixed, got {count!r}")
    return seed


def visible_tokens(seed, n_B, num_tokens, ratio, count="bernoulli"):
    """(index_V, offsets, position_V): the visible of P = `num_tokens` tokens per sample, packed, in ascending order.

    n_B (B,) int64: the samples' numbers; the result lives on its device. ratio in [0, 1]: the share that is hidden.
    count "bernoulli": token i is hidden where uniform(seed, MASK, n)[i] < ratio. "fixed": exactly
    round((1 - ratio) * P) stay (half to even), those with the largest uniforms (of equal ones the lower index).

    index_V int64 points into the flattened (B * P) tokens, position_V int64 in [0, P) is the place within the image,
    and sample b owns offsets[b] .. offsets[b + 1] of both (offsets int32, (B + 1,)). V depends on the draw, so on a
    GPU the host waits for it; `visible_tokens_packed` does not. Raises ValueError on bad input.
    """
    seed = _checked(seed, n_B, num_tokens, ratio, count)
    run = pick("visible_tokens", n_B.device)
    return run(seed, n_B.contiguous(), num_tokens, float(ratio), count == "fixed", None)[:3]


def packed_capacity(num_samples, num_tokens, ratio, count="bernoulli"):
    """Slots for the visible tokens of a batch: all of them if fixed, else their mean and six standard deviations.

    A draw exceeds that about once in 10^9 batches. At B 32, P 256, ratio 0.85: 1229 + 6 * 32.3 = 1423 of 8192.
    """
    if count == "fixed":
        return num_samples * round((1 - ratio) * num_tokens)
    total = num_samples * num_tokens
    return min(total, math.ceil(total * (1 - ratio) + 6 * math.sqrt(total * ratio * (1 - ratio))))


def visible_tokens_packed(seed, n_B, num_tokens, ratio, count="bernoulli", capacity=None):
    """(index, offsets, position, overflow): `visible_tokens` in tensors of a fixed size, made without asking the GPU.

    index and position have `capacity` slots (default `packed_capacity`). Those behind offsets[B] are 0 and belong to no
    sample. overflow (1,) int64 counts visible tokens that found no slot: the last ones of the batch, which stay hidden
    (their samples see fewer tokens; offsets say so). It is for the caller to add up and report, so nothing is lost
    silently.

    A model gathers tokens.flatten(0, 1)[index], runs all `capacity` rows (shapes never change, so nothing recompiles
    and CUDA graphs hold) and hands offsets to `masked_attention`, which gives rows behind the last sample zeros and no
    gradient. Raises ValueError on bad input.
    """
    seed = _checked(seed, n_B, num_tokens, ratio, count)
    capacity = packed_capacity(len(n_B), num_tokens, ratio, count) if capacity is None else capacity
    if not 0 <= capacity <= len(n_B) * num_tokens:
        raise ValueError(
            f"capacity must be between 0 and B times P, got {capacity} for {len(n_B)} times {num_tokens}"
        )
    run = pick("visible_tokens", n_B.device)
    return run(seed, n_B.contiguous(), num_tokens, float(ratio), count == "fixed", capacity)


def visible_tokens_reference(seed, n_B, num_tokens, ratio, fixed, capacity):
    """(index, offsets, position, overflow) as `visible_tokens_packed` describes them; capacity None: as many as there
    are, and overflow None.
    """
    draw = philox_reference("uniform", seed, MASK, n_B, num_tokens).double()
    if fixed:
        best = draw.sort(dim=1, descending=True, stable=True).indices[
            :, : round((1 - ratio) * num_tokens)
        ]
        visible = torch.zeros_like(draw, dtype=torch.bool).scatter_(1, best, True)
    else:
        visible = draw >= ratio
    index_V = visible.flatten().nonzero().squeeze(1)
    offsets = torch.zeros(len(n_B) + 1, dtype=torch.int32, device=n_B.device)
    offsets[1:] = visible.sum(1).cumsum(0)
    if capacity is None:
        return index_V, offsets, index_V % num_tokens, None
    overflow = (offsets[-1:] - capacity).clamp(min=0).long()
    packed = index_V.new_zeros(capacity)
    packed[: len(index_V)] = index_V[:capacity]
    return packed, offsets.clamp(max=capacity), packed % num_tokens, overflow


def visible_tokens_compiled(seed, n_B, num_tokens, ratio, fixed, capacity):
    """(index, offsets, position, overflow) as `visible_tokens_packed` describes them; capacity None: as many as there
    are, which the host waits for.
    """
    if capacity is not None:
        return _packed(seed, n_B, num_tokens, ratio, fixed, capacity)
    return (*_counted(seed, n_B, num_tokens, ratio, fixed), None)


@torch.library.custom_op(
    "iomm::visible_tokens_packed", mutates_args=(), device_types=("cpu", "cuda")
)
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
    native.launch(
        device,
        "iomm_visible_tokens",
        seed,
        n_B,
        num_samples,
        num_tokens,
        threshold,
        num_visible,
        capacity,
        index,
        offsets,
        position,
        overflow,
    )
    return index, offsets, position, overflow


@_packed.register_fake
def _(seed, n_B, num_tokens, ratio, fixed, capacity):
    index = n_B.new_empty(capacity)
    return (
        index,
        n_B.new_empty(n_B.shape[0] + 1, dtype=torch.int32),
        torch.empty_like(index),
        n_B.new_empty(1),
    )


@torch.library.custom_op("iomm::visible_tokens", mutates_args=(), device_types=("cpu", "cuda"))
def _counted(
    seed: int, n_B: torch.Tensor, num_tokens: int, ratio: float, fixed: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index, offsets, position, _ = _packed(
        seed, n_B, num_tokens, ratio, fixed, len(n_B) * num_tokens
    )
    total = int(offsets[-1])
    # Copies, so that the B * P buffers are not kept alive by a tenth of them.
    return index[:total].clone(), offsets, position[:total].clone()


@_counted.register_fake
def _(seed, n_B, num_tokens, ratio, fixed):
    total = torch.library.get_ctx().new_dynamic_size()
    index = n_B.new_empty(total)
    return index, n_B.new_empty(n_B.shape[0] + 1, dtype=torch.int32), torch.empty_like(index)


register(
    "visible_tokens",
    "cpp",
    visible_tokens_compiled,
    devices=("cpu",),
    why_not=lambda: native.why_not("cpu"),
)
register(
    "visible_tokens",
    "cuda",
    visible_tokens_compiled,
    devices=("cuda",),
    why_not=lambda: native.why_not("cuda"),
)
register("visible_tokens", "reference", visible_tokens_reference)
