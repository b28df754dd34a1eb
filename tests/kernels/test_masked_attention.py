"""Masked attention: every body against the specification, values and gradients, with everything empty that can be."""

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, HALF, cast, check_against, needs_triton

from iomm.kernels.masked_attention import masked_attention, varlen
from iomm.kernels.masked_attention import triton_op as fused
from iomm.kernels.masked_attention.reference import masked_attention_reference
from iomm.kernels.masked_attention.triton_op import masked_attention_triton

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
    return torch.randn(
        sum(lengths), heads, dim, generator=generator, dtype=torch.float64
    ).requires_grad_()


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs(lengths, prefix_lengths, heads=(4, 2), dim=8, suffix=True):
    generator = torch.Generator().manual_seed(0)
    q = packed(lengths, heads[0], dim, generator)
    k, v = (packed(lengths, heads[1], dim, generator) if suffix else None for _ in range(2))
    prefix = {}
    if prefix_lengths is not None:
        prefix = {
            "prefix_k": packed(prefix_lengths, heads[1], dim, generator),
            "prefix_v": packed(prefix_lengths, heads[1], dim, generator),
            "prefix_offsets": offsets_of(prefix_lengths),
        }
    return (q, k, v, offsets_of(lengths)), prefix


def leaves(arguments, prefix):
    return [
        x
        for x in (*arguments, *prefix.values())
        if x is not None and x.is_floating_point() and x.requires_grad
    ]


def value_and_gradients(arguments, prefix, **options):
    out = masked_attention(*arguments, **prefix, **options)
    weight = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(out.dtype)
    return [
        out,
        *torch.autograd.grad(
            (out * weight).sum(), leaves(arguments, prefix), materialize_grads=True
        ),
    ]


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


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("lengths", "prefix_lengths"), BATCHES)
def test_bfloat16_products_on_a_cpu_are_within_their_rounding(
    lengths, prefix_lengths, causal, monkeypatch
):
    """Scores below 4 rounded to 8 bits move a weight by 2^-6 of itself; as much again for all other roundings."""
    arguments, prefix = inputs(lengths, prefix_lengths)
    monkeypatch.setenv("IOMM_KERNELS", "masked_attention:sdpa")

    def rounded(x, dtype):
        return (
            x
            if x is None or not x.is_floating_point()
            else x.detach().bfloat16().to(dtype).requires_grad_()
        )

    found, wanted = (
        value_and_gradients(
            [rounded(x, dtype) for x in arguments],
            {name: rounded(x, dtype) for name, x in prefix.items()},
            causal=causal,
            scale=0.4,
        )
        for dtype in (torch.bfloat16, torch.float64)
    )
    for mine, exact in zip(found, wanted):
        assert mine.dtype == torch.bfloat16 and mine.isfinite().all()
        torch.testing.assert_close(
            mine.double(),
            exact,
            rtol=0,
            atol=2**-5 * max(1.0, exact.abs().max().item() if len(exact) else 0.0),
        )


def test_gradcheck_of_the_reference():
    (q, k, v, offsets), prefix = inputs([2, 0, 2], [1, 2, 0], heads=(2, 1), dim=2)
    *prefix_kv, prefix_offsets = prefix.values()
    for causal in (True, False):

        def run(q, k, v, prefix_k, prefix_v, causal=causal):
            return masked_attention_reference(
                q, k, v, offsets, prefix_k, prefix_v, prefix_offsets, causal, 0.5
            )

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
    wanted = (
        F.scaled_dot_product_attention(*dense, is_causal=True).transpose(1, 2).reshape(12, 2, 8)
    )
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
        ((q, k, v, offsets * 2), {}, "end at"),
        ((q, k, v, offsets[:-1]), prefix, "equally many samples"),
        ((q, k, v, offsets.flip(0)), {}, "start at 0"),
        ((q[0], k, v, offsets), {}, "S, A, E"),
    ]
    for arguments, options, message in bad:
        with pytest.raises(ValueError, match=message):
            masked_attention(*arguments, **options)


