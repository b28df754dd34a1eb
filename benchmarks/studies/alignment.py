"""Measure the held-out loss of stage 1 by weight and block of the alignment.

    python benchmarks/studies/alignment.py --steps 250 --seeds 3 [section.key=value ...]

Each cell trains the default run's model from the same weights, on the same samples with the same
masks, times and noise, and evaluates its average (EMA) on held-out images at fixed times.
Differences to the cell without alignment are taken seed by seed, which cancels what a seed changes
in all cells.

Writes benchmarks/results/alignment-<config>-<device>-<date>.json after every run. A killed command
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
from pathlib import Path

from benchmarks.lib.harness import Bench
from benchmarks.report import command, label, positive
from benchmarks.studies.findings import T_95, widened
from benchmarks.studies.recipes import read, write
from iomm.engine.arguments import add_overrides
from iomm.engine.config import load_config
from iomm.engine.evaluation.heldout import Evaluation
from iomm.engine.observe.doctor import machine
from iomm.engine.parallel import ranks as group

CELLS = {
    "no alignment": (0.0, 2),
    **{
        f"weight {weight:g}, block {block}": (weight, block)
        for weight, block in ((0.25, 2), (0.5, 2), (1.0, 2), (0.5, 1), (0.5, 4))
    },
}


def heldout_loss(
    overrides: list[str], weight: float, block: int, seed: int, steps: int, ranks: group.Ranks
) -> dict:
    """Train a cell and return the held-out velocity loss of its average, {"mean", "by_time"}."""
    config = load_config(
        "demo",
        [
            *overrides,
            f"run.seed={seed}",
            f"train.steps={steps}",
            f"align.weight={weight}",
            f"align.block={block}",
        ],
    )
    bench = Bench(config, ranks, fresh=True)
    evaluation = Evaluation(config, bench.source, ranks)
    for _ in range(steps):
        bench.step()
    # Ends the reader threads.
    bench.batches.close()
    return evaluation(bench.state)["heldout_loss"]["image"]


def rows(runs: dict) -> dict[str, str]:
    """Return {cell: figure} for the README; cells without all seeds are left out.

    runs: {cell: {seed: result of heldout_loss}}.
    """
    without, found = runs.get("no alignment", {}), {}
    for cell, by_seed in runs.items():
        if set(by_seed) != set(without):
            continue
        losses = [by_seed[seed]["mean"] for seed in sorted(without)]
        text = f"held-out loss {statistics.mean(losses):.4f}"
        if cell != "no alignment":
            changes = [by_seed[seed]["mean"] - without[seed]["mean"] for seed in sorted(without)]
            # The infinite bounds leave only Student's t.
            change = widened(changes, math.inf, -math.inf)
            text += f", {change.mean:+.4f} against none"
            if len(changes) > 1:
                text += f" (95 % interval {change.low:+.4f} to {change.high:+.4f})"
        found[cell] = text
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=positive(int), default=250)
    parser.add_argument("--seeds", type=positive(int), default=3, help=f"up to {len(T_95) + 1}")
    parser.add_argument("--results", default=str(ROOT / "benchmarks/results"))
    add_overrides(parser)
    args = parser.parse_args(argv)
    facts, settings = machine(), {"steps": args.steps, "overrides": args.overrides}
    device = "cuda" if facts["gpu"] else "cpu"
    name = f"{label('alignment-demo', args.overrides)}-{device}-{facts['date']}"
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
            for cell, (weight, block) in CELLS.items():
                by_seed = runs.setdefault(cell, {})
                if seed in by_seed:
                    continue
                by_seed[seed] = heldout_loss(overrides, weight, block, int(seed), args.steps, ranks)
                print(f"seed {seed}  {cell:<22} {by_seed[seed]['mean']:.4f}", flush=True)
                steps = f"alignment in the default run's stage 1, {args.steps} steps: "
                write(
                    path,
                    {
                        "machine": facts,
                        "settings": settings,
                        "runs": runs,
                        "rows": {steps + cell: text for cell, text in rows(runs).items()},
                    },
                )
    group.stop()
    print(json.dumps(rows(runs), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
