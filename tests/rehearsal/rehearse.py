"""Run the engine on a pretended CUDA device, and report what the host waits for.

    python tests/rehearsal/rehearse.py [CASE ...] [KEY=VALUE ...]  # waits by place
    python tests/rehearsal/rehearse.py --record [CASE ...]         # rewrite host_waits.json
    python tests/rehearsal/rehearse.py --report FILE [CASE ...]    # for the tests, as JSON

The first form prints every wait of one step with the line numbers of the frames around it. Waits
of "micro-batch" occur in each micro-batch, those of "step" once more per step. Cases "full-..." are
the published configs at full size (full_size.py): their memory and launches are printed as well,
and --record writes these to benchmarks/lib/counts.json.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import full_size

ROOT = Path(__file__).resolve().parents[2]
HOST_WAITS = Path(__file__).with_name("host_waits.json")
# Micro-batches in a step. The waits of step 2 count, since step 1 allocates.
ACCUMULATION, COUNTED = 2, 2
COMMON = (
    "data.num_images=64",
    "data.pairs=shapes",
    "data.num_pairs=32",
    "data.heldout=8",
    "data.threads=1",
    "train.data=mix",
    "train.noise_draws=1",
    "train.steps=3",
    "train.micro_batch=4",
    "train.threads=1",
    "train.timeout_s=200",
    "precision=bf16",
    "checkpoint.background=false",
    "evaluate.every_steps=0",
    # Buckets as small as the model, so that there are several.
    "zero.reduce_bucket_size=100000",
    "zero.prefetch_bucket_size=100000",
)
ALL = (0, 1, 2, 3)
# As iomm-b-512.yaml has it: the VAE runs in the step, and ZeRO-3 shards the parameters.

ZERO_3 = ("zero.stage=3", "data.latents=null", "train.compile=false")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A run, by its config keys and what is watched."""

    keys: tuple[str, ...]
    ranks: int = 1
    slow: bool = False
    # Config that runs at full size, without values (full_size.py). Empty: the demo, with values.
    config: str = ""
    # Steps that are watched; 0 is all that precedes step 1.
    watched: tuple[int, ...] = (COUNTED,)
    # Last step; 0: the run trains to its end and saves a checkpoint.
    last_step: int = 0
    # Step in which faults are planted: a read of the loss in both micro-batches, and a tensor on
    # the wrong device in the second one.
    faults_in: int = 0
    # Plants another fault, before the start.
    plant: Callable[[], None] | None = None

    @property
    def compiled(self) -> bool:
        return "train.compile=true" in self.keys


CASES = {
    "zero-3": Case(keys=ZERO_3),
    # As demo.yaml has it, with images encoded in advance.
    "zero-0": Case(keys=("zero.stage=0", "train.compile=false"), watched=(COUNTED, 3), faults_in=3),
    "two-ranks": Case(keys=ZERO_3, ranks=2, last_step=2),
    "compiled": Case(
        keys=(*ZERO_3, "data.latents=memory", "train.compile=true"), watched=(), last_step=1
    ),
    "overlap": Case(keys=(*ZERO_3, "train.overlap=true"), watched=ALL, slow=True),
    "zero-2": Case(
        keys=(
            *("zero.stage=2", "train.compile=false", "optim.kind=adamw", "optim.lr=1e-3"),
            *("train.data=pair", "data.latents=null", "align.weight=0"),
            *("adapter.kind=none", "adapter.conditions=all", "adapter.connector_layers=1"),
        ),
        watched=ALL,
        slow=True,
    ),
    "zero-1": Case(
        keys=(
            *("zero.stage=1", "train.compile=false", "data.latents=null", "guard.skip_spikes=true"),
            *("data.flip=true", "data.crop=random", "adapter.attention=bidirectional"),
            *("mask.count=fixed", "mask.positions=compact", "model.vae_sample=true"),
        ),
        watched=ALL,
        slow=True,
    ),
    "recompute": Case(keys=(*ZERO_3, "train.recompute=2", "precision=fp8"), watched=ALL, slow=True),
    "recompute-compiled": Case(
        keys=(*ZERO_3, "train.recompute=2", "precision=fp8", "train.compile=true"),
        watched=(),
        last_step=2,
        slow=True,
    ),
    "evaluation": Case(
        keys=(
            *(*ZERO_3, "evaluate.every_steps=2", "evaluate.steps=2", "checkpoint.every_steps=1"),
            "checkpoint.background=true",
        ),
        watched=ALL,
        slow=True,
    ),
}

