"""What ZeRO-3 sends in one optimizer step, counted from the modules by DeepSpeed's own rules; nothing is run. And what the
row kernels between matrix products move through memory.

The rules are those of deepspeed/runtime/zero/partitioned_param_coordinator.py (0.19) once its trace is complete, from the
second micro-batch on: a module's weights are gathered when it is entered, up to prefetch_bucket_size more ahead of their use,
and they go when it is left unless they come again within max_reuse_distance. tests/benchmarks/test_traffic.py holds the count against
the bytes that two ranks send. Known limits: every parameter is taken to get a gradient (single-stream pad tokens get none
at lengths that are multiples of 32), and with max_live_parameters below one block gathers came out 1.3 % too few.
"""

import math
from collections import Counter, deque
from dataclasses import dataclass

import torch
from torch import nn

from iomm.engine.dry_run import NUM_TEXT
from iomm.engine.parallel.optim import make_optimizer
from iomm.engine.parallel.zero import deepspeed_config

# DeepSpeed's own, where deepspeed_config leaves them out (runtime/zero/config.py).
DEFAULTS = {
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "reduce_bucket_size": 500_000_000,
    "sub_group_size": 1_000_000_000,
    "zero_hpz_partition_size": 1,
}


@dataclass(frozen=True, kw_only=True)
class Message:
    """One collective over `group` ranks. size_bytes: of the whole tensor, padding included (all_to_all: of what one rank
    holds). It is issued at visit `issued` and waited for at visit `needed`.
    """

    kind: str
    size_bytes: int
    group: int
    issued: int = 0
    needed: int = 0

    @property
    def sent_bytes(self):
        """What one rank sends, by the ring algorithm: every rank's share passes every other rank once."""
        passes = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "all_to_all": 1}[self.kind]
        return passes * self.size_bytes * (self.group - 1) // self.group


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """visits: (is backward, values of weights used there) for every module in the order of a micro-batch. first, later: the
    messages of a step's first micro-batch and of each other (they differ with hierarchical partitioning alone). step: those
    of the optimizer's step.
    """

    visits: list
    first: list
    later: list
    step: list

    def sent_bytes(self, accumulation):
        """{kind: bytes that one rank sends in a step of so many micro-batches}."""
        sent = Counter()
        for messages, times in ((self.first, 1), (self.later, accumulation - 1), (self.step, 1)):
            for message in messages:
                sent[message.kind] += times * message.sent_bytes
        return dict(sent)


@dataclass(frozen=True)
class Visit:
    """A module entered on the way forward or back: its direct parameters, all inside it, whether it is a ZeRO-3 leaf."""

    direct: tuple
    inside: tuple
    leaf: bool
    backward: bool

    @property
    def own(self):
        """Parameters that are gathered for it."""
        return self.inside if self.leaf else self.direct


