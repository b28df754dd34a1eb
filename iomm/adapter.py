"""What trains on either side of the frozen MLLM: the query adapter before it, a connector after it."""

import torch
import torch.nn.functional as F
from torch import nn

from iomm.config import InputError
from iomm.flops import attention_flops, linear_flops
from iomm.kernels.masked_attention import masked_attention
from iomm.layers import attend


class QueryAdapter(nn.Module):
    """Q learned queries that read the packed condition and join it: Condition -> queries (B, Q, D).

    kind "rqa": one pre-norm cross-attention block with a 4x feed-forward at the MLLM's width (28.7 M at D = 1536,
    Q = 256). kind "metaquery": the queries alone. The queries start as normal with standard deviation 1 / sqrt(D),
    about that of a large MLLM's embedding table (0.0255 at D = 1536; Qwen2.5's rows have about 0.02), and both output
    projections start at zero: a fresh adapter hands the MLLM Q vectors of ordinary token size whatever the condition.
    """

    def __init__(self, config, width):
        super().__init__()
        if width % config.head_dim:
            raise InputError(
                f"adapter.head_dim must divide the MLLM's width {width}, got {config.head_dim}"
            )
        self.kind, self.head_dim = config.kind, config.head_dim
        self.queries_QD = nn.Parameter(torch.empty(config.num_queries, width))
        if config.kind == "rqa":
            self.query_norm, self.condition_norm = nn.LayerNorm(width), nn.LayerNorm(width)
            self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
            self.to_out = nn.Linear(width, width)
            self.mlp_norm = nn.LayerNorm(width)
            self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    @torch.no_grad()
    def init_weights(self, seed):
        """Draws the weights on the CPU from `seed` alone."""
        generator = torch.Generator().manual_seed(seed)
        width = self.queries_QD.shape[1]
        self.queries_QD.normal_(std=width**-0.5, generator=generator)
        init_linears(self, generator)
        if self.kind == "rqa":
            nn.init.zeros_(self.to_out.weight)
            nn.init.zeros_(self.mlp_out.weight)

    def forward(self, condition):
        """Condition (packed tokens_TD, offsets) -> (B, Q, D)."""
        num, width = self.queries_QD.shape
        x_BQD = self.queries_QD.expand(condition.batch, num, width)
        if self.kind == "metaquery":
            return x_BQD
        q, k, v = (
            linear(tokens).unflatten(-1, (-1, self.head_dim))
            for linear, tokens in self._inputs(condition)
        )
        # The same queries for every sample: projected once.
        q = q.expand(condition.batch, *q.shape).flatten(0, 1)
        offsets = torch.arange(
            0, condition.batch * num + 1, num, dtype=torch.int32, device=q.device
        )
        read = masked_attention(
            q, None, None, offsets, prefix_k=k, prefix_v=v, prefix_offsets=condition.offsets
        )
        x_BQD = x_BQD + self.to_out(read.flatten(-2)).view_as(x_BQD)
        return x_BQD + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x_BQD)), approximate="tanh"))

    def _inputs(self, condition):
        queries = self.query_norm(self.queries_QD)
        tokens = self.condition_norm(condition.tokens_TD.to(queries.dtype))
        return (self.to_q, queries), (self.to_k, tokens), (self.to_v, tokens)

    def flops(self, condition_tokens):
        """Forward FLOPs of one image whose condition has this many tokens: 2 m n k of every matrix product."""
        num, width = self.queries_QD.shape
        if self.kind == "metaquery":
            return 0
        linears = 2 * width * width * (2 * num + 2 * condition_tokens) + 2 * num * 8 * width * width
        return linears + 4 * num * condition_tokens * width


class ConnectorLayer(nn.Module):
    """Pre-norm transformer layer, every token sees every other: (B, C, D) -> the same. Starts as the identity."""

    def __init__(self, width, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BCD, shown_BC=None):
        q, k, v = (
            self.qkv(self.attention_norm(x_BCD)).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        )
        x_BCD = x_BCD + self.out(attend(q, k, v, shown_BC))
        return x_BCD + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x_BCD)), approximate="tanh"))


class Connector(nn.Module):
    """A few transformer layers on the MLLM's outputs before the generator reads them (LLaDA-Image, arXiv 2609.03796)."""

    block_classes = (ConnectorLayer,)

    def __init__(self, config, width):
        super().__init__()
        if width % config.head_dim:
            raise InputError(
                f"adapter.head_dim must divide the MLLM's width {width}, got {config.head_dim}"
            )
        self.blocks = nn.ModuleList(
            ConnectorLayer(width, config.head_dim) for _ in range(config.connector_layers)
        )

    @torch.no_grad()
    def init_weights(self, seed):
        """Draws the weights on the CPU from `seed` alone."""
        init_linears(self, torch.Generator().manual_seed(seed))
        for layer in self.blocks:
            nn.init.zeros_(layer.out.weight)
            nn.init.zeros_(layer.mlp_out.weight)

    def forward(self, x_BCD, lengths_B=None):
        """lengths_B: how many of a sample's C rows are its own; None for all."""
        shown_BC = None
        if lengths_B is not None:
            shown_BC = torch.arange(x_BCD.shape[1], device=lengths_B.device) < lengths_B[:, None]
        for layer in self.blocks:
            x_BCD = layer(x_BCD, shown_BC)
        return x_BCD

    def flops(self, num_tokens):
        """Forward FLOPs of one image: 2 m n k of every matrix product."""
        return sum(
            linear_flops(layer, num_tokens)
            + attention_flops(num_tokens, num_tokens, layer.out.in_features)
            for layer in self.blocks
        )


def init_linears(module, generator):
    """Xavier-uniform weights (Glorot and Bengio, 2010) and zero biases for every linear inside."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight, generator=generator)
            nn.init.zeros_(part.bias)
