"""Pixels to latents and back, frozen: the FLUX autoencoder, or the pixels as they are. The only door to diffusers.

A latent token is `patch` x `patch` latents; kernels/noisy_tokens packs and unpacks them.
"""

import json
from pathlib import Path

import torch
from torch import nn

from iomm.config import InputError, choice
from iomm.mllm import Frozen


class Latents:
    """What every VAE says of its latents: `channels`; `factor`, pixels per latent; `patch`, latents per token side."""

    @property
    def token_dim(self):
        """K, numbers in one latent token."""
        return self.channels * self.patch**2

    def grid(self, height_px, width_px):
        """Image size -> (rows, columns) of latent tokens. Raises InputError unless factor x patch divides both."""
        side = self.factor * self.patch
        if height_px % side or width_px % side or min(height_px, width_px) < side:
            raise InputError(
                f"image size must be a positive multiple of {side} px, got {height_px} x {width_px}"
            )
        return height_px // side, width_px // side


class PixelVAE(Latents, nn.Module):
    """The identity: latents are the pixels (B, 3, H, W) in [-1, 1]. For small worlds that need no autoencoder."""

    channels, factor = 3, 1

    def __init__(self, patch):
        super().__init__()
        self.patch = patch

    def compile_parts(self, backend="inductor"):
        """Nothing here to compile."""

    def encode(self, pixels_BCHW, noise_BCHW=None):
        return pixels_BCHW

    def decode(self, latents_BCHW):
        return latents_BCHW

    def flops_per_image(self, size_px, decode=False):
        return 0


