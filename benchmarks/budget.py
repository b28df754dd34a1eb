"""Predict the budget of stage 1 on 1 to 512 GPUs from counts.

    python benchmarks/budget.py [--out FOLDER]

Counted are FLOPs (engine/dry_run.py), the bytes of everything except matrix products, ZeRO-3's
messages (benchmarks/lib/traffic.py), optimizer, EMA and checkpoint. Assumed are the rates; they are
all in ASSUMED and MACHINES, each with its source. The result is the time of every part of a
micro-batch, step time, GPU-hours and the limits of scaling, as printed tables and, with --out, as
budget.json and budget.png in that folder. Nothing is measured here.
"""

from pathlib import Path

from iomm.checkout import enter

ROOT = enter(__file__)

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from torch import nn

from benchmarks.lib.counts import PAPER_EPOCHS, PAPER_HOURS, paper_rate
from benchmarks.lib.traffic import (
    Message,
    Traffic,
    count_traffic,
    generator_row_bytes,
    lora_row_bytes,
    padding_elements,
    row_bytes,
)
from benchmarks.report import pyplot
from iomm.engine.config import RunConfig, load_config
from iomm.engine.dry_run import (
    GPUS as MEMORY,
)
from iomm.engine.dry_run import (
    USABLE,
    Memory,
    build_without_weights,
    kinds,
    largest_that_fits,
    micro_batches,
    packed_condition,
    work,
)
from iomm.engine.observe.doctor import machine
from iomm.engine.parallel.base_shards import NODE
from iomm.engine.parallel.optim import make_optimizer, spread
from iomm.engine.resilience.checkpoint_interval import plan as checkpoint_plan
from iomm.flops import attention_flops, condition_tokens
from iomm.generator import blocks_of
from iomm.model import IOMM

# Everything that is not counted, with its source. "ours" is our own estimate, not yet measured.
ASSUMED = {
    "share of the matmul rate, transformer products": (
        0.80,
        "ours: 1536 to 10240 wide products against 8192^3, without the effect of tiles",
    ),
    "share of the matmul rate, VAE convolutions": (
        0.50,
        "ours: channels-last bf16, 128 to 512 channels, 3 x 3",
    ),
    "attention forward, FLOP/s": (
        590e12,
        "FlashAttention-3 paper (arXiv 2407.08608), H100, head dim 128, 1k to 2k tokens",
    ),
    "attention backward, FLOP/s": (
        435e12,
        "cuDNN in the same tables, which count 2.5 x the forward FLOPs",
    ),
    "share of the copy rate, row kernels": (0.80, "ours: the predictions of LOG.md, 78 to 87 %"),
    "attention of the ViT, FLOP/s": (450e12, "ours: between the two, head dim 64, 1k tokens"),
    "memory-efficient attention, FLOP/s": (
        85e12,
        "ours: PyTorch takes it for masks and for the VAE's head dim of 512; forward, and backward "
        "with 2.5 x the FLOPs",
    ),
    "fp8 products, FLOP/s": (1e15, "ours: half of the 1,979 TFLOP/s of an H100's data sheet"),
    "seconds without work a micro-batch": (
        2e-3,
        "ours: DeepSpeed waits for the last gradients after each backward pass (the only host wait "
        "left, LOG.md 2026-11-30), and the host then issues the next micro-batch",
    ),
    "host seconds a launch": (
        5e-6,
        "ours: the usual cost of one CUDA launch from PyTorch; CUDA graphs are not used",
    ),
    "launches a block and pass": (
        25,
        "ours: a compiled block, decoder or ViT layer; backward twice that",
    ),
    "host seconds a ZeRO-3 visit": (2e-4, "ours: Python of DeepSpeed's hooks around one module"),
    "share of link rates": (
        0.80,
        "DeepSeek-V3 (arXiv 2412.19437, 3.2): 160 of an H800's 200 GB/s NVLink",
    ),
    "to pinned memory, B/s": (40e9, "ours: PCIe 5 x16 carries 64 GB/s"),
    "checkpoint to disk, B/s": (
        5e9,
        "ours: one shared file system, all ranks together, and reading back for the check",
    ),
    "share of memory that a run may fill": (
        USABLE,
        "ours: the rest is the context and the allocator's gaps, as in engine/dry_run.py",
    ),
    "CPU cores a GPU": (12, "ours: 96 cores for 8 GPUs; data.threads of them decode"),
}
# Matmul and copy rates were measured on an H200 (769 to 798 TFLOP/s, of which the lower is used;
# 4.3 TB/s read + write, of 4.8). H100 and H800 are the same chip (989 TFLOP/s dense bf16) with
# 3.35 TB/s, so their copy rate is scaled accordingly. NVLink is from data sheets: 900 GB/s in both
# directions together, 400 on the H800, half of it each way. Network: one 400 Gb/s InfiniBand port
# per GPU, 50 GB/s each way (DGX H100).
GIB = 2**30
MACHINES = {
    "H200": {
        "matmul": 769e12,
        "copy": 4.3e12,
        "nvlink": 450e9,
        "network": 50e9,
        "memory": MEMORY["H200"],
    },
    "H100": {
        "matmul": 769e12,
        "copy": 3.0e12,
        "nvlink": 450e9,
        "network": 50e9,
        "memory": MEMORY["H100"],
    },
    "H800": {
        "matmul": 769e12,
        "copy": 3.0e12,
        "nvlink": 200e9,
        "network": 50e9,
        "memory": MEMORY["H800"],
    },
}
# NCCL's own model of a ring (src/graph/tuning.cc, 2.18 and later): microseconds at the start, for a
# hop over NVLink, and for a hop over the network; share of the bandwidth. NCCL uses the fastest of
# the three protocols.
PROTOCOLS = {
    "LL": (6.6, 0.6 * 1.8, 2.7, 0.25),
    "LL128": (14.0, 1.9, 4.0, 0.92),
    "Simple": (8.4, 3.4, 14.0, 1.0),
}
# Multiprocessors of the chip; a product is split into tiles of 128 x 128.
SMS, TILE = 132, 128
# What is fine-tuned from other people's models, and the settings of LoRA that are compared.
TUNED_MODELS = "qwen-image-512-lora", "qwen-image-1024-lora", "z-image-512"
SHARDING = (
    "",
    " lora.shard_base=true",
    " train.recompute=0",
    " lora.shard_base=true train.recompute=0",
)
CONFIGS, GPUS = ("iomm-b-512", "iomm-l-512", "iomm-xl-512"), (1, 8, 16, 32, 64, 128, 256, 512)
# Micro-batches per step where the optimizer is shared out, as in benchmarks/throughput.py.
PASSES = 4
# Our goals for images/s per GPU online and with cached latents.
GOALS = 61, 80
# Our goal online with everything on, fp8 included.
GOAL_ALL = 70
# Bytes that fp8 products of a generator's block add: per value of an input 2 reads in bf16 and a
# write, per value of an incoming gradient both layouts are written.
FP8_BYTES = 5, 8
# Settings that differ from the defaults: keep 4 GB of bf16 weights, and a second copy of the
# weights within each node (if there are several).
TUNED = {"max_live_parameters": 2_000_000_000, "hpz_partition_size": NODE}


