"""The frozen VAE between pixels and latents: FLUX's or Qwen-Image's, or pixels as they are.

A latent token is `patch` x `patch` latents; kernels/noisy_tokens packs and unpacks them. Of this
package, only this module may import diffusers.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iomm.config import InputError, choice
from iomm.layers import at_least_float32
from iomm.mllm import Frozen
from iomm.weights import STEM, move_frozen, stored_dtype

# cuDNN's and FlashAttention's attention take heads of at most this width.
FUSED_HEAD_DIM = 256
# Query-key pairs of one sample whose scores exist at a time: those of 96 x 96 latents, an image of
# 768 px.
MAX_PAIRS = 96**4


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


class Autoencoder(Latents, Frozen):
    """A frozen autoencoder of diffusers, between pixels in [-1, 1] and latents.

    Pixels are (B, 3, H, W). Latents have about unit variance: subclasses standardize those of the
    autoencoder with the statistics of its checkpoint.
    """

    def compile_parts(self, backend: str = "inductor") -> None:
        """Compile the encoder into one graph with torch.compile."""
        self.backbone.encoder.compile(fullgraph=True, backend=backend)

    @torch.no_grad()
    def encode(self, pixels_BCHW: Tensor, noise_BCHW: Tensor | None = None) -> Tensor:
        """Return latents (B, channels, H / factor, W / factor) in at least float32.

        Pixels that are rounded to the backbone's dtype already give the same latents. They are the
        posterior's mean or, with standard normal noise of the latents' shape, a sample
        of the posterior.

        Raises:
            InputError: unless factor x patch divides both sides.
        """
        self.grid(*pixels_BCHW.shape[-2:])
        posterior = self.backbone.encode(self.to_backbone(pixels_BCHW)).latent_dist
        dtype = torch.promote_types(pixels_BCHW.dtype, torch.float32)
        latents = self.from_backbone(posterior.mean).to(dtype)
        if noise_BCHW is not None:
            std = self.from_backbone(posterior.std).to(latents.dtype)
            latents = latents + std * noise_BCHW.to(latents.dtype)
        return self.standardize(latents).contiguous()

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Return pixels (B, 3, H, W) in the latents' dtype, in about [-1, 1]."""
        latents = self.to_backbone(self.destandardize(latents_BCHW))
        pixels = self.from_backbone(self.backbone.decode(latents).sample)
        return pixels.to(latents_BCHW.dtype).contiguous()

    def to_backbone(self, x_BCHW: Tensor) -> Tensor:
        """Return a batch as the autoencoder takes it, in the dtype of its weights."""
        raise NotImplementedError

    def from_backbone(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W) of what the autoencoder returns."""
        raise NotImplementedError

    def standardize(self, latents_BCHW: Tensor) -> Tensor:
        """Return the autoencoder's latents with about unit variance."""
        raise NotImplementedError

    def destandardize(self, latents_BCHW: Tensor) -> Tensor:
        """Invert `standardize`."""
        raise NotImplementedError


