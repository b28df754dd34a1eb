"""Run the paper's comparisons on the shapes dataset.

    python benchmarks/studies/recipes.py [experiment ...]

    recipes     pre-train on {image, pair} x fine-tune on {image, pair, mix}: the paper's table
    ratio       share of hidden image tokens, in stage 1 and in the image half of stage 2
    adapter     none, MetaQuery, MetaQuery with the same number of parameters as the RQA (a
                connector layer has the same 12 D^2), RQA; also scored on masked images after
                stage 1
    mix         lambda, the share of images in stage 2
    choices     hidden tokens dropped or zeroed, a Bernoulli or a fixed number of them, outputs at
                the queries or all, the generator aligned or not; runs only on request
    editing     "make it red", "add a blue square to the left", which the generator never saw (the
                tiny MLLM did); scored on the requested change and on what had to be kept

A cell is two runs of the engine with the demo configs, the steps of the budget, and the cell's own
settings. Stage 1 on pairs has the same number of distinct pairs as stage 1 on images has images.
Stage 2 has another seed, so its images and its few pairs are new to every cell.
engine/evaluation/shapes_grades.py scores seen and unseen combinations on scenes and noise of the
cell's seed, which are the same for every cell. benchmarks/studies/findings.py computes intervals
and verdicts.

First run the cells that the paper's findings compare, the default cell before all others, so that
all verdicts exist before the other points of the curves. In both groups all cells of a seed run
before the next seed begins. The results are written after every cell. Runs and scores are kept
below --out under a name made from everything that changes them. To resume a killed command, start
it again: complete runs are kept, other runs resume from their last checkpoint, and a run that is
still training is waited for. Cells whose scores are in the result file are not run again, so a
night can be continued on another machine. --status prints what is done and the hours left.
"""

import sys
from pathlib import Path

from iomm.checkout import enter

ROOT = enter(__file__)

import argparse
import fcntl
import hashlib
import json
import statistics
import traceback
from collections.abc import Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from threading import Lock
from typing import Any

import torch

from benchmarks.report import positive
from benchmarks.studies.demo import launch
from benchmarks.studies.findings import (
    COMPARED,
    SPLITS,
    T_95,
    Cells,
    compared,
    draw,
    figure_of,
    findings_table,
    in_words,
    interval,
    share_in_words,
    shares_of,
    summary,
)
from iomm.config import InputError
from iomm.engine import builders, shapes
from iomm.engine.config import FREE_KEYS, RunConfig, flat, load_config
from iomm.engine.data.atomic import whole_file
from iomm.engine.evaluation.shapes_grades import GUIDANCE, ceiling, grade, overall
from iomm.engine.observe.doctor import machine
from iomm.engine.resilience import checkpoint_reader
from iomm.engine.shapes import dataset, scorer

