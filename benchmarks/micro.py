"""Small measurements, one per subcommand: the cost of a save, images/s from text, start-up time.

    python benchmarks/micro.py checkpoint [--parameters 5.5e6] [--step-s 0.65] [--saves 10]
    python benchmarks/micro.py sampling --run runs/demo-finetune [--compile]
    python benchmarks/micro.py startup [--config demo-cpu] [section.key=value ...]

`checkpoint` has a single rank save masters, two moments and an average in fp32 in the background
while the main thread multiplies matrices in steps of --step-s seconds. It measures how long save()
itself blocks, how much the steps slow down meanwhile, the time until the commit, the size, and the
time to verify and read everything back.

`sampling` measures what a user waits for: text in, PIL images out.

`startup` measures, in a fresh interpreter and in the order of a run: the imports of
engine/launch.py (torch is imported before), joining the ranks, launch.build (data, index, frozen
parts, ZeRO-3), and the first and second step. It reports medians over --runs interpreters. A
warm-up run that does not count creates the shapes dataset and its index.

Results are written to benchmarks/results/<subcommand>-<device>-<date>.json.
"""

import sys

from iomm.checkout import enter

ROOT = enter(__file__)

# Only what `startup` may have loaded before it times the imports: the rest is imported when needed.
import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.report import command, positive
from iomm.config import InputError
from iomm.engine.arguments import add_overrides
from iomm.engine.config_parser import layered
from iomm.engine.parallel import ranks as group

if TYPE_CHECKING:
    from iomm.pipeline import Pipeline

RESULTS = ROOT / "benchmarks/results"


# checkpoint


class SingleRank:
    """The interface of Ranks for a process without peers."""

    rank, size, first = 0, 1, True

    def on_first(self, work: Callable[[], Any]) -> Any:
        return work()

    def all(self, value: Any) -> list:
        return [value]


def time_products(seconds: float, device: str) -> float:
    """Multiply matrices for about `seconds` and return the seconds per product."""
    a = torch.ones(512, 512, device=device)
    num_products = 0
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        a = (a @ a).clamp_(0, 1)
        num_products += 1
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / num_products


def measure_saves(folder: Path | str, *, parameters: float, step_s: float, num_saves: int) -> dict:
    """Return the figures of `num_saves` saves into `folder`, and the intervals that they suggest.

    The first save is left out of the medians. `planned` holds the recommended checkpoint intervals
    (engine/resilience/checkpoint_interval.py) for 8, 64 and 256 GPUs.
    """
    from iomm.engine.resilience import checkpoint_reader, checkpoint_writer
    from iomm.engine.resilience.checkpoint_interval import plan

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    state = {
        f"{slot}/w": torch.randn(int(parameters), device=device)
        for slot in ("master", "exp_avg", "exp_avg_sq", "ema")
    }
    facts = {"shapes": {"w": [int(parameters)]}, "config": "", "ema": True}
    undisturbed = statistics.median(time_products(step_s, device) for _ in range(5))
    stalls, writes, slowed = [], [], []
    saver = checkpoint_writer.Saver(Path(folder) / "checkpoints", SingleRank(), keep=2)
    for i in range(num_saves + 1):
        saver.save(i, state, facts)
        slowed.append(time_products(step_s, device))
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
        "slowing_of_steps_meanwhile": statistics.median(slowed[1:]) / undisturbed - 1,
        "commit_s": write,
        "verify_s": verified - started,
        "read_s": read - verified,
        "planned": {
            str(n): vars(plan(num_gpus=n, stall_s=stall, write_s=write, mtbf_gpu_hours=20_000))
            for n in (8, 64, 256)
        },
    }


def checkpoint(argv: list[str]) -> None:
    """Measure what a save costs."""
    parser = subcommand_parser("checkpoint")
    parser.add_argument("--parameters", type=positive(float), default=5.5e6)
    parser.add_argument("--step-s", type=positive(float), default=0.65, help="seconds of a step")
    parser.add_argument("--saves", type=positive(int), default=10)
    args = parser.parse_args(argv)
    from iomm.engine.observe.doctor import machine

    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        figures = measure_saves(
            folder, parameters=args.parameters, step_s=args.step_s, num_saves=args.saves
        )
    facts = machine()
    result = {"machine": facts | {"load": os.getloadavg()[0]}, **figures}
    path = RESULTS / f"checkpoint-{'cuda' if facts['gpu'] else 'cpu'}-{facts['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


# sampling


