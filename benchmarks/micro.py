"""Small measurements, one per subcommand: saves, images/s from text, start-up time, host memory.

    python benchmarks/micro.py checkpoint [--parameters 5.5e6] [--step-s 0.65] [--saves 10]
    python benchmarks/micro.py sampling --run runs/demo-finetune [--compile]
    python benchmarks/micro.py startup [--config demo-cpu] [section.key=value ...]
    python benchmarks/micro.py memory [--layers 10] [--width 1024]

`checkpoint` has a single rank save masters, two moments and an average in fp32 in the background
while the main thread multiplies matrices in steps of --step-s seconds. It measures how long save()
itself blocks, how much the steps slow down meanwhile, the time until the commit, the size, and the
time to verify and read everything back.

`sampling` measures what a user waits for: text in, PIL images out.

`startup` measures, in a fresh interpreter and in the order of a run: the imports of
engine/launch.py (torch is imported before), joining the ranks, launch.build (data, index, frozen
parts, ZeRO-3), and the first and second step. It reports medians over --runs interpreters. A
warm-up run that does not count creates the shapes dataset and its index.

`memory` measures by how much the host memory of 1, 2 and 4 ranks grows while they build the same
model: a random InternVL from a file, and a trained generator. "Private" is memory that a rank does
not share (Anonymous in /proc/PID/smaps_rollup); "with shared pages" adds each rank's part of the
pages that it maps from the weight file (Pss). The ranks are fresh interpreters, not connected.
PyTorch's meta device, which has no memory, takes the place of a GPU with its separate memory: what
is moved there leaves the host just as on a GPU. What CUDA itself takes is not measured.

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
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
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


# memory


@dataclass(frozen=True, kw_only=True)
class Build:
    """One way to build a model, and the numbers of ranks for which it is measured."""

    # Dtype of the weight file, and precision of the run.
    stored: str
    precision: str
    # Device of the ranks: "cpu", or "meta" in place of a GPU.
    device: str
    num_ranks: tuple[int, ...]


BUILDS = (
    Build(stored="bf16", precision="bf16", device="cpu", num_ranks=(1, 2, 4)),
    Build(stored="bf16", precision="fp32", device="cpu", num_ranks=(1, 2)),
    Build(stored="bf16", precision="bf16", device="meta", num_ranks=(1, 2, 4)),
    Build(stored="fp32", precision="bf16", device="meta", num_ranks=(1, 2)),
)
# Keys of /proc/PID/smaps_rollup and their names here.
ROLLUP = {"Anonymous": "private", "Pss": "with_shared", "Rss": "resident", "Private_Dirty": "dirty"}


def write_mllms(folder: Path | str, *, layers: int, width: int) -> None:
    """Write a random InternVL to folder/fp32, and the same rounded to bf16 to folder/bf16."""
    import shutil

    from safetensors.torch import load_file, save_file

    from iomm.config import RECONSTRUCT
    from iomm.engine.shapes.mllm import create_mllm

    vision = dict(
        hidden_size=width,
        num_hidden_layers=-(-layers // 3),
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        image_size=448,
        patch_size=14,
        attention_bias=True,
    )
    text = dict(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=2,
        intermediate_size=4 * width,
        max_position_embeddings=1024,
    )
    full, rounded = Path(folder) / "fp32", Path(folder) / "bf16"
    create_mllm(full, texts=[RECONSTRUCT], vision=vision, text=text)
    shutil.copytree(full, rounded, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(full / "model.safetensors")
    save_file(
        {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()},
        rounded / "model.safetensors",
        metadata={"format": "pt"},
    )


def host_memory() -> dict[str, float]:
    """Return this process's memory in MB by the names in ROLLUP."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
    return {name: kib[key] * 1024 / 1e6 for key, name in ROLLUP.items()}


