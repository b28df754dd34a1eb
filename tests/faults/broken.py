"""A whole run of one rank that is watched, or killed in the midst of something.

    deepspeed broken.py PLACE RANK STEP <arguments of engine/launch.py>

PLACE "none" kills nothing. Else RANK ends by SIGKILL the first time that it comes to PLACE; to forward, backward and step in
step STEP of this start. Every rank appends [[run position, index entry], ...] of its micro-batches to run.dir/samples-rank<r>.jsonl,
and rank 0 prints a hash of the whole state after a load.
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
    place, rank, wanted = sys.argv[1], sys.argv[2], int(sys.argv[3])
    mine, now = os.environ.get("RANK", "0") == rank, {"step": 0}

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def breaks(owner, name, here, before=False, after_s=None):
        """Kills this rank where owner.name is called, or has been, if `here` is the place."""
        real = getattr(owner, name)

        def call(*args, **kwargs):
            due = (
                mine
                and place == here
                and (here not in ("forward", "backward", "step") or now["step"] == wanted)
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

    breaks(IOMM, "encode", "forward")
    breaks(zero.Sharded, "backward", "backward", after_s=0.02)
    breaks(ShardedOptimizer, "step", "step")
    breaks(checkpoint_reader.Reader, "piece", "load")
    # Before it is read back.
    breaks(checkpoint_writer, "write_safetensors", "save")
    breaks(cpp_builder, "run_compile_cmd", "build", after_s=0.3)
    breaks(decode.Decoder, "_pipeline", "data")
    breaks(workers._Worker, "take", "index")
    breaks(watchdog.dist, "TCPStore", "bind")
    # The store of the process group is bound, the others are waiting.
    breaks(dist, "new_group", "rendezvous")

    restore, train_step, batches = run_state.restore, loop.train_step, ImageSource.__iter__

    def restore_said(state, folder):
        from faults.toy_job import live_digest

        restore(state, folder)
        found = live_digest(state)
        if state.ranks.first:
            print(f"state {found} after loading {folder}", flush=True)

    def step_counted(*args, **kwargs):
        now["step"] += 1
        return train_step(*args, **kwargs)

    def batches_recorded(self):
        for batch in batches(self):
            with open(os.path.join(now["run_dir"], f"samples-rank{self.rank}.jsonl"), "a") as file:
                print(json.dumps(list(zip(batch.n_B.tolist(), batch.entry_B.tolist()))), file=file)
            yield batch

    now["run_dir"] = next(a.partition("=")[2] for a in sys.argv if a.startswith("run.dir="))
    run_state.restore, loop.train_step, ImageSource.__iter__ = (
        restore_said,
        step_counted,
        batches_recorded,
    )
    return launch.main(sys.argv[4:])


if __name__ == "__main__":
    # The launcher adds --local_rank in front.
    sys.argv = [sys.argv[0], *(a for a in sys.argv[1:] if not a.startswith("--local_rank"))]
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    os.environ["IOMM_PARENT"] = str(os.getppid())
    sys.exit(main())
