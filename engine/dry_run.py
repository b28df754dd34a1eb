"""Count the parameters, memory and work of a run on the meta device, before it is started."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from iomm.adapter import Connector
from iomm.alignment import AlignmentHead, alignment_loss
from iomm.config import InputError
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
from iomm.engine.resilience import checkpoint_reader
from iomm.flops import condition_tokens, flops_by_part, tokens_per_image
from iomm.generator import empty_generator
from iomm.internvl import mllm_without_weights
from iomm.layers import RoundedLinear, use_fp8
from iomm.lora import add_lora, freeze, frozen_weights
from iomm.vae import PixelVAE, vae_without_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import nn

    from iomm.engine.config import RunConfig
    from iomm.model import IOMM

# Tokens of a caption. An assumption, not counted: 64 more are 2 % more work for a pair of IOMM-B.
NUM_CAPTION = 64
# Rate of bf16 matrix products on one H200 in FLOP/s; measured: 769 to 798 TFLOP/s.
MATMUL_FLOPS = 790e12
# Share of that rate assumed for the expected GPU-hours.
UTILISATION = 0.6
GIB = 2**30


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
    batch = config.train.global_batch
    micro_batch = config.train.micro_batch or max(1, batch // ranks)
    if batch % (micro_batch * ranks):
        raise InputError(
            f"train.global_batch must be a multiple of train.micro_batch x ranks, got {batch} and "
            f"{micro_batch} x {ranks}"
        )
    config.zero.check_ranks(ranks)
    model = build_without_weights(config)
    check_paths(config, model)
    upscaling = upscaled_images(config)
    return Plan(
        ranks=ranks,
        micro_batch=micro_batch,
        accumulation=batch // (micro_batch * ranks),
        samples=config.train.steps * batch,
        flops=work(model, config),
        memory=memory(model, config, ranks, micro_batch),
        parameters=parameters(model),
        upscaling=upscaling,
        captions=captions_to_cut(config),
        sharding=base_sharding(model, config, ranks, batch // (micro_batch * ranks)),
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


def memory(
    model: IOMM, config: RunConfig, ranks: int, micro_batch: int, node: int | None = None
) -> dict[str, float]:
    """Return {part: bytes per GPU} of a run of this model, which is not sharded yet.

    Not included: activations of the frozen encoders, and what communication and the allocator keep.

    Args:
        model: the model.
        config: the run's config.
        ranks: number of GPUs.
        micro_batch: samples per GPU and forward pass.
        node: ranks of this GPU's node; None: all, up to NODE.
    """
    trained, width = size(model), config.dtype.itemsize
    base = frozen_size(model) - sum(map(size, model.frozen))
    zero, leaves = config.zero, model.leaves
    weights, gradients, state = (
        trained / (ranks if zero.stage >= stage else 1) for stage in (3, 2, 1)
    )
    block = max(size(module) for module in model.modules() if isinstance(module, leaves))
    kept_base, node, gathered = width * base, node or min(ranks, NODE), {}
    if config.lora.shard_base and node > 1:
        parts = base_parts(model, node, width)
        kept_base += sum(parts) - base_bytes(model, width)
        # The block in use and the next one.
        gathered = {"gathered base": 2 * node * max(parts)}
    return {
        "frozen weights": sum(frozen_bytes(part, width) for part in model.frozen) + kept_base,
        **gathered,
        "working weights": width * weights
        + (width * trained / zero.hpz_partition_size if zero.hpz_partition_size > 1 else 0),
        # At least one block in use and the next one; up to max_live_parameters are kept for the
        # backward pass.
        "gathered blocks": width * min(trained, max(2 * block, zero.max_live_parameters))
        if zero.stage == 3
        else 0,
        "masters": 4 * state,
        # Accumulated in fp32.
        "gradients": 4 * gradients,
        "optimizer moments": {"adamw": 8, "muon": 4}[config.optim.kind] * state,
        "EMA": 4 * state if config.ema.decay else 0,
        **{
            f"activations, {part}": kept
            for part, kept in activation_bytes(model, config, micro_batch).items()
        },
        **(
            {"prefetched batch": prepared_bytes(model, config, micro_batch)}
            if config.train.overlap
            else {}
        ),
    }


def largest(micro_batch: int, needed: Callable[[int], float], room: float) -> int:
    """Halve the micro-batch until needed(micro_batch) bytes fit into `room`.

    Return 0 if not even one image fits.
    """
    while micro_batch and needed(micro_batch) > room:
        micro_batch //= 2
    return micro_batch


class Attended(torch.autograd.Function):
    """Keeps what a fused attention keeps: queries, keys, values, output and one float per row.

    For counting bytes on the meta device; it computes nothing.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1], device=q.device))
        return out


