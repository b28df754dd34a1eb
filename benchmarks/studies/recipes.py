"""Run the paper's comparisons on the shapes dataset: python benchmarks/studies/recipes.py

    recipes     pre-train on {image, pair} x fine-tune on {image, pair, mix}: the paper's table
    ratio       share of hidden image tokens, in stage 1 and in the image half of stage 2
    adapter     none, MetaQuery, MetaQuery with as many parameters as the RQA (one connector layer
                has its 12 D^2), RQA; also scored on masked images after stage 1
    mix         lambda, the share of images in stage 2
    choices     hidden tokens dropped or zeroed, a Bernoulli or a fixed number of them, outputs at
                the queries or all, the generator aligned or not; runs only if it is named
    editing     "make it red", "add a blue square to the left", which the generator never saw (the
                tiny MLLM did); scored on what was asked for and on what had to stay

A cell is two runs of the engine with the demo configs, the steps of the budget, and the cell's own
settings. Stage 1 on pairs has as many distinct pairs as stage 1 on images has images. Stage 2 has
another seed, so that its images and its few pairs are new to every cell. engine/evaluation/shapes_grades.py
scores seen and unseen combinations on scenes and noise of the cell's seed, the same for every cell;
benchmarks/studies/findings.py computes intervals and verdicts.

Each seed runs all cells before the next begins, the default cell first, and the results are written
after every cell. Runs and scores are kept below --out under a name made from everything that
changes them. To resume a killed command, start it again: what is complete is kept, a run resumes
from its last checkpoint, and a run that is still training is waited for. --status prints what is
done and the hours left.
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
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from threading import Lock

import torch

from benchmarks.report import above_0
from benchmarks.studies.demo import launch
from benchmarks.studies.findings import (
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
# Steps of stage 1 and of stage 2 in a cpu-night, for at least half of the captions fully right in
# the default cell.
NIGHT_STEPS = (1500, 1500)
# Seconds a step with two runs side by side, until a run below --out has measured it.
NIGHT_STEP_S = 0.65
# From a launch to its first step, encoding the dataset included, and from its last step to its end.
START_S = 60.0
# To sample and score a picture.
PICTURE_S = 0.1
# Added to run.seed in stage 2, for other images, pairs, masks and noise than in stage 1.
STAGE_2_SEED = 100
# Of runs that train side by side; neither changes what is computed.
SIDE_BY_SIDE = ("train.threads=1", "train.cpu_ranks=1")
# Of all runs. The paper has no alignment, and pairs could not have it with their latents in memory.
# Nothing is evaluated while a run trains, so that nothing needs to be held out.
EVERY_RUN = ("align.weight=0", "data.heldout=0")
# In the folder of a run.
SCORES = "recipe-scores.json"
FIGURES = ("fits", "number", "colours", "shapes")
FIGURES_OF_EDITS = ("edited", "kept", *FIGURES, "object", "place", "size", "background")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a command runs: steps of both stages, seeds, pictures a kind and split, Euler steps
    of each, cells side by side, expected seconds a step, settings of all runs, experiments.
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
    # Has not run yet. Compiling takes longer than such a run.
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
    """Settings of both stages, of stage 1 and of stage 2; ways of grade() to score after each."""

    both: tuple = ()
    first: tuple = ()
    second: tuple = ()
    after_first: tuple = ()
    after_second: tuple = ("text",)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run; the name of its folder is a hash of all that changes what is computed."""

    stage: str
    steps: int
    settings: tuple
    dir: Path
    init: Path | None = None


PRETRAIN = {"image": ("train.data=image",), "pair": ("train.data=pair", "data.pairs=shapes")}
# In the order in which cells run. Cells that share a stage 1 are not neighbours: side by side, one
# would have to wait for the other.
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


def write(path: Path, content) -> None:
    """Write a JSON file, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def read(path: Path) -> dict:
    """Return what write() wrote, or {} where nothing can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