FULL_SIZE = []
for size in "b", "l", "xl":
    full = Case(keys=(), config=f"iomm-{size}-512", slow=True)
    eager, compiled = f"full-{size}", f"full-{size}-compiled"
    # DeepSpeed records the order of modules in the first step, which takes more waits.
    CASES[eager] = dataclasses.replace(full, keys=("train.compile=false",), last_step=COUNTED)
    CASES[compiled] = dataclasses.replace(
        full, keys=("train.compile=true",), watched=(), last_step=1
    )
    FULL_SIZE += [eager, compiled]
CASES["full-b-planted"] = dataclasses.replace(
    CASES["full-b"], watched=(), last_step=1, plant=full_size.keep_frozen_inputs
)

# Cases whose waits are in host_waits.json.
RECORDED = ["zero-3", "zero-0", "two-ranks"]


class Over(Exception):
    """The run has reached the last step of its case."""


def start() -> None:
    """Pretend the device, and import what a run imports."""
    sys.path[:0] = [str(ROOT / "tests/helpers")]
    import pretended_cuda

    pretended_cuda.install()
    import torch

    torch.set_num_threads(1)
    from forked_ranks import MODULES

    # DeepSpeed imports the last one, and Inductor with it, when it is initialised.
    for name in (*MODULES, "deepspeed.runtime.zero.muon.muon_optimizer"):
        __import__(name)
    from iomm.config import PRESETS
    from iomm.engine.data import decode

    # A first, a middle and a last block.
    PRESETS["demo"] = dataclasses.replace(PRESETS["demo"], num_blocks=3)
    # DALI's own kernels need a GPU.
    decode.fn = None


