"""What a run will take, before it takes anything: parameters, memory and work, counted on the meta device."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from iomm.adapter import Connector
from iomm.alignment import AlignmentHead, alignment_loss
from iomm.config import InputError
from iomm.engine.builders import assemble, mllm_name, vae_name, without_head
from iomm.engine.data import latents
from iomm.engine.data.patterns import expand
from iomm.engine.resilience import checkpoint_reader
from iomm.flops import condition_tokens, flops_by_part, tokens_per_image
from iomm.generator import empty_generator
from iomm.internvl import mllm_without_weights
from iomm.layers import use_fp8
from iomm.mllm import TURN
from iomm.vae import vae_without_weights

# Tokens of the turn with the fixed prompt, and without, by Qwen2.5's tokenizer; where there is
# none.
NUM_TEXT, NUM_TURN = 24, 8
# Tokens of a caption, assumed: nobody has counted; 64 more are 2 % more work for a pair of IOMM-B.
NUM_CAPTION = 64
# What a bf16 product reaches on one H200, measured: 769 to 798 TFLOP/s.
MATMUL_FLOPS = 790e12
# Of that, assumed for the expected GPU-hours.
UTILISATION = 0.6
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Counts of one run on `ranks` GPUs. parameters: part -> number. memory: part -> bytes a GPU. flops: part -> FLOPs a
    sample, forward and, where there is one, backward: the mean over images and pairs.
    """

    ranks: int
    micro_batch: int
    accumulation: int
    samples: int
    parameters: dict
    memory: dict
    flops: dict

    def gpu_hours(self, flops_per_s):
        """Of the whole run at this many FLOP/s per GPU."""
        return sum(self.flops.values()) * self.samples / flops_per_s / 3600


def build_without_weights(config):
    """RunConfig -> IOMM on the meta device. Raises InputError for what load and build would refuse."""
    mllm = mllm_without_weights(mllm_name(config))
    vae = vae_without_weights(vae_name(config), config.model.patch)
    return assemble(config, mllm, vae, device="meta")


def make_plan(config, ranks):
    """RunConfig, number of GPUs -> Plan. Raises InputError where batch and ranks do not divide, or something is missing."""
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
    parts = {
        "generator": model.generator,
        "adapter": model.adapter,
        "connector": model.connector,
        "align": model.alignment,
        "MLLM (frozen)": model.frozen[0],
        "VAE (frozen)": model.frozen[1],
    }
    return Plan(
        ranks=ranks,
        micro_batch=micro_batch,
        accumulation=batch // (micro_batch * ranks),
        samples=config.train.steps * batch,
        flops=work(model, config),
        memory=memory(model, config, ranks, micro_batch),
        parameters={name: size(part) for name, part in parts.items() if part is not None},
    )


def check_paths(config, model):
    """Raises InputError where shards, pairs, latents or the run to start from are not there, or are of something else."""
    data, wanted = (
        config.data,
        {"image": ("shards",), "pair": ("pairs",), "mix": ("shards", "pairs")}[config.train.data],
    )
    for key in wanted:
        value = getattr(data, key)
        if not value:
            raise InputError(
                f"data.{key} must name tars, globs or folders for train.data={config.train.data}, got none"
            )
        if value != "shapes":
            try:
                expand(value)
            except InputError as error:
                raise InputError(f"data.{key}: {error}") from None
    if data.latents not in (None, "memory"):
        latents.check(data.latents, vae=config.model.vae, size_px=data.size_px)
    if config.run.init is not None:
        if not (Path(config.run.init) / "config.yaml").is_file():
            raise InputError(
                f"run.init: {config.run.init} is not a run folder: no config.yaml in it; give the run.dir of stage 1"
            )
        found = checkpoint_reader.steps(Path(config.run.init) / "checkpoints")
        if not found:
            raise InputError(f"run.init: {config.run.init} has no checkpoint yet")
        here = {name: list(p.shape) for name, p in model.named_parameters()}
        if without_head(checkpoint_reader.read_manifest(found[-1])["shapes"]) != without_head(here):
            raise InputError(
                f"run.init: {found[-1]} is of another model: give the same model.*, adapter.* as there"
            )


def size(module):
    return sum(p.numel() for p in module.parameters())


def kinds(model, config):
    """[(share, keyword arguments of flops_by_part and tokens_per_image)] of the images and of the pairs of a run. A caption
    counts as NUM_CAPTION tokens, one that is dropped as none.
    """
    mllm, images = model.frozen[0], config.image_share
    turn, text = NUM_TURN, NUM_TEXT
    if mllm.tokenizer is not None:
        turn, text = len(mllm.token_ids("".join(TURN))), None
    caption = turn + (1 - config.train.caption_drop) * NUM_CAPTION
    both = [(images, {"num_text": text}), (1 - images, {"num_text": caption, "image": False})]
    return [(share, kind) for share, kind in both if share]


def work(model, config):
    """{part: FLOPs} that one sample of the run needs, the mean over its images and pairs."""
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


def tokens(model, config):
    """Latent and condition tokens that the generator reads of one sample of the run, in the mean."""
    return sum(
        share * tokens_per_image(model, config.data.size_px, **kind)
        for share, kind in kinds(model, config)
    )