class Runs:
    """The runs and scores of a budget below a folder; what is there already is not made again."""

    def __init__(self, folder: str | Path, budget: Budget):
        self.folder, self.budget, self.locks = Path(folder), budget, {}

    def locked(self, name) -> Lock:
        """Return the lock of that name; cells side by side may need the same run or score."""
        return self.locks.setdefault(name, Lock())

    @cache
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
        """Return a run; equal ones have the same folder, however their settings are spelt."""
        config = flat(config_of(stage, settings))
        bound = {key: value for key, value in config.items() if key not in FREE_KEYS}
        bound |= {"run.init": init and init.name, "world": dataset.VERSION}
        # of the shipped MLLM and VAE
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
            fast = SIDE_BY_SIDE if self.budget.jobs > 1 and not torch.cuda.is_available() else ()
            init = ("--init", str(run.init)) if run.init is not None else ()
            with open(run.dir / "said.txt", "ab") as said:
                code = launch(
                    "--stage",
                    run.stage,
                    "--resume",
                    "auto",
                    *init,
                    *run.settings,
                    *fast,
                    f"run.dir={run.dir}",
                    f"train.steps={run.steps}",
                    "checkpoint.every_steps=250",
                    "checkpoint.keep=2",
                    "evaluate.every_steps=0",
                    "log.sample_images=0",
                    said=said,
                )
            if code:
                raise InputError(f"a run ended with exit code {code}: see {run.dir}/said.txt")

    def scored_with(self) -> dict:
        """Return what scores depend on beside the run; those kept with other values are redone."""
        return {
            "per_kind": self.budget.per_kind,
            "draw_steps": self.budget.draw_steps,
            "guidance": GUIDANCE,
            "world": dataset.VERSION,
            "judge": scorer.VERSION,
        }

    def known(self, run: Run, ways: Iterable[str]) -> dict[str, dict[str, float]] | None:
        """Return {"text, train": {"fits": share, ..., "pictures": how many}, ...} of a run.

        None if some are missing.
        """
        kept = read(run.dir / SCORES)
        wanted = [f"{way}, {split}" for way in ways for split in SPLITS]
        if wanted and (kept.get("settings") != self.scored_with() or not set(wanted) <= set(kept)):
            return None
        return {name: kept[name] for name in wanted}

    def score(self, run: Run, ways: Iterable[str], seed: int) -> None:
        """Score a trained run in the ways that are missing, and keep the shares in its folder."""
        path = run.dir / SCORES
        with self.locked(path):
            kept, model = read(path), None
            if kept.get("settings") != self.scored_with():
                kept = {"settings": self.scored_with()}
            for way in ways:
                if self.known(run, (way,)) is not None:
                    continue
                if model is None:
                    # The first imports of transformers fail in two threads at once.
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
        """Train and score a cell; what is complete is left as it is."""
        first, second = self.both(cell, seed)
        self.train(first)
        self.score(first, cell.after_first, seed)
        self.train(second)
        self.score(second, cell.after_second, seed)

    def scores(self, cell: Cell, seed: int) -> dict | None:
        """Return all scores of a cell, or None if it is not complete."""
        first, second = self.both(cell, seed)
        found = self.known(first, cell.after_first), self.known(second, cell.after_second)
        return None if None in found else found[0] | found[1]

    def gathered(self, name: str) -> Cells:
        """Return {cell: {seed: scores}} of the complete cells and seeds of an experiment."""
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

    def commits(self, name: str) -> str:
        """Return the commits at which the runs of an experiment were made, in their order."""
        runs = [
            run
            for cell in EXPERIMENTS[name].values()
            for seed in range(self.budget.seeds)
            if self.scores(cell, seed)
            for run in self.both(cell, seed)
        ]
        return ", ".join(
            dict.fromkeys(read(run.dir / "machine.json").get("commit", "unknown") for run in runs)
        )

    def hours_left(self, names: Iterable[str]) -> tuple[float, float]:
        """Return the hours that what is left of experiments will take, and the seconds a step."""
        runs, unscored = {}, set()
        for name in names:
            for cell, seed in product(EXPERIMENTS[name].values(), range(self.budget.seeds)):
                for run, ways in zip(self.both(cell, seed), (cell.after_first, cell.after_second)):
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
        """Return the median seconds a step of the newest log, or the budget's without a log."""
        logs = sorted(self.folder.glob("*/log.jsonl"), key=lambda log: log.stat().st_mtime)
        for log in reversed(logs):
            lines = log.read_text().splitlines()[-100:]
            try:
                if rows := [json.loads(line)["step_s"] for line in lines]:
                    return statistics.median(rows)
            except ValueError:
                # a line that is being written
                continue
        return self.budget.step_s


@cache
def config_of(stage: str, settings: tuple) -> RunConfig:
    """Return the config of a stage with these settings."""
    return load_config(STAGES[stage], settings)


def wait_until_free(run_dir: Path) -> None:
    """Wait for a run that still trains in a folder: its launcher outlives a killed command."""
    # A file system without locks.
    with open(run_dir / ".lock", "a") as file, suppress(OSError):
        # Closing the file gives the lock back.
        fcntl.lockf(file, fcntl.LOCK_EX)