def run(folder: Path, case: Case, rank: int = 0, port: int = 0) -> dict:
    """Run engine/launch.py without its last samples, and return what was seen.

    Returns:
        code: its exit code, None if it was ended after case.last_step.
        error: of a planted fault.
        losses: of this rank, per step.
        waits: [step, micro-batch, place, what, frames] each.
        races: {text: number}.
        calls: watched calls of ops on the device.
        full_size: what full_size.Recorder saw, or None.
        graphs, breaks: of torch.compile.
    """
    import pretended_cuda
    import torch
    from torch._dynamo.utils import counters

    from iomm.engine import launch, loop
    from iomm.engine.parallel.zero import Sharded
    from iomm.engine.resilience.watchdog import Watchdog

    if case.ranks > 1:
        # Each as if alone on its machine, since there is one device.
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK="0",
            WORLD_SIZE=str(case.ranks),
            LOCAL_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    keys = given_once(f"run.dir={folder}", *(full_size.KEYS if case.config else COMMON), *case.keys)
    settings = dict(key.split("=", 1) for key in keys)
    batch = int(settings["train.micro_batch"]) * ACCUMULATION * case.ranks
    if case.config:
        keys += [f"--config={case.config}", f"data.num_images={max(64, batch)}"]
        recorder = full_size.Recorder(compiled=case.compiled)
        recorder.install()
    else:
        recorder = None
        use_backend("aot_eager")
    if case.plant is not None:
        case.plant()
    position, waits, losses, watching = [0, 0], [], [], contextlib.ExitStack()
    watch = pretended_cuda.Watch()
    heartbeat, named_each, train_step = Watchdog.heartbeat, loop.named_each, loop.train_step
    backward = Sharded.backward

    def take_waits():
        waits.extend([*position, *wait] for wait in watch.waits)
        watch.waits.clear()

    def on_heartbeat(self, step):
        take_waits()
        position[:] = step, 0
        watching.close()
        if step - 1 == case.last_step > 0:
            raise Over
        if step in case.watched:
            watching.enter_context(watch)
        heartbeat(self, step)

    def each_micro_batch(name, batches):
        for batch in named_each(name, batches):
            if recorder is not None:
                recorder.start_micro_batch()
            yield batch
            if recorder is not None:
                recorder.end_micro_batch()
            take_waits()
            position[1] += 1

    def on_train_step(sharded, *args):
        if recorder is not None:
            recorder.start_step(sharded)
        result = train_step(sharded, *args)
        losses.append(result.loss)
        return result

    def on_backward(self, loss):
        if position[0] == case.faults_in:
            loss.item()
            if position[1] == 1:
                loss = loss + torch.ones(1)
        backward(self, loss)

    Watchdog.heartbeat, loop.named_each, loop.train_step = (
        on_heartbeat,
        each_micro_batch,
        on_train_step,
    )
    Sharded.backward = on_backward
    launch.finish = lambda *_: take_waits()
    code = error = None
    if 0 in case.watched:
        watching.enter_context(watch)
    try:
        with watching:
            code = launch.main([*keys, f"train.global_batch={batch}"])
    except Over:
        pass
    except RuntimeError as raised:
        if not case.faults_in:
            raise
        error = str(raised)
    return {
        "code": code,
        "error": error,
        "losses": [loss.item() for loss in losses],
        "waits": waits,
        "races": dict(watch.races),
        "calls": watch.calls,
        "full_size": recorder.report() if recorder is not None else None,
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": dict(counters["graph_break"]),
    }


def given_once(*keys: str) -> list[str]:
    """Return section.key=value words, of each key only the last. The engine refuses repetitions."""
    return list({word.partition("=")[0]: word for word in keys}.values())


def use_backend(name: str) -> None:
    """Let torch.compile use a backend that needs no GPU."""
    import torch

    compile_function, compile_module = torch.compile, torch.nn.Module.compile

    def compile_(function=None, **kwargs):
        return compile_function(function, **{**kwargs, "backend": name})

    torch.compile = compile_
    torch.nn.Module.compile = lambda self, **kwargs: compile_module(
        self, **{**kwargs, "backend": name}
    )


def prefetcher_races(without: str | None = None) -> dict:
    """Return the races of engine/parallel/prefetch.py, `without` one of its calls."""
    import pretended_cuda
    import torch

    from iomm.engine.data.source import Batch
    from iomm.engine.parallel.prefetch import Prefetcher

    device = torch.device("cuda", 0)

    class Prepared:
        def __init__(self, pixels, *_):
            self.noisy = pixels + 1

        def tensors(self):
            return [] if without == "record_stream" else [self.noisy]

    def batches():
        for _ in range(3):
            yield Batch(torch.zeros(1), torch.zeros(1), torch.ones(8, device=device), None, 0.0)

    if without == "wait_stream":
        pretended_cuda.Stream.wait_stream = lambda *_: None
    with pretended_cuda.Watch() as watch:
        prefetcher = Prefetcher(batches(), Prepared, device)
        for batch in prefetcher:
            batch.prepared.noisy.square()
            # Its memory goes back to the side stream, where it may be used again at once.
            batch.prepared = None
            prefetcher.fetch()
    return {"races": list(watch.races)}


