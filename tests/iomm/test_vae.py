"""FluxVAE on a tiny random AutoencoderKL of diffusers, and PixelVAE."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from toy_models import FLUX_VAE, autoencoder

from iomm.config import InputError
from iomm.vae import FluxVAE, load_vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    autoencoder(sample_size=64).save_pretrained(folder)
    return folder


def pixels(batch=2, height=48, width=32):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_latents_are_scaled_and_decode_to_pixels(folder):
    vae, raw = load_vae(str(folder), dtype=torch.float64), autoencoder().double()
    assert (vae.channels, vae.factor, vae.patch, vae.token_dim, vae.grid(48, 32)) == (
        16,
        8,
        2,
        64,
        (3, 2),
    )
    noise, image = torch.randn(2, 16, 6, 4, dtype=torch.float64), pixels().double()
    with torch.no_grad():
        posterior = raw.encode(image).latent_dist
        back = raw.decode(posterior.mean).sample
    latents = vae.encode(image)
    assert latents.shape == (2, 16, 6, 4) and latents.is_contiguous()
    assert torch.allclose(latents, (posterior.mean - 0.1159) * 0.3611, rtol=0, atol=1e-13)
    assert torch.allclose(vae.decode(latents), back, rtol=0, atol=1e-13)
    sample = posterior.mean + posterior.std * noise
    assert torch.allclose(vae.encode(image, noise), (sample - 0.1159) * 0.3611, rtol=0, atol=1e-13)


def test_vae_is_frozen_in_channels_last_and_bfloat16(folder):
    vae = load_vae(str(folder), dtype=torch.bfloat16).train()
    assert (
        not vae.training
        and not vae.backbone.training
        and not any(p.requires_grad for p in vae.parameters())
    )
    assert vae.backbone.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    latents, exact = vae.encode(pixels().requires_grad_()), load_vae(str(folder)).encode(pixels())
    assert (
        latents.dtype == torch.float32
        and not latents.requires_grad
        and vae.backbone.dtype == torch.bfloat16
    )
    with torch.no_grad():
        plain = (
            autoencoder().bfloat16().encode(pixels().bfloat16()).latent_dist.mean.float() - 0.1159
        ) * 0.3611
    assert (latents - exact).abs().max() <= 2 * (plain - exact).abs().max() + torch.finfo(
        torch.bfloat16
    ).eps * exact.abs().max()


def test_tiling_affects_only_larger_images(folder):
    plain, tiled = load_vae(str(folder)), load_vae(str(folder), tiling=True)
    assert torch.equal(plain.encode(pixels(1, 64, 64)), tiled.encode(pixels(1, 64, 64)))
    large = tiled.encode(pixels(1, 128, 96))
    assert large.shape == plain.encode(pixels(1, 128, 96)).shape and tiled.decode(large).shape == (
        1,
        3,
        128,
        96,
    )


@pytest.mark.parametrize("size_px", [64, 96])
@pytest.mark.parametrize("quant_conv", [False, True])
def test_flops_match_pytorch_flop_counter(size_px, quant_conv):
    with torch.device("meta"):
        vae = FluxVAE(autoencoder(use_quant_conv=quant_conv, use_post_quant_conv=quant_conv))
        for decode, run, shape in (
            (False, vae.encode, (1, 3, size_px, size_px)),
            (True, vae.decode, (1, 16, size_px // 8, size_px // 8)),
        ):
            with FlopCounterMode(display=False) as counter:
                run(torch.empty(shape))
            assert vae.flops_per_image(size_px, decode) == counter.get_total_flops()


def test_flux_encoder_flops_match_the_readme():
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        widths = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
        blocks = {
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        }
        vae = FluxVAE(AutoencoderKL(**widths, **blocks, **FLUX_VAE))
    assert vae.flops_per_image(512) / 1e12 == pytest.approx(1.118, abs=1e-3)


def test_pixel_vae_is_the_identity():
    vae = load_vae("pixel:4")
    assert (vae.channels, vae.factor, vae.patch, vae.token_dim) == (3, 1, 4, 48)
    assert (
        torch.equal(vae.decode(vae.encode(pixels())), pixels())
        and vae.grid(48, 32) == (12, 8)
        and vae.flops_per_image(64) == 0
    )


def test_vae_of_a_pipeline_folder_is_found(folder, tmp_path):
    (tmp_path / "vae").symlink_to(folder)
    assert load_vae(str(tmp_path)).channels == 16


def with_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    return str(tmp_path)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: "pixel:0", "pixel:<patch>"),
        (lambda folder: "pixel:x", "pixel:<patch>"),
        (lambda folder: "./nowhere", "no folder"),
        (lambda folder: str(folder / "nowhere"), "no folder"),
        (lambda folder: "nowhere", "no folder"),
        (lambda folder: str(folder), "config.json"),
        (lambda folder: with_config(folder, "not json"), "JSON"),
        (lambda folder: with_config(folder, "[]"), "JSON"),
        (lambda folder: with_config(folder, '{"_class_name": "AutoencoderDC"}'), "AutoencoderDC"),
        (lambda folder: with_config(folder, '{"_class_name": "AutoencoderKL"}'), "safetensors"),
    ],
)
def test_wrong_name_or_folder_raises_one_line_error(make, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        load_vae(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_damaged_or_misshapen_weights_are_rejected(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"latent_channels": 4}))
    weights = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    with pytest.raises(InputError, match="cannot load"):
        load_vae(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="cannot load"):
        load_vae(str(tmp_path))


def test_missing_weights_are_listed(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    del weights["encoder.conv_in.weight"]
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks the weights encoder\.conv_in\.weight"):
        load_vae(str(tmp_path))


def test_indivisible_size_is_rejected(folder):
    with pytest.raises(InputError, match="multiple of 16 px, got 40 x 32"):
        load_vae(str(folder)).encode(pixels(1, 40, 32))
    with pytest.raises(InputError, match="multiple of 4 px"):
        load_vae("pixel:4").grid(30, 32)
