"""The specification of masked attention, computed one sample at a time."""

import torch
from torch import Tensor

from iomm.kernels.masked_attention.packing import Lengths


def masked_attention_reference(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    offsets: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    prefix_offsets: Tensor | None,
    causal: bool,
    scale: float,
    lengths: Lengths = None,
    prefix_lengths: Lengths = None,
) -> Tensor:
    """Return (S, A, E) as defined by `masked_attention`.

    Arithmetic is float32 (float64 for float64 inputs). The offsets alone say where samples begin.
    """
    bounds = offsets.tolist()
    prefix_bounds = None if prefix_offsets is None else prefix_offsets.tolist()
    outputs = [q[:0]]
    for b in range(len(bounds) - 1):
        rows = slice(bounds[b], bounds[b + 1])
        keys, values, num_prefix = [], [], 0
        if prefix_k is not None:
            prefix = slice(prefix_bounds[b], prefix_bounds[b + 1])
            num_prefix = prefix.stop - prefix.start
            keys.append(prefix_k[prefix])
            values.append(prefix_v[prefix])
        if k is not None:
            keys.append(k[rows])
            values.append(v[rows])
        first_hidden = num_prefix + 1 if causal and k is not None else None
        outputs.append(_attend(q[rows], torch.cat(keys), torch.cat(values), first_hidden, scale))
    return torch.cat([*outputs, torch.zeros_like(q[bounds[-1] :])])


def _attend(
    q_IAE: Tensor, k_JGE: Tensor, v_JGE: Tensor, first_hidden: int | None, scale: float
) -> Tensor:
    """Return the attention (I, A, E) of one sample.

    Query i sees the keys before `first_hidden` + i. With None every query sees every key.
    """
    dtype = torch.promote_types(q_IAE.dtype, torch.float32)
    repeat = q_IAE.shape[1] // k_JGE.shape[1]
    k_JAE, v_JAE = (x.to(dtype).repeat_interleave(repeat, dim=1) for x in (k_JGE, v_JGE))
    scores_AIJ = torch.einsum("iae,jae->aij", q_IAE.to(dtype), k_JAE) * scale
    if first_hidden is not None:
        hidden_IJ = torch.ones(scores_AIJ.shape[1:], dtype=torch.bool, device=q_IAE.device).triu(
            first_hidden
        )
        scores_AIJ = scores_AIJ.masked_fill(hidden_IJ, float("-inf"))
    # Without keys (J = 0) the empty sum is zero and stays in the graph.
    return torch.einsum("aij,jae->iae", scores_AIJ.softmax(-1), v_JAE).to(q_IAE.dtype)
