"""Masked attention: every body against the specification, values and gradients, with everything empty that can be."""

import pytest
import torch
import torch.nn.functional as F

from iomm.kernels.masked_attention import masked_attention
from iomm.kernels.masked_attention.reference import masked_attention_reference

pytestmark = pytest.mark.usefixtures("poison")

# lengths of the samples, lengths of their prefixes (None: no prefix)
BATCHES = [
    ([5], [3]),
    ([4, 4], None),
    ([4, 4], [3, 3]),
    ([4, 4, 4], [0, 0, 0]),
    ([1, 7, 2], [4, 0, 9]),
    ([3, 0, 5, 1], [2, 6, 0, 0]),
    ([0, 0], [2, 0]),
    ([6, 2, 0, 3, 65], None),
    ([6, 2, 0, 3, 1], [1, 0, 0, 64, 2]),
    ([], []),
]


def packed(lengths, heads, dim, generator):
    return torch.randn(sum(lengths), heads, dim, generator=generator, dtype=torch.float64).requires_grad_()


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs(lengths, prefix_lengths, heads=(4, 2), dim=8, suffix=True):
    generator = torch.Generator().manual_seed(0)
    q = packed(lengths, heads[0], dim, generator)
    k, v = (packed(lengths, heads[1], dim, generator) if suffix else None for _ in range(2))
    prefix = {}
    if prefix_lengths is not None:
        prefix = {"prefix_k": packed(prefix_lengths, heads[1], dim, generator),
                  "prefix_v": packed(prefix_lengths, heads[1], dim, generator),
                  "prefix_offsets": offsets_of(prefix_lengths)}
    return (q, k, v, offsets_of(lengths)), prefix


def leaves(arguments, prefix):
    return [x for x in (*arguments, *prefix.values()) if x is not None and x.is_floating_point() and x.requires_grad]


def value_and_gradients(arguments, prefix, **options):
    out = masked_attention(*arguments, **prefix, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out, *torch.autograd.grad((out * weight).sum(), leaves(arguments, prefix), materialize_grads=True)]


def sample_of(offsets):
    return torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff().long())


def literal(arguments, prefix, causal, scale):
    """The mask law spelled out as one dense mask over all queries and keys of the batch."""
    q, k, v, offsets = arguments
    owner, place = sample_of(offsets), torch.arange(len(q))
    keys, values, masks = [], [], []
    if prefix:
        keys.append(prefix["prefix_k"])
        values.append(prefix["prefix_v"])
        masks.append(owner[:, None] == sample_of(prefix["prefix_offsets"]))
    if k is not None:
        keys.append(k)
        values.append(v)
        masks.append((owner[:, None] == owner) & ((place[:, None] >= place) | (not causal)))
    k, v, visible = torch.cat(keys), torch.cat(values), torch.cat(masks, 1)
    repeat = q.shape[1] // k.shape[1]
    scores = torch.einsum("iae,jae->aij", q, k.repeat_interleave(repeat, 1)) * scale
    weights = torch.where(visible, scores, -1e30).softmax(-1) * visible if len(k) else scores
    return torch.einsum("aij,jae->iae", weights, v.repeat_interleave(repeat, 1))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("lengths", "prefix_lengths"), BATCHES)
def test_bodies_agree_in_float64(lengths, prefix_lengths, heads, causal, monkeypatch):
    for suffix in [True] if prefix_lengths is None else [True, False]:
        arguments, prefix = inputs(lengths, prefix_lengths, heads, suffix=suffix)
        results = {}
        for body in ("sdpa", "reference"):
            monkeypatch.setenv("IOMM_KERNELS", f"masked_attention:{body}")
            results[body] = value_and_gradients(arguments, prefix, causal=causal, scale=0.4)
        for mine, specified in zip(results["sdpa"], results["reference"]):
            assert mine.isfinite().all()
            torch.testing.assert_close(mine, specified, rtol=1e-12, atol=1e-12)
        by_mask = literal(arguments, prefix, causal, 0.4)
        torch.testing.assert_close(results["reference"][0], by_mask, rtol=1e-12, atol=1e-12)


