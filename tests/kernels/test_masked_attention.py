"""Tests of masked attention: backends against the specification, also with empty inputs."""

import pytest
import torch
import torch.nn.functional as F
from counted_ops import counted
from kernel_checks import DEVICE, HALF, cast, check_against, needs_triton
from torch._dynamo.testing import CompileCounter

from iomm.kernels import dispatch
from iomm.kernels.masked_attention import masked_attention, plan, sdpa, varlen
from iomm.kernels.masked_attention import triton_op as fused
from iomm.kernels.masked_attention.reference import masked_attention_reference
from iomm.kernels.masked_attention.triton_op import masked_attention_triton

pytestmark = pytest.mark.usefixtures("poison")

# (lengths of the samples, lengths of their prefixes or None).
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


def attention_by_dense_mask(arguments, prefix, causal, scale):
    """Return the attention with the mask rule as one dense mask over the whole batch."""
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
def test_backends_agree_in_float64(lengths, prefix_lengths, heads, causal, monkeypatch):
    for suffix in [True] if prefix_lengths is None else [True, False]:
        arguments, prefix = inputs(lengths, prefix_lengths, heads, suffix=suffix)
        results = {}
        for backend in ("sdpa", "reference"):
            monkeypatch.setenv("IOMM_KERNELS", f"masked_attention:{backend}")
            results[backend] = value_and_gradients(arguments, prefix, causal=causal, scale=0.4)
        for actual, expected in zip(results["sdpa"], results["reference"], strict=True):
            assert actual.isfinite().all()
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        by_mask = attention_by_dense_mask(arguments, prefix, causal, 0.4)
        torch.testing.assert_close(results["reference"][0], by_mask, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("lengths", "prefix_lengths"), BATCHES)
def test_bfloat16_on_cpu_is_within_rounding_error(lengths, prefix_lengths, causal, monkeypatch):
    """The tolerance is 2^-5 of the largest value.

    Rounding scores below 4 to 8 bits changes a weight by up to 2^-6 of itself. All other
    roundings are allowed the same.
    """
    arguments, prefix = inputs(lengths, prefix_lengths)
    monkeypatch.setenv("IOMM_KERNELS", "masked_attention:sdpa")

    def rounded(x, dtype):
        return (
            x
            if x is None or not x.is_floating_point()
            else x.detach().bfloat16().to(dtype).requires_grad_()
        )

    got, reference = (
        value_and_gradients(
            [rounded(x, dtype) for x in arguments],
            {name: rounded(x, dtype) for name, x in prefix.items()},
            causal=causal,
            scale=0.4,
        )
        for dtype in (torch.bfloat16, torch.float64)
    )
    for actual, exact in zip(got, reference, strict=True):
        assert actual.dtype == torch.bfloat16 and actual.isfinite().all()
        torch.testing.assert_close(
            actual.double(),
            exact,
            rtol=0,
            atol=2**-5 * max(1.0, exact.abs().max().item() if len(exact) else 0.0),
        )


def test_reference_passes_gradcheck():
    (q, k, v, offsets), prefix = inputs([2, 0, 2], [1, 2, 0], heads=(2, 1), dim=2)
    *prefix_kv, prefix_offsets = prefix.values()
    for causal in (True, False):

        def run(q, k, v, prefix_k, prefix_v, causal=causal):
            return masked_attention_reference(
                q, k, v, offsets, prefix_k, prefix_v, prefix_offsets, causal, 0.5
            )

        assert torch.autograd.gradcheck(run, (q, k, v, *prefix_kv))


