"""The specification of masked attention: one sample at a time."""

import torch


def masked_attention_reference(q, k, v, offsets, prefix_k, prefix_v, prefix_offsets, causal, scale):
    """(S, A, E) as `masked_attention` describes it; float32 arithmetic, or float64 for float64."""
    bounds = offsets.tolist()
    prefix_bounds = None if prefix_offsets is None else prefix_offsets.tolist()
    outputs = [q[:0]]
    for b in range(len(bounds) - 1):
        own = slice(bounds[b], bounds[b + 1])
        keys, values, num_prefix = [], [], 0
        if prefix_k is not None:
            prefix = slice(prefix_bounds[b], prefix_bounds[b + 1])
            num_prefix = prefix.stop - prefix.start
            keys.append(prefix_k[prefix])
            values.append(prefix_v[prefix])
        if k is not None:
            keys.append(k[own])
            values.append(v[own])
        first_hidden = num_prefix + 1 if causal and k is not None else None
        outputs.append(_attend(q[own], torch.cat(keys), torch.cat(values), first_hidden, scale))
    return torch.cat([*outputs, torch.zeros_like(q[bounds[-1] :])])


def _attend(q_IAE, k_JGE, v_JGE, first_hidden, scale):
    """`first_hidden`: key that query 0 is the first not to see, and so on down the diagonal; None: all see all."""
    dtype = torch.promote_types(q_IAE.dtype, torch.float32)
    repeat = q_IAE.shape[1] // k_JGE.shape[1]
    k_JAE, v_JAE = (x.to(dtype).repeat_interleave(repeat, dim=1) for x in (k_JGE, v_JGE))
    scores_AIJ = torch.einsum("iae,jae->aij", q_IAE.to(dtype), k_JAE) * scale
    if first_hidden is not None:
        hidden_IJ = torch.ones(scores_AIJ.shape[1:], dtype=torch.bool, device=q_IAE.device).triu(
            first_hidden
        )
        scores_AIJ = scores_AIJ.masked_fill(hidden_IJ, float("-inf"))
    # Without keys J = 0: the sum over nothing is zero, and stays in the graph.
    return torch.einsum("aij,jae->iae", scores_AIJ.softmax(-1), v_JAE).to(q_IAE.dtype)
