"""Tests of benchmarks/lib/baseline.py.

On the same batch, weights and draws it computes the losses and gradients of iomm/model.py.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from parity import relative_error, true_float64

from benchmarks.lib.baseline import BaselineModel, Draws, Trainer, engine_draws
from iomm.adapter import QueryAdapter
from iomm.config import AdapterConfig, GeneratorConfig, MaskConfig
from iomm.engine.config import OptimSection, TimeSection
from iomm.flow import sample_time
from iomm.generator import new_generator
from iomm.internvl import random_mllm
from iomm.kernels.philox import CAPTION_DROP, NOISE, TIME, normal, uniform
from iomm.layout import Layout
from iomm.masking import visible_mask
from iomm.model import IOMM, Recipe
from iomm.vae import FLUX_AUTOENCODER, random_vae

SEED, SIZE, RATIO = 3, 64, 0.6
SHAPE = {
    "vision": dict(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=4,
        attention_bias=True,
    ),
    "text": dict(
        vocab_size=512,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
    ),
}
VAE = FLUX_AUTOENCODER | dict(
    block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
)


def both(dtype, every=False):
    """Return our model, a baseline with its weights, our model's draws for a batch, the batch."""
    mllm, vae = random_mllm(SHAPE, dtype, "cpu"), random_vae(VAE, dtype, "cpu")
    adapter = AdapterConfig(num_queries=8, head_dim=16, conditions="all" if every else "query")
    shape = GeneratorConfig(
        width=64, num_heads=2, num_blocks=3, token_dim=vae.token_dim, condition_dim=mllm.width
    )
    parts = [new_generator(shape, 0), QueryAdapter(adapter, mllm.width)]
    draw = torch.Generator().manual_seed(0)
    parts[1].init_weights(0)
    # A freshly initialised generator returns zero for every condition.
    with torch.no_grad():
        for part in parts:
            for p in part.parameters():
                p.add_(torch.randn(p.shape, generator=draw) * 0.05)
    recipe = Recipe(
        seed=SEED, mask=MaskConfig(ratio=RATIO, mode="zero" if every else "drop"), adapter=adapter
    )
    ours = IOMM(*parts, mllm, vae, recipe).to(dtype)
    baseline = BaselineModel(shape, adapter, mllm, vae, ratio=RATIO, every=every).to(dtype)
    baseline.load(ours.state_dict())
    n_B = torch.arange(5, 9)
    pixels_BCHW = torch.rand(4, 3, SIZE, SIZE, generator=draw) * 2 - 1
    vit_BCHW = torch.randn(4, 3, 32, 32, generator=draw)
    side = SIZE // vae.factor
    noise_BCHW = (
        normal(SEED, NOISE, n_B, vae.channels * side * side)
        .view(4, vae.channels, side, side)
        .to(dtype)
    )
    draws = Draws(
        visible_BP=visible_mask(recipe.mask, SEED, n_B, mllm.num_image_tokens).view(4, -1),
        t_B=sample_time(uniform(SEED, TIME, n_B, 1)[:, 0]).to(dtype),
        noise_BCHW=noise_BCHW,
    )
    return ours, baseline, draws, (pixels_BCHW.to(dtype), vit_BCHW.to(dtype), n_B)


@pytest.mark.parametrize("every", [False, True], ids=["query outputs", "all outputs"])
def test_baseline_loss_and_gradients_match_in_float64(every, monkeypatch):
    monkeypatch.setattr(
        "iomm.model.sample_time", lambda drawn_B, **kind: sample_time(drawn_B.double(), **kind)
    )
    ours, baseline, draws, (pixels, vit, n_B) = both(torch.float64, every)
    with true_float64():
        loss, _, _ = ours(pixels, vit, n_B)
        loss.backward()
        expected = baseline.loss(pixels, vit, draws)
        expected.backward()
    assert_same(ours, loss, baseline, expected)


