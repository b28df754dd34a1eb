"""FLOPs and tokens of one sample of a training step, computed only from sizes.

MFU and the dry run are based on these counts. A matrix product of m x k and k x n counts 2 m n k;
norms, activations and softmax count nothing. A backward pass to inputs and weights counts twice its
forward pass. Each module counts itself (MLLM.vit_flops, QueryAdapter.flops and so on).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import nn

from iomm.mllm import IMAGE, TURN

if TYPE_CHECKING:
    from iomm.model import IOMM


def attention_flops(num_queries: float, num_keys: float, width: int) -> float:
    """Return the forward FLOPs of `attend` on one sequence: two products, 2 m n k each."""
    return 4 * num_queries * num_keys * width


def attention_products(block: nn.Module, training: bool) -> int:
    """Return by how much a block's attention_flops are multiplied: 1, or 3 with a backward pass.

    With LoRA, the blocks before the first trained layer have none in training.
    """
    return getattr(block, "attention_products", 3) if training else 1


def linear_flops(module: nn.Module, num_tokens: float, training: bool = False) -> float:
    """Return the FLOPs of all linear layers inside `module` on one sequence.

    They are counted from the layers' sizes, because ZeRO-3 leaves the weights empty. A forward pass
    is one product, and `training` three. With LoRA, `lora.count_products` sets how many a layer
    takes in training.
    """
    return sum(
        (getattr(linear, "products", 3) if training else 1)
        * 2
        * num_tokens
        * linear.in_features
        * linear.out_features
        for linear in module.modules()
        if isinstance(linear, nn.Linear)
    )


def flops_per_image(model: IOMM, size_px: int, num_text: int | None = None, **sample: Any) -> float:
    """Return the FLOPs of one sample of a training step, the sum of `flops_by_part`."""
    return sum(flops_by_part(model, size_px, num_text, **sample).values())


def flops_by_part(
    model: IOMM,
    size_px: int,
    num_text: int | None = None,
    *,
    image: bool = True,
    cached: bool = False,
    tokens_cached: bool = False,
) -> dict[str, float]:
    """Return {part: FLOPs} of one sample of a training step.

    The frozen encoders and the prefix run forward. The queries run forward, and backward to their
    inputs. Adapter, connector, alignment head and generator are trained and count 3 x forward. With
    LoRA, adapter and connector are frozen and run forward, and no gradient reaches the queries.

    Args:
        model: the model, on any device.
        size_px: side of the square image in pixels.
        num_text: text tokens of the sample; None for those of the fixed prompt.
        image: whether the sample is conditioned on its visible image tokens. If not, it is a pair,
            conditioned on its caption, and the ViT runs only if pairs are aligned.
        cached: latents are read from a cache, so the VAE does not run.
        tokens_cached: image tokens are read from a cache, so the ViT does not run.
    """
    (mllm, vae), recipe = model.frozen, model.recipe
    num_prefix, num_condition = condition_tokens(model, num_text, image)
    num_queries = 0 if model.adapter is None else recipe.adapter.num_queries
    aligned = model.alignment is not None and (image or recipe.align.pairs)
    projected = image or recipe.align.target == "projector"
    vit = mllm.vit_flops(projector=projected) if (image or aligned) and not tokens_cached else 0
    grid = vae.grid(size_px, size_px)
    prefix, forward, backward = mllm.decoder_flops(
        num_prefix, num_queries, outputs=recipe.adapter.conditions == "all"
    )
    frozen = bool(recipe.lora.rank)
    parts = {
        "VAE": 0 if cached else vae.flops_per_image(size_px),
        "ViT": vit,
        "MLLM": prefix + forward + (0 if frozen else backward),
        "generator": recipe.noise_draws
        * model.generator.flops_per_image(grid, num_condition, training=True, route=recipe.route),
    }
    if model.adapter is not None:
        parts["adapter"] = (1 if frozen else 3) * model.adapter.flops(num_prefix)
    if model.connector is not None:
        parts["connector"] = (1 if frozen else 3) * model.connector.flops(num_condition)
    if model.alignment is not None:
        parts["align"] = (
            3 * recipe.noise_draws * model.alignment.flops(math.prod(grid)) if aligned else 0
        )
    return parts


def tokens_per_image(
    model: IOMM, size_px: int, num_text: int | None = None, *, image: bool = True
) -> float:
    """Return the number of tokens that the generator reads for one sample.

    Each noise draw reads N latent tokens and C condition tokens, where C is the mean over masks.
    `num_text` and `image` are as in `flops_by_part`.
    """
    num_latents = math.prod(model.frozen[1].grid(size_px, size_px))
    _, num_condition = condition_tokens(model, num_text, image)
    return model.recipe.noise_draws * (num_latents + num_condition)


def condition_tokens(
    model: IOMM, num_text: int | None = None, image: bool = True
) -> tuple[float, float]:
    """Return how many tokens the MLLM reads before the queries, and C of the generator.

    Both are means over masks. `num_text` and `image` are as in `flops_by_part`.
    """
    mllm, mask = model.frozen[0], model.recipe.mask
    if num_text is None:
        prompts = model.recipe.prompt.reconstruct
        lengths = [len(mllm.token_ids("".join(TURN) + "".join(IMAGE) + text)) for text in prompts]
        num_text = sum(lengths) / len(lengths)
    visible = 0
    if image:
        visible = mllm.num_image_tokens * (1 if mask.mode == "zero" else 1 - mask.ratio)
    num_prefix = num_text + visible
    num_condition = 0 if model.adapter is None else model.recipe.adapter.num_queries
    if model.recipe.adapter.conditions == "all":
        num_condition = num_condition + num_prefix
    return num_prefix, num_condition