@pytest.mark.parametrize("causal", [True, False])
def test_rows_behind_the_last_sample_are_zeros(causal, monkeypatch):
    """A packed tensor of fixed capacity: NaN behind the last sample changes nothing and gets gradient 0."""
    arguments, prefix = inputs([5, 2, 3], [3, 0, 4])
    wanted = value_and_gradients(arguments, prefix, causal=causal)
    extra = torch.full((3, 4, 8), float("nan"), dtype=torch.float64)
    q, k, v = (
        torch.cat((x.detach(), extra[:, : x.shape[1]])).requires_grad_() for x in arguments[:3]
    )
    wide = dict(prefix)
    for name in ("prefix_k", "prefix_v"):
        wide[name] = torch.cat((prefix[name].detach(), extra[:2, :2])).requires_grad_()
    for body in ("sdpa", "reference"):
        monkeypatch.setenv("IOMM_KERNELS", f"masked_attention:{body}")
        out = masked_attention(q, k, v, arguments[3], **wide, causal=causal)
        weight = torch.randn(
            wanted[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
        gradients = torch.autograd.grad(
            (out[:10] * weight).sum() + out[10:].sum(), leaves((q, k, v), wide)
        )
        for mine, own in zip([out, *gradients], wanted):
            torch.testing.assert_close(mine[: len(own)], own, rtol=1e-12, atol=1e-12)
            assert not mine[len(own) :].any()


def attend_like_flash(q, k, v, offsets, key_offsets, max_queries, max_keys, causal, scale):
    """What FlashAttention's varlen kernels compute: the causal mask is aligned at the last key of a sample."""
    assert max_queries == offsets.diff().max() and max_keys == key_offsets.diff().max()
    out = []
    for b in range(len(offsets) - 1):
        queries, keys, values = (
            x[o[b] : o[b + 1]] for x, o in ((q, offsets), (k, key_offsets), (v, key_offsets))
        )
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (keys, values))
        scores = torch.einsum("iae,jae->aij", queries, keys) * scale
        if causal:
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(
                1 + len(keys) - len(queries)
            )
            scores = scores.masked_fill(hidden, float("-inf"))
        out.append(torch.einsum("aij,jae->iae", scores.softmax(-1), values))
    return torch.cat(out)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("lengths", "prefix_lengths"), BATCHES)