class FluxVAE(Latents, Frozen):
    """A frozen AutoencoderKL of diffusers: pixels (B, 3, H, W) in [-1, 1] <-> latents of about unit variance.

    The model sees (z - shift) * scale, with FLUX's 0.3611 and 0.1159 read from the checkpoint (shift 0 where it has
    none). `patch`: side of the square of latents in a token; FLUX packs 2 x 2. `tiling` encodes and decodes in overlapping
    tiles of the checkpoint's own sample size where an image is larger: less memory, results close but not equal.
    """

    def __init__(self, autoencoder, patch: int = 2, tiling: bool = False):
        super().__init__(autoencoder.to(memory_format=torch.channels_last))
        config = autoencoder.config
        self.patch = patch
        self.channels, self.factor = (
            config.latent_channels,
            2 ** (len(config.block_out_channels) - 1),
        )
        self.scale, self.shift = config.scaling_factor, config.shift_factor or 0.0
        if tiling:
            autoencoder.enable_tiling()

    def compile_parts(self, backend="inductor"):
        """The encoder becomes one graph of torch.compile."""
        self.backbone.encoder.compile(fullgraph=True, backend=backend)

    def batch(self, x_BCHW):
        """In the layout and dtype of the weights."""
        return x_BCHW.to(dtype=self.backbone.dtype, memory_format=torch.channels_last)

    @torch.no_grad()
    def encode(self, pixels_BCHW, noise_BCHW=None):
        """-> latents (B, C, H / factor, W / factor) in the input's dtype: the posterior's mean, or with noise a sample.

        The noise is standard normal, of the latents' shape. Raises InputError for sizes that do not divide.
        """
        self.grid(*pixels_BCHW.shape[-2:])
        posterior = self.backbone.encode(self.batch(pixels_BCHW)).latent_dist
        latents = posterior.mean.to(pixels_BCHW.dtype)
        if noise_BCHW is not None:
            latents = latents + posterior.std.to(latents.dtype) * noise_BCHW.to(latents.dtype)
        return ((latents - self.shift) * self.scale).contiguous()

    @torch.no_grad()
    def decode(self, latents_BCHW):
        """-> pixels (B, 3, H, W) in the latents' dtype, about [-1, 1], not clipped."""
        pixels = self.backbone.decode(self.batch(latents_BCHW / self.scale + self.shift)).sample
        return pixels.to(latents_BCHW.dtype).contiguous()

    def flops_per_image(self, size_px, decode=False):
        """Forward FLOPs of encoding (or decoding) one square image untiled: 2 m n k of every matrix product."""
        coder, side = (
            (self.backbone.decoder, size_px // self.factor)
            if decode
            else (self.backbone.encoder, size_px)
        )
        quant_conv = self.backbone.post_quant_conv if decode else self.backbone.quant_conv
        total = 0 if quant_conv is None else products(quant_conv, size_px // self.factor)
        if decode:
            total += products(coder.conv_in, side) + products(coder.mid_block, side)
            for block in coder.up_blocks:
                total += products(block.resnets, side)
                if block.upsamplers:
                    side *= 2
                    total += products(block.upsamplers, side)
        else:
            total += products(coder.conv_in, side)
            for block in coder.down_blocks:
                total += products(block.resnets, side)
                if block.downsamplers:
                    side //= 2
                    total += products(block.downsamplers, side)
            total += products(coder.mid_block, side)
        return total + products(coder.conv_out, side)


def products(module, side):
    """FLOPs of every matrix product inside `module` on a side x side map: 2 a weight and place, and attention's two."""
    total = 0
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            total += 2 * side**2 * part.weight.numel()
        if hasattr(part, "to_q"):
            total += 4 * side**4 * part.to_q.out_features
    return total


# The autoencoder of FLUX.1, dev and schnell alike.
FLUX_AUTOENCODER = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=16,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    norm_num_groups=32,
    act_fn="silu",
    sample_size=1024,
    scaling_factor=0.3611,
    shift_factor=0.1159,
    use_quant_conv=False,
    use_post_quant_conv=False,
)


# An eighth to a fifth of its widths, half of its residual blocks: 13 % of the work of demo-cpu, 14 % of IOMM-B's is FLUX's.
FLUX_QUARTER = FLUX_AUTOENCODER | dict(
    block_out_channels=(24, 32, 64, 64), layers_per_block=1, norm_num_groups=8, sample_size=256
)
RANDOM = {"flux": FLUX_AUTOENCODER, "flux-quarter": FLUX_QUARTER}


def vae_without_weights(name, patch=2):
    """The VAE that load_vae would load, on the meta device. A hub id counts as the FLUX.1 autoencoder: no network."""
    if name.startswith("pixel:"):
        return load_vae(name)
    if name.startswith("random:"):
        return load_vae(name, patch=patch, device="meta")
    from diffusers import AutoencoderKL

    config = FLUX_AUTOENCODER
    if Path(name).is_dir():
        config = json.loads((Path(find_autoencoder(Path(name))) / "config.json").read_text())
    elif "/" not in name or name.startswith((".", "/", "~")):
        raise InputError(f"model.vae: no folder {name}; give a folder, pixel:<patch>, or a hub id")
    with torch.device("meta"):
        return FluxVAE(AutoencoderKL.from_config(config), patch)


def load_vae(name, *, patch=2, revision=None, dtype=torch.float32, device="cpu", tiling=False):
    """`pixel:<patch>`, a local folder, or a hub id owner/name[/subfolder] -> a frozen VAE. Safetensors only.
    random:<shape> makes one of a known shape (RANDOM) with random weights: for measuring. patch: side of the square of
    latents in a token, of every VAE but pixel:<patch>.

    A folder holds an AutoencoderKL of diffusers, itself or in `vae/`; with a folder nothing is ever downloaded. Raises
    InputError when there is none, or it is of another architecture.
    """
    kind, colon, value = name.partition(":")
    if kind == "random":
        choice("model.vae random:", value, tuple(RANDOM))
        return random_vae(RANDOM[value], dtype, device, patch)
    if colon:
        if kind != "pixel" or not value.isdigit() or int(value) < 1:
            raise InputError(f"model.vae must be pixel:<patch>, a folder or a hub id; got {name!r}")
        return PixelVAE(int(value)).to(device)
    folder = Path(name)
    if folder.is_dir():
        options = {
            "pretrained_model_name_or_path": find_autoencoder(folder),
            "local_files_only": True,
        }
    else:
        owner, *repository = name.split("/", 2)
        if not repository or name.startswith((".", "/", "~")) or not all((owner, *repository)):
            raise InputError(
                f"model.vae: no folder {name}; give a folder, pixel:<patch>, or a hub id such as "
                "black-forest-labs/FLUX.1-dev/vae"
            )
        options = {
            "pretrained_model_name_or_path": f"{owner}/{repository[0]}",
            "revision": revision,
        }
        options |= {"subfolder": repository[1]} if repository[1:] else {}
    # Seconds to import, and a demo needs none of it.
    from diffusers import AutoencoderKL

    try:
        autoencoder, report = AutoencoderKL.from_pretrained(
            **options,
            use_safetensors=True,
            torch_dtype=dtype,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"model.vae: cannot load {name}: {reason}") from error
    # Diffusers would go on with random numbers.
    if report["missing_keys"]:
        raise InputError(
            f"model.vae: {name} lacks the weights {', '.join(sorted(report['missing_keys']))}"
        )
    return FluxVAE(autoencoder, patch, tiling=tiling).to(device)


def random_vae(config, dtype, device, patch=2, seed=0):
    """A VAE of this shape whose weights are drawn on `device`, from a seed, without touching the disk."""
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        return FluxVAE(new_autoencoder(config), patch).to(dtype)


def new_autoencoder(config: dict) -> nn.Module:
    """Return an AutoencoderKL of diffusers to be trained, its weights drawn from torch's global generator."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(config)


def find_autoencoder(folder):
    """The folder or its `vae/`, whichever is an AutoencoderKL in safetensors. Raises InputError if neither is."""
    here = next(
        (place for place in (folder, folder / "vae") if (place / "config.json").is_file()), None
    )
    if here is None:
        raise InputError(
            f"model.vae: {folder} has no config.json; wanted an AutoencoderKL as diffusers saves it"
        )
    try:
        architecture = json.loads((here / "config.json").read_text()).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise InputError(f"model.vae: {here / 'config.json'} is not a JSON object") from error
    if architecture != "AutoencoderKL":
        raise InputError(
            f"model.vae: {here} holds {architecture or 'no diffusers model'}; wanted AutoencoderKL"
        )
    if not any(here.glob("*.safetensors")):
        raise InputError(
            f"model.vae: {here} has no .safetensors file; other formats are not loaded"
        )
    return str(here)