def toy_waits() -> dict:
    """Return what the host waits for in calls that wait, after calls that do not."""
    import pretended_cuda
    import torch

    x = torch.arange(6.0, device="cuda")
    pinned, pageable = torch.ones(6).pin_memory(), torch.ones(6)
    counts = torch.tensor([1, 2], device="cuda")
    free, waiting = pretended_cuda.Watch(), pretended_cuda.Watch()
    with free:
        x.copy_(pinned, non_blocking=True)
        pinned.copy_(x, non_blocking=True)
        x.to("cpu", non_blocking=True)
        counts.repeat_interleave(counts, output_size=3)
        x[counts]
    with waiting:
        x.copy_(pageable, non_blocking=True)
        x.to("cpu")
        torch.tensor([1.0], device="cuda")
        x[x > 2]
        counts.repeat_interleave(counts)
        x.sum().tolist()
        x.add(1)
        event = torch.cuda.current_stream().record_event()
        event.synchronize()
        # Both are known to be over.
        event.synchronize()
        torch.cuda.current_stream().synchronize()
        x.add(1)
        torch.cuda.synchronize()
    return {"free": [w.what for w in free.waits], "waits": [w.what for w in waiting.waits]}


def mixed_devices() -> dict:
    """Return the error of a matrix product of tensors on two devices."""
    import torch

    try:
        torch.ones(2, 2, device="cuda") @ torch.ones(2, 2)
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": None}


def rms_norm() -> dict:
    """Return whether the gradients of F.rms_norm are those of finite differences."""
    import torch

    x, weight = (torch.rand(shape, dtype=torch.float64) for shape in ((3, 5, 8), (5, 8)))
    inputs = [tensor.cuda().requires_grad_() for tensor in (x, weight)]
    with torch.random.fork_rng(devices=[]):
        passed = torch.autograd.gradcheck(
            lambda x, weight: torch.nn.functional.rms_norm(x, weight.shape, weight), inputs
        )
    return {"passed": passed}


TOYS = {
    "prefetcher": prefetcher_races,
    "prefetcher without wait_stream": lambda: prefetcher_races("wait_stream"),
    "prefetcher without record_stream": lambda: prefetcher_races("record_stream"),
    "waits": toy_waits,
    "mixed devices": mixed_devices,
    "rms norm": rms_norm,
}
# Of the slow lane.
SLOW_TOYS = {"spill and break": full_size.spill_and_break}


def host_waits(report: dict, step: int = COUNTED) -> dict[str, dict[str, int]]:
    """Return the waits of a step as {"micro-batch" or "step": {"place: what": number}}."""
    total, first = Counter(), Counter()
    for when, micro_batch, place, what, _ in report["waits"]:
        if when == step:
            total[f"{place}: {what}"] += 1
            first[f"{place}: {what}"] += micro_batch == 0
    rest = {wait: number - ACCUMULATION * first[wait] for wait, number in total.items()}
    return {
        name: {wait: number for wait, number in sorted(counts.items()) if number}
        for name, counts in (("micro-batch", first), ("step", rest))
    }


def forked(answers: list[Path], work) -> list[dict]:
    """Return [work(0), work(1), ...] of one forked process per answer, run at the same time.

    An error is returned as {"failed": text}.
    """
    processes = []
    for rank, path in enumerate(answers):
        process = os.fork()
        if process:
            processes.append(process)
            continue
        try:
            answer = work(rank)
        except BaseException:
            answer = {"failed": traceback.format_exc()}
        path.write_text(json.dumps(answer))
        sys.stdout.flush()
        sys.stderr.flush()
        # DeepSpeed's engines take seconds to be destroyed.
        os._exit(0)
    for process in processes:
        os.waitpid(process, 0)
    return [json.loads(path.read_text()) for path in answers]


