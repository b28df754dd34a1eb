"""benchmarks/lib/baseline.py computes what iomm/model.py computes: losses and gradients, on the same batch, weights and draws."""

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
    """(ours, plain with its weights, the draws that ours makes of a batch, the batch)."""
    mllm, vae = random_mllm(SHAPE, dtype, "cpu"), random_vae(VAE, dtype, "cpu")
    adapter = AdapterConfig(num_queries=8, head_dim=16, conditions="all" if every else "query")
    shape = GeneratorConfig(
        width=64, num_heads=2, num_blocks=3, token_dim=vae.token_dim, condition_dim=mllm.width
    )
    parts, draw = (
        [new_generator(shape, 0), QueryAdapter(adapter, mllm.width)],
        torch.Generator().manual_seed(0),
    )
    parts[1].init_weights(0)
    # A fresh generator answers zero whatever it is told.
    with torch.no_grad():
        for part in parts:
            for p in part.parameters():
                p.add_(torch.randn(p.shape, generator=draw) * 0.05)
    recipe = Recipe(
        seed=SEED, mask=MaskConfig(ratio=RATIO, mode="zero" if every else "drop"), adapter=adapter
    )
    ours = IOMM(*parts, mllm, vae, recipe).to(dtype)
    plain = BaselineModel(shape, adapter, mllm, vae, ratio=RATIO, every=every).to(dtype)
    plain.load(ours.state_dict())
    n_B = torch.arange(5, 9)
    pixels_BCHW, vit_BCHW = (
        torch.rand(4, 3, SIZE, SIZE, generator=draw) * 2 - 1,
        torch.randn(4, 3, 32, 32, generator=draw),
    )
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
    return ours, plain, draws, (pixels_BCHW.to(dtype), vit_BCHW.to(dtype), n_B)


@pytest.mark.parametrize("every", [False, True], ids=["query outputs", "all outputs"])
def test_loss_and_all_gradients_agree_in_float64(every, monkeypatch):
    monkeypatch.setattr(
        "iomm.model.sample_time", lambda drawn_B, **kind: sample_time(drawn_B.double(), **kind)
    )
    ours, plain, draws, (pixels, vit, n_B) = both(torch.float64, every)
    with true_float64():
        loss, _, _ = ours(pixels, vit, n_B)
        loss.backward()
        expected = plain.loss(pixels, vit, draws)
        expected.backward()
    assert_same(ours, loss, plain, expected)


def assert_same(ours, loss, plain, expected):
    """Losses and all gradients agree as float64 does."""
    layout = Layout(plain.shape, plain.patch)
    theirs = {name: p.grad for name, p in plain.generator.named_parameters()}
    wanted = {
        f"generator.{name}": layout.to_ours(name, theirs.__getitem__)
        for name, _ in ours.generator.named_parameters()
    }
    wanted |= {f"adapter.{name}": p.grad for name, p in plain.adapter.named_parameters()}
    errors = {
        name: relative_error(p.grad, wanted[name])
        for name, p in ours.named_parameters()
        # A bias of all keys cancels in the softmax: both are rounding.
        if name != "adapter.to_k.bias"
    }
    print(f"loss {abs(loss - expected) / expected:.1e}, gradients {max(errors.values()):.1e}")
    worst = max(errors, key=errors.get)
    assert abs(loss - expected) <= 1e-7 * expected
    assert all(error <= 1e-6 for error in errors.values()), f"{worst}: {errors[worst]:.1e}"


def test_images_and_captions_of_one_batch_agree_in_float64(monkeypatch):
    """As in stage 2, one of two captions dropped: plain pads rows that ours packs."""
    monkeypatch.setattr(
        "iomm.model.sample_time", lambda drawn_B, **kind: sample_time(drawn_B.double(), **kind)
    )
    ours, plain, _, (pixels, vit, n_B) = both(torch.float64)
    has_image, captions, vit = (
        [True, False, True, False],
        ["", "a red circle", "", "two blue squares"],
        vit[[0, 2]],
    )
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
    draws, texts = engine_draws(config, batch, *plain.frozen)
    assert texts.count(None) == 2 and texts.count("") == 1
    draws = replace(draws, t_B=draws.t_B.double(), noise_BCHW=draws.noise_BCHW.double())
    with true_float64():
        loss, _, _ = ours(pixels, vit, n_B, None, captions, has_image)
        loss.backward()
        expected = plain.loss(pixels, vit, draws, texts)
        expected.backward()
    assert_same(ours, loss, plain, expected)


def test_loss_agrees_in_float32_as_the_benchmark_runs():
    ours, plain, draws, (pixels, vit, n_B) = both(torch.float32)
    with torch.no_grad():
        loss, expected = ours(pixels, vit, n_B)[0], plain.loss(pixels, vit, draws)
    print(f"float32: {abs(loss - expected) / expected:.1e}")
    assert abs(loss - expected) <= 1e-5 * expected


def test_hidden_tokens_do_not_reach_the_loss():
    _, plain, draws, (pixels, vit, _) = both(torch.float32)
    real = plain.frozen[0].image_tokens
    with torch.no_grad():
        before = plain.loss(pixels, vit, draws)
        plain.frozen[0].image_tokens = lambda x: torch.where(
            draws.visible_BP[..., None], real(x), 7.0
        )
        after = plain.loss(pixels, vit, draws)
    assert torch.equal(before, after)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_trains(kind):
    _, plain, draws, (pixels, vit, n_B) = both(torch.float32)
    trainer = Trainer(plain, OptimSection(kind=kind, lr=1e-2), decay=0.9)

    class Batch:
        pixels_BCHW, vit_pixels_BHWC = pixels, vit

    with torch.no_grad():
        before = plain.loss(pixels, vit, draws)
    for _ in range(5):
        trainer.step([Batch], 1)
    with torch.no_grad():
        assert plain.loss(pixels, vit, draws) < before
    assert any(not torch.equal(a, p) for a, p in zip(trainer.average, trainer.parameters))
    assert not any(p.grad is not None for part in plain.frozen for p in part.parameters())
