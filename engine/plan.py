"""What a run will take, before it takes anything: parameters, memory and work, counted on the meta device."""

from dataclasses import asdict, dataclass

import torch

from iomm.adapter import Connector, QueryAdapter
from iomm.config import InputError, generator_config
from iomm.engine.data.index import expand
from iomm.generator import empty_generator
from iomm.mllm import mllm_without_weights
from iomm.model import IOMM, Recipe
from iomm.vae import vae_without_weights

NUM_TEXT = 24                   # tokens of the turn and the fixed prompt with Qwen2.5's tokenizer; 1 % of the MLLM's work
MATMUL_FLOPS = 790e12           # what a bf16 product reaches on one H200, measured: 769 to 798 TFLOP/s
UTILISATION = 0.6               # of that, assumed for the expected GPU-hours
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Counts of one run on `ranks` GPUs. parameters: part -> number. memory: part -> bytes a GPU. flops: part -> FLOPs an
    image, forward and, where there is one, backward."""

    ranks: int
    micro_batch: int
    accumulation: int
    images: int
    parameters: dict
    memory: dict
    flops: dict

    def gpu_hours(self, flops_per_s):
        """Of the whole run at this many FLOP/s per GPU."""
        return sum(self.flops.values()) * self.images / flops_per_s / 3600


def build_without_weights(config):
    """RunConfig -> IOMM on the meta device. Raises InputError for what load and build would refuse."""
    mllm = mllm_without_weights("OpenGVLab/InternVL3-2B-hf" if config.model.mllm == "shapes" else config.model.mllm)
    vae = vae_without_weights(config.model.vae)
    vae.grid(config.data.size_px, config.data.size_px)
    shape = generator_config(config.model.preset, token_dim=vae.token_dim, condition_dim=mllm.width)
    with torch.device("meta"):
        adapter = None if config.adapter.kind == "none" else QueryAdapter(config.adapter, mllm.width)
        connector = Connector(config.adapter, mllm.width) if config.adapter.connector_layers else None
    recipe = Recipe(seed=config.run.seed, mask=config.mask, adapter=config.adapter, time=asdict(config.time))
    return IOMM(empty_generator(shape, device="meta"), adapter, mllm, vae, recipe, connector)


def make_plan(config, ranks):
    """RunConfig, number of GPUs -> Plan. Raises InputError where batch and ranks do not divide, or shards are missing."""
    batch = config.train.global_batch
    micro_batch = config.train.micro_batch or max(1, batch // ranks)
    if batch % (micro_batch * ranks):
        raise InputError(f"train.global_batch must be a multiple of train.micro_batch x ranks, got {batch} and "
                         f"{micro_batch} x {ranks}")
    if config.data.shards != "shapes":
        expand(config.data.shards)
    model = build_without_weights(config)
    mllm, vae = model.frozen
    parts = {"generator": model.generator, "adapter": model.adapter, "connector": model.connector}
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None}
    trained = sum(parameters.values())
    parameters |= {"MLLM (frozen)": sum(p.numel() for p in mllm.parameters()),
                   "VAE (frozen)": sum(p.numel() for p in vae.parameters())}
    width = 2 if config.precision == "bf16" else 4
    share = trained / (ranks if config.zero.stage == 3 else 1)
    state = trained / (ranks if config.zero.stage else 1)
    frozen = sum(number for name, number in parameters.items() if "frozen" in name)
    block = max(sum(p.numel() for p in module.parameters()) for module in model.modules() if isinstance(module, model.leaves))
    memory = {
        "frozen weights": width * frozen,
        "working weights": width * share,
        "gathered blocks": 2 * width * block if config.zero.stage == 3 else 0,       # one in use, one on its way
        "masters": 4 * state,
        "gradients": 4 * state,                                                      # accumulated in fp32
        "optimizer moments": {"adamw": 8, "muon": 4}[config.optim.kind] * state,
        "EMA": 4 * state if config.ema.decay else 0,
        "activations": activation_bytes(model, config, micro_batch),
    }
    text = {"num_text": NUM_TEXT}
    grid = vae.grid(config.data.size_px, config.data.size_px)
    total = model.flops_per_image(config.data.size_px, **text)
    flops = {"VAE": vae.flops_per_image(config.data.size_px), "ViT": mllm.vit_flops(),
             "generator": 3 * model.generator.flops_per_image(grid, config.adapter.num_queries)}
    flops["MLLM, adapter, connector"] = total - sum(flops.values())
    return Plan(ranks=ranks, micro_batch=micro_batch, accumulation=batch // (micro_batch * ranks),
                images=config.train.steps * batch, parameters=parameters, memory=memory, flops=flops)


def activation_bytes(model, config, micro_batch):
    """Bytes that autograd keeps of one micro-batch's generator pass, weights excepted: counted, by running it on the meta
    device; torch.compile keeps less. Of train.recompute blocks only the inputs stay, and one block's own while it runs."""
    vae, kept = model.frozen[1], {}
    own = {id(p) for p in model.parameters()}
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    rows, columns = grid = vae.grid(config.data.size_px, config.data.size_px)

    def keep(tensor):
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in own:
            kept[id(base)] = base, base.numel() * base.element_size()
        return tensor
    generator = empty_generator(model.generator.config, device="meta", dtype=dtype)
    own |= {id(p) for p in generator.parameters()}
    noisy = torch.empty(micro_batch, rows * columns, vae.token_dim, dtype=dtype, device="meta")
    condition = torch.empty(micro_batch, config.adapter.num_queries, generator.config.condition_dim, dtype=dtype, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        generator(noisy, torch.empty(micro_batch, device="meta"), condition, grid)
    everything = sum(size for _, size in kept.values())
    blocks = sum(isinstance(module, generator.block_classes) for module in generator.modules())
    recomputed = min(config.train.recompute, blocks)
    if not recomputed:
        return everything
    tokens = rows * columns + config.adapter.num_queries
    inputs = recomputed * micro_batch * tokens * generator.config.width * dtype.itemsize
    return everything * (blocks - recomputed + 1) // blocks + inputs


def describe(plan, config):
    """Plan -> text for the terminal."""
    rows = [f"{config.model.preset}, {config.data.size_px} px, {plan.ranks} GPU(s), micro-batch {plan.micro_batch} x "
            f"{plan.accumulation} accumulation steps, ZeRO-{config.zero.stage}, {config.precision}"]
    rows += ["", "parameters"] + [f"  {name:<26}{number / 1e6:>10.1f} M" for name, number in plan.parameters.items()]
    rows += ["", "memory a GPU"] + [f"  {name:<26}{size / GIB:>10.2f} GiB" for name, size in plan.memory.items()]
    rows += [f"  {'sum':<26}{sum(plan.memory.values()) / GIB:>10.2f} GiB"]
    rows += ["", "work an image"] + [f"  {name:<26}{work / 1e12:>10.3f} TFLOP" for name, work in plan.flops.items()]
    rows += [f"  {'sum':<26}{sum(plan.flops.values()) / 1e12:>10.3f} TFLOP", ""]
    rows += [f"{plan.images / 1e6:.1f} M images: {plan.gpu_hours(MATMUL_FLOPS):,.0f} GPU-hours at the bf16 matmul rate of an H200 "
             f"(790 TFLOP/s), {plan.gpu_hours(MATMUL_FLOPS * UTILISATION):,.0f} expected at {UTILISATION:.0%} of it"]
    return "\n".join(rows)
