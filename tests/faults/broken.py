"""Run engine/launch.py and kill one rank at a given place.

    deepspeed broken.py PLACE RANK STEP <arguments of engine/launch.py>

With PLACE "none", nothing is killed. Otherwise RANK ends by SIGKILL the first time that it reaches
PLACE; for the places forward, backward and step, in step STEP of this start. Every rank appends
[[run position, index entry], ...] of its micro-batches to run.dir/samples-rank<r>.jsonl, and rank 0
prints a hash of the whole state after a load.
"""

import json
import os
import signal
import sys
import threading

import torch.distributed as dist
from torch._inductor import cpp_builder

from iomm.engine import launch, loop
from iomm.engine import state as run_state
from iomm.engine.data import decode, workers
from iomm.engine.data.source import ImageSource
from iomm.engine.parallel import zero
from iomm.engine.parallel.optim import ShardedOptimizer
from iomm.engine.resilience import checkpoint_reader, checkpoint_writer, watchdog
from iomm.model import IOMM


def main():
    place, rank, kill_step = sys.argv[1], sys.argv[2], int(sys.argv[3])
    mine, now = os.environ.get("RANK", "0") == rank, {"step": 0}

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_at(owner, name, here, before=False, after_s=None):
        """Kill this rank after, or before, a call of owner.name, if `here` is the place.

        With after_s, the kill follows that many seconds after the start of the call.
        """
        real = getattr(owner, name)

        def call(*args, **kwargs):
            due = (
                mine
                and place == here
                and (here not in ("forward", "backward", "step") or now["step"] == kill_step)
            )
            if due and after_s is not None:
                threading.Timer(after_s, die).start()
            elif due and before:
                die()
            result = real(*args, **kwargs)
            if due and after_s is None:
                die()
            return result

        setattr(owner, name, call)

    kill_at(IOMM, "encode", "forward")
    kill_at(zero.Sharded, "backward", "backward", after_s=0.02)
    kill_at(ShardedOptimizer, "step", "step")
    kill_at(checkpoint_reader.Reader, "piece", "load")
    # The file is written but not read back yet.
    kill_at(checkpoint_writer, "write_safetensors", "save")
    kill_at(cpp_builder, "run_compile_cmd", "build", after_s=0.3)
    kill_at(decode.Decoder, "_pipeline", "data")
    kill_at(workers._Worker, "take", "index")
    kill_at(watchdog.dist, "TCPStore", "bind")
    # The store of the process group is bound, and the other ranks wait.
    kill_at(dist, "new_group", "rendezvous")

    restore, train_step, batches = run_state.restore, loop.train_step, ImageSource.__iter__

    def restore_and_print(state, folder):
        from faults.toy_job import live_digest

        restore(state, folder)
        found = live_digest(state)
        if state.ranks.first:
            print(f"state {found} after loading {folder}", flush=True)

    def count_steps(*args, **kwargs):
        now["step"] += 1
        return train_step(*args, **kwargs)

    def record_batches(self):
        for batch in batches(self):
            samples = list(zip(batch.n_B.tolist(), batch.entry_B.tolist(), strict=True))
            with open(os.path.join(now["run_dir"], f"samples-rank{self.rank}.jsonl"), "a") as file:
                print(json.dumps(samples), file=file)
            yield batch

    now["run_dir"] = next(a.partition("=")[2] for a in sys.argv if a.startswith("run.dir="))
    run_state.restore = restore_and_print
    loop.train_step = count_steps
    ImageSource.__iter__ = record_batches
    return launch.main(sys.argv[4:])


if __name__ == "__main__":
    # The launcher inserts --local_rank before the arguments.
    sys.argv = [sys.argv[0], *(a for a in sys.argv[1:] if not a.startswith("--local_rank"))]
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    os.environ["IOMM_PARENT"] = str(os.getppid())
    sys.exit(main())
