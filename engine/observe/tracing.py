"""Where the time goes: a window of steps for Nsight Systems or for torch's profiler.

The code names its parts with torch's record_function: data, vae, vit, prefix, adapter, suffix, connector, generator,
backward, optimizer, ema, checkpoint. Outside a window these cost about 2 us each; inside they are ranges of the trace.
"""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from iomm.config import InputError


class Window:
    """Traces num_steps steps from start_step on, counted from 1 over the whole run. Call `before(step)` and `after(step)`.

    tool "nsys": cudaProfilerApi window with NVTX ranges, for nsys profile --capture-range=cudaProfilerApi. "torch": Chrome
    trace and memory by operator into run.dir/traces, on CPU too, and on a GPU a memory snapshot. "none": nothing.
    """

    def __init__(self, tool, start_step, num_steps, run_dir, ranks):
        if tool == "nsys" and ranks.device.type != "cuda":
            raise InputError("--profile nsys needs a GPU; --profile torch works without one")
        self.tool, self.first, self.last = tool, start_step, start_step + num_steps - 1
        self.dir, self.ranks = Path(run_dir) / "traces", ranks
        self.open = None

    def before(self, step):
        if self.tool == "none" or step != self.first:
            return
        cuda = self.ranks.device.type == "cuda"
        if self.tool == "nsys":
            torch.cuda.synchronize()
            self.open = torch.autograd.profiler.emit_nvtx()
            self.open.__enter__()
            torch.cuda.profiler.start()
            return
        if cuda:
            torch.cuda.memory._record_memory_history(max_entries=200_000, stacks="python")
        self.open = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])],
            profile_memory=True,
        )
        self.open.__enter__()

    def after(self, step):
        if self.open is None or step != self.last:
            return
        if self.tool == "nsys":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        self.open.__exit__(None, None, None)
        if self.tool == "torch":
            self.write()
        self.open = None

    def write(self):
        """Never stops the run: a full disk costs the trace."""
        name = f"rank{self.ranks.rank}-steps-{self.first}-{self.last}"
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.open.export_chrome_trace(str(self.dir / f"{name}.json.gz"))
            order = (
                "self_cuda_memory_usage"
                if self.ranks.device.type == "cuda"
                else "self_cpu_memory_usage"
            )
            table = self.open.key_averages().table(
                sort_by=order, row_limit=60, max_name_column_width=70
            )
            (self.dir / f"{name}-memory.txt").write_text(table)
            if self.ranks.device.type == "cuda":
                torch.cuda.memory._dump_snapshot(str(self.dir / f"{name}-memory.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)
            if self.ranks.first:
                print(
                    f"trace       {self.dir / name}.json.gz (chrome://tracing or ui.perfetto.dev)",
                    flush=True,
                )
        except OSError as error:
            print(f"no trace written: {error}", flush=True)
