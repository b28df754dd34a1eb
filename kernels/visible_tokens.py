"""Packed indices of the image tokens that the MLLM sees, by a mask drawn per sample.

The mask of Algorithm 1 (step 4) is drawn only here. `visible_tokens` counts the visible tokens
first and returns exactly that number of rows. `visible_tokens_packed` returns a fixed number of
rows and never synchronises with the GPU.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from iomm.kernels import native
from iomm.kernels.dispatch import pick, register
from iomm.kernels.philox import MASK, checked_seed, philox_reference


class PackedTokens(NamedTuple):
    """Visible tokens of a batch; see `visible_tokens_packed`."""

    index: Tensor
    offsets: Tensor
    position: Tensor
    overflow: Tensor | None


def _checked(seed: int, n_B: Tensor, num_tokens: int, ratio: float, count: str) -> int:
    """Validate the arguments and return the seed as a signed 64-bit int."""
    seed = checked_seed(seed, n_B)
    if not 1 <= num_tokens < 2**31 or len(n_B) * num_tokens >= 2**31:
        raise ValueError(
            f"num_tokens must be at least 1 and B * num_tokens below 2^31, "
            f"got {num_tokens} with B = {len(n_B)}"
        )
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio must be between 0 and 1, got {ratio}")
    if count not in ("bernoulli", "fixed"):
        raise ValueError(f"count must be 'bernoulli' or 'fixed', got {count!r}")
    return seed


def visible_tokens(
    seed: int, n_B: Tensor, num_tokens: int, ratio: float, count: str = "bernoulli"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (index_V, offsets, position_V) of the visible tokens, packed in ascending order.

    V depends on the draw, so on a GPU the host waits for it. `visible_tokens_packed` does not wait.

    Args:
        seed: Seed in [0, 2^64).
        n_B: Sample numbers, int64. The result is on the same device.
        num_tokens: Tokens per sample, P.
        ratio: Share of tokens that are hidden, in [0, 1].
        count: "bernoulli" hides token i where uniform(seed, MASK, n)[i] < ratio. "fixed" keeps
            exactly round((1 - ratio) * P) tokens (half to even), namely the ones with the largest
            uniforms. Ties go to the lower index.

    Returns:
        index_V (int64) points into the flattened (B * P) tokens. position_V (int64) is the
        position within the image, in [0, P). Entries offsets[b] .. offsets[b + 1] of both belong
        to sample b, with offsets int32 (B + 1,).

    Raises:
        ValueError: An argument is out of range or has a wrong shape or dtype.
    """
    seed = _checked(seed, n_B, num_tokens, ratio, count)
    run = pick("visible_tokens", n_B.device)
    tokens = run(seed, n_B.contiguous(), num_tokens, float(ratio), count == "fixed", None)
    return tokens.index, tokens.offsets, tokens.position


def packed_capacity(
    num_samples: int, num_tokens: int, ratio: float, count: str = "bernoulli"
) -> int:
    """Return the number of slots to reserve for the visible tokens of a batch.

    For "fixed" this is the exact number. For "bernoulli" it is the mean plus six standard
    deviations, which a draw exceeds about once in 10^9 batches. With B 32, P 256 and ratio 0.85
    it is 1229 + 6 * 32.3 = 1423 of 8192.

    Args:
        num_samples: Samples per batch, B.
        num_tokens: Tokens per sample, P.
        ratio: Share of tokens that are hidden, in [0, 1].
        count: "bernoulli" or "fixed", as in `visible_tokens`.
    """
    if count == "fixed":
        return num_samples * round((1 - ratio) * num_tokens)
    total = num_samples * num_tokens
    return min(total, math.ceil(total * (1 - ratio) + 6 * math.sqrt(total * ratio * (1 - ratio))))


