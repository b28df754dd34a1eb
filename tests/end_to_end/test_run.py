"""Whole runs through the launcher: interrupted and resumed, on 1 and 2 ranks, with bad input."""

import gzip
import json
import subprocess
import sys
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from launches import (
    BUILDS,
    LIMIT_S,
    PIXELS,
    ROOT,
    environment,
    hashes,
    launch,
    launch_and_kill,
    rows,
    start,
    start_and_kill,
)
from PIL import Image

from iomm.config import PRESETS, GeneratorConfig
from iomm.engine import launch as launch_module
from iomm.engine.builders import load_run, load_weights, open_source, prepare_data
from iomm.engine.cli import main
from iomm.engine.config import parse
from iomm.engine.evaluation.heldout import Evaluation, fixed
from iomm.engine.launch import main as launch_main
from iomm.engine.observe.report import read_run
from iomm.engine.resilience import checkpoint_reader
from iomm.engine.shapes.dataset import write_dataset
from iomm.pipeline import Pipeline

# Fixes the rounding of the test config, and adds ZeRO-3.
BASE = [
    "--config",
    PIXELS,
    "precision=fp32",
    "optim.kind=adamw",
    "optim.lr=1e-3",
    "data.size_px=32",
    "model.vae=pixel:4",
    "ema.decay=0.99",
    "zero.stage=3",
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_dataset(folder, num_images=72, size_px=32, seed=1, shard_size=24)
    return folder


@pytest.fixture(scope="module")
def settings(dataset):
    return [
        f"data.shards={dataset}",
        "train.steps=6",
        "train.global_batch=16",
        "checkpoint.every_steps=2",
        "data.flip=true",
        "log.sample_images=0",
        "train.threads=1",
        "data.heldout=8",
        "adapter.connector_layers=1",
        *BASE,
    ]


EVALUATED = [
    "evaluate.every_steps=2",
    "evaluate.num_images=3",
    "evaluate.steps=1",
    "evaluate.micro_batch=4",
]


@pytest.fixture(scope="module")
def golden(settings, tmp_path_factory):
    """Folder of the uninterrupted run on two ranks."""
    run_dir = tmp_path_factory.mktemp("golden") / "run"
    done = start(2, f"run.dir={run_dir}", *settings)
    assert done.returncode == 0, done.stdout
    return run_dir


def test_every_step_is_logged_with_all_keys(golden):
    found = rows(golden / "log.jsonl")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert [row["samples_seen"] for row in found] == [16, 32, 48, 64, 80, 96]
    for row in found:
        assert set(row) == {
            "step",
            "samples_seen",
            "loss",
            "align_loss",
            "loss_by_time",
            "grad_norm",
            "lr",
            "images_per_s",
            "tokens_per_s",
            "mfu",
            "data_wait_s",
            "step_s",
            "time_s",
            "memory_gib",
            "skipped_steps",
            "skipped_samples",
            "cut_captions",
            "gpu_hours",
            "gpu_hours_left",
        }
        assert set(row["time_s"]) >= {
            "data",
            "vae",
            "vit",
            "prefix",
            "adapter",
            "suffix",
            "generator",
            "backward",
            "optimizer",
            "ema",
            "other",
        }
        # Times are those since the previous row.
        assert ("checkpoint" in row["time_s"]) == (row["step"] in (3, 5))
        assert sum(row["time_s"].values()) == pytest.approx(row["step_s"])
        assert row["tokens_per_s"] == pytest.approx(row["images_per_s"] * (64 + 16))
        assert row["loss"] > 0 and row["grad_norm"] > 0 and row["skipped_steps"] == 0
    assert list((golden / "tb").glob("events*"))
    first, second = [(golden / f"logs/rank-0000{rank}.txt").read_text() for rank in (0, 1)]
    assert "step 1/6  loss" in first and "rank 1 of 2, process" in second and "loss" not in second
    assert [p.name for p in checkpoint_reader.steps(golden / "checkpoints")] == [
        "step-00000002",
        "step-00000004",
        "step-00000006",
    ]


@pytest.fixture(scope="module")
def survivor(settings, tmp_path_factory):
    """The same run, killed, resumed and evaluated: its folder and the last process."""
    run_dir = tmp_path_factory.mktemp("survivor") / "run"
    return run_dir, killed_and_resumed(run_dir, (3,), settings, start_and_kill, start)


def killed_and_resumed(run_dir, kill_after, settings, kill, finish):
    """Kill a run after each of these steps, then finish it. Starts alternate train.overlap.

    kill and finish start the ranks: with DeepSpeed's launcher, or forked, which is faster.
    """
    arguments = ["--resume", "auto", f"run.dir={run_dir}", *settings, *EVALUATED]
    overlap = cycle(("train.overlap=true", "train.overlap=false"))
    for step in kill_after:
        kill(2, run_dir / "log.jsonl", step, *arguments, next(overlap))
    return finish(2, *arguments, next(overlap))


def assert_bitwise(run_dir, golden):
    ours, theirs = rows(run_dir / "log.jsonl"), rows(golden / "log.jsonl")
    assert [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in ours] == [
        (r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in theirs
    ]
    # Masters, moments and EMA of both ranks, by SHA-256.
    assert hashes(run_dir) == hashes(golden)


def test_resume_after_kill_with_evaluation_is_bitwise(golden, survivor):
    run_dir, done = survivor
    assert done.returncode == 0, done.stdout
    assert_bitwise(run_dir, golden)
    assert not [p for p in (run_dir / "checkpoints").iterdir() if p.name.startswith(".")]
    assert not list(BUILDS.rglob("*")), (
        "an op was built just in time: a kill during that leaves a lock that blocks every start"
    )


@pytest.mark.slow
def test_resume_after_several_kills_is_bitwise(golden, settings, tmp_path):
    """Kills before the first checkpoint and while one is written."""
    done = killed_and_resumed(tmp_path / "run", (1, 2, 4, 5), settings, launch_and_kill, launch)
    assert done.returncode == 0, done.stdout
    assert_bitwise(tmp_path / "run", golden)


WITH_AND_WITHOUT = """
import sys
from iomm.config import PRESETS, GeneratorConfig
from iomm.engine.parallel import ranks as group
from iomm.engine.config_parser import layered
from iomm.engine.launch import main as launch
# DeepSpeed creates its process groups only once per process.
group.stop = lambda: None
PRESETS["demo"] = GeneratorConfig(width=64, num_heads=2, num_blocks=2)
root, *settings = sys.argv[1:]
stages = [("false", stage) for stage in range(4)] + [("true", stage) for stage in (0, 3)]
for compiled, stage in stages:
    for precision in ("fp32", "bf16"):
        for every in (0, 1):
            name = f"{compiled}-{stage}-{precision}-{every}"
            more = [f"zero.stage={stage}", f"precision={precision}", f"train.compile={compiled}"]
            more += [f"run.dir={root}/{name}", f"evaluate.every_steps={every}"]
            assert launch(layered([*settings, *more])) == 0, name
"""


@pytest.mark.slow
def test_evaluation_does_not_affect_training(settings, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            WITH_AND_WITHOUT,
            str(tmp_path),
            *settings,
            "train.steps=4",
            "train.micro_batch=8",
            "optim.lr=1e-2",
            "optim.warmup_steps=0",
            *EVALUATED[1:],
        ],
        cwd=ROOT,
        env=environment(),
        text=True,
        timeout=4 * LIMIT_S,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    for precision in ("fp32", "bf16"):
        losses = []
        for which in ("false-0", "false-1", "false-2", "false-3", "true-0", "true-3"):
            without, evaluated = (tmp_path / f"{which}-{precision}-{every}" for every in (0, 1))
            assert_bitwise(evaluated, without)
            losses.append(
                [row["heldout_loss"]["image"]["mean"] for row in rows(evaluated / "log.jsonl")]
            )
            assert len(set(losses[-1])) == 4
        for other in losses[1:]:
            assert other == pytest.approx(losses[0], rel=1e-3 if precision == "bf16" else 1e-5)


def test_evaluation_uses_the_average_and_heldout_samples(survivor):
    """The last row's held-out loss is that of the checkpoint on one rank without DeepSpeed."""
    run_dir, _ = survivor
    found = {row["step"]: row for row in rows(run_dir / "log.jsonl") if "heldout_loss" in row}
    assert set(found) == {2, 4, 6} and all(Path(row["samples"]).is_file() for row in found.values())
    assert list(read_run(run_dir).grids) == [2, 4, 6] and (run_dir / "report.html").is_file()
    # No evaluation is missing after the kill.
    assert Image.open(run_dir / "samples/progress.png").size == (5 * 102 - 6, 28 + 3 * 102 - 6)
    config, model, manifest = load_run(run_dir, device="cpu")
    device = torch.device("cpu")
    one_rank = SimpleNamespace(rank=0, size=1, device=device, all=lambda value: [value])
    source = open_source(
        config, one_rank, *model.frozen, index_dir=prepare_data(config, progress=False)
    )
    evaluation = Evaluation(config, source, one_rank)

    def loss(model):
        with torch.no_grad(), fixed(model):
            return evaluation.loss(model, "image")

    average = loss(model)
    logged = found[6]["heldout_loss"]["image"]
    assert average["by_time"] == pytest.approx(logged["by_time"], rel=1e-6) and average[
        "mean"
    ] == pytest.approx(logged["mean"], rel=1e-6)
    load_weights(model, checkpoint_reader.newest(run_dir / "checkpoints"), "raw")
    assert loss(model)["mean"] != pytest.approx(logged["mean"], rel=1e-4) and manifest["ema"]
    visited = set(source.sampler(np.arange(6 * 16)).tolist())
    assert len(visited) == 64 and visited.isdisjoint(evaluation.heldout["image"].tolist())


@pytest.fixture(scope="module")
def one(settings, tmp_path_factory):
    """The same run on one rank in two accumulation steps, evaluated and traced."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    done = start(
        1,
        f"run.dir={run_dir}",
        *settings,
        "train.micro_batch=8",
        *EVALUATED,
        "--profile",
        "torch",
        "profile.start_step=2",
        "profile.num_steps=2",
    )
    assert done.returncode == 0, done.stdout
    return run_dir


def test_one_rank_matches_two(golden, survivor, one):
    for ours, theirs in zip(rows(one / "log.jsonl"), rows(golden / "log.jsonl"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    for ours, theirs in zip(rows(one / "log.jsonl"), rows(survivor[0] / "log.jsonl"), strict=True):
        if "heldout_loss" in ours:
            assert ours["heldout_loss"]["image"]["by_time"] == pytest.approx(
                theirs["heldout_loss"]["image"]["by_time"], rel=1e-5
            )


@pytest.mark.slow
def test_two_ranks_resume_from_one(settings, tmp_path):
    """ZeRO-3 resumes from ZeRO-1."""
    run_dir = tmp_path / "one"
    assert launch(1, f"run.dir={run_dir}", *settings, "zero.stage=1").returncode == 0
    done = launch(
        2, "--resume", "auto", f"run.dir={run_dir}", *settings[:1], "train.steps=7", *settings[2:]
    )
    assert done.returncode == 0, done.stdout
    assert "step 6 of 7" in done.stdout and rows(run_dir / "log.jsonl")[-1]["step"] == 7


@pytest.mark.slow
def test_overlap_is_bitwise_with_accumulation(settings, tmp_path):
    """Images and pairs, micro-batches of 4 on two ranks."""
    runs = {}
    for overlap in ("false", "true"):
        run_dir = tmp_path / overlap
        done = launch(
            2,
            f"run.dir={run_dir}",
            *settings,
            "train.micro_batch=4",
            "train.data=mix",
            f"data.pairs={settings[0][12:]}",
            "adapter.conditions=all",
            f"train.overlap={overlap}",
        )
        assert done.returncode == 0, done.stdout
        runs[overlap] = (
            [(row["loss"], row["grad_norm"]) for row in rows(run_dir / "log.jsonl")],
            hashes(run_dir),
        )
    assert runs["true"] == runs["false"] and len(runs["true"][0]) == 6


def test_profile_window_is_traced_on_a_cpu(one):
    with gzip.open(one / "traces/rank0-steps-2-3.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert names >= {
        "data",
        "vae",
        "vit",
        "prefix",
        "adapter",
        "suffix",
        "connector",
        "generator",
        "backward",
        "optimizer",
        "ema",
        "checkpoint",
    }
    assert "CPU Mem" in (one / "traces/rank0-steps-2-3-memory.txt").read_text()


def test_finetune_export_sample_and_evaluate_after_resume(survivor, settings, dataset, tmp_path):
    """From a run that was killed and resumed to a checked folder for GenEval.

    Pre-trained (the fixture), fine-tuned on two ranks, exported, loaded in diffusers, sampled.
    """
    stage_1, run_dir, out = survivor[0], tmp_path / "run", tmp_path / "grid.png"
    mine = [
        f"run.dir={run_dir}",
        *settings,
        f"data.pairs={dataset}",
        *EVALUATED,
        "train.data=mix",
        "train.steps=2",
    ]
    done = start(2, "--stage", "finetune", "--init", str(stage_1), *mine)
    assert (
        done.returncode == 0
        and f"initialized with the ema weights of {stage_1}/checkpoints/step-00000006"
        in done.stdout
    ), done.stdout
    found = rows(run_dir / "log.jsonl")
    assert [row["step"] for row in found] == [1, 2] and all(0 < row["loss"] < 10 for row in found)
    assert set(found[1]["heldout_loss"]) == {"image", "pair"}
    assert main(["export", "--run", str(run_dir)]) == 0
    generator = FluxTransformer2DModel.from_pretrained(run_dir / "export/ema")
    config, model, _ = load_run(run_dir)
    assert sum(p.numel() for p in generator.parameters()) > 0.9 * sum(
        p.numel() for p in model.generator.parameters()
    )
    prompts = ["a red circle", "two blue squares"]
    ours = Pipeline(model, config.data.size_px)(prompts, steps=2, seed=5)
    theirs = Pipeline.from_pretrained(run_dir / "export/ema", device="cpu")(
        prompts, steps=2, seed=5
    )
    assert [np.asarray(image).tolist() for image in ours] == [
        np.asarray(image).tolist() for image in theirs
    ]
    assert (
        main(
            [
                "sample",
                "--run",
                str(run_dir),
                "--num",
                "2",
                "--steps",
                "1",
                "--prompt",
                prompts[0],
                "--guidance",
                "3",
                "--shift",
                "flux",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert Image.open(out).size == (2 * 34 - 2, 32)
    lines = [
        json.dumps(
            {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": text}
        )
        + "\n"
        for text in prompts
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    geneval = [
        "evaluate",
        "geneval",
        "--prompts",
        str(tmp_path / "prompts.jsonl"),
        "--out",
        str(tmp_path / "geneval"),
    ]
    assert (
        main([*geneval, "--run", str(run_dir / "export/ema"), "--steps", "2"]) == 0
        and main([*geneval, "--check"]) == 0
    )
    assert [(tmp_path / f"geneval/0000{n}/metadata.jsonl").read_text() for n in range(2)] == lines
    pictures = [
        Image.open(tmp_path / f"geneval/0000{n}/samples/000{k}.png").size
        for n in range(2)
        for k in range(4)
    ]
    assert pictures == [(32, 32)] * 8
    (tmp_path / "geneval/00001/samples/0003.png").unlink()
    assert main([*geneval, "--check"]) == 1


def test_finetune_without_init_is_refused(settings, capsys):
    assert (
        launch_main(["--stage", "finetune", *settings]) == 2
        and "give --init RUN" in capsys.readouterr().err
    )


RECIPES = """
import sys
from iomm.config import PRESETS, GeneratorConfig
from iomm.engine.parallel import ranks as group
from iomm.engine.cli import main as iomm
from iomm.engine.config_parser import layered
from iomm.engine.launch import main as launch
# DeepSpeed creates its process groups only once per process.
group.stop = lambda: None
PRESETS["demo"] = GeneratorConfig(width=64, num_heads=2, num_blocks=2)
root, *settings = sys.argv[1:]
def run(name, stage, *arguments):
    words = layered([f"run.dir={root}/{name}", *settings, *arguments])
    assert launch(["--stage", stage, *words]) == 0, name
for first in ("image", "pair"):
    run(first, "pretrain", f"train.data={first}")
    for second in ("image", "pair", "mix"):
        run(f"{first}-{second}", "finetune", "--init", f"{root}/{first}", f"train.data={second}")
larger = ("train.data=mix", "data.size_px=64", "data.buckets=true")
run("larger", "finetune", "--init", f"{root}/image", *larger)
for resume in ("none", f"{root}/back/checkpoints/step-00000001"):
    run("back", "pretrain", "checkpoint.every_steps=1", "--resume", resume)
for num, *prompt in (["3"], ["2", "--prompt", "a red circle"]):
    out = ["--out", f"{root}/larger-{num}.png"]
    sample = ["sample", "--run", f"{root}/larger", "--steps", "1", "--num", num, *out, *prompt]
    assert iomm(sample) == 0
"""


def test_six_recipes_and_a_larger_size_train(dataset, tmp_path, monkeypatch):
    """Stage 1 on images or pairs, then stage 2 on images, pairs or both.

    Also from 32 px to buckets of about 64 px, and one run that is set back a step.
    """
    settings = [
        f"data.shards={dataset}",
        f"data.pairs={dataset}",
        "train.steps=2",
        "train.global_batch=6",
        "log.sample_images=0",
        "checkpoint.every_steps=10",
        "train.threads=1",
        *BASE,
        "optim.lr=1e-2",
        "optim.warmup_steps=0",
        "ema.decay=0",
    ]
    (tmp_path / "recipes.py").write_text(RECIPES)
    done = start(1, str(tmp_path), *settings, script=tmp_path / "recipes.py")
    assert done.returncode == 0, done.stdout
    seen = {}
    for name in (
        "image",
        "pair",
        *(
            f"{first}-{second}"
            for first in ("image", "pair")
            for second in ("image", "pair", "mix")
        ),
        "larger",
    ):
        losses = [row["loss"] for row in rows(tmp_path / name / "log.jsonl")]
        assert len(losses) == 2 and all(0 < loss < 10 for loss in losses), (name, losses)
        seen[name] = tuple(losses)
    # All recipes differ.
    assert len(set(seen.values())) == len(seen)
    for first in ("image", "pair"):
        # The same batch again, after one step of training.
        assert seen[f"{first}-{first}"][0] < seen[first][0]
    assert sorted(p.name for p in (tmp_path / "back/checkpoints").iterdir()) == [
        "abandoned-step-00000002",
        "step-00000001",
        "step-00000002",
    ]
    monkeypatch.setitem(PRESETS, "demo", GeneratorConfig(width=64, num_heads=2, num_blocks=2))
    _, small, _ = load_run(tmp_path / "image", weights="raw")
    _, large, _ = load_run(tmp_path / "larger", weights="raw")
    assert {n: p.shape for n, p in small.named_parameters()} == {
        n: p.shape for n, p in large.named_parameters()
    }
    assert [Image.open(tmp_path / f"larger-{num}.png").size for num in (3, 2)] == [
        (3 * 66 - 2, 64),
        (2 * 66 - 2, 64),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["train.compile=true", "train.recompute=2"])
def test_compiled_or_recomputed_blocks_match(golden, settings, tmp_path, setting):
    done = launch(2, f"run.dir={tmp_path / 'run'}", *settings, setting, *EVALUATED)
    assert done.returncode == 0, done.stdout
    for ours, theirs in zip(
        rows(tmp_path / "run/log.jsonl"), rows(golden / "log.jsonl"), strict=True
    ):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@pytest.mark.slow
def test_fp8_compiled_and_recomputed_matches_eager(golden, settings, tmp_path):
    """Compiled blocks round differently, by at most twice the difference of fp8 and fp32."""
    losses = {}
    for name, more in (("eager", []), ("compiled", ["train.compile=true", "train.recompute=2"])):
        done = launch(1, f"run.dir={tmp_path / name}", *settings, "precision=fp8", *more)
        assert (
            done.returncode == 0
            and done.stdout.count("precision fp8 has not been compared on a GPU yet") == 1
        ), done.stdout
        losses[name] = [row["loss"] for row in rows(tmp_path / name / "log.jsonl")]
    fp32 = [row["loss"] for row in rows(golden / "log.jsonl")]
    budget = 2 * max(abs(a - b) for a, b in zip(losses["eager"], fp32, strict=True)) + 2**-8 * max(
        fp32
    )
    assert (
        max(abs(a - b) for a, b in zip(losses["compiled"], losses["eager"], strict=True)) <= budget
    )


@pytest.mark.slow
def test_muon_matches_on_one_and_two_ranks_and_resumes(settings, tmp_path):
    for ranks in (1, 2):
        done = launch(ranks, f"run.dir={tmp_path / str(ranks)}", *settings, "optim.kind=muon")
        assert done.returncode == 0, done.stdout
    one, two = (rows(tmp_path / str(ranks) / "log.jsonl") for ranks in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    run_dir = tmp_path / "killed"
    launch_and_kill(2, run_dir / "log.jsonl", 3, f"run.dir={run_dir}", *settings, "optim.kind=muon")
    done = launch(2, "--resume", "auto", f"run.dir={run_dir}", *settings, "optim.kind=muon")
    assert done.returncode == 0 and hashes(run_dir) == hashes(tmp_path / "2"), done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stage", "pretrian"], "--stage must be one of pretrain"),
        (["--config", ""], "--config is empty"),
        (["--hook", ""], "--hook is empty"),
        (["--dry-run", "-8"], "--dry-run must be a whole number >= 1, got '-8'"),
        (["--dry-run", "0"], "--dry-run must be a whole number >= 1, got '0'"),
        (["--config", "dmeo"], "--config dmeo: no such file"),
        (["trian.steps=3"], "unknown key trian.steps; did you mean train.steps?"),
        (["train.steps=ten"], "train.steps must be a whole number, got 'ten'"),
        (["--profile", "perf"], "--profile must be one of none, nsys, torch"),
    ],
)
def test_wrong_options_are_refused_before_the_start(arguments, message, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    assert launch_main(arguments) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("iomm: ") and message in error


@pytest.mark.parametrize("schedule, offered", [("constant", True), ("cosine", False)])
def test_run_is_complete_if_final_samples_fail(schedule, offered, tmp_path, monkeypatch, capsys):
    """The summary suggests more steps only if the schedule does not depend on their number."""

    def fails(*_, **__):
        raise torch.OutOfMemoryError("no room\nfor pictures")

    monkeypatch.setattr(launch_module, "sample_run", fails)
    config = parse(
        "", overrides=[f"run.dir={tmp_path}", f"optim.schedule={schedule}", "train.steps=10"]
    )
    metrics, closed = (
        SimpleNamespace(
            gpu_hours=1.0,
            hours="GPU-hours",
            report=lambda: None,
            close=lambda: closed.append(True),
        ),
        [],
    )
    launch_module.finish(
        config,
        launch_module.parse_args([]),
        metrics,
        SimpleNamespace(folder=None),
        SimpleNamespace(device="cpu", size=1),
    )
    words = capsys.readouterr().out.splitlines()
    assert (
        words[0]
        == "samples     failed, training is complete: OutOfMemoryError: no room for pictures"
        and closed
    )
    assert (
        any("--stage finetune" in line for line in words)
        and any("train.steps=20   # train for twice as many steps" in line for line in words)
        == offered
    )
    assert words[-1].strip()


MISTAKES = """
import json, sys
from iomm.engine.parallel import ranks as group
from iomm.engine.config_parser import layered
from iomm.engine.launch import main as launch
# DeepSpeed creates its process groups only once per process.
group.stop = lambda: None
for arguments in json.load(open(sys.argv[1])):
    print(f"exit {launch(layered(arguments))}", file=sys.stderr, flush=True)
"""


def test_user_errors_are_one_line_and_exit_2(golden, settings, tmp_path):
    mistakes = [
        (["--resume", "runs/nowhere"], "runs/nowhere has no intact MANIFEST.json"),
        (["data.size_px=30"], "image size must be a positive multiple of 4 px, got 30 x 30"),
        (["model.mllm=nowhere"], "model.mllm: no folder nowhere"),
        (["model.vae=nowhere"], "model.vae"),
        (["train.global_batch=128"], "there are only 64 samples to train on"),
        ([f"run.dir={golden}"], "already contains a run. Add --resume auto"),
        (
            [f"run.dir={golden}", "--resume", "auto", "optim.lr=0.5"],
            "belongs to a run with another config (optim.lr: 0.001 became 0.5). Resume it with the "
            "same values, or continue in a new run.dir with --resume "
            f"{golden}/checkpoints/step-N",
        ),
    ]
    given = [
        [f"run.dir={tmp_path / str(n)}", *settings, *arguments]
        for n, (arguments, _) in enumerate(mistakes)
    ]
    (tmp_path / "mistakes.py").write_text(MISTAKES)
    (tmp_path / "given.json").write_text(json.dumps(given))
    done = start(1, str(tmp_path / "given.json"), script=tmp_path / "mistakes.py")
    errors = [line for line in done.stdout.splitlines() if line.startswith(("iomm: ", "exit "))]
    assert (
        done.returncode == 0 and "Traceback" not in done.stdout and len(errors) == 2 * len(mistakes)
    ), done.stdout
    for (_, message), line, code in zip(mistakes, errors[::2], errors[1::2], strict=True):
        assert line.startswith("iomm: ") and message in line and code == "exit 2"


@pytest.mark.parametrize(
    "make, message",
    [
        pytest.param(
            lambda folder: folder / "none-*.tar",
            "none-*.tar",
            id="no shard",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda folder: empty_tar(folder), "empty.tar: no images inside", id="no image"
        ),
    ],
)
def test_bad_data_ends_both_ranks_with_one_line(make, message, settings, tmp_path):
    done = start(2, f"run.dir={tmp_path / 'run'}", f"data.shards={make(tmp_path)}", *settings[1:])
    errors = [line for line in done.stdout.splitlines() if line.startswith("iomm: ")]
    assert done.returncode == 2 and len(errors) == 1 and message in errors[0], done.stdout
    assert "Traceback" not in done.stdout


def empty_tar(folder):
    import io
    import tarfile

    path = folder / "empty.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("000000.txt")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"hello"))
    return path


def test_damaged_checkpoint_is_skipped(golden, tmp_path, caplog):
    import shutil

    copy = tmp_path / "checkpoints"
    shutil.copytree(golden / "checkpoints", copy)
    newest = checkpoint_reader.newest(copy)
    file = sorted(newest.glob("rank-*"))[0]
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    assert checkpoint_reader.newest(copy).name == "step-00000004"
    assert "differs from what was written" in caplog.messages[0]
    manifest = copy / "step-00000004" / "MANIFEST.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"step": 4', b'"step": 5'))
    assert checkpoint_reader.newest(copy).name == "step-00000002"


def test_sample_edit_evaluate_and_export_read_a_run(golden, tmp_path, capsys):
    out = tmp_path / "grid.png"
    assert (
        main(["sample", "--run", str(golden), "--num", "5", "--steps", "2", "--out", str(out)]) == 0
    )
    # Originals, their visible parts, samples.
    assert Image.open(out).size == (5 * 34 - 2, 3 * 34 - 2)
    assert Image.open(tmp_path / "grid/0004.png").text["prompt"] == "masked image 4 of the run"
    assert (
        main(
            [
                "sample",
                "--run",
                str(golden),
                "--num",
                "3",
                "--steps",
                "2",
                "--prompt",
                "a red circle",
                "--prompt",
                "zwölf",
                "--out",
                str(out),
                "--guidance",
                "2",
                "--size",
                "48x16",
                "--seed",
                "5",
            ]
        )
        == 0
    )
    facts = {
        "run": golden.as_posix(),
        "step": "6",
        "weights": "ema",
        "size": "48x16",
        "steps": "2",
        "seed": "5",
        "guidance": "2",
        "shift": "1.0",
    }
    grid, single = Image.open(out), Image.open(tmp_path / "grid/0001.png")
    layout = {"columns": 3, "rows": ["drawn"], "labels": ["a red circle", "zwölf", "a red circle"]}
    assert grid.size == (3 * 50 - 2, 16) and json.loads(grid.text.pop("grid")) == layout
    assert grid.text == {**facts, "prompt": "a red circle\nzwölf"}
    assert single.size == (48, 16) and single.text == {**facts, "prompt": "zwölf", "image": "1"}
    assert (
        main(
            [
                "edit",
                "--run",
                str(golden),
                "--image",
                str(out),
                "--instruction",
                "make it red",
                "--steps",
                "2",
            ]
        )
        == 0
    )
    (edited,) = (golden / "samples").glob("edited-grid-make-it-red-seed0-*.png")
    edited = Image.open(edited)
    assert edited.text == {
        **facts,
        "size": "32x32",
        "seed": "0",
        "guidance": "1",
        "prompt": "make it red",
        "source": "grid.png",
    }
    prompts = tmp_path / "evaluation_metadata.jsonl"
    prompts.write_text('{"prompt": "a photo of a bench"}\n')
    assert (
        main(
            [
                "evaluate",
                "geneval",
                "--run",
                str(golden),
                "--prompts",
                str(prompts),
                "--out",
                str(tmp_path / "geneval"),
                "--steps",
                "1",
            ]
        )
        == 0
    )
    assert Image.open(tmp_path / "geneval/00000/samples/0003.png").text["step"] == "6"
    assert main(["export", "--run", str(golden), "--weights", "raw"]) == 0
    assert (
        main(
            [
                "sample",
                "--run",
                str(golden / "export/raw"),
                "--num",
                "1",
                "--steps",
                "1",
                "--prompt",
                "x",
            ]
        )
        == 0
    )
    (drawn,) = (golden / "export/raw/samples").glob("step-00000006-x-seed0-*.png")
    assert Image.open(drawn).text["weights"] == "raw"
    assert (golden / "export/raw/diffusion_pytorch_model.safetensors").is_file()
    images = Pipeline.from_pretrained(golden / "export/raw", device="cpu")(
        ["a red circle", ""], steps=2
    )
    assert [image.size for image in images] == [(32, 32)] * 2
    capsys.readouterr()
    for arguments, message in [
        (["sample", "--run", str(tmp_path)], "is not a run folder"),
        (["sample", "--run", str(golden), "--num", "0"], "--num must be a whole number >= 1"),
        (
            ["sample", "--run", str(golden), "--size", "64"],
            "--size and --guidance apply only to samples from text",
        ),
        (
            ["sample", "--run", str(golden), "--prompt", "x", "--size", "64by3"],
            "--size must be a side in pixels such as 512, or WIDTHx",
        ),
        (
            ["sample", "--run", str(golden), "--prompt", "x", "--out", str(tmp_path / "x.jpg")],
            "--out must end in .png",
        ),
        (
            ["sample", "--run", str(golden / "export/raw")],
            "is an exported folder without training data",
        ),
        (
            [
                "edit",
                "--run",
                str(golden),
                "--image",
                str(golden / "log.jsonl"),
                "--instruction",
                "x",
            ],
            "--image",
        ),
    ]:
        assert main(arguments) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith("iomm: ") and message in error


def test_console_command_is_installed():
    done = subprocess.run(
        [str(Path(sys.executable).with_name("iomm")), "doctor"],
        env=environment(),
        text=True,
        capture_output=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    for part in (
        "torch",
        "CUDA device",
        "DeepSpeed",
        "DALI",
        "Triton",
        "flash-attn",
        "NVIDIA apex",
        "nvcc",
        "C++ ops",
        "CUDA ops",
    ):
        assert part in done.stdout


@pytest.mark.parametrize("name", ["flux", "zimage"])
def test_both_stages_train_from_a_diffusers_model(name, dataset, tmp_path):
    """The shape and the weights of the blocks come from the folder, and a resume needs neither."""
    import diffusers

    torch.manual_seed(0)
    if name == "flux":
        theirs = diffusers.FluxTransformer2DModel(
            in_channels=12,
            num_layers=2,
            num_single_layers=1,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=24,
            axes_dims_rope=(4, 14, 14),
        )
    else:
        theirs = diffusers.ZImageTransformer2DModel(
            in_channels=3,
            dim=64,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 12, 12],
        )
    folder = tmp_path / "theirs"
    theirs.save_pretrained(folder / "transformer")
    settings = [
        "--config",
        PIXELS,
        "model.preset=from-init",
        f"data.shards={dataset}",
        "train.global_batch=4",
        "log.sample_images=0",
        "checkpoint.every_steps=1",
        "train.threads=1",
    ]
    run_dir = tmp_path / "stage-1"
    first = [*settings, f"run.init={folder}", f"run.dir={run_dir}"]
    done = start(1, *first, "train.steps=1")
    assert done.returncode == 0, done.stdout
    assert "tensors of" in done.stdout and "fresh: condition_in.weight" in done.stdout
    shapes = checkpoint_reader.read_manifest(run_dir / "checkpoints/step-00000001")["shapes"]
    widths = {shape[-1] for key, shape in shapes.items() if key.endswith("qkv.weight")}
    assert 64 in widths
    # After the first start the run knows its shape.
    (folder / "transformer" / "config.json").unlink()
    done = start(1, "--resume", "auto", *first, "train.steps=2")
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stdout
    second = [*settings, f"data.pairs={dataset}", "train.data=mix", f"run.dir={tmp_path / '2'}"]
    done = start(1, "--stage", "finetune", "--init", str(run_dir), *second, "train.steps=1")
    assert done.returncode == 0 and "initialized with the ema weights" in done.stdout, done.stdout
    done = start(1, *settings, f"run.init={folder}", f"run.dir={tmp_path / '3'}", "train.steps=1")
    assert done.returncode == 2 and "neither a run folder nor" in done.stdout, done.stdout
