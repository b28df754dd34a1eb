"""Count what is sent in an optimizer step, and what the row kernels move through memory.

ZeRO's messages are counted from the modules by DeepSpeed's own rules, without running anything,
and those of lora.shard_base by the rules of engine/parallel/base_shards.py. The row kernels are
those between the matrix products.

At stage 3 the rules are those of deepspeed/runtime/zero/partitioned_param_coordinator.py (0.19)
once its trace is complete, which is from the second micro-batch on. A module's weights are gathered
when it is entered, and up to prefetch_bucket_size more are prefetched. They are released when the
module is left, unless they are used again within max_reuse_distance. The count is compared with the
collectives of two ranks by tests/benchmarks/test_traffic.py, and with the bytes that two to four
hosts put on the wire by tests/faults/wire.py.

Known limits: every parameter is assumed to get a gradient (single-stream pad tokens get none at
lengths that are multiples of 32), and with max_live_parameters below one block the gathers were
counted 1.3 % too low. Muon is counted at stage 3 only.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from iomm.engine.config import RunConfig
from iomm.engine.parallel.base_shards import NODE, base_gathers, base_parts
from iomm.engine.parallel.optim import make_optimizer
from iomm.engine.parallel.zero import deepspeed_config
from iomm.generator import blocks_of
from iomm.lora import layers_with_lora
from iomm.model import IOMM

# DeepSpeed's defaults for settings that deepspeed_config leaves out (runtime/zero/config.py).
DEFAULTS = {
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "reduce_bucket_size": 500_000_000,
    "sub_group_size": 1_000_000_000,
    "zero_hpz_partition_size": 1,
}


# How often a rank's share of a message passes each rank. NCCL's rings send the least; gloo, which
# joins CPUs, scatters a sum by summing everything everywhere.
PASSES = {
    "nccl": {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "all_to_all": 1},
    "gloo": {"all_gather": 1, "reduce_scatter": 2, "all_reduce": 2, "all_to_all": 1},
}


@dataclass(frozen=True, kw_only=True)
class Message:
    """One collective over `group` ranks.

    size_bytes: size of the whole tensor including padding (all_to_all: of one rank's input). The
    message is issued at visit `issued` and waited for at visit `needed`.
    """

    kind: str
    size_bytes: int
    group: int
    issued: int = 0
    needed: int = 0

    def sent_bytes(self, backend: str = "nccl") -> int:
        """Return the bytes that one rank sends, without headers."""
        passes = PASSES[backend][self.kind]
        return passes * self.size_bytes * (self.group - 1) // self.group


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The messages of an optimizer step.

    Attributes:
        visits: (is backward, number of weights used) for every module in the order of a
            micro-batch.
        first: messages of a step's first micro-batch.
        later: messages of each later micro-batch. At stage 3, they differ from the first one's only
            with hierarchical partitioning.
        step: messages of the optimizer's step.
    """

    visits: list[tuple[bool, int]]
    first: list[Message]
    later: list[Message]
    step: list[Message]

    def sent_bytes(self, accumulation: int, backend: str = "nccl") -> dict[str, int]:
        """Return {kind: bytes that one rank sends in a step of `accumulation` micro-batches}."""
        sent = Counter()
        for messages, times in ((self.first, 1), (self.later, accumulation - 1), (self.step, 1)):
            for message in messages:
                sent[message.kind] += times * message.sent_bytes(backend)
        return dict(sent)


@dataclass(frozen=True)
class Visit:
    """A module entered in the forward or backward pass.

    direct: ids of its direct parameters; inside: ids of all parameters in it; leaf: True if it is a
    ZeRO-3 leaf module.
    """

    direct: tuple
    inside: tuple
    leaf: bool
    backward: bool

    @property
    def own(self) -> tuple:
        """Ids of the parameters that are gathered for this module."""
        return self.inside if self.leaf else self.direct


# (visit, True on entering and False on leaving the module).
Trace = list[tuple[Visit, bool]]


class Gather(NamedTuple):
    """Parameters that are gathered in one message."""

    parameters: list[int]
    # Number of ranks that take part.
    group: int
    # Visit that issues it.
    issued: int
    # Visit that needs it.
    needed: int


def count_traffic(model: IOMM, config: RunConfig, ranks: int, **settings: Any) -> Traffic:
    """Count the messages of an optimizer step.

    Args:
        model: its weights may be on the meta device.
        config: the run.
        ranks: number of ranks. With lora.shard_base, NODE of them are on a node.
        settings: keys of DeepSpeed's zero_optimization that override the config's.
    """
    traffic = count_zero(model, config, ranks, **settings)
    base = base_messages(model, config, min(ranks, NODE)) if config.lora.shard_base else []
    return replace(traffic, first=base + traffic.first, later=base + traffic.later)


def base_messages(model: IOMM, config: RunConfig, node: int) -> list[Message]:
    """Return the messages with which `node` ranks gather the frozen base of LoRA.

    They are issued and needed where a block is visited for its A and B. A block without any counts
    to the one before it.
    """
    blocks = blocks_of(model.generator)
    visits = [visit for visit, entered in trace_of(model) if entered]
    at, passes = [], [(False, blocks), (True, blocks[::-1])]
    for backward, ordered in passes:
        for block in ordered:
            inside = tuple(map(id, block.parameters()))
            found = (
                i for i, v in enumerate(visits) if (v.backward, v.inside) == (backward, inside)
            )
            at.append(next(found, at[-1] if at else 0))
    order = [*range(len(blocks)), *reversed(range(len(blocks)))]
    parts = base_parts(model, node, config.dtype.itemsize)
    return [
        Message(
            kind="all_gather",
            size_bytes=node * parts[block],
            group=node,
            issued=at[visit],
            needed=at[visit + (order[visit] != block)],
        )
        for visit, block in base_gathers(model)
    ]


def count_zero(model: IOMM, config: RunConfig, ranks: int, **settings: Any) -> Traffic:
    """Count the messages that ZeRO sends, as count_traffic does."""
    whole = deepspeed_config(config, torch.device("cuda"), 1, 1)
    settings = {**DEFAULTS, **whole["zero_optimization"], **settings}
    itemsize = config.dtype.itemsize
    reduced = {"bf16": 2, "fp16": 2, "fp32": 4, None: itemsize}[
        whole.get("communication_data_type")
    ]
    numel = {id(p): p.numel() for p in model.parameters()}
    persistent = {
        p for p, number in numel.items() if number <= settings["stage3_param_persistence_threshold"]
    }

    def message(kind: str, parameters: Iterable[int], width: int, **where: int) -> Message:
        return Message(
            kind=kind,
            size_bytes=width * sum(-(-numel[p] // ranks) * ranks for p in parameters),
            **where,
        )

    def micro_batch(copied: set[int]) -> list[Message]:
        """Return the messages of a micro-batch.

        copied: parameters of which the ranks of a machine already hold a second copy.
        """
        gathers = [
            message("all_gather", part, itemsize, group=group, issued=issued, needed=needed)
            for part, group, issued, needed in gathered(
                trace, numel, persistent, copied, ranks, settings
            )
        ]
        return gathers + [
            message("reduce_scatter", part, reduced, group=ranks, issued=issued, needed=len(visits))
            for part, issued in scattered(trace, numel, settings["reduce_bucket_size"])
        ]

    trace = trace_of(model)
    visits = [visit for visit, entered in trace if entered]
    weights = [(visit.backward, sum(numel[p] for p in visit.own)) for visit in visits]
    if config.zero.stage < 3:
        return replicated_weights(model, config, ranks, weights, reduced)
    shared = settings["zero_hpz_partition_size"] > 1
    after = [
        message("all_gather", [id(p)], itemsize, group=ranks)
        for p in model.parameters()
        if id(p) in persistent
    ]
    # The check that all gradients are finite.
    after += [Message(kind="all_reduce", size_bytes=4, group=ranks)]
    for group in make_optimizer(model, config.optim).param_groups:
        cuts = [-(-p.numel() // ranks) for p in group["params"]]
        parts = sub_groups(cuts, settings["sub_group_size"])
        # The norm of the gradient, in float64.
        after += [Message(kind="all_reduce", size_bytes=8, group=ranks)] * len(parts)
        # The fp32 updates are sent to their owners and back.
        if group["kind"] == "muon" and ranks > 1:
            after += [
                Message(kind="all_to_all", size_bytes=4 * sum(part), group=ranks) for part in parts
            ] * 2
    return Traffic(
        visits=weights,
        first=micro_batch(set()),
        later=micro_batch(set(numel) if shared else set()),
        step=after,
    )


def replicated_weights(
    model: IOMM, config: RunConfig, ranks: int, visits: list[tuple[bool, int]], reduced: int
) -> Traffic:
    """Count the messages at stages 0 to 2, where weights are whole on every rank.

    Gradients are summed on all ranks: at stage 2 in every micro-batch, else once in a step. From
    stage 1 on, the new weights are gathered.

    Args:
        model: its weights may be on the meta device.
        config: the run.
        ranks: number of ranks.
        visits: those of the result.
        reduced: size of a gradient's value in bytes.

    Raises:
        ValueError: The optimizer is Muon, whose messages are counted at stage 3 only.
    """
    stage, groups = config.zero.stage, make_optimizer(model, config.optim).param_groups
    if any(group["kind"] == "muon" for group in groups):
        raise ValueError(f"optim.kind muon is not counted at zero.stage {stage}: set zero.stage 3")
    numels = [sum(p.numel() for p in group["params"]) for group in groups]

    def all_reduce(size_bytes: int) -> Message:
        last = len(visits)
        return Message(
            kind="all_reduce", size_bytes=size_bytes, group=ranks, issued=last - 1, needed=last
        )

    gradients = [all_reduce(reduced * numel) for numel in numels]
    # The check that all gradients are finite.
    after = [all_reduce(4)]
    if stage < 2:
        after += gradients
    # The norm of the gradient. At stage 1 with bf16, DeepSpeed's optimizer is another one, which
    # computes the norm of the whole gradient on every rank.
    if stage == 2 or (stage == 1 and config.dtype == torch.float32):
        after.append(all_reduce(4))
    if stage == 2 and config.dtype == torch.bfloat16:
        # DeepSpeed's own check for overflow.
        after.append(all_reduce(1))
    if stage > 0:
        # DeepSpeed pads a group to an even number of values on each rank.
        after += [
            Message(
                kind="all_gather",
                size_bytes=config.dtype.itemsize * -(-numel // (2 * ranks)) * 2 * ranks,
                group=ranks,
            )
            for numel in numels
        ]
    micro_batch = gradients if stage == 2 else []
    return Traffic(visits=visits, first=micro_batch, later=micro_batch, step=after)


def sub_groups(cuts: list[int], size: int) -> list[list[int]]:
    """Split a list of numbers of values wherever their sum reaches `size`.

    Each part is one flat tensor of the optimizer.
    """
    parts = [[]]
    for cut in cuts:
        if sum(parts[-1]) >= size:
            parts.append([])
        parts[-1].append(cut)
    return parts


def trace_of(model: IOMM) -> Trace:
    """Return the trace of a forward and a backward pass.

    The parts of IOMM are visited in the order of IOMM.forward, and the modules inside them in the
    order of their creation; the backward pass visits them in reverse.
    """
    # IOMM.dtype reads generator.final.weight, so DeepSpeed treats it as a parameter of IOMM itself.
    # With LoRA it is none.
    leaves, final = model.leaves, model.generator.final.weight
    direct_of_model = (id(final),) if isinstance(final, nn.Parameter) else ()

    def walk(
        module: nn.Module, children: Callable[[nn.Module], list[nn.Module]], backward: bool
    ) -> Trace:
        if not any(True for _ in module.parameters()):
            return []
        # A ModuleList is never called itself.
        if isinstance(module, nn.ModuleList):
            return [
                event for child in children(module) for event in walk(child, children, backward)
            ]
        leaf = isinstance(module, leaves)
        direct, inside = (
            tuple(id(p) for p in module.parameters(recurse=recurse)) for recurse in (False, True)
        )
        visit = Visit(direct_of_model if module is model else direct, inside, leaf, backward)
        inner = (
            []
            if leaf
            else [event for child in children(module) for event in walk(child, children, backward)]
        )
        return [(visit, True), *inner, (visit, False)]

    def forward(module: nn.Module) -> list[nn.Module]:
        if module is model:
            parts = model.adapter, model.connector, model.generator, model.alignment
            return [part for part in parts if part is not None]
        return list(module.children())

    return walk(model, forward, False) + walk(model, lambda module: forward(module)[::-1], True)


def gathered(
    trace: Trace,
    numel: dict[int, int],
    persistent: set[int],
    copied: set[int],
    ranks: int,
    settings: dict,
) -> list[Gather]:
    """Return the gathers of a micro-batch.

    Args:
        trace: the order of modules.
        numel: number of values of each parameter, by id.
        persistent: parameters that are never partitioned.
        copied: parameters of which the ranks of a machine already hold a second copy.
        ranks: number of ranks.
        settings: DeepSpeed's zero_optimization.
    """
    visits = [visit for visit, entered in trace if entered]
    queue = deque((p, step) for step, visit in enumerate(visits) for p in visit.own)
    available, copied, latest = set(persistent), set(copied), {}
    num_live, step, found = 0, 0, []
    hpz, reuse, prefetch_bucket = (
        settings[key]
        for key in (
            "zero_hpz_partition_size",
            "stage3_max_reuse_distance",
            "stage3_prefetch_bucket_size",
        )
    )

    def gather(parameters: list[int], needed: int) -> int:
        for part, group in (
            ([p for p in parameters if p in copied], hpz),
            ([p for p in parameters if p not in copied], ranks),
        ):
            if part:
                found.append(Gather(part, group, step, needed))
        if hpz > 1:
            copied.update(parameters)
        available.update(parameters)
        return sum(numel[p] for p in parameters)

    for visit, entered in trace:
        if entered:
            num_live += gather([p for p in visit.own if p not in available], step)
            fresh, taken = {p for p in visit.own if latest.get(p, -1) < step}, set()
            while queue and len(taken) < len(fresh):
                p, at = queue.popleft()
                latest[p] = at
                taken.add(p)
            limit = min(settings["stage3_max_live_parameters"] - num_live, prefetch_bucket)
            prefetched, total = [], 0
            while queue and total < limit:
                p, at = queue.popleft()
                latest[p] = max(latest.get(p, -1), at)
                if p not in available and p not in prefetched:
                    prefetched.append(p)
                    total += numel[p]
            if prefetched:
                num_live += gather(
                    prefetched,
                    next(
                        i
                        for i in range(step + 1, len(visits))
                        if not set(prefetched).isdisjoint(visits[i].own)
                    ),
                )
            step += 1
            continue
        free = {p for p in visit.own if p not in persistent and latest.get(p, -1) <= step}
        if visit.inside != visits[0].inside:
            # These stay in use until IOMM is left.
            free.difference_update(visits[0].own)
        passed = 0
        for later in visits[step:]:
            if passed >= reuse:
                break
            # DeepSpeed decides by the module that is left, not by the later one.
            coming = later.inside if visit.leaf else later.direct
            free.difference_update(coming)
            passed += sum(numel[p] for p in coming)
        free &= available
        available -= free
        num_live -= sum(numel[p] for p in free)
    return found


def scattered(trace: Trace, numel: dict[int, int], bucket: int) -> list[tuple[list[int], int]]:
    """Return [(parameters whose gradients are reduced in one message, visit after which)]."""
    found, waiting, step, root = [], [], 0, trace[0][0]
    for visit, entered in trace:
        step += entered
        if not entered and visit.backward and visit.inside != root.inside:
            for p in visit.own:
                if waiting and sum(numel[q] for q in waiting) + numel[p] > bucket:
                    found.append((waiting, step - 1))
                    waiting = []
                waiting.append(p)
    return [*found, (waiting, step - 1)] if waiting else found


# Passes over a (tokens x width) tensor of a generator's block, forward and backward, outside matrix
# products and attention. Those of the dual-stream block are read off the code that Inductor
# generates for sm_90 (LOG.md, 2026-11-30), in this order: norms and modulation, gated residuals,
# slices of the attention's output, GELU at 4 x, sums for biases and modulations.
GENERATED = {
    "mmdit": (
        2 + 3 + 4 + 3 + 8,
        # GELU's backward also sums its bias; a norm's backward also adds the residual.
        5.3 + 8 + 5 + 2 + 12 + 8.2,
    ),
    # 4 RMS norms, 2 gated residuals and SwiGLU at 8/3 x; backward also residual sums. Counted from
    # the formulas: this block's generated code has not been looked at.
    "single_stream": (4 * 2 + 2 * 3 + 3 * 8 / 3, 4 * 3 + 2 * 3 + 5 * 8 / 3 + 2 * 3),
}
# The same of qk_norm_rope: generated, where two streams are concatenated, and in our Triton kernel.
# For the joint stream both are counted from the formulas.
ROPE = {
    "mmdit": {"torch": (17.3, 20.7), "triton": (6.0, 9.5)},
    "single_stream": {"torch": (6.0, 8.0), "triton": (6.0, 8.0)},
}


def row_bytes(
    model: IOMM, config: RunConfig, rope: str = "torch"
) -> dict[str, tuple[float, float]]:
    """Return {part: (bytes forward, bytes backward)} of an image without the matrix products.

    These are the reads and writes of the kernels that torch.compile generates, in bf16, without
    attention and without the masks and padding of the MLLM's attention (`padding_elements`).

    Args:
        model: the model, on any device.
        config: the run.
        rope: backend of qk_norm_rope, "torch" or "triton".
    """
    (mllm, vae), generator = model.frozen, model.generator
    tokens = math.prod(vae.grid(*[config.data.size_px] * 2)) + config.adapter.num_queries
    text, vision = mllm.backbone.config.text_config, mllm.backbone.config.vision_config
    prefix, queries = (
        mllm.num_text + mllm.num_image_tokens * (1 - config.mask.ratio),
        config.adapter.num_queries,
    )
    layers, gate = (
        2 * text.hidden_size * text.num_hidden_layers,
        text.intermediate_size / text.hidden_size,
    )
    rotary = 2 * (1 + text.num_key_value_heads / text.num_attention_heads)
    patches = (vision.image_size[0] // vision.patch_size[0]) ** 2 + 1
    return {
        "generator": generator_row_bytes(generator, tokens, rope),
        # 2 norms with their residual sums, rope, SwiGLU.
        "MLLM": (
            layers * (prefix + queries) * (2 * 2 + rotary + 3 * gate),
            layers * queries * (2 * 4 + rotary + 4 * gate),
        ),
        # 2 norms, one with a residual sum, GELU at 4 x, a residual sum.
        "ViT": (2 * patches * vision.hidden_size * vision.num_hidden_layers * (2 + 3 + 4 + 3), 0),
        "VAE": (2 * vae_elements(vae, config.data.size_px), 0),
    }


def generator_row_bytes(
    generator: nn.Module, tokens: float, rope: str = "torch"
) -> tuple[float, float]:
    """Return the generator's entry of `row_bytes` for a number of joint tokens."""
    blocks, kind = len(blocks_of(generator)), generator.config.kind
    passes = (sum(pair) for pair in zip(GENERATED[kind], ROPE[kind][rope], strict=True))
    return tuple(2 * tokens * generator.config.width * blocks * number for number in passes)


def lora_row_bytes(generator: nn.Module, latents: float, condition: float) -> tuple[float, float]:
    """Return the bytes (forward, backward) that the branches of LoRA move for these tokens.

    Per layer and token, in bf16: forward A reads the input, B writes the update, and the sum reads
    both outputs and writes one. Backward the gradient of the output is read twice and the input
    once, and the gradient of the input is written, read twice and written. What has only `rank`
    columns is left out.
    """
    forward = backward = 0
    for name, linear in layers_with_lora(generator).items():
        tokens = latents + condition
        if "latent_stream" in name:
            tokens = latents
        elif "condition_stream" in name:
            tokens = condition
        elif name.startswith("time_in"):
            tokens = 1
        forward += 2 * tokens * (linear.in_features + 4 * linear.out_features)
        backward += 2 * tokens * (5 * linear.in_features + 2 * linear.out_features)
    return forward, backward


def vae_elements(vae: nn.Module, size_px: int) -> float:
    """Return the elements that the VAE encoder's kernels between convolutions read and write."""
    encoder, side, total = vae.backbone.encoder, size_px, 0

    def of(resnets: Iterable[nn.Module]) -> int:
        # 2 group norms, each read twice and written once, and a sum.
        return sum(
            side**2 * (3 * resnet.norm1.num_channels + 6 * resnet.norm2.num_channels)
            for resnet in resnets
        )

    for down in encoder.down_blocks:
        total += of(down.resnets)
        if down.downsamplers:
            # A padded copy.
            total += side**2 * down.resnets[-1].norm2.num_channels
            side //= 2
    return total + of(encoder.mid_block.resnets)


def padding_elements(
    queries: int, keys: int, num_heads: int, num_key_heads: int, head_dim: int
) -> tuple[float, float]:
    """Return the elements that the padded attention of one sample moves, forward and backward.

    sdpa.padded_attention copies queries, keys and values into zeros, repeats the heads of keys and
    values, and gathers the outputs. What the attention itself reads and writes is included.

    Args:
        queries: length of the longest sample's queries.
        keys: length of the longest sample's keys.
        num_heads: heads of the queries.
        num_key_heads: heads of the keys.
        head_dim: size of a head.
    """
    q, k = queries * num_heads * head_dim, keys * num_key_heads * head_dim
    repeated = keys * num_heads * head_dim
    return 9 * q + 12 * k + 4 * repeated, 9 * q + 8 * k + 6 * repeated