@pytest.mark.parametrize("suffix", [True, False])
@pytest.mark.parametrize(("lengths", "prefix_lengths"), BATCHES)
def test_layouts_read_no_offsets_if_lengths_are_known(lengths, prefix_lengths, suffix):
    """Offsets on the meta device have no values, so reading one raises."""
    known = tuple(lengths), None if prefix_lengths is None else tuple(prefix_lengths)
    offsets = [offsets_of(lengths), None if prefix_lengths is None else offsets_of(prefix_lengths)]
    on_meta = [x if x is None else x.to("meta") for x in offsets]
    num_rows = sum(lengths), sum(prefix_lengths or ())
    for make, arguments in (
        (sdpa._make_layout, (suffix, True)),
        (varlen._make_layout, (*num_rows, suffix)),
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):
            make(*on_meta, *arguments)
        for x, y in zip(
            vars(make(*on_meta, *arguments, *known)).values(),
            vars(make(*offsets, *arguments)).values(),
            strict=True,
        ):
            assert (x.shape, x.dtype) == (y.shape, y.dtype) if torch.is_tensor(x) else x == y


def test_lengths_change_no_result():
    arguments, prefix = inputs([3, 0, 5, 1], [2, 6, 0, 0])
    known = dict(lengths=(3, 0, 5, 1), prefix_lengths=(2, 6, 0, 0))
    for got, wanted in zip(
        value_and_gradients(arguments, prefix, **known),
        value_and_gradients(arguments, prefix),
        strict=True,
    ):
        assert torch.equal(got, wanted)


def test_queries_without_keys_return_zeros():
    arguments, prefix = inputs([3, 2, 4], [2, 0, 5], suffix=False)
    out, *gradients = value_and_gradients(arguments, prefix)
    assert out[3:5].abs().max() == 0 and out[:3].abs().min() > 0
    assert gradients[0][3:5].abs().max() == 0
    arguments, prefix = inputs([3, 2], [0, 0], suffix=False)
    assert value_and_gradients(arguments, prefix)[0].abs().max() == 0


def test_sample_is_independent_of_other_samples():
    arguments, prefix = inputs([3, 5, 2], [4, 0, 6])
    whole = masked_attention(*arguments, **prefix)
    q, k, v, _ = (x[3:8] for x in arguments)
    single = masked_attention(q, k, v, offsets_of([5]))
    torch.testing.assert_close(whole[3:8], single, rtol=1e-12, atol=1e-12)


def test_prefix_without_requires_grad_gets_no_gradient():
    arguments, prefix = inputs([3, 2], [4, 1])
    for name in ("prefix_k", "prefix_v"):
        prefix[name] = prefix[name].detach()
    masked_attention(*arguments, **prefix).sum().backward()
    assert prefix["prefix_k"].grad is None and arguments[0].grad.abs().max() > 0


def test_offsets_changed_in_place_invalidate_cached_layout():
    (q, k, v, offsets), _ = inputs([4, 4], None)
    first = masked_attention(q, k, v, offsets)
    offsets[1] = 2
    second = masked_attention(q, k, v, offsets)
    torch.testing.assert_close(second, masked_attention(q, k, v, offsets.clone()), rtol=0, atol=0)
    assert (first - second).abs().max() > 0


