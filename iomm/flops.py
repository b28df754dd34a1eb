"""FLOPs and tokens of one sample of a training step, from sizes alone: what MFU and the dry run are computed from.

A matrix product of m x k and k x n counts 2 m n k; norms, activations and softmax count nothing. A backward pass to inputs
and weights counts twice its forward pass. The parts count themselves (MLLM.vit_flops, QueryAdapter.flops and so on).
"""

import math

from torch import nn

from iomm.mllm import IMAGE, RECONSTRUCT, TURN


def attention_flops(num_queries, num_keys, width):
    """Forward FLOPs of `attend` on one sequence: two products, 2 m n k each."""
    return 4 * num_queries * num_keys * width


def linear_flops(module, num_tokens):
    """Forward FLOPs of all linears inside `module` on one sequence. From their sizes: ZeRO-3 leaves weights empty."""
    linears = [part for part in module.modules() if isinstance(part, nn.Linear)]
    return sum(2 * num_tokens * linear.in_features * linear.out_features for linear in linears)


def flops_per_image(model, size_px, num_text=None, **sample):
    """Return the FLOPs that one sample of a training step needs: the sum of flops_by_part."""
    return sum(flops_by_part(model, size_px, num_text, **sample).values())


def flops_by_part(model, size_px, num_text=None, *, image=True, cached=False, tokens_cached=False):
    """Return {part: FLOPs} that one sample of a training step of an IOMM needs.

    Frozen encoders and the prefix run forward, the queries forward and backward to their inputs; adapter, connector,
    alignment head and generator train (3 x forward).

    Args:
        num_text: text tokens of the sample; None to ask the tokenizer for the fixed prompt's.
        image: conditioned on its visible image tokens; else a pair, on its caption alone, without ViT unless pairs are
            aligned.
        cached: latents are read, without VAE.
        tokens_cached: image tokens are read, without ViT.
    """
    (mllm, vae), recipe = model.frozen, model.recipe
    num_prefix, num_condition = condition_tokens(model, num_text, image)
    num_queries = 0 if model.adapter is None else recipe.adapter.num_queries
    aligned = model.alignment is not None and (image or recipe.align.pairs)
    projected = image or recipe.align.target == "projector"
    vit = mllm.vit_flops(projector=projected) if (image or aligned) and not tokens_cached else 0
    grid = vae.grid(size_px, size_px)
    parts = {
        "VAE": 0 if cached else vae.flops_per_image(size_px),
        "ViT": vit,
        "MLLM": sum(
            mllm.decoder_flops(num_prefix, num_queries, outputs=recipe.adapter.conditions == "all")
        ),
        "generator": 3 * recipe.noise_draws * model.generator.flops_per_image(grid, num_condition),
    }
    if model.adapter is not None:
        parts["adapter"] = 3 * model.adapter.flops(num_prefix)
    if model.connector is not None:
        parts["connector"] = 3 * model.connector.flops(num_condition)
    if model.alignment is not None:
        parts["align"] = (
            3 * recipe.noise_draws * model.alignment.flops(math.prod(grid)) if aligned else 0
        )
    return parts


def tokens_per_image(model, size_px, num_text=None, *, image=True):
    """Return the tokens that the generator reads of one sample: latent tokens N + condition tokens C, the latter in the
    mean over masks, in each of its noise draws. num_text and image as in flops_by_part.
    """
    once = (
        math.prod(model.frozen[1].grid(size_px, size_px))
        + condition_tokens(model, num_text, image)[1]
    )
    return model.recipe.noise_draws * once


def condition_tokens(model, num_text=None, image=True):
    """Return (tokens before the queries, C): what the MLLM reads of a sample and what the generator reads of the MLLM, in
    the mean over masks.
    """
    mllm, mask = model.frozen[0], model.recipe.mask
    text = (
        len(mllm.token_ids("".join(TURN) + "".join(IMAGE) + RECONSTRUCT))
        if num_text is None
        else num_text
    )
    shown = mllm.num_image_tokens * (1 if mask.mode == "zero" else 1 - mask.ratio) if image else 0
    num_queries = 0 if model.adapter is None else model.recipe.adapter.num_queries
    return text + shown, num_queries + (
        text + shown if model.recipe.adapter.conditions == "all" else 0
    )
