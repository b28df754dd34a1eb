"""Measure a training step: its speed, its parts, ablations, and the PyTorch baseline.

    python benchmarks/throughput.py                     demo-cpu without a GPU, iomm-b-512 with one
    python benchmarks/throughput.py --against baseline  and Algorithm 1 in plain PyTorch, in turn
    python benchmarks/throughput.py --against baseline --trace traces     everything, for a GPU
    python benchmarks/throughput.py precision=fp32 train.micro_batch=4    config keys, as for a run

This times the whole step of the engine (launch.build, loop.train_step, the weight average, reading
the loss) with one micro-batch on a CPU and four on a GPU. Hub models are replaced by random weights
of the same shape and missing photographs by drawn ones, so shapes and times are real but pictures
are not. The baseline is benchmarks/lib/baseline.py.

Rows are timed in one process, step by step in a rotating order. Figures are medians. Ratios are
taken within a round; their spread is from the 10th to the 90th percentile. Nothing is timed unless
both sides have the same loss on the same batch, weights and draws. `counted` is the ratio of FLOPs.

Our step is measured first, then the comparison, the parts, the ablations and a trace. A measurement
that fails is reported, and the others still run. Results are written as they are measured, to
benchmarks/results/throughput-<config>-<device>-<date>.json, with a PNG next to it.
"""

import sys
from pathlib import Path

from iomm.checkout import enter

ROOT = enter(__file__)

import argparse
import json
import math
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.ablations import ablations, swapped
from benchmarks.lib.baseline import BaselineModel, Trainer, engine_draws
from benchmarks.lib.counts import (
    PAPER_EPOCHS,
    PAPER_HOURS,
    PAPER_IMAGES,
    Count,
    baseline_flops,
    paper_rate,
    part_flops,
)
from benchmarks.lib.harness import WARM_UP, Bench, prepare, ratio, summary, unsharded_copy
from benchmarks.ops import ceilings
from benchmarks.report import baseline_name, command, label, positive, pyplot
from iomm.engine.arguments import add_overrides
from iomm.engine.observe.doctor import machine
from iomm.engine.observe.metrics import memory_gib, peak_flops
from iomm.engine.observe.tracing import Window
from iomm.engine.parallel import ranks as group

# The config for which the paper reports GPU-hours.
PAPER_CONFIG = "iomm-b-512"
# Samples of stage 1 and of stage 2 (10 epochs of 210 k), and the paper's H800-hours of stage 2.
STAGE_1, STAGE_2 = PAPER_IMAGES * PAPER_EPOCHS[0], 2.1e6
STAGE_2_HOURS = 50
LIMIT_S = {"cpu": 170, "cuda": 480}
# Shares of the time limit at which the comparison and the ablations end, after 3 rounds at least.
SHARES = 0.55, 0.95
# Rounds of our step on its own before it is compared.
ALONE = {"cpu": 1, "cuda": 10}
# DeepSpeed replaces this function on a GPU where blocks are not compiled.
LINEAR = torch.nn.functional.linear


# The baseline


def build_baseline(bench: Bench) -> tuple[BaselineModel, Trainer, dict[str, float]]:
    """Return the baseline with our weights, its Trainer, and both losses on one batch.

    Raises:
        ValueError: if the losses differ, which would make the comparison meaningless.
    """
    config, model = bench.config, bench.model
    mllm, vae = model.frozen
    # Initialised on the device: a billion random numbers on the CPU take longer than all the rest.
    with torch.device(bench.device):
        baseline = BaselineModel(
            model.generator.config,
            config.adapter,
            mllm,
            vae,
            ratio=config.mask.ratio,
            autocast=config.precision != "fp32",
        ).to(bench.device)
    baseline.load(bench.weights())
    (batch, *_), copy = bench.next(), unsharded_copy(bench)
    n_B, draws = batch.n_B.to(bench.device), engine_draws(config, batch, mllm, vae)
    with torch.no_grad(), swapped(torch.nn.functional, linear=LINEAR):
        # The loss of the velocity only: the baseline has no other.
        _, loss_B, *_ = copy(batch.pixels_BCHW, batch.vit_pixels_BHWC, n_B)
        ours = loss_B.mean().item()
        theirs = baseline.loss(batch.pixels_BCHW, batch.vit_pixels_BHWC, *draws).item()
    allowed = 1e-4 if config.precision == "fp32" else 2e-2
    print(f"loss on one batch: ours {ours:.6f}, baseline {theirs:.6f}", flush=True)
    if not abs(ours - theirs) <= allowed * ours:
        raise ValueError(
            f"the relative difference of the losses exceeds {allowed:.0e}: nothing is timed"
        )
    if bench.compiled:
        baseline.compile_blocks()
    trainer = Trainer(baseline, config.optim, config.ema.decay)
    return baseline, trainer, {"ours": ours, "baseline": theirs}


