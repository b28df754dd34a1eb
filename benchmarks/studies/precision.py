"""Compare training in fp8 with training in bf16.

    python benchmarks/studies/precision.py [--steps N] [section.key=value ...]

The engine makes four runs on the shapes dataset, one after the other: bf16, fp8 in the generator,
fp8 in the frozen MLLM, and bf16 from another seed, which shows how much two correct runs differ.
Without a GPU the model is the demo; with one it is IOMM-B's generator at its own token counts (1024
latents of 64 px images, 256 queries). Writes benchmarks/results/precision-<device>-<date>.json with
the curves, means over the last tenth of the steps, images/s, and the relative error of the MLLM's
outputs. Only a result from a GPU is evidence for fp8.
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
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import positive
from iomm.config import RECONSTRUCT
from iomm.engine.arguments import add_overrides
from iomm.engine.config_parser import layered
from iomm.engine.observe.doctor import machine
from iomm.engine.shapes.dataset import render, scene
from iomm.engine.shapes.mllm import WEIGHTS
from iomm.internvl import load_mllm

RUNS = {
    "bf16": ("precision=bf16", "run.seed=0"),
    "fp8": ("precision=fp8", "run.seed=0"),
    "fp8 MLLM": ("precision=bf16", "model.mllm_precision=fp8", "run.seed=0"),
    "bf16, another seed": ("precision=bf16", "run.seed=1"),
}
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


def run(folder: str, settings: Sequence[str], steps: int, overrides: list[str]) -> list[dict]:
    """Train a run and return the rows of its log.jsonl.

    Another seed draws other images, weights, masks and noise from the same dataset.
    """
    arguments = [
        f"run.dir={folder}",
        *settings,
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

    `fp8_over_bf16`, `fp8_mllm_over_bf16` and `seed_over_bf16` are the relative differences of the
    last losses to bf16's.
    """
    runs = {
        name: summary(run(f"{folder}/{i}", settings, steps, overrides))
        for i, (name, settings) in enumerate(RUNS.items())
    }
    bf16, fp8, fp8_mllm, other = (runs[name]["last_loss"] for name in RUNS)
    return {
        "steps": steps,
        "overrides": overrides,
        "runs": runs,
        "fp8_over_bf16": fp8 / bf16 - 1,
        "fp8_mllm_over_bf16": fp8_mllm / bf16 - 1,
        "seed_over_bf16": other / bf16 - 1,
        "speedup": runs["fp8"]["images_per_s"] / runs["bf16"]["images_per_s"],
    }


def feature_errors(name: str, num_images: int = 32, num_queries: int = 16) -> dict[str, float]:
    """Return the relative error of an MLLM's outputs in bf16 and with fp8, against float32.

    The root mean square of the difference over that of the float32 outputs: of the image tokens,
    and of the outputs at random queries after [prompt, image tokens].
    """
    found = {}
    for precision, dtype in (("exact", torch.float32), ("bf16", torch.bfloat16), ("fp8", None)):
        mllm = load_mllm(name, dtype=dtype or torch.bfloat16)
        if precision == "fp8":
            mllm.use_fp8()
        random = torch.Generator().manual_seed(0)
        shape = num_images, num_queries, mllm.width
        queries_BQD = torch.randn(shape, generator=random) / mllm.width**0.5
        pixels = torch.stack([picture(n, mllm.vit_px) for n in range(num_images)])
        with torch.no_grad():
            tokens_BPD = mllm.image_tokens(pixels)
            condition = mllm.condition([RECONSTRUCT] * num_images, tokens_BPD)
            cache, _ = mllm.prefix(condition)
            hidden_BQD = mllm.queries(queries_BQD.to(mllm.dtype), condition, cache)
        found[precision] = tokens_BPD.float(), hidden_BQD.float()
    return {
        f"{what}, {precision}": ((value - exact).norm() / exact.norm()).item()
        for precision in ("bf16", "fp8")
        for what, value, exact in zip(
            ("image tokens", "query outputs"), found[precision], found["exact"], strict=True
        )
    }


def picture(number: int, size_px: int) -> Tensor:
    """Return a picture of the shapes dataset as the ViT takes it, uint8 (size_px, size_px, 3)."""
    return torch.from_numpy(np.array(render(scene(0, number), size_px)))


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
    result["mllm_errors"] = {
        name: feature_errors(folder)
        for name, folder in (("shapes", str(WEIGHTS)), ("random", "random:internvl3-quarter"))
    }
    device = "cuda" if facts["gpu"] else "cpu"
    path = ROOT / f"benchmarks/results/precision-{device}-{facts['date']}.json"
    path.write_text(json.dumps({"machine": facts, **result}, indent=1) + "\n")
    print(
        f"loss relative to bf16: fp8 {result['fp8_over_bf16']:+.2%}, fp8 in the MLLM "
        f"{result['fp8_mllm_over_bf16']:+.2%}, another seed {result['seed_over_bf16']:+.2%}; "
        f"images/s x {result['speedup']:.2f}\n{path}"
    )


if __name__ == "__main__":
    main()
