"""Profile a window of steps with Nsight Systems or torch's profiler.

The code names its parts with torch's record_function: data, vae, vit, prefix, adapter, suffix,
connector, generator, backward, optimizer, ema, checkpoint. In the window they are ranges of the
trace; outside it each costs about 2 us.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

from iomm.config import InputError

if TYPE_CHECKING:
    from iomm.engine.parallel.ranks import Ranks

logger = logging.getLogger("iomm")


class Window:
    """Traces num_steps steps from start_step on, counted from 1 over the whole run.

    Call before(step) and after(step) around each step. The tools are

    nsys   a cudaProfilerApi window with NVTX ranges, for nsys profile
           --capture-range=cudaProfilerApi
    torch  a Chrome trace and memory by operator in run.dir/traces, also on a CPU; on a GPU a memory
           snapshot as well
    none   no trace
    """

    def __init__(
        self, tool: str, start_step: int, num_steps: int, run_dir: str | Path, ranks: Ranks
    ) -> None:
        """Raise InputError for nsys without a GPU."""
        if tool == "nsys" and ranks.device.type != "cuda":
            raise InputError("--profile nsys needs a GPU; --profile torch works without one")
        self.tool, self.first, self.last = tool, start_step, start_step + num_steps - 1
        self.dir, self.ranks = Path(run_dir) / "traces", ranks
        self.open = None

    def before(self, step: int) -> None:
        """Start the trace if this is the first step of the window."""
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

    def after(self, step: int) -> None:
        """Stop the trace and write it if this is the last step of the window."""
        if self.open is None or step != self.last:
            return
        if self.tool == "nsys":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        self.open.__exit__(None, None, None)
        if self.tool == "torch":
            self.write()
        self.open = None

    def write(self) -> None:
        """Write the files of torch's profiler. A full disk costs the trace, not the run."""
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
                logger.info(
                    f"trace       {self.dir / name}.json.gz (chrome://tracing or ui.perfetto.dev)"
                )
        except OSError as error:
            logger.warning(f"the trace cannot be written: {error}; training continues")