class Inputs(NamedTuple):
    """A config with what is counted from it."""

    config: RunConfig
    # On the meta device.
    model: IOMM
    # FLOPs per image by part.
    flops: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Levers:
    """What decides how fast a run is; the defaults are a GPU's.

    Attributes:
        attention: backend of masked_attention, "varlen", "triton" or "sdpa".
        rope: backend of qk_norm_rope, "triton" or "torch".
        vae_products: the VAE's attention as two products and a softmax.
        fp8: precision=fp8.
        frozen_fp8: model.mllm_precision=fp8.
        draws: train.noise_draws.
        latents: the latents come from a cache and the VAE does not run.
    """

    attention: str = "varlen"
    rope: str = "triton"
    vae_products: bool = True
    fp8: bool = False
    frozen_fp8: bool = False
    draws: int = 1
    latents: bool = False


# Where PyTorch's backends are used instead of those that are the default on a GPU.
PYTORCH = {"attention": "sdpa", "rope": "torch", "vae_products": False}


class PassSeconds(NamedTuple):
    """Seconds of compute of one micro-batch."""

    frozen_forward: float
    generator_forward: float
    frozen_backward: float
    generator_backward: float


def assumed(name: str) -> float:
    """Return an assumed value."""
    return ASSUMED[name][0]


def link_s(message: Message, machine: dict[str, float]) -> float:
    """Return the seconds of one collective that has the links to itself.

    Rings use all rails of a node; all_to_all uses each GPU's own port.
    """
    group, nodes = message.group, math.ceil(message.group / NODE)
    if group == 1:
        return 0.0
    rate = min(
        machine["nvlink"],
        machine["network"] * (NODE if message.kind != "all_to_all" else 1)
        if nodes > 1
        else math.inf,
    )
    turns = 2 if message.kind == "all_reduce" else 1
    hops, over = turns * (group - nodes), turns * (nodes - 1)
    return min(
        (start + hops * near + over * far) * 1e-6
        + message.sent_bytes() / (rate * assumed("share of link rates") * share)
        for start, near, far, share in PROTOCOLS.values()
    )


def filled(rows: int, width: int) -> float:
    """Return the share of the chip that the tiles of a (rows x width) product keep busy.

    It is below 1 because the last wave of tiles is rarely full.
    """
    tiles = math.ceil(rows / TILE) * math.ceil(width / TILE)
    return tiles / (math.ceil(tiles / SMS) * SMS)


@cache
def inputs(name: str) -> Inputs:
    """Return what a config's budget is counted from.

    name: the config, and settings after it: "qwen-image-512-lora lora.shard_base=true".
    """
    config, *settings = name.split()
    config = load_config(config, ["data.shards=shapes", *settings])
    model = build_without_weights(config)
    return Inputs(config, model, work(model, config))


def configured(name: str, ranks: int, tuned: bool) -> RunConfig:
    """Return a config, with the tuned settings that apply to this number of ranks if `tuned`."""
    config, settings = inputs(name).config, {}
    if tuned:
        settings = {
            key: value
            for key, value in TUNED.items()
            if ranks > NODE or key != "hpz_partition_size"
        }
    return replace(config, zero=replace(config.zero, **settings))


@cache
def messages_of(name: str, ranks: int, tuned: bool = False) -> Traffic:
    """Return the messages of a step."""
    return count_traffic(inputs(name).model, configured(name, ranks, tuned), ranks)


@cache
def memory_counts(name: str, tuned: bool) -> Memory:
    """Return the memory of a config; TUNED settings for one machine."""
    return Memory(inputs(name).model, configured(name, NODE, tuned))