def compare_with_baseline(
    bench: Bench, args: argparse.Namespace, result: dict, save: Callable[[], None]
) -> None:
    """Time our step and the baseline's in turn; save and print each result when it is known."""
    baseline, trainer, result["loss"] = build_baseline(bench)
    result["flops_per_image"]["baseline"] = baseline_flops(bench.config)
    result["flops_per_image"]["baseline, all outputs"] = baseline_flops(bench.config, every=True)

    def baseline_step(every: bool = False, compiled: bool = True) -> None:
        with (
            swapped(baseline, every=every),
            swapped(torch.nn.functional, linear=LINEAR),
            nullcontext() if compiled else torch.compiler.set_stance("force_eager"),
        ):
            loss = trainer.step(
                islice(bench.batches, bench.source.accumulation_steps),
                bench.source.accumulation_steps,
            ).item()
        assert math.isfinite(loss), "the baseline's loss is not finite, so its time is meaningless"

    def report_progress() -> None:
        save()
        print("\n".join(verdict(result, bench.device.type)), flush=True)

    timed = {
        "ours": bench.step,
        "baseline": baseline_step,
        "baseline, all outputs": lambda: baseline_step(every=True),
    }
    add_rows(bench, bench.time_in_turn(timed, args.steps, bench.deadline(SHARES[0])), result)
    report_progress()
    # Separately, because it needs the most memory and matters least.
    if bench.compiled:
        found = bench.time_in_turn(
            {"ours": bench.step, "baseline, no compile": lambda: baseline_step(compiled=False)},
            4,
            bench.deadline(SHARES[0]),
        )
        add_rows(bench, found, result, keep_ours=True)
        report_progress()


# Each part alone


