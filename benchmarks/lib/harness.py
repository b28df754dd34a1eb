"""The harness of benchmarks/throughput.py.

It builds the engine's own run, times alternatives in turn, and summarises their times.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.loader import draw_photographs
from iomm.config import InputError, PromptConfig
from iomm.engine import launch, loop
from iomm.engine.builders import assemble
from iomm.engine.config import RunConfig, load_config
from iomm.engine.data.source import Batch
from iomm.engine.dry_run import (
    USABLE,
    Memory,
    build_without_weights,
    largest_that_fits,
    micro_batches,
    size,
)
from iomm.engine.parallel.optim import learning_rate
from iomm.engine.parallel.ranks import Ranks
from iomm.model import IOMM
from iomm.profiling import Clock, named

STAND_INS = {
    "OpenGVLab/InternVL3-2B-hf": "random:internvl3-2b",
    "black-forest-labs/FLUX.1-schnell/vae": "random:flux",
}
# Untimed rounds of every row, for compilation, attention plans and the allocator.
WARM_UP = {"cpu": 1, "cuda": 3}
# Micro-batches per step. One rank of many updates only a small share of the parameters, a single
# GPU all of them.
PASSES = {"cpu": 1, "cuda": 4}


def prepare(args: argparse.Namespace, device: str, folder: Path) -> tuple[RunConfig, list[str]]:
    """Return the config to measure and the overrides that were added to it.

    Hub models are replaced by random weights and missing photographs by drawn ones. On a GPU the
    micro-batch is reduced until it fits; if the baseline does not fit at all, `args.against` is
    set to None.

    Raises:
        InputError: if a single image does not fit, or the baseline does not compute this config.
    """
    config = load_config(args.config, args.overrides)
    if args.against and (
        config.model.generator.kind != "mmdit"
        or config.adapter.kind != "rqa"
        or config.adapter.connector_layers
        or config.train.data != "image"
        or config.train.noise_draws != 1
        or config.prompt != PromptConfig()
    ):
        raise InputError(
            "--against baseline implements Algorithm 1 on images with the RQA, no connector, "
            "FLUX's blocks, train.noise_draws=1 and the default prompts. Omit it, or choose such "
            "a config"
        )
    changes = [
        f"run.dir={folder / 'run'}",
        "train.steps=1000000",
        "data.max_bad_fraction=0",
        "data.heldout=0",
        "evaluate.every_steps=0",
    ]
    changes += [
        f"model.{key}={STAND_INS[name]}"
        for key in ("mllm", "vae")
        if (name := getattr(config.model, key)) in STAND_INS
    ]
    if config.data.shards != "shapes" and not any(
        item.startswith("data.shards=") for item in args.overrides
    ):
        changes.append(f"data.shards={draw_photographs(folder / 'photographs', 64)}")
    config = load_config(args.config, [*args.overrides, *changes])
    micro_batch = config.train.global_batch
    if config.train.number_given:
        micro_batch = config.train.micro_batch
    if device == "cuda":
        model = build_without_weights(config)

        counted = Memory(model, config)

        def needed(num: int) -> float:
            return memory_needed(counted, num, args.against)

        total = torch.cuda.get_device_properties(0).total_memory
        available_gib = f"{USABLE * total / 2**30:.0f} GiB"
        sizes = micro_batches(config, 1)
        if config.train.number_given:
            # Halved until it fits.
            sizes = [micro_batch >> n for n in range(micro_batch.bit_length())]
        requested = max(sizes)

        def largest() -> int | None:
            return largest_that_fits({num: needed(num) for num in sizes}, total)

        micro_batch = largest()
        if not micro_batch and args.against:
            print(
                f"no comparison: our run and the baseline need {needed(1) / 2**30:.0f} GiB for one "
                f"image, this GPU has {available_gib}"
            )
            args.against = None
            micro_batch = largest()
        if not micro_batch:
            raise InputError(
                f"one image per pass needs {needed(1) / 2**30:.0f} GiB, this GPU has "
                f"{available_gib}. Choose a smaller model"
            )
        if micro_batch < requested and config.train.micro_batch != "auto":
            print(
                f"micro-batch reduced from {requested} to {micro_batch}: "
                f"{needed(requested) / 2**30:.0f} GiB do not fit into {available_gib}",
                flush=True,
            )
    changes += [
        f"train.micro_batch={micro_batch}",
        f"train.global_batch={micro_batch * PASSES[device]}",
    ]
    return load_config(args.config, [*args.overrides, *changes]), changes


def memory_needed(memory: Memory, micro_batch: int, against: str | None) -> float:
    """Return the bytes that a measurement needs on one GPU.

    These are the run's own bytes and the larger of two additions. Timing parts alone adds an
    unsharded copy, its gradients and random ones in fp32. The baseline adds weights, gradients,
    moments and average in fp32, the weights once more in bf16, and activations half as large again
    as ours (assumed, because autocast keeps norms in fp32).
    """
    parts, trained = memory.parts(1, micro_batch), size(memory.model)
    kept = sum(number for part, number in parts.items() if part.startswith("activations"))
    return sum(parts.values()) + max(12 * trained, 22 * trained + 0.5 * kept if against else 0)


class Bench:
    """A run of the engine under measurement."""

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        limit_s: float = 0.0,
        begun: float = 0.0,
        fresh: bool = False,
    ):
        """Build the run.

        Args:
            config: what to train.
            ranks: the joined ranks.
            limit_s: time limit of the whole measurement.
            begun: when the measurement began, as time.monotonic() has it.
            fresh: keep the initial weights. By default they are perturbed (`perturb_weights`).
        """
        self.config, self.ranks, self.device = config, ranks, ranks.device
        self.begun, self.limit_s = begun, limit_s
        launch.prepare_process(config, ranks)
        self.state, self.source, self.flops = launch.build(config, ranks)
        self.batches = iter(self.source)
        self.model = self.state.sharded.engine.module
        self.compiled = config.train.compiled(self.device)
        if not fresh:
            self.perturb_weights()

    @torch.no_grad()
    def perturb_weights(self) -> None:
        """Add noise to all masters and set the average to them.

        Initial gates and velocities are zero, and multiplying zeros takes a GPU less power and time
        (13 % measured on products).
        """
        state, draw = self.state, torch.Generator(self.device).manual_seed(0)
        state.sharded.slots()
        for flat in state.sharded.masters:
            flat.add_(torch.randn(flat.shape, generator=draw, device=self.device), alpha=0.02)
        state.sharded.finish_restore(0)
        for average, flat in zip(state.ema.flats, state.sharded.masters, strict=False):
            average.copy_(flat)

    def weights(self, flats: list[Tensor] | None = None) -> dict[str, Tensor]:
        """Return name -> whole fp32 tensor of all trained parameters; for a single rank only.

        flats: tensors of the masters' shapes to read instead of the masters.
        """
        sharded = self.state.sharded
        flats = flats or sharded.masters
        return {
            name: flats[place.group]
            .detach()[place.offset : place.offset + place.numel]
            .view(sharded.shapes[name])
            for name, place in sharded.places.items()
        }

    def step(
        self, batches: Iterable[Batch] | None = None, prefetch: Callable[[], None] | None = None
    ) -> float:
        """Take a step of engine/loop.py without log, guard and checkpoints; return its loss."""
        state, config = self.state, self.config
        state.sharded.set_lr(learning_rate(state.step, config.optim, config.train.steps))
        batches = (
            islice(self.batches, self.source.accumulation_steps) if batches is None else batches
        )
        loss, by_time, applied, *_ = loop.train_step(state.sharded, batches, prefetch=prefetch)
        assert applied, "a step was skipped because its gradient is not finite"
        with named("ema"):
            state.ema.update(state.step)
        state.step += 1
        sums = torch.cat((loss[None], by_time.flatten()))
        dist.all_reduce(sums)
        return sums.tolist()[0]

    def next(self) -> list[Batch]:
        """Return the micro-batches of the next step."""
        return list(islice(self.batches, self.source.accumulation_steps))

    def deadline(self, share: float) -> float:
        """Return when this share of the time limit has passed, as time.monotonic() has it."""
        return self.begun + share * self.limit_s

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time_in_turn(
        self,
        rows: dict[str, Callable[[], Any]],
        rounds: int,
        deadline: float,
        warm_up: int | None = None,
    ) -> dict[str, list[float]]:
        """Time every row once per round, in a rotating order.

        Afterwards `self.cpu_s` holds the CPU time of the same calls over all threads, which stays
        meaningful on a machine that is shared with other work.

        Args:
            rows: name -> function to time.
            rounds: most timed rounds.
            deadline: end after this moment of time.monotonic(), but not before 3 timed rounds.
            warm_up: untimed rounds; WARM_UP by default.

        Returns:
            {row: seconds of each timed round}.
        """
        warm_up = WARM_UP[self.device.type] if warm_up is None else warm_up
        times, names = {name: [] for name in rows}, list(rows)
        self.cpu_s = {name: [] for name in rows}
        for r in range(warm_up + rounds):
            if r >= warm_up + 3 and time.monotonic() > deadline:
                break
            for name in names[r % len(names) :] + names[: r % len(names)]:
                self.wait()
                started, started_cpu = time.perf_counter(), time.process_time()
                rows[name]()
                self.wait()
                if r >= warm_up:
                    times[name].append(time.perf_counter() - started)
                    self.cpu_s[name].append(time.process_time() - started_cpu)
        return times

    def split(self, num_steps: int) -> dict[str, float]:
        """Return {part: median seconds} within the step, on the device's own timeline."""
        clock, found = Clock(self.device), []
        with clock:
            for _ in range(num_steps):
                self.step()
                found.append(clock.read()[0])
        return {
            part: statistics.median(row.get(part, 0.0) for row in found)
            for part in sorted(set().union(*found))
        }


def summary(seconds: list[float], batch: int) -> dict[str, float]:
    """Return median, fastest and slowest step and the median's images/s."""
    return {
        "steps": len(seconds),
        "s": statistics.median(seconds),
        "fastest_s": min(seconds),
        "slowest_s": max(seconds),
        "images_per_s": batch / statistics.median(seconds),
    }


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Return median, 10th and 90th percentile of over / under, taken round by round."""
    found = sorted(a / b for a, b in zip(over, under, strict=True))
    return {
        "median": statistics.median(found),
        "low": found[round(0.1 * (len(found) - 1))],
        "high": found[round(0.9 * (len(found) - 1))],
    }


def unsharded_copy(bench: Bench) -> IOMM:
    """Return an IOMM with our weights but without ZeRO, to run its parts alone.

    Its frozen parts are the same modules.
    """
    config, model = bench.config, bench.model
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    mllm, vae = model.frozen
    twin = assemble(config, mllm, vae, device=bench.device, fresh=False).to(dtype)
    twin.load_state_dict(bench.weights())
    return twin
