"""Parameters, memory and work counted on the meta device, against known counts and real passes."""

import json
import socket
from copy import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from launches import PIXELS

from iomm.config import InputError
from iomm.engine import dry_run
from iomm.engine.activations import call_of
from iomm.engine.config import CONFIGS, load_config
from iomm.engine.dry_run import (
    GIB,
    GPUS,
    NUM_CAPTION,
    USABLE,
    Memory,
    activation_bytes,
    auto_micro_batch,
    base_sharding,
    build_without_weights,
    check_paths,
    describe,
    kept_bytes,
    make_plan,
    memory,
    parameters,
    prepared_bytes,
    query_bytes,
    tokens,
    with_micro_batch,
    work,
)
from iomm.flops import flops_by_part

# {config: (range of the generator's parameters, range of the work of one sample in TFLOP (the
# method's table for B), millions of samples)}
PAPER = {
    "iomm-b-512": ((1.55e9, 1.65e9), (7.9, 8.2), 110),
    "iomm-l-512": ((2.65e9, 2.80e9), (10.5, 11.5), 55),
    "iomm-xl-512": ((5.7e9, 6.3e9), (48.0, 52.0), 110),
    # 10 epochs of 210 k samples, half of them pairs.
    "iomm-b-512-finetune": ((1.55e9, 1.65e9), (7.6, 7.9), 2.1),
    "iomm-l-512-finetune": ((2.65e9, 2.80e9), (10.2, 11.1), 2.1),
    "iomm-xl-512-finetune": ((5.7e9, 6.3e9), (47.5, 51.0), 2.1),
    "iomm-b-1024-finetune": ((1.55e9, 1.65e9), (26.0, 29.0), 2.1),
    "iomm-l-1024-finetune": ((2.65e9, 2.80e9), (36.0, 41.0), 2.1),
}
NO_PATHS = ("data.shards=shapes", "data.pairs=shapes", "run.init=null")
STAGE_1 = {
    "iomm-b": (1024, 0.85, "adamw", 0.999),
    "iomm-l": (512, 0.85, "adamw", 0.999),
    "iomm-xl": (4096, 0.45, "muon", 0.999),
}


@pytest.fixture(scope="module")
def model():
    return build_without_weights(load_config("iomm-b-512-finetune", NO_PATHS))


@pytest.mark.parametrize("name", sorted(p.stem for p in CONFIGS.glob("iomm-*.yaml")))
def test_shipped_configs_have_the_expected_counts(name):
    # Blocks that are compiled take seconds to count.
    config = load_config(name, [*NO_PATHS, "train.compile=false"])
    plan = make_plan(config, ranks=8)
    (fewest, most), (least, highest), millions = PAPER[name]
    assert fewest <= plan.parameters["generator"] <= most
    assert 28.5e6 <= plan.parameters["adapter"] <= 29.5e6
    assert least <= sum(plan.flops.values()) / 1e12 <= highest
    trained = plan.parameters["generator"] + plan.parameters["adapter"]
    assert plan.memory["masters"] == 4 * trained / 8
    assert config.train.micro_batch == "auto" and plan.micro_batch >= 4
    assert sum(plan.memory.values()) <= USABLE * GPUS["H200"]
    assert plan.samples == pytest.approx(millions * 1e6, rel=0.001)


@pytest.mark.parametrize("name", sorted(PAPER))
def test_shipped_configs_have_the_papers_values(name):
    """Counts of the presets, and work of IOMM-B."""
    config = load_config(name)
    batch, ratio, kind, decay = STAGE_1[config.model.preset]
    if name.endswith("finetune"):
        batch = {512: 256, 1024: 96}[config.data.size_px]
        assert (config.train.data, config.data.mix, config.run.init) == (
            "mix",
            0.5,
            f"runs/{config.model.preset}-512",
        )
    assert (
        name.startswith(f"{config.model.preset}-{config.data.size_px}")
        and config.run.dir == f"runs/{name}"
    )
    assert (config.train.global_batch, config.mask.ratio, config.optim.kind, config.ema.decay) == (
        batch,
        ratio,
        kind,
        decay,
    )
    assert (config.optim.lr, config.optim.clip, config.optim.betas, config.optim.weight_decay) == (
        1e-4,
        1.0,
        (0.9, 0.95),
        0,
    )
    assert (
        config.mask.mode,
        config.mask.count,
        config.adapter.kind,
        config.adapter.num_queries,
    ) == ("drop", "bernoulli", "rqa", 256)


