"""How fast a training step is, where its time goes, against plain PyTorch, and what that means for 110 M images.

    python benchmarks/throughput.py                            demo-cpu without a GPU, iomm-b-512 with one
    python benchmarks/throughput.py --against plain            and Algorithm 1 in plain PyTorch (benchmarks/lib/baseline.py), in turn
    python benchmarks/throughput.py --config iomm-b-512 --against plain --trace traces --limit-s 480     the one GPU visit
    python benchmarks/throughput.py precision=fp32 train.micro_batch=4           keys of the config, as for a run

Measured is the engine's own step (launch.build, loop.train_step, average, the loss read), all parts of it: one micro-batch on
a CPU, four on a GPU. Hub models give way to random weights of their shape and missing photographs to drawn ones: shapes
and times are real, pictures are not. Rows take turns step by step in one process, in an order that rotates; figures are
medians, ratios are taken within a round, their spread is from the 10th to the 90th percentile. Nothing is timed unless
both sides have the same loss on the same batch, weights and draws. `counted` is the ratio of FLOPs.

Our step alone comes first, then the comparison, the parts, the ablations, a trace; one that fails is said and ends no other.
Everything goes to
benchmarks/results/throughput-<config>-<device>-<date>.json as it is measured, and a PNG beside it.
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
from contextlib import nullcontext
from itertools import islice

import torch

from benchmarks.lib.ablations import ablations, swapped
from benchmarks.lib.baseline import BaselineModel, Trainer, engine_draws
from benchmarks.lib.counts import Count, part_flops, plain_flops
from benchmarks.lib.harness import WARM_UP, Bench, prepare, ratio, summary, whole_copy
from benchmarks.ops import ceilings
from benchmarks.report import above_0, command, label, pyplot
from iomm.engine.observe.doctor import machine
from iomm.engine.observe.metrics import memory_gib, peak_flops
from iomm.engine.observe.tracing import Window
from iomm.engine.parallel import ranks as group

# The config that the paper's hours are of.
REAL = "iomm-b-512"
# images: 11 M x 10 epochs; 210 k pairs x 10 epochs and as many images beside them
STAGE_1, STAGE_2 = 110e6, 4.2e6
# H800-hours of the stages; images/s that the first implies.
PAPER_HOURS, PAPER_RATE = (1000, 50), 110e6 / (1000 * 3600)
LIMIT_S = {"cpu": 170, "cuda": 480}
# Of the time limit, when the comparison and the ablations end, 3 rounds each at least.
SHARES = 0.55, 0.95
# Rounds of our step before there is a rival.
ALONE = {"cpu": 1, "cuda": 10}
# DeepSpeed puts one of its own there where blocks are not compiled on a GPU.
LINEAR = torch.nn.functional.linear


# The rival


def make_plain(bench):
    """Plain and its Trainer with our weights, once its loss on a batch is ours."""
    config, model = bench.config, bench.model
    mllm, vae = model.frozen
    # Drawn there: a billion numbers on the CPU take longer than the comparison.
    with torch.device(bench.device):
        plain = BaselineModel(
            model.generator.config,
            config.adapter,
            mllm,
            vae,
            ratio=config.mask.ratio,
            autocast=config.precision != "fp32",
        ).to(bench.device)
    plain.load(bench.weights())
    (batch, *_), twin = bench.next(), whole_copy(bench)
    n_B, draws = batch.n_B.to(bench.device), engine_draws(config, batch, mllm, vae)
    with torch.no_grad(), swapped(torch.nn.functional, linear=LINEAR):
        # Of the velocity alone, which plain has too.
        _, loss_B, *_ = twin(batch.pixels_BCHW, batch.vit_pixels_BHWC, n_B)
        ours = loss_B.mean().item()
        theirs = plain.loss(batch.pixels_BCHW, batch.vit_pixels_BHWC, *draws).item()
    allowed = 1e-4 if config.precision == "fp32" else 2e-2
    print(f"loss on one batch: ours {ours:.6f}, plain {theirs:.6f}", flush=True)
    if not abs(ours - theirs) <= allowed * ours:
        raise ValueError(
            f"the losses differ by more than {allowed:.0e} of themselves: nothing is timed"
        )
    if bench.compiled:
        plain.compile_blocks()
    return plain, Trainer(plain, config.optim, config.ema.decay), {"ours": ours, "plain": theirs}


def against(bench, args, result, save):
    """Times ours and plain in turn; saves and says what is known whenever that grows."""
    plain, trainer, result["loss"] = make_plain(bench)
    result["flops_per_image"]["plain"] = plain_flops(bench.config)
    result["flops_per_image"]["plain, all outputs"] = plain_flops(bench.config, every=True)

    def plain_step(every=False, compiled=True):
        with (
            swapped(plain, every=every),
            swapped(torch.nn.functional, linear=LINEAR),
            nullcontext() if compiled else torch.compiler.set_stance("force_eager"),
        ):
            loss = trainer.step(
                islice(bench.batches, bench.source.accumulation_steps),
                bench.source.accumulation_steps,
            ).item()
        assert math.isfinite(loss), "plain's loss is not finite: its time means nothing"

    def known():
        save()
        print("\n".join(verdict(result, bench.device.type)), flush=True)

    timed = {
        "ours": bench.step,
        "plain": plain_step,
        "plain, all outputs": lambda: plain_step(every=True),
    }
    rows(bench, bench.in_turn(timed, args.steps, bench.deadline(SHARES[0])), result)
    known()
    # By itself: it needs most memory and matters least.
    if bench.compiled:
        found = bench.in_turn(
            {"ours": bench.step, "plain, no compile": lambda: plain_step(compiled=False)},
            4,
            bench.deadline(SHARES[0]),
        )
        rows(bench, found, result, ours=False)
        known()


# Each part alone


def parts_alone(bench):
    """{part: (seconds, FLOPs an image or None, bytes that eager ops read and write)}, each run by itself."""
    twin, (batch, *_) = whole_copy(bench), bench.next()
    mllm, vae = twin.frozen
    if bench.compiled:
        for block in twin.generator.blocks:
            block.forward = torch.compile(block.forward, fullgraph=True)
    pixels, vit_pixels, n_B = batch.pixels_BCHW, batch.vit_pixels_BHWC, batch.n_B.to(bench.device)
    condition = twin.condition(vit_pixels, n_B)
    cache, _ = mllm.prefix(condition)
    queries = twin.adapter(condition).detach().to(mllm.dtype).requires_grad_()
    with torch.no_grad():
        hidden = mllm.queries(queries, condition, cache)
    latents = twin.encode(pixels, n_B)
    size = vae.grid(*pixels.shape[-2:])
    noisy = torch.randn(len(n_B), size[0] * size[1], vae.token_dim, device=bench.device)
    t_B = torch.rand(len(n_B), device=bench.device)
    sharded, optimizer = bench.state.sharded, bench.state.sharded.optimizer
    gradients = [torch.randn_like(flat) * 1e-3 for flat in sharded.masters]

    def optimize():
        sharded.set_lr(0.0)
        for flat, kind, gradient in zip(sharded.masters, sharded.kinds, gradients):
            before, flat.grad = flat.grad, gradient
            group = next(g for g in optimizer.param_groups if g["kind"] == kind)
            with torch.no_grad():
                (optimizer.adamw_step if kind == "adamw" else optimizer.muon_step)(
                    flat, optimizer.state[flat], group
                )
            flat.grad = before

    def backward(out):
        out.backward(torch.ones_like(out))

    work = {
        "data": lambda: next(bench.batches),
        "vae": lambda: twin.encode(pixels, n_B),
        "vit": lambda: mllm.image_tokens(vit_pixels),
        "adapter": lambda: backward(twin.adapter(condition)),
        "prefix": lambda: mllm.prefix(condition),
        "suffix": lambda: backward(mllm.queries(queries, condition, cache)),
        "generator": lambda: backward(twin.velocity(noisy, t_B, hidden, None, size)),
        "optimizer": optimize,
        "ema": lambda: bench.state.ema.update(0),
    }
    flops, found = part_flops(twin, bench.config.data.size_px), {}
    assert latents.shape[-1] // vae.patch == size[1]
    for name, run in work.items():
        seconds = bench.in_turn({name: run}, 20, time.monotonic() + bench.limit_s / 80)[name]
        with torch.compiler.set_stance("force_eager"), Count() as counter:
            run()
        found[name] = {
            "s": statistics.median(seconds),
            "flops": flops.get(name),
            "bytes": counter.bytes,
        }
    return found


# What is said of it


def table(result):
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
    lines += [
        "",
        "alone                  ms   of step   TFLOP/s   of matmul      GB/s   of copy (bytes of eager ops)",
    ] * ("parts" in result)
    for part, row in result.get("parts", {}).items():
        flops = batch * (row["flops"] or 0) / row["s"]
        moved = row["bytes"] / row["s"]
        work = f"{flops / 1e12:>9.3f}   {flops / rate:>9.1%}" if flops else f"{'':>21}"
        share = row["s"] * (1 if part in ("optimizer", "ema") else passes) / step_s
        lines.append(
            f"{part:<18} {1e3 * row['s']:>6.1f}   {share:>7.1%} {work} {moved / 1e9:>9.1f}   {moved / bandwidth:>7.1%}"
        )
    return "\n".join(lines)


def projection(result):
    """GPU-hours of both stages at the measured rate; the paper's beside them."""
    rate = result["rows"]["ours"]["images_per_s"]
    hours = [images / rate / 3600 for images in (STAGE_1, STAGE_2)]
    result["projection"] = {
        "stage_1_gpu_hours": hours[0],
        "stage_2_gpu_hours": hours[1],
        "paper_gpu_hours": PAPER_HOURS,
        "paper_images_per_s": PAPER_RATE,
    }
    return (
        f"at this rate on every GPU, with no messages between them: stage 1, {STAGE_1 / 1e6:.0f} M images: {hours[0]:,.0f} GPU-hours (paper: "
        f"{PAPER_HOURS[0]:,} on H800); stage 2, {STAGE_2 / 1e6:.1f} M, at stage 1's rate: {hours[1]:,.1f} (paper: {PAPER_HOURS[1]}); "
        f"{rate:.1f} images/s per GPU (paper: {PAPER_RATE:.1f})"
    )


