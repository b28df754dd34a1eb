"""Tests of benchmarks/studies/recipes.py and findings.py: intervals, verdicts, runs, and kills."""

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

from benchmarks.report import short_commits
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
    CONCURRENT,
    EXPERIMENTS,
    FIGURES,
    FIGURES_OF_EDITS,
    PICTURE_S,
    SCORES,
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


def test_intervals_match_the_literature():
    assert findings.wilson(0.0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert findings.wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    # Newcombe 1998, table II, example (b): 9/10 - 3/10 by method 10
    assert findings.newcombe(0.9, 0.3, 10) == pytest.approx((0.1705, 0.8090), abs=1e-4)
    # With so many pictures, Student's t decides.
    mean, low, high = findings.interval([0.1, 0.2, 0.3], 10**9)
    half = 4.303 * 0.1 / math.sqrt(3)
    assert (mean, low, high) == pytest.approx((0.2, max(0, 0.2 - half), 0.2 + half))
    # If seeds agree by chance, the number of pictures decides.
    agreeing = findings.interval([0.2, 0.2, 0.2], 100)
    assert (
        agreeing[1:] == pytest.approx(findings.wilson(0.2, 300))
        and agreeing.low < 0.16 < 0.24 < agreeing.high
    )
    assert findings.interval([0.2], 100)[1:] == findings.wilson(0.2, 100)


@pytest.mark.parametrize("spread", [0.0, 0.03, 0.1])
@pytest.mark.parametrize("true, other", [(0.5, 0.5), (0.5, 0.4), (0.85, 0.7), (0.12, 0.12)])
def test_intervals_have_the_claimed_coverage(true, other, spread):
    """Synthetic cells of three trainings with 96 pictures each, whose skill varies by `spread`.

    Of 1,000 such cells, a coverage of 95 % is measured below 93.3 % once in a hundred times.
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
    "low, high, agree, expected",
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
def test_verdict_follows_from_the_interval(low, high, agree, expected):
    found = Interval((low + high) / 2, low, high)
    assert findings.verdict(found, agree, seeds=3, best=0.5) == expected
    # One seed decides nothing about training, nor do models that learned next to nothing.
    assert findings.verdict(found, agree, seeds=1, best=0.5) == "not decided"
    decided = expected if agree is ABOVE else "not decided"
    assert findings.verdict(found, agree, seeds=3, best=LEARNED / 2) == decided


def scores(fits, way="text", pictures=384):
    """Return the Runs.scores of a seed in which unseen combinations are right half as often."""
    keys = FIGURES_OF_EDITS if way == "edit" else FIGURES
    return {
        f"{way}, {split}": dict.fromkeys(keys, share) | {"pictures": pictures}
        for split, share in (("train", fits), ("test", fits / 2))
    }


def test_findings_compare_only_common_seeds():
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


def test_findings_refer_to_existing_cells():
    for finding in FINDINGS:
        cells = EXPERIMENTS[finding.experiment]
        way, key = findings.figure_of(finding.experiment)
        assert (
            way in cells[finding.one].after_second and way in cells[finding.other].after_second
        ), finding
        assert key in (FIGURES_OF_EDITS if way == "edit" else FIGURES)


def test_tables_and_figure_show_both_splits(tmp_path):
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


def test_run_name_depends_on_what_changes_the_result(tmp_path):
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
    concurrent_keys = {setting.partition("=")[0] for setting in CONCURRENT}
    assert STAGES == launch.STAGES and concurrent_keys <= set(FREE_KEYS)


def test_cells_share_common_runs(tmp_path):
    """The runs of one seed.

    Stage 1 runs on images and on pairs, and with 4 more ratios, 3 more adapters and 4 other
    choices. Stage 2 runs for each recipe, after each of these variations, and with 4 more lambdas.
    """
    runs = Runs(tmp_path, NIGHT)
    made = {
        name: [runs.both(cell, 0) for cell in cells.values()] for name, cells in EXPERIMENTS.items()
    }
    assert len({first.dir for cells in made.values() for first, _ in cells}) == 2 + 4 + 3 + 4
    assert len({second.dir for cells in made.values() for _, second in cells}) == 6 + 4 + 3 + 4 + 4
    default = made["recipes"][0]
    # The default cell comes first in all experiments.
    for name in EXPERIMENTS:
        assert [run.dir for run in made[name][0]] == [run.dir for run in default], name


def test_stage_1_has_equal_numbers_of_pairs_and_images(tmp_path, monkeypatch):
    """The datasets of all runs of all seeds are recorded in builders.prepare_data."""
    written = []
    monkeypatch.setattr(
        builders,
        "write_dataset",
        lambda folder, num_images, seed: written.append((num_images, seed)),
    )
    monkeypatch.setattr(builders, "ensure_index", lambda *_, **__: tmp_path)
    monkeypatch.setattr(builders, "warnings_on", lambda index: ())
    monkeypatch.setattr(builders, "load", lambda index: None)
    runs, of = Runs(tmp_path, NIGHT), {}
    for cells in EXPERIMENTS.values():
        for cell in cells.values():
            for seed in range(NIGHT.seeds):
                for run in runs.both(cell, seed):
                    config = load_config(STAGES[run.stage], run.settings)
                    assert config.train.data in ("image", "pair", "mix")
                    for pairs in (False, True):
                        if config.train.data != ("image", "pair")[not pairs]:
                            written.clear()
                            builders.prepare_data(config, progress=False, pairs=pairs)
                            of.setdefault(
                                (run.stage, ("images", "pairs")[pairs], seed), set()
                            ).update(written)
    images, few = load_config("demo").data.num_images, load_config("demo-finetune").data.num_pairs
    # Every cell has the same datasets.
    assert len(of) == 4 * NIGHT.seeds and all(len(datasets) == 1 for datasets in of.values())
    numbers = {key: datasets.copy().pop()[0] for key, datasets in of.items()}
    assert all(
        number == (few if key[:2] == ("finetune", "pairs") else images)
        for key, number in numbers.items()
    )
    seeds = [datasets.copy().pop()[1] for datasets in of.values()]
    # No dataset is contained in another.
    assert len(set(seeds)) == len(seeds)
    pictures = [
        {scene(seed, i) for i in range(number)}
        for (number, seed) in (of["pretrain", "pairs", 0].pop(), of["finetune", "pairs", 0].pop())
    ]
    assert [len(some) for some in pictures] == [images, few] and not pictures[0] & pictures[1]


@pytest.fixture
def fake_engine(monkeypatch):
    """recipes.main() without training or sampling; returns a record of launches and scorings.

    A launch writes a checkpoint of its last step. Launch number `dies_at` writes one of half that
    step, and then the command ends. Half of the pictures are right.
    """
    record = SimpleNamespace(
        commit="a" * 40, device="first", launched=[], drawn=[], dies_at=None, error=None
    )

    def launched(*arguments, output):
        steps = int(next(a for a in arguments if a.startswith("train.steps=")).partition("=")[2])
        run_dir = Path(next(a for a in arguments if a.startswith("run.dir=")).partition("=")[2])
        if len(record.launched) == record.dies_at:
            # The command is already dead.
            raise KeyboardInterrupt
        record.launched.append((run_dir.name, *arguments))
        (run_dir / "machine.json").write_text(
            json.dumps({"commit": record.commit, "device": record.device})
        )
        dies = len(record.launched) == record.dies_at
        (run_dir / f"checkpoints/step-{steps // 2 if dies else steps:08d}").mkdir(
            parents=True, exist_ok=True
        )
        if dies:
            raise KeyboardInterrupt
        return 0

    def draw_and_score(model, size_px, way, *, split, per_kind, steps, guidance, seed):
        record.drawn.append((way, split, seed))
        if record.error is not None and len(record.drawn) == 1:
            raise record.error
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
        "machine": lambda: {"date": "2026-01-02", "commit": record.commit, "device": record.device},
        "real_limits": lambda runs: {way: {"train": 1.0, "test": 1.0} for way in ("text", "edit")},
        "builders.load_run": lambda *_, **__: (load_config("demo"), None, None),
    }.items():
        monkeypatch.setattr(f"benchmarks.studies.recipes.{name}", value)
    return record


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


def test_night_runs_findings_first_then_seed_by_seed(tmp_path, fake_engine, monkeypatch):
    night = replace(NIGHT, jobs=1, seeds=2)
    monkeypatch.setitem(BUDGETS, "cpu-smoke", night)
    (found,) = results(tmp_path).values()
    launched = [next(iter(cell)) for cell in fake_engine.launched]
    runs = Runs(tmp_path / "runs/cpu-smoke", night)
    # The points of a curve that no finding compares come last.
    last = {"ratio": {"0.25", "0.75"}, "adapter": {"metaquery, as large"}, "mix": {"0.7"}}
    order = [
        run.dir.name
        for is_last in (False, True)
        for seed in range(2)
        for name in NIGHT.experiments
        for label, cell in EXPERIMENTS[name].items()
        if (label in last.get(name, ())) == is_last
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
    # Ratios are sorted for display.
    assert list(found["experiments"]["ratio"]) == [
        "0.0",
        "0.25",
        "0.5",
        "0.75",
        "0.95",
    ]
    assert set(found["experiments"]["adapter"]["rqa"]) == {
        f"{way}, {split}" for way in ("image", "text") for split in SPLITS
    }
    # Each seed is scored on different scenes.
    assert {seed for _, _, seed in fake_engine.drawn} == {0, 1}
    assert set(found["rows"]) - set(found["of"]) == {
        row for row in found["rows"] if "real pictures" in row
    }


@pytest.mark.parametrize("dies_at", [1, 2, 5])
def test_recipes_resume_after_kill_without_repeating(tmp_path, fake_engine, dies_at):
    """Killed in stage 1 and in stage 2 of the first cell, and in the third cell."""
    whole = results(tmp_path / "whole")
    launched, drawn = [name for name, *_ in fake_engine.launched], len(fake_engine.drawn)
    fake_engine.launched.clear()
    fake_engine.drawn.clear()
    fake_engine.dies_at = dies_at
    with pytest.raises(KeyboardInterrupt):
        results(tmp_path)
    written = tmp_path / "results/recipes-cpu-smoke.json"
    # Results are written after each cell.
    if dies_at == 5:
        assert set(json.loads(written.read_text())["experiments"]["recipes"]) == {
            "image -> mix",
            "pair -> mix",
        }
    fake_engine.dies_at = None
    assert results(tmp_path) == whole
    names = [name for name, *_ in fake_engine.launched]
    assert names[:dies_at] == launched[:dies_at] and names[dies_at:] == launched[dies_at - 1 :]
    assert len(fake_engine.drawn) == drawn
    assert all(
        "--resume" in arguments and "auto" in arguments for _, *arguments in fake_engine.launched
    )
    before = len(fake_engine.launched)
    assert results(tmp_path) == whole and len(fake_engine.launched) == before


def test_night_continues_on_another_machine(tmp_path, fake_engine, capsys):
    """The second machine has the result file, but none of the runs."""
    whole = results(tmp_path, "recipes")
    path = tmp_path / "results/recipes-cpu-smoke.json"
    found = json.loads(path.read_text())
    lost = found["runs"].popitem()[0]
    path.write_text(json.dumps(found))
    fake_engine.launched.clear()
    fake_engine.device, elsewhere = "second", ("recipes", "--out", str(tmp_path / "elsewhere"))
    again = results(tmp_path, *elsewhere)
    launched = [name for name, *_ in fake_engine.launched]
    # Stage 1 again as well, because the lost stage 2 starts from it.
    assert launched[1:] == [lost] and len(launched) == 2
    (old,), (new,) = whole.values(), again.values()
    assert new["experiments"] == old["experiments"] and new["runs"].keys() == old["runs"].keys()
    assert {facts["device"] for facts in new["of"].values()} == {"first, second"}
    # Other cells used the first stage 1, so only stage 2 names the second machine.
    devices = {name: run["machine"]["device"] for name, run in new["runs"].items()}
    assert devices == dict.fromkeys(devices, "first") | {lost: "second"}
    capsys.readouterr()
    assert main(["--budget", "cpu-smoke", "--results", str(path.parent), "--status"]) == 0
    assert "expected: 0.0 hours left" in capsys.readouterr().out
    # The default cell of `adapter` lacks only the score of its stage 1.
    runs = Runs(tmp_path / "fourth", BUDGETS["cpu-smoke"], json.loads(path.read_text())["runs"])
    cell = EXPERIMENTS["adapter"]["rqa"]
    assert runs.left(cell, 0) == [(runs.both(cell, 0)[0], ("image",))]
    # Scores of another judge or world are not taken over.
    found = json.loads(path.read_text())
    for run in found["runs"].values():
        run["scores"] |= {"settings": {}}
    path.write_text(json.dumps(found))
    fake_engine.launched.clear()
    results(tmp_path, "recipes", "--out", str(tmp_path / "third"))
    assert len(fake_engine.launched) == 8


def test_wait_until_free_waits_for_a_training_run(tmp_path):
    """After a SIGKILL of the command only, its run continues and keeps its lock until it ends."""
    code = (
        "import sys, time; from pathlib import Path\n"
        "from iomm.engine.resilience import checkpoint_writer\n"
        "folder = Path(sys.argv[1]); checkpoint_writer.lock_run_dir(folder)\n"
        "print('taken', flush=True)\n"
        "time.sleep(1); (folder / 'ended').touch()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT
    ) as other:
        assert other.stdout.readline() == b"taken\n"
        wait_until_free(tmp_path)
        assert (tmp_path / "ended").exists()
    # The command itself must not keep the lock, which the run that it starts needs.
    wait_until_free(tmp_path)


def test_status_prints_what_is_left_and_runs_nothing(tmp_path, fake_engine, capsys):
    def status_output():
        capsys.readouterr()
        assert main(["--budget", "cpu-smoke", "--out", str(tmp_path / "runs"), "--status"]) == 0
        return capsys.readouterr().out

    first = status_output()
    assert first.count("0 of 1 seeds") == 6 and "hours left" in first and not fake_engine.launched
    runs = Runs(tmp_path / "runs/cpu-smoke", BUDGETS["cpu-smoke"])
    hours, step_s = runs.hours_left(("recipes",))
    assert step_s == BUDGETS["cpu-smoke"].step_s and hours > 0
    results(tmp_path)
    assert status_output().count("1 of 1 seeds") == 6 and runs.hours_left(("recipes",))[0] == 0
    night = Runs(tmp_path / "night", NIGHT)
    # Stage 1 and stage 2 of a seed.
    training = 9 * (START_S + NIGHT.pretrain * NIGHT.step_s)
    training += 17 * (START_S + NIGHT.finetune * NIGHT.step_s)
    # Each stage 2, the adapters after stage 1, and the edits of two cells are scored.
    scoring = (17 + 4 + 2) * 2 * NIGHT.per_kind * len(KINDS) * PICTURE_S
    expected = NIGHT.seeds * (training + scoring) / 3600 / NIGHT.jobs
    assert night.hours_left(NIGHT.experiments) == (pytest.approx(expected), NIGHT.step_s)
    # The median of the newest log counts.
    for name, steps in (("a", 0.2), ("b", 0.5)):
        (tmp_path / f"night/{name}").mkdir(parents=True)
        (tmp_path / f"night/{name}/log.jsonl").write_text(
            "".join(json.dumps({"step_s": steps * i}) + "\n" for i in (1, 1, 9))
        )
    assert night.hours_left(NIGHT.experiments)[1] == 0.5


def test_concurrent_runs_have_one_thread_each(tmp_path, fake_engine):
    results(tmp_path)
    assert not any(
        setting in arguments for _, *arguments in fake_engine.launched for setting in CONCURRENT
    )
    again = tmp_path / "again"
    found = results(again, "--jobs", "2")
    assert all(
        setting in arguments for _, *arguments in fake_engine.launched[8:] for setting in CONCURRENT
    )
    # These are the same runs.
    assert {name for name, *_ in fake_engine.launched[:8]} == {
        name for name, *_ in fake_engine.launched[8:]
    }
    assert (
        len(fake_engine.launched) == 16 and found["recipes-cpu-smoke.json"]["budget"]["jobs"] == 2
    )


def test_results_name_contains_overridden_steps_and_seeds(tmp_path, fake_engine):
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
    asked = parse_args(["--budget", "cpu-night", "--steps", "30", "20"]).effective_budget
    assert (asked.pretrain, asked.finetune) == (30, 20) and results_name(
        "cpu-night", asked
    ) == "recipes-cpu-night-30-20-steps"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--seeds", "0"], "must be a whole number above 0, got 0"),
        (["--steps", "0", "1"], "must be a whole number above 0, got 0"),
        (["--jobs", "-1"], "must be a whole number above 0, got -1"),
        (["--seeds", "9"], "--seeds must be 1 to 5, got 9"),
        (["colours"], "no experiment colours: choose from recipes"),
    ],
)
def test_invalid_recipes_options_are_rejected(tmp_path, fake_engine, capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        results(tmp_path, *options)
    assert message in capsys.readouterr().err and not (tmp_path / "results").exists()


def test_results_keep_rows_of_earlier_experiments(tmp_path, fake_engine):
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
    launched, drawn = len(fake_engine.launched), len(fake_engine.drawn)
    # The runs exist already, so they are only sampled and scored.
    (both,) = results(tmp_path, "editing").values()
    assert (
        len(fake_engine.launched) == launched
        and fake_engine.drawn[drawn:] == [("edit", split, 0) for split in SPLITS] * 2
    )
    assert (
        both["experiments"].keys() == {"recipes", "editing"}
        and found["rows"].items() <= both["rows"].items()
    )
    assert set(both["experiments"]["editing"]["image -> mix"]["edit, train"]) == set(
        FIGURES_OF_EDITS
    )


def test_rows_name_the_commits_of_their_runs(tmp_path, fake_engine):
    def commits():
        (found,) = results(tmp_path).values()
        return {facts["commit"] for facts in found["of"].values()}

    assert commits() == {"a" * 40}
    # Results that are written later still name the commits of their runs.
    fake_engine.commit = "b" * 40
    assert commits() == {"a" * 40}
    sorted((tmp_path / "runs/cpu-smoke").glob("finetune-*"))[0].joinpath("machine.json").unlink()
    assert {*commits().pop().split(", ")} == {"a" * 40, "unknown"}
    assert (
        short_commits(f"{'a' * 40}, {'b' * 40} and changes") == "aaaaaaaaa, bbbbbbbbb+"
        and short_commits("c" * 40) == "ccccccccc"
    )


@pytest.mark.parametrize(
    "error, message",
    [
        (InputError("no such run"), "mix, seed 0: no such run"),
        (RuntimeError("out of memory"), "mix, seed 0: RuntimeError('out of memory')"),
    ],
)
def test_failed_cell_is_reported_and_others_still_run(
    tmp_path, fake_engine, capsys, error, message
):
    fake_engine.error = error
    (found,) = results(tmp_path, ends=1).values()
    assert set(found["experiments"]["recipes"]) == set(EXPERIMENTS["recipes"]) - {"image -> mix"}
    output = capsys.readouterr().err
    assert f"iomm: recipes, image -> {message}" in output
    assert ("Traceback" in output) == isinstance(error, RuntimeError)
    (found,) = results(tmp_path).values()
    assert set(found["experiments"]["recipes"]) == set(EXPERIMENTS["recipes"])


def test_scores_are_redone_if_damaged_or_outdated(tmp_path, fake_engine, monkeypatch):
    runs = Runs(tmp_path, NIGHT)
    run = runs.both(Cell(), 0)[1]
    run.dir.mkdir(parents=True)
    path = run.dir / SCORES
    expected = {
        f"text, {split}": dict.fromkeys(FIGURES, share) | {"pictures": len(KINDS) * NIGHT.per_kind}
        for split, share in (("train", 0.5), ("test", 0.25))
    }

    def drawn(runs):
        before = len(fake_engine.drawn)
        runs.score(run, ("text",), 0)
        assert runs.known(run, ("text",)) == expected | {
            name: shares | {"pictures": len(KINDS) * runs.budget.per_kind}
            for name, shares in expected.items()
        }
        assert not list(run.dir.glob(".*.partial"))
        return len(fake_engine.drawn) - before

    # A file that was cut off in the middle of a write that was not atomic.
    path.write_text(json.dumps(expected)[:40])
    assert drawn(runs) == 2 and drawn(runs) == 0
    kept = path.read_text()
    # Scores of another way are added to it.
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
    # The old file stays until the new one is complete.
    assert path.read_text() == kept


def test_night_budget_scores_enough_pictures():
    assert (
        NIGHT.per_kind >= 32
        and NIGHT.seeds == 3
        and set(NIGHT.experiments) == set(EXPERIMENTS) - {"choices"}
    )


@pytest.mark.slow
def test_smoke_budget_resumes_after_kill(tmp_path):
    """With the real engine. Only the command is killed while a second cell trains, not its run."""
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
    # The cells share 2 runs of stage 1.
    assert len(runs) == 2 + 6
    logs = {run: (run.parent / "log.jsonl").read_text() for run in runs}
    # The runs exist already, so they are only sampled and scored, not trained again.
    subprocess.run([*command, "editing"], check=True, timeout=3600)
    both = json.loads(path.read_text())["experiments"]
    assert both.keys() == {"recipes", "editing"} and both["recipes"] == found["recipes"]
    assert {run: (run.parent / "log.jsonl").read_text() for run in runs} == logs
