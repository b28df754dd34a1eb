"""Tests of fp8_linear: quantisation, error against an unquantised layer, and training."""

import runpy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, assert_no_worse, cast
from torch import nn

from iomm.config import PRESETS, InputError
from iomm.engine import launch
from iomm.engine.dry_run import frozen_bytes
from iomm.engine.shapes.mllm import WEIGHTS
from iomm.generator import empty_generator
from iomm.internvl import load_mllm
from iomm.kernels import fp8_linear as op
from iomm.kernels.fp8_linear import (
    BACKWARD,
    FORWARD,
    fp8_linear,
    fp8_linear_reference,
    fp8_linear_scaled,
    quantised,
    round_weight,
)
from iomm.layers import RoundedLinear, TokenLinear, use_fp8

BACKENDS = [fp8_linear_reference, fp8_linear_scaled]
# rows, inputs, outputs
SHAPES = [(48, 64, 32), (33, 32, 80), (1, 16, 16)]


def inputs(rows, ins, outs, dtype, spread=1.0):
    """Return x, weight, bias and the gradient of the result.

    `spread` > 0 spreads magnitudes over powers of ten, down to subnormals.
    """
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


def result_and_gradients(backend, x, weight, bias, grad):
    """Return the result and every gradient."""
    y = backend(x, weight, bias)
    return y, *torch.autograd.grad(y, (x, weight, bias), grad)


def rounding_error(x, dtype):
    """Return the largest rounding error of each value.

    This is half a unit in the last place, which for subnormals is that of the smallest normal
    value, plus the rounding error of float32, through which PyTorch rounds float64.
    """
    info, scale = torch.finfo(dtype), x.abs().max() / torch.finfo(dtype).max
    half_ulp = torch.maximum(info.eps / 2 * x.abs(), info.smallest_normal * info.eps / 2 * scale)
    return half_ulp + torch.finfo(torch.float32).eps * x.abs()