@pytest.mark.parametrize("size_px", [512, 1024])
def test_qwen_image_configs_have_the_papers_values(size_px):
    """Values of table 2 and appendix B.3 of the paper."""
    config = load_config(f"qwen-image-{size_px}-lora")
    train, optim = config.train, config.optim
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (64, 64, 0)
    assert (train.global_batch, train.data, config.data.mix) == (48, "mix", 0.5)
    # 5 epochs of 210 k samples.
    assert train.steps * train.global_batch == 5 * 210_000
    assert (optim.kind, optim.lr, optim.betas, optim.clip, optim.weight_decay) == (
        "adamw",
        1e-4,
        (0.9, 0.95),
        1.0,
        0,
    )
    assert (config.mask.ratio, config.ema.decay, config.data.size_px) == (0.85, 0, size_px)
    assert (config.adapter.kind, config.adapter.conditions, config.prompt.empty) == (
        "none",
        "all",
        " ",
    )


@pytest.mark.parametrize(
    "size_px, tflop, gib, sharded_gib",
    [(512, 36.2, 58, 26), pytest.param(1024, 161.4, 60, 29, marks=pytest.mark.slow)],
)
def test_qwen_image_configs_have_the_counts_of_the_readme(size_px, tflop, gib, sharded_gib):
    config = load_config(f"qwen-image-{size_px}-lora", ["train.compile=false"])
    model = build_without_weights(config)
    counts = {name: number / 1e6 for name, number in parameters(model).items()}
    assert counts == {
        "LoRA": pytest.approx(422.5, abs=0.1),
        "generator (frozen)": pytest.approx(20_298.2, abs=0.1),
        "MLLM (frozen)": pytest.approx(7_747.2, abs=0.1),
        "VAE (frozen)": pytest.approx(46.9, abs=0.1),
    }
    assert sum(work(model, config).values()) / 1e12 == pytest.approx(tflop, abs=0.1)
    sharded = replace(config, lora=replace(config.lora, shard_base=True))
    for settings, expected in ((config, gib), (sharded, sharded_gib)):
        needed = sum(memory(model, settings, 8, config.train.micro_batch).values())
        assert needed / 2**30 == pytest.approx(expected, abs=1)
    # A rank keeps an eighth of 37.73 GiB and two gathered blocks of 0.63 GiB. It receives 7 / 8 of
    # 118 blocks in two micro-batches: all but the last one in each direction.
    (sentence,) = base_sharding(model, config, 8, 2)
    assert "take 37.73 GiB per GPU, and 5.98 GiB with" in sentence
    assert "receives 139.89 GB from the others per step" in sentence
    assert base_sharding(model, config, 1, 2) == []
    with pytest.raises(InputError, match=r"has one GPU: set lora\.shard_base=false"):
        base_sharding(model, sharded, 1, 2)


def test_z_image_config_is_stage_2_of_its_shape_from_its_weights():
    ours, xl = load_config("z-image-512"), load_config("iomm-xl-512-finetune")
    assert ours.run.init == "models/Z-Image"
    assert replace(ours, run=xl.run) == xl


def test_pair_counts_the_caption_and_not_the_vit(model):
    config = load_config("iomm-b-512-finetune", NO_PATHS)
    image, pair = (
        flops_by_part(model, 512, model.frozen[0].num_text),
        flops_by_part(model, 512, model.frozen[0].num_turn + 0.9 * NUM_CAPTION, image=False),
    )
    mllm = model.frozen[0]
    assert (
        image["ViT"] == mllm.vit_flops()
        and pair["ViT"] == 0
        and pair["generator"] == image["generator"]
    )
    assert pair["MLLM"] == sum(
        mllm.decoder_flops(model.frozen[0].num_turn + 0.9 * NUM_CAPTION, 256)
    )
    assert work(model, config) == pytest.approx(
        {part: (image[part] + pair[part]) / 2 for part in image}
    )
    assert tokens(model, config) == 1024 + 256
    every = load_config("iomm-b-512", ["adapter.conditions=all", *NO_PATHS])
    assert tokens(build_without_weights(every), every) == pytest.approx(
        1024 + 256 + model.frozen[0].num_text + 0.15 * 256
    )
    latents = replace(
        config,
        data=replace(config.data, latents="somewhere", pairs=None),
        train=replace(config.train, data="image"),
    )
    assert work(model, latents)["VAE"] == 0 and work(model, config)["VAE"] == image["VAE"]


