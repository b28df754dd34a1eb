"""The run that benchmarks/throughput.py measures: the engine's own step, rows that take turns, and what their times say."""

import statistics
import time
from itertools import islice

import torch
import torch.distributed as dist

from benchmarks.loader import draw_photographs
from iomm.config import PRESETS, InputError
from iomm.engine import launch, loop
from iomm.engine.builders import assemble
from iomm.engine.config import load_config
from iomm.engine.dry_run import build_without_weights, largest, memory, size
from iomm.engine.parallel.optim import learning_rate
from iomm.profiling import Clock, named

STAND_INS = {
    "OpenGVLab/InternVL3-2B-hf": "random:internvl3-2b",
    "black-forest-labs/FLUX.1-schnell/vae": "random:flux",
}
# Rounds of every row that do not count: compiling, attention plans, allocator.
WARM_UP = {"cpu": 1, "cuda": 3}
# micro-batches a step: one rank of many updates a small share, one GPU alone everything
PASSES = {"cpu": 1, "cuda": 4}


def prepare(args, device, folder):
    """(RunConfig as it is measured, [what was changed]). Raises InputError: it does not fit, or plain is no rival for it."""
    config = load_config(args.config, args.overrides)
    if args.against and (
        PRESETS[config.model.preset].kind != "mmdit"
        or config.adapter.kind != "rqa"
        or config.adapter.connector_layers
        or config.train.data != "image"
        or config.train.noise_draws != 1
    ):
        raise InputError(
            "--against plain is Algorithm 1 on images with the RQA, no connector, FLUX's blocks and train.noise_draws=1: leave it "
            "out, or give a config of these"
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
    micro_batch = config.train.micro_batch or config.train.global_batch
    if device == "cuda":
        # A context, an allocator's gaps.
        room, wanted = torch.cuda.get_device_properties(0).total_memory * 0.95, micro_batch
        model = build_without_weights(config)
        micro_batch = largest(wanted, lambda num: needed(model, config, num, args.against), room)
        if not micro_batch and args.against:
            print(
                f"no comparison: plain beside ours needs {needed(model, config, 1, args.against) / 2**30:.0f} GiB at one image, this GPU has "
                f"{room / 2**30:.0f}"
            )
            args.against = None
            micro_batch = largest(wanted, lambda num: needed(model, config, num, None), room)
        if not micro_batch:
            raise InputError(
                f"one image a pass needs {needed(model, config, 1, None) / 2**30:.0f} GiB, this GPU has {room / 2**30:.0f}: give a "
                "smaller model"
            )
        if micro_batch < wanted:
            print(
                f"micro-batch {micro_batch} and not {wanted}: {needed(model, config, wanted, args.against) / 2**30:.0f} GiB do not "
                f"fit into {room / 2**30:.0f}",
                flush=True,
            )
    changes += [
        f"train.micro_batch={micro_batch}",
        f"train.global_batch={micro_batch * PASSES[device]}",
    ]
    return load_config(args.config, [*args.overrides, *changes]), changes


def needed(model, config, micro_batch, against):
    """Bytes on one GPU: the run's, and the larger of what stands beside it: for parts alone an unsharded copy, its gradients and
    random ones in fp32; plain's weights, gradients, moments and average in fp32 and its weights once more in bf16, with
    activations half as large again as ours (assumed: autocast keeps norms in fp32).
    """
    parts, trained = memory(model, config, 1, micro_batch), size(model)
    kept = sum(number for part, number in parts.items() if part.startswith("activations"))
    return sum(parts.values()) + max(12 * trained, 22 * trained + 0.5 * kept if against else 0)


class Bench:
    """Our run and what is measured of it. `deadline(share)` is a moment of time.monotonic()."""

    def __init__(self, config, ranks, limit_s=0.0, begun=0.0, fresh=False):
        """fresh: keep the weights that a run starts from; else they are moved, so that no zero is multiplied (`wake`)."""
        self.config, self.ranks, self.device = config, ranks, ranks.device
        self.begun, self.limit_s = begun, limit_s
        launch.prepare_process(config, ranks)
        self.state, self.source, self.flops = launch.build(config, ranks)
        self.batches = iter(self.source)
        self.model = self.state.sharded.engine.module
        self.compiled = config.train.compiled(self.device)
        if not fresh:
            self.wake()

    @torch.no_grad()
    def wake(self):
        """Moves all masters away from where they start: there gates and velocity are zero, and multiplying zeros takes a
        GPU less power and time (13 % measured on products).
        """
        state, draw = self.state, torch.Generator(self.device).manual_seed(0)
        state.sharded.slots()
        for flat in state.sharded.masters:
            flat.add_(torch.randn(flat.shape, generator=draw, device=self.device), alpha=0.02)
        state.sharded.finish_restore(0)
        for average, flat in zip(state.ema.flats, state.sharded.masters):
            average.copy_(flat)

    def weights(self, flats=None):
        """Name -> whole fp32 tensor of what trains, of the masters or of `flats` shaped like them; one rank holds them all."""
        sharded = self.state.sharded
        flats = flats or sharded.masters
        return {
            name: flats[place.group]
            .detach()[place.offset : place.offset + place.numel]
            .view(sharded.shapes[name])
            for name, place in sharded.places.items()
        }

    def step(self, batches=None, look_ahead=None):
        """What engine/loop.py does in a step, its log, guard and checkpoints aside."""
        state, config = self.state, self.config
        state.sharded.set_lr(learning_rate(state.step, config.optim, config.train.steps))
        batches = (
            islice(self.batches, self.source.accumulation_steps) if batches is None else batches
        )
        loss, by_time, applied, *_ = loop.train_step(state.sharded, batches, look_ahead=look_ahead)
        assert applied, "a step was skipped: its gradient is not finite"
        with named("ema"):
            state.ema.update(state.step)
        state.step += 1
        sums = torch.cat((loss[None], by_time.flatten()))
        dist.all_reduce(sums)
        return sums.tolist()[0]

    def next(self):
        return list(islice(self.batches, self.source.accumulation_steps))

    def deadline(self, share):
        return self.begun + share * self.limit_s

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def in_turn(self, rows, rounds, deadline, warm_up=None):
        """{row: [seconds]}: every row once a round, in an order that rotates; at least 3 rounds, then until `deadline`.
        `cpu_s` then holds the CPU time of the same, over all threads: what says something where others compute too.
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

    def split(self, num_steps):
        """{part: median seconds} within the step, on the device's own timeline."""
        clock, found = Clock(self.device), []
        with clock:
            for _ in range(num_steps):
                self.step()
                found.append(clock.read()[0])
        return {
            part: statistics.median(row.get(part, 0.0) for row in found)
            for part in sorted(set().union(*found))
        }


def summary(seconds, batch):
    return {
        "steps": len(seconds),
        "s": statistics.median(seconds),
        "fastest_s": min(seconds),
        "slowest_s": max(seconds),
        "images_per_s": batch / statistics.median(seconds),
    }


def ratio(over, under):
    """Median, 10th and 90th percentile of over / under, round by round."""
    found = sorted(a / b for a, b in zip(over, under))
    return {
        "median": statistics.median(found),
        "low": found[round(0.1 * (len(found) - 1))],
        "high": found[round(0.9 * (len(found) - 1))],
    }


def whole_copy(bench):
    """An IOMM with our weights that no ZeRO cuts up, for what is run alone; its frozen parts are the same modules."""
    config, model = bench.config, bench.model
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    mllm, vae = model.frozen
    twin = assemble(config, mllm, vae, device=bench.device).to(dtype)
    twin.load_state_dict(bench.weights())
    return twin
