"""Configuration of the model: generator shapes and presets, mask, adapter, alignment.

Shape letters, used as suffixes of tensor names in the whole project:

    B images (or captions) in a batch
    P image tokens of the MLLM before masking       V visible image tokens after it
    T condition tokens, packed                      Q residual queries
    C tokens that condition the generator           N latent tokens, L = C + N
    K values in one latent token: channels x patch x patch
    D width         A attention heads         G key-value heads         E head dim
"""

from collections.abc import Collection
from dataclasses import dataclass


class InputError(ValueError):
    """An error in the user's input.

    The message is one line: what was wrong, what was expected, what to do.
    """


def choice(key: str, value: object, allowed: Collection) -> None:
    """Raise InputError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise InputError(f"{key} must be one of {', '.join(map(str, allowed))}; got {value!r}")


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """Shape of a generator. The VAE determines `token_dim` (K), the MLLM `condition_dim`."""

    # mmdit: dual-stream FLUX or Qwen-Image blocks | single_stream: Z-Image blocks
    kind: str = "mmdit"
    # D
    width: int
    # A
    num_heads: int
    # Dual-stream blocks (mmdit) or layers (single_stream).
    num_blocks: int
    # Single-stream FLUX blocks after the dual-stream ones (mmdit only).
    num_single_blocks: int = 0
    # Refiner layers for the latents, and as many for the condition (single_stream only).
    num_refiner_blocks: int = 0
    # K
    token_dim: int = 64
    # Width of the MLLM.
    condition_dim: int = 1536
    rope_theta: float = 10000.0
    # RMS norms have a learned scale (single_stream only).
    norm_affine: bool = True
    # RMS norm of the condition before its projection (mmdit only; single_stream always has one).
    condition_norm: bool = False
    # Rotary positions (mmdit only). corner: rows and columns of the image count from 0, condition
    # tokens are not rotated | centred: they count from the middle of the image, and condition
    # token i is at max(rows // 2, columns // 2) + i on every axis
    positions: str = "corner"

    def __post_init__(self) -> None:
        choice("generator.kind", self.kind, ("mmdit", "single_stream"))
        choice("generator.positions", self.positions, ("corner", "centred"))
        if min(self.width, self.num_heads, self.num_blocks, self.token_dim, self.condition_dim) < 1:
            raise InputError(f"generator sizes must be >= 1, got {self}")
        if self.width % self.num_heads:
            raise InputError(
                "generator.width must be a multiple of num_heads, "
                f"got {self.width} and {self.num_heads}"
            )
        if self.kind == "single_stream" and self.num_single_blocks:
            raise InputError(
                "generator.num_single_blocks is only for kind mmdit. "
                "Set the layers of a single_stream with num_blocks."
            )
        if self.kind == "single_stream" and (self.condition_norm or self.positions != "corner"):
            raise InputError("generator.condition_norm and positions are only for kind mmdit")
        if self.kind == "mmdit" and (self.num_refiner_blocks or not self.norm_affine):
            raise InputError(
                "generator.num_refiner_blocks and norm_affine are only for kind single_stream"
            )
        if any(dim % 2 for dim in self.rope_axes) or sum(self.rope_axes) != self.head_dim:
            multiple = 32 if self.kind == "mmdit" else 16
            raise InputError(
                f"generator head dim must be a multiple of {multiple} (rotary axes), "
                f"got {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        """E, width of one attention head."""
        return self.width // self.num_heads

    @property
    def depth(self) -> int:
        """Number of blocks in sequence, without refiners."""
        return self.num_blocks + self.num_single_blocks

    @property
    def keep_norm(self) -> bool:
        """Whether guided velocities keep the norm of the conditional one, as for Qwen-Image."""
        return self.positions == "centred"

    @property
    def rope_axes(self) -> tuple[int, int, int]:
        """Rotary dims of the (index, row, column) axes.

        At E = 128 they are FLUX's (16, 56, 56) or Z-Image's (32, 48, 48).
        """
        index, place = (2, 7) if self.kind == "mmdit" else (4, 6)
        return self.head_dim * index // 16, self.head_dim * place // 16, self.head_dim * place // 16


PRESETS = {
    "demo": GeneratorConfig(width=96, num_heads=3, num_blocks=6),
    # For benchmarks on a CPU.
    "iomm-b-quarter": GeneratorConfig(width=384, num_heads=6, num_blocks=4),
    "iomm-b": GeneratorConfig(width=1536, num_heads=12, num_blocks=19),
    "iomm-l": GeneratorConfig(width=2048, num_heads=16, num_blocks=18),
    "iomm-xl": GeneratorConfig(
        kind="single_stream",
        width=3840,
        num_heads=30,
        num_blocks=30,
        num_refiner_blocks=2,
        rope_theta=256.0,
    ),
    "qwen-image": GeneratorConfig(
        width=3072,
        num_heads=24,
        num_blocks=60,
        condition_dim=3584,
        condition_norm=True,
        positions="centred",
    ),
}


RECONSTRUCT = "Generate an image that is identical to the reference image:"


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Texts of the user turn that the MLLM reads (Algorithm 1, step 5)."""

    # Prompt before the image tokens. With several, as a YAML list or separated by " | ", each
    # sample draws one.
    reconstruct: tuple[str, ...] = (RECONSTRUCT,)
    # Template of captions, in training and for prompts; it contains {caption} once. LLaDA-Image and
    # OpenUni use "Generate an image: {caption}".
    caption: str = "{caption}"
    # Text in place of a dropped caption, and for the other half of classifier-free guidance.
    empty: str = ""

    def __post_init__(self) -> None:
        # JSON has lists.
        object.__setattr__(self, "reconstruct", tuple(self.reconstruct))
        if not self.reconstruct or not all(self.reconstruct):
            raise InputError(
                f"prompt.reconstruct must be one or more texts, none empty, got {self.reconstruct}"
            )
        if self.caption.count("{caption}") != 1:
            raise InputError(
                f"prompt.caption must contain {{caption}} exactly once, got {self.caption!r}"
            )

    def text_of(self, caption: str) -> str:
        """Return the text that the MLLM reads for a caption; "" becomes the empty prompt."""
        return self.caption.replace("{caption}", caption) if caption else self.empty


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Which image tokens are hidden from the MLLM (Algorithm 1, step 4)."""

    # Probability that an image token is hidden.
    ratio: float = 0.85
    # drop: hidden tokens never enter the MLLM | zero: they enter as zeros
    mode: str = "drop"
    # bernoulli: each is hidden with probability ratio | fixed: exactly round((1 - ratio) P) stay
    count: str = "bernoulli"
    # original: visible tokens keep their position ids | compact: they are renumbered
    positions: str = "original"

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio <= 1.0:
            raise InputError(f"mask.ratio must be between 0 and 1, got {self.ratio}")
        choice("mask.mode", self.mode, ("drop", "zero"))
        choice("mask.count", self.count, ("bernoulli", "fixed"))
        choice("mask.positions", self.positions, ("original", "compact"))


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What is appended to the condition before the MLLM (Algorithm 1, step 6)."""

    # rqa: queries cross-attend to the condition | metaquery: only learned queries | none
    kind: str = "rqa"
    # Number of residual queries (Q).
    num_queries: int = 256
    # Head dim (E) of the cross-attention.
    head_dim: int = 128
    # causal | bidirectional: attention among the queries inside the MLLM
    attention: str = "causal"
    # query | all: which MLLM outputs condition the generator
    conditions: str = "query"
    # Transformer layers between the MLLM and the generator.
    connector_layers: int = 0

    def __post_init__(self) -> None:
        choice("adapter.kind", self.kind, ("rqa", "metaquery", "none"))
        choice("adapter.attention", self.attention, ("causal", "bidirectional"))
        choice("adapter.conditions", self.conditions, ("query", "all"))
        for name in ("num_queries", "head_dim"):
            if getattr(self, name) < 1:
                raise InputError(f"adapter.{name} must be >= 1, got {getattr(self, name)}")
        if self.connector_layers < 0:
            raise InputError(f"adapter.connector_layers must be >= 0, got {self.connector_layers}")
        if self.kind == "none" and self.conditions == "query":
            raise InputError("adapter.kind none has no queries. Set adapter.conditions=all.")