def test_gpu_hours_of_the_papers_budget():
    """110 M images of IOMM-B take 310 GPU-hours at an H200's matmul rate.

    At 60 % of it that is half of the paper's 1000.
    """
    plan = make_plan(load_config("iomm-b-512", [*NO_PATHS, "train.compile=false"]), ranks=8)
    assert plan.gpu_hours(790e12) == pytest.approx(311, rel=0.02)
    assert "GPU-hours" in describe(plan, load_config("iomm-b-512"))


def test_activation_bytes_match_a_real_pass():
    config = load_config(
        PIXELS, ["precision=fp32", "data.size_px=32", "model.vae=pixel:4", "optim.kind=adamw"]
    )
    model = build_without_weights(config)
    counted = activation_bytes(model, config, micro_batch=4)["generator"]
    from iomm.generator import new_generator

    generator = new_generator(model.generator.config, 0)
    own, kept = {p.untyped_storage().data_ptr() for p in generator.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = generator(
            torch.randn(4, 64, 48),
            torch.rand(4),
            torch.randn(4, 16, model.generator.config.condition_dim),
            (8, 8),
        )
    assert counted == pytest.approx(sum(kept.values()), rel=0.1) and out.requires_grad


@pytest.mark.parametrize("lora", [[], ["lora.rank=8", "run.init=base"]], ids=["full", "lora"])
@pytest.mark.parametrize("preset", ["demo", "iomm-xl"])
def test_activation_bytes_match_a_model_of_all_blocks(preset, lora):
    """With LoRA, weights are frozen, and so is what the generator is conditioned on."""
    settings = ["precision=fp32", "data.size_px=32", "model.vae=pixel:4", *lora]
    config = load_config(PIXELS, [f"model.preset={preset}", *settings])
    model = build_without_weights(config)
    generator, vae = model.generator, model.frozen[1]
    with torch.device("meta"):
        inputs = (
            torch.empty(4, 64, vae.token_dim),
            torch.empty(4),
            torch.empty(4, 16, generator.config.condition_dim, requires_grad=not lora),
        )
    own = [*generator.parameters(), *generator.buffers()]
    whole = kept_bytes(lambda: generator(*inputs, (8, 8)), own)
    assert activation_bytes(model, config, micro_batch=4)["generator"] == whole


def test_fp8_keeps_one_byte_per_product_input():
    """A block of width D keeps the inputs of qkv, out, mlp_in (D per row) and mlp_out (4 D)."""
    config = load_config(
        PIXELS, ["precision=bf16", "data.size_px=32", "model.vae=pixel:4", "optim.kind=adamw"]
    )
    model = build_without_weights(config)
    bf16, fp8 = (
        activation_bytes(model, replace(config, precision=p), micro_batch=4)["generator"]
        for p in ("bf16", "fp8")
    )
    blocks, width, latents, condition = 6, 96, 64, config.adapter.num_queries
    # In the last block the condition has only kv. The latents' `out` reads what attention keeps
    # anyway, so it costs a byte more, not less.
    rows = 4 * (blocks * 7 * (latents + condition) - 6 * condition - 2 * latents)
    scales = 4 * (blocks * 8 - 3)
    assert bf16 - fp8 == rows * width - scales


def test_prefetched_bytes_match_a_real_batch():
    from iomm.engine.shapes.mllm import WEIGHTS
    from iomm.internvl import load_mllm
    from iomm.model import IOMM
    from iomm.vae import load_vae

    config = load_config(
        PIXELS, ["mask.ratio=0.0", "precision=fp32", "data.size_px=32", "model.vae=pixel:4"]
    )
    mllm, vae = load_mllm(str(WEIGHTS), dtype=torch.float32), load_vae(config.model.vae)
    counted = build_without_weights(config)
    model = IOMM(counted.generator, counted.adapter, mllm, vae, counted.recipe)
    prepared = model.prepare(torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32), torch.arange(4))
    real = sum(
        tensor.nbytes
        for tensor in prepared.tensors()
        if tensor.is_floating_point() and tensor is not prepared.t_R
    )
    assert prepared_bytes(model, config, micro_batch=4) == real


