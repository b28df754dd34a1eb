"""A rank of tests/engine/parallel/test_base_shards.py.

    RANK=... WORLD_SIZE=3 MASTER_ADDR=... MASTER_PORT=... python base_shard_ranks.py FOLDER

Runs generators with LoRA whose base is sharded, and the same ones whole, and writes
FOLDER/rank<r>.json. Ranks 0 and 2 are on one host and rank 1 is on another.
"""

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from parity import randomize

from iomm import lora
from iomm.config import GeneratorConfig, LoraConfig
from iomm.engine.parallel import ranks as group
from iomm.engine.parallel.base_shards import BaseShards, ShardedBlock, base_gathers
from iomm.generator import blocks_of, new_generator
from iomm.model import IOMM, Recipe

HOSTS = ("a", "b", "a")
# Widths that leave the parts of a block uneven.
DUAL = GeneratorConfig(
    width=96, num_heads=3, num_blocks=3, num_single_blocks=2, token_dim=8, condition_dim=16
)
SINGLE = GeneratorConfig(
    kind="single_stream",
    width=96,
    num_heads=3,
    num_blocks=2,
    num_refiner_blocks=2,
    token_dim=12,
    condition_dim=20,
)
# Nothing before these layers is trained, so the first blocks have no backward pass.
LATE = ("transformer_blocks.2.attn.to_out.0", "layers.1.attention.to_out.0")
# {name: (shape, dtype, recomputed blocks, targets)}.
CASES = {
    "dual": (DUAL, torch.float32, 0, ()),
    "dual, recomputed": (DUAL, torch.bfloat16, 99, ()),
    "dual, late": (DUAL, torch.float32, 2, LATE[:1]),
    "single": (SINGLE, torch.float32, 0, ()),
    "single, recomputed": (SINGLE, torch.float32, 99, ()),
    "single, late": (SINGLE, torch.bfloat16, 0, LATE[1:]),
}


def with_lora(generator, targets, recompute):
    """Freeze a generator, and give it LoRA with random A and B."""
    model = IOMM(generator, None, None, None, Recipe())
    lora.freeze(model)
    lora.add_lora(generator, LoraConfig(rank=3, alpha=6.0, targets=targets), patch=2)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in generator.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * 0.1)
    model.prepare_blocks(recompute=recompute)
    return model.to(next(iter(generator.buffers())).dtype)


def losses_and_gradients(model, dtype, counts=None):
    """Return what a pass without gradient and two steps compute."""
    found = []
    for seed in range(2):
        if counts is not None:
            counts.clear()
        draw = torch.Generator().manual_seed(10 * dist.get_rank() + seed)
        config = model.generator.config
        shapes = (2, 12, config.token_dim), (2,), (2, 5, config.condition_dim)
        noisy, t, condition = (torch.rand(shape, generator=draw).to(dtype) for shape in shapes)
        if not seed:
            with torch.no_grad():
                found.append(model.generator(noisy, t, condition, (3, 4)))
        loss = model.generator(noisy, t, condition, (3, 4)).square().mean()
        loss.backward()
        found += [loss.detach(), *(p.grad for p in model.parameters())]
        model.zero_grad()
    return found


@contextmanager
def recorded(blocks):
    """Yield a list of (bytes of each gather, bytes of all gathered blocks at that moment)."""
    gather, sizes = dist.all_gather_into_tensor, []

    def recording(whole, part, **settings):
        sizes.append((whole.nbytes, sum(block.storage.nbytes() for block in blocks)))
        return gather(whole, part, **settings)

    dist.all_gather_into_tensor = recording
    try:
        yield sizes
    finally:
        dist.all_gather_into_tensor = gather


@contextmanager
def without_second_gather(shards):
    """Plant a fault: from its second gather on, a block gets memory but no values."""
    block, start, calls = shards.blocks[1], ShardedBlock.start, []

    def faulty(self):
        if self is block and not self.storage.nbytes():
            calls.append(1)
            if len(calls) > 1:
                self.storage.resize_(len(self.whole))
                self.whole.zero_()
                return
        start(self)

    ShardedBlock.start = faulty
    try:
        yield
    finally:
        ShardedBlock.start = start


def compare(ranks, shape, dtype, recompute, targets):
    """Return what a case gives, as plain values."""
    reference = randomize(new_generator(shape, 0, dtype=dtype))
    shards = BaseShards(ranks, 60)
    generator = shards.empty_generator(shape, dtype)
    with torch.no_grad():
        for name, p in generator.named_parameters():
            shards.copy(p, reference.get_parameter(name))
    model = with_lora(generator, targets, recompute)
    checksum = lora.checksum(model, gather=shards.gather)
    with recorded(shards.blocks) as sizes:
        found = losses_and_gradients(model, dtype, sizes)
    weights = [sum(p.nbytes for p in block.parameters()) for block in blocks_of(reference)]
    whole = with_lora(reference, targets, recompute)
    expected = losses_and_gradients(whole, dtype)
    with without_second_gather(shards):
        faulty = losses_and_gradients(model, dtype)
    return {
        "equal": same(found, expected),
        "faulty_equal": same(faulty, expected),
        "checksums": [checksum, lora.checksum(whole)],
        "gathers": base_gathers(model),
        # Of the second step.
        "gathered_bytes": [gathered for gathered, _ in sizes],
        "most_bytes": max(live for _, live in sizes),
        "parts": [len(block.part) for block in shards.blocks],
        "weights": weights,
        "ranks_of_nodes": shards.sizes,
    }


def same(found, expected):
    """Return whether each tensor is equal to the expected one to the bit."""
    # Two gradients may be None.
    return [a is b or torch.equal(a, b) for a, b in zip(found, expected, strict=True)]


def main(folder):
    torch.set_num_threads(1)
    ranks = group.start(60)
    group.host_identity = lambda: HOSTS[ranks.rank]
    report = {name: compare(ranks, *case) for name, case in CASES.items()}
    (Path(folder) / f"rank{ranks.rank}.json").write_text(json.dumps(report))
    group.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)
