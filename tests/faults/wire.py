"""Measure the bytes that ranks send over the network in training steps.

    python tests/faults/wire.py FACTS     one rank on each host (faults.hosts.wire runs it)

Each rank runs steps of the demo's generator at every ZeRO stage, and writes what its interface has
sent and what traffic.py counts.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path

from iomm.checkout import enter

ROOT = enter(__file__)
sys.path[1:1] = [str(ROOT / "tests"), str(ROOT / "tests/helpers")]

import torch
from namespaces import INTERFACE, enter_host

from benchmarks.lib.traffic import count_traffic
from iomm.engine import builders
from iomm.engine.config import load_config
from iomm.engine.parallel import ranks as group
from iomm.engine.parallel import zero
from iomm.engine.parallel.optim import make_optimizer
from iomm.engine.resilience.watchdog import Watchdog

ACCUMULATION, WARM_UP = 2, 3


def sent():
    """Return (bytes, packets) that this host has sent over its interface."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == INTERFACE:
            return int(counters.split()[8]), int(counters.split()[9])
    raise ValueError(f"no interface {INTERFACE}")


def measure(ranks, stage, overrides, steps):
    """Run steps at a ZeRO stage and return the figures of this rank."""
    config = load_config(
        str(ROOT / "tests/helpers/pixels.yaml"), [f"zero.stage={stage}", *overrides]
    )
    model = builders.build_model(config, ranks.device)
    counted = count_traffic(model, config, ranks.size)
    model.prepare_blocks()
    sharded = zero.Sharded(
        model,
        lambda module: make_optimizer(module, config.optim),
        config=config,
        ranks=ranks,
        leaves=model.leaves,
        micro_batch=1,
        accumulation=ACCUMULATION,
    )
    side = model.frozen[0].vit_px
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            ranks.all(None)
            time.sleep(0.5)
            before = sent()
        for _ in range(ACCUMULATION):
            loss, *_ = sharded(
                torch.rand(1, 3, 16, 16), torch.rand(1, 3, side, side), torch.tensor([ranks.rank])
            )
            sharded.backward(loss)
            sharded.step()
    # The last packets are on their way.
    time.sleep(0.5)
    after = sent()
    ranks.all(None)
    return {
        "stage": stage,
        "steps": steps,
        "bytes": after[0] - before[0],
        "packets": after[1] - before[1],
        "counted": counted.sent_bytes(ACCUMULATION, "gloo"),
    }


def rank_of(facts, rank):
    size = len(facts["hosts"])
    os.environ.update(
        RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(size), LOCAL_SIZE="1", MASTER_PORT="29500"
    )
    torch.set_num_threads(1)
    ranks = group.start(300)
    overrides, steps = facts["overrides"], facts["steps"]
    with Watchdog(ranks, facts["folder"], 0.0):
        found = [measure(ranks, stage, overrides, steps) for stage in facts["stages"]]
    Path(f"{facts['folder']}/{rank}.json").write_text(json.dumps(found))
    ranks.all(None)
    group.stop()


def main():
    facts, pids = json.loads(sys.argv[1]), []
    # Loaded once, before the ranks are forked.
    importlib.import_module("deepspeed")
    for rank, host in enumerate(facts["hosts"]):
        pid = enter_host(host)
        if pid == 0:
            code = 1
            try:
                rank_of(facts, rank)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in pids)


if __name__ == "__main__":
    sys.exit(main())
