"""Tests of qk_norm_rope: backends against the specification, with one and two streams."""

import pytest
import torch
from kernel_checks import cast, check_against, needs_triton

from iomm.kernels import dispatch
from iomm.kernels.qk_norm_rope import (
    qk_norm_rope,
    qk_norm_rope_reference,
    qk_norm_rope_torch,
    qk_norm_rope_triton,
)
from iomm.kernels.triton_ops import support as triton_support

pytestmark = pytest.mark.usefixtures("poison")


def inputs(batch, length, heads, dim, parts=0, num_condition=0, weights=True, rotated=False):
    """Return the arguments of a backend without eps.

    parts 3 and 2 add a condition of qkv or kv, 0 adds none. With rotated, the angles of the
    condition precede those of the main stream.
    """
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_()

    def weight():
        return (normal(dim).detach() * 0.3 + 1).requires_grad_() if weights else None

    angles = normal(length + rotated * num_condition, dim // 2).detach() * 3
    condition = (
        normal(batch, num_condition, parts, heads, dim),
        weight() if parts == 3 else None,
        weight(),
    )
    return [
        normal(batch, length, 3, heads, dim),
        weight(),
        weight(),
        angles.cos(),
        angles.sin(),
        *(condition if parts else (None, None, None)),
    ]


CASES = [
    (2, 3, 2, 16),
    (1, 33, 3, 32, 3, 5),
    (2, 7, 1, 64, 2, 40),
    (1, 5, 2, 128, 3, 1, False),
    (2, 0, 2, 16, 3, 4),
    (2, 9, 3, 32, 3, 5, True, True),
    (1, 33, 2, 16, 2, 7, True, True),
]


@pytest.mark.parametrize(
    "case",
    [
        (1, 2, 1, 4),
        (2, 2, 1, 4, 3, 1),
        (1, 2, 2, 4, 2, 3),
        (1, 2, 1, 4, 3, 2, True, True),
        (1, 2, 1, 4, 2, 1, True, True),
    ],
)
def test_reference_passes_gradcheck_and_matches_torch(case):
    tensors = inputs(*case)
    tensors[3:5] = (x.detach() for x in tensors[3:5])
    assert torch.autograd.gradcheck(lambda *x: qk_norm_rope_reference(*x, 1e-6), tensors)
    for actual, expected in zip(
        qk_norm_rope_torch(*tensors, 1e-6), qk_norm_rope_reference(*tensors, 1e-6), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_formula_matches_value_by_value():
    qkv, q_weight, k_weight, cos, sin, condition, *condition_weights = inputs(2, 3, 2, 4, 3, 2)
    q, k, v = qk_norm_rope(
        qkv, q_weight, k_weight, cos, sin, condition=(condition, *condition_weights)
    )
    assert torch.equal(v, torch.cat((condition[:, :, 2], qkv[:, :, 2]), 1))
    for part, weight, first_weight, got in (
        (0, q_weight, condition_weights[0], q),
        (1, k_weight, condition_weights[1], k),
    ):
        x = qkv[1, 2, part, 1]
        x = x / (x.square().mean() + 1e-6).sqrt() * weight
        rotated = [
            x[0] * cos[2, 0] - x[1] * sin[2, 0],
            x[0] * sin[2, 0] + x[1] * cos[2, 0],
            x[2] * cos[2, 1] - x[3] * sin[2, 1],
            x[2] * sin[2, 1] + x[3] * cos[2, 1],
        ]
        torch.testing.assert_close(got[1, 4, 1], torch.stack(rotated), rtol=1e-12, atol=1e-12)
        x = condition[0, 1, part, 0]
        torch.testing.assert_close(
            got[0, 1, 0],
            x / (x.square().mean() + 1e-6).sqrt() * first_weight,
            rtol=1e-12,
            atol=1e-12,
        )


@pytest.mark.parametrize("parts", [2, 3])
def test_rotated_condition_equals_one_stream_of_both(parts):
    main, q_weight, k_weight, cos, sin, first, *_ = inputs(2, 3, 2, 4, parts, 2, True, True)
    joint = torch.cat((first if parts == 3 else first[:, :, [0, 0, 1]], main), dim=1)
    expected = qk_norm_rope(joint, q_weight, k_weight, cos, sin)
    got = qk_norm_rope(main, q_weight, k_weight, cos, sin, condition=(first, q_weight, k_weight))
    if parts == 2:
        expected = expected[0][:, 2:], *expected[1:]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_bad_input_raises_value_error():
    qkv, q_weight, k_weight, cos, sin, condition, *weights = inputs(2, 3, 2, 4, 3, 2)
    for arguments, options in [
        ((qkv[:, :, :2], q_weight, k_weight, cos, sin), {}),
        ((qkv, q_weight, k_weight, cos[:2], sin), {}),
        ((qkv, q_weight, k_weight, cos.repeat(2, 1), sin.repeat(2, 1)), {}),
        ((qkv, q_weight[:2], k_weight, cos, sin), {}),
        ((qkv, q_weight, k_weight, cos, sin), {"condition": (condition[:1], *weights)}),
        ((qkv, q_weight, k_weight, cos, sin), {"condition": (condition.float(), *weights)}),
    ]:
        with pytest.raises(ValueError, match="must be"):
            qk_norm_rope(*arguments, **options)


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_triton_values_and_gradients_match(case):
    check_against(
        lambda *x: qk_norm_rope_triton(*x, 1e-6),
        lambda *x: qk_norm_rope_reference(*x, 1e-6),
        inputs(*case),
    )


@needs_triton
def test_triton_op_passes_opcheck():
    for case in ((1, 2, 1, 16), (1, 2, 1, 16, 2, 1)):
        torch.library.opcheck(torch.ops.iomm.qk_norm_rope.default, (*cast(inputs(*case)), 1e-6))


@needs_triton
def test_triton_compiles_as_one_graph(monkeypatch):
    monkeypatch.setenv("IOMM_KERNELS", "qk_norm_rope:triton")
    *tensors, condition, q_weight, k_weight = cast(inputs(1, 3, 2, 16, 3, 2))

    def step(*x):
        return qk_norm_rope(*x, condition=(condition, q_weight, k_weight))[0].sin()

    assert torch.equal(
        torch.compile(step, fullgraph=True, backend="aot_eager")(*tensors), step(*tensors)
    )


def test_default_backend_compiles_as_one_graph():
    tensors = cast(inputs(1, 3, 2, 16)[:5], torch.float32, "cpu")

    def step(*x):
        return qk_norm_rope(*x)[0].sin()

    assert torch.equal(
        torch.compile(step, fullgraph=True, backend="eager")(*tensors), step(*tensors)
    )


@needs_triton
def test_triton_unsupported_head_dim_falls_back_unless_it_is_forced(monkeypatch):
    tensors = cast(inputs(1, 2, 1, 24)[:5])
    for got, expected in zip(
        qk_norm_rope(*tensors), qk_norm_rope_torch(*tensors, None, None, None, 1e-6), strict=True
    ):
        assert torch.equal(got, expected)
    monkeypatch.setenv("IOMM_KERNELS", "qk_norm_rope:triton")
    with pytest.raises(ValueError, match="does not support a head dim of 24"):
        qk_norm_rope(*tensors)


@needs_triton
@pytest.mark.parametrize("parts", [0, 2, 3])
def test_triton_joins_two_streams_sequence_first(parts):
    for x in qk_norm_rope_triton(*cast(inputs(3, 4, 2, 16, parts, 5)), 1e-6):
        assert (x.transpose(0, 1) if parts else x).is_contiguous()


@pytest.mark.skipif(triton_support.why_not() is not None, reason=str(triton_support.why_not()))
@pytest.mark.skipif(triton_support.INTERPRETED, reason="GPUs are not chosen from here")
def test_gpus_take_the_fused_kernels_where_they_support_the_arguments():
    def chosen(*arguments):
        return dispatch._choose("qk_norm_rope", *arguments).name

    assert chosen("cuda", torch.bfloat16, 128) == "triton"
    assert {chosen("cuda", torch.float32, 128), chosen("cuda", torch.bfloat16, 24)} == {"torch"}
    assert chosen("cpu", torch.bfloat16, 128) == "torch"