# The config of each stage.
STAGES = {"pretrain": "demo", "finetune": "demo-finetune"}
# Steps of stage 1 and of stage 2 in a cpu-night, as in the default run.
NIGHT_STEPS = (1500, 1500)
# Seconds per step of two concurrent runs, until a run below --out has measured it.
NIGHT_STEP_S = 0.65
# Seconds of a run outside its steps: from launch to first step, including the encoding of the
# dataset, and from the last step to the end.
START_S = 60.0
# Seconds to sample and score a picture.
PICTURE_S = 0.1
# Added to run.seed in stage 2, so that images, pairs, masks and noise differ from stage 1.
STAGE_2_SEED = 100
# Settings of concurrent runs; neither changes what is computed.
CONCURRENT = ("train.threads=1", "train.cpu_ranks=1")
# Settings of all runs. The paper has no alignment, and it is not available for pairs whose latents
# are in memory. No evaluation happens during training, so no data needs to be held out.
EVERY_RUN = ("align.weight=0", "data.heldout=0")
# File in the folder of a run.
SCORES = "recipe-scores.json"
FIGURES = ("fits", "number", "colours", "shapes")
FIGURES_OF_EDITS = ("edited", "kept", *FIGURES, "object", "place", "size", "background")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a command runs.

    Attributes:
        pretrain: steps of stage 1.
        finetune: steps of stage 2.
        seeds: number of seeds.
        per_kind: pictures per kind of caption and split.
        draw_steps: Euler steps of each picture.
        jobs: number of cells that run concurrently.
        step_s: expected seconds per step.
        settings: settings of all runs.
        experiments: names of the experiments.
    """

    pretrain: int
    finetune: int
    seeds: int
    per_kind: int
    draw_steps: int
    jobs: int
    step_s: float
    settings: tuple = ()
    experiments: tuple = ("recipes", "ratio", "adapter", "mix", "editing")


BUDGETS = {
    "cpu-smoke": Budget(
        pretrain=2,
        finetune=2,
        seeds=1,
        per_kind=1,
        draw_steps=1,
        jobs=1,
        step_s=1.0,
        experiments=("recipes",),
        settings=("train.global_batch=4", "data.num_images=64", "data.num_pairs=16"),
    ),
    "cpu-night": Budget(
        pretrain=NIGHT_STEPS[0],
        finetune=NIGHT_STEPS[1],
        seeds=3,
        per_kind=64,
        draw_steps=20,
        jobs=2,
        step_s=NIGHT_STEP_S,
    ),
    # Has not been run yet. Without torch.compile, which would take longer than these short runs.
    "gpu": Budget(
        pretrain=NIGHT_STEPS[0],
        finetune=NIGHT_STEPS[1],
        seeds=3,
        per_kind=64,
        draw_steps=20,
        jobs=6,
        step_s=0.1,
        experiments=("recipes", "editing"),
        settings=("train.compile=false",),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Settings of a pair of runs.

    Attributes:
        both: settings of both stages.
        first: settings of stage 1.
        second: settings of stage 2.
        after_first: ways of grade() in which stage 1 is scored.
        after_second: ways of grade() in which stage 2 is scored.
    """

    both: tuple = ()
    first: tuple = ()
    second: tuple = ()
    after_first: tuple = ()
    after_second: tuple = ("text",)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run; its folder is named by a hash of everything that changes the computation."""

    stage: str
    steps: int
    settings: tuple
    dir: Path
    init: Path | None = None


PRETRAIN = {"image": ("train.data=image",), "pair": ("train.data=pair", "data.pairs=shapes")}
# In the order in which cells run. Cells that share a stage 1 are not neighbours, because one of two
# concurrent ones would have to wait for the other.
RECIPES = {
    f"{pre} -> {fine}": Cell(first=first, second=(f"train.data={fine}",))
    for fine in ("mix", "pair", "image")
    for pre, first in PRETRAIN.items()
}
EXPERIMENTS = {
    "recipes": RECIPES,
    "ratio": {
        str(ratio): Cell(both=(f"mask.ratio={ratio}",)) for ratio in (0.5, 0.0, 0.95, 0.25, 0.75)
    },
    "adapter": {
        name: Cell(both=both, after_first=("image",))
        for name, both in {
            "rqa": ("adapter.kind=rqa",),
            "none": ("adapter.kind=none", "adapter.conditions=all"),
            "metaquery": ("adapter.kind=metaquery",),
            "metaquery, as large": ("adapter.kind=metaquery", "adapter.connector_layers=1"),
        }.items()
    },
    "mix": {str(share): Cell(second=(f"data.mix={share}",)) for share in (0.5, 0.9, 0.1, 0.3, 0.7)},
    "choices": {
        "drop, query, bernoulli": Cell(),
        "zero": Cell(both=("mask.mode=zero",)),
        "all": Cell(both=("adapter.conditions=all",)),
        "fixed": Cell(both=("mask.count=fixed",)),
        "aligned": Cell(both=("align.weight=0.5",)),
    },
    "editing": {
        name: replace(RECIPES[name], after_second=("edit",))
        for name in ("image -> mix", "pair -> mix")
    },
}


def write(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def read(path: Path) -> dict:
    """Return the content of a JSON file, or {} if it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


