"""Runs trials of what a run survives at their full number and notes the counts.

    python tests/faults/survival.py all               every one
    python tests/faults/survival.py C1 F2             those of these promises
    python tests/faults/survival.py kill_chain 20     one, at a number of one's own

Writes benchmarks/results/survival.json: a row a trial, and under `trials` what was counted, with its own date, commit and
duration. What was noted before of other trials stays. A count of 0 in n trials bounds the rate at 3 / n with 95 % confidence.
Exits with 1 if a trial broke off; the others are run all the same.
"""

import contextlib
import datetime
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree
from pathlib import Path

from iomm.checkout import enter

ROOT = enter(__file__)
sys.path[1:1] = [str(ROOT / "tests"), str(ROOT / "tests/helpers")]

import torch
from faults import disk, real, trials

from benchmarks.micro import measure_saves
from iomm.engine.observe.doctor import cpu_name, git

RESULTS = ROOT / "benchmarks/results/survival.json"


def tests(*arguments):
    """A trial that is the tests which these arguments of pytest choose, slow ones too."""

    def run(folder):
        path = Path(folder) / "tests.xml"
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-m",
                "slow or not slow",
                f"--junitxml={path}",
                *arguments,
            ],
            cwd=ROOT,
            check=False,
        )
        suite = xml.etree.ElementTree.parse(path).getroot()[0]
        number = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
        return {"cases": number["tests"], "as_promised": 2 * number["tests"] - sum(number.values())}

    return run


def bounded_loss(folder, num_saves):
    """The demo's state saved so often; the intervals that its times ask for, with the loss at a fault and the stall."""
    found = measure_saves(folder, parameters=5.5e6, step_s=0.65, num_saves=num_saves)
    return {
        "saves": num_saves,
        "mib": found["bytes"] >> 20,
        "stall_s": round(found["stall_s"], 4),
        "commit_s": round(found["commit_s"], 2),
        **{
            f"on_{n}_gpus": f"{p['lost_gpu_hours']:.2g} GPU-h at a fault, {p['stall']:.4%} stall"
            for n, p in found["planned"].items()
        },
    }


# Name of the trial: what it is called in the report, the function, its full number (None: it knows by itself).
TRIALS = {
    "kill_chain": ("C1 a committed checkpoint is never lost", trials.kill_chain, 1000),
    "crash_points": ("C2 every crash point of a save is safe", disk.crash_points, None),
    "damages": ("C4 no damaged checkpoint is ever loaded", disk.damages, 300),
    "damaged_starts": ("C4 a start goes on before what is damaged", trials.damaged_starts, None),
    "bitwise_resumes": ("C5 resume is bitwise", trials.bitwise_resumes, 20),
    "world_sizes": ("C6 the world size may change", trials.world_sizes, None),
    "real_world_sizes": ("C6 the world size may change, ZeRO-3", real.real_world_sizes, None),
    "failing_disks": (
        "C9 a failing or full disk costs one save",
        tests("tests/engine/resilience/test_checkpoint.py", "-k", "costs_one_save"),
        None,
    ),
    "retention": ("C10 retention is safe", disk.retention, 300),
    "deaths": ("F1 a dead rank stops the job", trials.deaths, 40),
    "real_deaths": (
        "F1 a dead rank stops the job, ZeRO-3 through the launcher",
        real.real_deaths,
        10,
    ),
    "hangs": ("F2 a hang is found and explained", trials.hangs, 40),
    "false_alarms": ("F2 no false alarms", trials.false_alarms, 10_000),
    "requests_to_stop": ("F4 preemption loses nothing", trials.requests_to_stop, 50),
    "interrupted_starts": (
        "F6 no interrupted start blocks the next, ZeRO-3 through the launcher",
        real.interrupted_starts,
        20,
    ),
    "nonfinite": (
        "N1 non-finite values never reach weights, ZeRO-3 through the launcher",
        real.nonfinite,
        60,
    ),
    "hostile": (
        "S1 nothing that is loaded runs code",
        tests("tests/end_to_end/test_untrusted_files.py"),
        None,
    ),
    "mistakes": (
        "S3 mistakes in a config fail at the start",
        tests("tests/engine/test_config.py", "-k", "name_file_line_and_key"),
        None,
    ),
    "bounded_loss": ("O3 what a fault may cost is bounded", bounded_loss, 10),
}


def chosen(arguments):
    """Words of the command line -> [(trial, number)]. Raises SystemExit on a word that names nothing."""
    found = []
    for word in arguments:
        if word.isdigit() and found:
            found[-1] = found[-1][0], int(word)
            continue
        named = [
            name for name, (what, _, _) in TRIALS.items() if word in ("all", name, what.split()[0])
        ]
        if not named:
            raise SystemExit(
                f"{word} names no trial; there are: all, {', '.join(sorted({*TRIALS} | {t[0].split()[0] for t in TRIALS.values()}))}"
            )
        found += [(name, TRIALS[name][2]) for name in named]
    return found


def words(found):
    """Counts as one line."""
    found = found[0] if isinstance(found, tuple) else found
    if any(isinstance(value, dict) for value in found.values()):
        return "; ".join(f"{key}: {words(value)}" for key, value in found.items())
    return ", ".join(
        f"{key.replace('_', ' ')} {f'{value:.1e}' if isinstance(value, float) and value < 1e-3 else value}"
        for key, value in found.items()
    )


def note(name, found, seconds):
    """Merges what one trial counted into the file."""
    whole = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}, "trials": {}}
    changed = git("diff", "--name-only", "HEAD", "--", "engine", "iomm", "kernels", "tests")
    facts = {"commit": git("rev-parse", "HEAD"), "date": datetime.date.today().isoformat()}
    what, known = TRIALS[name][0], {what for what, _, _ in TRIALS.values()}
    whole["trials"][name] = {
        **facts,
        **({"with_changes_in": changed.splitlines()} if changed else {}),
        "seconds": seconds,
        "found": found,
    }
    RESULTS.write_text(
        json.dumps(
            {
                "machine": {
                    "device": f"{cpu_name()}, {os.cpu_count()} cores, shared with other work",
                    **facts,
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                },
                "rows": {
                    **{row: count for row, count in whole["rows"].items() if row in known},
                    what: words(found),
                },
                "of": {
                    **{row: of for row, of in whole.get("of", {}).items() if row in known},
                    what: facts,
                },
                "trials": whole["trials"],
            },
            indent=1,
        )
        + "\n"
    )


def main():
    broken = False
    for name, number in chosen(sys.argv[1:] or ["all"]):
        started = time.monotonic()
        with tempfile.TemporaryDirectory(
            prefix="iomm-survival-", ignore_cleanup_errors=True
        ) as folder:
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    found = TRIALS[name][1](folder, *([] if number is None else [number]))
            except Exception as error:
                traceback.print_exc()
                broken, found = True, {"broke_off": f"{type(error).__name__}: {error}"}
        note(name, found, round(time.monotonic() - started))
        print(name, found, flush=True)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
