"""The frozen multimodal LLM: packed text and image tokens, and the prefix and query passes.

The prefix (prompt and image tokens) runs without gradients, the queries with them. The weights stay
in transformers' own modules. internvl.py and qwen_vl.py run the vision encoders. The two passes
over the decoder are implemented here because no library runs a packed, gradient-free prefix
followed by queries that attend to it.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from iomm.config import InputError
from iomm.kernels.masked_attention import Plan, masked_attention, plan
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
        positions_T: position ids (int64), with gaps where tokens were dropped. (3, T) if the MLLM
            has separate ones for time, row and column.
        offsets: first row of each sample and the end of the last, (B + 1,) int32.
        lengths: number of rows of each sample, on the host. Reading them from the GPU would wait
            for everything queued there.
        end_B: position id of the first token after each sample (int64).
        end: the largest of end_B, on the host.
        skipped: how many of the first rows of each sample the generator does not read, on the host.
        skipped_B: the same on the device (int64).
    """

    tokens_TD: Tensor
    positions_T: Tensor
    offsets: Tensor
    lengths: tuple[int, ...]
    end_B: Tensor
    end: int
    skipped: tuple[int, ...]
    skipped_B: Tensor

    @property
    def batch(self) -> int:
        """Number of samples."""
        return len(self.lengths)