class Runs:
    """The runs and scores of a budget below a folder; existing ones are reused.

    published: {name of a run: {"machine": facts, "scores": scores}} of a result file.
    """

    def __init__(self, folder: str | Path, budget: Budget, published: dict | None = None):
        self.folder, self.budget, self.locks = Path(folder), budget, {}
        self.published = published or {}

    def locked(self, name: Hashable) -> Lock:
        """Return the lock of that name; concurrent cells may need the same run or score."""
        return self.locks.setdefault(name, Lock())

    # The cache keeps `self` alive, which is fine: a command creates a single Runs.
    @cache  # noqa: B019
    def both(self, cell: Cell, seed: int) -> tuple[Run, Run]:
        """Return the runs of stage 1 and of stage 2 of a cell."""
        common = (*EVERY_RUN, *self.budget.settings, *cell.both)
        settings = (f"run.seed={seed}", *common, *cell.first)
        config = config_of("pretrain", settings)
        if config.train.data == "pair":
            settings += (f"data.num_pairs={config.data.num_images}",)
        first = self.run("pretrain", self.budget.pretrain, settings)
        settings = (f"run.seed={seed + STAGE_2_SEED}", *common, *cell.second)
        return first, self.run("finetune", self.budget.finetune, settings, first.dir)

    def run(self, stage: str, steps: int, settings: tuple, init: Path | None = None) -> Run:
        """Return a run; equal runs have the same folder, however their settings are written."""
        config = flat(config_of(stage, settings))
        bound = {key: value for key, value in config.items() if key not in FREE_KEYS}
        bound |= {"run.init": init and init.name, "world": dataset.VERSION}
        # Hashes of the shipped MLLM and VAE.
        bound |= read(shapes.HASHES)
        name = json.dumps([stage, steps, bound], sort_keys=True)
        folder = self.folder / f"{stage}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
        return Run(stage=stage, steps=steps, settings=settings, dir=folder, init=init)

    def train(self, run: Run) -> None:
        """Train a run to its end, from its newest checkpoint if it has one.

        Raises:
            InputError: if the run fails.
        """
        with self.locked(run.dir):
            run.dir.mkdir(parents=True, exist_ok=True)
            wait_until_free(run.dir)
            folder = checkpoint_reader.newest(run.dir / "checkpoints")
            if folder is not None and checkpoint_reader.step_of(folder) >= run.steps:
                return
            is_concurrent = self.budget.jobs > 1 and not torch.cuda.is_available()
            init = ("--init", str(run.init)) if run.init is not None else ()
            with open(run.dir / "said.txt", "ab") as output:
                code = launch(
                    "--stage",
                    run.stage,
                    "--resume",
                    "auto",
                    *init,
                    *run.settings,
                    *(CONCURRENT if is_concurrent else ()),
                    f"run.dir={run.dir}",
                    f"train.steps={run.steps}",
                    "checkpoint.every_steps=250",
                    "checkpoint.keep=2",
                    "evaluate.every_steps=0",
                    "log.sample_images=0",
                    output=output,
                )
            if code:
                raise InputError(
                    f"a run failed with exit code {code}. Its output is in {run.dir}/said.txt"
                )

    def record(self, run: Run) -> dict:
        """Return {"machine": facts, "scores": scores} of a run, {} for what does not exist.

        The result file's record is used while the run's folder has no scores.
        """
        here = {"machine": read(run.dir / "machine.json"), "scores": read(run.dir / SCORES)}
        return here if here["scores"] else self.published.get(run.dir.name, here)

    def scored_with(self) -> dict:
        """Return what scores depend on besides the run; scores with other values are redone."""
        return {
            "per_kind": self.budget.per_kind,
            "draw_steps": self.budget.draw_steps,
            "guidance": GUIDANCE,
            "world": dataset.VERSION,
            "judge": scorer.VERSION,
        }

    def known(self, run: Run, ways: Iterable[str]) -> dict[str, dict[str, float]] | None:
        """Return {"text, train": {"fits": share, ..., "pictures": number}, ...} of a run.

        None if any of them is missing.
        """
        kept = self.record(run)["scores"]
        names = [f"{way}, {split}" for way in ways for split in SPLITS]
        if names and (kept.get("settings") != self.scored_with() or not set(names) <= set(kept)):
            return None
        return {name: kept[name] for name in names}

    def score(self, run: Run, ways: Iterable[str], seed: int) -> None:
        """Score a trained run in the missing ways and keep the shares in its folder."""
        path = run.dir / SCORES
        with self.locked(path):
            kept, model = read(path), None
            if kept.get("settings") != self.scored_with():
                kept = {"settings": self.scored_with()}
            for way in ways:
                if self.known(run, (way,)) is not None:
                    continue
                if model is None:
                    # The first imports of transformers fail if two threads make them at once.
                    with self.locked("transformers"):
                        device = "cuda" if torch.cuda.is_available() else "cpu"
                        config, model, _ = builders.load_run(run.dir, device=device)
                for split in SPLITS:
                    table, _ = grade(
                        model,
                        config.data.size_px,
                        way,
                        split=split,
                        per_kind=self.budget.per_kind,
                        steps=self.budget.draw_steps,
                        guidance=GUIDANCE[way],
                        seed=seed,
                    )
                    keys = FIGURES_OF_EDITS if way == "edit" else FIGURES
                    shares = {key: overall(table, key) for key in keys}
                    kept[f"{way}, {split}"] = shares | {
                        "pictures": sum(row["pictures"] for row in table.values())
                    }
                write(path, kept)

    def do(self, cell: Cell, seed: int) -> None:
        """Train and score a cell; complete runs and scores are kept."""
        for run, ways in self.left(cell, seed):
            self.train(run)
            self.score(run, ways, seed)

    def left(self, cell: Cell, seed: int) -> list[tuple[Run, tuple]]:
        """Return the runs that a cell still needs, each with the ways in which it is scored."""
        first, second = self.both(cell, seed)
        if self.known(second, cell.after_second) is None:
            return [(first, cell.after_first), (second, cell.after_second)]
        # Stage 1 is not needed for its weights.
        is_known = self.known(first, cell.after_first) is not None
        return [] if is_known else [(first, cell.after_first)]

    def scores(self, cell: Cell, seed: int) -> dict | None:
        """Return all scores of a cell, or None if it is not complete."""
        first, second = self.both(cell, seed)
        found = self.known(first, cell.after_first), self.known(second, cell.after_second)
        return None if None in found else found[0] | found[1]

    def gathered(self, name: str) -> Cells:
        """Return {cell: {seed: scores}} of an experiment's complete cells and seeds."""
        cells = EXPERIMENTS[name]
        if all(cell.replace(".", "").isdigit() for cell in cells):
            cells = dict(sorted(cells.items(), key=lambda item: float(item[0])))
        rows = {
            cell: {
                seed: scores
                for seed in range(self.budget.seeds)
                if (scores := self.scores(what, seed))
            }
            for cell, what in cells.items()
        }
        return {cell: seeds for cell, seeds in rows.items() if seeds}

    def records(self, name: str) -> dict[str, dict]:
        """Return {name of the run: its record} of an experiment's complete cells."""
        return {
            run.dir.name: self.record(run)
            for seed in range(self.budget.seeds)
            for cell in EXPERIMENTS[name].values()
            if self.scores(cell, seed)
            for run in self.both(cell, seed)
        }

    def hours_left(self, names: Iterable[str]) -> tuple[float, float]:
        """Return the expected hours left for these experiments, and the seconds per step."""
        runs, unscored = {}, set()
        for name in names:
            for cell, seed in product(EXPERIMENTS[name].values(), range(self.budget.seeds)):
                for run, ways in self.left(cell, seed):
                    runs[run.dir] = run
                    unscored |= {(run.dir, way) for way in ways if self.known(run, (way,)) is None}
        pictures = len(unscored) * len(SPLITS) * self.budget.per_kind * len(dataset.KINDS)
        seconds, step_s = pictures * PICTURE_S, self.step_s()
        for run in runs.values():
            made = map(checkpoint_reader.step_of, checkpoint_reader.steps(run.dir / "checkpoints"))
            if (left := run.steps - max(made, default=0)) > 0:
                seconds += START_S + left * step_s
        return seconds / 3600 / self.budget.jobs, step_s

    def step_s(self) -> float:
        """Return the median seconds per step of the newest log, or the budget's without a log."""
        logs = sorted(self.folder.glob("*/log.jsonl"), key=lambda log: log.stat().st_mtime)
        for log in reversed(logs):
            lines = log.read_text().splitlines()[-100:]
            try:
                if rows := [json.loads(line)["step_s"] for line in lines]:
                    return statistics.median(rows)
            except ValueError:
                # The last line is still being written.
                continue
        return self.budget.step_s


