"""The README's default command, both stages, run and read: python benchmarks/studies/demo.py [train.steps=3000 ...]

Writes benchmarks/results/demo[-<settings>]-<device>-<date>.json: seconds from start to end and in training, images/s, first
and last loss, scores; and benchmarks/figures/demo[-<settings>].png: pictures of both stages over their steps, side by side.
Settings apply to both stages. With --out the runs are kept, and an interrupted one is continued.
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

from PIL import Image

from benchmarks.report import label
from iomm.engine.config import load_config
from iomm.engine.evaluation.shapes_grades import overall
from iomm.engine.observe.doctor import machine
from iomm.engine.parallel.cpu_ranks import free_port

# Kinds of captions of one shape.
SINGLE = "single_object", "colors"


def launch(*arguments, said=None):
    """One start of the engine on one device, at a free port -> its exit code; `said`: a file for what it prints."""
    command = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_gpus",
        "1",
        "--master_port",
        str(free_port()),
        str(ROOT / "engine/launch.py"),
        *arguments,
    ]
    return subprocess.run(command, cwd=ROOT, stdout=said, stderr=said).returncode


def side_by_side(run_dirs, path, gap_px=24):
    """Write the progress sheets of several runs as one PNG, left to right, on white."""
    sheets = [
        Image.open(run_dir / "samples" / "progress.png").convert("RGB") for run_dir in run_dirs
    ]
    width, height = (
        sum(sheet.width for sheet in sheets) + gap_px * (len(sheets) - 1),
        max(sheet.height for sheet in sheets),
    )
    joined, left = Image.new("RGB", (width, height), "white"), 0
    for sheet in sheets:
        joined.paste(sheet, (left, 0))
        left += sheet.width + gap_px
    path.parent.mkdir(parents=True, exist_ok=True)
    joined.save(path)


def stage(which, run_dir, *arguments):
    """Run a stage -> what is reported of it."""
    started = time.perf_counter()
    if code := launch("--stage", which, "--resume", "auto", *arguments, f"run.dir={run_dir}"):
        sys.exit(code)
    seconds, rows = (
        time.perf_counter() - started,
        [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()],
    )
    scores, config = (
        json.loads((run_dir / "scores.json").read_text()),
        load_config(str(run_dir / "config.yaml")),
    )
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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "settings", nargs="*", help="of both stages, as engine/launch.py takes them"
    )
    parser.add_argument("--out", help="folder of the two runs; default: one that is removed")
    args = parser.parse_args()
    name = label("demo", args.settings)
    with tempfile.TemporaryDirectory() as folder:
        first, second = (Path(args.out or folder) / name for name in ("demo", "demo-finetune"))
        result = {
            "machine": machine(),
            "settings": args.settings,
            "pretrain": stage("pretrain", first, *args.settings),
            "finetune": stage("finetune", second, "--init", str(first), *args.settings),
        }
        side_by_side((first, second), ROOT / f"benchmarks/figures/{name}.png")
    facts = result["machine"]
    path = (
        ROOT
        / "benchmarks/results"
        / f"{name}-{'cuda' if facts['gpu'] else 'cpu'}-{facts['date']}.json"
    )
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
