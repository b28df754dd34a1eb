"""The paper's comparisons in the shapes world, each cell two runs of the real engine: python benchmarks/recipes.py

    recipes     pre-train on {image, pair} x fine-tune on {image, pair, mix}: the paper's 2 x 3 table
    adapter     none, metaquery, metaquery with as many parameters as the RQA (one connector layer has its 12 D^2), rqa:
                score on masked images against steps of stage 1, on captions after stage 2
    ratio       share of hidden image tokens, in stage 1 and in the image half of stage 2
    mix         lambda, the share of images in stage 2
    choices     hidden tokens dropped or zeroed, outputs at the queries or all, Bernoulli or a fixed number
    editing     "make it red", "add a blue square to the left": the generator never saw one (the tiny MLLM reads such sentences)

All cells of an experiment have the same steps, batches, learning rates and seeds, those of the demo configs; nothing is tuned
for a cell. Both stages have the same seed: one that goes on with the data of the stage before sees its very draws again. A
cell is scored by engine/shapes/grade.py on captions like those of training and on unseen combinations, drawn with guidance 2
in every cell; all seeds draw the same scenes, so intervals are those of training. Runs lie under --out and are kept: started
again, the command goes on where it stopped, and cells share the runs that they have in common. After a change of code or of
the demo configs give another --out. --budget cpu-smoke: minutes, the slow tests' | cpu-night: 7 hours on two slow cores |
gpu: recipes and editing, by estimate within 25 minutes of one H200, several runs side by side; it has not run yet."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "benchmarks"))]

import argparse  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import shutil  # noqa: E402
import statistics  # noqa: E402
import traceback  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from dataclasses import asdict, dataclass, replace  # noqa: E402
from itertools import product  # noqa: E402
from threading import Lock  # noqa: E402

import torch  # noqa: E402

from benchmarks.demo import launch  # noqa: E402
from benchmarks.report import above_0, pyplot  # noqa: E402
from iomm.config import InputError  # noqa: E402
from iomm.engine import checkpoint, parts  # noqa: E402
from iomm.engine.config import load_config  # noqa: E402
from iomm.engine.doctor import machine  # noqa: E402
from iomm.engine.shapes import score, world  # noqa: E402
from iomm.engine.shapes.grade import GUIDANCE, ceiling, grade, overall  # noqa: E402

# Student's t, two-sided 95 %, by number of seeds less one.
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Steps of stage 1 and 2, seeds, pictures a kind, Euler steps, runs at once, what else every run is given, experiments."""

    pretrain: int
    finetune: int
    seeds: int
    per_kind: int
    draw_steps: int
    at_once: int
    settings: tuple = ()
    experiments: tuple = ("recipes", "adapter", "ratio", "mix", "choices", "editing")


