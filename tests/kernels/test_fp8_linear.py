"""fp8_linear: which numbers enter its products, how far they may take it from a plain linear, and what training sees of it."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, assert_no_worse, cast
from torch import nn

from iomm.config import PRESETS, InputError
from iomm.engine import launch
from iomm.generator import empty_generator
from iomm.kernels import fp8_linear as op
from iomm.kernels.fp8_linear import (
    BACKWARD,
    FORWARD,
    fp8_linear,
    fp8_linear_reference,
    fp8_linear_scaled,
    quantised,
)
from iomm.layers import TokenLinear, use_fp8

BODIES = [fp8_linear_reference, fp8_linear_scaled]
# rows, inputs, outputs
SHAPES = [(48, 64, 32), (33, 32, 80), (1, 16, 16)]


def inputs(rows, ins, outs, dtype, spread=1.0):
    """x, weight, bias and the gradient of the result; `spread` > 0 spreads magnitudes over powers of ten, into subnormals."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape):
        x = torch.randn(shape, generator=random, dtype=torch.float64)
        return (x * 10 ** (spread * torch.randn(shape, generator=random, dtype=torch.float64))).to(
            dtype
        )

    return (
        draw(rows, ins).requires_grad_(),
        draw(outs, ins).requires_grad_(),
        draw(outs).requires_grad_(),
        draw(rows, outs),
    )


def whole(body, x, weight, bias, grad):
    """The result and every gradient."""
    y = body(x, weight, bias)
    return y, *torch.autograd.grad(y, (x, weight, bias), grad)


def rounding(x, dtype):
    """The most by which rounding may move each value: half a unit in the last place, which below the smallest normal value
    is that of the smallest; and float32's, through which PyTorch rounds float64.
    """
    info, scale = torch.finfo(dtype), x.abs().max() / torch.finfo(dtype).max
    half_ulp = torch.maximum(info.eps / 2 * x.abs(), info.smallest_normal * info.eps / 2 * scale)
    return half_ulp + torch.finfo(torch.float32).eps * x.abs()


@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD])
def test_every_value_becomes_the_nearest_of_the_format(dtype):
    x = inputs(64, 64, 16, torch.float64, spread=1.5)[0].detach()
    values, scale = quantised(x, dtype)
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    codes = codes[codes.isfinite()]
    nearest = (x[..., None] / scale - codes).abs().amin(-1)
    assert (
        values.double().abs().max() == torch.finfo(dtype).max
        and (values.double().abs() < 2.0**-6).any()
    )
    assert (
        (x / scale - values.double()).abs()
        <= nearest + torch.finfo(torch.float32).eps * (x / scale).abs()
    ).all()


@pytest.mark.parametrize(
    "body, dtype",
    [
        (fp8_linear_reference, torch.float64),
        (fp8_linear_reference, torch.float32),
        (fp8_linear_scaled, torch.float32),
    ],
)
def test_the_error_is_bounded_by_what_rounding_the_sides_makes(body, dtype):
    """|a b - A B| <= |dA| |B| + |A| |dB| + |dA| |dB| for each product, and n units of the sum's own arithmetic."""
    x, weight, bias, grad = inputs(48, 64, 32, dtype)
    got = whole(body, x, weight, bias, grad)
    plain = whole(
        F.linear, *(t.detach().double().requires_grad_() for t in (x, weight, bias)), grad.double()
    )
    x, w, g = (
        (t.abs(), rounding(t, f))
        for t, f in (
            (x.detach().double(), FORWARD),
            (weight.detach().double(), FORWARD),
            (grad.double(), BACKWARD),
        )
    )
    for mine, exact, (a, da), (b, db) in zip(
        got, plain, (x, g, (g[0].T, g[1].T)), ((w[0].T, w[1].T), w, x)
    ):
        arithmetic = (a.shape[1] + 2) * torch.finfo(dtype).eps * (a + da) @ (b + db) + torch.finfo(
            dtype
        ).eps * exact.abs()
        bound = da @ b + a @ db + da @ db + arithmetic
        error = (mine.double() - exact).abs()
        assert (error <= bound).all() and error.max() > torch.finfo(
            torch.bfloat16
        ).eps * exact.abs().max()
    assert_no_worse(got[3], whole(F.linear, *inputs(48, 64, 32, dtype))[3], plain[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_scaled_mm_is_the_reference(shape, dtype):
    """From the same values the sides are the same to the bit, so only sums and the last rounding may differ."""
    tensors = inputs(*shape, dtype)
    exact = whole(fp8_linear_reference, *cast(tensors, torch.float64, "cpu"))
    there = cast(tensors, dtype, DEVICE if dtype == torch.bfloat16 else "cpu")
    for mine, theirs, wanted in zip(
        whole(fp8_linear_scaled, *there), whole(fp8_linear_reference, *there), exact
    ):
        assert_no_worse(mine, theirs, wanted)


@pytest.mark.parametrize("body", BODIES, ids=["reference", "scaled_mm"])
def test_zeros_stay_zeros_and_what_is_not_finite_shows(body):
    x, weight, bias, grad = inputs(16, 32, 16, torch.bfloat16)
    # Closed gates at the start send these.
    y, dx, dweight, _ = whole(body, x, weight, bias, torch.zeros_like(grad))
    assert y.isfinite().all() and not dx.any() and not dweight.any()
    for i, value in ((0, "nan"), (1, "inf"), (3, "nan"), (3, "-inf")):
        tensors = [
            t.detach().clone().requires_grad_(t.requires_grad) for t in (x, weight, bias, grad)
        ]
        with torch.no_grad():
            tensors[i][3, 5] = float(value)
        y, dx, dweight, _ = whole(body, *tensors)
        assert (y.isnan() if i < 2 else dx.isnan() & dweight.isnan()[:1, :1]).all()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, w, b: (x[:, :16], w, b), "weight"),
        (lambda x, w, b: (x, w, b[:4]), "bias"),
        (lambda x, w, b: (x.float(), w, b), "share a dtype"),
        (lambda x, w, b: (x[:, :8], w[:, :8], b), "multiples of 16"),
    ],
)
def test_bad_input_is_a_value_error(change, message):
    with pytest.raises(ValueError, match=message):
        fp8_linear(*change(*inputs(16, 32, 16, torch.bfloat16)[:3]))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.out = TokenLinear(64, 256), TokenLinear(256, 64)

    def forward(self, x):
        return x + self.out(F.gelu(self.into(F.layer_norm(x, (64,)))))


