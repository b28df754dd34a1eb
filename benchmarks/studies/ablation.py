"""Measure how options of stage 1 that go beyond the paper change the held-out loss.

    python benchmarks/studies/ablation.py alignment --steps 250 --seeds 3 [section.key=value ...]
    python benchmarks/studies/ablation.py routing
    python benchmarks/studies/ablation.py noise

Each cell trains the default run's model from the same weights, on the same samples with the same
masks, times and noise, and evaluates its average (EMA) on held-out images at fixed times. Every
cell sees the same number of samples; "same work" cells take so many more or fewer steps that they
do as many counted FLOPs as the first cell. Differences to the first cell are taken seed by seed,
which cancels what a seed changes in all cells. The time of training is the median over the seeds.

Writes benchmarks/results/<ablation>-<config>-<device>-<date>.json after every run. A killed command
resumes when it is started again on the same day with the same arguments.
"""

from iomm.checkout import enter

ROOT = enter(__file__)

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.lib.harness import Bench
from benchmarks.report import command, label, positive
from benchmarks.studies.findings import T_95, widened
from benchmarks.studies.recipes import read, write
from iomm.engine.arguments import add_overrides
from iomm.engine.config import load_config
from iomm.engine.config_parser import layered
from iomm.engine.dry_run import build_without_weights
from iomm.engine.evaluation.heldout import Evaluation
from iomm.engine.observe.doctor import machine
from iomm.engine.parallel import ranks as group
from iomm.flops import flops_per_image
from iomm.internvl import prompt_tokenizer

# {ablation: {cell: settings}}. The first cell is what the others are compared with.
CELLS: dict[str, dict[str, list[str]]] = {
    "alignment": {
        "no alignment": ["align.weight=0"],
        **{
            f"weight {weight:g}, block {block}": [f"align.weight={weight}", f"align.block={block}"]
            for weight, block in ((0.25, 2), (0.5, 2), (1.0, 2), (0.5, 1), (0.5, 4))
        },
    },
    "routing": {
        "no routing": [],
        "half of the tokens skip blocks 3 and 4": ["route.ratio=0.5"],
        "half of the tokens skip blocks 2 to 5": [
            "route.ratio=0.5",
            "route.first=2",
            "route.last=5",
        ],
    },
    "noise": {
        "one time and noise per image": ["train.noise_draws=1"],
        "two": ["train.noise_draws=2"],
    },
}
# Cells of which a second one takes other steps, for the same work as the first cell.
SAME_WORK = {"routing": ["half of the tokens skip blocks 2 to 5"], "noise": ["two"]}


def heldout_loss(overrides: list[str], seed: int, steps: int, ranks: group.Ranks) -> dict:
    """Train a cell; return the held-out loss of its average, {"mean", "by_time", "training_s"}."""
    config = load_config("demo", layered([*overrides, f"run.seed={seed}", f"train.steps={steps}"]))
    bench = Bench(config, ranks, fresh=True)
    evaluation = Evaluation(config, bench.source, ranks)
    started = time.perf_counter()
    for _ in range(steps):
        bench.step()
    training_s = time.perf_counter() - started
    # Ends the reader threads.
    bench.batches.close()
    return evaluation(bench.state)["heldout_loss"]["image"] | {"training_s": training_s}


def cells(ablation: str, steps: int) -> dict[str, tuple[list[str], int]]:
    """Return {cell: (settings, steps)} of an ablation, including the cells of the same work."""
    found = {cell: (settings, steps) for cell, settings in CELLS[ablation].items()}
    first, *_ = CELLS[ablation].values()
    for cell in SAME_WORK.get(ablation, ()):
        others = round(steps * step_flops(first) / step_flops(CELLS[ablation][cell]))
        found[f"{cell}, same work"] = CELLS[ablation][cell], others
    return found


def step_flops(settings: list[str]) -> float:
    """Return the counted FLOPs of one sample of the default run with some settings."""
    config = load_config("demo", settings)
    model = build_without_weights(config)
    model.frozen[0].tokenizer = prompt_tokenizer()
    # The images are encoded once (data.latents: memory).
    size_px = config.data.size_px
    return flops_per_image(model, size_px, cached=True, tokens_cached=True)


def rows(runs: dict) -> dict[str, str]:
    """Return {cell: figure} for the README; cells without all seeds are left out.

    runs: {cell: {seed: result of heldout_loss}}, of which the first is what others are compared
    with.
    """
    reference, found = next(iter(runs), None), {}
    without = runs.get(reference, {})
    for cell, by_seed in runs.items():
        if set(by_seed) != set(without):
            continue
        losses = [by_seed[seed]["mean"] for seed in sorted(without)]
        text = f"held-out loss {statistics.mean(losses):.4f}"
        if cell != reference:
            changes = [by_seed[seed]["mean"] - without[seed]["mean"] for seed in sorted(without)]
            # The infinite bounds leave only Student's t.
            change = widened(changes, math.inf, -math.inf)
            text += f", {change.mean:+.4f} against {reference}"
            if len(changes) > 1:
                text += f" (95 % interval {change.low:+.4f} to {change.high:+.4f})"
        text += f"; {statistics.median(by_seed[seed]['training_s'] for seed in without):.0f} s"
        found[cell] = text
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ablation", choices=list(CELLS))
    parser.add_argument("--steps", type=positive(int), default=250)
    parser.add_argument("--seeds", type=positive(int), default=3, help=f"up to {len(T_95) + 1}")
    parser.add_argument("--results", default=str(ROOT / "benchmarks/results"))
    add_overrides(parser)
    args = parser.parse_args(argv)
    facts, settings = machine(), {"steps": args.steps, "overrides": args.overrides}
    device = "cuda" if facts["gpu"] else "cpu"
    name = f"{label(f'{args.ablation}-demo', args.overrides)}-{device}-{facts['date']}"
    path = Path(args.results) / f"{name}.json"
    kept = read(path)
    runs = kept["runs"] if kept.get("settings") == settings else {}
    ranks = group.start(600)
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            "train.cpu_ranks=1",
            "evaluate.every_steps=0",
            "evaluate.num_images=0",
            *args.overrides,
            f"run.dir={folder}/run",
        ]
        for seed in map(str, range(args.seeds)):
            for cell, (settings_of_cell, steps) in cells(args.ablation, args.steps).items():
                by_seed = runs.setdefault(cell, {})
                if seed in by_seed:
                    continue
                by_seed[seed] = heldout_loss(
                    [*overrides, *settings_of_cell], int(seed), steps, ranks
                )
                print(f"seed {seed}  {cell:<52} {by_seed[seed]['mean']:.4f}", flush=True)
                what = f"{args.ablation} in the default run's stage 1, {args.steps} steps: "
                write(
                    path,
                    {
                        "machine": facts,
                        "settings": settings,
                        "runs": runs,
                        "rows": {what + cell: text for cell, text in rows(runs).items()},
                    },
                )
    group.stop()
    print(json.dumps(rows(runs), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
