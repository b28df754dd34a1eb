"""A published config at full size on the pretended device, in a dry run.

Ops on large tensors only allocate their outputs, so that a model of any size trains on a few
gigabytes of host memory. Shapes, devices, streams, host waits and the bytes that the device
holds are as with values; what the memory of CUDA's libraries and allocator takes is not seen.
"""

import json
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

COUNTS = Path(__file__).resolve().parents[2] / "benchmarks/lib/counts.json"
# Ops on floating-point tensors with more values only allocate their outputs. Integers and what is
# smaller are computed: lengths, offsets and masks decide about shapes.
DRY_NUMEL = 1 << 16
KEYS = (
    "model.mllm=random:internvl3-2b",
    "model.vae=random:flux",
    "data.shards=shapes",
    "data.heldout=0",
    "data.threads=1",
    "data.upscale=allow",
    "train.micro_batch=16",
    "train.threads=1",
    "train.steps=1000",
    "evaluate.every_steps=0",
    # A step takes minutes on a slow machine.
    "guard.hang_s=0",
)
GIB = 2**30


class Part(NamedTuple):
    """Bytes allocated before a named part of the step, at most inside it, and after it."""

    before: int
    peak: int
    after: int


class Recorder:
    """Records the bytes that are allocated by named part, and launches per micro-batch."""

    def __init__(self, *, compiled: bool) -> None:
        self.compiled = compiled
        # The last time that each part ran.
        self.parts: dict[str, Part] = {}
        # Allocated after the build, and with the optimizer's state.
        self.built = self.static = 0
        # Estimates of engine/dry_run.py by part, for the same run.
        self.plan: dict[str, float] = {}
        # Of each micro-batch: calls of ops on the device, launches of compiled kernels, and graphs
        # of torch.compile so far.
        self.calls: list[dict[str, int]] = []
        self.launches: list[dict[str, int]] = []
        self.graphs: list[int] = []
        self.step_peak = 0
        # The most seen in each part that is running, outermost first.
        self.running: list[int] = []

    def install(self) -> None:
        """Start the dry run of this process and the recording, before the engine is started."""
        import pretended_cuda

        from iomm import profiling
        from iomm.engine import builders, dry_run

        self.device = pretended_cuda.DEVICE
        self.device.run_dry_above(DRY_NUMEL, True)
        self.kernels = None
        if self.compiled:
            import pretended_inductor

            self.kernels = pretended_inductor.install()
        # Weights are shapes as well: drawing those of IOMM-XL would take minutes.
        builders.assemble = partial(builders.assemble, fresh=False)
        profiling.record_function = self.part
        plan = dry_run.memory

        def keep_plan(*args):
            self.plan = plan(*args)
            return self.plan

        dry_run.memory = keep_plan

    def reset_peak(self) -> None:
        """Give the peak so far to the step and to all parts that are running."""
        peak = self.device.peak()
        self.device.peak(True)
        self.step_peak = max(self.step_peak, peak)
        self.running = [max(seen, peak) for seen in self.running]

    @contextmanager
    def part(self, name: str):
        """Take the place of torch's record_function."""
        self.reset_peak()
        before = self.device.allocated()
        self.running.append(before)
        try:
            yield
        finally:
            self.reset_peak()
            self.parts[name] = Part(before, self.running.pop(), self.device.allocated())

    def start_step(self, sharded) -> None:
        """Start to record a step, in which the optimizer's state exists as in all later ones."""
        self.built = self.built or self.device.allocated()
        sharded.slots()
        self.static = self.device.allocated()
        self.calls.clear()
        self.reset_peak()
        self.step_peak = 0

    def start_micro_batch(self) -> None:
        self.device.take_calls()
        if self.kernels is not None:
            self.kernels.launches.clear()

    def end_micro_batch(self) -> None:
        from torch._dynamo.utils import counters

        self.calls.append(dict(sorted(self.device.take_calls().items())))
        if self.kernels is not None:
            self.launches.append(dict(self.kernels.launches))
            self.graphs.append(counters["stats"]["unique_graphs"])

    def report(self) -> dict:
        """Return what was seen in the last step, as plain values."""
        self.reset_peak()
        return {
            "peak": self.step_peak,
            "built": self.built,
            "static": self.static,
            "parts": {name: part._asdict() for name, part in self.parts.items()},
            "plan": {name: round(number) for name, number in self.plan.items()},
            "calls": self.calls,
            "launches": self.launches,
            "graphs": self.graphs,
            "stacks": self.kernels.stacks if self.kernels is not None else {},
        }