@cache
def config_of(stage: str, settings: tuple) -> RunConfig:
    """Return the config of a stage with these settings."""
    return load_config(STAGES[stage], settings)


def wait_until_free(run_dir: Path) -> None:
    """Wait for a run that still trains in a folder, as its launcher survives a killed command."""
    # OSError: the file system has no locks.
    with open(run_dir / ".lock", "a") as file, suppress(OSError):
        # Closing the file releases the lock.
        fcntl.lockf(file, fcntl.LOCK_EX)


def real_limits(runs: Runs) -> dict:
    """Score real pictures reconstructed by the VAE, which are the limit for any model.

    Returns {"text": {split: share}, "edit": {split: share}}.
    """
    config, per_kind = config_of("pretrain", ()), min(32, runs.budget.per_kind)
    size_px = config.data.size_px
    settings = {
        "size_px": size_px,
        "vae": [config.model.vae, read(shapes.HASHES)],
        **runs.scored_with(),
    }
    kept = read(runs.folder / "real.json")
    if kept.get("settings") != settings:
        vae, kept = builders.build_model(config, "cpu").frozen[1], {"settings": settings}
        for way, key in (("text", "fits"), ("edit", "edited")):
            for split in SPLITS:
                table = ceiling(size_px, way, split=split, per_kind=per_kind, vae=vae)
                kept.setdefault(way, {})[split] = overall(table, key)
        runs.folder.mkdir(parents=True, exist_ok=True)
        write(runs.folder / "real.json", kept)
    return {way: kept[way] for way in ("text", "edit")}