def test_regular_batch_matches_torch_sdpa():
    (q, k, v, offsets), _ = inputs([6, 6], None, heads=(2, 2))
    dense = [x.view(2, 6, 2, 8).transpose(1, 2) for x in (q, k, v)]
    reference = (
        F.scaled_dot_product_attention(*dense, is_causal=True).transpose(1, 2).reshape(12, 2, 8)
    )
    torch.testing.assert_close(
        masked_attention(q, k, v, offsets), reference, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_error_is_within_reference_budget(dtype):
    arguments, prefix = inputs([40, 3, 70], [10, 0, 50], dim=64)
    exact = masked_attention_reference(*arguments, *prefix.values(), True, 0.125)
    low = [x.to(dtype) if x.is_floating_point() else x for x in (*arguments, *prefix.values())]
    got = masked_attention(*low[:4], **dict(zip(prefix, low[4:], strict=True)))
    same_dtype = masked_attention_reference(*low, True, 0.125)
    ulp = torch.finfo(dtype).eps * exact.abs().max()
    budget = 2 * (same_dtype.double() - exact).abs().max() + ulp
    assert got.dtype == dtype and (got.double() - exact).abs().max() <= budget


def test_bad_input_raises_value_error():
    (q, k, v, offsets), prefix = inputs([3, 2], [4, 1])
    bad = [
        ((q, k, None, offsets), {}, "go together"),
        ((q, None, None, offsets), {}, "no keys to attend to"),
        ((q, k, v, offsets), {"prefix_k": k}, "go together"),
        ((q, k[:4], v[:4], offsets), {}, "one suffix key per query"),
        ((q, k, v[..., :4], offsets), {}, "must both be"),
        ((q[:, :3], k, v, offsets), {}, "multiple"),
        ((q, k.float(), v.float(), offsets), {}, "share dtype"),
        ((q, k, v, offsets.long()), {}, "int32"),
        ((q, k, v, offsets * 2), {}, "end at"),
        ((q, k, v, offsets[:-1]), prefix, "same number of samples"),
        ((q, k, v, offsets.flip(0)), {}, "start at 0"),
        ((q[0], k, v, offsets), {}, "S, A, E"),
        ((q, k, v, offsets), {"lengths": (5,)}, "lengths must have 2 entries, got 1"),
        ((q, k, v, offsets), {"prefix_lengths": (4, 1)}, "prefix_lengths must have 0 entries"),
        ((q, k, v, offsets), {"lengths": (2, 3)}, r"lengths of offsets must be \(3, 2\)"),
    ]
    for arguments, options, message in bad:
        with pytest.raises(ValueError, match=message):
            masked_attention(*arguments, **options)


@pytest.mark.parametrize("causal", [True, False])
def test_rows_after_last_sample_are_zeros(causal, monkeypatch):
    """NaN after the last sample of a fixed-capacity tensor has no effect and gradient 0."""
    arguments, prefix = inputs([5, 2, 3], [3, 0, 4])
    reference = value_and_gradients(arguments, prefix, causal=causal)
    extra = torch.full((3, 4, 8), float("nan"), dtype=torch.float64)
    q, k, v = (
        torch.cat((x.detach(), extra[:, : x.shape[1]])).requires_grad_() for x in arguments[:3]
    )
    wide = dict(prefix)
    for name in ("prefix_k", "prefix_v"):
        wide[name] = torch.cat((prefix[name].detach(), extra[:2, :2])).requires_grad_()
    for backend in ("sdpa", "reference"):
        monkeypatch.setenv("IOMM_KERNELS", f"masked_attention:{backend}")
        out = masked_attention(q, k, v, arguments[3], **wide, causal=causal)
        weight = torch.randn(
            reference[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
        gradients = torch.autograd.grad(
            (out[:10] * weight).sum() + out[10:].sum(), leaves((q, k, v), wide)
        )
        for actual, expected in zip([out, *gradients], reference, strict=True):
            torch.testing.assert_close(actual[: len(expected)], expected, rtol=1e-12, atol=1e-12)
            assert not actual[len(expected) :].any()


def attend_like_flash(q, k, v, offsets, key_offsets, max_queries, max_keys, causal, scale):
    """Emulate FlashAttention's varlen kernels, which align the causal mask at the last key."""
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
def test_varlen_key_packing_matches_reference(lengths, prefix_lengths, causal):
    for suffix in [True] if prefix_lengths is None else [True, False]:
        arguments, prefix = inputs(lengths, prefix_lengths, suffix=suffix)
        segments = [prefix.get(name) for name in ("prefix_k", "prefix_v", "prefix_offsets")]
        out = varlen._run(attend_like_flash, *arguments, *segments, causal, 0.4)
        reference = masked_attention_reference(*arguments, *segments, causal, 0.4)
        weight = torch.randn(
            out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
        inputs_with_grad = leaves(arguments, prefix)
        gradients = [
            torch.autograd.grad((x * weight).sum(), inputs_with_grad, materialize_grads=True)
            for x in (out, reference)
        ]
        for actual, expected in zip((out, *gradients[0]), (reference, *gradients[1]), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@torch.library.custom_op("iomm_test::attend_like_flash", mutates_args=())
def attend_in_graph(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    key_offsets: torch.Tensor,
    max_queries: int,
    max_keys: int,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    return attend_like_flash(
        q, k, v, offsets, key_offsets, max_queries, max_keys, causal, scale
    ).contiguous()


@attend_in_graph.register_fake
def _(q, k, v, offsets, key_offsets, max_queries, max_keys, causal, scale):
    return torch.empty_like(q)


def check_plan_in_graph(dtype, compare, dim=8):
    """Compare the chosen backend in one graph with the reference for several batches."""
    graphs = CompileCounter()
    attend = torch.compile(
        lambda planned, *x: planned.attend(*x), dynamic=True, fullgraph=True, backend=graphs
    )
    for lengths, prefix_lengths in (
        ([5, 2, 9], [3, 4, 0]),
        ([4, 4], [1, 7]),
        ([3, 2, 1], [2, 8, 5]),
    ):
        # Six heads, as torch.compile gives equal sizes of the first batch one symbol.
        arguments, prefix = inputs(lengths, prefix_lengths, (6, 2), dim)
        q, k, v, offsets, prefix_k, prefix_v, prefix_offsets = (
            x.detach().to(DEVICE, dtype) if x.is_floating_point() else x.to(DEVICE)
            for x in (*arguments, *prefix.values())
        )
        planned = plan(
            offsets,
            dtype,
            dim,
            prefix_offsets=prefix_offsets,
            lengths=tuple(lengths),
            prefix_lengths=tuple(prefix_lengths),
        )
        compare(
            attend(planned, q, k, v, prefix_k, prefix_v),
            masked_attention_reference(
                q, k, v, offsets, prefix_k, prefix_v, prefix_offsets, True, dim**-0.5
            ),
        )
    assert graphs.frame_count == 1


def test_varlen_plan_is_one_graph_for_all_batches(monkeypatch):
    backend = next(b for b in dispatch._backends["masked_attention"] if b.name == "varlen")
    monkeypatch.setattr(dispatch, "_choose", lambda *_: backend)
    monkeypatch.setattr(varlen, "_torch_varlen", attend_in_graph)
    check_plan_in_graph(torch.float64, torch.testing.assert_close)


def test_plan_is_none_where_a_backend_runs_outside_of_graphs(monkeypatch):
    offsets = offsets_of([2, 3])
    both = dict(lengths=(2, 3), prefix_offsets=offsets, prefix_lengths=(2, 3))
    assert plan(offsets, torch.float64, 8, lengths=(2, 3)) is not None
    assert plan(offsets_of([2, 2]), torch.float64, 8, lengths=(2, 2)) is None
    assert plan(offsets, torch.float64, 8, **both) is None
    monkeypatch.setenv("IOMM_KERNELS", "masked_attention:reference")
    assert plan(offsets, torch.float64, 8, lengths=(2, 3)) is None


@pytest.mark.skipif(bool(varlen.varlen_why_not()), reason=str(varlen.varlen_why_not()))
def test_gpus_take_varlen_where_it_supports_the_arguments():
    def chosen(*arguments):
        return dispatch._choose("masked_attention", *arguments).name

    assert chosen("cuda", torch.bfloat16, 128) == "varlen"
    assert chosen("cuda", torch.float32, 128) == chosen("cpu", torch.bfloat16, 128) == "sdpa"
    others = {"flash", "sdpa"}
    assert chosen("cuda", torch.bfloat16, 256) == chosen("cuda", torch.bfloat16, 20) == "sdpa"
    assert {b.name for b in dispatch._backends["masked_attention"][1:3]} == others


# What IOMM-B's MLLM and adapter call: 16 samples, 256 queries, prefixes of 40 to 86 tokens.
PREFIXES = [62 + (37 * i) % 47 - 22 for i in range(16)]
CALLS = {
    "prefix": ((PREFIXES, None, (12, 2), 128, True), False),
    "queries": (([256] * 16, PREFIXES, (12, 2), 128, True), True),
    "adapter": (([256] * 16, PREFIXES, (12, 12), 128, False), True),
}


@pytest.mark.parametrize("call", CALLS)
def test_fewer_launches_and_bytes_by_backend(call):
    """Counted on the meta device: varlen does less than the padding sdpa, and Triton less again."""
    (lengths, prefixes, heads, dim, suffix), gradients = CALLS[call]
    arguments, prefix = inputs(lengths, prefixes, heads, dim, suffix)
    known = tuple(lengths), None if prefixes is None else tuple(prefixes)
    counts = {}
    for name, backend in (
        ("sdpa", sdpa.masked_attention_sdpa),
        ("varlen", varlen.masked_attention_varlen),
        ("triton", masked_attention_triton),
    ):
        needs = {"prefix_k": not suffix, "prefix_v": not suffix}
        tensors = [
            x
            if x is None
            else x.detach().to("meta", torch.bfloat16).requires_grad_(gradients and needed)
            if x.is_floating_point()
            else x.to("meta")
            for x, needed in (
                *((x, True) for x in arguments),
                *((x, needs.get(key, False)) for key, x in prefix.items()),
                *[(None, False)] * (3 - len(prefix)),
            )
        ]
        counts[name] = counted(backend, (*tensors, suffix, dim**-0.5, *known))
    assert counts["varlen"].launches < counts["sdpa"].launches
    assert counts["triton"].launches <= counts["varlen"].launches
    assert counts["varlen"].bytes < counts["sdpa"].bytes
    assert counts["triton"].bytes <= counts["varlen"].bytes


# Triton batches with lengths around the tile sizes: (lengths, prefix lengths, heads, head dim).
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
def test_triton_values_and_gradients_match(batch):
    check_triton(batch, True, True)
    check_triton(batch, False, batch[1] is None)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("batch", LONG_BATCHES)
def test_triton_matches_on_long_samples(batch):
    for causal in (True, False):
        check_triton(batch, causal, True)
    if batch[1] is not None:
        check_triton(batch, False, False)


@needs_triton
def test_triton_rows_after_last_sample_are_zeros():
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
def test_triton_skips_prefix_without_requires_grad(monkeypatch):
    arguments, prefix = inputs([3, 2], [4, 1], dim=32)
    tensors = cast([*arguments, *(x.detach() for x in prefix.values())])
    out = run_triton(*tensors, causal=True)
    calls, backward = [], fused._backward

    def recorded(*x):
        calls.append(backward(*x))
        return calls[-1]

    monkeypatch.setattr(fused, "_backward", recorded)
    out.sum().backward()
    assert [x.numel() for x in calls[0][3:]] == [0, 0] and calls[0][1].numel() > 0
    assert tensors[4].grad is None and tensors[0].grad.any()


@needs_triton
def test_triton_op_passes_opcheck():
    for with_prefix, with_suffix in ((True, True), (True, False), (False, True)):
        arguments, prefix = inputs([3, 2], [4, 1], dim=32, suffix=with_suffix)
        tensors = cast([*arguments, *(prefix.values() if with_prefix else (None, None, None))])
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        # The slow check runs for one case only.
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
def test_triton_unsupported_head_dim_raises_value_error(monkeypatch):
    monkeypatch.setenv("IOMM_KERNELS", "masked_attention:triton")
    arguments, prefix = inputs([3, 2], None, dim=8)
    with pytest.raises(ValueError, match="does not support a head dim of 8"):
        masked_attention(*cast(arguments), **prefix)


@needs_triton
def test_triton_plan_is_one_graph_for_all_batches(monkeypatch):
    monkeypatch.setenv("IOMM_KERNELS", "masked_attention:triton")
    check_plan_in_graph(HALF, torch.testing.assert_close, dim=32)
