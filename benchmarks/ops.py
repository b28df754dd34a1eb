"""Every op, every body: right first, then timed. One command for a machine with a GPU, the same for one without.

    python benchmarks/ops.py               the C++ bodies and PyTorch's formulas on this CPU, under a minute
    python benchmarks/ops.py --gpu         builds, checks every body in bf16 against float64, runs compute-sanitizer on
                                           the CUDA ops, times, prints the targets; under 8 minutes
    python benchmarks/ops.py --gpu --tiles         and times the other tiles of masked_attention
    pytest benchmarks/ops.py --benchmark-only      the same bodies as rows of pytest-benchmark, to compare two checkouts

Nothing is timed if a check fails. Times are medians on random data; on a GPU CUDA graphs are replayed, with the cache
swept in between. Numbers go to benchmarks/results/ops-<device>-<date>.json with machine, versions and commit.
"""

import sys

from iomm.checkout import enter

ROOT = enter(__file__)

import argparse
import functools
import json
import os
import shutil
import subprocess
import time

import torch

from benchmarks.lib.op_cases import cases, token_cases
from iomm.engine.observe.doctor import machine
from iomm.kernels import native

LIMIT_S = 480


def leaves_of(inputs):
    return [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]


def run_whole(body, inputs, seed=0):
    """Outputs of body(*inputs), then the gradients of all that wants one; `seed` draws the outputs' gradients."""
    out = body(*inputs)
    outputs = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if x is not None]
    leaves = leaves_of(inputs)
    if not leaves:
        return outputs
    weights = [weight_of(x, seed) for x in outputs]
    return outputs + list(torch.autograd.grad(outputs, leaves, weights, materialize_grads=True))


@functools.cache
def _drawn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@functools.cache
def _weight(shape, dtype, device, seed):
    return _drawn(shape, seed).to(device, dtype)


def weight_of(x, seed):
    """A fixed random tensor like x."""
    return _weight(x.shape, x.dtype, x.device, seed)


def check(case, body, device, dtype):
    """Largest error over the budget: twice what the specification makes in the same dtype, plus one ulp; NaN fails."""
    exact_inputs, dtype = case.check(), case.dtype or dtype

    # Anew for each: an optimizer's step is in place.
    def cast():
        return [
            x.detach()
            .to(device, dtype if x.dtype == torch.float64 else x.dtype, copy=True)
            .requires_grad_(x.requires_grad)
            if isinstance(x, torch.Tensor)
            else x
            for x in exact_inputs
        ]

    got, same_dtype = run_whole(body, cast()), run_whole(case.reference, cast())
    if case.exact:
        return (
            0.0
            if all(torch.equal(a, b) for a, b in zip(got, same_dtype, strict=True))
            else float("inf")
        )
    worst = 0.0
    for mine, theirs, wanted in zip(
        got, same_dtype, run_whole(case.reference, exact_inputs), strict=True
    ):
        if wanted.numel():
            mine, theirs, wanted = (x.detach().double().cpu() for x in (mine, theirs, wanted))
            budget = 2 * (theirs - wanted).abs().max() + torch.finfo(dtype).eps * wanted.abs().max()
            ratio = ((mine - wanted).abs().max() / budget).item()
            worst = max(worst, ratio) if ratio == ratio else float("inf")
    return worst


@functools.cache
def sweep():
    """Larger than any cache: filled between two timings."""
    return torch.empty(2**28, dtype=torch.uint8, device="cuda")