def picture(result, path):
    """Bars of the time split beside plain's steps, and the roofline, as a PNG."""
    if (plt := pyplot()) is None:
        return
    figure, (bars, roof) = plt.subplots(1, 2, figsize=(13, 5), width_ratios=(1, 1.2))
    # The clock's own steps were others.
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
    bars.set_ylabel("seconds a step")
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
        f"{result['config']}, {result['images_a_step']} images a step, {result['machine']['device']}, "
        f"{result['machine']['date']}",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(path)


def measure(bench, args, result, save):
    """Fills `result`, saving as it goes, and prints."""
    batch, peak = result["images_a_step"], peak_flops(bench.device)
    alone = bench.in_turn(
        {"ours": bench.step},
        ALONE[bench.device.type] if args.against else args.steps,
        bench.deadline(SHARES[0]),
    )
    result["peak_memory_gib"] = memory_gib(bench.device)
    rows(bench, alone, result)
    save()
    print(
        f"\n{result['rows']['ours']['images_per_s']:.2f} images/s, {bench.flops / 1e12:.3f} TFLOP an image: {result['of_matmul_rate']:.1%} "
        f"of the measured matmul rate ({result['matmul_flop_per_s'] / 1e12:.2f} TFLOP/s), mfu "
        f"{'%.1f %%' % (100 * result['mfu']) if peak else 'unknown: no peak'}, peak memory {result['peak_memory_gib']:.1f} GiB"
    )
    print(
        projection(result)
        if peak and Path(args.config).stem == REAL
        else f"no projection: that is of {REAL} on a GPU whose peak is known",
        flush=True,
    )
    if args.against:
        attempt("plain", lambda: against(bench, args, result, save), result, save)
    result["split_s"] = bench.split(5)
    save()
    attempt("parts alone", lambda: result.update(parts=parts_alone(bench)), result, save)
    print("\n" + table(result), flush=True)
    if not args.no_ablations:
        attempt("ablations", lambda: ablate(bench, args, result, save), result, save)
    if args.trace and time.monotonic() > bench.deadline(1.1):
        print("no trace: the time is up; repeat without --against")
    elif args.trace:
        attempt(
            "trace",
            lambda: trace(bench, args.trace, math.ceil(10 * result["images_a_pass"] / batch)),
            result,
            save,
        )
    save()


