"""Compare training in fp8 with training in bf16.

    python benchmarks/studies/precision.py [--steps N] [section.key=value ...]

The engine makes three runs on the shapes dataset, one after the other: bf16, fp8, and bf16 from
another seed, which shows how much two correct runs differ. Without a GPU the model is the demo;
with one it is IOMM-B's generator at its own token counts (1024 latents of 64 px images, 256
queries). Writes benchmarks/results/precision-<device>-<date>.json with the curves, means over the
last tenth of the steps, and images/s. Only a result from a GPU is evidence for `precision: fp8`.
"""

import sys
from pathlib import Path

from iomm.checkout import enter

ROOT = enter(__file__)

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile

from benchmarks.report import positive
from iomm.engine.arguments import add_overrides
from iomm.engine.config_parser import layered
from iomm.engine.observe.doctor import machine

RUNS = {"bf16": ("bf16", 0), "fp8": ("fp8", 0), "bf16, another seed": ("bf16", 1)}
ON_A_GPU = [
    "model.preset=iomm-b",
    "model.vae=pixel:2",
    "data.size_px=64",
    "adapter.num_queries=256",
    "mask.ratio=0.85",
    "train.global_batch=64",
    "train.micro_batch=32",
    "optim.lr=1e-4",
    "optim.warmup_steps=50",
    "ema.decay=0",
]
# By whether there is a GPU. With one, a step takes 302 TFLOP and three runs fit in ten minutes.
STEPS = {True: 100, False: 300}


def run(folder: str, precision: str, seed: int, steps: int, overrides: list[str]) -> list[dict]:
    """Train a run and return the rows of its log.jsonl.

    Another seed draws other images, weights, masks and noise from the same dataset.
    """
    arguments = [
        f"run.dir={folder}",
        f"precision={precision}",
        f"run.seed={seed}",
        f"train.steps={steps}",
        f"checkpoint.every_steps={steps}",
        "log.sample_images=0",
    ]
    subprocess.run(
        [
            str(Path(sys.executable).with_name("deepspeed")),
            "--num_gpus",
            "1",
            str(ROOT / "engine/launch.py"),
            *layered([*overrides, *arguments]),
        ],
        cwd=ROOT,
        check=True,
    )
    rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    # A run takes 15 GB on a GPU; three of them may not fit on a rented disk.
    shutil.rmtree(folder)
    return rows


def summary(rows: list[dict]) -> dict:
    """Return the figures of a run from the rows of its log."""
    last = rows[-max(1, len(rows) // 10) :]
    return {
        "last_loss": statistics.mean(row["loss"] for row in last),
        "skipped_steps": rows[-1]["skipped_steps"],
        "images_per_s": statistics.median(row["images_per_s"] for row in rows[len(rows) // 2 :]),
        "memory_gib": rows[-1]["memory_gib"],
        "losses": [row["loss"] for row in rows],
    }


def compare(folder: str, steps: int, overrides: list[str]) -> dict:
    """Train all runs and return their summaries.

    `fp8_over_bf16` and `seed_over_bf16` are the relative differences of the last losses to bf16's.
    """
    runs = {
        name: summary(run(f"{folder}/{i}", precision, seed, steps, overrides))
        for i, (name, (precision, seed)) in enumerate(RUNS.items())
    }
    bf16, fp8, other = (runs[name]["last_loss"] for name in RUNS)
    return {
        "steps": steps,
        "overrides": overrides,
        "runs": runs,
        "fp8_over_bf16": fp8 / bf16 - 1,
        "seed_over_bf16": other / bf16 - 1,
        "speedup": runs["fp8"]["images_per_s"] / runs["bf16"]["images_per_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps",
        type=positive(int),
        help=f"default: {STEPS[True]} with a GPU, {STEPS[False]} without",
    )
    add_overrides(parser)
    args, facts = parser.parse_intermixed_args(), machine()
    args.steps = args.steps or STEPS[bool(facts["gpu"])]
    with tempfile.TemporaryDirectory() as folder:
        result = compare(folder, args.steps, [*(ON_A_GPU if facts["gpu"] else []), *args.overrides])
    device = "cuda" if facts["gpu"] else "cpu"
    path = ROOT / f"benchmarks/results/precision-{device}-{facts['date']}.json"
    path.write_text(json.dumps({"machine": facts, **result}, indent=1) + "\n")
    print(
        f"loss relative to bf16: fp8 {result['fp8_over_bf16']:+.2%}, another seed "
        f"{result['seed_over_bf16']:+.2%}; images/s x {result['speedup']:.2f}\n{path}"
    )


if __name__ == "__main__":
    main()
