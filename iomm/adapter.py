"""Residual query adapter: what is appended to the condition before the frozen MLLM reads it."""

import torch
import torch.nn.functional as F
from torch import nn

from iomm.config import InputError
from iomm.kernels.masked_attention import masked_attention


class QueryAdapter(nn.Module):
    """Q learned queries that read the packed condition and join it: Condition -> queries (B, Q, D).

    kind "rqa": one pre-norm cross-attention block with a 4x feed-forward at the MLLM's width (28.7 M at D = 1536,
    Q = 256). kind "metaquery": the queries alone. The queries start as normal with standard deviation 1 / sqrt(D), the
    size of one row of the MLLM's embedding table (0.0255 at D = 1536; Qwen2.5's rows have about 0.02), and both output
    projections start at zero: a fresh adapter hands the MLLM Q vectors of ordinary token size whatever the condition."""

    def __init__(self, config, width):
        super().__init__()
        if width % config.head_dim:
            raise InputError(f"adapter.head_dim must divide the MLLM's width {width}, got {config.head_dim}")
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
        self.queries_QD.normal_(std=width ** -0.5, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
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
            for linear, tokens in self._inputs(condition))
        q = q.expand(condition.batch, *q.shape).flatten(0, 1)      # the same queries for every sample: projected once
        offsets = torch.arange(0, condition.batch * num + 1, num, dtype=torch.int32, device=q.device)
        read = masked_attention(q, None, None, offsets, prefix_k=k, prefix_v=v, prefix_offsets=condition.offsets)
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