BUDGETS = {
    "cpu-smoke": Budget(pretrain=2, finetune=2, seeds=1, per_kind=1, draw_steps=1, at_once=1, experiments=("recipes",),
                        settings=("train.global_batch=4", "data.num_images=64", "data.num_pairs=16", "log.sample_images=0")),
    # two runs of one thread each get more done than one of two: 0.82 and 0.93 s a step side by side, 0.54 alone (LOG.md, 2026-11-26)
    "cpu-night": Budget(pretrain=400, finetune=400, seeds=3, per_kind=16, draw_steps=20, at_once=2,
                        settings=("log.sample_images=0", "train.threads=1")),
    # An estimate, it has not run: 24 runs, 6 side by side, are 5 stages after one another, each 25 s to start and 1,000 steps of 0.1 s (some
    # 3,000 launches, six processes on one GPU), 625 s. Scoring 18 + 3 times 192 pictures, 0.05 s of CPU each to judge, one at a time, and
    # as much to draw, is 400 s, the judge's limit 30 s: 18 minutes, so 25 leave room for error. All six experiments would be 111 runs.
    "gpu": Budget(pretrain=1000, finetune=1000, seeds=3, per_kind=16, draw_steps=20, at_once=6, experiments=("recipes", "editing"),
                  settings=("log.sample_images=0", "train.compile=false")),      # compiling takes longer than such a run
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What both stages, stage 1 alone and stage 2 alone are given; nothing that the demo configs say too, so that cells that
    are alike share their runs. points: parts of stage 1 after which masked images are scored. ways: of grade(), after stage 2."""

    both: tuple = ()
    first: tuple = ()
    second: tuple = ()
    points: tuple = ()
    ways: tuple = ("text",)


QUARTERS = (0.25, 0.5, 0.75, 1.0)
EXPERIMENTS = {
    "recipes": {f"{a} -> {b}": Cell(first=first, second=second)
                for a, first in (("pair", ("train.data=pair", "data.pairs=shapes")), ("image", ()))
                for b, second in (("image", ("train.data=image",)), ("pair", ("train.data=pair",)), ("mix", ()))},
    "adapter": {
        "none": Cell(both=("adapter.kind=none", "adapter.conditions=all"), points=QUARTERS),
        "metaquery": Cell(both=("adapter.kind=metaquery",), points=QUARTERS),
        "metaquery, as large": Cell(both=("adapter.kind=metaquery", "adapter.connector_layers=1"), points=QUARTERS),
        "rqa": Cell(points=QUARTERS)},
    "ratio": {str(ratio): Cell(both=(f"mask.ratio={ratio}",)) for ratio in (0.0, 0.25, 0.45, 0.65, 0.85, 0.95)},
    "mix": {str(share): Cell(second=() if share == 0.5 else (f"data.mix={share}",)) for share in (0.0, 0.1, 0.3, 0.5, 0.7, 1.0)},
    "choices": {"drop, query, bernoulli": Cell(), "zero": Cell(both=("mask.mode=zero",)),
                "all": Cell(both=("adapter.conditions=all",)), "fixed": Cell(both=("mask.count=fixed",))},
    "editing": {"image -> mix": Cell(ways=("edit",))},
}


def write(path, content):
    """A JSON file that is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def read(path):
    """What write() wrote, or {} where there is nothing that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


class Runs:
    """The runs below a folder, each named by what it was given; what is there already is not run again."""

    def __init__(self, folder, budget):
        self.folder, self.budget, self.locks = Path(folder), budget, {}

    def dir(self, stage, steps, settings, init=None):
        name = hashlib.sha256(json.dumps([stage, sorted(settings), init and init.name]).encode()).hexdigest()[:12]
        return self.folder / f"{stage}-{name}-{steps}"

    def train(self, stage, steps, settings, init=None, before=None):
        """-> the folder of a run of so many steps; `before`: that of one of fewer steps, which it goes on from."""
        run_dir = self.dir(stage, steps, settings, init)
        folder = checkpoint.newest(run_dir / "checkpoints", say=lambda line: None)
        if folder is None and before is not None:
            shutil.copytree(before, run_dir, dirs_exist_ok=True)
        if folder is None or checkpoint.step_of(folder) < steps:
            run_dir.mkdir(parents=True, exist_ok=True)
            with open(run_dir / "said.txt", "ab") as said:
                code = launch("--stage", stage, "--resume", "auto", *(["--init", str(init)] if init else []), *settings,
                              f"run.dir={run_dir}", f"train.steps={steps}", "checkpoint.every_steps=500", said=said)
            if code:
                raise InputError(f"a run ended with exit code {code}: see {run_dir}/said.txt")
            write(run_dir / "machine.json", machine())
        return run_dir

    def scores(self, run_dir, ways, steps):
        """{"text, train": share of pictures that fit, ...} of a trained run; kept in its folder beside what they depend on."""
        path, settings = run_dir / f"scores-{steps}.json", self.scored_with()
        known = read(path)
        if known.get("settings") != settings:
            known = {"settings": settings}
        wanted = [(way, split) for way in ways for split in ("train", "test")]
        if any(f"{way}, {split}" not in known for way, split in wanted):
            with self.locked("transformers"):            # its first imports fail in two threads at once
                config, model, _ = parts.load_run(run_dir, device="cuda" if torch.cuda.is_available() else "cpu")
            for way, split in wanted:
                table, _ = grade(model, config.data.size_px, way, split=split, per_kind=self.budget.per_kind,
                                 steps=self.budget.draw_steps, guidance=GUIDANCE[way])
                known[f"{way}, {split}"] = {key: overall(table, key) for key in ("fits", "number", "colours", "shapes")}
            write(path, known)
        return {f"{way}, {split}": known[f"{way}, {split}"] for way, split in wanted}

    def scored_with(self):
        """What kept scores depend on beside the run; those of a file that does not say so are the first judge's, and found anew."""
        return {"per_kind": self.budget.per_kind, "draw_steps": self.budget.draw_steps, "guidance": GUIDANCE, "world": world.VERSION,
                "judge": score.VERSION}

    def cell(self, cell, seed):
        """-> ({steps of both stages so far: scores}, [commit that each of its runs was made at; None of one that does not say])."""
        shared, first, found, made = [f"run.seed={seed}", *self.budget.settings, *cell.both], None, {}, []
        for point in sorted({*cell.points, 1.0}):
            steps = max(1, round(point * self.budget.pretrain))
            with self.locked(f"{seed} {cell.both} {cell.first}"):         # cells that run side by side share stage 1
                first = self.train("pretrain", steps, [*shared, *cell.first], before=first)
            made.append(first)
            if point in cell.points:
                found[steps] = self.scores(first, ("image",), steps)
        second = self.train("finetune", self.budget.finetune, [*shared, *cell.second], init=first)
        found[self.budget.pretrain + self.budget.finetune] = self.scores(second, cell.ways, self.budget.finetune)
        return found, [read(run_dir / "machine.json").get("commit") for run_dir in (*made, second)]

    def locked(self, name):
        return self.locks.setdefault(name, Lock())


def limit_of_the_judge(size_px, per_kind=100):
    return {"size_px": size_px, "per_kind": per_kind,
            "fits": {kind: row["fits"] for kind, row in ceiling(size_px, per_kind=per_kind).items()}}


def interval(values):
    """(mean, half of the 95 % interval of the mean by Student's t; None from one value)."""
    if len(values) < 2:
        return values[0], None
    return statistics.mean(values), T_95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def summed(per_seed):
    """[{steps: {way: {key: share}}} of each seed] -> the same with {"mean", "interval", "seeds"} in place of a share."""
    first = per_seed[0]
    return {steps: {way: {key: dict(zip(("mean", "interval"), interval(values := [seed[steps][way][key] for seed in per_seed])),
                                    seeds=values) for key in keys} for way, keys in ways.items()} for steps, ways in first.items()}


def in_words(share):
    """A share of `summed` as "0.200 +-0.248"."""
    return f"{share['mean']:.3f}" + ("" if share["interval"] is None else f" +-{share['interval']:.3f}")


def show(name, cells):
    """One experiment as text: a line a cell and point."""
    lines = [f"{name:<28}{'steps':>7}{'':>3}" + "".join(f"{key:>16}" for key in ("fits", "number", "colours", "shapes"))]
    for cell, points in cells.items():
        for steps, ways in points.items():
            for way, keys in ways.items():
                lines.append(f"{cell:<22}{way:>12}{steps:>7}" + "".join(f"{in_words(share):>16}" for share in keys.values()))
    return "\n".join(lines)


def paper_table(cells, key="fits", split="train"):
    """The six recipes as the paper prints them: rows pre-train, columns fine-tune. split: "test" are unseen combinations."""
    shown = key if split == "train" else f"{key}, unseen"
    lines = [f"{f'{shown}: pre-train | fine-tune':<40}" + "".join(f"{column:>18}" for column in ("image", "pair", "mix"))]
    for row in ("pair", "image"):
        shares = [list(cells[f"{row} -> {column}"].values())[-1][f"text, {split}"][key] for column in ("image", "pair", "mix")]
        lines.append(f"{row:<40}" + "".join(f"{in_words(share):>18}" for share in shares))
    return "\n".join(lines)


def bars(cells, split="train"):
    """[(label, {key: share})] of every cell on a split, by the first of its ways; of one scored on the way, after each stage."""
    def first(ways):
        return next((way, shares) for way, shares in ways.items() if way.endswith(f", {split}"))

    return [(f"{cell} at {steps} ({way.split(',')[0]})" if len(points) > 1 else cell, shares) for cell, points in cells.items()
            for steps, ways in list(points.items())[-2:] for way, shares in [first(ways)]]


def judged(real):
    """{what: figure} for the README of limit_of_the_judge()."""
    return {f"shapes world, real pictures at {real['size_px']} px found right by the judge, {real['per_kind']} a kind: what a perfect "
            "model would get": "; ".join(f"{kind} {share:.2f}" for kind, share in real["fits"].items())}


def quoted(name, cells, budget):
    """{what: figure} for the README of one experiment."""
    return {f"shapes world, {name}, {budget['pretrain']} and {budget['finetune']} steps, {budget['seeds']} seeds: {shown}": "; ".join(
        f"{label} {in_words(shares[key])}" for label, shares in bars(cells, split))
        for key, split, shown in (("colours", "train", "number and colours right"), ("fits", "train", "all of the caption right"),
                                  ("colours", "test", "number and colours right, unseen combinations"))}


def draw_against_steps(axis, cells):
    """Colours on masked images along stage 1, a line a cell, and on captions after stage 2."""
    for i, (cell, points) in enumerate(cells.items()):
        found = [(int(steps), next(iter(ways.values()))["colours"]) for steps, ways in points.items()]
        x = [steps * (1 + 0.01 * i) for steps, _ in found]       # side by side, so that intervals do not hide each other
        y, yerr = [share["mean"] for _, share in found], [share["interval"] or 0 for _, share in found]
        line = axis.errorbar(x[:-1], y[:-1], yerr[:-1], capsize=2, marker=".", label=f"{cell}, colours")
        axis.errorbar(x[-1:], y[-1:], yerr[-1:], capsize=2, marker="s", color=line[0].get_color())
    axis.set_xticks([steps for steps, _ in found], [*(f"{steps}, masked images" for steps, _ in found[:-1]), f"{found[-1][0]}, captions"],
                    fontsize=6)


def draw_bars(experiments, path):
    """A PNG: per experiment the share of whole captions and of colours that are right, with intervals."""
    if (plt := pyplot()) is None:
        return
    figure, axes = plt.subplots(len(experiments), 1, figsize=(9, 2.6 * len(experiments)), squeeze=False)
    for axis, (name, cells) in zip(axes[:, 0], experiments.items()):
        if any(len(points) > 1 for points in cells.values()):
            draw_against_steps(axis, cells)
        else:
            for shift, key, split, shown in ((-0.27, "fits", "train", "fits"), (0, "colours", "train", "colours"),
                                             (0.27, "colours", "test", "colours, unseen combinations")):
                rows = bars(cells, split)
                axis.bar([i + shift for i in range(len(rows))], [row[key]["mean"] for _, row in rows], 0.27, label=shown,
                         yerr=[row[key]["interval"] or 0 for _, row in rows], capsize=2)
            axis.set_xticks(range(len(rows)), [label for label, _ in rows], fontsize=6)
        axis.set_ylim(0, 1)
        axis.set_title(name, fontsize=9)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def results_name(name, budget):
    """Of a budget's results; steps and seeds stand in it where they are not the budget's own."""
    own = BUDGETS[name]
    steps = () if (budget.pretrain, budget.finetune) == (own.pretrain, own.finetune) else (f"{budget.pretrain}-steps",)
    seeds = () if budget.seeds == own.seeds else (f"{budget.seeds}-seeds",)
    return "-".join(["recipes", name, *steps, *seeds])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", help=f"of: {', '.join(EXPERIMENTS)}; default: the budget's")
    parser.add_argument("--budget", choices=tuple(BUDGETS), default="gpu" if torch.cuda.is_available() else "cpu-night")
    parser.add_argument("--seeds", type=above_0(int), help="default: the budget's")
    parser.add_argument("--steps", type=above_0(int), help="of either stage; default: the budget's")
    parser.add_argument("--out", default=str(ROOT / "runs/recipes"), help="folder of the runs; what is there is not run again")
    parser.add_argument("--results", default=str(ROOT / "benchmarks/results"))
    args = parser.parse_args(argv)
    budget = BUDGETS[args.budget]
    budget = replace(budget, seeds=args.seeds or budget.seeds, pretrain=args.steps or budget.pretrain,
                     finetune=args.steps or budget.finetune)
    if budget.seeds > max(T_95) + 1:
        parser.error(f"--seeds must be 1 to {max(T_95) + 1}, got {budget.seeds}")
    unknown = set(args.experiments) - set(EXPERIMENTS)
    if unknown:
        parser.error(f"no experiment {sorted(unknown)[0]}: choose of {', '.join(EXPERIMENTS)}")
    runs = Runs(Path(args.out) / args.budget, budget)
    given = json.loads(json.dumps({**asdict(budget), "name": args.budget, **runs.scored_with()}))
    path = Path(args.results) / f"{results_name(args.budget, budget)}-{machine()['date']}.json"
    kept = read(path)      # other experiments of today
    if kept.get("budget") != given:
        real = limit_of_the_judge(load_config("demo").data.size_px)
        kept = {"machine": machine(), "budget": given, "rows": judged(real), "of": {}, "real": real, "experiments": {}}
    found, failed = kept["experiments"], 0
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in args.experiments or budget.experiments:
        cells, found[name], commits = EXPERIMENTS[name], {}, {}
        with ThreadPoolExecutor(budget.at_once) as pool:
            waiting = {cell: [pool.submit(runs.cell, cells[cell], seed) for seed in range(budget.seeds)] for cell in cells}
            for cell, seeds in waiting.items():                # written as each is done: a night that is cut short keeps them
                try:
                    scores, made_at = zip(*(one.result() for one in seeds))
                    found[name][cell] = summed(scores)
                except Exception as error:                     # the others go on
                    failed += 1
                    if not isinstance(error, InputError):
                        traceback.print_exception(error)
                    words = error if isinstance(error, InputError) else repr(error)
                    print(f"iomm: {name}, {cell}: {words}", file=sys.stderr, flush=True)
                    continue
                rows = quoted(name, found[name], given)
                kept["rows"].update(rows)
                here = machine()
                commits.update((commit or here["commit"], None) for one in made_at for commit in one)      # in their order
                kept["of"].update(dict.fromkeys(rows, {**here, "commit": ", ".join(commits)}))
                write(path, kept)
        print(show(name, found[name]), flush=True)
        if name == "recipes" and len(found[name]) == len(cells):
            for key, split in product(("fits", "colours"), ("train", "test")):
                print(paper_table(found[name], key, split), flush=True)
    draw_bars({name: cells for name, cells in found.items() if cells}, path.with_suffix(".png"))
    print(path)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