def memory_of(name: str, ranks: int, tuned: bool, micro_batch: int) -> float:
    """Return the bytes on a GPU at the peak. engine/dry_run.py counts them."""
    counted = memory_counts(name, tuned)
    counted.config = configured(name, ranks, tuned)
    return counted.total(ranks, micro_batch)


def attention_s(
    name: str, micro_batch: int, machine: dict[str, float], levers: Levers
) -> tuple[float, float]:
    """Return the seconds of the MLLM's attention over a micro-batch, forward and backward.

    The prefix runs forward. With sdpa, samples are padded to the longest and keys are repeated for
    all heads; masked kernels then compute the whole rectangle. varlen joins the keys and values of
    prefix and queries.
    """
    config, model, _ = inputs(name)
    mllm = model.frozen[0]
    text, num = mllm.backbone.config.text_config, config.adapter.num_queries
    longest = packed_condition(model, config, 2).end
    heads = text.num_attention_heads, text.num_key_value_heads
    copy = machine["copy"] * assumed("share of the copy rate, row kernels")
    prefix, queries = (
        attention_flops(n, keys, heads[0] * mllm.head_dim)
        for n, keys in ((longest, longest), (num, longest + num))
    )
    forward_rate, backward_rate = (
        assumed(f"attention {direction}, FLOP/s") for direction in ("forward", "backward")
    )
    # Queries, keys, values and outputs; backward their gradients and what is kept, too.
    elements = [
        (4 * n * heads[0] * mllm.head_dim, 8 * n * heads[0] * mllm.head_dim) for n in (longest, num)
    ]
    if levers.attention == "sdpa":
        forward_rate = backward_rate = assumed("memory-efficient attention, FLOP/s")
        elements = [
            padding_elements(n, keys, *heads, mllm.head_dim)
            for n, keys in ((longest, longest), (num, longest + num))
        ]
    (once, _), (forward, backward) = elements
    if levers.attention == "varlen":
        joined = 4 * (longest + num) * heads[1] * mllm.head_dim
        forward, backward = forward + joined, backward + joined
    times = micro_batch * text.num_hidden_layers
    return (
        times * ((prefix + queries) / forward_rate + 2 * (once + forward) / copy),
        times * (2.5 * queries / backward_rate + 2 * backward / copy),
    )


