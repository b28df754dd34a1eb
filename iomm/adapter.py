"""The trained modules around the frozen MLLM: query adapter before, connector after."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iomm.config import AdapterConfig, InputError
from iomm.flops import attention_flops, linear_flops
from iomm.kernels.masked_attention import masked_attention
from iomm.layers import attend
from iomm.mllm import Condition


class QueryAdapter(nn.Module):
    """Residual query adapter: Q learned queries that read the packed condition.

    Kind "rqa" is one pre-norm cross-attention block with a 4x feed-forward at the MLLM's width
    (28.7 M parameters at D = 1536, Q = 256). Kind "metaquery" returns the learned queries as they
    are.

    The queries are initialized as normal with standard deviation 1 / sqrt(D), close to that of a
    large MLLM's embedding table (0.0255 at D = 1536; Qwen2.5's rows have about 0.02). Both output
    projections are initialized to zero. So a fresh adapter gives the MLLM Q vectors of ordinary
    token size for any condition.
    """

    def __init__(self, config: AdapterConfig, width: int):
        super().__init__()
        if width % config.head_dim:
            raise InputError(
                f"adapter.head_dim must divide the MLLM's width {width}, got {config.head_dim}"
            )
        self.kind, self.head_dim = config.kind, config.head_dim
        self.queries_QD = nn.Parameter(torch.empty(config.num_queries, width))
        if config.kind == "rqa":
            self.query_norm = nn.LayerNorm(width)
            self.condition_norm = nn.LayerNorm(width)
            self.to_q = nn.Linear(width, width)
            self.to_k = nn.Linear(width, width)
            self.to_v = nn.Linear(width, width)
            self.to_out = nn.Linear(width, width)
            self.mlp_norm = nn.LayerNorm(width)
            self.mlp_in = nn.Linear(width, 4 * width)
            self.mlp_out = nn.Linear(4 * width, width)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw the weights on the CPU, as a function of the seed."""
        generator = torch.Generator().manual_seed(seed)
        width = self.queries_QD.shape[1]
        drawn_QD = torch.empty(self.queries_QD.shape).normal_(std=width**-0.5, generator=generator)
        self.queries_QD.copy_(drawn_QD)
        init_linears(self, generator)
        if self.kind == "rqa":
            nn.init.zeros_(self.to_out.weight)
            nn.init.zeros_(self.mlp_out.weight)

    def forward(self, condition: Condition) -> Tensor:
        """Return the queries (B, Q, D) for a packed condition."""
        num, width = self.queries_QD.shape
        x_BQD = self.queries_QD.expand(condition.batch, num, width)
        if self.kind == "metaquery":
            return x_BQD
        queries = self.query_norm(self.queries_QD)
        tokens = self.condition_norm(condition.tokens_TD.to(queries.dtype))
        # The normed queries are the same for every sample, so they are projected once.
        q_QAE = self.to_q(queries).unflatten(-1, (-1, self.head_dim))
        k_TAE = self.to_k(tokens).unflatten(-1, (-1, self.head_dim))
        v_TAE = self.to_v(tokens).unflatten(-1, (-1, self.head_dim))
        q = q_QAE.expand(condition.batch, *q_QAE.shape).flatten(0, 1)
        offsets = torch.arange(
            0, condition.batch * num + 1, num, dtype=torch.int32, device=q.device
        )
        attended = masked_attention(
            q,
            None,
            None,
            offsets,
            prefix_k=k_TAE,
            prefix_v=v_TAE,
            prefix_offsets=condition.offsets,
            lengths=(num,) * condition.batch,
            prefix_lengths=condition.lengths,
        )
        x_BQD = x_BQD + self.to_out(attended.flatten(-2)).view_as(x_BQD)
        return x_BQD + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x_BQD)), approximate="tanh"))

    def flops(self, condition_tokens: float) -> float:
        """Return the forward FLOPs of one image with this many condition tokens.

        Each matrix product counts 2 m n k.
        """
        num, width = self.queries_QD.shape
        if self.kind == "metaquery":
            return 0
        linears = 2 * width * width * (2 * num + 2 * condition_tokens) + 2 * num * 8 * width * width
        return linears + 4 * num * condition_tokens * width


class ConnectorLayer(nn.Module):
    """Pre-norm transformer layer with full attention on (B, C, D), initially the identity."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.attention_norm = nn.LayerNorm(width)
        self.mlp_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x_BCD: Tensor, key_mask_BC: Tensor | None = None) -> Tensor:
        qkv = self.qkv(self.attention_norm(x_BCD)).unflatten(-1, (3, -1, self.head_dim))
        q, k, v = qkv.unbind(2)
        x_BCD = x_BCD + self.out(attend(q, k, v, key_mask_BC))
        return x_BCD + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x_BCD)), approximate="tanh"))


class Connector(nn.Module):
    """A few transformer layers between the MLLM and the generator.

    Source: LLaDA-Image, arXiv 2609.03796.
    """

    block_classes = (ConnectorLayer,)

    def __init__(self, config: AdapterConfig, width: int):
        super().__init__()
        if width % config.head_dim:
            raise InputError(
                f"adapter.head_dim must divide the MLLM's width {width}, got {config.head_dim}"
            )
        self.blocks = nn.ModuleList(
            ConnectorLayer(width, config.head_dim) for _ in range(config.connector_layers)
        )

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw the weights on the CPU, as a function of the seed."""
        init_linears(self, torch.Generator().manual_seed(seed))
        for layer in self.blocks:
            nn.init.zeros_(layer.out.weight)
            nn.init.zeros_(layer.mlp_out.weight)

    def forward(self, x_BCD: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Return the transformed tokens (B, C, D).

        `lengths_B` is how many of the C rows belong to each sample; None means all.
        """
        key_mask_BC = None
        if lengths_B is not None:
            rows_C = torch.arange(x_BCD.shape[1], device=lengths_B.device)
            key_mask_BC = rows_C < lengths_B[:, None]
        for layer in self.blocks:
            x_BCD = layer(x_BCD, key_mask_BC)
        return x_BCD

    def flops(self, num_tokens: float) -> float:
        """Return the forward FLOPs of one image: 2 m n k of every matrix product."""
        return sum(
            linear_flops(layer, num_tokens)
            + attention_flops(num_tokens, num_tokens, layer.out.in_features)
            for layer in self.blocks
        )


def init_linears(module: nn.Module, generator: torch.Generator) -> None:
    """Initialize every linear layer inside: Xavier-uniform weights, zero biases.

    Weights are drawn on the CPU, whatever their device. Source: Glorot and Bengio, 2010.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            drawn = torch.empty(part.weight.shape)
            part.weight.copy_(nn.init.xavier_uniform_(drawn, generator=generator))
            nn.init.zeros_(part.bias)