def test_keys_are_packed_as_the_varlen_libraries_want_them(lengths, prefix_lengths, causal):
    for suffix in [True] if prefix_lengths is None else [True, False]:
        arguments, prefix = inputs(lengths, prefix_lengths, suffix=suffix)
        segments = [prefix.get(name) for name in ("prefix_k", "prefix_v", "prefix_offsets")]
        out = varlen._run(attend_like_flash, *arguments, *segments, causal, 0.4)
        wanted = masked_attention_reference(*arguments, *segments, causal, 0.4)
        weight = torch.randn(
            out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
        some = leaves(arguments, prefix)
        gradients = [
            torch.autograd.grad((x * weight).sum(), some, materialize_grads=True)
            for x in (out, wanted)
        ]
        for mine, specified in zip((out, *gradients[0]), (wanted, *gradients[1])):
            torch.testing.assert_close(mine, specified, rtol=1e-12, atol=1e-12)


# Triton. Lengths around the tile sizes; (lengths, prefix lengths, heads, head dim).
TRITON_BATCHES = [
    ([1, 63, 64], None, (2, 2), 32),
    ([65, 0, 1], [64, 3, 0], (4, 2), 32),
    ([3, 0, 33], [65, 0, 33], (2, 1), 64),
    ([2, 9], [0, 0], (1, 1), 128),
    ([0, 0], [2, 0], (2, 1), 32),
]
LONG_BATCHES = [([1000, 1, 65], [63, 0, 1000], (2, 1), 64), ([64, 1000], None, (2, 2), 128)]


def run_triton(*tensors, causal):
    return masked_attention_triton(*tensors, causal, 0.3)


def check_triton(batch, causal, suffix):
    lengths, prefix_lengths, heads, dim = batch
    arguments, prefix = inputs(lengths, prefix_lengths, heads, dim, suffix)
    tensors = [
        *arguments,
        *(prefix.get(name) for name in ("prefix_k", "prefix_v", "prefix_offsets")),
    ]
    check_against(
        lambda *x: run_triton(*x, causal=causal),
        lambda *x: masked_attention_reference(*x, causal, 0.3),
        tensors,
    )


@needs_triton
@pytest.mark.parametrize("batch", TRITON_BATCHES)
def test_triton_values_and_every_gradient(batch):
    check_triton(batch, True, True)
    check_triton(batch, False, batch[1] is None)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("batch", LONG_BATCHES)
def test_triton_on_long_samples(batch):
    for causal in (True, False):
        check_triton(batch, causal, True)
    if batch[1] is not None:
        check_triton(batch, False, False)


@needs_triton
def test_triton_rows_behind_the_last_sample_are_zeros():
    arguments, prefix = inputs([5, 2], [3, 4], dim=32)

    def widened(x, rows):
        return torch.cat(
            (x.detach(), torch.full((rows, *x.shape[1:]), 7.0, dtype=x.dtype))
        ).requires_grad_()

    q, k, v = (widened(x, 70) for x in arguments[:3])
    prefix_k, prefix_v = (widened(prefix[name], 66) for name in ("prefix_k", "prefix_v"))
    tensors = [q, k, v, arguments[3], prefix_k, prefix_v, prefix["prefix_offsets"]]
    check_against(
        lambda *x: run_triton(*x, causal=True),
        lambda *x: masked_attention_reference(*x, True, 0.3),
        tensors,
    )
    q, *rest = cast(tensors)
    out = run_triton(q, *rest, causal=True)
    out.sum().backward()
    assert not out[7:].any() and not q.grad[7:].any() and not rest[3].grad[7:].any()


@needs_triton
def test_triton_leaves_a_prefix_without_gradient_alone(monkeypatch):
    arguments, prefix = inputs([3, 2], [4, 1], dim=32)
    tensors = cast([*arguments, *(x.detach() for x in prefix.values())])
    out = run_triton(*tensors, causal=True)
    asked, backward = [], fused._backward
    monkeypatch.setattr(fused, "_backward", lambda *x: asked.append(backward(*x)) or asked[-1])
    out.sum().backward()
    assert [x.numel() for x in asked[0][3:]] == [0, 0] and asked[0][1].numel() > 0
    assert tensors[4].grad is None and tensors[0].grad.any()


@needs_triton
def test_triton_op_is_registered_soundly():
    for with_prefix, with_suffix in ((True, True), (True, False), (False, True)):
        arguments, prefix = inputs([3, 2], [4, 1], dim=32, suffix=with_suffix)
        tensors = cast([*arguments, *(prefix.values() if with_prefix else (None, None, None))])
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        # The long one once.
        if with_prefix and with_suffix:
            tests.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(
            torch.ops.iomm.masked_attention.default, (*tensors, True, 0.3), test_utils=tests
        )


@needs_triton
def test_triton_compiles_as_one_graph(monkeypatch):
    monkeypatch.setenv("IOMM_KERNELS", "masked_attention:triton")
    arguments, prefix = inputs([3, 2], [4, 1], dim=32)
    q, k, v, offsets, prefix_k, prefix_v, prefix_offsets = cast([*arguments, *prefix.values()])

    def step(q, k, v, prefix_k, prefix_v):
        return masked_attention(
            q * 2,
            k,
            v,
            offsets,
            prefix_k=prefix_k,
            prefix_v=prefix_v,
            prefix_offsets=prefix_offsets,
        ).sin()

    out = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v, prefix_k, prefix_v)
    assert (
        torch.equal(out, step(q, k, v, prefix_k, prefix_v))
        and out.dtype == HALF
        and out.device.type == DEVICE
    )
    out.sum().backward()
    assert q.grad.isfinite().all() and prefix_k.grad.any()


@needs_triton
def test_triton_refuses_other_head_dims(monkeypatch):
    monkeypatch.setenv("IOMM_KERNELS", "masked_attention:triton")
    arguments, prefix = inputs([3, 2], None, dim=8)
    with pytest.raises(ValueError, match="head dims"):
        masked_attention(*cast(arguments), **prefix)
