"""Check every backend of every op, then time it.

    python benchmarks/ops.py                    the C++ backends and PyTorch's formulas on this CPU,
                                                under a minute
    python benchmarks/ops.py --gpu              builds, checks every backend in bf16 against
                                                float64, runs compute-sanitizer on the CUDA ops,
                                                times, prints the targets; under 8 minutes
    python benchmarks/ops.py --gpu --tiles      also times the other tiles of masked_attention
    pytest benchmarks/ops.py --benchmark-only   the same backends as rows of pytest-benchmark, to
                                                compare two checkouts

Nothing is timed if a check fails. Times are medians on random data. On a GPU, CUDA graphs are
replayed and the cache is swept between two runs. Results are written to
benchmarks/results/ops-<device>-<date>.json with machine, versions and commit.
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
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.lib.op_cases import Case, cases, token_cases
from iomm.engine.observe.doctor import machine
from iomm.kernels import native

if TYPE_CHECKING:
    import pytest

LIMIT_S = 480
# Runs a function repeatedly; returns (median ms, how it was timed).
Timer = Callable[[Callable], tuple[float, str]]


def leaves_of(inputs: list) -> list[Tensor]:
    """Return the inputs that require a gradient."""
    return [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]


def run_whole(backend: Callable, inputs: list, seed: int = 0) -> list[Tensor]:
    """Return the outputs of backend(*inputs), then the gradients of the inputs that require one.

    seed: seed of the outputs' gradients, which are random.
    """
    out = backend(*inputs)
    outputs = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if x is not None]
    leaves = leaves_of(inputs)
    if not leaves:
        return outputs
    weights = [weight_of(x, seed) for x in outputs]
    return outputs + list(torch.autograd.grad(outputs, leaves, weights, materialize_grads=True))


@functools.cache
def _drawn(shape: torch.Size, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@functools.cache
def _weight(shape: torch.Size, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    return _drawn(shape, seed).to(device, dtype)


def weight_of(x: Tensor, seed: int) -> Tensor:
    """Return a fixed random tensor like x."""
    return _weight(x.shape, x.dtype, x.device, seed)


def check(case: Case, backend: Callable, device: str, dtype: torch.dtype) -> float:
    """Return a backend's largest error over the budget; NaN counts as infinite.

    The budget is twice the error of the reference in the same dtype, plus one ulp.
    """
    exact_inputs, dtype = case.check(), case.dtype or dtype

    # Called for each run, as the step of an optimizer works in place.
    def cast() -> list:
        return [
            x.detach()
            .to(device, dtype if x.dtype == torch.float64 else x.dtype, copy=True)
            .requires_grad_(x.requires_grad)
            if isinstance(x, Tensor)
            else x
            for x in exact_inputs
        ]

    got, same_dtype = run_whole(backend, cast()), run_whole(case.reference, cast())
    if case.exact:
        equal = all(torch.equal(a, b) for a, b in zip(got, same_dtype, strict=True))
        return 0.0 if equal else float("inf")
    worst = 0.0
    for mine, theirs, expected in zip(
        got, same_dtype, run_whole(case.reference, exact_inputs), strict=True
    ):
        if expected.numel():
            mine, theirs, expected = (x.detach().double().cpu() for x in (mine, theirs, expected))
            budget = (
                2 * (theirs - expected).abs().max() + torch.finfo(dtype).eps * expected.abs().max()
            )
            ratio = ((mine - expected).abs().max() / budget).item()
            worst = max(worst, ratio) if ratio == ratio else float("inf")
    return worst


@functools.cache
def sweep() -> Tensor:
    """Return a buffer larger than any cache, to be filled between two timings."""
    return torch.empty(2**28, dtype=torch.uint8, device="cuda")


def median_gpu(fn: Callable, budget_s: float = 0.3) -> tuple[float, str]:
    """Return (median ms of fn(), how it was timed).

    Timed is a CUDA graph ("graph"), or the calls themselves if they cannot be captured ("calls").
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.synchronize()
    run, how = fn, "calls"
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # Kept alive because the graph writes into it.
            kept = fn()  # noqa: F841
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