def sampling_rate(
    pipeline: "Pipeline",
    *,
    steps: int = 20,
    guidance: float = 4.0,
    size: int | tuple[int, int] | None = None,
    batches: int = 3,
    compiled: bool = False,
) -> dict:
    """Sample full batches of distinct prompts, after a warm-up of one step, and return a row.

    Args:
        pipeline: the pipeline to sample from, in batches of `pipeline.batch`.
        steps: Euler steps.
        guidance: guidance scale; 1 needs one pass per step, any other value two.
        size: (height, width) or side in pixels; default: the run's.
        batches: how many batches to time.
        compiled: only noted in the row: call pipeline.compile() before.

    Returns:
        The settings, and `images_per_s` of the median batch; `batch_s`, the seconds of each batch;
        `generator_tflops`, 1e12 FLOP of the generator's products per second of sampling.
    """
    from iomm.pipeline import height_width

    model, size, num = pipeline.model, height_width(size or pipeline.size_px), pipeline.batch
    mllm, vae = model.frozen
    texts = [f"{i} red circles beside a blue square" for i in range(num)]
    num_condition = model.encode_condition(mllm.condition(texts[:1]))[0].shape[1]
    settings = dict(guidance=guidance, size=size)
    pipeline(texts, steps=1, **settings)
    seconds = []
    for i in range(batches):
        started = time.perf_counter()
        # The call ends with pixels on the CPU, so no work is still queued on the GPU.
        pipeline(texts, steps=steps, seed=i, **settings)
        seconds.append(time.perf_counter() - started)
    rate = num / statistics.median(seconds)
    flops = (
        steps
        * (1 if guidance == 1.0 else 2)
        * model.generator.flops_per_image(vae.grid(*size), num_condition)
    )
    return {
        "images_per_s": rate,
        "batch_s": seconds,
        "batch": num,
        "size_px": size,
        "steps": steps,
        "guidance": guidance,
        "compiled": compiled,
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_condition": num_condition,
        "parameters": sum(p.numel() for p in model.generator.parameters()),
        "generator_tflop_per_image": flops / 1e12,
        "generator_tflops": flops * rate / 1e12,
    }


def sampling(argv: list[str]) -> None:
    """Measure images/s from text."""
    parser = subcommand_parser("sampling")
    parser.add_argument("--run", required=True, help="run folder or exported model folder")
    parser.add_argument("--batch", type=positive(int), default=16)
    parser.add_argument("--steps", type=positive(int), default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--size", help="side in pixels, or WIDTHxHEIGHT; default: the run's")
    parser.add_argument("--batches", type=positive(int), default=3)
    parser.add_argument(
        "--compile", action="store_true", help="add a second row measured with torch.compile"
    )
    args = parser.parse_args(argv)
    from iomm.engine.evaluation.sample import open_pipeline, parse_size
    from iomm.engine.observe.doctor import machine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe, _ = open_pipeline(args.run, device=device)
    pipe.batch = args.batch
    settings = dict(
        steps=args.steps,
        guidance=args.guidance,
        size=parse_size(args.size) if args.size else None,
        batches=args.batches,
    )
    rows = [sampling_rate(pipe, **settings)]
    if args.compile:
        rows.append(sampling_rate(pipe.compile(), compiled=True, **settings))
    facts = machine()
    path = RESULTS / f"sampling-{device}-{facts['date']}.json"
    path.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    print(path, *(f"{row['images_per_s']:.3g} images/s" for row in rows))


# startup


def time_start(config_name: str, overrides: list[str]) -> None:
    """Time one start in this interpreter and print the seconds as JSON."""
    clock, found = time.perf_counter(), {}

    def done(what: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        found[f"{what}_s"], clock = now - clock, now

    from itertools import islice

    from iomm.engine import launch, loop
    from iomm.engine.config import load_config

    done("import")
    config = load_config(config_name, overrides)
    ranks = group.start(600)
    launch.prepare_process(config, ranks)
    done("ranks")
    state, source, _ = launch.build(config, ranks)
    done("build")
    batches = iter(source)
    for what in ("first_step", "second_step"):
        loop.train_step(state.sharded, islice(batches, source.accumulation_steps))[0].item()
        done(what)
    batches.close()
    group.stop()
    print(json.dumps(found))


def startup(argv: list[str]) -> None:
    """Measure what a start costs, in fresh interpreters."""
    parser = subcommand_parser("startup")
    parser.add_argument("--config", default="demo-cpu")
    parser.add_argument("--runs", type=positive(int), default=5)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    add_overrides(parser)
    args = parser.parse_intermixed_args(argv)
    if args.once:
        time_start(args.config, args.overrides)
        return
    from iomm.engine.observe.doctor import machine

    runs = []
    with tempfile.TemporaryDirectory() as folder:
        once = [
            sys.executable,
            __file__,
            "startup",
            "--once",
            "--config",
            args.config,
            *layered([*args.overrides, f"run.dir={folder}/run"]),
        ]
        for _ in range(args.runs + 1):
            done = subprocess.run(once, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise InputError(
                    (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("iomm: ")
                )
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    facts = machine()
    result = {
        "machine": facts,
        "config": args.config,
        "overrides": args.overrides,
        "runs": runs[1:],
        **{key: statistics.median(run[key] for run in runs[1:]) for key in runs[0]},
    }
    path = RESULTS / f"startup-{'cuda' if facts['gpu'] else 'cpu'}-{facts['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    shown = {key: value for key, value in result.items() if key not in ("machine", "runs")}
    print(json.dumps(shown, indent=1))
    print(path)


SUBCOMMANDS = {"checkpoint": checkpoint, "sampling": sampling, "startup": startup}


def subcommand_parser(name: str) -> argparse.ArgumentParser:
    """Return an empty parser for a subcommand, described by the first line of its function."""
    return argparse.ArgumentParser(
        prog=f"{Path(__file__).name} {name}", description=SUBCOMMANDS[name].__doc__
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subcommand", choices=tuple(SUBCOMMANDS))
    parser.add_argument(
        "options", nargs=argparse.REMAINDER, help="of the subcommand; --help lists them"
    )
    args = parser.parse_args(argv)
    SUBCOMMANDS[args.subcommand](args.options)


if __name__ == "__main__":
    sys.exit(command(main))
