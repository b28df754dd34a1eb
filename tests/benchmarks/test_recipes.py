"""The paper's comparisons on the shapes dataset: intervals, verdicts, runs of a cell, and kills."""

import json
import math
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.report import short
from benchmarks.studies import findings
from benchmarks.studies.findings import (
    ABOVE,
    AS_GOOD,
    FINDINGS,
    LEARNED,
    LEVEL,
    NO_WORSE,
    SPLITS,
    Interval,
)
from benchmarks.studies.recipes import (
    BUDGETS,
    EXPERIMENTS,
    FIGURES,
    FIGURES_OF_EDITS,
    PICTURE_S,
    SCORES,
    SIDE_BY_SIDE,
    STAGES,
    START_S,
    Cell,
    Runs,
    main,
    paper_table,
    parse_args,
    results_name,
    show,
    wait_until_free,
)
from iomm.config import InputError
from iomm.engine import builders, launch
from iomm.engine.config import FREE_KEYS, load_config
from iomm.engine.evaluation.shapes_grades import GUIDANCE
from iomm.engine.resilience import checkpoint_reader
from iomm.engine.shapes.dataset import KINDS, scene

ROOT = Path(__file__).resolve().parents[2]
NIGHT = BUDGETS["cpu-night"]


def test_intervals_are_those_of_the_literature():
    assert findings.wilson(0.0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert findings.wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    # Newcombe 1998, table II, example (b): 9/10 - 3/10 by method 10
    assert findings.newcombe(0.9, 0.3, 10) == pytest.approx((0.1705, 0.8090), abs=1e-4)
    mean, low, high = findings.interval(
        [0.1, 0.2, 0.3],
        10**9,
        # So many pictures that Student's t decides.
    )
    half = 4.303 * 0.1 / math.sqrt(3)
    assert (mean, low, high) == pytest.approx((0.2, max(0, 0.2 - half), 0.2 + half))
    agreeing = findings.interval(
        [0.2, 0.2, 0.2],
        100,
        # The pictures decide where seeds agree by chance.
    )
    assert (
        agreeing[1:] == pytest.approx(findings.wilson(0.2, 300))
        and agreeing.low < 0.16 < 0.24 < agreeing.high
    )
    assert findings.interval([0.2], 100)[1:] == findings.wilson(0.2, 100)


@pytest.mark.parametrize("spread", [0.0, 0.03, 0.1])
@pytest.mark.parametrize("true, other", [(0.5, 0.5), (0.5, 0.4), (0.85, 0.7), (0.12, 0.12)])
def test_intervals_hold_the_truth_as_often_as_they_claim(true, other, spread):
    """Made-up cells: three trainings whose skill differs by `spread`, 96 pictures each, 1,000
    times. Of so many a coverage of 95 % is below 93.3 % once in a hundred times.
    """
    rng, pictures, trials = random.Random(0), 96, 1000

    def shares(skill):
        skills = [min(1, max(0, rng.gauss(skill, spread))) for _ in range(3)]
        return [sum(rng.random() < seed for _ in range(pictures)) / pictures for seed in skills]

    held = differs = 0
    for _ in range(trials):
        one, two = shares(true), shares(other)
        _, low, high = findings.interval(one, pictures)
        held += low <= true <= high
        _, low, high = findings.difference(one, two, pictures)
        differs += low <= true - other <= high
    assert held >= 0.933 * trials and differs >= 0.933 * trials


@pytest.mark.parametrize(
    "low, high, agree, wanted",
    [
        (0.01, 0.2, ABOVE, "reproduced"),
        (-0.01, 0.2, ABOVE, "not decided"),
        (-0.2, -0.01, ABOVE, "contradicted"),
        (0.0, 0.2, ABOVE, "reproduced"),
        (-0.2, 0.0, ABOVE, "not decided"),
        (-LEVEL / 2, 0.3, NO_WORSE, "reproduced"),
        (-2 * LEVEL, 0.3, NO_WORSE, "not decided"),
        (-0.3, -2 * LEVEL, NO_WORSE, "contradicted"),
        (-LEVEL / 2, LEVEL / 2, AS_GOOD, "reproduced"),
        (-LEVEL / 2, 2 * LEVEL, AS_GOOD, "not decided"),
        (2 * LEVEL, 0.3, AS_GOOD, "contradicted"),
    ],
)
def test_a_verdict_follows_from_the_interval_alone(low, high, agree, wanted):
    found = Interval((low + high) / 2, low, high)
    assert findings.verdict(found, agree, seeds=3, best=0.5) == wanted
    # Nothing is known of training from one seed, nor of models that learned next to nothing.
    assert findings.verdict(found, agree, seeds=1, best=0.5) == "not decided"
    decided = wanted if agree is ABOVE else "not decided"
    assert findings.verdict(found, agree, seeds=3, best=LEARNED / 2) == decided


def scores(fits, way="text", pictures=384):
    """What Runs.scores returns of one seed, unseen combinations half as often right."""
    keys = FIGURES_OF_EDITS if way == "edit" else FIGURES
    return {
        f"{way}, {split}": dict.fromkeys(keys, share) | {"pictures": pictures}
        for split, share in (("train", fits), ("test", fits / 2))
    }


def test_findings_are_compared_over_the_seeds_that_both_cells_have():
    cells = {
        "image -> mix": {0: scores(0.9), 1: scores(0.86), 2: scores(0.88)},
        "image -> image": {0: scores(0.3), 1: scores(0.34)},
    }
    rows = findings.compared({"recipes": cells})
    assert len(rows) == len(FINDINGS)
    row = next(row for row in rows if row["what"].startswith("fine-tuning needs captions"))
    assert row["seen"]["seeds"] == 2 and row["seen"]["one"] == pytest.approx(0.88)
    assert (
        row["seen"]["difference"]["mean"] == pytest.approx(0.56)
        and row["seen"]["verdict"] == "reproduced"
    )
    assert row["unseen"]["difference"]["mean"] == pytest.approx(0.28)
    assert [bool(other["seen"]) for other in rows].count(True) == 1
    table = findings.findings_table(rows)
    assert (
        table.count("not run") == 2 * (len(FINDINGS) - 1)
        and "+0.56" in table
        and "0.89, 0.61" in table
    )
    alone = findings.compared({"recipes": {cell: {0: seeds[0]} for cell, seeds in cells.items()}})
    assert findings.in_words(alone[0]["seen"]).endswith("not decided (one seed)")


def test_every_finding_is_of_cells_that_are_run():
    for finding in FINDINGS:
        cells = EXPERIMENTS[finding.experiment]
        way, key = findings.figure_of(finding.experiment)
        assert (
            way in cells[finding.one].after_second and way in cells[finding.other].after_second
        ), finding
        assert key in (FIGURES_OF_EDITS if way == "edit" else FIGURES)


def test_tables_and_the_figure_show_seen_and_unseen_combinations(tmp_path):
    cells = {
        cell: {seed: scores(share) for seed, share in enumerate((0.1, 0.2, 0.3))}
        for cell in EXPERIMENTS["recipes"]
    }
    assert (
        paper_table(cells).count("0.20 (0.00 to 0.45)")
        == paper_table(cells, "test").count("0.10 (0.00 to 0.22)")
        == 6
    )
    assert "not run" in paper_table({"image -> mix": cells["image -> mix"]})
    assert show("recipes", cells).count("fits 0.10 (0.00 to 0.22)   colours 0.10") == 6
    pytest.importorskip("matplotlib")
    edited = {cell: {0: scores(0.2, "edit")} for cell in EXPERIMENTS["editing"]}
    findings.draw(
        {"recipes": cells, "editing": edited}, tmp_path / "all.png", {"text": 1.0, "edit": 0.9}
    )
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_runs_are_named_by_what_changes_what_they_compute(tmp_path):
    runs = Runs(tmp_path, NIGHT)
    default = runs.run("pretrain", 100, ("run.seed=0",))
    spelt = runs.run(
        "pretrain",
        100,
        (
            "run.seed=0",
            "adapter.kind=rqa",
            "train.threads=1",
            f"mask.ratio={load_config('demo').mask.ratio}",
        ),
    )
    assert spelt.dir == default.dir
    for other in (
        ("pretrain", 200, ("run.seed=0",)),
        ("pretrain", 100, ("run.seed=1",)),
        ("finetune", 100, ("run.seed=0",)),
        ("pretrain", 100, ("run.seed=0", "mask.ratio=0.1")),
        ("pretrain", 100, ("run.seed=0",), tmp_path / "init"),
    ):
        assert runs.run(*other).dir != default.dir
    assert STAGES == launch.STAGES and {
        setting.partition("=")[0] for setting in SIDE_BY_SIDE
    } <= set(FREE_KEYS)


def test_cells_share_the_runs_that_they_have_in_common(tmp_path):
    """Of one seed: stage 1 on images and on pairs, with 4 more ratios, 3 more adapters and 4 other
    choices; stage 2 for each of the recipes, after each of those, and with 4 more lambdas.
    """
    runs = Runs(tmp_path, NIGHT)
    made = {
        name: [runs.both(cell, 0) for cell in cells.values()] for name, cells in EXPERIMENTS.items()
    }
    assert len({first.dir for cells in made.values() for first, _ in cells}) == 2 + 4 + 3 + 4
    assert len({second.dir for cells in made.values() for _, second in cells}) == 6 + 4 + 3 + 4 + 4
    default = made["recipes"][0]
    # The default cell comes first in all of them.
    for name in EXPERIMENTS:
        assert [run.dir for run in made[name][0]] == [run.dir for run in default], name


def test_stage_1_on_pairs_has_as_many_new_pairs_as_there_are_images(tmp_path, monkeypatch):
    """The datasets of all runs of all seeds are read off builders.prepare_data."""
    asked = []
    monkeypatch.setattr(
        builders, "write_dataset", lambda folder, num_images, seed: asked.append((num_images, seed))
    )
    monkeypatch.setattr(builders, "ensure_index", lambda *_, **__: tmp_path)
    monkeypatch.setattr(builders, "warnings_on", lambda index: ())
    monkeypatch.setattr(builders, "load", lambda index: None)
    runs, of = Runs(tmp_path, NIGHT), {}
    for name, cells in EXPERIMENTS.items():
        for label, cell in cells.items():
            for seed in range(NIGHT.seeds):
                for run in runs.both(cell, seed):
                    config = load_config(STAGES[run.stage], run.settings)
                    assert config.train.data in ("image", "pair", "mix")
                    for pairs in (False, True):
                        if config.train.data != ("image", "pair")[not pairs]:
                            asked.clear()
                            builders.prepare_data(config, progress=False, pairs=pairs)
                            of.setdefault(
                                (run.stage, ("images", "pairs")[pairs], seed), set()
                            ).update(asked)
    images, few = load_config("demo").data.num_images, load_config("demo-finetune").data.num_pairs
    assert len(of) == 4 * NIGHT.seeds and all(
        len(datasets) == 1
        for datasets in of.values()
        # Alike in every cell.
    )
    numbers = {key: datasets.copy().pop()[0] for key, datasets in of.items()}
    assert all(
        number == (few if key[:2] == ("finetune", "pairs") else images)
        for key, number in numbers.items()
    )
    seeds = [datasets.copy().pop()[1] for datasets in of.values()]
    # No dataset is part of another.
    assert len(set(seeds)) == len(seeds)
    pictures = [
        {scene(seed, i) for i in range(number)}
        for (number, seed) in (of["pretrain", "pairs", 0].pop(), of["finetune", "pairs", 0].pop())
    ]
    assert [len(some) for some in pictures] == [images, few] and not pictures[0] & pictures[1]


@pytest.fixture
def played(monkeypatch):
    """recipes.main() without training or drawing. A launch leaves a checkpoint of its last step;
    the launch number dies_at leaves one of half of it, and there the command ends. Every picture is
    half right. Keeps what was launched and drawn.
    """
    told = SimpleNamespace(commit="a" * 40, launched=[], drawn=[], dies_at=None, error=None)

    def launched(*arguments, said):
        steps = int(next(a for a in arguments if a.startswith("train.steps=")).partition("=")[2])
        run_dir = Path(next(a for a in arguments if a.startswith("run.dir=")).partition("=")[2])
        if len(told.launched) == told.dies_at:
            # The command is gone.
            raise KeyboardInterrupt
        told.launched.append((run_dir.name, *arguments))
        (run_dir / "machine.json").write_text(json.dumps({"commit": told.commit}))
        dies = len(told.launched) == told.dies_at
        (run_dir / f"checkpoints/step-{steps // 2 if dies else steps:08d}").mkdir(
            parents=True, exist_ok=True
        )
        if dies:
            raise KeyboardInterrupt
        return 0

    def draw_and_score(model, size_px, way, *, split, per_kind, steps, guidance, seed):
        told.drawn.append((way, split, seed))
        if told.error is not None and len(told.drawn) == 1:
            raise told.error
        share = {"train": 0.5, "test": 0.25}[split]
        keys = FIGURES_OF_EDITS if way == "edit" else FIGURES
        return {"colors": {**dict.fromkeys(keys, share), "pictures": len(KINDS) * per_kind}}, []

    def newest(root):
        return (checkpoint_reader.steps(root) or [None])[-1]

    for name, value in {
        "launch": launched,
        "grade": draw_and_score,
        "draw": lambda *_: None,
        "checkpoint_reader.newest": newest,
        "machine": lambda: {"date": "2026-01-02", "commit": told.commit},
        "real_limits": lambda runs: {way: {"train": 1.0, "test": 1.0} for way in ("text", "edit")},
        "builders.load_run": lambda *_, **__: (load_config("demo"), None, None),
    }.items():
        monkeypatch.setattr(f"benchmarks.studies.recipes.{name}", value)
    return told


def results(tmp_path, *arguments, ends=0):
    """{file name: content} after one recipes.main()."""
    given = [
        "--budget",
        "cpu-smoke",
        "--out",
        str(tmp_path / "runs"),
        "--results",
        str(tmp_path / "results"),
        *arguments,
    ]
    assert main(given) == ends
    return {path.name: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}


def test_a_night_does_the_default_cell_first_and_all_cells_before_the_next_seed(
    tmp_path, played, monkeypatch
):
    night = replace(NIGHT, jobs=1, seeds=2)
    monkeypatch.setitem(BUDGETS, "cpu-smoke", night)
    (found,) = results(tmp_path).values()
    launched = [next(iter(cell)) for cell in played.launched]
    runs = Runs(tmp_path / "runs/cpu-smoke", night)
    order = [
        run.dir.name
        for seed in range(2)
        for name in NIGHT.experiments
        for cell in EXPERIMENTS[name].values()
        for run in runs.both(cell, seed)
    ]
    assert NIGHT.experiments == ("recipes", "ratio", "adapter", "mix", "editing")
    assert launched == list(dict.fromkeys(order)) and len(launched) == 2 * (9 + 17)
    assert found["experiments"].keys() == set(NIGHT.experiments)
    assert all(
        len(shares["fits"]["seeds"]) == 2
        for cells in found["experiments"].values()
        for ways in cells.values()
        for shares in ways.values()
    )
    assert [row["seen"]["seeds"] for row in found["findings"]] == [2] * len(FINDINGS)
    assert list(found["experiments"]["ratio"]) == [
        "0.0",
        "0.25",
        "0.5",
        "0.75",
        "0.95",
        # Shown in order
    ]
    assert set(found["experiments"]["adapter"]["rqa"]) == {
        f"{way}, {split}" for way in ("image", "text") for split in SPLITS
    }
    # Each seed has scenes of its own.
    assert {seed for _, _, seed in played.drawn} == {0, 1}
    assert set(found["rows"]) - set(found["of"]) == {
        row for row in found["rows"] if "real pictures" in row
    }


@pytest.mark.parametrize("dies_at", [1, 2, 5])
def test_a_killed_command_repeats_nothing_that_is_complete(tmp_path, played, dies_at):
    """Killed in stage 1 and in stage 2 of the first cell, and in the third cell."""
    whole = results(tmp_path / "whole")
    launched, drawn = [name for name, *_ in played.launched], len(played.drawn)
    played.launched.clear()
    played.drawn.clear()
    played.dies_at = dies_at
    with pytest.raises(KeyboardInterrupt):
        results(tmp_path)
    written = tmp_path / "results/recipes-cpu-smoke.json"
    # Results are written after each cell.
    if dies_at == 5:
        assert set(json.loads(written.read_text())["experiments"]["recipes"]) == {
            "image -> mix",
            "pair -> mix",
        }
    played.dies_at = None
    assert results(tmp_path) == whole
    names = [name for name, *_ in played.launched]
    assert names[:dies_at] == launched[:dies_at] and names[dies_at:] == launched[dies_at - 1 :]
    assert len(played.drawn) == drawn
    assert all("--resume" in arguments and "auto" in arguments for _, *arguments in played.launched)
    before = len(played.launched)
    assert results(tmp_path) == whole and len(played.launched) == before


def test_a_run_that_is_still_training_is_waited_for(tmp_path):
    """As after a SIGKILL of the command alone: its run goes on, and keeps its lock to its end."""
    code = (
        "import sys, time; from pathlib import Path; from iomm.engine.resilience import checkpoint_writer\n"
        "folder = Path(sys.argv[1]); checkpoint_writer.lock_run_dir(folder); print('taken', flush=True)\n"
        "time.sleep(1); (folder / 'ended').touch()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT
    ) as other:
        assert other.stdout.readline() == b"taken\n"
        wait_until_free(tmp_path)
        assert (tmp_path / "ended").exists()
    # Nor does the command keep the lock from the run that it starts.
    wait_until_free(tmp_path)


def test_status_runs_nothing_and_says_what_is_left(tmp_path, played, capsys):
    def said():
        capsys.readouterr()
        assert main(["--budget", "cpu-smoke", "--out", str(tmp_path / "runs"), "--status"]) == 0
        return capsys.readouterr().out

    first = said()
    assert first.count("0 of 1 seeds") == 6 and "hours left" in first and not played.launched
    runs = Runs(tmp_path / "runs/cpu-smoke", BUDGETS["cpu-smoke"])
    hours, step_s = runs.hours_left(("recipes",))
    assert step_s == BUDGETS["cpu-smoke"].step_s and hours > 0
    results(tmp_path)
    assert said().count("1 of 1 seeds") == 6 and runs.hours_left(("recipes",))[0] == 0
    night = Runs(tmp_path / "night", NIGHT)
    # stage 1 of a seed
    training = 9 * (START_S + NIGHT.pretrain * NIGHT.step_s)
    training += 17 * (START_S + NIGHT.finetune * NIGHT.step_s)
    # of each stage 2, of the adapters after stage 1, and the edits of two
    scoring = (17 + 4 + 2) * 2 * NIGHT.per_kind * len(KINDS) * PICTURE_S
    expected = NIGHT.seeds * (training + scoring) / 3600 / NIGHT.jobs
    assert night.hours_left(NIGHT.experiments) == (pytest.approx(expected), NIGHT.step_s)
    # The newest log, and of that the median.
    for name, steps in (("a", 0.2), ("b", 0.5)):
        (tmp_path / f"night/{name}").mkdir(parents=True)
        (tmp_path / f"night/{name}/log.jsonl").write_text(
            "".join(json.dumps({"step_s": steps * i}) + "\n" for i in (1, 1, 9))
        )
    assert night.hours_left(NIGHT.experiments)[1] == 0.5


def test_runs_side_by_side_have_one_thread_each(tmp_path, played):
    results(tmp_path)
    assert not any(
        setting in arguments for _, *arguments in played.launched for setting in SIDE_BY_SIDE
    )
    again = tmp_path / "again"
    found = results(again, "--jobs", "2")
    assert all(
        setting in arguments for _, *arguments in played.launched[8:] for setting in SIDE_BY_SIDE
    )
    assert {name for name, *_ in played.launched[:8]} == {
        name
        for name, *_ in played.launched[8:]
        # The same runs
    }
    assert len(played.launched) == 16 and found["recipes-cpu-smoke.json"]["budget"]["jobs"] == 2


def test_results_of_other_steps_or_seeds_are_files_of_their_own(tmp_path, played):
    (own,) = results(tmp_path).items()
    assert own[0] == "recipes-cpu-smoke.json"
    for given, name in (
        (("--steps", "3", "2"), "-3-2-steps"),
        (("--seeds", "2"), "-2-seeds"),
        (("--steps", "3", "4", "--seeds", "2"), "-3-4-steps-2-seeds"),
        (("--steps", "2", "2", "--seeds", "1"), ""),
    ):
        found = results(tmp_path, *given)
        assert f"recipes-cpu-smoke{name}.json" in found and found[own[0]] == own[1]
    assert len(found) == 4
    asked = parse_args(["--budget", "cpu-night", "--steps", "30", "20"]).budget_asked
    assert (asked.pretrain, asked.finetune) == (30, 20) and results_name(
        "cpu-night", asked
    ) == "recipes-cpu-night-30-20-steps"


@pytest.mark.parametrize(
    "options, said",
    [
        (["--seeds", "0"], "must be a whole number above 0, got 0"),
        (["--steps", "0", "1"], "must be a whole number above 0, got 0"),
        (["--jobs", "-1"], "must be a whole number above 0, got -1"),
        (["--seeds", "9"], "--seeds must be 1 to 5, got 9"),
        (["colours"], "no experiment colours: choose of recipes"),
    ],
)
def test_mistakes_of_the_command_line(tmp_path, played, capsys, options, said):
    with pytest.raises(SystemExit, match="2"):
        results(tmp_path, *options)
    assert said in capsys.readouterr().err and not (tmp_path / "results").exists()


def test_seen_and_unseen_combinations_are_quoted_and_kept_beside_another_experiment(
    tmp_path, played
):
    (found,) = results(tmp_path).values()
    rows = {
        what.rpartition(": ")[2]: figure
        for what, figure in found["rows"].items()
        if ", recipes, " in what
    }
    assert set(rows) == {
        f"{what} right, {split} combinations"
        for what in ("all of the caption", "number and colours")
        for split in ("seen", "unseen")
    }
    assert rows["all of the caption right, seen combinations"].count(" 0.50 (0.19 to 0.81)") == 6
    assert rows["all of the caption right, unseen combinations"].count(" 0.25 (") == 6
    launched, drawn = len(played.launched), len(played.drawn)
    # Of runs that are there: only drawn and scored.
    (both,) = results(tmp_path, "editing").values()
    assert (
        len(played.launched) == launched
        and played.drawn[drawn:] == [("edit", split, 0) for split in SPLITS] * 2
    )
    assert (
        both["experiments"].keys() == {"recipes", "editing"}
        and found["rows"].items() <= both["rows"].items()
    )
    assert set(both["experiments"]["editing"]["image -> mix"]["edit, train"]) == set(
        FIGURES_OF_EDITS
    )


def test_rows_name_the_commits_of_their_runs(tmp_path, played):
    def commits():
        (found,) = results(tmp_path).values()
        return {facts["commit"] for facts in found["of"].values()}

    assert commits() == {"a" * 40}
    # Results written later name the commits of what they sum up.
    played.commit = "b" * 40
    assert commits() == {"a" * 40}
    sorted((tmp_path / "runs/cpu-smoke").glob("finetune-*"))[0].joinpath("machine.json").unlink()
    assert {*commits().pop().split(", ")} == {"a" * 40, "unknown"}
    assert (
        short(f"{'a' * 40}, {'b' * 40} and changes") == "aaaaaaaaa, bbbbbbbbb+"
        and short("c" * 40) == "ccccccccc"
    )


@pytest.mark.parametrize(
    "error, said",
    [
        (InputError("no such run"), "mix, seed 0: no such run"),
        (RuntimeError("out of memory"), "mix, seed 0: RuntimeError('out of memory')"),
    ],
)
def test_a_cell_that_fails_is_reported_and_the_others_go_on(tmp_path, played, capsys, error, said):
    played.error = error
    (found,) = results(tmp_path, ends=1).values()
    assert set(found["experiments"]["recipes"]) == set(EXPERIMENTS["recipes"]) - {"image -> mix"}
    words = capsys.readouterr().err
    assert f"iomm: recipes, image -> {said}" in words and ("Traceback" in words) == isinstance(
        error, RuntimeError
    )
    (found,) = results(tmp_path).values()
    assert set(found["experiments"]["recipes"]) == set(EXPERIMENTS["recipes"])


def test_kept_scores_are_whole_and_of_the_settings_asked_for(tmp_path, played, monkeypatch):
    runs = Runs(tmp_path, NIGHT)
    run = runs.both(Cell(), 0)[1]
    run.dir.mkdir(parents=True)
    path = run.dir / SCORES
    wanted = {
        f"text, {split}": dict.fromkeys(FIGURES, share) | {"pictures": len(KINDS) * NIGHT.per_kind}
        for split, share in (("train", 0.5), ("test", 0.25))
    }

    def drawn(runs):
        before = len(played.drawn)
        runs.score(run, ("text",), 0)
        assert runs.known(run, ("text",)) == wanted | {
            name: shares | {"pictures": len(KINDS) * runs.budget.per_kind}
            for name, shares in wanted.items()
        }
        assert not list(run.dir.glob(".*.partial"))
        return len(played.drawn) - before

    path.write_text(
        json.dumps(wanted)[:40]
        # A kill in the middle of a write that was none of ours.
    )
    assert drawn(runs) == 2 and drawn(runs) == 0
    kept = path.read_text()
    # Another way is added.
    runs.score(run, ("edit",), 0)
    assert runs.known(run, ("text", "edit")).keys() == {
        f"{way}, {split}" for way in ("text", "edit") for split in SPLITS
    }
    path.write_text(kept)
    for changed in (replace(runs.budget, per_kind=8), replace(runs.budget, draw_steps=10)):
        assert drawn(Runs(tmp_path, changed)) == 2
    for name, value in (
        ("scorer.VERSION", 99),
        ("dataset.VERSION", 99),
        ("GUIDANCE", {**GUIDANCE, "text": 3.0}),
    ):
        monkeypatch.setattr(f"benchmarks.studies.recipes.{name}", value)
        assert drawn(runs) == 2 and drawn(runs) == 0
    kept = path.read_text()
    monkeypatch.setattr("os.replace", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception, match="killed"):
        runs.score(run, ("image",), 0)
    # What was there is there until the new is whole.
    assert path.read_text() == kept


def test_the_night_scores_enough_pictures():
    assert (
        NIGHT.per_kind >= 32
        and NIGHT.seeds == 3
        and set(NIGHT.experiments) == set(EXPERIMENTS) - {"choices"}
    )


@pytest.mark.slow
def test_the_smoke_budget_resumes_after_a_kill(tmp_path):
    """The real engine. Only the command is killed while a second cell trains; that run goes on."""
    command = [
        sys.executable,
        str(ROOT / "benchmarks/studies/recipes.py"),
        "--budget",
        "cpu-smoke",
        "--out",
        str(tmp_path / "runs"),
        "--results",
        str(tmp_path),
    ]
    path, deadline = tmp_path / "recipes-cpu-smoke.json", time.monotonic() + 1800
    begun = subprocess.Popen(command)
    while not path.exists() or len(list((tmp_path / "runs/cpu-smoke").glob("*/config.yaml"))) < 3:
        assert begun.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    first = json.loads(path.read_text())["experiments"]["recipes"]
    assert "image -> mix" in first and len(first) < 6
    subprocess.run(command, check=True, timeout=3600)
    found = json.loads(path.read_text())["experiments"]
    assert set(found["recipes"]) == set(EXPERIMENTS["recipes"])
    assert found["recipes"]["image -> mix"] == first["image -> mix"]
    runs = list((tmp_path / "runs/cpu-smoke").glob("*/config.yaml"))
    # stage 1 is shared by the cells
    assert len(runs) == 2 + 6
    logs = {run: (run.parent / "log.jsonl").read_text() for run in runs}
    # Of runs that are there: only sampled and scored, none is trained again.
    subprocess.run([*command, "editing"], check=True, timeout=3600)
    both = json.loads(path.read_text())["experiments"]
    assert both.keys() == {"recipes", "editing"} and both["recipes"] == found["recipes"]
    assert {run: (run.parent / "log.jsonl").read_text() for run in runs} == logs