def attempt(what, work, result, save):
    """work(); whatever goes wrong in it is said and kept, and what comes after goes on: a visit is short."""
    try:
        work()
    except Exception as error:
        reason = first_line(error)
        result.setdefault("failed", {})[what] = reason
        fits = "; repeat with a smaller train.micro_batch" * isinstance(
            error, torch.OutOfMemoryError
        )
        print(f"{what} failed: {reason}{fits}", flush=True)
        if os.environ.get("IOMM_TRACEBACK"):
            traceback.print_exception(error)
    # What it held must not lie in the way of what comes.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    save()


def first_line(error):
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def rows(bench, times, result, ours=True):
    """Seconds of rows that took turns with ours -> what is said of them; prints a line a row. ours: whether its own are kept, or
    those of before.
    """
    batch = result["images_a_step"]
    for what, found in (
        ("seconds", times),
        ("cpu_s", bench.cpu_s),
        ("rows", {name: summary(seconds, batch) for name, seconds in times.items()}),
    ):
        result[what] = result.get(what, {}) | {
            name: value for name, value in found.items() if name != "ours" or ours
        }
    result.setdefault("ratios", {})
    for name in times:
        if name != "ours":
            work = name if name in result["flops_per_image"] else "plain"
            result["ratios"][name] = ratio(times[name], times["ours"]) | {
                "counted": result["flops_per_image"][work] / bench.flops,
                "cpu_time": ratio(bench.cpu_s[name], bench.cpu_s["ours"])["median"],
            }
    images_per_s, peak = result["rows"]["ours"]["images_per_s"], peak_flops(bench.device)
    result["of_matmul_rate"] = bench.flops * images_per_s / result["matmul_flop_per_s"]
    result["mfu"] = bench.flops * images_per_s / peak if peak else None
    for name, row in ((name, result["rows"][name]) for name in times):
        print(
            f"{name:<20} {row['s'] * 1e3:>8.1f} ms a step of {batch} images, {row['images_per_s']:.2f} images/s "
            f"({row['steps']} steps, {row['fastest_s'] * 1e3:.0f} to {row['slowest_s'] * 1e3:.0f} ms)",
            flush=True,
        )