@dataclass(frozen=True, kw_only=True)
class RouteConfig:
    """Token routing in training (TREAD, arXiv 2501.04765): latent tokens skip the middle blocks.

    Each draw of a sample has its own tokens. Sampling and evaluation run all tokens through all
    blocks. It is beyond the paper and off by default.
    """

    # Share of the latent tokens that skip the blocks; 0 turns routing off.
    ratio: float = 0.0
    # First block that they skip, counted from 1.
    first: int = 3
    # Last block that they skip; 0: the third from the end.
    last: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio < 1.0:
            raise InputError(f"route.ratio must be at least 0 and below 1, got {self.ratio}")
        if self.first < 1 or self.last < 0:
            raise InputError(
                f"route.first must be >= 1 and route.last >= 0, got {self.first} and {self.last}"
            )

    def blocks_in(self, generator: GeneratorConfig) -> tuple[int, int]:
        """Return the first and the last block that tokens skip in a generator.

        Raises:
            InputError: the generator has no such blocks, or is not an mmdit.
        """
        first, last, depth = self.first, self.last or generator.num_blocks - 2, generator.num_blocks
        if generator.kind != "mmdit":
            raise InputError(
                f"route.ratio works with generators of kind mmdit, got {generator.kind}: set "
                "route.ratio=0"
            )
        # The last dual-stream block may return no condition, and all tokens must leave it.
        if not first <= last < depth:
            raise InputError(
                f"route.first and route.last must be blocks from 1 to {depth - 1} in this order, "
                f"got {first} and {last}"
            )
        return first, last

    def num_kept(self, num_latents: int) -> int:
        """Return how many of a sample's latent tokens run through all blocks."""
        return max(1, round((1 - self.ratio) * num_latents))


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Fine-tuning of a frozen generator by LoRA (arXiv 2106.09685)."""

    # Rank of the matrices A and B, which are all that is trained: generator, adapter and connector
    # keep the weights of run.init. 0: no LoRA, everything is trained. The paper uses 64.
    rank: int = 0
    # B A is multiplied by alpha / rank.
    alpha: float = 64.0
    # Probability that a number is dropped from the input of A in training.
    dropout: float = 0.0
    # Layers of the generator with LoRA, by the name in diffusers or its end, as a YAML list or
    # separated by " | "; * matches any text. Empty: attention, MLPs and time embedding, as in
    # TwinFlow by the paper's authors (TARGETS in iomm/lora.py).
    targets: tuple[str, ...] = ()
    # Each rank of a node keeps an equal part of the frozen blocks, which are gathered one at a time
    # for their forward and their backward pass. Saves memory, costs messages within the node.
    shard_base: bool = False

    def __post_init__(self) -> None:
        # JSON has lists, and an empty text is no target.
        object.__setattr__(self, "targets", tuple(filter(None, self.targets)))
        if self.rank < 0:
            raise InputError(f"lora.rank must be >= 0, got {self.rank}")
        if not self.alpha > 0:
            raise InputError(f"lora.alpha must be > 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"lora.dropout must be in [0, 1), got {self.dropout}")
        if self.shard_base and not self.rank:
            raise InputError(
                "lora.shard_base shards the frozen base of LoRA, but lora.rank is 0: set lora.rank "
                "or leave lora.shard_base out"
            )


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """Alignment of a generator block with the frozen ViT (REPA, arXiv 2410.06940).

    It is beyond the paper and off by default.
    """

    # Weight of the alignment loss added to the velocity loss; 0 turns alignment off.
    weight: float = 0.0
    # Generator block that is aligned, counted from 1; 0: a third of the depth, rounded up.
    block: int = 0
    # vit | projector: the ViT's last hidden states, or the image tokens that the MLLM reads
    target: str = "vit"
    # Align pairs too; the ViT then encodes their images only for the alignment.
    pairs: bool = False

    def __post_init__(self) -> None:
        choice("align.target", self.target, ("vit", "projector"))
        for name in ("weight", "block"):
            if getattr(self, name) < 0:
                raise InputError(f"align.{name} must be >= 0, got {getattr(self, name)}")

    def block_in(self, depth: int) -> int:
        """Return the number of the aligned block in a generator of `depth` blocks.

        Raises:
            InputError: if the generator has fewer blocks.
        """
        if self.block > depth:
            raise InputError(
                f"align.block must be at most {depth}, the generator's number of blocks, "
                f"got {self.block}"
            )
        return self.block or -(-depth // 3)