def test_gradcheck_of_the_reference():
    (q, k, v, offsets), prefix = inputs([2, 0, 2], [1, 2, 0], heads=(2, 1), dim=2)
    *prefix_kv, prefix_offsets = prefix.values()
    for causal in (True, False):
        def run(q, k, v, prefix_k, prefix_v, causal=causal):
            return masked_attention_reference(q, k, v, offsets, prefix_k, prefix_v, prefix_offsets, causal, 0.5)
        assert torch.autograd.gradcheck(run, (q, k, v, *prefix_kv))


def test_queries_without_keys_give_zeros():
    arguments, prefix = inputs([3, 2, 4], [2, 0, 5], suffix=False)
    out, *gradients = value_and_gradients(arguments, prefix)
    assert out[3:5].abs().max() == 0 and out[:3].abs().min() > 0
    assert gradients[0][3:5].abs().max() == 0
    arguments, prefix = inputs([3, 2], [0, 0], suffix=False)
    assert value_and_gradients(arguments, prefix)[0].abs().max() == 0


def test_a_sample_does_not_depend_on_the_others():
    arguments, prefix = inputs([3, 5, 2], [4, 0, 6])
    whole = masked_attention(*arguments, **prefix)
    q, k, v, _ = (x[3:8] for x in arguments)
    alone = masked_attention(q, k, v, offsets_of([5]))
    torch.testing.assert_close(whole[3:8], alone, rtol=1e-12, atol=1e-12)


def test_prefix_without_gradient_gets_none():
    arguments, prefix = inputs([3, 2], [4, 1])
    for name in ("prefix_k", "prefix_v"):
        prefix[name] = prefix[name].detach()
    masked_attention(*arguments, **prefix).sum().backward()
    assert prefix["prefix_k"].grad is None and arguments[0].grad.abs().max() > 0


def test_other_offsets_in_the_same_tensor_are_seen():
    (q, k, v, offsets), _ = inputs([4, 4], None)
    first = masked_attention(q, k, v, offsets)
    offsets[1] = 2
    second = masked_attention(q, k, v, offsets)
    torch.testing.assert_close(second, masked_attention(q, k, v, offsets.clone()), rtol=0, atol=0)
    assert (first - second).abs().max() > 0


def test_regular_batch_is_plain_attention():
    (q, k, v, offsets), _ = inputs([6, 6], None, heads=(2, 2))
    dense = [x.view(2, 6, 2, 8).transpose(1, 2) for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*dense, is_causal=True).transpose(1, 2).reshape(12, 2, 8)
    torch.testing.assert_close(masked_attention(q, k, v, offsets), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_no_worse_than_the_specification(dtype):
    arguments, prefix = inputs([40, 3, 70], [10, 0, 50], dim=64)
    exact = masked_attention_reference(*arguments, *prefix.values(), True, 0.125)
    low = [x.to(dtype) if x.is_floating_point() else x for x in (*arguments, *prefix.values())]
    got = masked_attention(*low[:4], **dict(zip(prefix, low[4:])))
    same_dtype = masked_attention_reference(*low, True, 0.125)
    ulp = torch.finfo(dtype).eps * exact.abs().max()
    budget = 2 * (same_dtype.double() - exact).abs().max() + ulp
    assert got.dtype == dtype and (got.double() - exact).abs().max() <= budget


def test_bad_input_is_a_value_error():
    (q, k, v, offsets), prefix = inputs([3, 2], [4, 1])
    bad = [
        ((q, k, None, offsets), {}, "go together"),
        ((q, None, None, offsets), {}, "nothing to attend"),
        ((q, k, v, offsets), {"prefix_k": k}, "go together"),
        ((q, k[:4], v[:4], offsets), {}, "as many as"),
        ((q, k, v[..., :4], offsets), {}, "alike"),
        ((q[:, :3], k, v, offsets), {}, "multiple"),
        ((q, k.float(), v.float(), offsets), {}, "share dtype"),
        ((q, k, v, offsets.long()), {}, "int32"),
        ((q, k, v, offsets[:-1]), {}, "end at"),
        ((q, k, v, offsets[:-1]), prefix, "equally many samples"),
        ((q, k, v, offsets.flip(0)), {}, "start at 0"),
        ((q[0], k, v, offsets), {}, "S, A, E"),
    ]
    for arguments, options, message in bad:
        with pytest.raises(ValueError, match=message):
            masked_attention(*arguments, **options)
