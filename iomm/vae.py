"""The frozen VAE between pixels and latents: the FLUX autoencoder, or pixels as they are.

A latent token is `patch` x `patch` latents; kernels/noisy_tokens packs and unpacks them. Of this
package, only this module may import diffusers.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iomm.config import InputError, choice
from iomm.mllm import Frozen
from iomm.weights import STEM, move_frozen, stored_dtype


class Latents:
    """Base class of every VAE: the geometry of its latents.

    Attributes:
        channels: channels of the latents.
        factor: pixels per latent, along each side.
        patch: latents per token, along each side.
    """

    channels: int
    factor: int
    patch: int

    @property
    def token_dim(self) -> int:
        """K, values in one latent token."""
        return self.channels * self.patch**2

    def grid(self, height_px: int, width_px: int) -> tuple[int, int]:
        """Return the (rows, columns) of latent tokens of an image.

        Raises:
            InputError: unless factor x patch divides both sides.
        """
        side = self.factor * self.patch
        if height_px % side or width_px % side or min(height_px, width_px) < side:
            raise InputError(
                f"image size must be a positive multiple of {side} px, got {height_px} x {width_px}"
            )
        return height_px // side, width_px // side


class PixelVAE(Latents, nn.Module):
    """The identity: latents are the pixels (B, 3, H, W) in [-1, 1].

    It is for small datasets that need no autoencoder.
    """

    channels = 3
    factor = 1

    def __init__(self, patch: int):
        super().__init__()
        self.patch = patch

    def compile_parts(self, backend: str = "inductor") -> None:
        """Do nothing, as there is nothing to compile."""

    def encode(self, pixels_BCHW: Tensor, noise_BCHW: Tensor | None = None) -> Tensor:
        """Return the pixels unchanged."""
        return pixels_BCHW

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Return the latents unchanged."""
        return latents_BCHW

    def flops_per_image(self, size_px: int, decode: bool = False) -> int:
        """Return 0."""
        return 0


class FluxVAE(Latents, Frozen):
    """A frozen AutoencoderKL of diffusers, between pixels in [-1, 1] and latents.

    Pixels are (B, 3, H, W). Latents are (z - shift) * scale, with about unit variance. Scale and
    shift are read from the checkpoint; FLUX's are 0.3611 and 0.1159. The shift is 0 if the
    checkpoint has none.
    """

    def __init__(self, autoencoder: nn.Module, patch: int = 2, tiling: bool = False):
        """Freeze an autoencoder.

        Args:
            autoencoder: the AutoencoderKL.
            patch: side of the square of latents in a token. FLUX packs 2 x 2.
            tiling: encode and decode images larger than the checkpoint's sample size in overlapping
                tiles of that size. This takes less memory; results are close but not equal.
        """
        super().__init__(autoencoder.to(memory_format=torch.channels_last))
        config = autoencoder.config
        self.patch = patch
        self.channels = config.latent_channels
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.scale = config.scaling_factor
        self.shift = config.shift_factor or 0.0
        if tiling:
            autoencoder.enable_tiling()

    def compile_parts(self, backend: str = "inductor") -> None:
        """Compile the encoder into one graph with torch.compile."""
        self.backbone.encoder.compile(fullgraph=True, backend=backend)

    def like_weights(self, x_BCHW: Tensor) -> Tensor:
        """Return a batch in the memory format and dtype of the weights."""
        return x_BCHW.to(dtype=self.backbone.dtype, memory_format=torch.channels_last)

    @torch.no_grad()
    def encode(self, pixels_BCHW: Tensor, noise_BCHW: Tensor | None = None) -> Tensor:
        """Return latents (B, channels, H / factor, W / factor) in the input's dtype.

        They are the posterior's mean or, with standard normal noise of the latents' shape, a sample
        of the posterior.

        Raises:
            InputError: unless factor x patch divides both sides.
        """
        self.grid(*pixels_BCHW.shape[-2:])
        posterior = self.backbone.encode(self.like_weights(pixels_BCHW)).latent_dist
        latents = posterior.mean.to(pixels_BCHW.dtype)
        if noise_BCHW is not None:
            latents = latents + posterior.std.to(latents.dtype) * noise_BCHW.to(latents.dtype)
        return ((latents - self.shift) * self.scale).contiguous()

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Return pixels (B, 3, H, W) in the latents' dtype, in about [-1, 1] but not clipped."""
        pixels = self.backbone.decode(
            self.like_weights(latents_BCHW / self.scale + self.shift)
        ).sample
        return pixels.to(latents_BCHW.dtype).contiguous()

    def flops_per_image(self, size_px: int, decode: bool = False) -> int:
        """Return the forward FLOPs of encoding (or decoding) one square image, without tiling.

        Each matrix product counts 2 m n k.
        """
        latent_side = size_px // self.factor
        if decode:
            coder, side = self.backbone.decoder, latent_side
            quant_conv = self.backbone.post_quant_conv
        else:
            coder, side = self.backbone.encoder, size_px
            quant_conv = self.backbone.quant_conv
        total = 0 if quant_conv is None else product_flops(quant_conv, latent_side)
        if decode:
            total += product_flops(coder.conv_in, side) + product_flops(coder.mid_block, side)
            for block in coder.up_blocks:
                total += product_flops(block.resnets, side)
                if block.upsamplers:
                    side *= 2
                    total += product_flops(block.upsamplers, side)
        else:
            total += product_flops(coder.conv_in, side)
            for block in coder.down_blocks:
                total += product_flops(block.resnets, side)
                if block.downsamplers:
                    side //= 2
                    total += product_flops(block.downsamplers, side)
            total += product_flops(coder.mid_block, side)
        return total + product_flops(coder.conv_out, side)


