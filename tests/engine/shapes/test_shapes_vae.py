"""The tiny VAE of the shapes dataset: its loss, a miniature training run, the shipped weights."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from torch.distributions import Normal, kl_divergence

from iomm.config import InputError
from iomm.engine import shapes
from iomm.engine.builders import foreign_data, vae_name
from iomm.engine.config import load_config
from iomm.engine.shapes import vae as shapes_vae
from iomm.vae import load_vae

FILE = "diffusion_pytorch_model.safetensors"


def header(folder):
    with safe_open(folder / FILE, framework="pt") as file:
        return {key: json.loads(value) for key, value in file.metadata().items() if key != "format"}


def test_transformed_applies_eight_symmetries():
    x_BCHW = torch.rand(1, 3, 8, 8)
    squares = [shapes_vae.transformed(x_BCHW, number) for number in range(8)]
    assert torch.equal(squares[0], x_BCHW)
    assert not any(torch.equal(squares[i], squares[j]) for i in range(8) for j in range(i))


@pytest.mark.parametrize("symmetry", [0, 6])
def test_vae_loss_matches_the_formula_in_float64(symmetry):
    torch.manual_seed(0)
    autoencoder = AutoencoderKL.from_config(shapes_vae.ARCHITECTURE).double()
    pixels, noise = torch.rand(2, 3, 64, 64).double() * 2 - 1, torch.randn(2, 4, 8, 8).double()
    posterior = autoencoder.encode(pixels).latent_dist
    decoded = autoencoder.decode(
        shapes_vae.transformed(posterior.mean + posterior.std * noise, symmetry)
    ).sample
    difference = decoded - shapes_vae.transformed(pixels, symmetry)
    nats = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0)).sum() / 2
    expected = difference.square().mean() + 0.1 * difference.abs().mean() + 2e-6 * nats
    torch.testing.assert_close(
        shapes_vae.vae_loss(autoencoder, pixels, noise, symmetry, kl_weight=2e-6), expected
    )


def test_training_is_deterministic_and_resumes_after_a_leg(tmp_path):
    legs = [
        shapes_vae.Leg(steps=2, batch=4, lr=1e-3, num_images=100, kl_weight=kl, seed=seed)
        for kl, seed in ((2e-6, 0), (1e-5, 1))
    ]
    settings = dict(num_scored=2)
    found = shapes_vae.train(tmp_path / "whole", legs, **settings)
    shapes_vae.train(tmp_path / "parts", legs[:1], **settings)
    shapes_vae.train(tmp_path / "parts", legs, **settings)
    whole, parts = (header(tmp_path / name) for name in ("whole", "parts"))
    assert whole["accuracy"] == parts["accuracy"] == found
    assert [leg | {"seconds": 0} for leg in whole["legs"]] == [
        leg | {"seconds": 0} for leg in parts["legs"]
    ]
    a, b = (load_vae(str(tmp_path / name)) for name in ("whole", "parts"))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    latents = a.encode(shapes_vae.normalised(shapes_vae.render_batch(0, range(100))))
    # Weights in bfloat16 have a relative precision of 1 / 256.
    assert abs(latents.mean()) < 0.02 and abs(latents.std() - 1) < 0.02
    with pytest.raises(
        InputError,
        match=r"was trained with another lr, steps\. Give another folder, or remove it\.",
    ):
        shapes_vae.train(
            tmp_path / "whole",
            [shapes_vae.Leg(steps=3, batch=4, lr=2e-3, num_images=100, kl_weight=2e-6)],
            **settings,
        )


def test_shipped_vae_has_the_accuracy_in_its_header():
    """At least 97 % of 1000 pictures per split fit their caption. For 100, 92 is 3 sigma less."""
    shapes.check_weights(shapes_vae.WEIGHTS)
    assert min(header(shapes_vae.WEIGHTS)["accuracy"].values()) >= 0.97
    vae = load_vae(str(shapes_vae.WEIGHTS))
    assert sum(p.numel() for p in vae.parameters()) < 0.7e6
    for split in ("train", "test"):
        assert shapes_vae.reconstruction_accuracy(vae, 100, split) >= 0.92


@pytest.mark.parametrize("damage", ["one bit", "missing"])
def test_damaged_shipped_weights_are_reported(tmp_path, monkeypatch, damage):
    shutil.copytree(shapes.WEIGHTS, tmp_path / "weights")
    monkeypatch.setattr(shapes, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(shapes_vae, "WEIGHTS", tmp_path / "weights" / "vae")
    config = load_config("demo", ["model.vae=shapes"])
    assert vae_name(config) == str(tmp_path / "weights" / "vae")
    file = tmp_path / "weights" / "vae" / FILE
    data = bytearray(file.read_bytes())
    data[-1000] ^= 8
    file.write_bytes(data)
    if damage == "missing":
        file.unlink()
    with pytest.raises(
        InputError,
        match=rf"{FILE} is (damaged|missing).*\. Reinstall iomm, or restore the file with "
        "`git checkout ",
    ):
        vae_name(config)


def test_foreign_data_returns_one_warning_per_part():
    assert foreign_data(load_config("demo", ["model.vae=shapes"])) == []
    vae, mllm = foreign_data(load_config("demo", ["model.vae=shapes", "data.shards=photos/*.tar"]))
    assert vae.startswith(
        "warning: model.vae=shapes was trained only on the shapes dataset, "
        "but data.shards is other data"
    )
    assert mllm.startswith("warning: model.mllm=shapes") and "\n" not in vae + mllm
    assert (
        foreign_data(
            load_config("demo-finetune", ["model.vae=shapes", "model.mllm=x/y", "data.pairs=p.tar"])
        )
        != []
    )