def reports(names: list[str], *keys: str, watch: bool = True) -> dict[str, list[dict]]:
    """Return {case: reports of its ranks}, without waits unless `watch`.

    Cases share the rendered and indexed data.
    """
    from iomm.engine.parallel.cpu_ranks import free_port

    found = {}
    with tempfile.TemporaryDirectory(prefix="iomm-rehearsal-") as folder:
        folder = Path(folder)
        for name in names:
            case = CASES[name]
            case = dataclasses.replace(
                case,
                keys=tuple(given_once(*case.keys, *keys)),
            )
            if not watch:
                last_step = 1 if case.config else case.last_step
                case = dataclasses.replace(case, watched=(), last_step=last_step)
            answers = [folder / f"{name}-{rank}.json" for rank in range(case.ranks)]
            port = free_port()
            found[name] = forked(
                answers,
                lambda rank, name=name, case=case, port=port: run(folder / name, case, rank, port),
            )
    return found


def record(versions: dict[str, str], found: dict[str, dict]) -> None:
    """Write the waits of cases to host_waits.json, and counts of full size to counts.json."""
    for name, report in found.items():
        if "failed" in report:
            raise SystemExit(f"{name}: {report['failed']}")
    recorded = json.loads(HOST_WAITS.read_text())
    waits = {name: host_waits(report) for name, report in found.items() if CASES[name].watched}
    recorded |= {name: versions[name] for name in ("torch", "deepspeed")} | waits
    HOST_WAITS.write_text(json.dumps(recorded, indent=1) + "\n")
    counted = {
        name: full_size.counts(report["full_size"])
        for name, report in found.items()
        if report["full_size"]
    }
    if counted:
        full_size.record(versions, counted)


def print_report(report: dict) -> None:
    """Print what was seen in a run for the terminal."""
    if "failed" in report:
        print(report["failed"])
        return
    if report["full_size"]:
        full_size.print_report(report["full_size"])
    if report["calls"]:
        print_waits(report)


def print_waits(report: dict) -> None:
    """Print every wait of the counted step with its frames, the most frequent first."""
    counts = Counter(
        "\n      ".join([what, *frames[:4]])
        for step, _, _, what, frames in report["waits"]
        if step == COUNTED
    )
    for text, number in counts.most_common():
        print(f"{number:4d}  {text}")
    for name, waits in host_waits(report).items():
        print(f"\nper {name}: {sum(waits.values())}")
        for wait, number in waits.items():
            print(f"{number:4d}  {wait}")
    print(f"\nraces: {report['races'] or 'none'}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help=f"rewrite {HOST_WAITS.name}")
    parser.add_argument("--report", metavar="FILE", help="write the reports of cases as JSON")
    parser.add_argument(
        "--unwatched", action="store_true", help="record no waits, which is faster at full size"
    )
    parser.add_argument("words", nargs="*", metavar="CASE | KEY=VALUE", help=", ".join(CASES))
    args = parser.parse_intermixed_args()
    keys = [word for word in args.words if "=" in word]
    names = [word for word in args.words if "=" not in word]
    if unknown := set(names) - CASES.keys() - SLOW_TOYS.keys():
        parser.error(f"no case {', '.join(unknown)}; choose from {', '.join(CASES)}")
    start()
    versions = {
        name: version(name)
        for name in ("torch", "deepspeed", "triton")
        if importlib.util.find_spec(name) is not None
    }
    if args.record:
        found = {name: ranks[0] for name, ranks in reports(names or RECORDED).items()}
        record(versions, found)
    elif args.report:
        toys = {name: SLOW_TOYS[name] for name in names if name in SLOW_TOYS} if names else TOYS
        cases = [name for name in names if name in CASES]
        if not names:
            cases = [name for name, case in CASES.items() if not case.slow]
        found = reports(cases, *keys)
        with tempfile.TemporaryDirectory() as folder:
            for name, toy in toys.items():
                found[name] = forked([Path(folder) / "answer"], lambda _, toy=toy: toy())
        Path(args.report).write_text(json.dumps(versions | found))
    else:
        for name, ranks in reports(names or ["zero-3"], *keys, watch=not args.unwatched).items():
            for report in ranks:
                print(f"\n{name} {' '.join(keys)}\n")
                print_report(report)


if __name__ == "__main__":
    main()