def product_flops(module: nn.Module, side: int) -> int:
    """Return the FLOPs of every matrix product inside `module` on a side x side map.

    Each weight counts 2 per position, and attention adds its two products.
    """
    total = 0
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            total += 2 * side**2 * part.weight.numel()
        if hasattr(part, "to_q"):
            total += 4 * side**4 * part.to_q.out_features
    return total


# The autoencoder of FLUX.1, the same in dev and schnell.
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


# A fifth to an eighth of FLUX's widths and half of its residual blocks. This VAE takes 13 % of the
# FLOPs of demo-cpu, close to the 14 % that FLUX's takes of IOMM-B's.
FLUX_QUARTER = FLUX_AUTOENCODER | dict(
    block_out_channels=(24, 32, 64, 64), layers_per_block=1, norm_num_groups=8, sample_size=256
)
# Shapes of random:<shape>.
RANDOM_SHAPES = {"flux": FLUX_AUTOENCODER, "flux-quarter": FLUX_QUARTER}


def vae_without_weights(name: str, patch: int = 2) -> PixelVAE | FluxVAE:
    """Return the VAE that `load_vae` would load, on the meta device.

    Any hub id is taken to be the FLUX.1 autoencoder, so no network is needed.

    Raises:
        InputError: if `name` can be neither a folder nor a hub id.
    """
    if name.startswith("pixel:"):
        return load_vae(name)
    if name.startswith("random:"):
        return load_vae(name, patch=patch, device="meta")
    from diffusers import AutoencoderKL

    config = FLUX_AUTOENCODER
    if Path(name).is_dir():
        config = json.loads((Path(find_autoencoder(Path(name))) / "config.json").read_text())
    elif "/" not in name or name.startswith((".", "/", "~")):
        raise no_folder(name)
    with torch.device("meta"):
        return FluxVAE(AutoencoderKL.from_config(config), patch)


def load_vae(
    name: str,
    *,
    patch: int = 2,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    tiling: bool = False,
) -> PixelVAE | FluxVAE:
    """Load a frozen VAE. Only safetensors are read.

    Weights are placed as in `weights.load_frozen`, but kernels of convolutions are copied to
    channels_last.

    Args:
        name: one of
            - pixel:<patch>;
            - a local folder that holds an AutoencoderKL of diffusers, itself or in `vae/`. Nothing
              is downloaded;
            - a hub id owner/name[/subfolder];
            - random:<shape> for random weights of a known shape (RANDOM_SHAPES), which is useful
              only for measurements.
        patch: side of the square of latents in a token, except for pixel:<patch>.
        revision: commit of the hub checkpoint.
        dtype: dtype of the weights.
        device: device of the weights.
        tiling: encode and decode large images in tiles (`FluxVAE`).

    Raises:
        InputError: if there is no such VAE or it has another architecture.
    """
    kind, colon, value = name.partition(":")
    if kind == "random":
        choice("model.vae random:", value, tuple(RANDOM_SHAPES))
        return random_vae(RANDOM_SHAPES[value], dtype, device, patch)
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
            raise no_folder(name)
        options = {
            "pretrained_model_name_or_path": f"{owner}/{repository[0]}",
            "revision": revision,
        }
        if repository[1:]:
            options["subfolder"] = repository[1]
    # Imported here because it takes seconds and a pixel VAE does not need it.
    from diffusers import AutoencoderKL

    stored = stored_dtype(
        options["pretrained_model_name_or_path"],
        STEM,
        revision=options.get("revision"),
        subfolder=options.get("subfolder", ""),
    )
    try:
        autoencoder, report = AutoencoderKL.from_pretrained(
            **options,
            use_safetensors=True,
            # Other dtypes are cast on the host, all at once.
            torch_dtype=stored or dtype,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"model.vae: cannot load {name}: {reason}") from error
    # Diffusers would initialize missing weights at random.
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"]))
        raise InputError(f"model.vae: {name} lacks the weights {missing}")
    move_frozen(autoencoder, device, dtype)
    return FluxVAE(autoencoder, patch, tiling=tiling)


def no_folder(name: str) -> InputError:
    """Return the error for a name that is neither a folder nor a hub id."""
    return InputError(
        f"model.vae: no folder {name}. Give an existing folder, pixel:<patch>, or a hub id such as "
        "black-forest-labs/FLUX.1-dev/vae."
    )


def random_vae(
    config: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device | str,
    patch: int = 2,
    seed: int = 0,
) -> FluxVAE:
    """Return a VAE of this shape with weights drawn from a seed on `device`.

    Nothing is read from or written to the disk.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        return FluxVAE(new_autoencoder(config), patch).to(dtype)


def new_autoencoder(config: dict[str, Any]) -> nn.Module:
    """Return an AutoencoderKL to be trained, with weights from torch's global generator."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(config)


def find_autoencoder(folder: Path) -> str:
    """Return the folder or its `vae/`, whichever holds an AutoencoderKL in safetensors.

    Raises:
        InputError: if neither does.
    """
    here = next(
        (place for place in (folder, folder / "vae") if (place / "config.json").is_file()), None
    )
    if here is None:
        raise InputError(
            f"model.vae: {folder} has no config.json. Expected an AutoencoderKL saved by diffusers."
        )
    try:
        architecture = json.loads((here / "config.json").read_text()).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise InputError(f"model.vae: {here / 'config.json'} is not a JSON object") from error
    if architecture != "AutoencoderKL":
        raise InputError(
            f"model.vae: {here} holds {architecture or 'no diffusers model'}. "
            "Expected an AutoencoderKL."
        )
    if not any(here.glob("*.safetensors")):
        raise InputError(
            f"model.vae: {here} has no .safetensors file. Other formats are not supported."
        )
    return str(here)
