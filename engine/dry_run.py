"""Count the parameters, memory and work of a run on the meta device, before it is started."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from iomm.adapter import Connector, QueryAdapter
from iomm.alignment import AlignmentHead, alignment_loss
from iomm.config import InputError
from iomm.engine.activations import (
    counted_once,
    kept_by_blocks,
    kept_bytes,
    partitioned,
    peak_bytes,
    signature,
)
from iomm.engine.builders import (
    assemble,
    check_upscaling,
    diffusers_folder,
    find_data,
    long_captions,
    mllm_name,
    vae_name,
    without_head,
)
from iomm.engine.data import latents
from iomm.engine.data.patterns import expand
from iomm.engine.parallel.base_shards import NODE, base_bytes, base_gathers, base_parts
from iomm.engine.parallel.optim import STATE, make_optimizer
from iomm.engine.resilience import checkpoint_reader
from iomm.flops import condition_tokens, flops_by_part, tokens_per_image
from iomm.generator import empty_generator
from iomm.internvl import InternVL, mllm_without_weights
from iomm.kernels.masked_attention.sdpa import masked_attention_sdpa
from iomm.layers import RoundedLinear, use_fp8
from iomm.lora import add_lora, freeze, frozen_weights
from iomm.masking import visible_mask
from iomm.mllm import Condition, finish_layer, project_qkv
from iomm.mmdit import Route
from iomm.vae import PixelVAE, vae_without_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from iomm.engine.config import RunConfig
    from iomm.engine.parallel.ranks import Ranks
    from iomm.mllm import MLLM
    from iomm.model import IOMM

# Tokens of a caption. An assumption, not counted: 64 more are 2 % more work for a pair of IOMM-B.
NUM_CAPTION = 64
# Rate of bf16 matrix products on one H200 in FLOP/s; measured: 769 to 798 TFLOP/s.
MATMUL_FLOPS = 790e12
# Share of that rate assumed for the expected GPU-hours.
UTILISATION = 0.6
GIB = 2**30
# Share of a GPU's memory that a plan may fill. The rest is for what the plan does not count: 1 to 3
# GiB of CUDA context, NCCL, cuBLAS and DALI, gaps of the allocator, and the plan's own error of up
# to 5 % of the activations. 48 images of IOMM-B per pass, 128 GiB, are 92 % of an H200.
USABLE = 0.92
# Bytes of memory as PyTorch reports them.
GPUS = {"H200": 139.8 * GIB, "H100": 79.1 * GIB, "H800": 79.1 * GIB}
# Samples for which activations are counted.
COUNTED = 4
# Largest number of values that DeepSpeed's optimizer handles at once; its default at stage 3.
SUB_GROUP = 1_000_000_000
# Samples among whose masks the longest prefix is looked for.
LENGTHS = 16


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Counts of one run on `ranks` GPUs, by part of the model."""

    ranks: int
    micro_batch: int
    # Accumulation steps.
    accumulation: int
    # Samples of the whole run.
    samples: int
    parameters: dict[str, int]
    # Bytes per GPU.
    memory: dict[str, float]
    # FLOPs per sample, forward and backward (if there is one), mean over images and pairs.
    flops: dict[str, float]
    # Sentences on images that are smaller than the crops.
    upscaling: list[str]
    # Sentences on captions that are longer than the MLLM's context.
    captions: list[str]
    # Sentences on lora.shard_base.
    sharding: list[str]
    # What train.micro_batch=auto takes on the GPUS, in a sentence.
    auto: str
    # Bytes that the frozen encoders have while they run, before there are activations.
    encoders: float

    def gpu_hours(self, flops_per_s: float) -> float:
        """Return the GPU-hours of the whole run at this many FLOP/s per GPU."""
        return sum(self.flops.values()) * self.samples / flops_per_s / 3600


def build_without_weights(config: RunConfig) -> IOMM:
    """Return the model of a run on the meta device.

    Raises:
        InputError: as in loading and building the real model.
    """
    mllm = mllm_without_weights(mllm_name(config), vit_px=config.model.vit_px)
    vae = vae_without_weights(vae_name(config), config.model.patch)
    model = assemble(config, mllm, vae, device="meta", fresh=False)
    if config.lora.rank:
        model.add_lora()
    return model