def visible_tokens_packed(
    seed: int,
    n_B: Tensor,
    num_tokens: int,
    ratio: float,
    count: str = "bernoulli",
    capacity: int | None = None,
) -> PackedTokens:
    """Return `visible_tokens` in tensors of fixed size, without synchronising with the GPU.

    A model gathers tokens.flatten(0, 1)[index], runs all `capacity` rows (shapes never change, so
    nothing recompiles and CUDA graphs stay valid) and passes offsets to `masked_attention`, which
    returns zeros and no gradient for the rows after the last sample.

    Args:
        seed: Seed in [0, 2^64).
        n_B: Sample numbers, int64. The result is on the same device.
        num_tokens: Tokens per sample, P.
        ratio: Share of tokens that are hidden, in [0, 1].
        count: "bernoulli" or "fixed", as in `visible_tokens`.
        capacity: Slots for visible tokens. The default is `packed_capacity`.

    Returns:
        index and position (capacity,), offsets (B + 1,) and overflow (1,) int64. Slots from
        offsets[B] on are 0 and belong to no sample. overflow counts the visible tokens that did
        not fit. They are the last ones of the batch and stay hidden, so their samples have fewer
        tokens in offsets. The caller should accumulate and report overflow. Otherwise tokens are
        lost silently.

    Raises:
        ValueError: An argument is out of range or has a wrong shape or dtype.
    """
    seed = _checked(seed, n_B, num_tokens, ratio, count)
    capacity = packed_capacity(len(n_B), num_tokens, ratio, count) if capacity is None else capacity
    if not 0 <= capacity <= len(n_B) * num_tokens:
        raise ValueError(
            f"capacity must be between 0 and B * P, got {capacity} for {len(n_B)} * {num_tokens}"
        )
    run = pick("visible_tokens", n_B.device)
    return run(seed, n_B.contiguous(), num_tokens, float(ratio), count == "fixed", capacity)


def visible_tokens_reference(
    seed: int, n_B: Tensor, num_tokens: int, ratio: float, fixed: bool, capacity: int | None
) -> PackedTokens:
    """Return the tokens as defined by `visible_tokens_packed`.

    Args:
        seed: Seed as a signed or unsigned 64-bit int.
        n_B: Sample numbers, int64.
        num_tokens: Tokens per sample, P.
        ratio: Share of tokens that are hidden, in [0, 1].
        fixed: True for count "fixed", False for "bernoulli".
        capacity: Slots for visible tokens. None returns exactly the visible tokens, with overflow
            None.
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
        return PackedTokens(index_V, offsets, index_V % num_tokens, None)
    overflow = (offsets[-1:] - capacity).clamp(min=0).long()
    packed = index_V.new_zeros(capacity)
    packed[: len(index_V)] = index_V[:capacity]
    return PackedTokens(packed, offsets.clamp(max=capacity), packed % num_tokens, overflow)


def visible_tokens_compiled(
    seed: int, n_B: Tensor, num_tokens: int, ratio: float, fixed: bool, capacity: int | None
) -> PackedTokens:
    """Return the tokens from the C++ or CUDA library, chosen by the device.

    Args:
        seed: Seed as a signed 64-bit int.
        n_B: Sample numbers, int64.
        num_tokens: Tokens per sample, P.
        ratio: Share of tokens that are hidden, in [0, 1].
        fixed: True for count "fixed", False for "bernoulli".
        capacity: Slots for visible tokens. None returns exactly the visible tokens, whose number
            the host waits for.
    """
    if capacity is not None:
        return PackedTokens(*_packed(seed, n_B, num_tokens, ratio, fixed, capacity))
    return PackedTokens(*_counted(seed, n_B, num_tokens, ratio, fixed), None)


@torch.library.custom_op(
    "iomm::visible_tokens_packed", mutates_args=(), device_types=("cpu", "cuda")
)
def _packed(
    seed: int, n_B: Tensor, num_tokens: int, ratio: float, fixed: bool, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_samples, device = len(n_B), n_B.device
    num_visible = round((1 - ratio) * num_tokens) if fixed else -1
    # u = k * 2^-24 is below the ratio exactly if k < ceil(ratio * 2^24), so rounding never
    # affects the mask.
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
def _(
    seed: int, n_B: Tensor, num_tokens: int, ratio: float, fixed: bool, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index = n_B.new_empty(capacity)
    return (
        index,
        n_B.new_empty(n_B.shape[0] + 1, dtype=torch.int32),
        torch.empty_like(index),
        n_B.new_empty(1),
    )


@torch.library.custom_op("iomm::visible_tokens", mutates_args=(), device_types=("cpu", "cuda"))
def _counted(
    seed: int, n_B: Tensor, num_tokens: int, ratio: float, fixed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    index, offsets, position, _ = _packed(
        seed, n_B, num_tokens, ratio, fixed, len(n_B) * num_tokens
    )
    total = int(offsets[-1])
    # Views would keep the B * P buffers alive for about a tenth of their rows, so the rows are
    # copied.
    return index[:total].clone(), offsets, position[:total].clone()


@_counted.register_fake
def _(
    seed: int, n_B: Tensor, num_tokens: int, ratio: float, fixed: bool
) -> tuple[Tensor, Tensor, Tensor]:
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