def parts_alone(bench: Bench) -> dict[str, dict]:
    """Time each part of a step on its own.

    Returns:
        {part: {"s": median seconds, "flops": FLOPs per image or None, "bytes": bytes that its eager
        ops read and write}}.
    """
    copy, (batch, *_) = unsharded_copy(bench), bench.next()
    mllm, vae = copy.frozen
    if bench.compiled:
        for block in copy.generator.blocks:
            block.forward = torch.compile(block.forward, fullgraph=True)
    pixels, vit_pixels, n_B = batch.pixels_BCHW, batch.vit_pixels_BHWC, batch.n_B.to(bench.device)
    condition = copy.condition(vit_pixels, n_B)
    cache, _ = mllm.prefix(condition)
    queries = copy.adapter(condition).detach().to(mllm.dtype).requires_grad_()
    with torch.no_grad():
        hidden = mllm.queries(queries, condition, cache)
    latents = copy.encode(pixels, n_B)
    size = vae.grid(*pixels.shape[-2:])
    noisy = torch.randn(len(n_B), size[0] * size[1], vae.token_dim, device=bench.device)
    t_B = torch.rand(len(n_B), device=bench.device)
    sharded, optimizer = bench.state.sharded, bench.state.sharded.optimizer
    gradients = [torch.randn_like(flat) * 1e-3 for flat in sharded.masters]

    def optimize() -> None:
        sharded.set_lr(0.0)
        for flat, kind, gradient in zip(sharded.masters, sharded.kinds, gradients, strict=True):
            before, flat.grad = flat.grad, gradient
            group = next(g for g in optimizer.param_groups if g["kind"] == kind)
            update = optimizer.adamw_step if kind == "adamw" else optimizer.muon_step
            with torch.no_grad():
                update(flat, optimizer.state[flat], group)
            flat.grad = before

    def backward(out: Tensor) -> None:
        out.backward(torch.ones_like(out))

    work = {
        "data": lambda: next(bench.batches),
        "vae": lambda: copy.encode(pixels, n_B),
        "vit": lambda: mllm.image_tokens(vit_pixels),
        "adapter": lambda: backward(copy.adapter(condition)),
        "prefix": lambda: mllm.prefix(condition),
        "suffix": lambda: backward(mllm.queries(queries, condition, cache)),
        "generator": lambda: backward(copy.velocity(noisy, t_B, hidden, None, size)),
        "optimizer": optimize,
        "ema": lambda: bench.state.ema.update(0),
    }
    flops, found = part_flops(copy, bench.config.data.size_px), {}
    assert latents.shape[-1] // vae.patch == size[1]
    for name, run in work.items():
        deadline = time.monotonic() + bench.limit_s / 80
        seconds = bench.time_in_turn({name: run}, 20, deadline)[name]
        with torch.compiler.set_stance("force_eager"), Count() as counter:
            run()
        found[name] = {
            "s": statistics.median(seconds),
            "flops": flops.get(name),
            "bytes": counter.bytes,
        }
    return found


# Output


def table(result: dict) -> str:
    """Return the time of each part within the step and alone as text."""
    batch, step_s = result["images_a_pass"], result["rows"]["ours"]["s"]
    passes = result["images_a_step"] // batch
    rate, bandwidth = result["matmul_flop_per_s"], result["copy_bytes_per_s"]
    split = result["split_s"]
    total = sum(split.values())
    lines = ["within the step        ms   share"]
    lines += [
        f"{part:<18} {1e3 * s:>6.1f}  {s / total:>5.1%}"
        for part, s in sorted(split.items(), key=lambda pair: -pair[1])
    ]
    if "parts" in result:
        lines += [
            "",
            "alone                  ms   of step   TFLOP/s   of matmul      GB/s   of copy "
            "(bytes of eager ops)",
        ]
    for part, row in result.get("parts", {}).items():
        flops = batch * (row["flops"] or 0) / row["s"]
        moved = row["bytes"] / row["s"]
        work = f"{flops / 1e12:>9.3f}   {flops / rate:>9.1%}" if flops else f"{'':>21}"
        share = row["s"] * (1 if part in ("optimizer", "ema") else passes) / step_s
        lines.append(
            f"{part:<18} {1e3 * row['s']:>6.1f}   {share:>7.1%} {work} {moved / 1e9:>9.1f}   "
            f"{moved / bandwidth:>7.1%}"
        )
    return "\n".join(lines)


def projection(result: dict) -> str:
    """Return the GPU-hours of both stages at the measured rate, with the paper's, in words.

    Adds them to the result as `projection`.
    """
    rate = result["rows"]["ours"]["images_per_s"]
    hours = [images / rate / 3600 for images in (STAGE_1, STAGE_2)]
    table_1, table_9 = PAPER_EPOCHS
    result["projection"] = {
        "stage_1_gpu_hours": hours[0],
        "stage_2_gpu_hours": hours[1],
        "paper_gpu_hours": (PAPER_HOURS, STAGE_2_HOURS),
        "paper_images_per_s": paper_rate(table_1),
    }
    return (
        f"at this rate on every GPU, without communication: stage 1, {STAGE_1 / 1e6:.0f} M "
        f"images: {hours[0]:,.0f} GPU-hours (paper: {PAPER_HOURS:,} on H800); stage 2, "
        f"{STAGE_2 / 1e6:.1f} M, at stage 1's rate: {hours[1]:,.1f} (paper: {STAGE_2_HOURS}); "
        f"{rate:.1f} images/s per GPU (paper: {paper_rate(table_1):.1f}, or "
        f"{paper_rate(table_9):.1f} if stage 1 had the {table_9} epochs of its table 9 instead of "
        f"{table_1})"
    )


