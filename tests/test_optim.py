"""Muon over flat shards: torch.optim.Muon's numbers on one rank, the same on two, AdamW beside it."""

import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from iomm.engine.config import OptimSection
from iomm.engine.optim import Piece, ShardedOptimizer, learning_rate, make_optimizer, spread

SHAPES = [(12, 20), (20, 12), (7, 5), (16, 16), (30, 8)]


def flat_shards(tensors, rank, size):
    """Pads and cuts as ZeRO-3 does -> this rank's flat shard and its pieces."""
    cuts, pieces, offset = [], [], 0
    for tensor in tensors:
        numel = -(-tensor.numel() // size)
        padded = torch.nn.functional.pad(tensor.flatten(), (0, numel * size - tensor.numel()))
        cuts.append(padded[rank * numel:(rank + 1) * numel])
        pieces.append(Piece(shape=tuple(tensor.shape), parts=(tensor.shape[0],), offset=offset, numel=numel))
        offset += numel
    return torch.cat(cuts), pieces


def draw(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def run_muon(rank, size, steps=4):
    flat, pieces = flat_shards(draw(0), rank, size)
    flat.requires_grad_()
    optimizer = ShardedOptimizer([{"params": [flat], "kind": "muon"}], lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
                                 momentum=0.95)
    optimizer.bind({flat: pieces}, rank, size)
    for step in range(1, steps + 1):
        flat.grad = flat_shards(draw(step), rank, size)[0]
        optimizer.step()
    return flat.detach(), pieces


def whole(flats, pieces):
    return [torch.cat([flat[p.offset:p.offset + p.numel] for flat in flats])[:math.prod(p.shape)].view(p.shape) for p in pieces]


def test_one_rank_is_torchs_muon():
    ours = whole([run_muon(0, 1)[0]], run_muon(0, 1)[1])
    theirs = [torch.nn.Parameter(t) for t in draw(0)]
    optimizer = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")
    for step in range(1, 5):
        for p, grad in zip(theirs, draw(step)):
            p.grad = grad
        optimizer.step()
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() <= 1e-6


def worker(rank, size, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    torch.save(run_muon(rank, size)[0], f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_more_ranks_do_the_same(size, tmp_path):
    import socket
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, (size, port, str(tmp_path)), nprocs=size)
    flats = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(size)]
    ours = whole(flats, flat_shards(draw(0), 0, size)[1])
    for a, b in zip(ours, whole([run_muon(0, 1)[0]], run_muon(0, 1)[1])):
        assert torch.equal(a, b)


def test_fused_matrices_are_orthogonalised_apart():
    tall = torch.randn(24, 10, generator=torch.Generator().manual_seed(0))

    def run(tensors, parts):
        flat, pieces = flat_shards(tensors, 0, 1)
        flat, grad = torch.zeros_like(flat).requires_grad_(), flat
        optimizer = ShardedOptimizer([{"params": [flat], "kind": "muon"}], lr=1.0, betas=(0.9, 0.95), eps=1e-8,
                                     weight_decay=0.0, momentum=0.0)
        pieces = [Piece(shape=p.shape, parts=parts or p.parts, offset=p.offset, numel=p.numel) for p in pieces]
        optimizer.bind({flat: pieces}, 0, 1)
        flat.grad = grad
        optimizer.step()
        return flat.detach()
    assert torch.equal(run([tall], (8, 16)), run([tall[:8], tall[8:]], None))


def test_adamw_shards_are_torchs_adamw():
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


def test_muon_takes_matrices_of_blocks_only():
    from iomm.config import GeneratorConfig
    from iomm.generator import empty_generator
    model = empty_generator(GeneratorConfig(width=64, num_heads=2, num_blocks=2), device="meta")
    names = {id(p): name for name, p in model.named_parameters()}
    adamw, muon = make_optimizer(model, OptimSection(kind="muon")).param_groups
    assert all(p.ndim == 2 and names[id(p)].startswith("blocks.") for p in muon["params"])
    assert {"latents_in.weight", "condition_in.weight", "final.weight", "blocks.0.latent_stream.modulation.weight",
            "blocks.0.latent_stream.qkv.bias"} <= {names[id(p)] for p in adamw["params"]}
    assert len(muon["params"]) + len(adamw["params"]) == len(names)
    assert len(make_optimizer(model, OptimSection()).param_groups) == 1


def test_work_is_spread_evenly_and_alike():
    assert spread([5, 1, 1, 1, 1, 1], 2) == [0, 1, 1, 1, 1, 1]
    assert sorted(spread([1] * 8, 4)) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_schedules():
    config = OptimSection(lr=1.0, warmup_steps=4)
    assert [learning_rate(s, config, 20) for s in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    cosine = OptimSection(lr=1.0, warmup_steps=0, schedule="cosine")
    assert [learning_rate(s, cosine, 4) for s in range(5)] == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466, 0.0])
