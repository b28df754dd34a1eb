"""The frozen multimodal LLM: image tokens, text tokens, the prefix without gradient, the queries with it.

Weights stay in transformers' own modules (internvl.py makes or loads them); the two passes over them are ours because no
library runs a packed, gradient-free prefix followed by queries that see it.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from iomm.config import InputError
from iomm.kernels.image_patches import image_patches, normalised
from iomm.kernels.masked_attention import masked_attention

# One user turn, then the assistant's turn, where the queries stand: the Qwen2.5 chat format without a system prompt.
TURN = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
IMAGE = ("<img>", "</img>")
RECONSTRUCT = "Generate an image that is identical to the reference image:"
# ImageNet, as InternVL was trained.
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Frozen(nn.Module):
    """Holds a backbone that never trains and never leaves eval mode, whatever model.train() says."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Condition tokens of a batch, packed: sample b owns rows offsets[b] to offsets[b + 1].

    tokens_TD embeddings; positions_T their position ids (int64, gaps where tokens were dropped);
    offsets (B + 1,) int32; end_B the position id of the first token after each sample (int64), and end the largest of
    them, a number that the host knows: reading it from the GPU later would wait for all that is queued there.
    """

    tokens_TD: torch.Tensor
    positions_T: torch.Tensor
    offsets: torch.Tensor
    end_B: torch.Tensor
    end: int

    @property
    def batch(self):
        return len(self.end_B)


class MLLM(Frozen):
    """A frozen InternVL (ViT, projector, Qwen2 decoder) in transformers' own modules, without its language-model head.

    Attributes: width D of the decoder, num_image_tokens P, vit_px side of the ViT's square input in pixels, vit_width W
    of its hidden states.
    """

    def __init__(self, internvl, tokenizer):
        super().__init__(internvl)
        config = internvl.config
        if config.text_config.model_type not in ("qwen2", "qwen3"):
            raise InputError(
                f"model.mllm: the decoder must be qwen2 or qwen3, got {config.text_config.model_type}"
            )
        if config.vision_feature_layer != -1 or config.vision_feature_select_strategy != "default":
            raise InputError(
                "model.mllm: its image tokens must be those of the ViT's last layer without the class token, got "
                f"layer {config.vision_feature_layer}, strategy {config.vision_feature_select_strategy}"
            )
        self.tokenizer = tokenizer
        self.width = config.text_config.hidden_size
        self.vit_px = config.vision_config.image_size[0]
        self.vit_width = config.vision_config.hidden_size
        side = self.vit_px // config.vision_config.patch_size[0]
        self.num_image_tokens = int(side * config.downsample_ratio) ** 2
        self.max_positions = config.text_config.max_position_embeddings
        self.project_qkv, self.finish_layer = project_qkv, finish_layer

    def compile_parts(self, backend="inductor"):
        """Layers of the ViT and either half of a decoder layer become graphs of torch.compile: one for all layers alike.
        Prefixes are ragged, so the halves are compiled for any number of tokens.
        """
        for layer in self.backbone.vision_tower.encoder.layer:
            layer.forward = torch.compile(layer.forward, fullgraph=True, backend=backend)
        self.project_qkv, self.finish_layer = (
            torch.compile(part, dynamic=True, fullgraph=True, backend=backend)
            for part in (project_qkv, finish_layer)
        )

    @property
    def dtype(self):
        return self.backbone.dtype

    @property
    def device(self):
        return self.backbone.device

    @torch.no_grad()
    def image_tokens(self, vit_pixels):
        """Return the image tokens (B, P, D) of what `vit_states` takes. No gradient.

        What transformers' get_image_features computes, without its hooks on every layer, which torch.compile cannot trace.
        """
        return self.project(self.vit_states(vit_pixels))

    @torch.no_grad()
    def vit_states(self, vit_pixels):
        """Return the ViT's last hidden states, normed, without class token: (B, patches, W), a row-major square.

        vit_pixels: uint8 (B, vit_px, vit_px, 3), or float (B, 3, vit_px, vit_px) normalised by IMAGE_MEAN and IMAGE_STD.
        """
        tower = self.backbone.vision_tower
        if vit_pixels.dtype != torch.uint8:
            embedded = tower.embeddings(vit_pixels.to(self.dtype))
        elif vit_pixels.is_cuda:
            embedded = self.embedded_rows(vit_pixels)
        # On a CPU one product is no faster (LOG.md, 2026-11-30), and rounds otherwise than the convolution of earlier runs.
        else:
            embedded = tower.embeddings(
                normalised(vit_pixels, IMAGE_MEAN, IMAGE_STD).to(self.dtype)
            )
        return tower.layernorm(tower.encoder(embedded).last_hidden_state)[:, 1:]

    def embedded_rows(self, pixels_BHWC):
        """Return what the ViT's embeddings make of bytes: patch rows in one pass, and one product with the convolution's weight."""
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
        tokens_BNW = torch.cat(
            (embeddings.cls_token.expand(len(patches_BNW), -1, -1), patches_BNW), dim=1
        )
        return (
            tokens_BNW
            if embeddings.position_embeddings is None
            else tokens_BNW + embeddings.position_embeddings
        )

    @torch.no_grad()
    def project(self, states_BNW):
        """Return the image tokens (B, P, D) made of `vit_states`: a row-major square, each token of 2 x 2 patches."""
        side, ratio = math.isqrt(states_BNW.shape[1]), self.backbone.config.downsample_ratio
        shuffled = self.backbone.pixel_shuffle(
            states_BNW.unflatten(1, (side, side)), scale_factor=ratio
        )
        return self.backbone.multi_modal_projector(shuffled.flatten(1, 2))

    def token_ids(self, text):
        """Text -> list of token ids, special tokens in the text included, none added."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def vit_flops(self, projector=True):
        """Forward FLOPs of one image through ViT and, unless left out, projector: 2 m n k of every matrix product."""
        vision, width = self.backbone.config.vision_config, self.width
        patches = (vision.image_size[0] // vision.patch_size[0]) ** 2
        tokens, inner = patches + 1, vision.hidden_size
        layer = (
            tokens * (8 * inner**2 + 4 * inner * vision.intermediate_size) + 4 * tokens**2 * inner
        )
        shuffled = inner * patches // self.num_image_tokens
        projected = 2 * self.num_image_tokens * (shuffled * width + width**2) if projector else 0
        return (
            2 * patches * 3 * vision.patch_size[0] ** 2 * inner
            + vision.num_hidden_layers * layer
            + projected
        )

    def decoder_flops(self, num_prefix, num_queries, outputs=False):
        """(prefix, queries forward, queries backward) FLOPs of one image with the prefix split.

        Backward is for activations alone: weights are frozen, and the prefix's keys and values get no gradient. Attention
        counts its whole rectangle, causal or not, as FlopCounterMode does.
        """
        text = self.backbone.config.text_config
        layers, heads = text.num_hidden_layers, text.num_attention_heads
        width, head_dim = (
            text.hidden_size,
            getattr(text, "head_dim", None) or text.hidden_size // heads,
        )
        keys = 4 * width * text.num_key_value_heads * head_dim
        rest = 4 * width * heads * head_dim + 6 * width * text.intermediate_size
        pair = 4 * heads * head_dim
        whole = layers if outputs else layers - 1
        prefix = layers * num_prefix * keys + whole * (num_prefix * rest + num_prefix**2 * pair)
        linears = layers * num_queries * (keys + rest)
        seen, own = layers * num_queries * num_prefix * pair, layers * num_queries**2 * pair
        return prefix, linears + seen + own, linears + seen + 2 * own

    def num_prefix_elements(self, num_prefix):
        """How many numbers one image's condition is: its tokens, and the keys and values that `prefix` keeps of them."""
        text = self.backbone.config.text_config
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return num_prefix * (
            self.width + 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim
        )

    @property
    def num_layers(self):
        """Of the decoder."""
        return self.backbone.config.text_config.num_hidden_layers

    def layer_without_weights(self, num_queries, dtype, attention):
        """(a function that runs one decoder layer over so many packed queries on the meta device, its parameters): to count
        what it keeps for the backward pass. attention: (q, k, v) -> the same shape as q.
        """
        decoder = self.backbone.language_model
        with torch.device("meta"):
            layer = type(decoder.layers[0])(decoder.config, 0).to(dtype).requires_grad_(False)
            x_SD = torch.empty(num_queries, self.width, dtype=dtype, requires_grad=True)
            rotary = (torch.empty(1, num_queries, layer.self_attn.head_dim, dtype=dtype),) * 2
        return (
            lambda: finish_layer(layer, x_SD, attention(*project_qkv(layer, x_SD, rotary)))
        ), layer.parameters()

    @torch.no_grad()
    def condition(
        self,
        texts,
        image_tokens_IPD=None,
        *,
        has_image=None,
        visible=None,
        mode="drop",
        positions="original",
    ):
        """Packs the user turn [text, visible image tokens] of each sample. No gradient.

        texts: B strings ("" is legal: the unconditional). image_tokens_IPD: tokens of the I samples with an image, in
        order; has_image: B bools, default all (or none without tokens). visible: (I * P,) bool, default all.
        mode: "drop" leaves hidden tokens out, "zero" keeps them as zeros. positions: "original" position ids, with gaps
        where tokens were dropped, or "compact". Raises InputError if a text exceeds the decoder's context.
        """
        device, num_image = self.backbone.device, self.num_image_tokens
        has_image = [image_tokens_IPD is not None] * len(texts) if has_image is None else has_image
        ids, is_image, lengths = [], [], []
        for text, image in zip(texts, has_image, strict=True):
            opened, closed = IMAGE if image else ("", "")
            before = self.token_ids(TURN[0] + text + opened)
            after = self.token_ids(closed + TURN[1])
            middle = num_image if image else 0
            ids += before + [0] * middle + after
            is_image += [False] * len(before) + [True] * middle + [False] * len(after)
            lengths.append(len(before) + middle + len(after))
            if lengths[-1] > self.max_positions:
                raise InputError(
                    f"a prompt of {lengths[-1]} tokens exceeds the MLLM's context of {self.max_positions}: "
                    "shorten it"
                )
        lengths_B = torch.tensor(lengths, device=device)
        starts_B = lengths_B.cumsum(0) - lengths_B
        sample_T = torch.repeat_interleave(torch.arange(len(texts), device=device), lengths_B)
        positions_T = torch.arange(len(ids), device=device) - starts_B[sample_T]
        tokens_TD = self.backbone.get_input_embeddings()(torch.tensor(ids, device=device))
        end_B, end = lengths_B, max(lengths)
        if any(has_image):
            image_T = torch.tensor(is_image, device=device)
            image_TD = image_tokens_IPD.flatten(0, 1).to(tokens_TD.dtype)
            if visible is not None and mode == "zero":
                image_TD = image_TD * visible[:, None]
            tokens_TD = tokens_TD.masked_scatter(image_T[:, None], image_TD)
            if visible is not None and mode == "drop":
                keep_T = torch.ones_like(image_T).masked_scatter(image_T, visible)
                rows = keep_T.nonzero().squeeze(1)
                lengths_B = torch.zeros_like(lengths_B).index_add(0, sample_T, keep_T.long())
                tokens_TD, sample_T, positions_T = (
                    tokens_TD[rows],
                    sample_T[rows],
                    positions_T[rows],
                )
                if positions == "compact":
                    positions_T = (
                        torch.arange(len(rows), device=device)
                        - (lengths_B.cumsum(0) - lengths_B)[sample_T]
                    )
                    end_B, end = lengths_B, int(lengths_B.max())
        offsets = torch.nn.functional.pad(lengths_B.cumsum(0), (1, 0)).int()
        return Condition(
            tokens_TD=tokens_TD, positions_T=positions_T, offsets=offsets, end_B=end_B, end=end
        )

    @torch.no_grad()
    def prefix(self, condition, outputs=False):
        """Condition -> keys and values of every layer, [(k_TGE, v_TGE)], and None or, with `outputs`, hidden states (T, D)
        after the final norm. No gradient. Without outputs there is no final norm, and of the last layer only keys and
        values are computed: nothing else of it is ever read.
        """
        decoder = self.backbone.language_model
        x_TD = condition.tokens_TD
        rotary = decoder.rotary_emb(x_TD, condition.positions_T[None])
        cache = []
        for i, layer in enumerate(decoder.layers):
            whole = outputs or i < len(decoder.layers) - 1
            q, k, v = self.project_qkv(layer, x_TD, rotary, with_query=whole)
            cache.append((k, v))
            if whole:
                x_TD = self.finish_layer(
                    layer, x_TD, masked_attention(q, k, v, condition.offsets, causal=True)
                )
        return cache, decoder.norm(x_TD) if outputs else None

    def queries(self, queries_BQD, condition, cache, *, causal=True):
        """Runs Q queries per sample behind the cached prefix -> hidden states (B, Q, D) after the final norm.

        Gradients flow to queries_BQD, never into the prefix. causal: queries see earlier queries; else all of them.
        """
        decoder = self.backbone.language_model
        batch, num, width = queries_BQD.shape
        if condition.end + num > self.max_positions:
            raise InputError(
                f"prompt and {num} queries exceed the MLLM's context of {self.max_positions}: shorten it"
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
            )
            x_SD = self.finish_layer(layer, x_SD, mixed)
        return decoder.norm(x_SD).view(batch, num, width)


def project_qkv(layer, x_TD, rotary, with_query=True):
    """Queries (or None), keys and values of one decoder layer, rotated: (T, A, E), (T, G, E), (T, G, E)."""
    attention = layer.self_attn
    x_TD = layer.input_layernorm(x_TD)

    def project(linear, norm):
        y = linear(x_TD).unflatten(-1, (-1, attention.head_dim))
        # Qwen3 normalises queries and keys, Qwen2 does not.
        norm = getattr(attention, norm, None)
        return rotate(y if norm is None else norm(y), rotary)

    q = project(attention.q_proj, "q_norm") if with_query else None
    return (
        q,
        project(attention.k_proj, "k_norm"),
        attention.v_proj(x_TD).unflatten(-1, (-1, attention.head_dim)),
    )


def finish_layer(layer, x_TD, mixed_TAE):
    """The rest of a decoder layer after its attention: output projection, residual, feed-forward."""
    x_TD = x_TD + layer.self_attn.o_proj(mixed_TAE.flatten(-2))
    return x_TD + layer.mlp(layer.post_attention_layernorm(x_TD))


def rotate(x_TAE, rotary):
    """Rotary embedding in the half-split layout of Qwen2 (Su et al., arXiv 2104.09864)."""
    cos, sin = (r[0, :, None] for r in rotary)
    first, second = x_TAE.chunk(2, dim=-1)
    return x_TAE * cos + torch.cat((-second, first), dim=-1) * sin