def test_impossible_batch_or_size_is_refused():
    with pytest.raises(
        InputError,
        match=r"train\.global_batch must be a multiple of train.micro_batch x ranks, got "
        "1024 and 16 x 7",
    ):
        make_plan(load_config("iomm-b-512", [*NO_PATHS, "train.micro_batch=16"]), ranks=7)
    with pytest.raises(
        InputError, match="image size must be a positive multiple of 16 px, got 500 x 500"
    ):
        make_plan(load_config("iomm-b-512", [*NO_PATHS, "data.size_px=500"]), ranks=8)


@pytest.mark.parametrize("last", ["a red circle", "two blue squares and a circle"])
def test_mllm_query_bytes_match_a_real_pass(last):
    """With prompts of equal lengths, and padded to the longest with a mask and repeated heads."""
    from iomm.engine.shapes.mllm import WEIGHTS
    from iomm.internvl import load_mllm

    config = load_config(PIXELS, ["adapter.attention=bidirectional", "precision=fp32"])
    model = build_without_weights(config)
    mllm = load_mllm(str(WEIGHTS), dtype=torch.float32)
    condition = mllm.condition(["a red circle"] * 3 + [last])
    cache, _ = mllm.prefix(condition)
    on_meta = replace(condition, offsets=condition.offsets.to("meta"))
    counted = mllm.num_layers * query_bytes(model.frozen[0], config, on_meta, compiled=False)
    own, kept = {p.untyped_storage().data_ptr() for p in mllm.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    queries = torch.randn(4, 16, mllm.width, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mllm.queries(queries, condition, cache, causal=False)
    assert counted == pytest.approx(sum(kept.values()), rel=0.15)


def test_selected_kernels_do_not_change_the_count(monkeypatch):
    config = load_config(PIXELS, ["precision=bf16"])
    model = build_without_weights(config)
    counted = activation_bytes(model, config, 4)
    monkeypatch.setenv("IOMM_KERNELS", "masked_attention:triton,qk_norm_rope:triton")
    assert activation_bytes(model, config, 4) == counted


@pytest.fixture(scope="module")
def compiled(model):
    """Memory of IOMM-B, compiled."""
    config = load_config("iomm-b-512", NO_PATHS)
    return Memory(build_without_weights(config), config)


def test_peak_is_that_of_the_rehearsal(compiled):
    """Seen on a pretended GPU with one rank and 16 images (LOG.md, 2026-11-30), in GiB."""
    assert compiled.total(1, 16) / GIB == pytest.approx(67.4, rel=0.01)
    assert compiled.total(1, 48) / GIB == pytest.approx(128.0, rel=0.01)
    kept = {part: 16 * number / GIB for part, number in compiled.activations.items()}
    assert kept["generator"] == pytest.approx(23.4, abs=0.05)
    assert kept["MLLM queries"] == pytest.approx(6.5, abs=0.05)
    # Without torch.compile.
    assert 16 * compiled.encoders / GIB == pytest.approx(5.0, abs=0.05)


def test_auto_takes_what_fits_with_the_margin(compiled):
    """48 images fit into an H200, but only divisors of a rank's share are possible."""
    batch_of_48 = copy(compiled)
    batch_of_48.config = replace(
        compiled.config, train=replace(compiled.config.train, global_batch=48 * 21)
    )
    assert auto_micro_batch(batch_of_48, 1, GPUS["H200"])[0] == 48
    number, why = auto_micro_batch(compiled, 1, GPUS["H200"])
    assert number == 32 and why == (
        f"train.micro_batch=auto takes 32: it needs {compiled.total(1, 32) / GIB:.1f} of 139.8 "
        f"GiB, 92% of which may be filled; 64, the next divisor of 1024, needs "
        f"{compiled.total(1, 64) / GIB:.1f}"
    )
    assert auto_micro_batch(compiled, 1, GPUS["H100"])[0] == 16
    assert auto_micro_batch(compiled, 256, GPUS["H100"]) == (
        4,
        f"train.micro_batch=auto takes 4: it needs {compiled.total(256, 4) / GIB:.1f} of 79.1 GiB, "
        "92% of which may be filled; it is a rank's whole share of the global batch",
    )
    with pytest.raises(
        InputError, match=r"auto: one sample needs 40\.9 GiB on 1 rank\(s\), but 92%"
    ):
        auto_micro_batch(compiled, 1, 40 * GIB)
    with pytest.raises(InputError, match="multiple of the number of ranks, got 1024 and 7"):
        auto_micro_batch(compiled, 7, GPUS["H200"])


def test_ranks_agree_on_the_micro_batch(compiled, monkeypatch):
    """The GPU with the least memory decides; on a CPU it is the whole share."""
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda _: SimpleNamespace(total_memory=int(GPUS["H200"])),
    )
    monkeypatch.setattr(dry_run, "Memory", lambda *_: compiled)
    ranks = SimpleNamespace(
        device=torch.device("cuda"),
        size=2,
        all=lambda value: [value, int(GPUS["H100"])],
        on_first=lambda work: work(),
    )
    config, why = with_micro_batch(compiled.config, ranks)
    assert config.train.micro_batch == 16 and "of 79.1 GiB" in why
    assert with_micro_batch(config, ranks) == (config, None)
    on_cpu = SimpleNamespace(device=torch.device("cpu"), size=8)
    config, why = with_micro_batch(compiled.config, on_cpu)
    assert config.train.micro_batch == 128 and why.endswith("on a CPU: global_batch / ranks")


def test_routed_and_recomputed_blocks_keep_less(model):
    """Half of the latent tokens skip blocks 3 to 17 of 19. A recomputed block keeps its inputs."""
    config = load_config("iomm-b-512", [*NO_PATHS, "train.compile=false"])

    def kept(**sections):
        return activation_bytes(model, replace(config, **sections), 1)["generator"]

    whole, route = kept(), replace(config.route, ratio=0.5)
    routed = kept(route=route)
    block, routed_block = (
        value - kept(train=replace(config.train, recompute=4), route=r)
        for value, r in ((whole, config.route), (routed, route))
    )
    inputs = 2 * (1024 + 256) * 1536
    # Of 4 recomputed blocks none is counted, as more than one is not recomputed.
    assert block == pytest.approx(whole * 4 / 19 - 4 * inputs, rel=0.05)
    assert routed == pytest.approx(whole * (4 + 15 * (512 + 256) / (1024 + 256)) / 19, rel=0.05)
    assert routed_block < block
    every = kept(train=replace(config.train, recompute=19))
    assert every == pytest.approx(whole / 19 + 18 * inputs, rel=0.1)


@pytest.mark.slow
def test_compiled_blocks_keep_what_torch_compile_keeps():
    """A real block, compiled with Inductor's decompositions and partitioner, on a CPU."""
    from torch._dynamo.utils import counters

    from iomm.mmdit import DualBlock

    def inputs(device):
        with torch.device(device):
            shapes = (2, 64, 128), (2, 16, 128), (2, 128)
            x = [torch.empty(shape).normal_().requires_grad_() for shape in shapes]
            return *x, torch.rand(64, 32), torch.rand(64, 32)

    block, args = DualBlock(128, 2), inputs("cpu")
    own, kept = {id(x) for x in block.parameters()}, {}

    def keep(tensor):
        if id(tensor) not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    counters.clear()
    forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager_decomp_partition")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = forward(*args)
    real = sum(x.untyped_storage().nbytes() for x in kept.values())
    assert counters["stats"]["unique_graphs"] == 1 and outputs[0].requires_grad
    with torch.device("meta"):
        same = DualBlock(128, 2)
    meta = inputs("meta")
    call = call_of(same, meta, compiled=True)
    counted = call.num_bytes + sum(meta[i].nbytes for i in call.arguments)
    assert counted == pytest.approx(real, rel=0.02)


def test_dry_run_prints_and_writes_nothing(capsys, tmp_path):
    from iomm.engine.launch import main

    run_dir = tmp_path / "run"
    assert (
        main(
            [
                "--config",
                "iomm-b-512",
                "--dry-run",
                "64",
                "data.shards=shapes",
                f"run.dir={run_dir}",
            ]
        )
        == 0
    )
    output = capsys.readouterr().out
    assert "64 GPU(s)" in output and "GPU-hours" in output and not run_dir.exists()
    assert "micro-batch 16 x 1" in output
    assert "auto takes 16 on H200 (139.8 GiB), 16 on H100" in output


@pytest.mark.parametrize("name", ["iomm-xl-512-finetune"])
def test_dry_run_with_known_hub_ids_needs_no_network(name, monkeypatch, capsys):
    from iomm.engine.launch import main

    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert main(["--config", name, "--dry-run", "16", "train.compile=false", *NO_PATHS]) == 0
    assert "16 GPU(s)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given, message",
    [
        (["data.shards=nowhere/*.tar"], "data.shards: no shard matches"),
        (["data.pairs=nowhere/*.tar"], "data.pairs: no shard matches"),
        (
            ["data.pairs=null"],
            "data.pairs must name tars, globs or folders for train.data=mix, got none",
        ),
        (["run.init=nowhere"], "run.init: nowhere is not a run folder"),
        (
            ["train.data=image", "data.pairs=null", "data.latents=nowhere"],
            "data.latents: nowhere has no latents.json",
        ),
    ],
)
def test_dry_run_checks_every_path(given, message, model):
    with pytest.raises(InputError) as error:
        check_paths(load_config("iomm-b-512-finetune", [*NO_PATHS, *given]), model)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given, message",
    [
        (["model.mllm=nowhere"], "model.mllm: no folder nowhere"),
        (["model.vae=nowhere"], "model.vae: no folder nowhere"),
        (["data.shards=nowhere/*.tar"], "data.shards: no shard matches"),
        (
            ["train.global_batch=100"],
            "train.global_batch must be a multiple of the number of ranks, got 100 and 8",
        ),
    ],
)
def test_dry_run_refuses_missing_parts(given, message):
    with pytest.raises(InputError) as error:
        make_plan(load_config("iomm-b-512-finetune", [*NO_PATHS, *given]), ranks=8)
    assert message in str(error.value)