def build_once(mllm: str, precision: str, device: str, width: int) -> None:
    """Be one rank: build the model, use its weights, and print MB after each step as JSON.

    Between the steps, a line on stdin is awaited, so that all ranks are measured together.
    """
    from iomm.config import GeneratorConfig
    from iomm.engine import builders
    from iomm.engine.config import load_config

    torch.set_num_threads(1)
    # A first build, of the shapes dataset's MLLM, imports what is imported late.
    builders.build_model(load_config("demo", ["model.vae=pixel:8"]), device)
    config = load_config(
        "demo", ["model.vae=pixel:8", f"model.mllm={mllm}", f"precision={precision}"]
    )
    shape = GeneratorConfig(width=width, num_heads=width // 64, num_blocks=5)
    model_config = replace(config.model, preset="from-init", shape=json.dumps(asdict(shape)))
    config = replace(config, model=model_config)
    before = host_memory()
    peak, done = dict(before), threading.Event()

    def note() -> None:
        peak.update({name: max(peak[name], mb) for name, mb in host_memory().items()})

    def watch() -> None:
        while not done.wait(0.02):
            note()

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = builders.build_model(config, device).to(device)
    for parameter in model.frozen[0].parameters():
        # As the first step does: reads every page.
        parameter.sum()
    done.set()
    watcher.join()
    note()
    trained = sum(p.numel() for p in model.parameters())
    print(json.dumps({"trained": trained, "before": before, "peak": peak}), flush=True)
    sys.stdin.readline()
    print(json.dumps(host_memory()), flush=True)
    sys.stdin.readline()


def measure_build(folder: Path | str, build: Build, num_ranks: int, width: int) -> dict:
    """Return the MB by which the memory of `num_ranks` ranks together grows in a build.

    "peak" adds the ranks' own peaks, "after" is measured while all ranks hold the model.
    """
    command_line = [
        sys.executable,
        __file__,
        "memory",
        "--once",
        str(Path(folder) / build.stored),
        build.precision,
        build.device,
        "--width",
        str(width),
    ]
    ranks = [
        subprocess.Popen(
            command_line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(num_ranks)
    ]
    try:
        # The last line, as libraries may print.
        first = [json.loads(next_json(rank)) for rank in ranks]
        after = []
        for rank in ranks:
            rank.stdin.write("\n")
            rank.stdin.flush()
            after.append(json.loads(next_json(rank)))
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    grown = {}
    for step, states in (("peak", [found["peak"] for found in first]), ("after", after)):
        for name in ROLLUP.values():
            grown[f"{step}_{name}_mb"] = sum(
                state[name] - found["before"][name]
                for state, found in zip(states, first, strict=True)
            )
    return {
        **asdict(build),
        "num_ranks": num_ranks,
        "file_mb": (Path(folder) / build.stored / "model.safetensors").stat().st_size / 1e6,
        "trained_mb": first[0]["trained"] * 4 / 1e6,
        **grown,
    }


def next_json(process: subprocess.Popen) -> str:
    """Return the next line of a process's output that is a JSON object."""
    for line in process.stdout:
        if line.startswith("{"):
            return line
    raise InputError("a rank ended before it had built the model; its error is above")


def memory(argv: list[str]) -> None:
    """Measure the host memory of ranks that build the same model."""
    parser = subcommand_parser("memory")
    parser.add_argument("--layers", type=positive(int), default=10, help="of the MLLM's decoder")
    parser.add_argument("--width", type=positive(int), default=1024, help="of the MLLM, x 64")
    parser.add_argument("--once", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.once:
        build_once(*args.once, args.width)
        return
    if args.write:
        write_mllms(args.write, layers=args.layers, width=args.width)
        return
    from iomm.engine.observe.doctor import machine

    size = ["--layers", str(args.layers), "--width", str(args.width)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        # In another process, which frees its memory at its end.
        subprocess.run(
            [sys.executable, __file__, "memory", "--write", folder, *size], cwd=ROOT, check=True
        )
        for build in BUILDS:
            for num_ranks in build.num_ranks:
                rows.append(measure_build(folder, build, num_ranks, width=384))
                print(json.dumps(rows[-1]), flush=True)
    facts = machine()
    path = RESULTS / f"memory-cpu-{facts['date']}.json"
    path.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    print(path)


SUBCOMMANDS = {
    "checkpoint": checkpoint,
    "sampling": sampling,
    "startup": startup,
    "memory": memory,
}


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
