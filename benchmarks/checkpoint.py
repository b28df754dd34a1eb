"""What saving costs: python benchmarks/checkpoint.py [--parameters 5.5e6] [--step-s 0.65] [--saves 10]

One rank with masters, two moments and an average in fp32 saves in the background while this thread multiplies matrices in
steps of step-s; measured are the wait of save() itself, the slowing of the steps meanwhile, the time to the commit, the size,
and the time to verify and read everything back. Writes benchmarks/results/checkpoint-<device>-<date>.json.
"""

from pathlib import Path

from iomm.checkout import enter

ROOT = enter(__file__)

import argparse
import json
import os
import statistics
import tempfile
import time

import torch

from benchmarks.report import above_0
from iomm.engine.observe.doctor import machine
from iomm.engine.resilience import checkpoint_reader, checkpoint_writer
from iomm.engine.resilience.checkpoint_interval import plan


class Alone:
    """The only rank."""

    rank, size, first = 0, 1, True

    def on_first(self, work):
        return work()

    def all(self, value):
        return [value]


def step(seconds, device):
    """Work for about `seconds` -> how long a fixed piece of it took."""
    a = torch.ones(512, 512, device=device)
    started, pieces = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        a = (a @ a).clamp_(0, 1)
        pieces += 1
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / pieces


def measure(folder, *, parameters, step_s, num_saves):
    """Figures of num_saves saves into folder, the first left out of the medians, and what engine/resilience/checkpoint_interval.py makes of them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    state = {
        f"{slot}/w": torch.randn(int(parameters), device=device)
        for slot in ("master", "exp_avg", "exp_avg_sq", "ema")
    }
    facts = {"shapes": {"w": [int(parameters)]}, "config": "", "ema": True}
    quiet = statistics.median(step(step_s, device) for _ in range(5))
    stalls, writes, slow = [], [], []
    saver = checkpoint_writer.Saver(Path(folder) / "checkpoints", Alone(), keep=2)
    for i in range(num_saves + 1):
        saver.save(i, state, facts)
        slow.append(step(step_s, device))
        saver.wait()
        stalls.append(saver.stall_s)
        writes.append(saver.write_s)
    started = time.perf_counter()
    assert checkpoint_reader.damage(saver.folder) is None
    verified = time.perf_counter()
    reader = checkpoint_reader.Reader(saver.folder)
    assert all(torch.equal(reader.full(*key.split("/")), t.cpu()) for key, t in state.items())
    read = time.perf_counter()
    stall, write = statistics.median(stalls[1:]), statistics.median(writes[1:])
    return {
        "parameters": int(parameters),
        "bytes": saver.bytes,
        "saves": num_saves,
        "first_stall_s": stalls[0],
        "stall_s": stall,
        "stall_share_of_a_step": stall / step_s,
        "slowing_of_steps_meanwhile": statistics.median(slow[1:]) / quiet - 1,
        "commit_s": write,
        "verify_s": verified - started,
        "read_s": read - verified,
        "planned": {
            str(n): vars(plan(num_gpus=n, stall_s=stall, write_s=write, mtbf_gpu_hours=20_000))
            for n in (8, 64, 256)
        },
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=above_0(float), default=5.5e6)
    parser.add_argument("--step-s", type=above_0(float), default=0.65)
    parser.add_argument("--saves", type=above_0(int), default=10)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        figures = measure(
            folder, parameters=args.parameters, step_s=args.step_s, num_saves=args.saves
        )
    facts = machine()
    result = {"machine": facts | {"load": os.getloadavg()[0]}, **figures}
    path = (
        ROOT
        / f"benchmarks/results/checkpoint-{'cuda' if facts['gpu'] else 'cpu'}-{facts['date']}.json"
    )
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
