"""The mask: the same tokens on every body, exact counts, legal extremes."""

import pytest
import torch

from iomm.kernels import native
from iomm.kernels.philox import MASK, uniform
from iomm.kernels.visible_tokens import visible_tokens
from iomm.kernels.visible_tokens.reference import visible_tokens_reference

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
    for mine, specified in zip(got, visible_tokens_reference(2**63 + 5, n, num_tokens, ratio, fixed)):
        assert mine.dtype == specified.dtype and torch.equal(mine, specified)


@needs_cpp
def test_threads_do_not_change_the_mask():
    n = torch.arange(400)
    for mine, specified in zip(visible_tokens(1, n, 256, 0.85), visible_tokens_reference(1, n, 256, 0.85, False)):
        assert torch.equal(mine, specified)


@pytest.mark.parametrize("ratio", RATIOS)
def test_bernoulli_follows_the_uniforms(ratio):
    n = torch.arange(4)
    index, offsets, position = visible_tokens(3, n, 256, ratio)
    visible = uniform(3, MASK, n, 256).double() >= ratio
    assert index.tolist() == visible.flatten().nonzero().flatten().tolist()
    assert position.tolist() == (index % 256).tolist()
    assert offsets.tolist() == [0, *visible.sum(1).cumsum(0).tolist()]


@pytest.mark.parametrize(("num_tokens", "ratio", "stay"), [
    (256, 0.85, 38), (256, 0.0, 256), (256, 1.0, 0), (1, 0.4, 1), (9, 0.5, 4),
])
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
    assert offsets[-1].item() / (2000 * 256) == pytest.approx(0.15, abs=0.0025)  # five standard deviations


def test_no_samples():
    index, offsets, position = visible_tokens(0, torch.arange(0), 16, 0.5)
    assert offsets.tolist() == [0] and len(index) == len(position) == 0


@pytest.mark.parametrize(("arguments", "message"), [
    ((0, 0.5), "num_tokens"), ((16, -0.1), "ratio"), ((16, 1.1), "ratio"), ((16, float("nan")), "ratio"),
    ((16, 0.5, "poisson"), "count"), ((2**30, 0.5), "2\\^31"),
])
def test_bad_input_is_a_value_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        visible_tokens(0, torch.arange(2), *arguments)


@needs_cpp
def test_op_is_registered_soundly():
    # Without "test_aot_dispatch_dynamic": no gradient passes a mask.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.iomm.visible_tokens.default, (3, torch.arange(3), 64, 0.5, False), test_utils=tests)
