"""Muon and AdamW over flat shards match torch's optimizers, on any number of ranks."""

import math
import os
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from iomm.adapter import Connector, QueryAdapter
from iomm.config import AdapterConfig, GeneratorConfig, InputError
from iomm.engine.config import OptimSection
from iomm.engine.parallel.cpu_ranks import free_port
from iomm.engine.parallel.optim import (
    NEWTON_SCHULZ,
    Matrix,
    ShardedOptimizer,
    adamw_multi_tensor,
    adamw_torch,
    learning_rate,
    make_optimizer,
    orthogonal_stack,
    spread,
    stacks_of,
)
from iomm.engine.parallel.zero import adamw_backend
from iomm.engine.resilience.watchdog import num_collectives
from iomm.generator import empty_generator

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SHAPES = [(12, 20), (20, 12), (7, 5), (16, 16), (30, 8), (12, 20)]
LAYOUTS = ("padded", "end to end", "replicated")


def flat_shards(tensors, rank, size, layout="padded"):
    """Return this rank's flat shard and its matrices.

    Each tensor is cut and padded as by ZeRO-3, all are concatenated and cut as by ZeRO-1 and 2, or
    none is cut, as at stage 0.
    """
    if layout == "replicated":
        rank, size = 0, 1
    if layout == "end to end":
        whole = torch.cat([t.flatten() for t in tensors])
        numel = -(-len(whole) // size)
        first = [sum(t.numel() for t in tensors[:i]) for i in range(len(tensors))]
        cuts = [
            [
                (
                    max(at - r * numel, 0),
                    max(0, min(at + t.numel(), (r + 1) * numel) - max(at, r * numel)),
                )
                for r in range(size)
            ]
            for at, t in zip(first, tensors, strict=True)
        ]
        cuts = [
            [(offset if count else 0, count) for offset, count in of_ranks] for of_ranks in cuts
        ]
        shard = whole[rank * numel : (rank + 1) * numel].clone()
    else:
        numels = [-(-t.numel() // size) for t in tensors]
        padded = [
            torch.nn.functional.pad(t.flatten(), (0, n * size - t.numel()))
            for t, n in zip(tensors, numels, strict=True)
        ]
        shard = torch.cat(
            [p[rank * n : (rank + 1) * n] for p, n in zip(padded, numels, strict=True)]
        )
        cuts = [
            [(sum(numels[:i]), max(0, min(n, t.numel() - r * n))) for r in range(size)]
            for i, (t, n) in enumerate(zip(tensors, numels, strict=True))
        ]
    return shard, [
        Matrix(shape=tuple(t.shape), parts=(t.shape[0],), cuts=tuple(c))
        for t, c in zip(tensors, cuts, strict=True)
    ]


def draw(step, num=None):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES[:num]]


def run_muon(rank, size, steps=4, layout="padded", num=None):
    """Return the shard of `num` matrices (all if None) after some steps, and its matrices."""
    flat, matrices = flat_shards(draw(0, num), rank, size, layout)
    flat.requires_grad_()
    optimizer = ShardedOptimizer(
        [{"params": [flat], "kind": "muon"}],
        lr=0.02,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        momentum=0.95,
    )
    optimizer.bind({flat: matrices}, rank, size, replicated=layout == "replicated")
    for step in range(1, steps + 1):
        flat.grad = flat_shards(draw(step, num), rank, size, layout)[0]
        optimizer.step()
    return flat.detach(), matrices


def whole(flats, matrices):
    """Return the whole matrices from the flat shards of all ranks."""
    return [
        torch.cat([flat.narrow(0, *cut) for flat, cut in zip(flats, m.cuts, strict=True)]).view(
            m.shape
        )
        for m in matrices
    ]


def test_one_rank_matches_torch_muon(monkeypatch):
    """On a CPU, torch's Muon rounds to bfloat16 and ours does not."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    ours = whole([run_muon(0, 1)[0]], run_muon(0, 1)[1])
    theirs = [torch.nn.Parameter(t) for t in draw(0)]
    optimizer = torch.optim.Muon(
        theirs,
        lr=0.02,
        weight_decay=0.1,
        momentum=0.95,
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )
    for step in range(1, 5):
        for p, grad in zip(theirs, draw(step), strict=True):
            p.grad = grad
        optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-6


def worker(rank, size, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    for layout in LAYOUTS:
        for num in (None, 1):
            before = num_collectives()
            flat = run_muon(rank, size, layout=layout, num=num)[0]
            torch.save((flat, num_collectives() - before), f"{folder}/{rank}-{layout}-{num}")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_more_ranks_give_bitwise_the_same(size, tmp_path):
    """In each layout, and also if ranks have nothing to orthogonalise.

    A step sends results once in the replicated layout, and cuts twice in the others.
    """
    mp.spawn(worker, (size, free_port(), str(tmp_path)), nprocs=size)
    for num in (None, 1):
        one_rank = whole([run_muon(0, 1, num=num)[0]], run_muon(0, 1, num=num)[1])
        for layout in LAYOUTS:
            flats, counts = zip(
                *(
                    torch.load(tmp_path / f"{rank}-{layout}-{num}", weights_only=True)
                    for rank in range(size)
                ),
                strict=True,
            )
            matrices = flat_shards(draw(0, num), 0, size, layout)[1]
            for held in [[flat] for flat in flats] if layout == "replicated" else [flats]:
                for a, b in zip(whole(held, matrices), one_rank, strict=True):
                    assert torch.equal(a, b), layout
            assert set(counts) == {4 * (1 if layout == "replicated" else 2)}, layout


def test_fused_matrices_are_orthogonalised_separately():
    tall = torch.randn(24, 10, generator=torch.Generator().manual_seed(0))

    def run(tensors, parts):
        flat, matrices = flat_shards(tensors, 0, 1)
        flat, grad = torch.zeros_like(flat).requires_grad_(), flat
        optimizer = ShardedOptimizer(
            [{"params": [flat], "kind": "muon"}],
            lr=1.0,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.0,
            momentum=0.0,
        )
        optimizer.bind(
            {flat: [replace(matrix, parts=parts or matrix.parts) for matrix in matrices]}, 0, 1
        )
        flat.grad = grad
        optimizer.step()
        return flat.detach()

    assert torch.equal(run([tall], (8, 16)), run([tall[:8], tall[8:]], None))


def test_unfused_parts_have_the_cuts_of_their_rows():
    """Cuts start and end within a part or at its edges, or have none of it."""
    values = torch.arange(60.0)
    fused = Matrix(shape=(12, 5), parts=(3, 1, 8), cuts=((0, 7), (2, 8), (0, 0), (1, 45)))
    flats = [torch.full((50,), -1.0) for _ in fused.cuts]
    at = 0
    for flat, (offset, numel) in zip(flats, fused.cuts, strict=True):
        flat[offset : offset + numel] = values[at : at + numel]
        at += numel
    parts = fused.unfuse()
    assert [part.shape for part in parts] == [(3, 5), (1, 5), (8, 5)]
    rows = values.view(12, 5).split(fused.parts)
    for got, expected in zip(whole(flats, parts), rows, strict=True):
        assert torch.equal(got, expected)


def one_by_one(matrix, steps=5):
    """Return Muon's update of one matrix as published, computed on the wide orientation."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm()
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return 0.2 * math.sqrt(max(matrix.shape)) * (x.T if matrix.shape[0] > matrix.shape[1] else x)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
@pytest.mark.parametrize(
    "shape, num, steps",
    [
        ((96, 96), 7, 5),
        ((96, 384), 3, 5),
        ((96, 384), 3, 3),
        ((96, 384), 2, 1),
        ((5, 33), 4, 5),
        ((192, 768), 1, 5),
    ],
)
def test_stacks_are_no_worse_than_one_by_one(shape, num, steps, device):
    """The error is at most twice that of the published form.

    It is tested in float32 (bfloat16 on a GPU) and in float64, where the budget is smaller by the
    ratio of the two epsilons. Fewer steps have the error budget of the published five.
    """
    generator = torch.Generator().manual_seed(0)
    matrices = [
        torch.randn(shape if i % 2 else shape[::-1], generator=generator, dtype=torch.float64).to(
            device
        )
        for i in range(num)
    ]
    exact = [one_by_one(matrix, steps).flatten() for matrix in matrices]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    errors = [
        (one_by_one(matrix.to(dtype)).flatten() - one_by_one(matrix).flatten()).abs().max()
        for matrix in matrices
    ]
    for kind in (torch.float32, torch.float64) if device == "cpu" else (torch.float32,):
        budget = 2 * max(errors) * (torch.finfo(kind).eps / torch.finfo(torch.float32).eps)
        results = orthogonal_stack([matrix.to(kind) for matrix in matrices], steps)
        for got, expected in zip(results, exact, strict=True):
            assert got.dtype == kind and (got - expected).abs().max() <= budget


def test_stacks_have_each_matrix_once_within_the_limit():
    def of(*shapes):
        return [
            Matrix(shape=shape, parts=shape[:1], cuts=((i, 1),)) for i, shape in enumerate(shapes)
        ]

    found = stacks_of(of((4, 8), (8, 4), (4, 4), (4, 8), (100, 100)), limit=2 * 4 * 32)
    assert [[matrix.cuts[0][0] for matrix in stack] for stack in found] == [[0, 1], [3], [2], [4]]


def test_adamw_shards_match_torch_adamw():
    flat = torch.randn(100, generator=torch.Generator().manual_seed(0))
    ours, theirs = flat.clone().requires_grad_(), flat.clone().requires_grad_()
    settings = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    mine = ShardedOptimizer([{"params": [ours], "kind": "adamw"}], momentum=0.95, **settings)
    adamw = torch.optim.AdamW([theirs], fused=True, **settings)
    for step in range(3):
        grad = torch.randn(100, generator=torch.Generator().manual_seed(step + 1))
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        mine.step()
        adamw.step()
    assert torch.equal(ours, theirs)


def multi_tensor_adam(
    chunk, overflow, tensors, lr, beta1, beta2, eps, step, mode, bias_correction, decay
):
    """Compute what apex's multi_tensor_adam.cu does, with its arguments, in float32."""
    assert (
        (chunk, mode, bias_correction) == (65536, 1, 1)
        and not overflow.any()
        and isinstance(step, int)
    )
    for gradient, weights, first, second in zip(*tensors, strict=True):
        first.copy_(beta1 * first + (1 - beta1) * gradient)
        second.copy_(beta2 * second + (1 - beta2) * gradient * gradient)
        update = (first / (1 - beta1**step)) / (
            (second / (1 - beta2**step)).sqrt() + eps
        ) + decay * weights
        weights.copy_(weights - lr * update)


@pytest.mark.parametrize(
    "name, device",
    [
        ("reference", "cpu"),
        pytest.param("reference", "cuda", marks=NEEDS_GPU),
        pytest.param("apex", "cuda", marks=NEEDS_GPU),
    ],
)
def test_adamw_backends_match_torch(name, device):
    """Over twenty steps with decay, the error is at most twice that of torch's fused kernel.

    The error is relative to AdamW in float64, plus an ulp per step.
    """

    def train(backend, dtype):
        flat = (
            torch.randn(1003, generator=torch.Generator().manual_seed(0))
            .to(device, dtype)
            .requires_grad_()
        )
        optimizer = ShardedOptimizer(
            [{"params": [flat], "kind": "adamw"}],
            lr=0.01,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.1,
            momentum=0.95,
            adamw=backend,
        )
        for step in range(20):
            flat.grad = torch.randn(1003, generator=torch.Generator().manual_seed(step + 1)).to(
                device, dtype
            )
            optimizer.step()
        assert optimizer.state[flat]["step"] == 20
        return [flat.detach(), *(optimizer.state[flat][slot] for slot in ("exp_avg", "exp_avg_sq"))]

    try:
        backend = (
            adamw_multi_tensor(multi_tensor_adam)
            if name == "reference"
            else adamw_backend(name, torch.device(device))
        )
    except InputError as error:
        pytest.skip(str(error))
    exact = train(adamw_torch, torch.float64)
    theirs = train(adamw_torch, torch.float32)
    ours = train(backend, torch.float32)
    for got, same_dtype, expected in zip(ours, theirs, exact, strict=True):
        budget = (
            2 * (same_dtype - expected).abs().max()
            + 20 * torch.finfo(torch.float32).eps * expected.abs().max()
        )
        assert (got - expected).abs().max() <= budget


def test_missing_adamw_backend_is_rejected_in_one_line(monkeypatch):
    """On PyPI, `apex` is another package, which has no amp_C."""
    monkeypatch.setitem(sys.modules, "amp_C", None)
    for name, device, message in [
        ("apex", "cpu", "optim.adamw=apex needs a GPU: set optim.adamw=torch"),
        ("apex", "cuda", "optim.adamw=apex needs NVIDIA apex with CUDA extensions"),
    ]:
        with pytest.raises(InputError) as raised:
            adamw_backend(name, torch.device(device))
        assert message in str(raised.value) and "\n" not in str(raised.value)


def test_config_with_the_removed_backend_is_read():
    """Checkpoints of earlier versions, which have it, still resume."""
    assert OptimSection(adamw="deepspeed") == OptimSection()


@pytest.mark.parametrize(
    "shape, layers",
    [
        (GeneratorConfig(width=64, num_heads=2, num_blocks=2), ("generator.blocks.",)),
        (
            GeneratorConfig(
                kind="single_stream", width=64, num_heads=2, num_blocks=2, num_refiner_blocks=1
            ),
            ("generator.blocks.", "generator.latent_refiners.", "generator.condition_refiners."),
        ),
    ],
    ids=["FLUX", "Z-Image"],
)
def test_muon_takes_the_matrices_of_layers_only(shape, layers):
    """Includes the query adapter, except its queries, which are an embedding.

    Excludes modulations and the generator's input and output layers.
    """
    config = AdapterConfig(num_queries=4, head_dim=32, connector_layers=1)
    model = nn.ModuleDict(
        {
            "generator": empty_generator(shape, device="meta"),
            "adapter": QueryAdapter(config, 64),
            "connector": Connector(config, 64),
        }
    )
    names = {id(p): name for name, p in model.named_parameters()}
    adamw, muon = (
        {names[id(p)] for p in group["params"]}
        for group in make_optimizer(model, OptimSection(kind="muon")).param_groups
    )
    places = (*layers, "adapter.", "connector.blocks.")
    assert muon == {
        name
        for name, p in model.named_parameters()
        if p.ndim == 2
        and name.startswith(places)
        and "modulation" not in name
        and name != "adapter.queries_QD"
    }
    assert {"adapter.to_q.weight", "adapter.mlp_out.weight", "connector.blocks.0.qkv.weight"} < muon
    assert {f"generator.{end}.weight" for end in ("latents_in", "condition_in", "final")} | {
        "adapter.queries_QD"
    } < adamw
    assert all(any(name.startswith(place) for name in muon) for place in places) and len(
        muon
    ) + len(adamw) == len(names)
    assert len(make_optimizer(model, OptimSection()).param_groups) == 1


def test_work_is_spread_evenly():
    assert spread([5, 1, 1, 1, 1, 1], 2) == [0, 1, 1, 1, 1, 1]
    assert sorted(spread([1] * 8, 4)) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_learning_rate_schedules():
    config = OptimSection(lr=1.0, warmup_steps=4)
    assert [learning_rate(s, config, 20) for s in range(6)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    )
    cosine = OptimSection(lr=1.0, warmup_steps=0, schedule="cosine")
    assert [learning_rate(s, cosine, 4) for s in range(5)] == pytest.approx(
        [1.0, 0.8535534, 0.5, 0.1464466, 0.0]
    )
