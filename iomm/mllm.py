"""The frozen multimodal LLM: image tokens, text tokens, and the prefix and query passes.

The prefix (prompt and image tokens) runs without gradients, the queries with them. The weights stay
in transformers' own modules, which internvl.py loads or creates. The two passes over them are
implemented here because no library runs a packed, gradient-free prefix followed by queries that
attend to it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iomm.config import InputError
from iomm.kernels.image_patches import image_patches, normalised
from iomm.kernels.masked_attention import masked_attention
from iomm.kernels.masked_attention.sdpa import DenseLayout, padded_attention, ragged_layout
from iomm.layers import round_linears
from iomm.turns import Turns, pack_turns

# One user turn, then the start of the assistant's turn, where the queries are placed: the Qwen2.5
# chat format without a system prompt.
TURN = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
IMAGE = ("<img>", "</img>")
# ImageNet's statistics, with which InternVL was trained.
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Keys and values of every decoder layer: [(k_TGE, v_TGE)].
Cache = list[tuple[Tensor, Tensor]]
# Rotary cosines and sines (1, T, E).
Rotary = tuple[Tensor, Tensor]


class Frozen(nn.Module):
    """A backbone that never trains and always stays in eval mode, even after model.train()."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        return super().train(False)


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Condition tokens of a batch, packed: sample b has rows offsets[b] to offsets[b + 1].

    Attributes:
        tokens_TD: embeddings.
        positions_T: position ids (int64), with gaps where tokens were dropped.
        offsets: first row of each sample and the end of the last, (B + 1,) int32.
        lengths: number of rows of each sample, on the host. Reading them from the GPU would wait
            for everything queued there.
        end_B: position id of the first token after each sample (int64).
        end: the largest of end_B, on the host.
    """

    tokens_TD: Tensor
    positions_T: Tensor
    offsets: Tensor
    lengths: tuple[int, ...]
    end_B: Tensor
    end: int

    @property
    def batch(self) -> int:
        """Number of samples."""
        return len(self.lengths)


class MLLM(Frozen):
    """A frozen InternVL (ViT, projector, Qwen2 or Qwen3 decoder) without language-model head.

    The modules are transformers' own.

    Attributes:
        width: D of the decoder.
        num_image_tokens: P, image tokens per image.
        vit_px: side of the ViT's square input in pixels.
        vit_width: W, width of the ViT's hidden states.
        max_positions: context length of the decoder.
    """

    def __init__(self, internvl: nn.Module, tokenizer: Any):
        super().__init__(internvl)
        config = internvl.config
        if config.text_config.model_type not in ("qwen2", "qwen3"):
            raise InputError(
                "model.mllm: the decoder must be qwen2 or qwen3, "
                f"got {config.text_config.model_type}"
            )
        if config.vision_feature_layer != -1 or config.vision_feature_select_strategy != "default":
            raise InputError(
                "model.mllm: the image tokens must come from the ViT's last layer without the "
                f"class token, got layer {config.vision_feature_layer}, "
                f"strategy {config.vision_feature_select_strategy}"
            )
        self.tokenizer = tokenizer
        self.width = config.text_config.hidden_size
        self.vit_px = config.vision_config.image_size[0]
        self.vit_width = config.vision_config.hidden_size
        side = self.vit_px // config.vision_config.patch_size[0]
        self.num_image_tokens = int(side * config.downsample_ratio) ** 2
        self.max_positions = config.text_config.max_position_embeddings
        # Functions of the module, or their compiled versions.
        self.project_qkv = project_qkv
        self.finish_layer = finish_layer
        # Only as one graph. The eager prefix runs the halves around the attention.
        self.ragged_layer = None

    def compile_parts(self, backend: str = "inductor") -> None:
        """Compile each ViT layer and the decoder layers with torch.compile.

        All layers of a kind share one graph. A decoder layer of the prefix, which has no gradient,
        is one graph with its attention. Around the attention of the queries, and where no layout
        pads the prefix, both halves of the layer are graphs. All are compiled for any number of
        tokens, as prefixes are ragged.
        """
        for layer in self.backbone.vision_tower.encoder.layer:
            layer.forward = torch.compile(layer.forward, fullgraph=True, backend=backend)
        self.project_qkv, self.finish_layer, self.ragged_layer = (
            torch.compile(part, dynamic=True, fullgraph=True, backend=backend)
            for part in (project_qkv, finish_layer, ragged_layer)
        )

    def use_fp8(self) -> None:
        """Compute the products of the ViT's and the decoder's layers in fp8.

        Weights are rounded once, here. The patch embedding, the projector and the token embeddings
        keep their dtype. In the decoder the queries need gradients, in the ViT nothing does.
        """
        round_linears(self.backbone.vision_tower.encoder, backward=False)
        round_linears(self.backbone.language_model.layers, backward=True)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.backbone.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.backbone.device

    @torch.no_grad()
    def image_tokens(self, vit_pixels: Tensor) -> Tensor:
        """Return the image tokens (B, P, D), without gradient.

        `vit_pixels` is as in `vit_states`. The result equals transformers' get_image_features,
        without its hooks on every layer, which torch.compile cannot trace.
        """
        return self.project(self.vit_states(vit_pixels))

    @torch.no_grad()
    def vit_states(self, vit_pixels: Tensor) -> Tensor:
        """Return the ViT's last hidden states (B, patches, W), normed, without class token.

        The patches are a square in row-major order.

        Args:
            vit_pixels: uint8 (B, vit_px, vit_px, 3), or float (B, 3, vit_px, vit_px) normalised by
                IMAGE_MEAN and IMAGE_STD.
        """
        tower = self.backbone.vision_tower
        if vit_pixels.dtype != torch.uint8:
            embedded = tower.embeddings(vit_pixels.to(self.dtype))
        elif vit_pixels.is_cuda:
            embedded = self.embed_bytes(vit_pixels)
        else:
            # On a CPU a single matrix product is no faster (LOG.md, 2026-11-30), and it rounds
            # differently from the convolution of earlier runs.
            embedded = tower.embeddings(
                normalised(vit_pixels, IMAGE_MEAN, IMAGE_STD).to(self.dtype)
            )
        return tower.layernorm(tower.encoder(embedded).last_hidden_state)[:, 1:]

    def embed_bytes(self, pixels_BHWC: Tensor) -> Tensor:
        """Return the ViT's embeddings of uint8 pixels.

        One pass normalises the pixels and cuts them into patch rows. One matrix product with the
        convolution's weight embeds them.
        """
        embeddings = self.backbone.vision_tower.embeddings
        projection = embeddings.patch_embeddings.projection
        rows_BNK = image_patches(
            pixels_BHWC,
            projection.kernel_size[0],
            mean=IMAGE_MEAN,
            std=IMAGE_STD,
            dtype=projection.weight.dtype,
        )
        patches_BNW = F.linear(rows_BNK, projection.weight.flatten(1), projection.bias)
        class_B1W = embeddings.cls_token.expand(len(patches_BNW), -1, -1)
        tokens_BNW = torch.cat((class_B1W, patches_BNW), dim=1)
        if embeddings.position_embeddings is None:
            return tokens_BNW
        return tokens_BNW + embeddings.position_embeddings

    @torch.no_grad()
    def project(self, states_BNW: Tensor) -> Tensor:
        """Return the image tokens (B, P, D) of the hidden states that `vit_states` returned.

        They are a square in row-major order. Each token covers 2 x 2 patches.
        """
        side, ratio = math.isqrt(states_BNW.shape[1]), self.backbone.config.downsample_ratio
        shuffled = self.backbone.pixel_shuffle(
            states_BNW.unflatten(1, (side, side)), scale_factor=ratio
        )
        return self.backbone.multi_modal_projector(shuffled.flatten(1, 2))

    def token_ids(self, text: str) -> list[int]:
        """Tokenize a text. Special tokens in it are recognized, and none are added."""
        return list(tokenized(self.tokenizer, text))

    def vit_flops(self, projector: bool = True) -> int:
        """Return the forward FLOPs of one image through the ViT and, optionally, the projector.

        Each matrix product counts 2 m n k.
        """
        vision, width = self.backbone.config.vision_config, self.width
        patches = (vision.image_size[0] // vision.patch_size[0]) ** 2
        tokens, inner = patches + 1, vision.hidden_size
        linears = tokens * (8 * inner**2 + 4 * inner * vision.intermediate_size)
        layer = linears + 4 * tokens**2 * inner
        total = 2 * patches * 3 * vision.patch_size[0] ** 2 * inner
        total += vision.num_hidden_layers * layer
        if projector:
            shuffled = inner * patches // self.num_image_tokens
            total += 2 * self.num_image_tokens * (shuffled * width + width**2)
        return total

    def decoder_flops(
        self, num_prefix: float, num_queries: int, outputs: bool = False
    ) -> tuple[float, float, float]:
        """Return the FLOPs of one image: (prefix, queries forward, queries backward).

        `num_prefix` may be a mean over masks. The backward pass counts activations only: weights
        are frozen, and the prefix's keys and values get no gradient. Attention counts its whole
        rectangle, causal or not, as FlopCounterMode does. `outputs` is as in `prefix`.
        """
        text = self.backbone.config.text_config
        width, head_dim = text.hidden_size, self.head_dim
        layers, num_heads = text.num_hidden_layers, text.num_attention_heads
        keys = 4 * width * text.num_key_value_heads * head_dim
        rest = 4 * width * num_heads * head_dim + 6 * width * text.intermediate_size
        pair = 4 * num_heads * head_dim
        whole = layers if outputs else layers - 1
        prefix = layers * num_prefix * keys + whole * (num_prefix * rest + num_prefix**2 * pair)
        linears = layers * num_queries * (keys + rest)
        to_prefix = layers * num_queries * num_prefix * pair
        to_queries = layers * num_queries**2 * pair
        return prefix, linears + to_prefix + to_queries, linears + to_prefix + 2 * to_queries

    def num_prefix_elements(self, num_prefix: float) -> float:
        """Return the number of elements held for the condition of one image.

        These are its tokens, and the keys and values that `prefix` returns for them.
        """
        text = self.backbone.config.text_config
        cached = 2 * text.num_hidden_layers * text.num_key_value_heads * self.head_dim
        return num_prefix * (self.width + cached)

    @property
    def head_dim(self) -> int:
        """Head dim of the decoder."""
        text = self.backbone.config.text_config
        return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.backbone.config.text_config.num_hidden_layers

    def layer_without_weights(
        self, num_queries: int, dtype: torch.dtype, attention: Callable[..., Tensor]
    ) -> tuple[Callable[[], Tensor], Iterator[nn.Parameter]]:
        """Build one decoder layer on the meta device, to count what its backward pass keeps.

        Args:
            num_queries: number of packed queries that the layer runs on.
            dtype: dtype of weights and activations.
            attention: maps (q, k, v) to a tensor shaped like q.

        Returns:
            A function that runs the layer, and the layer's parameters.
        """
        decoder = self.backbone.language_model
        with torch.device("meta"):
            layer = type(decoder.layers[0])(decoder.config, 0).to(dtype).requires_grad_(False)
            x_SD = torch.empty(num_queries, self.width, dtype=dtype, requires_grad=True)
            rotary = (torch.empty(1, num_queries, layer.self_attn.head_dim, dtype=dtype),) * 2

        def run() -> Tensor:
            return finish_layer(layer, x_SD, attention(*project_qkv(layer, x_SD, rotary)))

        return run, layer.parameters()

    def turns(
        self,
        texts: list[str],
        has_image: list[bool],
        visible: Tensor | None = None,
        *,
        mode: str = "drop",
        positions: str = "original",
        n_B: Tensor | None = None,
        source: Any = None,
    ) -> Turns:
        """Pack the user turn [text, visible image tokens] of each sample on the host.

        Args:
            texts: B strings. "" is valid and means unconditional.
            has_image: B bools.
            visible: bool mask (I * P,) of the image tokens. Defaults to all visible.
            mode: as in `condition`.
            positions: as in `condition`.
            n_B: sample numbers, carried along.
            source: what drew the texts and the mask, see Turns.

        Raises:
            InputError: if a text exceeds the decoder's context.
        """
        num_image, before, after = self.num_image_tokens, [], []
        for text, image in zip(texts, has_image, strict=True):
            opening, closing = IMAGE if image else ("", "")
            before.append(self.token_ids(TURN[0] + text + opening))
            after.append(self.token_ids(closing + TURN[1]))
            length = len(before[-1]) + num_image * image + len(after[-1])
            if length > self.max_positions:
                raise InputError(
                    f"a prompt of {length} tokens exceeds the MLLM's context of "
                    f"{self.max_positions}. Shorten the prompt."
                )
        return pack_turns(
            before,
            after,
            has_image,
            num_image,
            None if visible is None else visible.cpu().numpy().reshape(-1, num_image),
            mode=mode,
            positions=positions,
            n_B=n_B,
            source=source,
        )

    def condition(
        self,
        texts: list[str],
        image_tokens_IPD: Tensor | None = None,
        *,
        has_image: list[bool] | None = None,
        visible: Tensor | None = None,
        mode: str = "drop",
        positions: str = "original",
    ) -> Condition:
        """Pack and embed the user turn [text, visible image tokens] of each sample.

        Args:
            texts: B strings. "" is valid and means unconditional.
            image_tokens_IPD: image tokens of the I samples with an image, in order.
            has_image: B bools. Defaults to all samples if there are image tokens, else to none.
            visible: bool mask (I * P,) of the image tokens. Defaults to all visible.
            mode: "drop" leaves hidden tokens out; "zero" keeps them as zeros.
            positions: "original" position ids have gaps where tokens were dropped; "compact" ids
                have none.

        Raises:
            InputError: if a text exceeds the decoder's context.
        """
        if has_image is None:
            has_image = [image_tokens_IPD is not None] * len(texts)
        turns = self.turns(texts, has_image, visible, mode=mode, positions=positions)
        return self.embed(turns.to(self.device), image_tokens_IPD)

    @torch.no_grad()
    def embed(self, turns: Turns, image_tokens_IPD: Tensor | None = None) -> Condition:
        """Return the condition of packed turns on the MLLM's device, without gradient.

        `image_tokens_IPD` holds the image tokens of the I samples with an image, in order.
        """
        parts = turns.parts()
        tokens_TD = self.backbone.get_input_embeddings()(parts.ids_T)
        if turns.num_images:
            image_VD = image_tokens_IPD.flatten(0, 1).to(tokens_TD.dtype)[parts.image_V]
            if len(parts.kept_V):
                image_VD = image_VD * parts.kept_V.bool()[:, None]
            tokens_TD = tokens_TD.index_copy(0, parts.row_V, image_VD)
        return Condition(
            tokens_TD=tokens_TD,
            positions_T=parts.positions_T,
            offsets=parts.offsets.int(),
            lengths=turns.lengths,
            end_B=parts.end_B,
            end=turns.end,
        )

    @torch.no_grad()
    def prefix(self, condition: Condition, outputs: bool = False) -> tuple[Cache, Tensor | None]:
        """Return keys and values of every layer for the condition tokens, without gradient.

        With `outputs`, the second result is the hidden states (T, D) after the final norm.
        Otherwise it is None, and the last layer computes only keys and values because the rest of
        its output is never read.
        """
        decoder = self.backbone.language_model
        x_TD = condition.tokens_TD
        rotary = decoder.rotary_emb(x_TD, condition.positions_T[None])
        layout = None
        if self.ragged_layer is not None:
            layout = ragged_layout(condition.offsets, condition.lengths, x_TD.dtype)
        cache = []
        for i, layer in enumerate(decoder.layers):
            whole = outputs or i < len(decoder.layers) - 1
            if whole and layout is not None:
                k, v, x_TD = self.ragged_layer(layer, x_TD, rotary, layout)
                cache.append((k, v))
                continue
            q, k, v = self.project_qkv(layer, x_TD, rotary, with_query=whole)
            cache.append((k, v))
            if whole:
                mixed = masked_attention(
                    q, k, v, condition.offsets, causal=True, lengths=condition.lengths
                )
                x_TD = self.finish_layer(layer, x_TD, mixed)
        return cache, decoder.norm(x_TD) if outputs else None

    def queries(
        self, queries_BQD: Tensor, condition: Condition, cache: Cache, *, causal: bool = True
    ) -> Tensor:
        """Run Q queries per sample after the cached prefix.

        Gradients flow to `queries_BQD` but never into the prefix.

        Args:
            queries_BQD: embeddings of the queries.
            condition: the condition that `cache` was computed from.
            cache: keys and values that `prefix` returned.
            causal: queries attend only to earlier queries; otherwise to all of them.

        Returns:
            Hidden states (B, Q, D) after the final norm.

        Raises:
            InputError: if prompt and queries exceed the decoder's context.
        """
        decoder = self.backbone.language_model
        batch, num, width = queries_BQD.shape
        if condition.end + num > self.max_positions:
            raise InputError(
                f"a prompt of {condition.end} tokens and {num} queries exceed the MLLM's context "
                f"of {self.max_positions}. Shorten the prompt."
            )
        positions = condition.end_B[:, None] + torch.arange(num, device=queries_BQD.device)
        x_SD = queries_BQD.flatten(0, 1)
        rotary = decoder.rotary_emb(x_SD, positions.flatten()[None])
        offsets = torch.arange(
            0, batch * num + 1, num, dtype=torch.int32, device=queries_BQD.device
        )
        for layer, (prefix_k, prefix_v) in zip(decoder.layers, cache, strict=True):
            q, k, v = self.project_qkv(layer, x_SD, rotary)
            mixed = masked_attention(
                q,
                k,
                v,
                offsets,
                prefix_k=prefix_k,
                prefix_v=prefix_v,
                prefix_offsets=condition.offsets,
                causal=causal,
                lengths=(num,) * batch,
                prefix_lengths=condition.lengths,
            )
            x_SD = self.finish_layer(layer, x_SD, mixed)
        return decoder.norm(x_SD).view(batch, num, width)


# Images share a few prompts, and a call of the tokenizer takes a tenth of a millisecond.
@lru_cache(1 << 10)
def tokenized(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Return the token ids of a text, without adding special tokens."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def project_qkv(
    layer: nn.Module, x_TD: Tensor, rotary: Rotary, with_query: bool = True
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the rotated queries (or None) and keys, and the values, of one decoder layer.

    Shapes: (T, A, E), (T, G, E), (T, G, E).
    """
    attention = layer.self_attn
    x_TD = layer.input_layernorm(x_TD)

    def project(linear: nn.Module, norm: str) -> Tensor:
        y = linear(x_TD).unflatten(-1, (-1, attention.head_dim))
        # Qwen3 normalises queries and keys, Qwen2 does not.
        norm = getattr(attention, norm, None)
        return rotate(y if norm is None else norm(y), rotary)

    q = project(attention.q_proj, "q_norm") if with_query else None
    k = project(attention.k_proj, "k_norm")
    v = attention.v_proj(x_TD).unflatten(-1, (-1, attention.head_dim))
    return q, k, v


def finish_layer(layer: nn.Module, x_TD: Tensor, mixed_TAE: Tensor) -> Tensor:
    """Run a decoder layer after its attention: output projection, residual, feed-forward."""
    x_TD = x_TD + layer.self_attn.o_proj(mixed_TAE.flatten(-2))
    return x_TD + layer.mlp(layer.post_attention_layernorm(x_TD))


def ragged_layer(
    layer: nn.Module, x_TD: Tensor, rotary: Rotary, layout: DenseLayout
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a decoder layer on ragged samples. Return its keys, its values and its output."""
    q, k, v = project_qkv(layer, x_TD, rotary)
    mixed = padded_attention(q, k, v, None, None, layout, q.shape[-1] ** -0.5)
    return k, v, finish_layer(layer, x_TD, mixed)


def rotate(x_TAE: Tensor, rotary: Rotary) -> Tensor:
    """Apply rotary embedding in Qwen2's half-split layout (Su et al., arXiv 2104.09864)."""
    cos, sin = (r[0, :, None] for r in rotary)
    first, second = x_TAE.chunk(2, dim=-1)
    return x_TAE * cos + torch.cat((-second, first), dim=-1) * sin