class MLLM(Frozen):
    """A frozen multimodal LLM without language-model head, in transformers' own modules.

    Subclasses run the vision encoder of their architecture and write its chat turns. The decoder
    is a Qwen2, Qwen2.5-VL or Qwen3.

    Attributes:
        width: D of the decoder.
        num_image_tokens: P, image tokens per image.
        vit_px: side of the ViT's square input in pixels.
        vit_width: W, width of the hidden states that `vit_states` returns.
        max_positions: context length of the decoder.
    """

    num_image_tokens: int
    vit_px: int
    vit_width: int
    # Side of the square of image tokens, if they have positions of their row and column.
    grid_side: int | None = None
    # Tokens of a turn with an image and the fixed prompt, of a turn without text, and how many of
    # the first tokens of either the generator does not read, with Qwen2.5's tokenizer. Used where
    # the model has no tokenizer.
    num_text, num_turn, num_skipped = 24, 8, {True: 0, False: 0}

    def __init__(self, backbone: nn.Module, tokenizer: Any):
        super().__init__(backbone)
        text = backbone.config.text_config
        if text.model_type not in ("qwen2", "qwen3", "qwen2_5_vl_text"):
            raise InputError(
                f"model.mllm: the decoder must be qwen2 or qwen3, got {text.model_type}"
            )
        self.tokenizer = tokenizer
        self.width = text.hidden_size
        self.max_positions = text.max_position_embeddings
        # Functions of the module, or their compiled versions.
        self.project_qkv = project_qkv
        self.finish_layer = finish_layer
        # Only as graphs. Without them, the halves run around the attention.
        self.prefix_layer = self.query_layer = None

    def vit_states(self, vit_pixels: Tensor) -> Tensor:
        """Return the ViT's last hidden states (B, patches, W), without gradient.

        The patches are a square in row-major order.

        Args:
            vit_pixels: uint8 (B, vit_px, vit_px, 3), or normalised float (B, 3, vit_px, vit_px).
        """
        raise NotImplementedError

    def project(self, states_BNW: Tensor) -> Tensor:
        """Return the image tokens (B, P, D) of the hidden states that `vit_states` returned.

        They are a square in row-major order.
        """
        raise NotImplementedError

    def vit_flops(self, projector: bool = True) -> int:
        """Return the forward FLOPs of one image through the ViT and, optionally, the projector.

        Each matrix product counts 2 m n k.
        """
        raise NotImplementedError

    @property
    def vit_layers(self) -> nn.Module:
        """The ViT's layers, without patch embedding and projector."""
        raise NotImplementedError

    def turn(self, text: str, image: bool) -> tuple[list[int], list[int], int]:
        """Return the token ids of a user turn before and after its image tokens, tokenized.

        The third result is how many of the first tokens the generator does not read.
        """
        opening, closing = IMAGE if image else ("", "")
        return self.token_ids(TURN[0] + text + opening), self.token_ids(closing + TURN[1]), 0

    def text_frame(self, image: bool) -> tuple[str, str, int]:
        """Return the texts that a turn's text is tokenized together with, before and after it.

        The third result is the number of all other tokens of the turn.
        """
        opening, closing = IMAGE if image else ("", "")
        rest = len(self.token_ids(closing + TURN[1])) + self.num_image_tokens * image
        return TURN[0], opening, rest

    def compile_parts(self, backend: str = "inductor") -> None:
        """Compile the decoder layers with torch.compile.

        All layers share the graphs. A decoder layer is one graph with its attention where the
        attention has a plan (`kernels.masked_attention.plan`), else its two halves around the
        attention are graphs. All are compiled for any number of tokens, as prefixes are ragged.
        """
        self.project_qkv, self.finish_layer, self.prefix_layer, self.query_layer = (
            torch.compile(part, dynamic=True, fullgraph=True, backend=backend)
            for part in (project_qkv, finish_layer, prefix_layer, query_layer)
        )

    def use_fp8(self) -> None:
        """Compute the products of the ViT's and the decoder's layers in fp8.

        Weights are rounded once, here. The patch embedding, the projector and the token embeddings
        keep their dtype. In the decoder the queries need gradients, in the ViT nothing does.
        """
        round_linears(self.vit_layers, backward=False)
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
        """Return the image tokens (B, P, D), without gradient, of pixels as in `vit_states`."""
        return self.project(self.vit_states(vit_pixels))

    def token_ids(self, text: str) -> list[int]:
        """Tokenize a text. Special tokens in it are recognized, and none are added."""
        return list(tokenized(self.tokenizer, text))

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

    def num_prefix_elements(self, num_prefix: float, cached: bool = True) -> float:
        """Return the number of elements held for the condition of one image.

        These are its tokens, and the keys and values that `prefix` returns for them, or without
        `cached` its outputs.
        """
        if not cached:
            return 2 * num_prefix * self.width
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
        self, num_queries: int, dtype: torch.dtype
    ) -> tuple[nn.Module, Tensor, Rotary]:
        """Build one decoder layer on the meta device, to count what its backward pass keeps.

        Args:
            num_queries: number of packed queries that the layer runs on.
            dtype: dtype of weights and activations.

        Returns:
            The layer, the queries (S, D) with gradient, and their rotary cosines and sines.
        """
        decoder = self.backbone.language_model
        with torch.device("meta"):
            layer = type(decoder.layers[0])(decoder.config, 0).to(dtype).requires_grad_(False)
            x_SD = torch.empty(num_queries, self.width, dtype=dtype, requires_grad=True)
            rotary = tuple(torch.empty(1, num_queries, self.head_dim, dtype=dtype) for _ in "cs")
        return layer, x_SD, rotary

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
        """Pack the user turn of each sample, text and visible image tokens, on the host.

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
        if positions == "compact" and self.grid_side is not None:
            raise InputError(
                "mask.positions=compact is undefined for an MLLM whose image tokens have a row and "
                "a column. Set mask.positions=original."
            )
        num_image, before, after, skipped = self.num_image_tokens, [], [], []
        for text, image in zip(texts, has_image, strict=True):
            for part, parts in zip(self.turn(text, image), (before, after, skipped), strict=True):
                parts.append(part)
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
            grid_side=self.grid_side,
            skipped=skipped,
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
        """Pack and embed the user turn of each sample, text and visible image tokens.

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
            skipped=turns.skipped,
            skipped_B=parts.skipped_B,
        )

    def rotary(self, x_TD: Tensor, positions_T: Tensor) -> Rotary:
        """Return the rotary cosines and sines of positions (T,) or (3, T)."""
        one_sample = positions_T[None] if positions_T.dim() == 1 else positions_T[:, None]
        return self.backbone.language_model.rotary_emb(x_TD, one_sample)

    @torch.no_grad()
    def prefix(
        self, condition: Condition, outputs: bool = False, cached: bool = True
    ) -> tuple[Cache, Tensor | None]:
        """Return keys and values of every layer for the condition tokens, without gradient.

        Without `cached` they are not kept, and the list is empty. With `outputs`, the second result
        is the hidden states (T, D) after the final norm. Otherwise it is None, and the last layer
        computes only keys and values because the rest of its output is never read.
        """
        decoder = self.backbone.language_model
        x_TD = condition.tokens_TD
        rotary, attention = self.rotary(x_TD, condition.positions_T), None
        if self.prefix_layer is not None:
            attention = plan(
                condition.offsets, x_TD.dtype, self.head_dim, lengths=condition.lengths
            )
        cache = []
        for i, layer in enumerate(decoder.layers):
            whole = outputs or i < len(decoder.layers) - 1
            if whole and attention is not None:
                k, v, x_TD = self.prefix_layer(layer, x_TD, rotary, attention)
                if cached:
                    cache.append((k, v))
                continue
            q, k, v = self.project_qkv(layer, x_TD, rotary, with_query=whole)
            if cached:
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
        rotary = self.rotary(x_SD, positions.flatten())
        offsets = torch.arange(
            0, batch * num + 1, num, dtype=torch.int32, device=queries_BQD.device
        )
        lengths, attention = (num,) * batch, None
        if self.query_layer is not None:
            attention = plan(
                offsets,
                x_SD.dtype,
                self.head_dim,
                prefix_offsets=condition.offsets,
                causal=causal,
                lengths=lengths,
                prefix_lengths=condition.lengths,
            )
        for layer, (prefix_k, prefix_v) in zip(decoder.layers, cache, strict=True):
            if attention is not None:
                x_SD = self.query_layer(layer, x_SD, rotary, attention, prefix_k, prefix_v)
                continue
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
                lengths=lengths,
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


def prefix_layer(
    layer: nn.Module, x_TD: Tensor, rotary: Rotary, attention: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a decoder layer without prefix. Return its keys, its values and its output."""
    q, k, v = project_qkv(layer, x_TD, rotary)
    return k, v, finish_layer(layer, x_TD, attention.attend(q, k, v))


def query_layer(
    layer: nn.Module,
    x_SD: Tensor,
    rotary: Rotary,
    attention: Plan,
    prefix_k: Tensor,
    prefix_v: Tensor,
) -> Tensor:
    """Run a decoder layer on queries after a prefix."""
    mixed = attention.attend(*project_qkv(layer, x_SD, rotary), prefix_k, prefix_v)
    return finish_layer(layer, x_SD, mixed)


def rotate(x_TAE: Tensor, rotary: Rotary) -> Tensor:
    """Apply rotary embedding in Qwen2's half-split layout (Su et al., arXiv 2104.09864)."""
    cos, sin = (r[0, :, None] for r in rotary)
    first, second = x_TAE.chunk(2, dim=-1)
    return x_TAE * cos + torch.cat((-second, first), dim=-1) * sin