@pytest.mark.parametrize("compiled", [False, True])
def test_no_copy_of_a_weight_waits_for_the_backward_pass(compiled):
    """ZeRO-3 releases a block's weights after its forward pass; a copy in fp8 would stay."""
    model, kept = Mlp().bfloat16(), []
    use_fp8(model)
    forward = (
        torch.compile(model.forward, fullgraph=True, backend="aot_eager_decomp_partition")
        if compiled
        else model.forward
    )
    x = torch.randn(2, 40, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = forward(x)
    y.sum().backward()
    weights = {id(p) for p in model.parameters()}
    sizes = {p.numel() for p in model.parameters() if p.dim() == 2}
    assert any(id(t) in weights for t in kept) and not [
        t.shape for t in kept if t.numel() in sizes and id(t) not in weights
    ]
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    "config",
    [
        PRESETS["demo"],
        replace(PRESETS["demo"], num_single_blocks=1),
        PRESETS["iomm-b"],
        PRESETS["iomm-xl"],
    ],
    ids=str,
)
def test_products_over_tokens_inside_blocks_are_fp8_and_nothing_else(config):
    model = empty_generator(config, device="meta")
    # A size that an fp8 product cannot have.
    model.odd = TokenLinear(24, 32, device="meta")
    use_fp8(model)
    chosen = {name for name, part in model.named_modules() if getattr(part, "fp8", False)}
    inside = {
        f"{name}.{inner}"
        for name, block in model.named_modules()
        if isinstance(block, model.block_classes)
        for inner, part in block.named_modules()
        if isinstance(part, nn.Linear) and inner.split(".")[-1] != "modulation"
    }
    assert chosen == inside and chosen


def losses(precision, seed=0, steps=40):
    """Of a small stack that learns one batch, in the precision asked for, with fp32 masters; `seed` draws its weights."""
    torch.manual_seed(seed)
    model = nn.Sequential(Mlp(), Mlp(), nn.Linear(64, 64)).bfloat16()
    if precision == "fp8":
        use_fp8(model)
    masters = [p.detach().float() for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=3e-3)
    x, target = (
        torch.randn(8, 32, 64, generator=torch.Generator().manual_seed(i)).bfloat16()
        for i in range(2)
    )
    found = []
    for _ in range(steps):
        loss = (model(x) - target).float().square().mean()
        model.zero_grad()
        loss.backward()
        for master, p in zip(masters, model.parameters()):
            master.grad = p.grad.float()
        optimizer.step()
        with torch.no_grad():
            for master, p in zip(masters, model.parameters()):
                p.copy_(master)
        found.append(loss.item())
    return torch.tensor(found)


def test_training_ends_as_near_to_bf16_as_other_starting_weights_do():
    def end(*of):
        return losses(*of)[-10:].mean()

    starts = torch.stack([end("bf16", seed) for seed in range(5)])
    assert starts.max() < losses("bf16")[0] / 2
    assert (end("fp8") - starts[0]).abs() <= starts.max() - starts.min()


@pytest.mark.slow
def test_the_demo_in_fp8_follows_bf16(tmp_path, monkeypatch):
    """By the engine, under ZeRO-3: as near as two seeds are, and not the same curve."""
    # The script changes it.
    monkeypatch.setattr(sys, "path", list(sys.path))
    compare = runpy.run_path(
        str(Path(__file__).resolve().parents[2] / "benchmarks/studies/precision.py")
    )["compare"]
    result = compare(tmp_path, 40, ["train.threads=1"])
    bf16, fp8 = (result["runs"][name]["losses"] for name in ("bf16", "fp8"))
    assert fp8 != bf16 and fp8[-1] < 0.75 * fp8[0]
    assert abs(result["fp8_over_bf16"]) <= abs(result["seed_over_bf16"])


def test_a_gpu_without_fp8_is_one_clear_error(monkeypatch):
    launch.check_kernels("fp8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    assert op.why_not() is not None
    with pytest.raises(
        InputError,
        match=r"precision fp8 on this GPU \(A100\) needs compute capability 8.9.*set precision=bf16",
    ):
        launch.check_kernels("fp8")