def assert_same(ours, loss, baseline, expected):
    """Assert that losses and all gradients agree to the accuracy of float64."""
    layout = Layout(baseline.shape, baseline.patch)
    theirs = {name: p.grad for name, p in baseline.generator.named_parameters()}
    expected_grads = {
        f"generator.{name}": layout.to_ours(name, theirs.__getitem__)
        for name, _ in ours.generator.named_parameters()
    }
    expected_grads |= {f"adapter.{name}": p.grad for name, p in baseline.adapter.named_parameters()}
    errors = {
        name: relative_error(p.grad, expected_grads[name])
        for name, p in ours.named_parameters()
        # A bias of all keys cancels in the softmax, so both gradients are rounding errors.
        if name != "adapter.to_k.bias"
    }
    print(f"loss {abs(loss - expected) / expected:.1e}, gradients {max(errors.values()):.1e}")
    worst = max(errors, key=errors.get)
    assert abs(loss - expected) <= 1e-7 * expected
    assert all(error <= 1e-6 for error in errors.values()), f"{worst}: {errors[worst]:.1e}"


def test_baseline_matches_on_mixed_batches_in_float64(monkeypatch):
    """As in stage 2, with one of two captions dropped: the baseline pads rows that ours packs."""
    monkeypatch.setattr(
        "iomm.model.sample_time", lambda drawn_B, **kind: sample_time(drawn_B.double(), **kind)
    )
    ours, baseline, _, (pixels, vit, n_B) = both(torch.float64)
    has_image = [True, False, True, False]
    captions = ["", "a red circle", "", "two blue squares"]
    vit = vit[[0, 2]]
    drop = uniform(SEED, CAPTION_DROP, n_B, 1)[[1, 3], 0].mean().item()
    ours.recipe = replace(ours.recipe, caption_drop=drop)
    config = SimpleNamespace(
        run=SimpleNamespace(seed=SEED),
        mask=ours.recipe.mask,
        time=TimeSection(),
        train=SimpleNamespace(caption_drop=drop),
    )
    batch = SimpleNamespace(
        n_B=n_B, pixels_BCHW=pixels, vit_pixels_BHWC=vit, captions=captions, has_image=has_image
    )
    draws, texts = engine_draws(config, batch, *baseline.frozen)
    assert texts.count(None) == 2 and texts.count("") == 1
    draws = replace(draws, t_B=draws.t_B.double(), noise_BCHW=draws.noise_BCHW.double())
    with true_float64():
        loss, _, _ = ours(pixels, vit, n_B, None, captions, has_image)
        loss.backward()
        expected = baseline.loss(pixels, vit, draws, texts)
        expected.backward()
    assert_same(ours, loss, baseline, expected)


def test_baseline_loss_matches_in_float32():
    ours, baseline, draws, (pixels, vit, n_B) = both(torch.float32)
    with torch.no_grad():
        loss, expected = ours(pixels, vit, n_B)[0], baseline.loss(pixels, vit, draws)
    print(f"float32: {abs(loss - expected) / expected:.1e}")
    assert abs(loss - expected) <= 1e-5 * expected


def test_baseline_loss_ignores_hidden_tokens():
    _, baseline, draws, (pixels, vit, _) = both(torch.float32)
    real = baseline.frozen[0].image_tokens
    with torch.no_grad():
        before = baseline.loss(pixels, vit, draws)
        baseline.frozen[0].image_tokens = lambda x: torch.where(
            draws.visible_BP[..., None], real(x), 7.0
        )
        after = baseline.loss(pixels, vit, draws)
    assert torch.equal(before, after)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_baseline_step_reduces_the_loss(kind):
    _, baseline, draws, (pixels, vit, _) = both(torch.float32)
    trainer = Trainer(baseline, OptimSection(kind=kind, lr=1e-2), decay=0.9)

    class Batch:
        pixels_BCHW, vit_pixels_BHWC = pixels, vit

    with torch.no_grad():
        before = baseline.loss(pixels, vit, draws)
    for _ in range(5):
        trainer.step([Batch], 1)
    with torch.no_grad():
        assert baseline.loss(pixels, vit, draws) < before
    assert any(
        not torch.equal(a, p) for a, p in zip(trainer.average, trainer.parameters, strict=True)
    )
    assert not any(p.grad is not None for part in baseline.frozen for p in part.parameters())
