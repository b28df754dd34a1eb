"""Run the README's default command, both stages, and collect its results.

    python benchmarks/studies/demo.py [train.steps=3000 ...]

Writes benchmarks/results/demo[-<settings>]-<device>-<date>.json with seconds from start to end and
in training, images/s, first and last loss, and scores. Also writes
benchmarks/figures/demo[-<settings>].png with samples of both stages over their steps, side by side.
Settings apply to both stages. With --out the runs are kept, and an interrupted run is resumed.
"""

import sys
from pathlib import Path

from iomm.checkout import enter

ROOT = enter(__file__)

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import IO

from PIL import Image

from benchmarks.report import label
from iomm.engine.config import load_config
from iomm.engine.config_parser import layered
from iomm.engine.evaluation.shapes_grades import overall
from iomm.engine.observe.doctor import machine
from iomm.engine.parallel.cpu_ranks import free_port

# The kinds of captions with a single shape.
SINGLE = "single_object", "colors"


def launch(*arguments: str, output: IO | None = None) -> int:
    """Run the engine on one device, at a free port, and return its exit code.

    output: file for what the run prints; default: this process's own.
    """
    command = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_gpus",
        "1",
        "--master_port",
        str(free_port()),
        str(ROOT / "engine/launch.py"),
        *layered(arguments),
    ]
    return subprocess.run(command, cwd=ROOT, stdout=output, stderr=output).returncode


def side_by_side(run_dirs: Sequence[Path], path: Path, gap_px: int = 24) -> None:
    """Write the progress sheets of several runs as one PNG, left to right, on white."""
    sheets = [
        Image.open(run_dir / "samples" / "progress.png").convert("RGB") for run_dir in run_dirs
    ]
    width = sum(sheet.width for sheet in sheets) + gap_px * (len(sheets) - 1)
    height = max(sheet.height for sheet in sheets)
    joined, left = Image.new("RGB", (width, height), "white"), 0
    for sheet in sheets:
        joined.paste(sheet, (left, 0))
        left += sheet.width + gap_px
    path.parent.mkdir(parents=True, exist_ok=True)
    joined.save(path)


def run_stage(stage: str, run_dir: Path, *arguments: str) -> dict:
    """Run a stage and return its results."""
    started = time.perf_counter()
    if code := launch("--stage", stage, "--resume", "auto", *arguments, f"run.dir={run_dir}"):
        sys.exit(code)
    seconds = time.perf_counter() - started
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    scores = json.loads((run_dir / "scores.json").read_text())
    config = load_config(str(run_dir / "config.yaml"))
    return {
        "command_s": seconds,
        "training_s": sum(row["step_s"] for row in rows),
        "steps": len(rows),
        "global_batch": config.train.global_batch,
        "precision": config.precision,
        "images_per_s": statistics.median(row["images_per_s"] for row in rows),
        "first_loss": rows[0]["loss"],
        "last_loss": statistics.mean(row["loss"] for row in rows[-20:]),
        "memory_gib": rows[-1]["memory_gib"],
        "half_of_first_loss_at_step": next(
            (row["step"] for row in rows if row["loss"] < rows[0]["loss"] / 2), None
        ),
        **{
            key: {way: overall(table, key) for way, table in scores.items()}
            for key in ("fits", "number", "colours")
        },
        "single_object_fits": {
            way: overall({kind: table[kind] for kind in SINGLE}, "fits")
            for way, table in scores.items()
        },
        "scores": scores,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "settings", nargs="*", help="settings of both stages, in the form of engine/launch.py"
    )
    parser.add_argument("--out", help="folder to keep the two runs in; default: a temporary one")
    args = parser.parse_args()
    name = label("demo", args.settings)
    with tempfile.TemporaryDirectory() as folder:
        first, second = (Path(args.out or folder) / name for name in ("demo", "demo-finetune"))
        result = {
            "machine": machine(),
            "settings": args.settings,
            "pretrain": run_stage("pretrain", first, *args.settings),
            "finetune": run_stage("finetune", second, "--init", str(first), *args.settings),
        }
        side_by_side((first, second), ROOT / f"benchmarks/figures/{name}.png")
    facts = result["machine"]
    device = "cuda" if facts["gpu"] else "cpu"
    path = ROOT / f"benchmarks/results/{name}-{device}-{facts['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
