"""A rank of tests/engine/parallel/test_zero.py.

    RANK=... WORLD_SIZE=... MASTER_ADDR=... MASTER_PORT=... python zero_ranks.py FOLDER

Trains a small model at every ZeRO stage, injects non-finite values into steps, and converts
checkpoints. Writes FOLDER/<size>-rank<r>.json and checkpoints FOLDER/<size>/<run>/step-..., and
waits for the checkpoints of the other world size.
"""

import gc
import hashlib
import json
import math
import os
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from iomm.engine import state as run_state
from iomm.engine.config import parse
from iomm.engine.data.bad_samples import BadSamples
from iomm.engine.parallel import ranks as group
from iomm.engine.parallel import zero
from iomm.engine.parallel.ema import Ema
from iomm.engine.parallel.optim import make_optimizer
from iomm.engine.resilience import checkpoint_writer
from iomm.engine.resilience.loss_guard import LossGuard
from iomm.layers import FusedLinear

BATCH, STEPS, STAGES = 8, 4, (0, 1, 2, 3)
# adamw has two or more micro-batches and clips. muon has one or two and does not clip, therefore
# only sums over ranks can round.
KINDS = {
    "adamw": (2, ["optim.clip=0.05", "optim.weight_decay=0.1"]),
    "muon": (4, ["optim.kind=muon", "optim.clip=0"]),
}
CUT = ["adamw-bf16-3-cut", "muon-fp32-3-cut"]
# These cover both kinds of moments, and all optimizer classes of DeepSpeed and ours.
CONVERTED = ("muon-fp32", "adamw-bf16")


@contextmanager
def several_masters():
    """Make stage 3 use several masters per group, as above a billion values per rank."""
    real = zero.deepspeed_config

    def small_sub_groups(*args):
        config = real(*args)
        config["zero_optimization"]["sub_group_size"] = 40
        return config

    zero.deepspeed_config = small_sub_groups
    try:
        yield
    finally:
        zero.deepspeed_config = real


class Block(nn.Module):
    """A block with odd sizes.

    The pieces of stages 1 and 2 start anywhere, and those of stage 3 are padded.
    """

    def __init__(self):
        super().__init__()
        self.fused = FusedLinear(7, (5, 8))
        self.back = nn.Linear(13, 7)

    def forward(self, x):
        return x + self.back(torch.tanh(self.fused(x)))


class Model(nn.Module):
    """A model whose first parameter never has a gradient."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.empty(3))
        self.enter = nn.Linear(3, 7)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.leave = nn.Linear(7, 1)
        for i, p in enumerate(self.parameters()):
            p.data = (
                torch.sin(torch.arange(p.numel(), dtype=torch.float32) * 0.7 + i).view(p.shape)
                * 0.4
            )

    def forward(self, x):
        dtype, x = self.enter.weight.dtype, self.enter(x.to(self.enter.weight.dtype))
        assert x.dtype == dtype
        for block in self.blocks:
            x = block(x)
        return self.leave(x).float()


def samples(step, start, number):
    """Return the inputs (number, 3) and targets (number, 1) of one step."""
    n = torch.arange(start, start + number, dtype=torch.float32)[:, None] + BATCH * step
    return torch.sin(n * torch.tensor([0.37, 0.11, 0.77])), torch.cos(n * 0.23)


def loss_of(model, step, start, number):
    x, y = samples(step, start, number)
    return (model(x) - y).square().mean()


class Run:
    """One model at one stage, as engine/loop.py sees it."""

    def __init__(self, name, ranks, *overrides):
        kind, precision, stage = name.split("-")[:3]
        self.micro, settings = KINDS[kind]
        self.config = parse(
            "",
            overrides=[
                f"precision={precision}",
                f"zero.stage={stage}",
                "zero.reduce_precision=fp32",
                "optim.lr=0.02",
                "optim.warmup_steps=0",
                "ema.decay=0.5",
                "zero.param_persistence_threshold=20",
                f"train.global_batch={BATCH}",
                *settings,
                *overrides,
            ],
        )
        self.name, self.ranks, self.accumulation = name, ranks, BATCH // (self.micro * ranks.size)
        self.sharded = zero.Sharded(
            Model(),
            lambda module: make_optimizer(module, self.config.optim),
            config=self.config,
            ranks=ranks,
            leaves=(Block,),
            micro_batch=self.micro,
            accumulation=self.accumulation,
        )
        self.state = run_state.State(
            self.sharded,
            Ema(self.sharded.masters, 0.5),
            LossGuard(5),
            BadSamples(1.0, 9, None),
            ranks,
        )

    def step(self, factor=1.0, before_step=lambda: None):
        """Take one step, and return (loss, gradient norm, whether it was applied).

        The loss is the mean over all ranks. `factor` multiplies the last loss.
        """
        total = torch.zeros(())
        for i in range(self.accumulation):
            start = (i * self.ranks.size + self.ranks.rank) * self.micro
            loss = loss_of(self.sharded, self.state.step, start, self.micro)
            total += loss.detach() / self.accumulation / self.ranks.size
            self.sharded.backward(loss * (factor if self.sharded.last_micro_batch else 1.0))
            if self.sharded.last_micro_batch:
                before_step()
            applied = self.sharded.step()
        if applied:
            self.state.ema.update(self.state.step)
        self.state.step += 1
        dist.all_reduce(total)
        norm = self.sharded.grad_norm()
        return float(total), None if norm is None else float(norm), applied

    def digest(self):
        """Return a hash of this rank's masters, moments, average and unsharded working weights."""
        total = hashlib.sha256()
        for piece in self.state.tensors().values():
            total.update(piece.numpy().tobytes())
        for p in self.sharded.engine.module.parameters() if self.config.zero.stage < 3 else ():
            total.update(p.detach().float().numpy().tobytes())
        return total.hexdigest()

    def save(self, folder):
        saver = checkpoint_writer.Saver(folder, self.ranks, keep=99, background=False)
        run_state.save(self.state, self.config, saver)
        return str(saver.wait())

    def nonfinite_steps(self):
        """Return {place: (whether the step was applied, whether the state changed)} on this rank.

        Each place gets a non-finite value in one step. "nothing" is a good step after these.
        """

        def corrupt_gradient():
            self.sharded.layout.gradients()[0].view(-1)[0] = math.inf

        last, found = self.ranks.rank == self.ranks.size - 1, {}
        master, moment = self.sharded.masters[-1].detach(), self.sharded.slots()["exp_avg"][0]
        for place in ("loss", "gradient", "master", "moment", "nothing"):
            before, tensor = self.digest(), {"master": master, "moment": moment}.get(place)
            if tensor is not None and last:
                kept, tensor[3] = tensor[3].clone(), math.nan
            applied = self.step(
                math.nan if place == "loss" and last else 1.0,
                corrupt_gradient if place == "gradient" and last else lambda: None,
            )[2]
            if tensor is not None and last:
                tensor[3] = kept
            found[place] = applied, self.digest() != before
        return found


