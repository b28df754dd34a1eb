"""A tiny Qwen-Image as a whole: from a diffusers folder to a model that trains and samples."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_mmdit import QWEN
from toy_models import qwen_pipeline

from iomm.config import AdapterConfig, MaskConfig, PromptConfig
from iomm.engine.builders import build_model, load_foreign_weights, with_generator_shape
from iomm.engine.config import load_config
from iomm.model import IOMM, Recipe
from iomm.pipeline import Pipeline, sample_pixels
from iomm.qwen_vl import QwenVL
from iomm.sampler import image_noise
from iomm.vae import QwenVAE
from iomm.weights import load_generator

PROMPTS = ["a red circle", "a blue square on top of a green one"]
SIZE = (32, 64)


@pytest.fixture(scope="module")
def pipeline():
    return qwen_pipeline()


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen-image")
    qwen_pipeline(torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(pipeline, tmp_path_factory):
    """Return an IOMM of the parts of the pipeline in float64."""
    folder = tmp_path_factory.mktemp("transformer")
    pipeline.transformer.save_pretrained(folder)
    recipe = Recipe(
        mask=MaskConfig(ratio=0.5),
        adapter=AdapterConfig(kind="none", conditions="all"),
        prompt=PromptConfig(empty=" "),
    )
    return IOMM(
        load_generator(folder),
        None,
        QwenVL(pipeline.text_encoder.model, pipeline.tokenizer, 112),
        QwenVAE(qwen_pipeline().vae),
        recipe,
    )


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_images_equal_the_pipeline_of_diffusers(pipeline, model, guidance):
    """The same noise, steps, prompts of two lengths, guidance and VAE."""
    numbers = torch.tensor([3, 4])
    tokens = SIZE[0] * SIZE[1] // 16**2
    noise = image_noise(7, numbers, tokens, 64)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        PROMPTS,
        negative_prompt=[" "] * 2 if guidance > 1 else None,
        true_cfg_scale=guidance,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=4,
        latents=noise.double(),
        output_type="pt",
    ).images
    settings = dict(size_px=SIZE, steps=4, guidance=guidance, seed=7, shift="qwen-image")
    condition = model.frozen[0].condition(PROMPTS)
    got = sample_pixels(model, condition, numbers, **settings)
    exact = expected * 2 - 1
    assert got.shape == exact.shape == (2, 3, *SIZE)
    # Sampled in float32 in both. Measured: 4e-7.
    assert (got - exact).abs().max() <= 1e-6
    if guidance > 1:
        other = sample_pixels(model, condition, numbers, keep_norm=False, **settings)
        # Measured: 8e-3.
        assert (other - exact).abs().max() > 1e-3


def test_pipeline_survives_an_export(model, pipeline, folder, tmp_path):
    pipe = Pipeline(model, 64)
    path = pipe.save_pretrained(tmp_path / "export", mllm=folder, vae=folder)
    # A card records no paths.
    frozen = dict(mllm=str(folder), vae=str(folder))
    again = Pipeline.from_pretrained(path, device="cpu", dtype=torch.float64, **frozen)
    assert again.model.frozen[0].vit_px == 112
    source = Image.fromarray(np.full((70, 90, 3), 99, np.uint8))
    for run in (
        lambda p: p(PROMPTS, steps=2, shift="qwen-image"),
        lambda p: [p.edit(source, "make it red", steps=2)],
    ):
        for ours, theirs in zip(run(pipe), run(again), strict=True):
            assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1


def settings(folder, tmp_path, *more):
    return with_generator_shape(
        load_config(
            "demo",
            [
                f"run.dir={tmp_path / 'run'}",
                f"run.init={folder}",
                "model.preset=from-init",
                f"model.mllm={folder}",
                f"model.vae={folder}",
                "model.vit_px=112",
                "adapter.kind=none",
                "adapter.conditions=all",
                "align.weight=0",
                "prompt.empty=' '",
                "data.size_px=32",
                "precision=fp32",
                *more,
            ],
        )
    )


def test_run_init_builds_the_model_of_a_pipeline_folder(folder, pipeline, tmp_path):
    config = settings(folder, tmp_path)
    shape = json.loads(config.model.shape)
    assert (shape["positions"], shape["condition_norm"]) == ("centred", True)
    model = build_model(config, "cpu")
    assert model.generator.config.keep_norm and not QWEN.num_single_blocks
    lines = load_foreign_weights(model, folder / "transformer")
    assert "fresh" not in lines and "not used" not in lines
    theirs = load_generator(folder / "transformer")
    for got, expected in zip(model.generator.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("has_image", [None, [True, False]])
def test_loss_of_images_and_pairs_trains_every_generator_weight(model, has_image):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 32, 64, generator=generator) * 2 - 1
    num_images = 2 if has_image is None else 1
    vit = torch.randint(0, 256, (num_images, 112, 112, 3), generator=generator, dtype=torch.uint8)
    model.generator.requires_grad_(True)
    loss, loss_B, _ = model(
        pixels.double(), vit, torch.tensor([0, 1]), None, ["", "a red circle"], has_image
    )
    loss.backward()
    assert loss_B.shape == (2,) and loss.isfinite()
    for name, parameter in model.generator.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    model.generator.zero_grad()
