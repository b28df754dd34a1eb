"""Run the fault trials at their full number and record the counts.

    python tests/faults/survival.py all               all trials
    python tests/faults/survival.py C1 F2             the trials of these promises
    python tests/faults/survival.py kill_chain 20     one trial, at another number

Writes benchmarks/results/survival.json: a row per trial and, under `trials`, the counts with their
date, commit and duration. Earlier results of other trials are kept. A count of 0 in n trials bounds
the rate at 3 / n with 95 % confidence. Exits with 1 if a trial raised an exception; the others run
in any case.
"""

import contextlib
import datetime
import io
import json
import logging
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
from faults import disk, hosts, real, trials

from benchmarks.micro import measure_saves
from iomm.engine.observe.doctor import cpu_name, git

RESULTS = ROOT / "benchmarks/results/survival.json"


def tests(*arguments):
    """Return a trial that runs the tests selected by pytest arguments, slow ones included."""

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
    """Save the demo's state, and return what a fault loses at the planned intervals."""
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


# # {name of the trial: (its row in the report, function, full number or None if the function has
# its own)}
TRIALS = {
    "kill_chain": ("C1 a committed checkpoint is never lost", trials.kill_chain, 1000),
    "crash_points": ("C2 every crash point of a save is safe", disk.crash_points, None),
    "damages": ("C4 no damaged checkpoint is ever loaded", disk.damages, 300),
    "damaged_starts": ("C4 a start skips damaged checkpoints", trials.damaged_starts, None),
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
    "toy_hosts": ("H1 several hosts train like one", hosts.toy_hosts, 20),
    "hosts_train": ("H1 several hosts train like one, ZeRO-3", hosts.hosts_train, None),
    "lost_hosts": ("H2 a lost host ends the job in seconds", hosts.lost_hosts, 20),
    "returning_links": ("H3 a link that returns in time costs nothing", hosts.returning_links, 10),
    "bad_network": ("H4 a bad network is no fault", hosts.bad_network, 200),
    "preempted_hosts": ("H5 preemption of one host saves all", hosts.preempted_hosts, 20),
    "wire": ("H6 counted bytes are the bytes on the wire", hosts.wire, 20),
    "bounded_loss": ("O3 what a fault may cost is bounded", bounded_loss, 10),
}


def chosen(arguments):
    """Return [(trial, number)] for the words of the command line.

    Raises:
        SystemExit: A word does not name a trial.
    """
    found = []
    for word in arguments:
        if word.isdigit() and found:
            found[-1] = found[-1][0], int(word)
            continue
        named = [
            name for name, (what, _, _) in TRIALS.items() if word in ("all", name, what.split()[0])
        ]
        if not named:
            codes = {what.split()[0] for what, _, _ in TRIALS.values()}
            raise SystemExit(
                f"unknown trial {word}; choose from: all, {', '.join(sorted({*TRIALS} | codes))}"
            )
        found += [(name, TRIALS[name][2]) for name in named]
    return found


def format_counts(found):
    """Return the counts of a trial as one line."""
    found = found[0] if isinstance(found, tuple) else found
    if any(isinstance(value, dict) for value in found.values()):
        return "; ".join(
            f"{key}: {format_counts(value) if isinstance(value, dict) else value}"
            for key, value in found.items()
        )
    small = {
        key: f"{value:.1e}" if isinstance(value, float) and value < 1e-3 else value
        for key, value in found.items()
    }
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in small.items())


def record(name, found, seconds):
    """Merge the counts of one trial into the file."""
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
                    what: format_counts(found),
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
    # Without a handler, every injected fault would print its log lines to stderr.
    logging.getLogger("iomm").addHandler(logging.NullHandler())
    failed = False
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
                failed, found = True, {"broke_off": f"{type(error).__name__}: {error}"}
        record(name, found, round(time.monotonic() - started))
        print(name, found, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