def real_limits(runs: Runs) -> dict:
    """Return {"text": {split: share}, "edit": ...} of real pictures through the VAE.

    This is the limit for any model.
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
    """Return an experiment as text, a line a cell, way and split."""
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
    """Return the six recipes as the paper prints them: rows pre-train, columns fine-tune."""
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
    """Return {what: figure} for the README of one experiment."""
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
    """Write the results of all that is complete, a JSON and a PNG; return {experiment: its cells}.

    Experiments that were not asked for are in it as well, once they have two cells to compare.
    """
    here, rows, of = machine(), {}, {}
    found = {
        name: cells
        for name in EXPERIMENTS
        if len(cells := runs.gathered(name)) > (0 if name in names else 1)
    }
    for name, cells in found.items():
        mine = quoted(name, cells, runs.budget)
        rows |= mine
        of |= dict.fromkeys(mine, {**here, "commit": runs.commits(name)})
    findings = compared(found)
    for row in findings:
        if row["seen"]:
            what = f"paper, {row['experiment']}: {row['what']} ({row['paper']})"
            rows[what] = "; ".join(f"{shown}: {in_words(row[shown])}" for shown in SPLITS.values())
            of[what] = {**here, "commit": runs.commits(row["experiment"])}
    rows["shapes dataset, real pictures through the VAE found right: the limit for any model"] = (
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
        },
    )
    draw(
        found,
        path.with_suffix(".png"),
        {way: statistics.mean(shares.values()) for way, shares in real.items()},
    )
    return found


def status(runs: Runs, names: Iterable[str]) -> str:
    """Return what is done and what is left, a line a cell."""
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
            f"{step_s:.2f} s a step",
        ]
    )


def results_name(name: str, budget: Budget) -> str:
    """Return the name of a budget's results, with steps and seeds that are not the budget's own."""
    own = BUDGETS[name]
    changed = (budget.pretrain, budget.finetune) != (own.pretrain, own.finetune)
    steps = (f"{budget.pretrain}-{budget.finetune}-steps",) if changed else ()
    seeds = (f"{budget.seeds}-seeds",) if budget.seeds != own.seeds else ()
    return "-".join(["recipes", name, *steps, *seeds])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the command line, with the budget as it asks for it in `budget_asked`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "experiments", nargs="*", help=f"of: {', '.join(EXPERIMENTS)}; default: the budget's"
    )
    parser.add_argument(
        "--budget",
        choices=tuple(BUDGETS),
        default="gpu" if torch.cuda.is_available() else "cpu-night",
        help="cpu-smoke: minutes, for the slow tests; cpu-night: two cores, --status prints the "
        "hours; gpu: recipes and editing on one GPU, not run yet",
    )
    parser.add_argument("--seeds", type=above_0(int), help="default: the budget's")
    parser.add_argument(
        "--steps",
        type=above_0(int),
        nargs=2,
        metavar=("STAGE_1", "STAGE_2"),
        help="default: the budget's",
    )
    parser.add_argument(
        "--jobs",
        type=above_0(int),
        help="cells side by side, of one thread each; default: the budget's",
    )
    parser.add_argument(
        "--status", action="store_true", help="print what is done and what is left; runs nothing"
    )
    parser.add_argument(
        "--out",
        default=str(ROOT / "runs/recipes"),
        help="folder of the runs; what is there is not run again",
    )
    parser.add_argument("--results", default=str(ROOT / "benchmarks/results"))
    args = parser.parse_args(argv)
    own = BUDGETS[args.budget]
    pretrain, finetune = args.steps or (own.pretrain, own.finetune)
    args.budget_asked = replace(
        own,
        pretrain=pretrain,
        finetune=finetune,
        seeds=args.seeds or own.seeds,
        jobs=args.jobs or own.jobs,
    )
    if args.budget_asked.seeds > max(T_95) + 1:
        parser.error(f"--seeds must be 1 to {max(T_95) + 1}, got {args.budget_asked.seeds}")
    if unknown := set(args.experiments) - set(EXPERIMENTS):
        parser.error(f"no experiment {sorted(unknown)[0]}: choose of {', '.join(EXPERIMENTS)}")
    args.experiments = [
        name for name in EXPERIMENTS if name in (args.experiments or own.experiments)
    ]
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the experiments; return the exit code."""
    args = parse_args(argv)
    budget, names = args.budget_asked, args.experiments
    runs = Runs(Path(args.out) / args.budget, budget)
    print(status(runs, names), flush=True)
    if args.status:
        return 0
    if budget.jobs > 1:
        torch.set_num_threads(1)
    real = real_limits(runs)
    path = Path(args.results) / f"{results_name(args.budget, budget)}.json"
    given = {**asdict(budget), "name": args.budget, **runs.scored_with()}
    failed = 0
    pool = ThreadPoolExecutor(budget.jobs)
    try:
        waiting = {
            pool.submit(runs.do, cell, seed): f"{name}, {label}, seed {seed}"
            for seed in range(budget.seeds)
            for name in names
            for label, cell in EXPERIMENTS[name].items()
        }
        for done, label in waiting.items():
            try:
                done.result()
            except Exception as error:
                # the other cells go on
                failed += 1
                if not isinstance(error, InputError):
                    traceback.print_exception(error)
                words = error if isinstance(error, InputError) else repr(error)
                print(f"iomm: {label}: {words}", file=sys.stderr, flush=True)
                continue
            # of all that is complete, also of cells that ended before this one
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
