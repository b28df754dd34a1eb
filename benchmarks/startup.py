"""What a start costs: python benchmarks/startup.py [--config demo-cpu] [section.key=value ...]

In a fresh interpreter, in the order of a run: the imports of engine/launch.py, joining the ranks, launch.build (data, index,
frozen parts, ZeRO-3), the first and the second step. Medians over --runs interpreters. The shapes world and its index are
made before, by a run that does not count. Writes benchmarks/results/startup-<device>-<date>.json.
"""

import sys

from iomm.checkout import enter

ROOT = enter(__file__)

import argparse
import json
import statistics
import subprocess
import tempfile
import time

from benchmarks.report import above_0, command
from iomm.config import InputError
from iomm.engine.parallel import ranks as group


def start(config_name, overrides):
    """Times one start in this interpreter; prints the seconds as JSON."""
    clock, found = time.perf_counter(), {}

    def done(what):
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="demo-cpu")
    parser.add_argument("--runs", type=above_0(int), default=5)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    if args.once:
        return start(args.config, args.overrides)
    from iomm.engine.observe.doctor import machine

    runs = []
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            __file__,
            "--once",
            "--config",
            args.config,
            *args.overrides,
            f"run.dir={folder}/run",
        ]
        for _ in range(args.runs + 1):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
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
    path = (
        ROOT
        / "benchmarks/results"
        / f"startup-{'cuda' if facts['gpu'] else 'cpu'}-{facts['date']}.json"
    )
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(
        json.dumps(
            {key: value for key, value in result.items() if key not in ("machine", "runs")},
            indent=1,
        )
    )
    print(path)


if __name__ == "__main__":
    sys.exit(command(main))
