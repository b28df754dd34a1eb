"""Small random models and pixels that several test files use."""

from dataclasses import fields, is_dataclass

import torch

from iomm.adapter import Connector, QueryAdapter
from iomm.config import AdapterConfig, GeneratorConfig, MaskConfig
from iomm.generator import new_generator
from iomm.model import IOMM, Recipe
from iomm.vae import load_vae

# The MLLM's vision and text configs, for iomm.engine.shapes.mllm.create_mllm.
VISION = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=96,
    image_size=32,
    patch_size=4,
    attention_bias=True,
)
TEXT = dict(
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=80,
    max_position_embeddings=256,
)
# Keys of the FLUX VAE's config that differ from diffusers' defaults.
FLUX_VAE = dict(
    scaling_factor=0.3611,
    shift_factor=0.1159,
    latent_channels=16,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
SIZE = 32


def build(mllm, ratio=0.5, mode="drop", generator="mmdit", **adapter_settings):
    """Return an IOMM of two blocks on `mllm` in pixel space, with random weights everywhere.

    A fresh generator predicts zero for any condition, which would hide a wrong condition.
    """
    settings = AdapterConfig(num_queries=8, head_dim=16, **adapter_settings)
    shape = GeneratorConfig(
        kind=generator, width=64, num_heads=2, num_blocks=2, token_dim=48, condition_dim=mllm.width
    )
    parts = [
        new_generator(shape, 0),
        None if settings.kind == "none" else QueryAdapter(settings, mllm.width),
        Connector(settings, mllm.width) if settings.connector_layers else None,
    ]
    draw = torch.Generator().manual_seed(0)
    for part in filter(None, parts):
        part.init_weights(0)
        with torch.no_grad():
            for p in part.parameters():
                p.add_(torch.randn(p.shape, generator=draw) * 0.05)
    recipe = Recipe(seed=3, mask=MaskConfig(ratio=ratio, mode=mode), adapter=settings)
    return IOMM(parts[0], parts[1], mllm, load_vae("pixel:4"), recipe, parts[2])


def pixels(n_B):
    """Return random pixels of the samples n_B for the VAE and for the ViT.

    The shapes are (B, 3, SIZE, SIZE) and (B, 3, 32, 32).
    """
    return (
        torch.stack(
            [
                torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(int(n))) * 2 - 1
                for n in n_B
            ]
        ),
        torch.stack(
            [torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(int(n))) for n in n_B]
        ),
    )


def autoencoder(widths=(8, 8, 16, 16), **changes):
    """Return a random AutoencoderKL of diffusers with FLUX's layout, the same in each call."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKL(
            block_out_channels=widths,
            down_block_types=["DownEncoderBlock2D"] * len(widths),
            up_block_types=["UpDecoderBlock2D"] * len(widths),
            norm_num_groups=4,
            **{**FLUX_VAE, **changes},
        )


def qwen_autoencoder():
    """Return a random AutoencoderKLQwenImage of diffusers, the same in each call.

    It has Qwen-Image's layout and narrow layers.
    """
    from diffusers import AutoencoderKLQwenImage

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1).eval()


def walk(value):
    """Yield every tensor inside dataclasses, tuples and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    for item in value if isinstance(value, (list, tuple)) else ():
        yield from walk(item)
