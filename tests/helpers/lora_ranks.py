"""A rank of tests/engine/parallel/test_lora_ranks.py.

    RANK=... WORLD_SIZE=... MASTER_ADDR=... MASTER_PORT=...
        python lora_ranks.py FOLDER NAME,NAME,... SETTING ...

Trains LoRA in the ways of these names, each as engine/loop.py does, and writes
FOLDER/<size>-rank<r>.json.
"""

import gc
import hashlib
import json
import os
import sys
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

from iomm import lora
from iomm.engine import builders, launch, loop
from iomm.engine import state as run_state
from iomm.engine.config import load_config
from iomm.engine.parallel import ranks as group
from iomm.engine.resilience import checkpoint_writer
from iomm.generator import blocks_of

STEPS = 3
RECOMPUTED = ["train.recompute=99", "lora.dropout=0.1"]
SHARDED = ["lora.shard_base=true"]
# {name: settings}. Runs whose names begin with the same word compute the same.
RUNS = {
    **{f"plain-stage-{stage}": [f"zero.stage={stage}"] for stage in range(4)},
    "dropout-stage-3": ["zero.stage=3", "lora.dropout=0.1"],
    "dropout-stage-3-recomputed": ["zero.stage=3", *RECOMPUTED],
    "dropout-stage-3-compiled-recomputed": ["zero.stage=3", *RECOMPUTED, "train.compile=true"],
    "plain-stage-2-sharded": ["zero.stage=2", *SHARDED],
    "dropout-stage-3-recomputed-sharded": ["zero.stage=3", *RECOMPUTED, *SHARDED],
    "dropout-stage-3-compiled-recomputed-sharded": [
        "zero.stage=3",
        *RECOMPUTED,
        *SHARDED,
        "train.compile=true",
    ],
    "muon-stage-0": ["zero.stage=0", "optim.kind=muon"],
    "muon-stage-3": ["zero.stage=3", "optim.kind=muon"],
    # Plain PyTorch on each rank.
    "bf16-stage-0": ["zero.stage=0", "precision=bf16", "lora.dropout=0.1"],
    "bf16-stage-3": ["zero.stage=3", "precision=bf16", *RECOMPUTED],
    "bf16-stage-3-sharded": ["zero.stage=3", "precision=bf16", *RECOMPUTED, *SHARDED],
}


def train(state, source, num):
    """Take steps, and return [(mean loss of all ranks, gradient norm)]."""
    source.start_step = state.step
    batches, found = iter(source), []
    for _ in range(num):
        result = loop.train_step(state.sharded, islice(batches, source.accumulation_steps))
        assert result.applied
        state.ema.update(state.step)
        state.step += 1
        loss = result.loss / state.ranks.size
        dist.all_reduce(loss)
        found.append((loss.item(), float(state.sharded.grad_norm())))
    return found


def digest(state):
    total = hashlib.sha256()
    for piece in state.tensors().values():
        total.update(piece.numpy().tobytes())
    return total.hexdigest()


def base_bytes(module, shards):
    """Return the bytes of the blocks' base that this rank keeps, and those of its gathered ones."""
    if shards is not None:
        blocks = shards.blocks
        return sum(len(b.part) for b in blocks), sum(b.storage.nbytes() for b in blocks)
    blocks = blocks_of(module.generator)
    return sum(w.nbytes for b in blocks for w in lora.frozen_weights(b).values()), 0


def recorded_shards():
    """Keep what builders.base_shards returns, and count the bytes of its gathers."""
    made, sent = [], []
    make, gather = builders.base_shards, dist.all_gather_into_tensor

    def counting(whole, part, group=None, **settings):
        sent.append(whole.nbytes - part.nbytes)
        return gather(whole, part, group=group, **settings)

    builders.base_shards = lambda *args: made.append(make(*args)) or made[-1]
    dist.all_gather_into_tensor = counting
    return made, sent


def main(folder, names, *settings):
    torch.set_num_threads(1)
    ranks = group.start(120)
    gc.freeze()
    compiled = torch.compile
    # Inductor would take a minute.
    torch.compile = lambda f, **kwargs: compiled(f, **{**kwargs, "backend": "aot_eager"})
    made, sent = recorded_shards()
    report = {}
    for name in names.split(","):
        torch._dynamo.reset()
        run_dir = Path(folder) / f"{ranks.size}" / name
        config = load_config(
            "tests/helpers/pixels.yaml", [*settings, f"run.dir={run_dir}", *RUNS[name]]
        )
        state, source, _ = launch.build(config, ranks)
        module, shards = state.sharded.engine.module, made[-1]
        gather = None if shards is None else shards.gather
        checksum = lora.checksum(module, gather=gather)
        first = train(state, source, 1)
        saver = checkpoint_writer.Saver(run_dir / "checkpoints", ranks, keep=9, background=False)
        run_state.save(state, config, saver)
        folder_1 = saver.wait()
        sent.clear()
        rest, end = train(state, source, STEPS - 1), digest(state)
        received_bytes = sum(sent) / (STEPS - 1)
        run_state.restore(state, folder_1)
        again = train(state, source, STEPS - 1)
        print(f"{name}: done", flush=True)
        report[name] = {
            "rows": first + rest,
            "end": end,
            "received_bytes": received_bytes,
            "base_bytes": base_bytes(module, shards),
            "resumed": again == rest and digest(state) == end,
            "shapes": state.sharded.shapes,
            "masters": sum(master.numel() for master in state.sharded.masters),
            "base": state.base,
            "base_kept": lora.checksum(module, gather=gather) == checksum == state.base["checksum"],
            "base_dtypes": sorted({str(w.dtype) for w in lora.frozen_weights(module).values()}),
        }
    (Path(folder) / f"{ranks.size}-rank{ranks.rank}.json").write_text(json.dumps(report))
    group.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
    # DeepSpeed's engines take seconds to be destroyed.
    os._exit(0)