def micro_batch_parts(
    name: str,
    micro_batch: int,
    machine: dict[str, float],
    levers: Levers = Levers(),
    ranks: int = 1,
) -> dict[str, PassSeconds]:
    """Return {part: seconds of compute} of one micro-batch, in the order in which parts run.

    A measured profile can be laid beside it line by line.
    """
    config, model, flops = inputs(name)
    (mllm, vae), generator = model.frozen, model.generator
    if config.lora.rank:
        return lora_parts(name, micro_batch, machine)
    grid = vae.grid(*[config.data.size_px] * 2)
    rows = {"latent_stream": math.prod(grid), "condition_stream": config.adapter.num_queries}
    tokens, width = sum(rows.values()), generator.config.width
    blocks = blocks_of(generator)
    # FLUX's last block does a fifth less, which is 0.1 % of the sum.
    attention = len(blocks) * attention_flops(tokens, tokens, width)
    matmul = machine["matmul"]
    rate = matmul * assumed("share of the matmul rate, transformer products")
    fp8_rate = assumed("fp8 products, FLOP/s")
    copy = machine["copy"] * assumed("share of the copy rate, row kernels")
    linears = [
        (micro_batch * rows.get(path.partition(".")[0], tokens), m)
        for path, m in blocks[0].named_modules()
        if isinstance(m, nn.Linear) and "modulation" not in path
    ]
    busy = sum(n * m.weight.numel() for n, m in linears) / sum(
        n * m.weight.numel() / filled(n, m.out_features) for n, m in linears
    )
    moved = {
        part: [micro_batch * n / copy for n in pair]
        for part, pair in row_bytes(model, config, levers.rope).items()
    }
    encoded = 0 if levers.latents else micro_batch / levers.draws
    latents = (config.data.size_px // vae.factor) ** 2
    mid = attention_flops(latents, latents, vae.backbone.config.block_out_channels[-1])
    mid_s = mid / assumed("memory-efficient attention, FLOP/s")
    if levers.vae_products:
        # The scores are written, read, written as weights and read again.
        mid_s = mid / rate + 8 * latents**2 / copy
    vit_attention = attention_flops(*[vit_tokens(model)] * 2, mllm.vit_width)
    vit_attention *= mllm.backbone.config.vision_config.num_hidden_layers
    frozen_rate = fp8_rate if levers.frozen_fp8 else rate
    vit_s = (
        (flops["ViT"] - vit_attention) / frozen_rate
        + vit_attention / assumed("attention of the ViT, FLOP/s")
        + moved["ViT"][0] / micro_batch
    )
    # The queries take as long forward as backward, and the prefix is small. Attention is apart.
    mllm_s = micro_batch * (flops["MLLM"] + flops["adapter"]) / 2 / frozen_rate
    mllm_attention = attention_s(name, micro_batch, machine, levers)
    once = micro_batch * (flops["generator"] / 3 - attention)
    added = 0.0
    if levers.fp8:
        # Values of the inputs and of the gradients of qkv, out and a feed-forward of 4 x.
        num_values = tokens * width * len(blocks)
        added = micro_batch * num_values * (7 * FP8_BYTES[0] + 9 * FP8_BYTES[1]) / copy
    product_rate = (fp8_rate if levers.fp8 else rate) * busy
    generator_parts = {
        "generator products": (once / product_rate, 2 * once / product_rate),
        "generator attention": (
            micro_batch * attention / assumed("attention forward, FLOP/s"),
            2.5 * micro_batch * attention / assumed("attention backward, FLOP/s"),
        ),
        "generator rows": (moved["generator"][0], moved["generator"][1] + added),
    }
    again = min(config.train.recompute, len(blocks)) / len(blocks)
    trained = sum(p.numel() for p in model.parameters())
    return {
        "VAE convolutions": PassSeconds(
            encoded
            * (flops["VAE"] - mid)
            / (matmul * assumed("share of the matmul rate, VAE convolutions")),
            0,
            0,
            0,
        ),
        "VAE rows": PassSeconds(encoded * moved["VAE"][0] / micro_batch, 0, 0, 0),
        "VAE mid attention": PassSeconds(encoded * mid_s, 0, 0, 0),
        "ViT": PassSeconds(micro_batch / levers.draws * vit_s, 0, 0, 0),
        "MLLM products": PassSeconds(mllm_s, 0, mllm_s, 0),
        "MLLM rows": PassSeconds(moved["MLLM"][0], 0, moved["MLLM"][1], 0),
        "MLLM attention": PassSeconds(mllm_attention[0], 0, mllm_attention[1], 0),
        "prefix, idle": PassSeconds(
            prefix_idle_s(name, encoded * flops["VAE"] / matmul + vit_s * micro_batch), 0, 0, 0
        ),
        **{
            part: PassSeconds(0, forward, 0, backward + again * forward)
            for part, (forward, backward) in generator_parts.items()
        },
        "gradient copies": PassSeconds(0, 0, 0, gradient_bytes(ranks) * trained / copy),
        "waits, hand-over": PassSeconds(assumed("seconds without work a micro-batch"), 0, 0, 0),
    }


def lora_parts(name: str, micro_batch: int, machine: dict[str, float]) -> dict[str, PassSeconds]:
    """Return micro_batch_parts of a config that trains LoRA without an adapter, as Qwen-Image does.

    Frozen weights have no gradient, so a backward pass takes a little more than a forward one.
    Samples differ in the length of their condition, so attention has a mask. What the frozen
    encoders do between their products is left out.
    """
    config, model, flops = inputs(name)
    generator, vae = model.generator, model.frozen[1]
    grid = vae.grid(*[config.data.size_px] * 2)
    latents = math.prod(grid)
    condition = sum(
        share * condition_tokens(model, kind["num_text"], kind.get("image", True))[1]
        for share, kind in kinds(model, config)
    )
    num_blocks = len(blocks_of(generator))
    attention = num_blocks * attention_flops(*[latents + condition] * 2, generator.config.width)
    forward = generator.flops_per_image(grid, condition)
    backward = generator.flops_per_image(grid, condition, training=True) - forward
    rate = machine["matmul"] * assumed("share of the matmul rate, transformer products")
    copy = machine["copy"] * assumed("share of the copy rate, row kernels")
    masked = assumed("memory-efficient attention, FLOP/s")
    convolutions = machine["matmul"] * assumed("share of the matmul rate, VAE convolutions")
    generator_parts = {
        "generator products": ((forward - attention) / rate, (backward - 2 * attention) / rate),
        "generator attention": (attention / masked, 2.5 * attention / masked),
        "generator rows": [n / copy for n in generator_row_bytes(generator, latents + condition)],
        "LoRA rows": [n / copy for n in lora_row_bytes(generator, latents, condition)],
    }
    again = min(config.train.recompute, num_blocks) / num_blocks
    return {
        "VAE convolutions": PassSeconds(micro_batch * flops["VAE"] / convolutions, 0, 0, 0),
        "ViT and MLLM products": PassSeconds(
            micro_batch * (flops["ViT"] + flops["MLLM"]) / rate, 0, 0, 0
        ),
        **{
            part: PassSeconds(0, micro_batch * once, 0, micro_batch * (back + again * once))
            for part, (once, back) in generator_parts.items()
        },
        "waits, hand-over": PassSeconds(assumed("seconds without work a micro-batch"), 0, 0, 0),
    }


def vit_tokens(model: IOMM) -> int:
    """Return the tokens of an image in the ViT, with the class token."""
    vision = model.frozen[0].backbone.config.vision_config
    return (vision.image_size[0] // vision.patch_size[0]) ** 2 + 1


def prefix_idle_s(name: str, before_s: float) -> float:
    """Return the seconds for which the GPU waits for the host in the prefix.

    The host waits for nothing (LOG.md, 2026-11-30), so it issues VAE, ViT and prefix while the GPU
    still computes the first two, in at least before_s seconds.
    """
    mllm = inputs(name).model.frozen[0].backbone.config
    layers = mllm.text_config.num_hidden_layers + mllm.vision_config.num_hidden_layers
    launches = layers * assumed("launches a block and pass")
    return max(0.0, launches * assumed("host seconds a launch") - before_s)


def gradient_bytes(ranks: int) -> float:
    """Return the bytes that DeepSpeed's stage 3 moves per gradient value and micro-batch.

    On every rank: copy into the bucket 4, concatenation 4, division 4. On a rank's share: cast to
    fp32 and addition 18. A single rank also copies what NCCL would send, 4. They run on a stream
    of their own, but compete for the same memory.
    """
    return 12 + 18 / ranks + (4 if ranks == 1 else 0)


def micro_batch_s(
    name: str,
    micro_batch: int,
    machine: dict[str, float],
    levers: Levers = Levers(),
    ranks: int = 1,
) -> PassSeconds:
    """Return the seconds of compute of one micro-batch, the sum of micro_batch_parts."""
    parts = micro_batch_parts(name, micro_batch, machine, levers, ranks).values()
    return PassSeconds(*map(sum, zip(*parts, strict=True)))


def host_s(name: str, visits: list[tuple[bool, int]]) -> float:
    """Return the seconds that the host needs to issue one micro-batch."""
    model = inputs(name).model
    config = model.frozen[0].backbone.config.vision_config
    # Qwen2.5-VL calls it depth.
    vision = getattr(config, "num_hidden_layers", None) or config.depth
    leaves = model.leaves
    blocks = sum(isinstance(m, leaves) for m in model.modules())
    passes = 3 * blocks + (1 + 3) * model.frozen[0].num_layers + vision
    launches = passes * assumed("launches a block and pass")
    return launches * assumed("host seconds a launch") + len(visits) * assumed(
        "host seconds a ZeRO-3 visit"
    )


def pass_s(
    traffic: Traffic, messages: list[Message], seconds: PassSeconds, machine: dict[str, float]
) -> float:
    """Return the seconds of one micro-batch with its messages.

    There is one link, which carries one message at a time. A message starts when the module that
    issues it starts (gathers) or ends (gradients), and a module waits for its weights. This is
    conservative, because no host issues work ahead of the GPU.
    """
    frozen, once, frozen_again, again = seconds
    total = {
        backward: sum(n for b, n in traffic.visits if b == backward) for backward in (False, True)
    }
    clock = link = 0.0
    arrives, gathers, scatters = {}, {}, {}
    for message in messages:
        (gathers if message.kind == "all_gather" else scatters).setdefault(
            message.issued, []
        ).append(message)
    for i, (backward, values) in enumerate(traffic.visits):
        for message in sorted(gathers.get(i, []), key=lambda message: message.needed):
            link = max(link, clock) + link_s(message, machine)
            arrives[message.needed] = max(link, arrives.get(message.needed, 0))
            clock = max(clock, arrives[i]) if message.needed == i else clock
        clock = (
            max(clock, arrives.get(i, 0)) + (again if backward else once) * values / total[backward]
        )
        clock += frozen if i == 0 else frozen_again if i == len(traffic.visits) - 1 else 0
        for message in scatters.get(i, []):
            link = max(link, clock) + link_s(message, machine)
    return max(clock, link)


def update_s(name: str, ranks: int, machine: dict[str, float]) -> float:
    """Return the seconds of optimizer and EMA on one rank's shard.

    Bytes per value: norm 4, clip 8, flattening 8, check of masters and moments 12, AdamW 28,
    working copy 6, EMA 12.
    """
    config, model, _ = inputs(name)
    values = sum(p.numel() for p in model.parameters()) / ranks
    moved = values * (66 + (12 if config.ema.decay else 0))
    # FLOPs of Newton-Schulz; fused matrices are counted as one.
    costs = [
        5 * (4 * min(p.shape) ** 2 * max(p.shape) + 2 * min(p.shape) ** 3)
        for group in make_optimizer(model, config.optim).param_groups
        if group["kind"] == "muon"
        for p in group["params"]
    ]
    owners, load = spread(costs, ranks), [0.0] * ranks
    for cost, owner in zip(costs, owners, strict=True):
        load[owner] += cost
    return moved / (machine["copy"] * assumed("share of the copy rate, row kernels")) + max(
        load
    ) / (machine["matmul"] * assumed("share of the matmul rate, transformer products"))


def sizes_of(config: RunConfig, batch: int, ranks: int) -> list[int]:
    """Return the micro-batches that a run may have, in ascending order."""
    train = replace(config.train, global_batch=batch)
    most = train.micro_batch if train.number_given else batch
    return [num for num in micro_batches(replace(config, train=train), ranks) if num <= most]


def estimate(
    name: str,
    gpu: str,
    ranks: int,
    tuned: bool = False,
    levers: Levers = Levers(),
    batch: int | None = None,
    micro_batch: int | None = None,
    **measured: float,
) -> dict | None:
    """Estimate a run.

    Args:
        name: name of the config.
        gpu: key of MACHINES.
        ranks: number of GPUs.
        tuned: use the settings TUNED.
        levers: what is faster than by default.
        batch: global batch; default: the config's.
        micro_batch: default: the largest that fits into memory (train.micro_batch=auto), at most
            the config's if that is a number.
        measured: rates that replace those of MACHINES.

    Returns:
        Seconds per step by part, images/s per GPU, GPU-hours of stage 1, and the demands on
        checkpoint and loader; None if not even one image fits into memory.
    """
    (config, model, flops), traffic = inputs(name), messages_of(name, ranks, tuned)
    kind, batch = {**MACHINES[gpu], **measured}, batch or config.train.global_batch
    if micro_batch is None:
        micro_batch = largest_that_fits(
            {num: memory_of(name, ranks, tuned, num) for num in sizes_of(config, batch, ranks)},
            kind["memory"],
        )
        if micro_batch is None:
            return None
    accumulation = batch // (micro_batch * ranks)
    seconds = micro_batch_s(name, micro_batch, kind, levers, ranks)
    passes = [
        pass_s(traffic, messages, seconds, kind) for messages in (traffic.first, traffic.later)
    ]
    host, compute = host_s(name, traffic.visits), sum(seconds)
    issued = [max(s, host) for s in passes]
    after, update = (
        sum(link_s(message, kind) for message in traffic.step),
        update_s(name, ranks, kind),
    )
    step = issued[0] + (accumulation - 1) * issued[1] + after + update
    state = sum(p.numel() for p in model.parameters()) * (
        4 + {"adamw": 8, "muon": 4}[config.optim.kind] + 4 * bool(config.ema.decay)
    )
    stall, write = (
        state / ranks / assumed("to pinned memory, B/s"),
        2 * state / assumed("checkpoint to disk, B/s"),
    )
    saves = checkpoint_plan(
        num_gpus=ranks,
        stall_s=stall,
        write_s=write,
        mtbf_gpu_hours=config.checkpoint.mtbf_gpu_hours,
    )
    lost = max(stall, write - config.checkpoint.every_steps * step) / config.checkpoint.every_steps
    rate = batch / (step + lost) / ranks
    exposed = max(0.0, passes[0] + (accumulation - 1) * passes[1] - accumulation * compute)
    return {
        "gpus": ranks,
        "micro_batch": micro_batch,
        "accumulation": accumulation,
        "step_s": step + lost,
        "compute_s": accumulation * compute,
        "exposed_s": exposed,
        "host_s": step - after - update - accumulation * compute - exposed,
        "host_needed_s": accumulation * host,
        "after_s": after,
        "update_s": update,
        "checkpoint_s": lost,
        "checkpoint_write_s": write,
        "checkpoint_interval_s": saves.interval_s,
        "images_per_s": rate,
        "of_matmul_rate": (sum(flops.values()) - levers.latents * flops["VAE"])
        * rate
        / kind["matmul"],
        "memory_gib": memory_of(name, ranks, tuned, micro_batch) / GIB,
        "gpu_hours": config.train.steps * batch / rate / 3600,
        "sent_bytes": traffic.sent_bytes(accumulation),
        "cores_per_gpu": rate * loader()["ours_cpu_ms_per_image"] / 1000,
        "read_bytes_per_s": rate * ranks * 1000 * loader()["data"]["mean_kb"],
    }


@cache
def loader() -> dict:
    """Return the newest result of benchmarks/loader.py with decoding on the CPU."""
    return json.loads(
        sorted((ROOT / "benchmarks/results").glob("loader-cpu-*.json"))[-1].read_text()
    )


def stage_1_images(name: str) -> int:
    """Return the number of images of a config's whole training, counted with repetition."""
    train = inputs(name).config.train
    return train.steps * train.global_batch


def scaling_limits(name: str, gpu: str, runs: list[dict]) -> list[str]:
    """Return the limits of scaling in sentences.

    runs: estimates as configured, by number of GPUs.
    """
    config = inputs(name).config
    batch = config.train.global_batch
    save_steps = config.checkpoint.every_steps
    num_whole = sum(message.kind == "all_gather" for message in messages_of(name, NODE).step)
    limits: dict[str, Callable[[dict], bool]] = {
        "communication of weights and gradients that compute does not hide costs over 5 % of a "
        "step": lambda r: r["exposed_s"] > 0.05 * r["step_s"],
    }
    if num_whole:
        limits[
            f"gathering the {num_whole} unpartitioned parameters, one message each after a step, "
            "costs over 5 %"
        ] = lambda r: r["after_s"] > 0.05 * r["step_s"]
    limits |= {
        "the host issues work more slowly than the GPU executes it": lambda r: (
            r["host_needed_s"] > r["compute_s"] + r["exposed_s"]
        ),
        f"the global batch of {batch} leaves micro-batches below 16": lambda r: (
            batch < 16 * r["gpus"]
        ),
        f"a checkpoint every {save_steps} steps is not on disk before the next one": lambda r: (
            r["checkpoint_write_s"] > save_steps * r["step_s"]
        ),
    }
    sentences = []
    for what, holds in limits.items():
        at = next((run["gpus"] for run in runs if holds(run)), None)
        where = f"from {at} GPUs on" if at else f"nowhere up to {runs[-1]['gpus']} GPUs"
        sentences.append(f"{what}: {where}")
    missing = sorted(set(GPUS) - {run["gpus"] for run in runs})
    sizes = [f"{run['micro_batch']} with {run['gpus']}" for run in runs]
    none_fits = f"; with {', '.join(map(str, missing))} not even one image fits" if missing else ""
    sentences.append(f"micro-batches by number of GPUs: {', '.join(sizes)}{none_fits}")
    cores, most = (
        max(r["cores_per_gpu"] for r in runs),
        max(runs, key=lambda r: r["read_bytes_per_s"]),
    )
    sentences.append(
        f"decoding on the CPU takes {cores:.2f} of {assumed('CPU cores a GPU')} cores per GPU, "
        f"storage provides at most {most['read_bytes_per_s'] / 1e9:.1f} GB/s (at {most['gpus']} "
        "GPUs): the loader is not the limit"
    )
    assert cores < assumed("CPU cores a GPU")
    return [f"{config.model.preset} on {gpu}: {sentence}" for sentence in sentences]


def table(runs: list[dict]) -> str:
    """Return estimates as a table."""
    lines = [
        "GPUs  micro x acc   step s  compute  exposed  host   after  update  images/s/GPU  "
        "of matmul  GPU-hours  GiB"
    ]
    for r in runs:
        shares = "".join(
            f"{r[key] / r['step_s']:>8.1%}"
            for key in ("compute_s", "exposed_s", "host_s", "after_s", "update_s")
        )
        lines.append(
            f"{r['gpus']:>4}  {r['micro_batch']:>5} x {r['accumulation']:<4}{r['step_s']:>8.3f} "
            f"{shares}{r['images_per_s']:>12.1f}{r['of_matmul_rate']:>11.1%}"
            f"{r['gpu_hours']:>11,.0f}{r['memory_gib']:>6.0f}"
        )
    return "\n".join(lines)


@cache
def fine_tuning_rows(name: str) -> list[str]:
    """Return the rows of engine/README.md for a config of TUNED_MODELS, on 8 GPUs of a machine.

    An entry without a GPU's figures means that not even one sample fits.
    """
    rows = []
    for settings in SHARDING if inputs(name).config.lora.rank else SHARDING[:1]:
        found = {gpu: estimate(name + settings, gpu, NODE) for gpu in ("H200", "H100")}
        work_flops = sum(inputs(name + settings).flops.values())
        sizes = [f"{run['micro_batch']}" if run else "none" for run in found.values()]
        cells = [
            f"{run['images_per_s']:.1f}; {run['gpu_hours']:,.0f}" if run else "none fits"
            for run in found.values()
        ]
        memory = " / ".join(f"{run['memory_gib']:.0f}" if run else "-" for run in found.values())
        named = " ".join((f"`{name}`", *(f"`{setting}`" for setting in settings.split())))
        rows.append(
            f"| {named} | {work_flops / 1e12:.1f} | {' / '.join(sizes)} | {memory} | "
            f"{' | '.join(cells)} |"
        )
    return rows


def parts_table(name: str, gpu: str, sizes: tuple[int, ...] = (16, 32, 48)) -> str:
    """Return the milliseconds of every part of a micro-batch on one GPU, by micro-batch.

    The optimizer's step is shared by PASSES micro-batches.
    """
    machine = MACHINES[gpu]
    columns = [micro_batch_parts(name, size, machine) for size in sizes]
    update = update_s(name, 1, machine) / PASSES
    lines = [f"{'ms a micro-batch of':<30}" + "".join(f"{size:>9}" for size in sizes)]
    for part in columns[0]:
        lines.append(
            f"  {part:<28}" + "".join(f"{1e3 * sum(column[part]):>9.1f}" for column in columns)
        )
    lines.append(
        f"  {f'optimizer, 1/{PASSES} of a step':<28}" + f"{1e3 * update:>9.1f}" * len(sizes)
    )
    totals = [sum(map(sum, column.values())) + update for column in columns]
    lines.append(f"  {'sum':<28}" + "".join(f"{1e3 * total:>9.1f}" for total in totals))
    lines.append(
        f"  {'images/s':<28}"
        + "".join(f"{size / total:>9.1f}" for size, total in zip(sizes, totals, strict=True))
    )
    return "\n".join(lines)


def images_per_s(name: str, gpu: str, micro_batch: int, levers: Levers) -> float:
    """Return the images/s of one GPU, with PASSES micro-batches a step."""
    machine = MACHINES[gpu]
    seconds = sum(micro_batch_s(name, micro_batch, machine, levers))
    return micro_batch / (seconds + update_s(name, 1, machine) / PASSES)


def lever_rows(name: str, gpu: str) -> list[tuple[str, float]]:
    """Return (what was changed last, images/s of one GPU) with one lever after the other."""
    auto = estimate(name, gpu, 1)["micro_batch"]
    steps = [
        ("PyTorch's backends, micro-batch 16", 16, PYTORCH),
        (f"train.micro_batch=auto: {auto}", auto, {}),
        ("48 fit, but do not divide 1,024", 48, {}),
        ("masked_attention:varlen", auto, {"attention": "varlen"}),
        ("qk_norm_rope:triton", auto, {"rope": "triton"}),
        ("VAE's attention as two products", auto, {"vae_products": True}),
        ("precision=fp8", auto, {"fp8": True}),
        ("model.mllm_precision=fp8", auto, {"frozen_fp8": True}),
    ]
    on, rows = {}, []
    for what, micro_batch, changes in steps:
        on |= changes
        rows.append((what, images_per_s(name, gpu, micro_batch, Levers(**on))))
    for what, changes in (
        ("... and cached latents", {"latents": True}),
        ("... or, online, train.noise_draws=2", {"draws": 2}),
    ):
        rows.append((what, images_per_s(name, gpu, auto, Levers(**on, **changes))))
    return rows


def goals(name: str, gpu: str) -> list[str]:
    """Return our goals beside what the budget predicts."""
    rows = dict(lever_rows(name, gpu))
    auto = estimate(name, gpu, 1)["micro_batch"]
    bf16 = images_per_s(name, gpu, auto, Levers())
    latents = images_per_s(name, gpu, auto, Levers(latents=True))

    def verdict(goal: float, predicted: float) -> str:
        return f"{predicted:.1f} predicted, {'reached' if predicted >= goal else 'not reached'}"

    return [
        f"at least {GOALS[0]} online: in bf16 {verdict(GOALS[0], bf16)}; with "
        f"precision=fp8 {verdict(GOALS[0], rows['precision=fp8'])}",
        f"at least {GOALS[1]} with cached latents: by default {verdict(GOALS[1], latents)}; with "
        f"everything on {verdict(GOALS[1], rows['... and cached latents'])}",
        f"beyond {GOAL_ALL} online with everything on: "
        f"{verdict(GOAL_ALL, rows['model.mllm_precision=fp8'])}; with two draws an image "
        f"{verdict(GOAL_ALL, rows['... or, online, train.noise_draws=2'])}",
    ]


def draw(results: dict, path: Path) -> None:
    """Draw GPU-hours and efficiency over the number of GPUs, a column per model; dashed: tuned."""
    if (plt := pyplot()) is None:
        return
    figure, axes = plt.subplots(
        2, len(CONFIGS), figsize=(13, 7), sharex=True, squeeze=False, layout="constrained"
    )
    colours = {"H200": "tab:green", "H100": "tab:blue", "H800": "tab:red"}
    for column, name in enumerate(CONFIGS):
        top, bottom = axes[:, column]
        for gpu, hows in results[name].items():
            for (how, runs), style in zip(hows.items(), ("-", "--"), strict=True):
                x = [r["gpus"] for r in runs]
                top.plot(
                    x,
                    [r["gpu_hours"] for r in runs],
                    style,
                    color=colours[gpu],
                    marker=".",
                    label=f"{gpu}, {how}",
                )
                bottom.plot(
                    x,
                    [r["images_per_s"] / runs[0]["images_per_s"] for r in runs],
                    style,
                    color=colours[gpu],
                    marker=".",
                )
        if name == CONFIGS[0]:
            top.axhline(PAPER_HOURS, color="black", linestyle=":")
            top.text(1, PAPER_HOURS * 1.04, f"paper: {PAPER_HOURS} H800 GPU-hours", fontsize=8)
        top.set(
            title=f"{name}: stage 1, {stage_1_images(name) / 1e6:.0f} M images",
            xscale="log",
            yscale="log",
            ylabel="GPU-hours" if not column else None,
        )
        low, high = top.get_ylim()
        ticks = [
            tick
            for tick in (600, 800, 1000, 2000, 3000, 4000, 5000, 7000, 10_000)
            if low <= tick <= high
        ]
        top.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
        bottom.set(
            xscale="log",
            xlabel="GPUs",
            ylim=(0, 1.1),
            ylabel="images/s per GPU over that on the fewest GPUs" if not column else None,
        )
        bottom.set_xticks(GPUS, [str(n) for n in GPUS])
        for axis in (top, bottom):
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.9))
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder to write budget.json and budget.png into")
    args = parser.parse_args(argv)
    print("Assumed, not counted:")
    for what, (value, source) in ASSUMED.items():
        print(f"  {what:<48}{value:>9.3g}   {source}")
    for gpu, rates in MACHINES.items():
        print(f"  {gpu}: " + ", ".join(f"{what} {rate:.3g}" for what, rate in rates.items()))
    results = {
        name: {
            gpu: {
                how: [run for n in GPUS if (run := estimate(name, gpu, n, how == "tuned"))]
                for how in ("as configured", "tuned")
            }
            for gpu in MACHINES
        }
        for name in CONFIGS
    }
    limits = []
    for name, by_gpu in results.items():
        for gpu, runs in by_gpu.items():
            for how in runs:
                print(f"\n{name} on {gpu}, {how}\n{table(runs[how])}")
                if name == CONFIGS[0]:
                    print(
                        f"GPU-hours: {stage_1_images(name) / 1e6:.0f} M images, the 10 epochs of "
                        "the paper's table 1. The 5 epochs of its table 9 take half of them."
                    )
        limits += scaling_limits(name, "H800", by_gpu["H800"]["as configured"])
    one = {gpu: results[CONFIGS[0]][gpu]["as configured"][0]["images_per_s"] for gpu in MACHINES}
    cached = {
        gpu: estimate(CONFIGS[0], gpu, 1, levers=Levers(latents=True))["images_per_s"]
        for gpu in MACHINES
    }
    limits.append(
        f"{CONFIGS[0]} on one GPU: "
        + ", ".join(
            f"{gpu} {one[gpu]:.1f} images/s online and {cached[gpu]:.1f} with cached latents"
            for gpu in MACHINES
        )
        + f"; the paper's {PAPER_HOURS} H800 GPU-hours imply "
        + " and ".join(f"{paper_rate(epochs):.1f} for {epochs} epochs" for epochs in PAPER_EPOCHS)
        + "; our goals are "
        f"{GOALS[0]} online and {GOALS[1]} with latents"
    )
    print("\nFine-tuning on 8 GPUs: config | TFLOP/sample | micro-batch | GiB | H200 | H100")
    for name in TUNED_MODELS:
        print("\n".join(fine_tuning_rows(name)))
    for gpu in ("H200", "H100"):
        print(f"\n{CONFIGS[0]} on one {gpu}\n{parts_table(CONFIGS[0], gpu)}")
    levers = lever_rows(CONFIGS[0], "H200")
    print(f"\n{CONFIGS[0]} on one H200, images/s, one lever after the other")
    for what, rate in levers:
        print(f"  {what:<50}{rate:>6.1f}")
    print("\nGoals on one H200\n" + "\n".join(f"  {goal}" for goal in goals(CONFIGS[0], "H200")))
    print("\nLimits of scaling\n" + "\n".join(f"  {sentence}" for sentence in limits))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "budget.json").write_text(
            json.dumps(
                {
                    "machine": machine(),
                    "assumed": ASSUMED,
                    "machines": MACHINES,
                    "protocols": PROTOCOLS,
                    "tuned": TUNED,
                    "breaks": limits,
                    "levers": levers,
                    "results": results,
                },
                indent=1,
            )
            + "\n"
        )
        draw(results, args.out / "budget.png")


if __name__ == "__main__":
    main()
