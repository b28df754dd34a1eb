"""The user turns of a batch, packed on the host.

Which tokens a condition consists of depends on texts and masks, not on any weight. It is therefore
known before the device has computed anything, and the host never reads lengths from the device.
"""

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor


class TurnParts(NamedTuple):
    """The tensors of Turns, all int64.

    T: tokens of the batch, V: those that are image tokens, I: samples with an image.
    """

    # Sample numbers, (B,) or (0,) if they were not given.
    n_B: Tensor
    # Samples with an image.
    sample_I: Tensor
    # First token of each sample and the end of the last, (B + 1,).
    offsets: Tensor
    # Position id of the first token after each sample.
    end_B: Tensor
    # Token ids. 0 where an image token is.
    ids_T: Tensor
    # Position ids.
    positions_T: Tensor
    # Which of the T tokens are image tokens.
    row_V: Tensor
    # Which of the (I * P) image tokens these are.
    image_V: Tensor
    # 0 for image tokens that are multiplied by zero, else 1; (0,) if there are none of these.
    kept_V: Tensor


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Packed user turns of a batch: everything about its condition except embeddings.

    Attributes:
        lengths: number of tokens of each sample.
        end: the largest position id, plus 1.
        num_images: number of samples with an image, I.
        buffer: the tensors of `parts` one after the other, so that one copy moves all of them.
        sizes: their sizes.
        source: what drew the texts and masks, for comparison; None if they were given.
    """

    lengths: tuple[int, ...]
    end: int
    num_images: int
    buffer: Tensor
    sizes: tuple[int, ...]
    source: Any = None

    def parts(self) -> TurnParts:
        """Return the tensors, as views of the buffer."""
        return TurnParts(*self.buffer.split(self.sizes))

    def pinned(self) -> Self:
        """Return the turns in pinned memory, from which `to` copies without a wait."""
        return replace(self, buffer=self.buffer.pin_memory())

    def to(self, device: torch.device) -> Self:
        """Return the turns on a device. The copy is queued on the current stream."""
        return replace(self, buffer=self.buffer.to(device, non_blocking=True))


def pack_turns(
    before: list[list[int]],
    after: list[list[int]],
    has_image: list[bool],
    num_image_tokens: int,
    visible_IP: np.ndarray | None = None,
    *,
    mode: str = "drop",
    positions: str = "original",
    n_B: Tensor | None = None,
    source: Any = None,
) -> Turns:
    """Pack B turns [before, visible image tokens, after].

    Args:
        before: token ids before the image (all of them, without one).
        after: token ids after it.
        has_image: B bools.
        num_image_tokens: P.
        visible_IP: bool mask of the image tokens. None: all are visible.
        mode: "drop" leaves hidden tokens out; "zero" marks them in `kept_V`.
        positions: "original" position ids have gaps where tokens were dropped; "compact" ids
            have none.
        n_B: sample numbers, carried along.
        source: see Turns.
    """
    ids, positions_T, rows, image_rows = [], [], [], []
    lengths, ends, start, image = [], [], 0, 0
    every_token = np.arange(num_image_tokens)
    drop = visible_IP is not None and mode == "drop"
    for first, last, shown in zip(before, after, has_image, strict=True):
        kept = every_token if shown else every_token[:0]
        if shown and drop:
            kept = np.flatnonzero(visible_IP[image])
        length = len(first) + len(kept) + len(last)
        ids += [first, np.zeros(len(kept), dtype=np.int64), last]
        if drop and positions == "compact":
            positions_T.append(np.arange(length))
            ends.append(length)
        else:
            end = len(first) + num_image_tokens * shown + len(last)
            positions_T += [
                np.arange(len(first)),
                len(first) + kept,
                np.arange(end - len(last), end),
            ]
            ends.append(end)
        rows.append(start + len(first) + np.arange(len(kept)))
        image_rows.append(image * num_image_tokens + kept)
        lengths.append(length)
        start += length
        image += shown
    kept_V = np.zeros(0)
    if visible_IP is not None and mode == "zero":
        kept_V = visible_IP.reshape(-1)
    parts = (
        np.zeros(0) if n_B is None else n_B.numpy(),
        np.flatnonzero(has_image),
        np.array([0, *accumulate(lengths)]),
        np.array(ends),
        np.concatenate(ids),
        np.concatenate(positions_T),
        np.concatenate(rows),
        np.concatenate(image_rows),
        kept_V,
    )
    return Turns(
        lengths=tuple(lengths),
        end=max(ends),
        num_images=image,
        buffer=torch.from_numpy(np.concatenate([part.astype(np.int64) for part in parts])),
        sizes=tuple(map(len, parts)),
        source=source,
    )