def baseline():
    """Train with PyTorch only, in fp32 on whole batches, and return [(loss, gradient norm)]."""
    model, rows = Model(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(STEPS):
        loss = loss_of(model, step, 0, BATCH)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        rows.append((loss.item(), norm.item()))
    return rows


def wait_for(path):
    until = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < until, f"no {path}: the job of the other world size failed"
        time.sleep(0.05)


def main(folder):
    torch.set_num_threads(1)
    ranks = group.start(120)
    # DeepSpeed collects garbage in every initialization of stage 3, which takes half a second.
    gc.freeze()
    folder, runs = Path(folder), {}
    report = {"runs": {}, "again": {}, "nonfinite": {}, "converted": []}
    mine, other = folder / str(ranks.size), folder / str(3 - ranks.size)
    names = [
        f"{kind}-{precision}-{stage}"
        for kind in KINDS
        for precision in ("fp32", "bf16")
        for stage in STAGES
    ]
    hpz = ["adamw-bf16-3-hpz"] if ranks.size == 2 else []
    for name in names + CUT + hpz:
        overrides = [f"zero.hpz_partition_size={ranks.size}"] if name in hpz else []
        with several_masters() if name in CUT else nullcontext():
            run = runs[name] = Run(name, ranks, *overrides)
        assert name not in CUT or len(run.sharded.masters) > len(run.sharded.optimizer.param_groups)
        rows = [run.step()[:2]]
        first = run.save(mine / name)
        rows += [run.step()[:2] for _ in range(STEPS - 1)]
        report["runs"][name], end = rows, run.digest()
        run.save(mine / name)
        report["nonfinite"][name] = run.nonfinite_steps()
        run_state.restore(run.state, first)
        again = [run.step()[:2] for _ in range(STEPS - 1)]
        report["again"][name] = again == rows[1:], run.digest() == end
    ranks.on_first(lambda: (mine / "done").touch())
    wait_for(other / "done")
    for name in names:
        # Every stage loads from every stage of the other world size, and from the next stage of its
        # own world size.
        sources = [(other, stage) for stage in STAGES] + [(mine, (int(name[-1]) + 1) % 4)]
        for world_size, stage in sources if name.startswith(CONVERTED) else ():
            source = world_size / f"{name[:-1]}{stage}" / f"step-{STEPS:08d}"
            run_state.restore(runs[name].state, source)
            saved = runs[name].save(
                folder / f"converted/{name}-{ranks.size}-from-{stage}-{world_size.name}"
            )
            report["converted"].append((str(source), saved, runs[name].step()[0]))
    report["baseline"] = baseline()
    (folder / f"{ranks.size}-rank{ranks.rank}.json").write_text(json.dumps(report))
    group.stop()


if __name__ == "__main__":
    main(sys.argv[1])
    # DeepSpeed's engines take seconds to be destroyed.
    os._exit(0)
