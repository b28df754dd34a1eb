"""Tests of benchmarks/lib/traffic.py.

Two ranks make a real ZeRO-3 step. The bytes that they send, recorded in torch.distributed, must
equal the count for every kind of collective.
"""

import inspect
import json
import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from launches import PIXELS

from benchmarks.lib.traffic import DEFAULTS, count_traffic
from iomm.adapter import Connector, QueryAdapter
from iomm.alignment import AlignmentHead
from iomm.config import RECONSTRUCT, AdapterConfig, GeneratorConfig
from iomm.engine.config import load_config
from iomm.engine.parallel import ranks as group
from iomm.engine.parallel import zero
from iomm.engine.parallel.cpu_ranks import free_port
from iomm.engine.parallel.optim import make_optimizer
from iomm.engine.shapes.mllm import create_mllm
from iomm.generator import new_generator
from iomm.internvl import load_mllm
from iomm.model import IOMM, Recipe
from iomm.vae import load_vae

# DeepSpeed records the order of modules in the first micro-batch.
SIZE, ACCUMULATION, WARM_UP = 2, 2, 2
# Small enough that every rule applies to 1.2 M parameters: some persist, some are kept for the
# backward pass, some are prefetched.
SMALL = {
    "stage3_param_persistence_threshold": 500,
    "stage3_prefetch_bucket_size": 60_000,
    "reduce_bucket_size": 200_000,
}
# Name: (kind of generator, overrides of the demo's config, DeepSpeed's settings).
CASES = {
    "some kept": ("mmdit", [], {**SMALL, "stage3_max_reuse_distance": 250_000}),
    "muon, second copies": (
        "single_stream",
        ["precision=bf16", "optim.kind=muon"],
        {**SMALL, "stage3_max_reuse_distance": 150_000, "zero_hpz_partition_size": 2},
    ),
    "as configured": ("mmdit", [], {}),
    "all released": (
        "mmdit",
        ["precision=bf16"],
        {**SMALL, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0},
    ),
    "gathered ahead": ("mmdit", ["precision=bf16"], {**SMALL, "stage3_max_reuse_distance": 0}),
    "few live, none persistent": (
        "mmdit",
        [],
        {
            **SMALL,
            "stage3_max_live_parameters": 400_000,
            "stage3_max_reuse_distance": 400_000,
            "stage3_param_persistence_threshold": 0,
        },
    ),
    "aligned": (
        "mmdit",
        ["precision=bf16", "align.weight=0.5"],
        {**SMALL, "stage3_max_reuse_distance": 250_000},
    ),
}
# The same at the stages at which weights are whole on every rank.
WHOLE = {
    f"stage {stage}, {precision}": (
        "mmdit",
        [f"zero.stage={stage}", f"precision={precision}", "optim.kind=adamw"],
        {},
    )
    for stage in (0, 1, 2)
    for precision in ("fp32", "bf16")
}


def make_model(mllm, kind, dtype, align):
    adapter = AdapterConfig(num_queries=8, head_dim=16, connector_layers=1)
    shape = GeneratorConfig(
        kind=kind,
        width=64,
        num_heads=2,
        num_blocks=5,
        token_dim=48,
        condition_dim=mllm.width,
        num_refiner_blocks=int(kind == "single_stream"),
    )
    parts = (
        new_generator(shape, 0),
        QueryAdapter(adapter, mllm.width),
        Connector(adapter, mllm.width),
    )
    head = AlignmentHead(align, shape.width, mllm) if align.weight else None
    for part in filter(None, (*parts[1:], head)):
        part.init_weights(0)
    recipe = Recipe(adapter=adapter, align=align)
    return IOMM(parts[0], parts[1], mllm, load_vae("pixel:4", dtype=dtype), recipe, parts[2], head)


def record_collectives(sent):
    """Wrap torch.distributed to add the bytes that this rank sends to `sent`, {kind: bytes}.

    Bytes are those of the ring algorithm. An unexpected kind is counted under its own name.
    """

    def bytes_of(tensor):
        return tensor.numel() * tensor.element_size()

    def bytes_to_others(call):
        others = sum(
            n for rank, n in enumerate(call["input_split_sizes"]) if rank != dist.get_rank()
        )
        return others * call["input"].element_size()

    kinds = {
        "all_gather_into_tensor": (
            "all_gather",
            lambda call: bytes_of(call["input_tensor"]) * (SIZE - 1),
        ),
        "reduce_scatter_tensor": (
            "reduce_scatter",
            lambda call: bytes_of(call["output"]) * (SIZE - 1),
        ),
        "all_reduce": (
            "all_reduce",
            lambda call: 2 * bytes_of(call["tensor"]) * (SIZE - 1) // SIZE,
        ),
        "all_to_all_single": ("all_to_all", bytes_to_others),
        **{
            name: (name, lambda call: 1)
            for name in ("all_gather", "reduce_scatter", "broadcast", "reduce", "all_to_all")
        },
    }

    def wrap(name, kind, count):
        real = getattr(dist, name)
        signature = inspect.signature(real)

        def counted(*args, **kwargs):
            sent[kind] = sent.get(kind, 0) + count(signature.bind(*args, **kwargs).arguments)
            return real(*args, **kwargs)

        setattr(dist, name, counted)

    for name, (kind, count) in kinds.items():
        wrap(name, kind, count)