def test_dry_run_checks_the_model_of_run_init(tmp_path, model):
    from iomm.engine.resilience.checkpoint_reader import seal
    from iomm.engine.resilience.checkpoint_writer import FORMAT

    config = load_config("iomm-b-512-finetune", [*NO_PATHS[:2], f"run.init={tmp_path}"])
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(InputError, match="has no checkpoint yet"):
        check_paths(config, model)
    folder = tmp_path / "checkpoints/step-00000002"
    folder.mkdir(parents=True)
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    (folder / "MANIFEST.json").write_bytes(seal({"format": FORMAT, "files": {}, "shapes": shapes}))
    check_paths(config, model)
    (folder / "MANIFEST.json").write_bytes(
        seal({"format": FORMAT, "files": {}, "shapes": shapes | {"generator.more": [1]}})
    )
    with pytest.raises(InputError, match="is a checkpoint of another model"):
        check_paths(config, model)


def test_latents_of_another_size_are_refused(tmp_path, model):
    config = load_config("iomm-b-512", [NO_PATHS[0], f"data.latents={tmp_path}"])
    (tmp_path / "latents.json").write_text(json.dumps({"vae": config.model.vae, "size_px": 256}))
    with pytest.raises(InputError, match="size_px is 256, expected 512"):
        check_paths(config, model)


def test_memory_of_partitioned_parts_is_divided_by_ranks(model):
    config = load_config("iomm-b-512-finetune", NO_PATHS)
    one, eight = memory(model, config, 1, 16), memory(model, config, 8, 16)
    divided = {part for part in one if one[part] and one[part] == 8 * eight[part]}
    assert divided == {"working weights", "masters", "gradients", "optimizer moments", "EMA"}