def show(name: str, cells: Cells) -> str:
    """Return an experiment as text, a line per cell, way and split."""
    lines = [f"{name:<22}{'':<14}{'seeds':>6}" + f"{'':>4}figures with 95 % intervals"]
    for cell, seeds in cells.items():
        for way in next(iter(seeds.values())):
            keys = ("edited", "kept", "fits") if way.startswith("edit") else ("fits", "colours")
            shares = "   ".join(
                f"{key} {share_in_words(interval(*shares_of(seeds, way, key)))}" for key in keys
            )
            lines.append(f"{cell:<22}{way:<14}{len(seeds):>6}    {shares}")
    return "\n".join(lines)


def paper_table(cells: Cells, split: str = "train", key: str = "fits") -> str:
    """Return the six recipes in the paper's layout: rows pre-train, columns fine-tune."""
    columns = ("image", "pair", "mix")
    lines = [
        f"{f'{key}, {SPLITS[split]}: pre-train | fine-tune':<40}"
        + "".join(f"{column:>24}" for column in columns)
    ]
    for row in ("pair", "image"):
        shares = [
            share_in_words(interval(*shares_of(cells[f"{row} -> {column}"], f"text, {split}", key)))
            if f"{row} -> {column}" in cells
            else "not run"
            for column in columns
        ]
        lines.append(f"{row:<40}" + "".join(f"{share:>24}" for share in shares))
    return "\n".join(lines)


