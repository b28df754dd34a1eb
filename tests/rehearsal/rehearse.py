"""Run the engine on a pretended CUDA device, and report what the host waits for.

    python tests/rehearsal/rehearse.py [CASE] [KEY=VALUE ...]      # one case, waits by place
    python tests/rehearsal/rehearse.py --record                    # rewrite host_waits.json

The first form prints every wait of one step with the line numbers of the frames around it. Waits
of "micro-batch" occur in each micro-batch, those of "step" once more per step.
"""

import json
import os
import sys
import tempfile
import traceback
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOST_WAITS = Path(__file__).with_name("host_waits.json")
# Micro-batches in a step, steps in a run, and the step whose waits count: the first one allocates.
ACCUMULATION, STEPS, COUNTED = 2, 3, 2
COMMON = (
    "data.num_images=64",
    "data.pairs=shapes",
    "data.num_pairs=32",
    "data.heldout=8",
    "data.threads=1",
    "train.data=mix",
    "train.noise_draws=1",
    f"train.steps={STEPS}",
    "train.timeout_s=120",
    "precision=bf16",
    "checkpoint.background=false",
    "evaluate.every_steps=0",
    "zero.reduce_bucket_size=1000000",
)
CASES = {
    # As iomm-b-512.yaml has it: the VAE runs in the step, and ZeRO-3 shards the parameters.
    "zero-3": ("zero.stage=3", "data.latents=null", "train.compile=false"),
    # As demo.yaml has it, with images encoded in advance.
    "zero-0": ("zero.stage=0", "train.compile=false"),
    "compiled": ("zero.stage=3", "data.latents=null", "train.compile=true"),
}


def start() -> None:
    """Pretend the device, and import what a run imports."""
    sys.path[:0] = [str(ROOT / "tests/helpers")]
    import pretended_cuda

    pretended_cuda.install()
    import torch

    torch.set_num_threads(1)
    from forked_ranks import MODULES

    for name in MODULES:
        __import__(name)
    from iomm.engine.data import decode

    # DALI's own kernels need a GPU.
    decode.fn = None


def run(folder, *keys: str, ranks: int = 1, watched: bool = True) -> dict:
    """Run engine/launch.py without its last samples, and return what was seen.

    Returns:
        code: its exit code. waits: [step, micro-batch, place, what, frames] each.
        races: {text: number}. calls: calls of ops on the device. breaks: graph breaks of
        torch.compile.
    """
    import pretended_cuda
    from torch._dynamo.utils import counters

    from iomm.engine import launch, loop
    from iomm.engine.resilience.watchdog import Watchdog

    position, waits = [0, 0], []
    watch = pretended_cuda.Watch() if watched else None
    heartbeat, named_each, finish = Watchdog.heartbeat, loop.named_each, launch.finish

    def take_waits():
        if watch is not None:
            waits.extend([*position, *wait] for wait in watch.waits)
            watch.waits.clear()

    def on_heartbeat(self, number):
        take_waits()
        position[:] = number, 0
        heartbeat(self, number)

    def each_micro_batch(name, batches):
        for batch in named_each(name, batches):
            yield batch
            take_waits()
            position[1] += 1

    Watchdog.heartbeat, loop.named_each = on_heartbeat, each_micro_batch
    launch.finish = lambda *_: take_waits()
    try:
        micro_batch = 4
        with watch or nullcontext():
            code = launch.main(
                [
                    f"run.dir={folder}/run",
                    *COMMON,
                    f"train.micro_batch={micro_batch}",
                    f"train.global_batch={micro_batch * ACCUMULATION * ranks}",
                    *keys,
                ]
            )
    finally:
        Watchdog.heartbeat, loop.named_each, launch.finish = heartbeat, named_each, finish
    rows = [json.loads(line) for line in (Path(folder) / "run/log.jsonl").open()]
    return {
        "code": code,
        "losses": [row["loss"] for row in rows],
        "waits": waits,
        "races": dict(watch.races) if watch else {},
        "calls": watch.calls if watch else 0,
        "breaks": dict(counters["graph_break"]),
        "graphs": counters["stats"]["unique_graphs"],
    }


def host_waits(report: dict) -> dict[str, dict[str, int]]:
    """Return the waits of the counted step as {"micro-batch" or "step": {"place: what": n}}."""
    total, first = Counter(), Counter()
    for step, micro_batch, place, what, _ in report["waits"]:
        if step == COUNTED:
            total[f"{place}: {what}"] += 1
            first[f"{place}: {what}"] += micro_batch == 0
    rest = {wait: number - ACCUMULATION * first[wait] for wait, number in total.items()}
    return {
        name: {wait: number for wait, number in sorted(counts.items()) if number}
        for name, counts in (("micro-batch", first), ("step", rest))
    }


def forked(work, *arguments, **options):
    """Return work(...) of a forked process, whose memory and modules are its own."""
    with tempfile.TemporaryDirectory(prefix="iomm-rehearsal-") as folder:
        answer = Path(folder) / "answer.json"
        process = os.fork()
        if not process:
            code = 1
            try:
                answer.write_text(json.dumps(work(folder, *arguments, **options)))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(process, 0)
        if status:
            raise RuntimeError(f"the rehearsal ended with status {status}")
        return json.loads(answer.read_text())


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


def main(arguments: list[str]) -> None:
    start()
    if arguments == ["--record"]:
        import deepspeed
        import torch

        record = {"torch": torch.__version__, "deepspeed": deepspeed.__version__}
        for name in ("zero-3", "zero-0"):
            record[name] = host_waits(forked(run, *CASES[name]))
        HOST_WAITS.write_text(json.dumps(record, indent=1) + "\n")
        return
    name = arguments.pop(0) if arguments and arguments[0] in CASES else "zero-3"
    print_waits(forked(run, *CASES[name], *arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