def memory(model, config, ranks, micro_batch):
    """{part: bytes a GPU} of a run whose model, not yet sharded, this is. What frozen encoders need while they run, and
    what communication and the allocator keep, is not in it.
    """
    trained, frozen = size(model), sum(map(size, model.frozen))
    width = config.dtype.itemsize
    zero, leaves = config.zero, model.leaves
    weights, gradients, state = (
        trained / (ranks if zero.stage >= stage else 1) for stage in (3, 2, 1)
    )
    block = max(size(module) for module in model.modules() if isinstance(module, leaves))
    return {
        "frozen weights": width * frozen,
        "working weights": width * weights
        + (width * trained / zero.hpz_partition_size if zero.hpz_partition_size > 1 else 0),
        # One block in use and one on its way at least; as many are kept for the backward pass as may live.
        "gathered blocks": width * min(trained, max(2 * block, zero.max_live_parameters))
        if zero.stage == 3
        else 0,
        "masters": 4 * state,
        # Accumulated in fp32
        "gradients": 4 * gradients,
        "optimizer moments": {"adamw": 8, "muon": 4}[config.optim.kind] * state,
        "EMA": 4 * state if config.ema.decay else 0,
        **{
            f"activations, {part}": kept
            for part, kept in activation_bytes(model, config, micro_batch).items()
        },
        **(
            {"encoded ahead": prepared_bytes(model, config, micro_batch)}
            if config.train.overlap
            else {}
        ),
    }


def largest(micro_batch, needed, room):
    """The micro-batch, halved until needed(micro-batch) bytes fit into `room`; 0 if one image does not."""
    while micro_batch and needed(micro_batch) > room:
        micro_batch //= 2
    return micro_batch


class Attended(torch.autograd.Function):
    """What a fused attention keeps: queries, keys, values, output, and a float of each row. For counting, without values."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1], device=q.device))
        return out


class FusedAttention(TorchFunctionMode):
    """On the meta device PyTorch's own attention is the unfused one, whose matrices no GPU ever keeps."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return Attended.apply(*args[:3])
        return function(*args, **(kwargs or {}))


def kept_bytes(run, own):
    """Bytes that autograd keeps for the backward pass of run(), the parameters `own` excepted."""
    kept, own = {}, {id(p) for p in own}

    def keep(tensor):
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in own:
            kept[id(base)] = base, base.numel() * base.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), FusedAttention():
        run()
    return sum(number for _, number in kept.values())


def activation_bytes(model, config, micro_batch):
    """{part: bytes} that autograd keeps of one micro-batch: counted by running generator, connector, alignment head and
    one decoder layer of the MLLM on the meta device, uncompiled; torch.compile keeps less. Of train.recompute blocks
    only the inputs stay, and one block's own while it runs. The adapter's, small, are left out.
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
        condition_RCD = torch.empty(
            drawn, num_condition, mllm.width, dtype=dtype, requires_grad=True
        )
        t_R = torch.empty(drawn)

    def kept_by(num_blocks):
        generator = empty_generator(
            replace(model.generator.config, num_blocks=num_blocks), device="meta", dtype=dtype
        )
        if config.precision == "fp8":
            use_fp8(generator)
        return kept_bytes(
            lambda: generator(noisy_RNK, t_R, condition_RCD, grid), generator.parameters()
        )

    # Blocks are alike but for the last: a model of 2 and one of 3 tell all, in a quarter of a second.
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
        # The next block keeps them anyway; of a mixture some are picked out.
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


def num_aligned(config, micro_batch):
    """Samples of a micro-batch that are aligned, at most."""
    return math.ceil(micro_batch * config.align_share)


def prepared_bytes(model, config, micro_batch):
    """Bytes of a micro-batch that train.overlap has encoded: noisy tokens and their targets in the dtype of the pixels, the
    condition, its prefix and the alignment's target in that of the MLLM.
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
        * (2 if config.data.precision == "bf16" else 4)
    )
    target = 0
    if model.alignment is not None:
        values = rows * columns * model.alignment.target_width
        target = num_aligned(config, micro_batch) * values * config.dtype.itemsize
    return (
        micro_batch * (latents + mllm.num_prefix_elements(num_prefix) * config.dtype.itemsize)
        + target
    )


def table(title, rows, unit, scale, digits):
    """Lines of a part each, indented under a title."""
    return [title] + [
        f"  {name:<26}{number / scale:>10.{digits}f} {unit}" for name, number in rows.items()
    ]


def memory_table(memory):
    """{part: bytes} -> lines."""
    return table("memory a GPU", memory | {"sum": sum(memory.values())}, "GiB", GIB, 2)


def describe(plan, config):
    """Plan -> text for the terminal."""
    pairs = 1 - config.image_share
    mean = (
        f", mean over {1 - pairs:.0%} images and {pairs:.0%} pairs with captions of {NUM_CAPTION} tokens"
        if pairs
        else ""
    )
    return "\n".join(
        [
            f"{config.model.preset}, {config.data.size_px} px, {plan.ranks} GPU(s), micro-batch {plan.micro_batch} x "
            f"{plan.accumulation} accumulation steps, ZeRO-{config.zero.stage}, {config.precision}",
            "",
            *table("parameters", plan.parameters, "M", 1e6, 1),
            "",
            *memory_table(plan.memory),
            "",
            *table(
                f"work a sample{mean}",
                plan.flops | {"sum": sum(plan.flops.values())},
                "TFLOP",
                1e12,
                3,
            ),
            "",
            f"{plan.samples / 1e6:.1f} M samples: {plan.gpu_hours(MATMUL_FLOPS):,.0f} GPU-hours at the bf16 matmul rate of an H200 "
            f"(790 TFLOP/s), {plan.gpu_hours(MATMUL_FLOPS * UTILISATION):,.0f} expected at {UTILISATION:.0%} of it",
        ]
    )