def quoted(name: str, cells: Cells, budget: Budget) -> dict[str, str]:
    """Return {what: figure} of an experiment for the README."""
    figures = {"fits": "all of the caption right", "colours": "number and colours right"}
    if name == "editing":
        figures = {
            "edited": "edit fits and keeps the rest",
            "fits": "edit fits",
            "kept": "edit keeps the rest",
        }
    way, _ = figure_of(name)
    most = max(len(seeds) for seeds in cells.values())
    of = f"shapes dataset, {name}, {budget.pretrain} and {budget.finetune} steps, {most} seeds"
    return {
        f"{of}: {shown}, {SPLITS[split]} combinations": "; ".join(
            f"{cell} {share_in_words(interval(*shares_of(seeds, f'{way}, {split}', key)))}"
            for cell, seeds in cells.items()
        )
        for key, shown in figures.items()
        for split in SPLITS
    }


def publish(
    runs: Runs, names: Iterable[str], path: Path, given: dict, real: dict
) -> dict[str, Cells]:
    """Write all complete results as a JSON and a PNG, and return {experiment: its cells}.

    Experiments that were not requested are included once they have two cells to compare.
    """
    here, rows, of, facts_of, records = machine(), {}, {}, {}, dict(runs.published)
    found = {
        name: cells
        for name in EXPERIMENTS
        if len(cells := runs.gathered(name)) > (0 if name in names else 1)
    }
    for name, cells in found.items():
        mine = quoted(name, cells, runs.budget)
        rows |= mine
        records |= (made := runs.records(name))
        # The runs may have been made on other machines, at other commits.
        facts_of[name] = here | {
            key: ", ".join(
                dict.fromkeys(run["machine"].get(key, "unknown") for run in made.values())
            )
            for key in ("device", "commit")
        }
        of |= dict.fromkeys(mine, facts_of[name])
    findings = compared(found)
    for row in findings:
        if row["seen"]:
            what = f"paper, {row['experiment']}: {row['what']} ({row['paper']})"
            rows[what] = "; ".join(f"{shown}: {in_words(row[shown])}" for shown in SPLITS.values())
            of[what] = facts_of[row["experiment"]]
    rows["shapes dataset, real pictures through the VAE scored as right: limit for any model"] = (
        "; ".join(
            f"{way}, {SPLITS[split]} {share:.2f}"
            for way, shares in real.items()
            for split, share in shares.items()
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write(
        path,
        {
            "machine": here,
            "budget": given,
            "real": real,
            "rows": rows,
            "of": of,
            "findings": findings,
            "experiments": {name: summary(cells) for name, cells in found.items()},
            "runs": records,
        },
    )
    draw(
        found,
        path.with_suffix(".png"),
        {way: statistics.mean(shares.values()) for way, shares in real.items()},
    )
    return found


def status(runs: Runs, names: Iterable[str]) -> str:
    """Return what is done and what is left, a line per cell."""
    found = {name: runs.gathered(name) for name in names}
    lines = [
        f"{name:<10}{cell:<24}{len(found[name].get(cell, {}))} of {runs.budget.seeds} seeds"
        for name in names
        for cell in EXPERIMENTS[name]
    ]
    hours, step_s = runs.hours_left(names)
    return "\n".join(
        [
            *lines,
            f"expected: {hours:.1f} hours left, {runs.budget.jobs} at a time, "
            f"{step_s:.2f} s per step",
        ]
    )


def results_name(name: str, budget: Budget) -> str:
    """Return the name of a budget's results, including steps and seeds that were overridden."""
    own = BUDGETS[name]
    changed = (budget.pretrain, budget.finetune) != (own.pretrain, own.finetune)
    steps = (f"{budget.pretrain}-{budget.finetune}-steps",) if changed else ()
    seeds = (f"{budget.seeds}-seeds",) if budget.seeds != own.seeds else ()
    return "-".join(["recipes", name, *steps, *seeds])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; the resulting budget is in `effective_budget`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "experiments",
        nargs="*",
        help=f"any of {', '.join(EXPERIMENTS)}; default: the budget's",
    )
    parser.add_argument(
        "--budget",
        choices=tuple(BUDGETS),
        default="gpu" if torch.cuda.is_available() else "cpu-night",
        help="cpu-smoke: minutes, for the slow tests; cpu-night: two cores, --status prints the "
        "hours; gpu: recipes and editing on one GPU, not run yet",
    )
    parser.add_argument("--seeds", type=positive(int), help="default: the budget's")
    parser.add_argument(
        "--steps",
        type=positive(int),
        nargs=2,
        metavar=("STAGE_1", "STAGE_2"),
        help="default: the budget's",
    )
    parser.add_argument(
        "--jobs",
        type=positive(int),
        help="cells to run concurrently, with one thread each; default: the budget's",
    )
    parser.add_argument(
        "--status", action="store_true", help="print what is done and what is left, and exit"
    )
    parser.add_argument(
        "--out",
        default=str(ROOT / "runs/recipes"),
        help="folder of the runs; existing ones are reused",
    )
    parser.add_argument("--results", default=str(ROOT / "benchmarks/results"))
    args = parser.parse_args(argv)
    own = BUDGETS[args.budget]
    pretrain, finetune = args.steps or (own.pretrain, own.finetune)
    args.effective_budget = replace(
        own,
        pretrain=pretrain,
        finetune=finetune,
        seeds=args.seeds or own.seeds,
        jobs=args.jobs or own.jobs,
    )
    if args.effective_budget.seeds > max(T_95) + 1:
        parser.error(f"--seeds must be 1 to {max(T_95) + 1}, got {args.effective_budget.seeds}")
    if unknown := set(args.experiments) - set(EXPERIMENTS):
        parser.error(f"no experiment {sorted(unknown)[0]}: choose from {', '.join(EXPERIMENTS)}")
    args.experiments = [
        name for name in EXPERIMENTS if name in (args.experiments or own.experiments)
    ]
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the experiments; return the exit code."""
    args = parse_args(argv)
    budget, names = args.effective_budget, args.experiments
    path = Path(args.results) / f"{results_name(args.budget, budget)}.json"
    runs = Runs(Path(args.out) / args.budget, budget, read(path).get("runs"))
    print(status(runs, names), flush=True)
    if args.status:
        return 0
    if budget.jobs > 1:
        torch.set_num_threads(1)
    real = real_limits(runs)
    given = {**asdict(budget), "name": args.budget, **runs.scored_with()}
    failed = 0
    pool = ThreadPoolExecutor(budget.jobs)
    try:
        cells = [(name, label) for name in names for label in EXPERIMENTS[name]]
        waiting = {
            pool.submit(runs.do, EXPERIMENTS[name][label], seed): f"{name}, {label}, seed {seed}"
            for seed, (name, label) in sorted(
                product(range(budget.seeds), cells), key=lambda job: job[1] not in COMPARED
            )
        }
        for done, label in waiting.items():
            try:
                done.result()
            except Exception as error:
                # The other cells still run.
                failed += 1
                if not isinstance(error, InputError):
                    traceback.print_exception(error)
                words = error if isinstance(error, InputError) else repr(error)
                print(f"iomm: {label}: {words}", file=sys.stderr, flush=True)
                continue
            # Includes cells that ended before this one.
            publish(runs, names, path, given, real)
            print(f"done: {label}; {runs.hours_left(names)[0]:.1f} hours left", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    found = publish(runs, names, path, given, real)
    for name, cells in found.items():
        print(show(name, cells))
    if "recipes" in found:
        print(
            *(
                paper_table(found["recipes"], split, key)
                for key in ("fits", "colours")
                for split in SPLITS
            ),
            sep="\n",
        )
    print(findings_table(compared(found)))
    print(path)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