def median_gpu(fn, budget_s=0.3):
    """(median ms, how) of fn(): a CUDA graph of it, or its calls where it cannot be captured."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.synchronize()
    run, how = fn, "calls"
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = fn()  # noqa: F841  the graph writes into it
        run, how = graph.replay, "graph"
    except RuntimeError:
        torch.cuda.synchronize()
    times, begun = [], time.monotonic()
    while len(times) < 10 or (time.monotonic() - begun < budget_s and len(times) < 200):
        sweep().zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times)[len(times) // 2], how


def median_cpu(fn, budget_s=0.25):
    fn()
    times, begun = [], time.monotonic()
    while len(times) < 5 or (time.monotonic() - begun < budget_s and len(times) < 500):
        start = time.perf_counter()
        fn()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2], "calls"


def ceilings(device="cuda", dtype=torch.bfloat16):
    """(bytes/s of a device copy, read and write counted; FLOP/s of a product of 8192^3, on a CPU of 2048^3)."""
    cuda = torch.device(device).type == "cuda"
    timer, side = (median_gpu, 8192) if cuda else (median_cpu, 2048)
    source = torch.randn(2**29 if cuda else 2**26, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy_ms, _ = timer(lambda: target.copy_(source))
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product_ms, _ = timer(lambda: a @ b)
    return 2 * source.nbytes / copy_ms * 1e3, 2 * side**3 / product_ms * 1e3


def build():
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print((done.stdout + done.stderr).strip().splitlines()[-1])
    if done.returncode:
        raise SystemExit("the build failed: run `python setup.py build_ext --inplace` to see why")
    native.load.cache_clear()


def sanitize():
    """{tool: verdict} of compute-sanitizer on the CUDA ops at odd sizes. What it finds is said, and stands in the result."""
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "/usr/local/cuda/bin/compute-sanitizer"
    )
    if tool is None:
        return {"compute-sanitizer": "not installed"}
    verdicts = {}
    for kind in ("memcheck", "racecheck"):
        command = [
            tool,
            "--tool",
            kind,
            "--error-exitcode",
            "9",
            "--report-api-errors",
            "no",
            sys.executable,
            __file__,
            "--cuda-ops-once",
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            print(f"compute-sanitizer {kind}: no verdict within 120 s")
            verdicts[kind] = "no verdict within 120 s"
            continue
        lines = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
        verdicts[kind] = (
            lines[-1].strip("= ") if lines else f"exit {done.returncode}: {done.stderr[-200:]}"
        )
        print(f"compute-sanitizer {kind}: {verdicts[kind]}")
        if done.returncode:
            verdicts[kind] += f" (exit {done.returncode})"
            print(done.stdout[-4000:], done.stderr[-4000:])
    return verdicts


def cuda_ops_once():
    """The ops of csrc/ at the sizes of the checks, against the specification on the CPU: few other kernels run."""
    from iomm.kernels.philox import philox_compiled, philox_reference

    n = torch.tensor([0, 5, 2**40])
    for kind in ("uniform", "normal"):
        got = philox_compiled(kind, 7, 2, n.cuda(), 1003).cpu()
        torch.testing.assert_close(
            got, philox_reference(kind, 7, 2, n, 1003), rtol=3e-7, atol=1e-10
        )
    for dtype in (torch.bfloat16, torch.float32):
        for case in token_cases("cuda", dtype):
            if "cuda" in case.bodies:
                inputs = [
                    x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype == torch.float64 else x
                    for x in case.check()
                ]
                moved = [x.cuda() if isinstance(x, torch.Tensor) else x for x in inputs]
                tolerance = 0 if case.exact else torch.finfo(dtype).eps
                outputs = run_whole(case.bodies["cuda"], moved)
                for got, wanted in zip(outputs, run_whole(case.reference, inputs), strict=True):
                    torch.testing.assert_close(
                        got.cpu(), wanted, rtol=tolerance, atol=tolerance and 1e-6
                    )
    torch.cuda.synchronize()


def measure(device, dtype, timer, save):
    """(cases, rows): every body of every case checked, then timed; save(rows) after each case. Raises SystemExit if one of
    ours is wrong.
    """
    ready, rows, failed = list(cases(device, dtype)), [], []
    for case in ready:
        for name, body in case.bodies.items():
            try:
                ratio = check(case, body, device, dtype)
            except Exception as error:
                # a library that refuses: said below, and only ours must run
                print(
                    f"{case.op} {case.name} {name} fails: {type(error).__name__}: {str(error).strip()[:300]}"
                )
                ratio = float("inf")
            if not ratio <= 1:
                failed.append(
                    (
                        name == case.ours,
                        f"{case.op} {case.name} {name}: error is {ratio:.2f} of its budget",
                    )
                )
            if ratio < float("inf"):
                rows.append(
                    {
                        "op": case.op,
                        "case": case.name,
                        "body": name,
                        "error_over_budget": round(ratio, 3),
                    }
                )
    _drawn.cache_clear(), _weight.cache_clear()
    for _, line in failed:
        print(line)
    if any(ours for ours, _ in failed):
        raise SystemExit("nothing is timed, as bodies of ours are wrong")
    worst = max(row["error_over_budget"] for row in rows)
    print(f"{len(rows)} bodies checked, the worst at {worst:.2f} of its budget")
    for case in ready:
        inputs = case.time()
        for row in [row for row in rows if (row["op"], row["case"]) == (case.op, case.name)]:
            try:
                time_row(row, case, inputs, timer)
            except Exception as error:
                # at its true size; the others' times are not lost by it
                print(
                    f"{case.op} {case.name} {row['body']} fails: {type(error).__name__}: {str(error).strip()[:300]}"
                )
                rows.remove(row)
        del inputs
        save([row for row in rows if "ms" in row])
        _drawn.cache_clear(), _weight.cache_clear()
    return ready, rows


def time_row(row, case, inputs, timer):
    body = case.bodies[row["body"]]
    row["ms"], row["timed"] = timer(lambda: run_whole(body, inputs))
    row["bytes"], row["flops"] = case.bytes, case.flops


def report(ready, rows, bandwidth, rate):
    """Prints the table: ms, share of the ceiling, and how often faster ours is than the others, with the target."""
    print(
        f"\n{'op':<17} {'case':<28} {'body':<10} {'ms':>8} {'share':>6}   the others' time over ours, wanted"
    )
    for case in ready:
        of_case = {r["body"]: r for r in rows if (r["op"], r["case"]) == (case.op, case.name)}
        for name, row in of_case.items():
            ceiling = rate if case.flops else bandwidth
            work = case.flops or case.bytes
            row["share"] = round(work / row["ms"] * 1e3 / ceiling, 3) if ceiling and work else None
            text = ""
            if name == case.ours:
                # An eager call's gaps are no work of the op: it is compared with calls alone, a graph with graphs.
                others = {
                    other: r["ms"]
                    for other, r in of_case.items()
                    if other != name and r["timed"] == row["timed"]
                }
                row["speedups"] = {other: round(ms / row["ms"], 2) for other, ms in others.items()}
                parts = [
                    f"{other} {ratio}"
                    + (f" (>= {case.targets[other]})" if other in case.targets else "")
                    for other, ratio in row["speedups"].items()
                ]
                row["met"] = all(
                    row["speedups"].get(other, 0) >= goal
                    for other, goal in case.targets.items()
                    if other in others or other not in of_case
                )
                row["met"] &= not (
                    case.share and row["share"] is not None and row["share"] < case.share
                )
                text = ", ".join(parts) + (
                    f", share >= {case.share}" if case.share and row["share"] else ""
                )
                text += "" if row["met"] else "   MISSED"
            share = "" if row["share"] is None else f"{row['share']:.2f}"
            print(f"{case.op:<17} {case.name:<28} {name:<10} {row['ms']:8.3f} {share:>6}   {text}")


def time_tiles(deadline):
    """Times every candidate tile of masked_attention at head dim 128 on the query pass; prints ms, best first."""
    from iomm.kernels.triton_ops import tiles

    arch = 90 if torch.cuda.get_device_capability() >= (9, 0) else 80
    case = next(iter(cases("cuda", torch.bfloat16)))
    inputs = case.time()
    for kernel in ("forward", "queries", "keys"):
        key = arch, kernel, 128
        kept, found = tiles.CANDIDATES[key], []
        for tile in kept:
            if time.monotonic() < deadline:
                tiles.CANDIDATES[key] = [tile]
                found.append(
                    (median_gpu(lambda: run_whole(case.bodies["triton"], inputs))[0], tile)
                )
        tiles.CANDIDATES[key] = kept
        found.sort(key=lambda pair: pair[0])
        print(f"tiles of {kernel}: " + "; ".join(f"{ms:.3f} ms {tile}" for ms, tile in found))


def pytest_generate_tests(metafunc):
    """Rows of pytest-benchmark: one per op, size and body."""
    device, dtype = (
        ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    )
    rows = [(case, body, device, dtype) for case in cases(device, dtype) for body in case.bodies]
    metafunc.parametrize(
        "case, body, device, dtype",
        rows,
        ids=[f"{case.op}-{case.name}-{body}" for case, body, *_ in rows],
    )


def test_body(case, body, device, dtype, benchmark):
    run, inputs = case.bodies[body], case.time()
    assert check(case, run, device, dtype) <= 1, "wrong: not timed"

    def whole():
        run_whole(run, inputs)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark(whole)


def facts_of(threads):
    """What a number depends on."""
    return machine() | {
        "threads": threads,
        "load": os.getloadavg()[0],
        "libraries": native.build_facts()["built"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--gpu", action="store_true", help="build, check, sanitize and time on the GPU"
    )
    parser.add_argument(
        "--tiles",
        action="store_true",
        help="with --gpu: time all candidate tiles of masked_attention",
    )
    parser.add_argument(
        "--threads", type=int, help="of the CPU's bodies; 1 where others share the machine"
    )
    parser.add_argument("--cuda-ops-once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    begun = time.monotonic()
    if args.threads:
        torch.set_num_threads(args.threads)
    if (args.gpu or args.cuda_ops_once) and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: leave out --gpu")
    if args.cuda_ops_once:
        return cuda_ops_once()
    facts = {"device": "cuda" if args.gpu else "cpu", "machine": facts_of(torch.get_num_threads())}
    target = (
        ROOT / "benchmarks" / "results" / f"ops-{facts['device']}-{facts['machine']['date']}.json"
    )

    def save(rows):
        target.parent.mkdir(exist_ok=True)
        target.write_text(
            json.dumps(
                facts | {"wall_s": round(time.monotonic() - begun, 1), "rows": rows}, indent=1
            )
            + "\n"
        )

    if args.gpu:
        build()
        facts["sanitizer"] = sanitize()
        bandwidth, rate = ceilings()
        facts |= {
            "machine": facts_of(torch.get_num_threads()),
            "copy_bytes_per_s": bandwidth,
            "product_flop_per_s": rate,
        }
        print(f"copy {bandwidth / 1e12:.2f} TB/s, bf16 product {rate / 1e12:.0f} TFLOP/s")
        ready, rows = measure("cuda", torch.bfloat16, median_gpu, save)
    else:
        bandwidth = rate = 0
        ready, rows = measure("cpu", torch.float32, median_cpu, save)
    report(ready, rows, bandwidth, rate)
    if args.gpu and args.tiles:
        time_tiles(begun + LIMIT_S - 30)
    save(rows)
    print(f"\n{time.monotonic() - begun:.0f} s; written to {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
