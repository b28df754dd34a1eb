"""Tests of visible_tokens: equal tokens on every backend, exact counts, extreme ratios."""

import pytest
import torch

from iomm.kernels import native
from iomm.kernels.philox import MASK, uniform
from iomm.kernels.visible_tokens import (
    packed_capacity,
    visible_tokens,
    visible_tokens_packed,
    visible_tokens_reference,
)

pytestmark = pytest.mark.usefixtures("poison")

RATIOS = [0.0, 1e-9, 0.45, 0.5, 0.85, 0.95, 1.0]
needs_cpp = pytest.mark.skipif(native.why_not("cpu") is not None, reason=str(native.why_not("cpu")))


@needs_cpp
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 3, 63, 256, 257, 1000])
@pytest.mark.parametrize("ratio", RATIOS)
def test_backends_are_equal(num_tokens, ratio, fixed):
    n = torch.tensor([0, 5, 2**33, 11, 12])
    got = visible_tokens(2**63 + 5, n, num_tokens, ratio, "fixed" if fixed else "bernoulli")
    # The reference's fourth entry, overflow, is None here.
    for actual, expected in zip(
        got, visible_tokens_reference(2**63 + 5, n, num_tokens, ratio, fixed, None), strict=False
    ):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)


@needs_cpp
def test_mask_is_independent_of_threads():
    n = torch.arange(400)
    # The fixture `poison` restores the number of threads.
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for actual, expected in zip(
            visible_tokens(1, n, 256, 0.85),
            visible_tokens_reference(1, n, 256, 0.85, False, None),
            strict=False,
        ):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("ratio", RATIOS)
def test_bernoulli_mask_matches_uniforms(ratio):
    n = torch.arange(4)
    index, offsets, position = visible_tokens(3, n, 256, ratio)
    visible = uniform(3, MASK, n, 256).double() >= ratio
    assert index.tolist() == visible.flatten().nonzero().flatten().tolist()
    assert position.tolist() == (index % 256).tolist()
    assert offsets.tolist() == [0, *visible.sum(1).cumsum(0).tolist()]


@pytest.mark.parametrize(
    ("num_tokens", "ratio", "num_visible"),
    [
        (256, 0.85, 38),
        (256, 0.0, 256),
        (256, 1.0, 0),
        (1, 0.4, 1),
        (9, 0.5, 4),
    ],
)
def test_fixed_count_keeps_largest_uniforms(num_tokens, ratio, num_visible):
    n = torch.arange(6)
    _, offsets, position = visible_tokens(3, n, num_tokens, ratio, "fixed")
    assert offsets.tolist() == [num_visible * b for b in range(7)]
    draws = uniform(3, MASK, n, num_tokens)
    for b, kept in enumerate(position.view(6, num_visible)):
        hidden = torch.ones(num_tokens, dtype=torch.bool).index_fill(0, kept, False)
        assert (kept.diff() > 0).all()
        if num_visible and hidden.any():
            assert draws[b, kept].min() >= draws[b, hidden].max()


def test_share_of_hidden_tokens_matches_ratio():
    _, offsets, _ = visible_tokens(0, torch.arange(2000), 256, 0.85)
    # Five standard deviations.
    assert offsets[-1].item() / (2000 * 256) == pytest.approx(0.15, abs=0.0025)


def test_empty_batch_returns_no_tokens():
    index, offsets, position = visible_tokens(0, torch.arange(0), 16, 0.5)
    assert offsets.tolist() == [0] and len(index) == len(position) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.5), "num_tokens"),
        ((16, -0.1), "ratio"),
        ((16, 1.1), "ratio"),
        ((16, float("nan")), "ratio"),
        ((16, 0.5, "poisson"), "count"),
        ((2**30, 0.5), "2\\^31"),
    ],
)
def test_bad_input_raises_value_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        visible_tokens(0, torch.arange(2), *arguments)


@needs_cpp
def test_op_passes_opcheck():
    # "test_aot_dispatch_dynamic" is omitted because a mask has no gradient.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.iomm.visible_tokens.default,
        (3, torch.arange(3), 64, 0.5, False),
        test_utils=tests,
    )


@needs_cpp
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 0.45, 0.85, 1.0])
@pytest.mark.parametrize("capacity", [0, 1, 37, 128, 5 * 63])
def test_packed_backends_are_equal(ratio, fixed, capacity):
    n = torch.tensor([0, 5, 2**33, 11, 12])
    count = "fixed" if fixed else "bernoulli"
    got = visible_tokens_packed(9, n, 63, ratio, count, capacity)
    reference = visible_tokens_reference(9, n, 63, ratio, fixed, capacity)
    for actual, expected in zip(got, reference, strict=True):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_packed_matches_mask_and_counts_overflow(backend, monkeypatch):
    if backend == "cpp" and native.why_not("cpu"):
        pytest.skip(native.why_not("cpu"))
    monkeypatch.setenv("IOMM_KERNELS", f"visible_tokens:{backend}")
    n = torch.arange(8)
    index, offsets, position = visible_tokens(3, n, 256, 0.85)
    wide = visible_tokens_packed(3, n, 256, 0.85, capacity=len(index) + 5)
    assert torch.equal(wide.index, torch.cat((index, torch.zeros(5, dtype=torch.int64))))
    assert torch.equal(wide.offsets, offsets)
    assert torch.equal(wide.position[:-5], position) and wide.overflow.tolist() == [0]
    narrow = visible_tokens_packed(3, n, 256, 0.85, capacity=len(index) - 50)
    assert torch.equal(narrow.index, index[:-50])
    assert torch.equal(narrow.position, position[:-50])
    assert narrow.offsets.tolist() == offsets.clamp(max=len(index) - 50).tolist()
    assert narrow.overflow.tolist() == [50]


def test_capacity_is_mean_plus_six_deviations():
    assert packed_capacity(32, 256, 0.85) == 1423
    assert packed_capacity(4, 256, 0.85, "fixed") == 4 * 38
    assert packed_capacity(2, 16, 0.0) == 32 and packed_capacity(2, 16, 1.0) == 0
    draws = [
        visible_tokens_packed(seed, torch.arange(64), 256, 0.85).overflow.item()
        for seed in range(100)
    ]
    assert not any(draws)


def test_capacity_out_of_range_raises_value_error():
    with pytest.raises(ValueError, match="capacity"):
        visible_tokens_packed(0, torch.arange(2), 16, 0.5, capacity=33)


@needs_cpp
def test_packed_op_passes_opcheck():
    torch.library.opcheck(
        torch.ops.iomm.visible_tokens_packed.default, (3, torch.arange(3), 64, 0.5, False, 90)
    )


def test_packed_compiles_as_one_graph():
    def step(n):
        return visible_tokens_packed(3, n, 64, 0.5)

    n = torch.arange(4)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for actual, eager in zip(compiled(n), step(n), strict=True):
        assert torch.equal(actual, eager)