def make_plan(config: RunConfig, ranks: int) -> Plan:
    """Count a run on a number of GPUs.

    Raises:
        InputError: the batch cannot be divided over the ranks, data or weights are missing, or
            images are smaller than data.upscale=refuse allows.
    """
    batch, micro_batch = config.train.global_batch, config.train.micro_batch
    if not config.train.number_given:
        check_shares(batch, ranks)
    elif batch % (micro_batch * ranks):
        raise InputError(
            f"train.global_batch must be a multiple of train.micro_batch x ranks, got {batch} and "
            f"{micro_batch} x {ranks}"
        )
    config.zero.check_ranks(ranks)
    model = build_without_weights(config)
    check_paths(config, model)
    upscaling, memory = upscaled_images(config), Memory(model, config)
    if micro_batch is None:
        micro_batch = batch // ranks
    elif micro_batch == "auto":
        device_bytes = GPUS["H200"]
        if torch.cuda.is_available():
            device_bytes = torch.cuda.get_device_properties(0).total_memory
        micro_batch, _ = auto_micro_batch(memory, ranks, device_bytes)
    return Plan(
        ranks=ranks,
        micro_batch=micro_batch,
        accumulation=batch // (micro_batch * ranks),
        samples=config.train.steps * batch,
        flops=work(model, config),
        memory=memory.parts(ranks, micro_batch),
        parameters=parameters(model),
        upscaling=upscaling,
        captions=captions_to_cut(config),
        sharding=base_sharding(model, config, ranks, batch // (micro_batch * ranks)),
        auto=describe_auto(memory, ranks),
        encoders=memory.encoders * micro_batch,
    )


def parameters(model: IOMM) -> dict[str, int]:
    """Return {part: number of parameters}, where the name of a part says if it is frozen."""
    parts = {
        "generator": model.generator,
        "adapter": model.adapter,
        "connector": model.connector,
        "align": model.alignment,
    }
    parts = {name: part for name, part in parts.items() if part is not None}
    if model.recipe.lora.rank:
        counts = {"LoRA": size(model)} | {
            f"{name} (frozen)": sum(map(Tensor.numel, frozen_weights(part).values()))
            for name, part in parts.items()
        }
    else:
        counts = {name: size(part) for name, part in parts.items()}
    mllm, vae = model.frozen
    return counts | {"MLLM (frozen)": size(mllm), "VAE (frozen)": size(vae)}


def upscaled_images(config: RunConfig) -> list[str]:
    """Return what check_upscaling finds in the indexes that are built already.

    Buckets of a mixture depend on both indexes, so nothing is counted while one is missing.

    Raises:
        InputError: see check_upscaling.
    """
    images = find_data(config) if config.train.data != "pair" else None
    pairs = find_data(config, pairs=True) if config.train.data != "image" else None
    if images is None and pairs is None:
        return []
    if config.data.buckets and config.train.data == "mix" and None in (images, pairs):
        return []
    return check_upscaling(config, images, pairs)


def captions_to_cut(config: RunConfig) -> list[str]:
    """Return a warning if the index of the pairs is built and has captions that are too long."""
    pairs_dir = find_data(config, pairs=True) if config.train.data != "image" else None
    return [] if pairs_dir is None else long_captions(config, pairs_dir)


def check_paths(config: RunConfig, model: IOMM) -> None:
    """Check that shards, pairs, latents and the run to start from exist and fit the config.

    Raises:
        InputError: one of them is missing, or belongs to another model, VAE or size.
    """
    data = config.data
    keys = {"image": ("shards",), "pair": ("pairs",), "mix": ("shards", "pairs")}[config.train.data]
    for key in keys:
        value = getattr(data, key)
        if not value:
            raise InputError(
                f"data.{key} must name tars, globs or folders for train.data={config.train.data}, "
                "got none"
            )
        if value != "shapes":
            try:
                expand(value)
            except InputError as error:
                raise InputError(f"data.{key}: {error}") from None
    if data.latents not in (None, "memory"):
        latents.check(data.latents, vae=config.model.vae, size_px=data.size_px)
    if config.run.init is not None:
        if diffusers_folder(config.run.init) is not None:
            return
        if not (Path(config.run.init) / "config.yaml").is_file():
            raise InputError(
                f"run.init: {config.run.init} is not a run folder: it has no config.yaml. Give the "
                "run.dir of stage 1"
            )
        found = checkpoint_reader.steps(Path(config.run.init) / "checkpoints")
        if not found:
            raise InputError(f"run.init: {config.run.init} has no checkpoint yet: train it first")
        weights = frozen_weights(model) if config.lora.rank else dict(model.named_parameters())
        here = {name: list(weight.shape) for name, weight in weights.items()}
        if without_head(checkpoint_reader.read_manifest(found[-1])["shapes"]) != without_head(here):
            raise InputError(
                f"run.init: {found[-1]} is a checkpoint of another model: set model.* and "
                "adapter.* as in that run"
            )


def size(module: nn.Module) -> int:
    """Return the number of parameters, with those that were rounded to fp8."""
    rounded = (m.values_OI for m in module.modules() if isinstance(m, RoundedLinear))
    return sum(x.numel() for x in chain(module.parameters(), rounded))


def frozen_bytes(module: nn.Module, width: int) -> int:
    """Return the bytes of a frozen part in a dtype of `width` bytes; fp8 weights take one each.

    The layers whose inputs need gradients hold their fp8 weights twice.
    """
    rounded = (m for m in module.modules() if isinstance(m, RoundedLinear))
    values = (x for m in rounded for x in (m.values_OI, m.values_IO) if x is not None)
    return width * sum(p.numel() for p in module.parameters()) + sum(x.nbytes for x in values)


def frozen_size(model: IOMM) -> int:
    """Return the number of frozen weights: those of MLLM and VAE, and of the base of LoRA."""
    return sum(number for name, number in parameters(model).items() if name.endswith("(frozen)"))


def kinds(model: IOMM, config: RunConfig) -> list[tuple[float, dict[str, Any]]]:
    """Return (share, arguments) of the run's images and of its pairs.

    The arguments are keywords of flops_by_part and tokens_per_image. A caption counts as
    NUM_CAPTION tokens, a dropped one as none.
    """
    mllm, images = model.frozen[0], config.image_share
    turn, text = mllm.num_turn, mllm.num_text
    if mllm.tokenizer is not None:
        before, after, _ = mllm.turn("", False)
        turn, text = len(before) + len(after), None
    caption = turn + (1 - config.train.caption_drop) * NUM_CAPTION
    both = [(images, {"num_text": text}), (1 - images, {"num_text": caption, "image": False})]
    return [(share, kind) for share, kind in both if share]


def work(model: IOMM, config: RunConfig) -> dict[str, float]:
    """Return {part: FLOPs} of one sample, the mean over the run's images and pairs."""
    total = {}
    for share, kind in kinds(model, config):
        for part, flops in flops_by_part(
            model,
            config.data.size_px,
            cached=config.data.latents is not None,
            tokens_cached=config.data.latents == "memory",
            **kind,
        ).items():
            total[part] = total.get(part, 0) + share * flops
    return total


def tokens(model: IOMM, config: RunConfig) -> float:
    """Return the mean number of latent and condition tokens that the generator reads per sample."""
    return sum(
        share * tokens_per_image(model, config.data.size_px, **kind)
        for share, kind in kinds(model, config)
    )


def base_sharding(model: IOMM, config: RunConfig, ranks: int, micro_batches: int) -> list[str]:
    """Return a sentence on the memory and the messages of lora.shard_base, if there is LoRA.

    Raises:
        InputError: lora.shard_base is set, but there is one GPU.
    """
    node = min(ranks, NODE)
    if config.lora.shard_base and node == 1:
        raise InputError(
            "lora.shard_base shards the base of LoRA over the GPUs of a node, but this run has one "
            "GPU: set lora.shard_base=false"
        )
    if not config.lora.rank or node == 1:
        return []
    width = config.dtype.itemsize
    parts, whole = base_parts(model, node, width), base_bytes(model, width)
    sharded = sum(parts) + 2 * node * max(parts)
    received = sum(parts[block] for _, block in base_gathers(model)) * (node - 1) * micro_batches
    return [
        f"Frozen blocks take {whole / GIB:.2f} GiB per GPU, and {sharded / GIB:.2f} GiB with "
        f"lora.shard_base=true on {node} GPUs of a node, each of which then receives "
        f"{received / 1e9:,.2f} GB from the others per step"
    ]


class Memory:
    """The memory that a run needs on a device, as a function of ranks and micro-batch.

    Activations are counted once, for COUNTED samples: all of them grow with the micro-batch.
    """

    def __init__(self, model: IOMM, config: RunConfig, device: str = "cuda") -> None:
        """Count the activations of a model that is not sharded yet.

        Args:
            model: on any device; only its shapes are read.
            config: the run.
            device: type of the device, which decides whether torch.compile is used.
        """
        self.model, self.config = model, config
        compiled = config.train.compiled(torch.device(device))
        counted = activation_bytes(model, config, COUNTED, compiled)
        self.activations = {part: kept / COUNTED for part, kept in counted.items()}
        self.encoders = encoder_bytes(model, config, COUNTED) / COUNTED

    def parts(self, ranks: int, micro_batch: int) -> dict[str, float]:
        """Return {part: bytes per rank} at the peak, which is at the end of the forward pass.

        Not included: the CUDA context, NCCL's buffers, and gaps of the allocator (USABLE).
        """
        model, config = self.model, self.config
        trained, width = size(model), config.dtype.itemsize
        base, gathered = width * (frozen_size(model) - sum(map(size, model.frozen))), {}
        if config.lora.shard_base and (node := min(ranks, NODE)) > 1:
            parts = base_parts(model, node, width)
            base += sum(parts) - base_bytes(model, width)
            # The block in use and the next one.
            gathered = {"gathered base": 2 * node * max(parts)}
        zero, leaves = config.zero, model.leaves
        weights, gradients, state = (
            trained / (ranks if zero.stage >= stage else 1) for stage in (3, 2, 1)
        )
        block = max(size(module) for module in model.modules() if isinstance(module, leaves))
        activations = {part: kept * micro_batch for part, kept in self.activations.items()}
        kept, encoders = sum(activations.values()), self.encoders * micro_batch
        if config.train.overlap:
            ahead = {
                "prefetched batch": prepared_bytes(model, config, micro_batch),
                "encoders at work": encoders,
            }
        else:
            # They run while no activations are kept. A step makes a flat copy of a part's
            # gradients, and two more of Muon's updates.
            step = {"adamw": 4, "muon": 12}[config.optim.kind] * min(state, SUB_GROUP)
            ahead = {"encoders or step, if more": max(0.0, encoders - kept, step - kept)}
        return {
            "frozen weights": sum(frozen_bytes(part, width) for part in model.frozen) + base,
            **gathered,
            "working weights": width * weights
            + (width * trained / zero.hpz_partition_size if zero.hpz_partition_size > 1 else 0),
            # At least one block in use and the next one; up to max_live_parameters are kept for the
            # backward pass. A single rank uses its own weights.
            "gathered blocks": width * min(trained, max(2 * block, zero.max_live_parameters))
            if zero.stage == 3 and ranks > 1
            else 0,
            "masters": 4 * state,
            # Accumulated in fp32.
            "gradients": 4 * gradients,
            # DeepSpeed's. At stage 2 one is filled while the other is sent.
            "gradient buckets": {2: 2, 3: 1}.get(zero.stage, 0) * width * zero.reduce_bucket_size,
            # Muon leaves what is no matrix of a layer to AdamW.
            "optimizer moments": state / trained * moment_bytes(model, config),
            "EMA": 4 * state if config.ema.decay else 0,
            **{f"activations, {part}": number for part, number in activations.items()},
            **ahead,
        }

    def total(self, ranks: int, micro_batch: int) -> float:
        """Return the bytes per rank at the peak."""
        return sum(self.parts(ranks, micro_batch).values())


def moment_bytes(model: IOMM, config: RunConfig) -> int:
    """Return the bytes of the optimizer's state of all trained parameters."""
    return sum(
        4 * len(STATE[group["kind"]]) * sum(p.numel() for p in group["params"])
        for group in make_optimizer(model, config.optim).param_groups
    )


def memory(
    model: IOMM, config: RunConfig, ranks: int, micro_batch: int, device: str = "cuda"
) -> dict[str, float]:
    """Return {part: bytes per rank} at the peak of a run, see Memory."""
    return Memory(model, config, device).parts(ranks, micro_batch)


def micro_batches(config: RunConfig, ranks: int) -> list[int]:
    """Return the possible micro-batches of a run, in ascending order.

    All micro-batches of all ranks together are the global batch.
    """
    share = config.train.global_batch // ranks
    return [number for number in range(1, share + 1) if share % number == 0]


def check_shares(batch: int, ranks: int) -> None:
    """Raise InputError if a global batch cannot be divided over the ranks."""
    if batch % ranks:
        raise InputError(
            f"train.global_batch must be a multiple of the number of ranks, got {batch} and {ranks}"
        )


def largest_that_fits(needed: Mapping[int, float], device_bytes: float) -> int | None:
    """Return the largest micro-batch that fits into the usable part of a device's memory.

    needed: {micro-batch: bytes}. None if none fits.
    """
    room = USABLE * device_bytes
    return max((number for number, total in needed.items() if total <= room), default=None)


def auto_micro_batch(memory: Memory, ranks: int, device_bytes: float) -> tuple[int, str]:
    """Return the micro-batch of train.micro_batch=auto, and a sentence that gives the reason.

    Raises:
        InputError: the global batch cannot be divided over the ranks, or not one sample fits.
    """
    check_shares(memory.config.train.global_batch, ranks)
    sizes, gib = micro_batches(memory.config, ranks), device_bytes / GIB
    needed = {number: memory.total(ranks, number) for number in sizes}
    number = largest_that_fits(needed, device_bytes)
    if number is None:
        raise InputError(
            f"train.micro_batch=auto: one sample needs {needed[1] / GIB:.1f} GiB on {ranks} "
            f"rank(s), but {USABLE:.0%} of {gib:.1f} GiB may be filled. Use more GPUs or a larger "
            "train.recompute"
        )
    reason = "it is a rank's whole share of the global batch"
    larger = next((size for size in sizes if size > number), None)
    if larger is not None:
        reason = f"{larger}, the next divisor of {sizes[-1]}, needs {needed[larger] / GIB:.1f}"
    return number, (
        f"train.micro_batch=auto takes {number}: it needs {needed[number] / GIB:.1f} of "
        f"{gib:.1f} GiB, {USABLE:.0%} of which may be filled; {reason}"
    )


def describe_auto(memory: Memory, ranks: int) -> str:
    """Return what train.micro_batch=auto takes on known GPUs, in a sentence."""
    needed = {number: memory.total(ranks, number) for number in micro_batches(memory.config, ranks)}
    found = [
        f"{largest_that_fits(needed, device_bytes) or 'none'} on {name} ({device_bytes / GIB:.1f} "
        "GiB)"
        for name, device_bytes in GPUS.items()
    ]
    return f"train.micro_batch=auto takes {', '.join(found)}, filling at most {USABLE:.0%}"


def with_micro_batch(config: RunConfig, ranks: Ranks) -> tuple[RunConfig, str | None]:
    """Return the config with a number for train.micro_batch=auto, and why it is that number.

    Called by all ranks together. The GPU with the least memory decides. On a CPU it is a rank's
    whole share of the global batch, as with null.

    Raises:
        InputError: see auto_micro_batch.
    """
    if config.train.micro_batch != "auto":
        return config, None
    if ranks.device.type == "cuda":
        total = torch.cuda.get_device_properties(ranks.device).total_memory
        device_bytes = min(ranks.all(total))
        number, why = ranks.on_first(
            lambda: auto_micro_batch(
                Memory(build_without_weights(config), config), ranks.size, device_bytes
            )
        )
    else:
        number = max(1, config.train.global_batch // ranks.size)
        why = f"train.micro_batch=auto takes {number} on a CPU: global_batch / ranks"
    return replace(config, train=replace(config.train, micro_batch=number)), why


def activation_bytes(
    model: IOMM, config: RunConfig, micro_batch: int, compiled: bool = False
) -> dict[str, float]:
    """Return {part: bytes} that autograd keeps of one micro-batch on a GPU, at the peak.

    The generator, the adapter, the connector, the alignment head and one decoder layer of the MLLM
    run on the meta device. Of the train.recompute blocks only the inputs are kept, and all
    activations of one block while it runs.

    Args:
        model: on any device; only its shapes are read.
        config: the run.
        micro_batch: samples of the micro-batch.
        compiled: whether torch.compile is used.
    """
    mllm, vae = model.frozen
    dtype = config.dtype
    # DeepSpeed's linear, see deepspeed_config.
    options = {
        "compiled": compiled,
        "deepspeed_linear": config.zero.stage == 3 and not compiled,
    }
    rows, columns = grid = vae.grid(config.data.size_px, config.data.size_px)
    num_condition = max(
        round(condition_tokens(model, kind["num_text"], kind.get("image", True))[1])
        for _, kind in kinds(model, config)
    )
    drawn = micro_batch * config.train.noise_draws
    generator = empty_generator(model.generator.config, device="meta", dtype=dtype)
    if config.lora.rank:
        freeze(generator)
        add_lora(generator, config.lora, patch=vae.patch)
        generator.to(dtype)
    if config.precision == "fp8":
        use_fp8(generator)
    with torch.device("meta"):
        noisy_RNK = torch.empty(drawn, rows * columns, vae.token_dim, dtype=dtype)
        # With LoRA nothing before the generator is trained.
        condition_RCD = torch.empty(
            drawn, num_condition, mllm.width, dtype=dtype, requires_grad=not config.lora.rank
        )
        t_R = torch.empty(drawn)
        route = {}
        num_routed = config.route.num_kept(rows * columns)
        if num_routed < rows * columns:
            kept_RK = torch.empty(drawn, num_routed, dtype=torch.long)
            blocks = config.route.blocks_in(generator.config)
            route["route"] = Route(kept_RK, rows * columns, *blocks)
    kept = {
        "generator": kept_by_blocks(
            generator,
            generator.block_classes,
            lambda generator: generator(noisy_RNK, t_R, condition_RCD, grid, **route),
            recompute=config.train.recompute,
            **options,
        )
    }
    if config.lora.rank:
        return kept
    if model.connector is not None:
        with torch.device("meta"):
            connector = Connector(config.adapter, mllm.width).to(dtype)
            condition_BCD = torch.empty(
                micro_batch, num_condition, mllm.width, dtype=dtype, requires_grad=True
            )
        kept["connector"] = kept_bytes(lambda: connector(condition_BCD), connector.parameters())
    if model.alignment is not None:
        width, aligned = model.generator.config.width, num_aligned(config, drawn)
        with torch.device("meta"):
            head = AlignmentHead(config.align, width, mllm).to(dtype)
            latents_IND = torch.empty(
                aligned, rows * columns, width, dtype=dtype, requires_grad=True
            )
            target_IND = torch.empty(aligned, rows * columns, head.target_width, dtype=dtype)
        own = [*head.parameters(), target_IND]
        # The next block keeps the latents anyway. Of a mixture a copy of some is aligned.
        if aligned == drawn:
            own.append(latents_IND)
        kept["align"] = kept_bytes(lambda: alignment_loss(head(latents_IND), target_IND), own)
    if model.adapter is not None:
        condition = packed_condition(model, config, micro_batch)
        with torch.device("meta"):
            adapter = QueryAdapter(config.adapter, mllm.width).to(dtype)
        kept["adapter"] = kept_bytes(lambda: adapter(condition), adapter.parameters())
        kept["MLLM queries"] = mllm.num_layers * query_bytes(mllm, config, condition, compiled)
    return kept


def packed_condition(model: IOMM, config: RunConfig, micro_batch: int) -> Condition:
    """Return a condition on the meta device, as long as that of the run's first samples.

    Attention pads all samples to the longest, which is found among the first LENGTHS samples
    of the run.
    """
    mllm = model.frozen[0]
    lengths = [
        round(condition_tokens(model, kind["num_text"], kind.get("image", True))[0])
        for _, kind in kinds(model, config)
    ]
    if config.train.data != "pair":
        first, num_tokens = torch.arange(LENGTHS), mllm.num_image_tokens
        visible = visible_mask(config.mask, config.run.seed, first, num_tokens)
        shown = visible.view(LENGTHS, -1).sum(1)
        if config.mask.mode == "drop":
            text = lengths[0] - round((1 - config.mask.ratio) * num_tokens)
            lengths += [text + int(number) for number in shown]
    longest = max(lengths)
    # Samples of unequal lengths: the last one is a token shorter unless all are equal.
    short = len(set(lengths)) > 1 and micro_batch > 1
    lengths = (longest,) * (micro_batch - 1) + (longest - short,)
    with torch.device("meta"):
        return Condition(
            tokens_TD=torch.empty(sum(lengths), mllm.width, dtype=config.dtype),
            positions_T=torch.empty(sum(lengths), dtype=torch.long),
            offsets=torch.empty(micro_batch + 1, dtype=torch.int32),
            lengths=lengths,
            end_B=torch.empty(micro_batch, dtype=torch.long),
            end=longest,
            skipped=(0,) * micro_batch,
            skipped_B=torch.empty(micro_batch, dtype=torch.long),
        )


def query_bytes(mllm: MLLM, config: RunConfig, condition: Condition, compiled: bool) -> float:
    """Return the bytes that one decoder layer of the MLLM keeps of the queries."""
    dtype, num = config.dtype, config.adapter.num_queries
    layer, x_SD, rotary = mllm.layer_without_weights(condition.batch * num, dtype)
    keys, head_dim = layer.self_attn.k_proj.out_features, mllm.head_dim
    with torch.device("meta"):
        prefix = torch.empty(sum(condition.lengths), keys // head_dim, head_dim, dtype=dtype)
        offsets = torch.empty(condition.batch + 1, dtype=torch.int32)
    project, finish = partial(project_qkv, layer), partial(finish_layer, layer)
    if compiled:
        project, finish = partitioned(layer, project), partitioned(layer, finish)

    def run() -> Tensor:
        mixed = masked_attention_sdpa(
            *project(x_SD, rotary),
            offsets,
            prefix,
            prefix,
            condition.offsets,
            config.adapter.attention == "causal",
            head_dim**-0.5,
            (num,) * condition.batch,
            condition.lengths,
        )
        return finish(x_SD, mixed)

    own = [*layer.parameters(), prefix, *rotary]
    key = type(layer), signature([*own, x_SD]), condition.lengths, config.adapter.attention
    return counted_once((*key, compiled), lambda: kept_bytes(run, own))


def encoder_bytes(model: IOMM, config: RunConfig, micro_batch: int) -> float:
    """Return the bytes that the frozen VAE or ViT has of one micro-batch while it runs.

    Counted without torch.compile, with which FLUX's VAE needs a fifth less. A Qwen2.5-VL's ViT,
    which cannot run on the meta device, is left out: with the same images its VAE needs more.
    """
    (mllm, vae), dtype = model.frozen, config.dtype
    needed = [0]
    with torch.device("meta"):
        pixels = torch.empty(micro_batch, 3, config.data.size_px, config.data.size_px)
        vit_pixels = torch.empty(micro_batch, 3, mllm.vit_px, mllm.vit_px)
    if config.data.latents is None and not isinstance(vae, PixelVAE):
        needed.append(peak_bytes(vae, vae.encode, pixels, dtype=dtype))
    sees = config.data.latents != "memory" and config.train.data != "pair"
    if sees and isinstance(mllm, InternVL):
        needed.append(peak_bytes(mllm, mllm.vit_states, vit_pixels, dtype=dtype))
    return max(needed)


def num_aligned(config: RunConfig, micro_batch: int) -> int:
    """Return the largest number of samples of a micro-batch that are aligned."""
    return math.ceil(micro_batch * config.align_share)


def prepared_bytes(model: IOMM, config: RunConfig, micro_batch: int) -> float:
    """Return the bytes of a micro-batch that train.overlap has encoded in advance.

    Noisy tokens and their targets are fp32, or have the dtype of the pixels where these are the
    latents; the condition, its prefix and the alignment target have that of the MLLM.
    """
    mllm, vae = model.frozen
    rows, columns = vae.grid(config.data.size_px, config.data.size_px)
    num_prefix = max(
        condition_tokens(model, kind["num_text"], kind.get("image", True))[0]
        for _, kind in kinds(model, config)
    )
    latents = (
        2
        * config.train.noise_draws
        * rows
        * columns
        * vae.token_dim
        * (2 if config.data.precision == "bf16" and isinstance(vae, PixelVAE) else 4)
    )
    prefix = mllm.num_prefix_elements(num_prefix, cached=model.adapter is not None)
    target = 0
    if model.alignment is not None:
        values = rows * columns * model.alignment.target_width
        target = num_aligned(config, micro_batch) * values * config.dtype.itemsize
    return micro_batch * (latents + prefix * config.dtype.itemsize) + target


def table(title: str, rows: Mapping[str, float], unit: str, scale: float, digits: int) -> list[str]:
    """Return a title and an indented line per part."""
    return [
        title,
        *(f"  {name:<26}{number / scale:>10.{digits}f} {unit}" for name, number in rows.items()),
    ]


def memory_table(memory: dict[str, float]) -> list[str]:
    """Return the lines of a table of {part: bytes per rank}."""
    title = "memory per rank at the peak, estimated (without CUDA context and allocator gaps)"
    return table(title, memory | {"total": sum(memory.values())}, "GiB", GIB, 2)


def describe(plan: Plan, config: RunConfig) -> str:
    """Return the counts of a run as text for the terminal."""
    pairs, mean = 1 - config.image_share, ""
    if pairs:
        mean = (
            f", mean over {1 - pairs:.0%} images and {pairs:.0%} pairs with captions of "
            f"{NUM_CAPTION} tokens"
        )
    return "\n".join(
        [
            f"{config.model.preset}, {config.data.size_px} px, {plan.ranks} GPU(s), micro-batch "
            f"{plan.micro_batch} x {plan.accumulation} accumulation steps, ZeRO stage "
            f"{config.zero.stage}, {config.precision}",
            "",
            *table("parameters", plan.parameters, "M", 1e6, 1),
            "",
            *memory_table(plan.memory),
            f"VAE and ViT take up to {plan.encoders / GIB:.2f} GiB while they run, "
            + (
                "which train.overlap adds to the peak"
                if config.train.overlap
                else "when no activations exist"
            ),
            plan.auto,
            "",
            *table(
                f"work per sample{mean}",
                plan.flops | {"total": sum(plan.flops.values())},
                "TFLOP",
                1e12,
                3,
            ),
            "",
            f"{plan.samples / 1e6:.1f} M samples: {plan.gpu_hours(MATMUL_FLOPS):,.0f} GPU-hours at "
            f"the bf16 matmul rate of an H200 ({MATMUL_FLOPS / 1e12:.0f} TFLOP/s), "
            f"{plan.gpu_hours(MATMUL_FLOPS * UTILISATION):,.0f} expected at {UTILISATION:.0%} of "
            "it",
            *(["", ". ".join(plan.upscaling)] if plan.upscaling else []),
            *(["", *plan.captions] if plan.captions else []),
            *(["", *plan.sharding] if plan.sharding else []),
        ]
    )