@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD])
def test_quantised_rounds_to_nearest_fp8_value(dtype):
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
    "backend, dtype",
    [
        (fp8_linear_reference, torch.float64),
        (fp8_linear_reference, torch.float32),
        (fp8_linear_scaled, torch.float32),
    ],
)
def test_error_is_within_operand_rounding_bound(backend, dtype):
    """Check the error bound of each product, plus n units of rounding in its sum.

    The bound is |a b - A B| <= |dA| |B| + |A| |dB| + |dA| |dB|.
    """
    x, weight, bias, grad = inputs(48, 64, 32, dtype)
    got = result_and_gradients(backend, x, weight, bias, grad)
    baseline = result_and_gradients(
        F.linear, *(t.detach().double().requires_grad_() for t in (x, weight, bias)), grad.double()
    )
    x, w, g = (
        (t.abs(), rounding_error(t, f))
        for t, f in (
            (x.detach().double(), FORWARD),
            (weight.detach().double(), FORWARD),
            (grad.double(), BACKWARD),
        )
    )
    # The fourth result, the gradient of the bias, is not a product and is checked below.
    for actual, exact, (a, da), (b, db) in zip(
        got, baseline, (x, g, (g[0].T, g[1].T)), ((w[0].T, w[1].T), w, x), strict=False
    ):
        arithmetic = (a.shape[1] + 2) * torch.finfo(dtype).eps * (a + da) @ (b + db) + torch.finfo(
            dtype
        ).eps * exact.abs()
        bound = da @ b + a @ db + da @ db + arithmetic
        error = (actual.double() - exact).abs()
        assert (error <= bound).all() and error.max() > torch.finfo(
            torch.bfloat16
        ).eps * exact.abs().max()
    same_dtype = result_and_gradients(F.linear, *inputs(48, 64, 32, dtype))
    assert_no_worse(got[3], same_dtype[3], baseline[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_scaled_mm_matches_reference(shape, dtype):
    """Operands are bitwise equal, so only sums and the last rounding may differ."""
    tensors = inputs(*shape, dtype)
    exact = result_and_gradients(fp8_linear_reference, *cast(tensors, torch.float64, "cpu"))
    moved = cast(tensors, dtype, DEVICE if dtype == torch.bfloat16 else "cpu")
    for actual, low, expected in zip(
        result_and_gradients(fp8_linear_scaled, *moved),
        result_and_gradients(fp8_linear_reference, *moved),
        exact,
        strict=True,
    ):
        assert_no_worse(actual, low, expected)


@pytest.mark.parametrize("backend", BACKENDS, ids=["reference", "scaled_mm"])
def test_zeros_stay_zero_and_nonfinite_values_propagate(backend):
    x, weight, bias, grad = inputs(16, 32, 16, torch.bfloat16)
    # Gates start at zero, so the first gradients are zeros.
    y, dx, dweight, _ = result_and_gradients(backend, x, weight, bias, torch.zeros_like(grad))
    assert y.isfinite().all() and not dx.any() and not dweight.any()
    for i, value in ((0, "nan"), (1, "inf"), (3, "nan"), (3, "-inf")):
        tensors = [
            t.detach().clone().requires_grad_(t.requires_grad) for t in (x, weight, bias, grad)
        ]
        with torch.no_grad():
            tensors[i][3, 5] = float(value)
        y, dx, dweight, _ = result_and_gradients(backend, *tensors)
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
def test_bad_input_raises_value_error(change, message):
    with pytest.raises(ValueError, match=message):
        fp8_linear(*change(*inputs(16, 32, 16, torch.bfloat16)[:3]))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.out = TokenLinear(64, 256), TokenLinear(256, 64)

    def forward(self, x):
        return x + self.out(F.gelu(self.into(F.layer_norm(x, (64,)))))


@pytest.mark.parametrize("compiled", [False, True])
def test_no_weight_copy_is_saved_for_backward(compiled):
    """No fp8 copy of a weight may be saved.

    ZeRO-3 releases a block's weights after its forward pass, but would not release a copy.
    """
    model, saved = Mlp().bfloat16(), []
    use_fp8(model)
    forward = (
        torch.compile(model.forward, fullgraph=True, backend="aot_eager_decomp_partition")
        if compiled
        else model.forward
    )
    x = torch.randn(2, 40, 64, dtype=torch.bfloat16, requires_grad=True)

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward(x)
    y.sum().backward()
    weights = {id(p) for p in model.parameters()}
    sizes = {p.numel() for p in model.parameters() if p.dim() == 2}
    assert any(id(t) in weights for t in saved) and not [
        t.shape for t in saved if t.numel() in sizes and id(t) not in weights
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
def test_use_fp8_selects_only_token_products_in_blocks(config):
    model = empty_generator(config, device="meta")
    # fp8 products do not support this size.
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
    """Return the losses of a small stack that overfits one batch.

    The stack has fp32 master weights and trains in `precision`. `seed` draws its weights.
    """
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
    history = []
    for _ in range(steps):
        loss = (model(x) - target).float().square().mean()
        model.zero_grad()
        loss.backward()
        for master, p in zip(masters, model.parameters(), strict=True):
            master.grad = p.grad.float()
        optimizer.step()
        with torch.no_grad():
            for master, p in zip(masters, model.parameters(), strict=True):
                p.copy_(master)
        history.append(loss.item())
    return torch.tensor(history)


def test_training_loss_matches_bf16_within_seed_spread():
    def final_loss(*args):
        return losses(*args)[-10:].mean()

    by_seed = torch.stack([final_loss("bf16", seed) for seed in range(5)])
    assert by_seed.max() < losses("bf16")[0] / 2
    assert (final_loss("fp8") - by_seed[0]).abs() <= by_seed.max() - by_seed.min()


@pytest.mark.slow
def test_demo_in_fp8_matches_bf16_within_seed_spread(tmp_path, monkeypatch):
    """fp8 is as close to bf16 as two seeds are, but not the same curve.

    The runs use the engine with ZeRO-3.
    """
    # The script changes sys.path.
    monkeypatch.setattr(sys, "path", list(sys.path))
    compare = runpy.run_path(
        str(Path(__file__).resolve().parents[2] / "benchmarks/studies/precision.py")
    )["compare"]
    result = compare(tmp_path, 40, ["train.threads=1"])
    bf16, fp8 = (result["runs"][name]["losses"] for name in ("bf16", "fp8"))
    assert fp8 != bf16 and fp8[-1] < 0.75 * fp8[0]
    assert abs(result["fp8_over_bf16"]) <= abs(result["seed_over_bf16"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_weight_rounded_once_gives_the_same_bits(backend, shape):
    """The result and the gradient of x are those of the weight that is rounded in every call."""
    x, weight, bias, grad = inputs(*shape, torch.bfloat16)
    y = backend(x, weight, bias)
    (dx,) = torch.autograd.grad(y, x, grad)
    rounded = round_weight(weight.detach(), backward=True)
    again = backend(x, rounded, bias.detach())
    (dx_again,) = torch.autograd.grad(again, x, grad)
    torch.testing.assert_close((again, dx_again), (y, dx), rtol=0, atol=0)
    assert rounded.values_OI.dtype == FORWARD and rounded.values_IO.shape == (shape[1], shape[2])


def test_mllm_in_fp8_computes_its_layers_with_fp8_linear():
    """ViT and decoder equal, to the bit, an MLLM whose layers call fp8_linear on their weights.

    Gradients reach the queries. Other layers keep their weights.
    """

    def outputs(mllm):
        pixels = torch.randint(
            256, (2, mllm.vit_px, mllm.vit_px, 3), generator=torch.Generator().manual_seed(0)
        ).to(torch.uint8)
        tokens = mllm.image_tokens(pixels)
        condition = mllm.condition(["a red circle", "two"], tokens)
        cache, _ = mllm.prefix(condition)
        queries = torch.linspace(-1, 1, 2 * 3 * mllm.width).view(2, 3, -1).to(mllm.dtype)
        hidden = mllm.queries(queries.requires_grad_(), condition, cache)
        return tokens, hidden, *torch.autograd.grad(hidden.float().square().sum(), queries)

    def shapes_mllm():
        return load_mllm(str(WEIGHTS), dtype=torch.bfloat16)

    plain, literal, fp8 = shapes_mllm(), shapes_mllm(), shapes_mllm()
    fp8.use_fp8()
    chosen = {
        name for name, part in fp8.backbone.named_modules() if isinstance(part, RoundedLinear)
    }
    for name in chosen:
        part = literal.backbone.get_submodule(name)
        part.forward = partial(fp8_linear, weight_OI=part.weight, bias_O=part.bias)
    found = outputs(fp8)
    torch.testing.assert_close(found, outputs(literal), rtol=0, atol=0)
    assert not torch.equal(found[1], outputs(plain)[1]) and found[2].isfinite().all()
    layers = plain.num_layers, len(plain.backbone.vision_tower.encoder.layer)
    assert len(chosen) == 7 * layers[0] + 6 * layers[1]
    # What the dry run counts is what the weights take.
    tensors = [*fp8.parameters(), *(b for b in fp8.buffers() if b.dtype in (FORWARD, fp8.dtype))]
    assert frozen_bytes(fp8, 2) == sum(t.nbytes for t in tensors)


def test_gpu_without_fp8_raises_input_error(monkeypatch):
    launch.check_kernels("fp8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    assert op.why_not() is not None
    with pytest.raises(
        InputError,
        match=r"precision fp8 on this GPU \(A100\) needs compute capability 8.9"
        r".*set precision=bf16",
    ):
        launch.check_kernels("fp8")
    with pytest.raises(InputError, match=r"set model.mllm_precision=auto"):
        launch.check_kernels("fp8", "model.mllm_precision")