def picture(result: dict, path: Path) -> None:
    """Draw a PNG: bars of our step by part and of the baseline's steps, and the roofline."""
    if (plt := pyplot()) is None:
        return
    figure, (bars, roof) = plt.subplots(1, 2, figsize=(13, 5), width_ratios=(1, 1.2))
    # The split was measured in other steps than the rows.
    scale = result["rows"]["ours"]["s"] / sum(result["split_s"].values())
    left = 0.0
    for i, (part, seconds) in enumerate(
        sorted(result["split_s"].items(), key=lambda pair: -pair[1])
    ):
        bars.bar("ours", seconds * scale, bottom=left, label=part, color=plt.get_cmap("tab20")(i))
        left += seconds * scale
    for name, row in result["rows"].items():
        if name != "ours":
            bars.bar(name.replace(", ", "\n"), row["s"], color="0.6")
    bars.set_ylabel("seconds per step")
    bars.legend(fontsize=8)
    rate, bandwidth = result["matmul_flop_per_s"], result["copy_bytes_per_s"]
    ridge, batch = rate / bandwidth, result["images_a_pass"]
    roof.loglog([ridge / 100, ridge, ridge * 30], [rate / 100, rate, rate], color="0.5")
    for part, row in result.get("parts", {}).items():
        if row["flops"]:
            flops = batch * row["flops"]
            roof.loglog(flops / row["bytes"], flops / row["s"], "o", label=part)
    roof.legend(fontsize=8)
    roof.set_xlabel("FLOP per byte that eager ops read and write")
    roof.set_ylabel("FLOP/s")
    figure.suptitle(
        f"{result['config']}, {result['images_a_step']} images per step, "
        f"{result['machine']['device']}, {result['machine']['date']}",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(path)


def measure(bench: Bench, args: argparse.Namespace, result: dict, save: Callable[[], None]) -> None:
    """Run all measurements; fill `result`, save and print as they are made."""
    batch, peak = result["images_a_step"], peak_flops(bench.device)
    alone = bench.time_in_turn(
        {"ours": bench.step},
        ALONE[bench.device.type] if args.against else args.steps,
        bench.deadline(SHARES[0]),
    )
    result["peak_memory_gib"] = memory_gib(bench.device)
    add_rows(bench, alone, result)
    save()
    mfu = f"{100 * result['mfu']:.1f} %" if peak else "unknown, as this device's peak is unknown"
    print(
        f"\n{result['rows']['ours']['images_per_s']:.2f} images/s, {bench.flops / 1e12:.3f} TFLOP "
        f"per image: {result['of_matmul_rate']:.1%} of the measured matmul rate "
        f"({result['matmul_flop_per_s'] / 1e12:.2f} TFLOP/s), mfu {mfu}, peak memory "
        f"{result['peak_memory_gib']:.1f} GiB"
    )
    if peak and Path(args.config).stem == PAPER_CONFIG:
        print(projection(result), flush=True)
    else:
        print(
            f"no projection: it needs {PAPER_CONFIG} and a GPU with a known peak rate", flush=True
        )
    if args.against:
        attempt("baseline", lambda: compare_with_baseline(bench, args, result, save), result, save)
    result["split_s"] = bench.split(5)
    save()
    attempt("parts alone", lambda: result.update(parts=parts_alone(bench)), result, save)
    print("\n" + table(result), flush=True)
    if not args.no_ablations:
        attempt("ablations", lambda: ablate(bench, args, result, save), result, save)
    if args.trace and time.monotonic() > bench.deadline(1.1):
        print("no trace: the time limit is reached; repeat without --against")
    elif args.trace:
        attempt(
            "trace",
            lambda: trace(bench, args.trace, math.ceil(10 * result["images_a_pass"] / batch)),
            result,
            save,
        )
    save()


def attempt(what: str, work: Callable[[], Any], result: dict, save: Callable[[], None]) -> None:
    """Call work(); print an exception and keep it in result["failed"] instead of raising it.

    Time on a GPU is short, so one failed measurement must not end the others.
    """
    try:
        work()
    except Exception as error:
        reason = first_line(error)
        result.setdefault("failed", {})[what] = reason
        advice = ""
        if isinstance(error, torch.OutOfMemoryError):
            advice = "; repeat with a smaller train.micro_batch"
        print(f"{what} failed: {reason}{advice}", flush=True)
        if os.environ.get("IOMM_TRACEBACK"):
            traceback.print_exception(error)
    # Free its memory for the next measurement.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    save()


def first_line(error: Exception) -> str:
    """Return an exception's type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def add_rows(
    bench: Bench, times: dict[str, list[float]], result: dict, keep_ours: bool = False
) -> None:
    """Add timed rows, their summaries and ratios to the result, and print a line per row.

    Args:
        bench: holds the CPU times of the same calls.
        times: seconds of rows that were timed in turn with ours.
        result: the content of the result file.
        keep_ours: keep our own times from before instead of replacing them by these.
    """
    batch = result["images_a_step"]
    for what, found in (
        ("seconds", times),
        ("cpu_s", bench.cpu_s),
        ("rows", {name: summary(seconds, batch) for name, seconds in times.items()}),
    ):
        result[what] = result.get(what, {}) | {
            name: value for name, value in found.items() if name != "ours" or not keep_ours
        }
    result.setdefault("ratios", {})
    for name in times:
        if name != "ours":
            work = name if name in result["flops_per_image"] else "baseline"
            result["ratios"][name] = ratio(times[name], times["ours"]) | {
                "counted": result["flops_per_image"][work] / bench.flops,
                "cpu_time": ratio(bench.cpu_s[name], bench.cpu_s["ours"])["median"],
            }
    images_per_s, peak = result["rows"]["ours"]["images_per_s"], peak_flops(bench.device)
    result["of_matmul_rate"] = bench.flops * images_per_s / result["matmul_flop_per_s"]
    result["mfu"] = bench.flops * images_per_s / peak if peak else None
    for name, row in ((name, result["rows"][name]) for name in times):
        print(
            f"{name:<21} {row['s'] * 1e3:>8.1f} ms per step of {batch} images, "
            f"{row['images_per_s']:.2f} images/s ({row['steps']} steps, "
            f"{row['fastest_s'] * 1e3:.0f} to {row['slowest_s'] * 1e3:.0f} ms)",
            flush=True,
        )


def trace(bench: Bench, folder: str, num_steps: int) -> None:
    """Write a torch trace of `num_steps` steps."""
    window = Window("torch", bench.state.step + 1, num_steps, folder, bench.ranks)
    for _ in range(num_steps):
        window.before(bench.state.step + 1)
        bench.step()
        window.after(bench.state.step)


def ablate(bench: Bench, args: argparse.Namespace, result: dict, save: Callable[[], None]) -> None:
    """Time our step against itself with one thing changed, row by row until the time limit."""
    changed, result["ablations"], left_out = ablations(bench), {}, {}
    least_s = 2 * (WARM_UP[bench.device.type] + 3) * result["rows"]["ours"]["s"]
    print("\nour step with one thing changed: its time / the unchanged step's")
    for i, (name, step) in enumerate(changed.items()):
        now, end = time.monotonic(), bench.deadline(SHARES[1])
        if now + least_s > bench.deadline(1.05):
            left_out[name] = "the time limit is reached"
            continue
        try:
            found = bench.time_in_turn(
                {"ours": bench.step, name: step},
                max(4, args.steps // 3),
                now + (end - now) / (len(changed) - i),
            )
        except Exception as error:
            # The engine may be in the middle of a step, so the remaining rows cannot be timed.
            left_out[name] = first_line(error)
            left_out |= dict.fromkeys(list(changed)[i + 1 :], "a row before it failed")
            break
        result["ablations"][name] = found = ratio(found[name], found["ours"])
        save()
        print(
            f"{name:<52} {found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f})",
            flush=True,
        )
    if left_out:
        advice = ""
        if "the time limit is reached" in left_out.values():
            enough_s = time.monotonic() - bench.begun + least_s * len(left_out)
            advice = f" (--limit-s {enough_s:.0f} would be enough)"
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        print(f"not measured: {reasons}{advice}")


def main() -> int:
    begun = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="iomm-b-512" if device == "cuda" else "demo-cpu")
    parser.add_argument(
        "--against",
        type=baseline_name,
        choices=("baseline",),
        help="also measure Algorithm 1 in plain PyTorch",
    )
    parser.add_argument("--steps", type=positive(int), default=40, help="most rounds of a row")
    parser.add_argument(
        "--limit-s",
        type=positive(float),
        default=LIMIT_S[device],
        help="approximate seconds in total; measurements that do not fit are left out",
    )
    parser.add_argument("--no-ablations", action="store_true")
    parser.add_argument("--trace", help="folder for a torch trace of ten micro-batches")
    add_overrides(parser)
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        config, changes = prepare(args, device, Path(folder))
        bench = Bench(config, group.start(600), args.limit_s, begun)
        try:
            return report(bench, args, changes)
        finally:
            bench.batches.close()
            group.stop()


def report(bench: Bench, args: argparse.Namespace, changes: list[str]) -> int:
    """Measure, write the results, and return the exit code."""
    facts, device = machine(), bench.device.type
    # Before anything else runs, while the device is idle.
    copy, matmul = ceilings(
        bench.device, torch.float32 if bench.config.precision == "fp32" else torch.bfloat16
    )
    name = label(f"throughput-{Path(args.config).stem}", args.overrides)
    path = ROOT / f"benchmarks/results/{name}-{device}-{facts['date']}.json"
    result = {
        "machine": facts | {"load": os.getloadavg()[0], "threads": torch.get_num_threads()},
        "config": args.config,
        "changed": [*args.overrides, *changes],
        "precision": bench.config.precision,
        "compiled": bench.compiled,
        "images_a_step": bench.config.train.global_batch,
        "images_a_pass": bench.config.train.micro_batch,
        "copy_bytes_per_s": copy,
        "matmul_flop_per_s": matmul,
        "flops_per_image": {"ours": bench.flops},
        "build_s": time.monotonic() - bench.begun,
    }

    def save() -> None:
        result["wall_s"] = time.monotonic() - bench.begun
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")

    measure(bench, args, result, save)
    picture(result, path.with_suffix(".png"))
    print(f"{result['wall_s']:.0f} s; written to {path}")
    if result["ratios"]:
        print("\n".join(verdict(result, device)), flush=True)
    return 1 if result.get("failed") else 0


def verdict(result: dict, device: str) -> list[str]:
    """Return the outcome of the comparison; the last line is the ratio of the same function."""
    every, same = (result["ratios"][name] for name in ("baseline, all outputs", "baseline"))
    lines = [f"against all outputs as condition {ratio_line(every)}"]
    if device == "cpu":
        lines.append(
            f"by CPU time over all threads: {same['cpu_time']:.2f}, all outputs "
            f"{every['cpu_time']:.2f}"
        )
    return [*lines, ratio_line(same)]


def ratio_line(found: dict[str, float]) -> str:
    """Return a ratio in words, with the ratio of FLOPs and the spread."""
    return (
        f"ratio {found['median']:.2f} (counted {found['counted']:.2f}, spread "
        f"{found['low']:.2f}-{found['high']:.2f})"
    )


if __name__ == "__main__":
    sys.exit(command(main))