def median_cpu(fn: Callable, budget_s: float = 0.25) -> tuple[float, str]:
    """Return (median ms of fn(), "calls")."""
    fn()
    times, begun = [], time.monotonic()
    while len(times) < 5 or (time.monotonic() - begun < budget_s and len(times) < 500):
        start = time.perf_counter()
        fn()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2], "calls"


def ceilings(
    device: str | torch.device = "cuda", dtype: torch.dtype = torch.bfloat16
) -> tuple[float, float]:
    """Measure the copy bandwidth in bytes/s and the rate of a matrix product in FLOP/s.

    The copy counts reads and writes. The product is of 8192^3, on a CPU of 2048^3.
    """
    cuda = torch.device(device).type == "cuda"
    timer, side = (median_gpu, 8192) if cuda else (median_cpu, 2048)
    source = torch.randn(2**29 if cuda else 2**26, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy_ms, _ = timer(lambda: target.copy_(source))
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product_ms, _ = timer(lambda: a @ b)
    return 2 * source.nbytes / copy_ms * 1e3, 2 * side**3 / product_ms * 1e3


def build() -> None:
    """Build the native extensions in place."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print((done.stdout + done.stderr).strip().splitlines()[-1])
    if done.returncode:
        raise SystemExit("the build failed. Run `python setup.py build_ext --inplace` to see why")
    native.load.cache_clear()


def sanitize() -> dict[str, str]:
    """Run compute-sanitizer on the CUDA ops at odd sizes and return {tool: verdict}.

    Its findings are printed, and do not end the benchmark.
    """
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


def cuda_ops_once() -> None:
    """Check the ops of csrc/ against the reference on the CPU, running few other kernels."""
    from iomm.kernels.philox import philox_compiled, philox_reference

    n = torch.tensor([0, 5, 2**40])
    for kind in ("uniform", "normal"):
        got = philox_compiled(kind, 7, 2, n.cuda(), 1003).cpu()
        torch.testing.assert_close(
            got, philox_reference(kind, 7, 2, n, 1003), rtol=3e-7, atol=1e-10
        )
    for dtype in (torch.bfloat16, torch.float32):
        for case in token_cases("cuda", dtype):
            if "cuda" in case.backends:
                inputs = [
                    x.to(dtype) if isinstance(x, Tensor) and x.dtype == torch.float64 else x
                    for x in case.check()
                ]
                moved = [x.cuda() if isinstance(x, Tensor) else x for x in inputs]
                tolerance = 0 if case.exact else torch.finfo(dtype).eps
                outputs = run_whole(case.backends["cuda"], moved)
                for got, expected in zip(outputs, run_whole(case.reference, inputs), strict=True):
                    torch.testing.assert_close(
                        got.cpu(), expected, rtol=tolerance, atol=tolerance and 1e-6
                    )
    torch.cuda.synchronize()


def failure(case: Case, name: str, error: Exception) -> str:
    """Return a line about a backend that raised an exception."""
    return f"{case.op} {case.name} {name} fails: {type(error).__name__}: {str(error).strip()[:300]}"


def measure(
    device: str, dtype: torch.dtype, timer: Timer, save: Callable[[list[dict]], None]
) -> tuple[list[Case], list[dict]]:
    """Check every backend of every case, then time them; return the cases and the rows.

    save(rows) is called after each case.

    Raises:
        SystemExit: if a backend of ours is wrong.
    """
    ready, rows, failed = list(cases(device, dtype)), [], []
    for case in ready:
        for name, backend in case.backends.items():
            try:
                ratio = check(case, backend, device, dtype)
            except Exception as error:
                # A library may refuse a case. It is reported, and only our backends must run.
                print(failure(case, name, error))
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
    _drawn.cache_clear()
    _weight.cache_clear()
    for _, line in failed:
        print(line)
    if any(ours for ours, _ in failed):
        raise SystemExit("nothing is timed because backends of ours are wrong")
    worst = max(row["error_over_budget"] for row in rows)
    print(f"{len(rows)} backends checked, the worst at {worst:.2f} of its budget")
    for case in ready:
        inputs = case.time()
        for row in [row for row in rows if (row["op"], row["case"]) == (case.op, case.name)]:
            try:
                time_row(row, case, inputs, timer)
            except Exception as error:
                # A backend may fail at the real size only; keep the times of the others.
                print(failure(case, row["body"], error))
                rows.remove(row)
        del inputs
        save([row for row in rows if "ms" in row])
        _drawn.cache_clear()
        _weight.cache_clear()
    return ready, rows


def time_row(row: dict, case: Case, inputs: list, timer: Timer) -> None:
    """Add the time of a backend to its row."""
    backend = case.backends[row["body"]]
    row["ms"], row["timed"] = timer(lambda: run_whole(backend, inputs))
    row["bytes"], row["flops"] = case.bytes, case.flops


def report(ready: list[Case], rows: list[dict], bandwidth: float, rate: float) -> None:
    """Print a table and add its figures to the rows.

    Columns: ms, share of the ceiling, and the other backends' times over ours with the targets.
    """
    print(
        f"\n{'op':<17} {'case':<28} {'backend':<10} {'ms':>8} {'share':>6}   "
        "the others' time over ours (target)"
    )
    for case in ready:
        of_case = {r["body"]: r for r in rows if (r["op"], r["case"]) == (case.op, case.name)}
        for name, row in of_case.items():
            ceiling = rate if case.flops else bandwidth
            work = case.flops or case.bytes
            row["share"] = round(work / row["ms"] * 1e3 / ceiling, 3) if ceiling and work else None
            text = ""
            if name == case.ours:
                # Calls are compared with calls and graphs with graphs, as an eager call has gaps
                # that are not work of the op.
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


def time_tiles(deadline: float) -> None:
    """Time every candidate tile of masked_attention at head dim 128 on the query pass.

    Prints ms, best first. deadline: no tile is started after this moment of time.monotonic().
    """
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
                    (median_gpu(lambda: run_whole(case.backends["triton"], inputs))[0], tile)
                )
        tiles.CANDIDATES[key] = kept
        found.sort(key=lambda pair: pair[0])
        print(f"tiles of {kernel}: " + "; ".join(f"{ms:.3f} ms {tile}" for ms, tile in found))


def pytest_generate_tests(metafunc: "pytest.Metafunc") -> None:
    """Generate a row of pytest-benchmark per op, size and backend."""
    device, dtype = (
        ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    )
    rows = [
        (case, backend, device, dtype) for case in cases(device, dtype) for backend in case.backends
    ]
    metafunc.parametrize(
        "case, backend, device, dtype",
        rows,
        ids=[f"{case.op}-{case.name}-{backend}" for case, backend, *_ in rows],
    )


def test_backend(
    case: Case, backend: str, device: str, dtype: torch.dtype, benchmark: Callable
) -> None:
    run, inputs = case.backends[backend], case.time()
    assert check(case, run, device, dtype) <= 1, "the backend is wrong and is not timed"

    def whole() -> None:
        run_whole(run, inputs)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark(whole)


def facts_of(threads: int) -> dict:
    """Return the machine, versions and load that a time depends on."""
    return machine() | {
        "threads": threads,
        "load": os.getloadavg()[0],
        "libraries": native.build_facts()["built"],
    }


def main() -> None:
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
        "--threads", type=int, help="CPU threads; use 1 if the machine is shared with other work"
    )
    parser.add_argument("--cuda-ops-once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    begun = time.monotonic()
    if args.threads:
        torch.set_num_threads(args.threads)
    if (args.gpu or args.cuda_ops_once) and not torch.cuda.is_available():
        raise SystemExit("no GPU here: omit --gpu")
    if args.cuda_ops_once:
        cuda_ops_once()
        return
    facts = {"device": "cuda" if args.gpu else "cpu", "machine": facts_of(torch.get_num_threads())}
    target = (
        ROOT / "benchmarks" / "results" / f"ops-{facts['device']}-{facts['machine']['date']}.json"
    )

    def save(rows: list[dict]) -> None:
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