def count_traffic(model, config, ranks, **settings):
    """IOMM (weights may be on the meta device), RunConfig, number of ranks -> Traffic. settings: keys of DeepSpeed's
    zero_optimization that replace the config's.
    """
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

    def message(kind, parameters, width, **where):
        return Message(
            kind=kind,
            size_bytes=width * sum(-(-numel[p] // ranks) * ranks for p in parameters),
            **where,
        )

    def micro_batch(copied):
        """Messages of one; `copied`: parameters of which the ranks of a machine already hold a second copy."""
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
    shared = settings["zero_hpz_partition_size"] > 1
    after = [
        message("all_gather", [id(p)], itemsize, group=ranks)
        for p in model.parameters()
        if id(p) in persistent
    ]
    # Whether all is finite.
    after += [Message(kind="all_reduce", size_bytes=4, group=ranks)]
    for group in make_optimizer(model, config.optim).param_groups:
        cuts = [-(-p.numel() // ranks) for p in group["params"]]
        parts = sub_groups(cuts, settings["sub_group_size"])
        # Norm of the gradient, float64
        after += [Message(kind="all_reduce", size_bytes=8, group=ranks)] * len(parts)
        # fp32 updates to their owners and back
        if group["kind"] == "muon" and ranks > 1:
            after += [
                Message(kind="all_to_all", size_bytes=4 * sum(part), group=ranks) for part in parts
            ] * 2
    return Traffic(
        visits=[(visit.backward, sum(numel[p] for p in visit.own)) for visit in visits],
        first=micro_batch(set()),
        later=micro_batch(set(numel) if shared else set()),
        step=after,
    )


def sub_groups(cuts, size):
    """Numbers of values, cut where their sum reaches `size`: each part is one flat tensor of the optimizer."""
    parts = [[]]
    for cut in cuts:
        if sum(parts[-1]) >= size:
            parts.append([])
        parts[-1].append(cut)
    return parts


def trace_of(model):
    """[(Visit, True on entering, False on leaving)] of one pass forward and back: parts in the order of IOMM.forward, inside
    them the order in which modules were made; back the other way round.

    IOMM.dtype looks at generator.final.weight: DeepSpeed takes that for a parameter of IOMM itself.
    """
    leaves, asked = model.leaves, (id(model.generator.final.weight),)

    def walk(module, children, backward):
        if not any(True for _ in module.parameters()):
            return []
        # Never called
        if isinstance(module, nn.ModuleList):
            return [
                event for child in children(module) for event in walk(child, children, backward)
            ]
        leaf = isinstance(module, leaves)
        direct, inside = (
            tuple(id(p) for p in module.parameters(recurse=recurse)) for recurse in (False, True)
        )
        visit = Visit(asked if module is model else direct, inside, leaf, backward)
        inner = (
            []
            if leaf
            else [event for child in children(module) for event in walk(child, children, backward)]
        )
        return [(visit, True), *inner, (visit, False)]

    def forward(module):
        if module is model:
            parts = model.adapter, model.connector, model.generator, model.alignment
            return [part for part in parts if part is not None]
        return list(module.children())

    return walk(model, forward, False) + walk(model, lambda module: forward(module)[::-1], True)


def gathered(trace, numel, persistent, copied, ranks, settings):
    """[(parameters gathered in one message, ranks that take part, visit that issues it, visit that needs it)]."""
    visits = [visit for visit, entered in trace if entered]
    queue = deque((p, step) for step, visit in enumerate(visits) for p in visit.own)
    available, copied, latest, held, step, found = set(persistent), set(copied), {}, 0, 0, []
    hpz, reuse, ahead_of_use = (
        settings[key]
        for key in (
            "zero_hpz_partition_size",
            "stage3_max_reuse_distance",
            "stage3_prefetch_bucket_size",
        )
    )

    def gather(parameters, needed):
        for part, group in (
            ([p for p in parameters if p in copied], hpz),
            ([p for p in parameters if p not in copied], ranks),
        ):
            if part:
                found.append((part, group, step, needed))
        if hpz > 1:
            copied.update(parameters)
        available.update(parameters)
        return sum(numel[p] for p in parameters)

    for visit, entered in trace:
        if entered:
            held += gather([p for p in visit.own if p not in available], step)
            fresh, taken = {p for p in visit.own if latest.get(p, -1) < step}, set()
            while queue and len(taken) < len(fresh):
                p, at = queue.popleft()
                latest[p] = at
                taken.add(p)
            limit, ahead, total = (
                min(settings["stage3_max_live_parameters"] - held, ahead_of_use),
                [],
                0,
            )
            while queue and total < limit:
                p, at = queue.popleft()
                latest[p] = max(latest.get(p, -1), at)
                if p not in available and p not in ahead:
                    ahead.append(p)
                    total += numel[p]
            if ahead:
                held += gather(
                    ahead,
                    next(
                        i
                        for i in range(step + 1, len(visits))
                        if not set(ahead).isdisjoint(visits[i].own)
                    ),
                )
            step += 1
            continue
        free = {p for p in visit.own if p not in persistent and latest.get(p, -1) <= step}
        if visit.inside != visits[0].inside:
            # In use until IOMM is left.
            free.difference_update(visits[0].own)
        passed = 0
        for later in visits[step:]:
            if passed >= reuse:
                break
            # as DeepSpeed does it: by what is left, not by what comes
            coming = later.inside if visit.leaf else later.direct
            free.difference_update(coming)
            passed += sum(numel[p] for p in coming)
        free &= available
        available -= free
        held -= sum(numel[p] for p in free)
    return found


def scattered(trace, numel, bucket):
    """[(parameters whose gradients are reduced in one message, visit after which it is issued)]."""
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


def row_bytes(model, config):
    """{part: (bytes forward, bytes backward)} of an image for all that is no matrix product: every tensor that a kernel reads or
    writes, once, in bf16. The small numbers are passes over a (tokens x width) tensor, counted as in benchmarks/lib/op_cases.py.
    """
    (mllm, vae), generator = model.frozen, model.generator
    width, tokens = (
        generator.config.width,
        math.prod(vae.grid(*[config.data.size_px] * 2)) + config.adapter.num_queries,
    )
    blocks = sum(isinstance(module, generator.block_classes) for module in generator.modules())
    # 2 norms, rope, 2 gated residuals, GELU at 4 x; backward also bias and residual sums
    if generator.config.kind == "mmdit":
        forward, backward = 2 * 2 + 6 + 2 * 3 + 2 * 4, 2 * 3 + 8 + 2 * 3 + 3 * 4 + 9 + 2 * 3
    else:
        # 4 RMS norms, rope, 2 gated residuals, SwiGLU at 8/3 x; backward also residual sums
        forward, backward = 4 * 2 + 6 + 2 * 3 + 3 * 8 / 3, 4 * 3 + 8 + 2 * 3 + 5 * 8 / 3 + 2 * 3
    text, vision = mllm.backbone.config.text_config, mllm.backbone.config.vision_config
    prefix, queries = (
        NUM_TEXT + mllm.num_image_tokens * (1 - config.mask.ratio),
        config.adapter.num_queries,
    )
    layers, gate = (
        2 * text.hidden_size * text.num_hidden_layers,
        text.intermediate_size / text.hidden_size,
    )
    patches = (vision.image_size[0] // vision.patch_size[0]) ** 2 + 1
    maps, side = 0, config.data.size_px
    # A residual block: 2 group norms, each read twice and written once; a sum.
    for down in vae.backbone.encoder.down_blocks:
        maps += sum(
            side**2 * (3 * resnet.norm1.num_channels + 6 * resnet.norm2.num_channels)
            for resnet in down.resnets
        )
        side //= 2 if down.downsamplers else 1
    return {
        "generator": tuple(2 * tokens * width * blocks * passes for passes in (forward, backward)),
        # 2 norms, rope, 2 residual sums, SwiGLU
        "MLLM": (
            layers * (prefix + queries) * (2 * 2 + 4 + 2 * 3 + 3 * gate),
            layers * queries * (2 * 3 + 4 + 2 * 2 + 5 * gate),
        ),
        # 2 norms, heads apart, 2 scaled residuals, GELU at 4 x
        "ViT": (
            2
            * patches
            * vision.hidden_size
            * vision.num_hidden_layers
            * (2 * 2 + 6 + 2 * 3 + 2 * 4),
            0,
        ),
        "VAE": (2 * maps, 0),
    }