def wide_attention(q_BLE: Tensor, k_BLE: Tensor, v_BLE: Tensor) -> Tensor:
    """Return softmax attention (B, L, E) of one head by two products and a softmax. No gradient.

    Scores are float32 and weights are rounded to the dtype of v, as in fused kernels. Both are kept
    at a time for at most MAX_PAIRS query-key pairs per sample, 6 bytes each with 16-bit inputs:
    96 MiB per sample at 64 x 64 latents (512 px), 384 MiB at 128 x 128 and at most 486 MiB. An
    encoder of FLUX's shape needs more than that at its first level (254 MiB per image at 512 px,
    and as many as there are pixels), so this does not raise its peak.
    """
    length = q_BLE.shape[1]
    if length * k_BLE.shape[1] > MAX_PAIRS:
        halves = q_BLE[:, : length // 2], q_BLE[:, length // 2 :]
        return torch.cat([wide_attention(half, k_BLE, v_BLE) for half in halves], dim=1)
    keys_BEL = k_BLE.transpose(1, 2)
    if q_BLE.is_cuda and q_BLE.dtype.itemsize == 2:
        scores_BLL = torch.bmm(q_BLE, keys_BEL, out_dtype=torch.float32)
    else:
        scores_BLL = at_least_float32(q_BLE) @ at_least_float32(keys_BEL)
    weights_BLL = (scores_BLL * q_BLE.shape[-1] ** -0.5).softmax(-1)
    return weights_BLL.to(v_BLE.dtype) @ v_BLE


class WideHead:
    """A processor of diffusers' Attention over a feature map with one head above FUSED_HEAD_DIM.

    In 16 bits on a GPU, PyTorch's attention falls back to its memory-efficient kernel for such a
    head; `wide_attention` computes the same. Elsewhere the original processor runs.
    """

    def __init__(self, original: Any):
        self.original = original

    def __call__(
        self,
        attention: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Return the feature map (B, C, H, W) after attention. It takes diffusers' arguments."""
        x_BCHW = hidden_states
        if not (x_BCHW.is_cuda and x_BCHW.dtype.itemsize == 2):
            return self.original(
                attention, x_BCHW, encoder_hidden_states, attention_mask, temb=temb
            )
        return self.attend(attention, x_BCHW)

    def attend(self, attention: nn.Module, x_BCHW: Tensor) -> Tensor:
        """Return the same by `wide_attention`."""
        x_BCL = x_BCHW.flatten(2)
        x_BLC = attention.group_norm(x_BCL).transpose(1, 2)
        q_BLC, k_BLC, v_BLC = (
            linear(x_BLC) for linear in (attention.to_q, attention.to_k, attention.to_v)
        )
        # The second layer of to_out is a dropout, which a frozen VAE does not apply.
        y_BLC = attention.to_out[0](wide_attention(q_BLC, k_BLC, v_BLC))
        y_BCHW = y_BLC.transpose(1, 2).unflatten(2, x_BCHW.shape[2:])
        return (x_BCHW + y_BCHW) / attention.rescale_output_factor


def use_wide_heads(autoencoder: nn.Module) -> None:
    """Let `WideHead` run the self-attention of an AutoencoderKL where its head is that wide."""
    for part in autoencoder.modules():
        if not (hasattr(part, "set_processor") and hasattr(part, "to_q")):
            continue
        is_wide = part.heads == 1 and part.to_q.out_features > FUSED_HEAD_DIM
        others = part.spatial_norm, part.norm_q, part.norm_k
        if is_wide and part.residual_connection and part.group_norm and others == (None,) * 3:
            part.set_processor(WideHead(part.processor))


class FluxVAE(Autoencoder):
    """A frozen AutoencoderKL of diffusers.

    Latents are (z - shift) * scale. Scale and shift are read from the checkpoint; FLUX's are 0.3611
    and 0.1159. The shift is 0 if the checkpoint has none. Decoded pixels are not clipped.
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
        use_wide_heads(autoencoder)
        if tiling:
            autoencoder.enable_tiling()

    def to_backbone(self, x_BCHW: Tensor) -> Tensor:
        """Return a batch in the memory format and dtype of the weights."""
        return x_BCHW.to(dtype=self.backbone.dtype, memory_format=torch.channels_last)

    def from_backbone(self, x_BCHW: Tensor) -> Tensor:
        """Return the batch unchanged."""
        return x_BCHW

    def standardize(self, latents_BCHW: Tensor) -> Tensor:
        """Return (z - shift) * scale."""
        return (latents_BCHW - self.shift) * self.scale

    def destandardize(self, latents_BCHW: Tensor) -> Tensor:
        """Return z of its standardized value."""
        return latents_BCHW / self.scale + self.shift

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


class QwenVAE(Autoencoder):
    """A frozen AutoencoderKLQwenImage of diffusers, a video autoencoder, on single images.

    Latents are (z - mean) / std with the mean and standard deviation of each channel in the
    checkpoint's config. Decoded pixels are clipped to [-1, 1], as in diffusers.
    """

    def __init__(self, autoencoder: nn.Module, patch: int = 2, tiling: bool = False):
        """Freeze an autoencoder.

        Args:
            autoencoder: the AutoencoderKLQwenImage. Its convolutions over time are reduced to the
                weights that a single image reaches, which changes no result.
            patch: side of the square of latents in a token. Qwen-Image packs 2 x 2.
            tiling: encode and decode images above 256 px in overlapping tiles of 256 px. This takes
                less memory; results are close but not equal.
        """
        super().__init__(autoencoder)
        config = autoencoder.config
        self.patch = patch
        self.channels = config.z_dim
        self.factor = 2 ** len(config.temperal_downsample)
        # float32, as in diffusers, whatever the dtype of the weights.
        for name, values in (("mean", config.latents_mean), ("std", config.latents_std)):
            statistics = torch.tensor(values, dtype=torch.float32, device=autoencoder.device)
            self.register_buffer(name, statistics[:, None, None], persistent=False)
        keep_last_frame(autoencoder)
        if tiling:
            autoencoder.enable_tiling()

    def to_backbone(self, x_BCHW: Tensor) -> Tensor:
        """Return a batch as videos of one frame, in the dtype of the weights."""
        return x_BCHW[:, :, None].to(self.backbone.dtype)

    def from_backbone(self, x_BCTHW: Tensor) -> Tensor:
        """Return the only frame."""
        return x_BCTHW[:, :, 0]

    def standardize(self, latents_BCHW: Tensor) -> Tensor:
        """Return (z - mean) / std."""
        mean, std = (x.to(latents_BCHW.dtype) for x in (self.mean, self.std))
        return (latents_BCHW - mean) / std

    def destandardize(self, latents_BCHW: Tensor) -> Tensor:
        """Return z of its standardized value."""
        mean, std = (x.to(latents_BCHW.dtype) for x in (self.mean, self.std))
        return latents_BCHW * std + mean

    def flops_per_image(self, size_px: int, decode: bool = False) -> int:
        """Return the forward FLOPs of encoding (or decoding) one square image, without tiling.

        Each matrix product counts 2 m n k.
        """
        latent_side = size_px // self.factor
        coder = self.backbone.decoder if decode else self.backbone.encoder
        quant_conv = self.backbone.post_quant_conv if decode else self.backbone.quant_conv
        side = latent_side if decode else size_px
        total = product_flops(quant_conv, latent_side) + product_flops(coder.conv_in, side)
        if decode:
            total += product_flops(coder.mid_block, side)
            for block in coder.up_blocks:
                total += product_flops(block.resnets, side)
                if block.upsamplers:
                    side *= 2
                    total += product_flops(block.upsamplers[0].resample, side)
        else:
            for layer in coder.down_blocks:
                if hasattr(layer, "resample"):
                    side //= 2
                    total += product_flops(layer.resample, side)
                else:
                    total += product_flops(layer, side)
            total += product_flops(coder.mid_block, side)
        return total + product_flops(coder.conv_out, side)


@torch.no_grad()
def keep_last_frame(autoencoder: nn.Module) -> None:
    """Reduce the causal convolutions of an AutoencoderKLQwenImage to the last frame they see.

    They pad a single image in front with frames of zeros, so only the last slice of the kernel
    reaches it: a third of the products. Convolutions that a single image never reaches are left.
    """
    for name, part in autoencoder.named_modules():
        if isinstance(part, nn.Conv3d) and not name.endswith("time_conv"):
            *sides, front, back = part._padding
            assert front == part.kernel_size[0] - 1 and not back
            part.weight = nn.Parameter(part.weight[:, :, -1:].clone(), requires_grad=False)
            part._padding = (*sides, 0, 0)


def product_flops(module: nn.Module, side: int) -> int:
    """Return the FLOPs of every matrix product inside `module` on a side x side map.

    Each weight counts 2 per position, and attention adds its two products.
    """
    total = 0
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Conv3d, nn.Linear)):
            total += 2 * side**2 * part.weight.numel()
        if hasattr(part, "to_q"):
            total += 4 * side**4 * part.to_q.out_features
        if hasattr(part, "to_qkv"):
            total += 4 * side**4 * part.to_qkv.out_channels // 3
    return total


# {name of diffusers' class: our class}.
AUTOENCODERS = {"AutoencoderKL": FluxVAE, "AutoencoderKLQwenImage": QwenVAE}


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
# Qwen-Image's autoencoder: the defaults of diffusers' class.
QWEN_AUTOENCODER = dict(_class_name="AutoencoderKLQwenImage")
# Shapes of random:<shape>.
RANDOM_SHAPES = {
    "flux": FLUX_AUTOENCODER,
    "flux-quarter": FLUX_QUARTER,
    "qwen-image": QWEN_AUTOENCODER,
}


def vae_without_weights(name: str, patch: int = 2) -> PixelVAE | Autoencoder:
    """Return the VAE that `load_vae` would load, on the meta device.

    A hub id of Qwen/Qwen-Image is taken to be its autoencoder and any other to be FLUX.1's, so no
    network is needed.

    Raises:
        InputError: if `name` can be neither a folder nor a hub id.
    """
    if name.startswith("pixel:"):
        return load_vae(name)
    if name.startswith("random:"):
        return load_vae(name, patch=patch, device="meta")
    config = QWEN_AUTOENCODER if name.startswith("Qwen/Qwen-Image") else FLUX_AUTOENCODER
    if Path(name).is_dir():
        config = json.loads((Path(find_autoencoder(Path(name))) / "config.json").read_text())
    elif "/" not in name or name.startswith((".", "/", "~")):
        raise no_folder(name)
    with torch.device("meta"):
        return frozen_vae(new_autoencoder(config), patch)


def frozen_vae(autoencoder: nn.Module, patch: int, tiling: bool = False) -> Autoencoder:
    """Return the frozen VAE around an autoencoder of diffusers."""
    return AUTOENCODERS[type(autoencoder).__name__](autoencoder, patch, tiling)


def load_vae(
    name: str,
    *,
    patch: int = 2,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    tiling: bool = False,
) -> PixelVAE | Autoencoder:
    """Load a frozen VAE. Only safetensors are read.

    Weights are placed as in `weights.load_frozen`, but kernels of convolutions are copied to
    channels_last.

    Args:
        name: one of
            - pixel:<patch>;
            - a local folder that holds an AutoencoderKL or AutoencoderKLQwenImage of diffusers,
              itself or in `vae/`. Nothing is downloaded;
            - a hub id owner/name[/subfolder];
            - random:<shape> for random weights of a known shape (RANDOM_SHAPES), which is useful
              only for measurements.
        patch: side of the square of latents in a token, except for pixel:<patch>.
        revision: commit of the hub checkpoint.
        dtype: dtype of the weights.
        device: device of the weights.
        tiling: encode and decode large images in tiles (`FluxVAE`, `QwenVAE`).

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
        path, options = find_autoencoder(folder), {"local_files_only": True}
    else:
        owner, *repository = name.split("/", 2)
        if not repository or name.startswith((".", "/", "~")) or not all((owner, *repository)):
            raise no_folder(name)
        path, options = f"{owner}/{repository[0]}", {"revision": revision}
        if repository[1:]:
            options["subfolder"] = repository[1]
    # Imported here because it takes seconds and a pixel VAE does not need it.
    import diffusers

    stored = stored_dtype(
        path, STEM, revision=options.get("revision"), subfolder=options.get("subfolder", "")
    )
    try:
        architecture = diffusers.AutoencoderKL.load_config(path, **options).get("_class_name")
        if architecture not in AUTOENCODERS:
            raise ValueError(f"it is a {architecture}. Expected {' or '.join(AUTOENCODERS)}")
        autoencoder, report = getattr(diffusers, architecture).from_pretrained(
            path,
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
    return frozen_vae(autoencoder, patch, tiling)


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
) -> Autoencoder:
    """Return a VAE of this shape with weights drawn from a seed on `device`.

    Nothing is read from or written to the disk.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        return frozen_vae(new_autoencoder(config).to(dtype), patch)


def new_autoencoder(config: dict[str, Any]) -> nn.Module:
    """Return the autoencoder that diffusers' config.json describes, by default an AutoencoderKL.

    Its weights are drawn from torch's global generator.
    """
    import diffusers

    return getattr(diffusers, config.get("_class_name", "AutoencoderKL")).from_config(config)


def find_autoencoder(folder: Path) -> str:
    """Return the folder or its `vae/`, whichever holds an autoencoder in safetensors.

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
    if architecture not in AUTOENCODERS:
        raise InputError(
            f"model.vae: {here} holds {architecture or 'no diffusers model'}. "
            f"Expected {' or '.join(AUTOENCODERS)}."
        )
    if not any(here.glob("*.safetensors")):
        raise InputError(
            f"model.vae: {here} has no .safetensors file. Other formats are not supported."
        )
    return str(here)