def trace(bench, folder, num_steps):
    """Ten micro-batches, in whole steps."""
    window = Window("torch", bench.state.step + 1, num_steps, folder, bench.ranks)
    for _ in range(num_steps):
        window.before(bench.state.step + 1)
        bench.step()
        window.after(bench.state.step)


def ablate(bench, args, result, save):
    """Our step against itself with one thing changed, a row after the other until the time is up."""
    changed, result["ablations"], left_out = ablations(bench), {}, {}
    least_s = 2 * (WARM_UP[bench.device.type] + 3) * result["rows"]["ours"]["s"]
    print("\nour step with one thing changed, its time over ours")
    for i, (name, step) in enumerate(changed.items()):
        now, end = time.monotonic(), bench.deadline(SHARES[1])
        if now + least_s > bench.deadline(1.05):
            left_out[name] = "the time is up"
            continue
        try:
            found = bench.in_turn(
                {"ours": bench.step, name: step},
                max(4, args.steps // 3),
                now + (end - now) / (len(changed) - i),
            )
        except Exception as error:
            # it may have ended amid a step: what came after would start there
            left_out[name] = first_line(error)
            left_out |= dict.fromkeys(list(changed)[i + 1 :], "after that")
            break
        result["ablations"][name] = found = ratio(found[name], found["ours"])
        save()
        print(
            f"{name:<52} {found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f})",
            flush=True,
        )
    if left_out:
        wanted = time.monotonic() - bench.begun + least_s * len(left_out)
        print(
            "not measured: "
            + "; ".join(f"{name}: {why}" for name, why in left_out.items())
            + f" (--limit-s {wanted:.0f} gives time for them)"
            * ("the time is up" in left_out.values())
        )


def main():
    begun = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="iomm-b-512" if device == "cuda" else "demo-cpu")
    parser.add_argument("--against", choices=("plain",))
    parser.add_argument("--steps", type=above_0(int), default=40, help="rounds at most")
    parser.add_argument(
        "--limit-s",
        type=above_0(float),
        default=LIMIT_S[device],
        help="about so many seconds in all; what does not fit is left out",
    )
    parser.add_argument("--no-ablations", action="store_true")
    parser.add_argument("--trace", help="folder for a torch trace of ten steps")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        config, changes = prepare(args, device, Path(folder))
        bench = Bench(config, group.start(600), args.limit_s, begun)
        try:
            return report(bench, args, changes)
        finally:
            bench.batches.close()
            group.stop()


def report(bench, args, changes):
    facts, device = machine(), bench.device.type
    # As it is idle.
    copy, matmul = ceilings(
        bench.device, torch.float32 if bench.config.precision == "fp32" else torch.bfloat16
    )
    path = (
        ROOT
        / "benchmarks/results"
        / f"{label(f'throughput-{Path(args.config).stem}', args.overrides)}-{device}-{facts['date']}.json"
    )
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

    def save():
        result["wall_s"] = time.monotonic() - bench.begun
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")

    measure(bench, args, result, save)
    picture(result, path.with_suffix(".png"))
    print(f"{result['wall_s']:.0f} s; written to {path}")
    if result["ratios"]:
        print("\n".join(verdict(result, device)), flush=True)
    return 1 if result.get("failed") else 0


def verdict(result, device):
    """What is said of the comparison, the wanted line last."""
    everything, same = result["ratios"]["plain, all outputs"], result["ratios"]["plain"]
    said = [f"against all outputs as condition {line(everything)}"]
    if device == "cpu":
        said.append(
            f"by CPU time over all threads: {same['cpu_time']:.2f}, all outputs {everything['cpu_time']:.2f}"
        )
    return [*said, line(same)]


def line(found):
    return f"ratio {found['median']:.2f} (counted {found['counted']:.2f}, spread {found['low']:.2f}-{found['high']:.2f})"


if __name__ == "__main__":
    sys.exit(command(main))