def worker(rank, port, folder, cases):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(SIZE),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    sent, found = {}, {}
    record_collectives(sent)
    ranks = group.start(60)
    configured = zero.deepspeed_config
    for case in cases:
        kind, overrides, settings = {**CASES, **WHOLE}[case]
        stage = [] if case in WHOLE else ["zero.stage=3"]

        def with_settings(*args, settings=settings):
            whole = configured(*args)
            whole["zero_optimization"] |= settings
            return whole

        zero.deepspeed_config = with_settings
        config = load_config(PIXELS, [*stage, *overrides])
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        model = make_model(load_mllm(f"{folder}/mllm", dtype=dtype), kind, dtype, config.align)
        expected = count_traffic(model, config, SIZE, **settings).sent_bytes(ACCUMULATION)
        model.prepare_blocks(recompute=2)
        sharded = zero.Sharded(
            model,
            lambda module, optim=config.optim: make_optimizer(module, optim),
            config=config,
            ranks=ranks,
            leaves=model.leaves,
            micro_batch=1,
            accumulation=ACCUMULATION,
        )
        # DeepSpeed must have taken every setting, and not know one of them by another name.
        actual = None if case in WHOLE else sharded.engine._config.zero_config
        expected_settings = {
            **DEFAULTS,
            **with_settings(config, ranks.device, 1, 1)["zero_optimization"],
        }
        assert case in WHOLE or all(
            getattr(actual, key.removeprefix("stage3_")) == expected_settings[key]
            for key in DEFAULTS
        )
        for step in range(WARM_UP + 1):
            if step == WARM_UP:
                sent.clear()
            for _ in range(ACCUMULATION):
                loss, *_ = sharded(
                    torch.rand(1, 3, 40, 40), torch.rand(1, 3, 32, 32), torch.tensor([rank])
                )
                sharded.backward(loss)
                sharded.step()
        found[case] = dict(sent), expected
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    group.stop()


def measure(folder, cases):
    """Return {case: (bytes sent by both ranks, bytes counted for both)}.

    The cases run one after the other in the same two processes.
    """
    create_mllm(
        folder / "mllm",
        texts=[RECONSTRUCT],
        vision=dict(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=48,
            image_size=32,
            patch_size=4,
            attention_bias=True,
        ),
        text=dict(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=80,
            max_position_embeddings=256,
        ),
    )
    # These are imported once for all worker processes.
    multiprocessing.set_forkserver_preload(["deepspeed", "transformers", "benchmarks.lib.traffic"])
    mp.start_processes(
        worker, (free_port(), str(folder), list(cases)), nprocs=SIZE, start_method="forkserver"
    )
    one, other = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(SIZE))
    return {
        case: tuple(
            {kind: a.get(kind, 0) + b.get(kind, 0) for kind in {*a, *b}}
            for a, b in zip(one[case], other[case], strict=True)
        )
        for case in cases
    }


def check(measured):
    for case, (sent, counted) in measured.items():
        assert sent == counted and set(sent) >= {"all_gather", "reduce_scatter", "all_reduce"}, case
    gathered = {sent["all_gather"] for sent, _ in measured.values()}
    assert len(gathered) == len(measured), (
        "two cases send the same bytes, so they do not test different rules"
    )


def test_sent_bytes_match_the_count(tmp_path):
    found = measure(tmp_path, list(CASES)[:2])
    check(found)
    assert "all_to_all" in found["muon, second copies"][0]


@pytest.mark.slow
def test_sent_bytes_match_the_count_for_other_settings(tmp_path):
    check(measure(tmp_path, list(CASES)[2:]))


def test_sent_bytes_match_the_count_where_weights_are_whole(tmp_path):
    for case, (sent, counted) in measure(tmp_path, list(WHOLE)).items():
        assert sent == counted, case
        assert ("all_gather" in sent) == (not case.startswith("stage 0")), case