class FusedAttention(TorchFunctionMode):
    """Replaces PyTorch's attention by Attended.

    On the meta device PyTorch takes the unfused one, whose matrices no GPU ever keeps.
    """

    def __torch_function__(
        self,
        function: Callable,
        types: Any,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            return Attended.apply(*args[:3])
        return function(*args, **(kwargs or {}))


def kept_bytes(run: Callable[[], Any], own: Iterable[Tensor]) -> int:
    """Return the bytes that autograd keeps for the backward pass of run(), without `own`."""
    kept, own = {}, {id(p) for p in own}

    def keep(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in own:
            kept[id(base)] = base, base.numel() * base.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), FusedAttention():
        run()
    return sum(number for _, number in kept.values())


def activation_bytes(model: IOMM, config: RunConfig, micro_batch: int) -> dict[str, float]:
    """Return {part: bytes} that autograd keeps of one micro-batch.

    Counted by running the generator, the connector, the alignment head and one decoder layer of the
    MLLM on the meta device without torch.compile, which would keep less. Of the train.recompute
    blocks only the inputs are kept, and all activations of one block while it runs. The adapter's
    are small and left out.
    """
    mllm, vae = model.frozen
    dtype = config.dtype
    rows, columns = grid = vae.grid(config.data.size_px, config.data.size_px)
    num_condition = max(
        round(condition_tokens(model, kind["num_text"], kind.get("image", True))[1])
        for _, kind in kinds(model, config)
    )
    drawn = micro_batch * config.train.noise_draws
    with torch.device("meta"):
        noisy_RNK = torch.empty(drawn, rows * columns, vae.token_dim, dtype=dtype)
        # With LoRA nothing before the generator is trained.
        condition_RCD = torch.empty(
            drawn, num_condition, mllm.width, dtype=dtype, requires_grad=not config.lora.rank
        )
        t_R = torch.empty(drawn)

    def kept_by(num_blocks: int) -> int:
        generator = empty_generator(
            replace(model.generator.config, num_blocks=num_blocks), device="meta", dtype=dtype
        )
        if config.lora.rank:
            freeze(generator)
            # Targets may name blocks that this smaller generator does not have.
            add_lora(generator, config.lora, patch=vae.patch, check=False)
            generator.to(dtype)
        if config.precision == "fp8":
            use_fp8(generator)
        return kept_bytes(
            lambda: generator(noisy_RNK, t_R, condition_RCD, grid),
            chain(generator.parameters(), generator.buffers()),
        )

    # All blocks but the last keep the same: models of 2 and 3 blocks are enough, which takes a
    # quarter of a second.
    two, three = kept_by(2), kept_by(3)
    everything = two + (model.generator.config.num_blocks - 2) * (three - two)
    blocks = sum(
        isinstance(module, model.generator.block_classes) for module in model.generator.modules()
    )
    recomputed = min(config.train.recompute, blocks)
    inputs = (
        recomputed
        * drawn
        * (rows * columns + num_condition)
        * model.generator.config.width
        * dtype.itemsize
    )
    kept = {"generator": everything * (blocks - max(recomputed - 1, 0)) // blocks + inputs}
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
        kept["MLLM queries"] = mllm.num_layers * kept_bytes(
            *mllm.layer_without_weights(
                micro_batch * config.adapter.num_queries, dtype, Attended.apply
            )
        )
    return kept


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
    title = "memory per rank, estimated (without activations of the frozen encoders)"
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
