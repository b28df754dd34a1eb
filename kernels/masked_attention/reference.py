"""The specification of masked attention: one sample at a time."""

import torch


def masked_attention_reference(q, k, v, offsets, prefix_k, prefix_v, prefix_offsets, causal, scale):
    """(S, A, E) as `masked_attention` describes it; float32 arithmetic, or float64 for float64."""
    bounds = offsets.tolist()
    prefix_bounds = bounds if prefix_offsets is None else prefix_offsets.tolist()
    outputs = []
    for b in range(len(bounds) - 1):
        queries = slice(bounds[b], bounds[b + 1])
        prefix = slice(prefix_bounds[b], prefix_bounds[b + 1])
        keys = [x for x in (None if prefix_k is None else prefix_k[prefix], None if k is None else k[queries]) if x is not None]
        values = [x for x in (None if prefix_v is None else prefix_v[prefix], None if v is None else v[queries]) if x is not None]
        num_prefix = 0 if prefix_k is None else prefix.stop - prefix.start
        outputs.append(_attend(q[queries], torch.cat(keys), torch.cat(values), num_prefix, causal and k is not None, scale))
    return torch.cat(outputs) if outputs else q * 1


def _attend(q_IAE, k_JGE, v_JGE, num_prefix, causal, scale):
    dtype = torch.promote_types(q_IAE.dtype, torch.float32)
    repeat = q_IAE.shape[1] // k_JGE.shape[1]
    k_JAE, v_JAE = (x.to(dtype).repeat_interleave(repeat, dim=1) for x in (k_JGE, v_JGE))
    scores_AIJ = torch.einsum("iae,jae->aij", q_IAE.to(dtype), k_JAE) * scale
    if causal:
        hidden_IJ = torch.ones(scores_AIJ.shape[1:], dtype=torch.bool, device=q_IAE.device).triu(num_prefix + 1)
        scores_AIJ = scores_AIJ.masked_fill(hidden_IJ, float("-inf"))
    # Without keys J = 0: the sum over nothing is zero, and stays in the graph.
    return torch.einsum("aij,jae->iae", scores_AIJ.softmax(-1), v_JAE).to(q_IAE.dtype)