def counts(seen: dict) -> dict:
    """Return what benchmarks/lib/counts.json records of a report.

    Bytes of the device, calls of ops per micro-batch by name, and of torch.compile the kernels,
    those that spill registers, their launches per micro-batch, and the graphs.
    """
    parts = seen["parts"]
    found = {
        "bytes": {
            "static": seen["static"],
            "vae workspace": parts["vae"]["peak"] - parts["vae"]["before"],
            "kept for the backward pass": parts["backward"]["before"] - seen["static"],
            "peak": seen["peak"],
        },
        # Of the last micro-batch: the first one compiles.
        "calls": seen["calls"][-1],
    }
    if seen["stacks"]:
        found["compiled"] = {
            "kernels": len(seen["stacks"]),
            # Of a kernel's configs, the GPU chooses the fastest.
            "spilling kernels": sum(min(stacks) > 0 for stacks in seen["stacks"].values()),
            "launches": sum(seen["launches"][-1].values()),
            "graphs": seen["graphs"][-1],
        }
    return found


def record(versions: dict[str, str], found: dict[str, dict]) -> None:
    """Write {case: counts} to benchmarks/lib/counts.json, with the versions they belong to."""
    everything = json.loads(COUNTS.read_text())
    section = everything.get("full size", {})
    if section.get("versions") != versions:
        section = {}
    everything["full size"] = {**section, "versions": versions, **found}
    COUNTS.write_text(json.dumps(everything, indent=1) + "\n")


def keep_frozen_inputs() -> None:
    """Plant a fault: DeepSpeed's linear keeps the inputs of frozen layers for the backward pass."""
    from iomm.engine.parallel import zero

    zero.spare_frozen_linears = lambda: None


def spill_and_break() -> dict:
    """Return what is seen of a graph break, and of kernels that get too few registers."""
    import pretended_cuda
    import pretended_inductor
    import torch
    from torch._dynamo.utils import counters
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    pretended_cuda.DEVICE.run_dry_above(DRY_NUMEL, True)
    kernels = pretended_inductor.install()
    options = CachingAutotuner._create_compile_options
    CachingAutotuner._create_compile_options = lambda *args: options(*args) | {"maxnreg": 24}

    def function(x, weight):
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], weight)
        torch._dynamo.graph_break()
        return x.exp().sum(0)

    x = torch.empty(4096, 1024, device="cuda", dtype=torch.bfloat16)
    torch.compile(function)(x, torch.empty(1024, device="cuda", dtype=torch.bfloat16))
    return {
        "breaks": sum(counters["graph_break"].values()),
        "stacks": kernels.stacks,
        "launches": sum(kernels.launches.values()),
    }


def print_report(report: dict) -> None:
    """Print the report as tables in GiB."""
    print(f"{'before':>9} {'peak':>9} {'after':>9}   GiB allocated, last time in the step")
    for name, part in report["parts"].items():
        print(" ".join(f"{part[key] / GIB:9.3f}" for key in Part._fields), f"  {name}")
    print(f"\n{report['built'] / GIB:9.3f}   after the build")
    print(f"{report['static'] / GIB:9.3f}   with the optimizer's state")
    print(f"{report['peak'] / GIB:9.3f}   peak of the step")
    print(f"{sum(report['plan'].values()) / GIB:9.3f}   estimated by engine/dry_run.py:")
    for name, number in report["plan"].items():
        print(f"{number / GIB:9.3f}     {name}")
    calls = report["calls"][-1]
    print(f"\nin the last micro-batch: {sum(calls.values())} calls of ops on the device")
    for name, number in sorted(calls.items(), key=lambda item: -item[1])[:25]:
        print(f"{number:6d}  {name}")
    if report["stacks"]:
        launches = [sum(launches.values()) for launches in report["launches"]]
        stacks = report["stacks"].values()
        print(
            f"{len(stacks)} compiled kernels, {sum(min(s) > 0 for s in stacks)} of them spill; "
            f"launches and graphs after each micro-batch: {launches}, {report['graphs']}"
        )
