"""Runs trials at their full number and notes the counts: python tests/faults/survival.py NAME NUMBER ...

Writes benchmarks/results/survival.json, one entry a trial, with date, machine, versions and commit. A count of 0 in n
trials bounds the rate at 3 / n with 95 % confidence."""

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from faults import trials

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks/results/survival.json"

NAMES = {"kill_chain": "C1 a committed checkpoint is never lost", "bitwise_resumes": "C5 resume is bitwise",
         "world_sizes": "C6 the world size may change", "requests_to_stop": "F4 preemption loses nothing",
         "deaths": "F1 a dead rank stops the job", "hangs": "F2 a hang is found and explained",
         "false_alarms": "F2 no false alarms"}


def cpu():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def words(found):
    """Counts as one line."""
    found = found[0] if isinstance(found, tuple) else found
    return ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in found.items())


def main():
    for name, number in zip(sys.argv[1::2], sys.argv[2::2]):
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="iomm-survival-") as folder:
            found = getattr(trials, name)(folder, *([int(number)] if int(number) else []))
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        note = {"commit": commit, "seconds": round(time.monotonic() - started), "found": found}
        whole = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}, "trials": {}}
        machine = {"device": f"{cpu()}, {os.cpu_count()} cores, shared with other work", "commit": commit, "torch": torch.__version__,
                   "date": datetime.date.today().isoformat(), "python": platform.python_version()}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps({
            "machine": machine,
            "trial": "two processes over gloo; the real loop, checkpoints, guard and watchdog; a linear model for DeepSpeed",
            "rows": {**whole["rows"], NAMES[name]: words(found)}, "trials": {**whole["trials"], name: note}}, indent=1) + "\n")
        print(name, found, flush=True)


if __name__ == "__main__":
    main()
