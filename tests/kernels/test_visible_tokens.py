"""The mask: the same tokens on every body, exact counts, legal extremes."""

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
def test_bodies_are_equal(num_tokens, ratio, fixed):
    n = torch.tensor([0, 5, 2**33, 11, 12])
    got = visible_tokens(2**63 + 5, n, num_tokens, ratio, "fixed" if fixed else "bernoulli")
    for mine, specified in zip(
        got, visible_tokens_reference(2**63 + 5, n, num_tokens, ratio, fixed, None)
    ):
        assert mine.dtype == specified.dtype and torch.equal(mine, specified)


@needs_cpp
def test_threads_do_not_change_the_mask():
    n = torch.arange(400)
    # The fixture `poison` gives back the number there was.
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for mine, specified in zip(
            visible_tokens(1, n, 256, 0.85), visible_tokens_reference(1, n, 256, 0.85, False, None)
        ):
            assert torch.equal(mine, specified)


@pytest.mark.parametrize("ratio", RATIOS)
def test_bernoulli_follows_the_uniforms(ratio):
    n = torch.arange(4)
    index, offsets, position = visible_tokens(3, n, 256, ratio)
    visible = uniform(3, MASK, n, 256).double() >= ratio
    assert index.tolist() == visible.flatten().nonzero().flatten().tolist()
    assert position.tolist() == (index % 256).tolist()
    assert offsets.tolist() == [0, *visible.sum(1).cumsum(0).tolist()]


@pytest.mark.parametrize(
    ("num_tokens", "ratio", "stay"),
    [
        (256, 0.85, 38),
        (256, 0.0, 256),
        (256, 1.0, 0),
        (1, 0.4, 1),
        (9, 0.5, 4),
    ],
)
def test_fixed_keeps_the_largest(num_tokens, ratio, stay):
    n = torch.arange(6)
    _, offsets, position = visible_tokens(3, n, num_tokens, ratio, "fixed")
    assert offsets.tolist() == [stay * b for b in range(7)]
    draws = uniform(3, MASK, n, num_tokens)
    for b, kept in enumerate(position.view(6, stay)):
        hidden = torch.ones(num_tokens, dtype=torch.bool).index_fill(0, kept, False)
        assert (kept.diff() > 0).all()
        if stay and hidden.any():
            assert draws[b, kept].min() >= draws[b, hidden].max()


def test_share_of_hidden_tokens():
    _, offsets, _ = visible_tokens(0, torch.arange(2000), 256, 0.85)
    # Five standard deviations
    assert offsets[-1].item() / (2000 * 256) == pytest.approx(0.15, abs=0.0025)


def test_no_samples():
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
def test_bad_input_is_a_value_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        visible_tokens(0, torch.arange(2), *arguments)


@needs_cpp
def test_op_is_registered_soundly():
    # Without "test_aot_dispatch_dynamic": no gradient passes a mask.
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
def test_packed_bodies_are_equal(ratio, fixed, capacity):
    n = torch.tensor([0, 5, 2**33, 11, 12])
    count = "fixed" if fixed else "bernoulli"
    got = visible_tokens_packed(9, n, 63, ratio, count, capacity)
    for mine, specified in zip(got, visible_tokens_reference(9, n, 63, ratio, fixed, capacity)):
        assert mine.dtype == specified.dtype and torch.equal(mine, specified)


@pytest.mark.parametrize("body", ["cpp", "reference"])
def test_packed_is_the_mask_and_counts_what_it_cuts(body, monkeypatch):
    if body == "cpp" and native.why_not("cpu"):
        pytest.skip(native.why_not("cpu"))
    monkeypatch.setenv("IOMM_KERNELS", f"visible_tokens:{body}")
    n = torch.arange(8)
    index, offsets, position = visible_tokens(3, n, 256, 0.85)
    wide = visible_tokens_packed(3, n, 256, 0.85, capacity=len(index) + 5)
    assert torch.equal(
        wide[0], torch.cat((index, torch.zeros(5, dtype=torch.int64)))
    ) and torch.equal(wide[1], offsets)
    assert torch.equal(wide[2][:-5], position) and wide[3].tolist() == [0]
    narrow = visible_tokens_packed(3, n, 256, 0.85, capacity=len(index) - 50)
    assert torch.equal(narrow[0], index[:-50]) and torch.equal(narrow[2], position[:-50])
    assert narrow[1].tolist() == offsets.clamp(max=len(index) - 50).tolist() and narrow[
        3
    ].tolist() == [50]


def test_capacity_is_six_deviations_above_the_mean():
    assert packed_capacity(32, 256, 0.85) == 1423
    assert packed_capacity(4, 256, 0.85, "fixed") == 4 * 38
    assert packed_capacity(2, 16, 0.0) == 32 and packed_capacity(2, 16, 1.0) == 0
    draws = [
        visible_tokens_packed(seed, torch.arange(64), 256, 0.85)[3].item() for seed in range(100)
    ]
    assert not any(draws)


def test_a_capacity_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="capacity"):
        visible_tokens_packed(0, torch.arange(2), 16, 0.5, capacity=33)


@needs_cpp
def test_packed_op_is_registered_soundly():
    torch.library.opcheck(
        torch.ops.iomm.visible_tokens_packed.default, (3, torch.arange(3), 64, 0.5, False, 90)
    )


def test_packed_compiles_as_one_graph():
    def step(n):
        return visible_tokens_packed(3, n, 64, 0.5)

    n = torch.arange(4)
    for mine, eager in zip(torch.compile(step, fullgraph=True, backend="aot_eager")(n), step(n)):
        assert torch.equal(mine, eager)
