"""FluxVAE and QwenVAE on tiny random autoencoders of diffusers, and PixelVAE."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from toy_models import FLUX_VAE, autoencoder, qwen_autoencoder

from iomm import vae as vae_module
from iomm.config import InputError
from iomm.vae import (
    FluxVAE,
    QwenVAE,
    WideHead,
    load_vae,
    vae_without_weights,
    wide_attention,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    autoencoder(sample_size=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen") / "vae"
    qwen_autoencoder().save_pretrained(folder)
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
    # The loader may round pixels already. Latents, and with them noise and targets, stay float32.
    rounded = vae.encode(pixels().bfloat16())
    assert rounded.dtype == torch.float32 and torch.equal(rounded, latents)
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


def rows(batch, length, width, seed):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, width, generator=random, dtype=torch.float64)


def attention(q, k, v):
    return F.scaled_dot_product_attention(*(x[:, None] for x in (q, k, v)))[:, 0]


@pytest.mark.parametrize("length", [64, 65])
def test_wide_attention_is_no_worse_than_pytorch(length, monkeypatch):
    """Also where the queries are halved, here twice."""
    exact = [2 * rows(2, length, 512, seed) for seed in range(3)]
    wanted = attention(*exact)
    monkeypatch.setattr(vae_module, "MAX_PAIRS", 20 * 65)
    torch.testing.assert_close(wide_attention(*exact), wanted, rtol=1e-12, atol=1e-12)
    for dtype in (torch.bfloat16, torch.float32):
        low = [x.to(dtype) for x in exact]
        wanted = attention(*(x.double() for x in low))
        got, theirs = wide_attention(*low), attention(*low)
        ulp = torch.finfo(dtype).eps * wanted.abs().max()
        assert got.dtype == dtype
        assert (got - wanted).abs().max() <= 2 * (theirs - wanted).abs().max() + ulp


def wide_heads(vae):
    parts = [part for part in vae.modules() if hasattr(part, "processor")]
    return [part for part in parts if isinstance(part.processor, WideHead)]


@torch.no_grad()
def test_wide_heads_equal_the_original_processor_which_runs_on_cpus():
    """FLUX's VAE has a head of 512, the small one of most tests has none above 256."""
    assert not wide_heads(FluxVAE(autoencoder()))
    parts = wide_heads(FluxVAE(autoencoder(widths=(288,), layers_per_block=1).double()))
    assert len(parts) == 2
    random = torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(2, 288, 3, 5, generator=random, dtype=torch.float64)
    for part in parts:
        wanted = part.processor.original(part, x_BCHW)
        assert torch.equal(part(x_BCHW), wanted)
        got = part.processor.attend(part, x_BCHW.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def check_flops(vae, size_px):
    """Compare the FLOPs of both passes with PyTorch's counter, on the meta device."""
    for decode, run, shape in (
        (False, vae.encode, (1, 3, size_px, size_px)),
        (True, vae.decode, (1, 16, size_px // 8, size_px // 8)),
    ):
        with FlopCounterMode(display=False) as counter:
            run(torch.empty(shape))
        assert vae.flops_per_image(size_px, decode) == counter.get_total_flops()


@pytest.mark.parametrize("size_px", [64, 96])
@pytest.mark.parametrize("quant_conv", [False, True])
def test_flops_match_pytorch_flop_counter(size_px, quant_conv):
    with torch.device("meta"):
        vae = FluxVAE(autoencoder(use_quant_conv=quant_conv, use_post_quant_conv=quant_conv))
        check_flops(vae, size_px)


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


def test_qwen_vae_equals_diffusers(qwen_folder):
    vae, raw = load_vae(str(qwen_folder), dtype=torch.float64), qwen_autoencoder().double()
    assert isinstance(vae, QwenVAE) and not any(p.requires_grad for p in vae.parameters())
    assert (vae.channels, vae.factor, vae.patch, vae.grid(48, 32)) == (16, 8, 2, (3, 2))
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1).double()
        for values in (raw.config.latents_mean, raw.config.latents_std)
    )
    noise, image = torch.randn(2, 16, 6, 4, dtype=torch.float64), pixels().double()
    with torch.no_grad():
        posterior = raw.encode(image[:, :, None]).latent_dist
        back = raw.decode(posterior.mode()).sample[:, :, 0]
    sample = posterior.mean + posterior.std * noise[:, :, None]
    latents = vae.encode(image)
    assert latents.shape == (2, 16, 6, 4) and latents.is_contiguous()
    # Measured: 3e-16, 4e-16 and 0.
    for got, exact in (
        (latents, (posterior.mode() - mean) / std),
        (vae.encode(image, noise), (sample - mean) / std),
    ):
        assert torch.allclose(got, exact[:, :, 0], rtol=0, atol=1e-13)
    assert torch.allclose(vae.decode(latents), back, rtol=0, atol=1e-13)


def test_qwen_vae_in_bfloat16_is_no_worse_than_diffusers(qwen_folder):
    vae = load_vae(str(qwen_folder), dtype=torch.bfloat16)
    exact = load_vae(str(qwen_folder), dtype=torch.float64).encode(pixels().double())
    raw = qwen_autoencoder().bfloat16()
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1)
        for values in (raw.config.latents_mean, raw.config.latents_std)
    )
    with torch.no_grad():
        plain = raw.encode(pixels()[:, :, None].bfloat16()).latent_dist.mode()[:, :, 0]
    error = ((plain.float() - mean) / std - exact).abs().max()
    latents = vae.encode(pixels())
    assert latents.dtype == torch.float32 and vae.mean.dtype == torch.float32
    assert (latents - exact).abs().max() <= 2 * error + torch.finfo(
        torch.bfloat16
    ).eps * exact.abs().max()


def test_qwen_vae_tiles_and_compiles(qwen_folder):
    plain, tiled = load_vae(str(qwen_folder)), load_vae(str(qwen_folder), tiling=True)
    assert torch.equal(plain.encode(pixels(1, 64, 64)), tiled.encode(pixels(1, 64, 64)))
    large = tiled.encode(pixels(1, 288, 48))
    assert large.shape == plain.encode(pixels(1, 288, 48)).shape == (1, 16, 36, 6)
    assert tiled.decode(large).shape == (1, 3, 288, 48)
    expected = plain.encode(pixels())
    plain.compile_parts(backend="eager")
    assert torch.equal(plain.encode(pixels()), expected)


@pytest.mark.parametrize("size_px", [64, 96])
def test_qwen_vae_flops_match_pytorch_flop_counter(size_px):
    with torch.device("meta"):
        vae = QwenVAE(qwen_autoencoder())
        check_flops(vae, size_px)


def test_qwen_vae_has_the_size_of_the_checkpoint():
    """127 M parameters with the kernels' frames that a single image does not reach."""
    from diffusers import AutoencoderKLQwenImage

    with torch.device("meta"):
        whole = AutoencoderKLQwenImage()
    assert sum(p.numel() for p in whole.parameters()) == 126_892_531
    vae = vae_without_weights("Qwen/Qwen-Image/vae")
    assert isinstance(vae, QwenVAE) and (vae.channels, vae.token_dim) == (16, 64)
    # diffusers' encoder takes 1.771 TFLOP.
    assert vae.flops_per_image(512) / 1e12 == pytest.approx(0.6356, abs=1e-4)


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


def test_random_vae_of_a_known_shape():
    vae = load_vae("random:flux-quarter", dtype=torch.bfloat16)
    assert isinstance(vae, FluxVAE) and vae.backbone.dtype == torch.bfloat16


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
