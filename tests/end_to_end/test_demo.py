"""The default command, shortened to a quarter of its images and a few steps.

Its losses are compared with a file, exactly on the kind of machine that the file names.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from launches import launch, rows
from PIL import Image

from benchmarks.studies.demo import side_by_side
from iomm.engine.observe.doctor import cpu_name

LOSSES = Path(__file__).parent / "demo_losses.json"
# Ranks have one thread each. Always two, whatever the number of cores: losses depend on it.
STEPS, RANKS, IMAGES = 30, 2, 1024
# Mean over t of the squared velocity error of the best prediction that is linear in the latents.
LINEAR = math.pi / 2


def machine():
    """Return what the bits of a CPU run depend on. The BLAS path depends on the processor."""
    return {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "processor": cpu_name(),
        "ranks": RANKS,
    }


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("demo") / "demo"
    done = launch(
        1,
        "--stage",
        "pretrain",
        f"run.dir={run_dir}",
        f"train.steps={STEPS}",
        f"data.num_images={IMAGES}",
        f"train.cpu_ranks={RANKS}",
        f"evaluate.every_steps={STEPS // 2}",
        "evaluate.num_images=4",
        "evaluate.steps=1",
        "log.sample_steps=1",
    )
    assert done.returncode == 0, done.stdout
    return run_dir, done.stdout


def test_losses_match_the_recorded_file(demo):
    losses = [row["loss"] for row in rows(demo[0] / "log.jsonl")]
    saved = json.loads(LOSSES.read_text())
    if saved["machine"] == machine():
        assert losses == saved["losses"]
    else:
        assert losses == pytest.approx(saved["losses"], abs=1e-3)


def test_loss_falls_below_a_linear_prediction(demo):
    """Its mean over t is pi / 2.

    With latents x and noise z of variance 1 it is 2 - (2t - 1)^2 / ((1 - t)^2 + t^2) at time t.
    """
    losses = [row["loss"] for row in rows(demo[0] / "log.jsonl")]
    assert 1.9 < losses[0] < 2.1 and sum(losses[-5:]) / 5 < LINEAR


def test_run_dir_has_the_files_of_the_readme(demo):
    run_dir, output = demo
    assert f"step 10/{STEPS}  loss" in output and "next        iomm sample --run" in output
    labels = "data    ", "devices ", "training ", "model   ", "kernels ", "memory per rank at "
    for label in labels:
        assert output.count(f"\n{label}") == 1, label
    log = (run_dir / "logs/rank-00000.txt").read_text()
    for fragment in (
        "devices     2 ranks on cpu",
        f"step 10/{STEPS}  loss",
        "next        iomm sample",
    ):
        assert log.count(fragment) == 1, fragment
    *sheets, final = sorted(p.name for p in (run_dir / "samples").iterdir())
    assert re.fullmatch(rf"step-{STEPS:08d}-seed0-[0-9a-f]{{8}}\.png", final)
    assert sheets == [
        "curves.png",
        *(f"evaluate-{step:08d}.png" for step in (STEPS // 2, STEPS)),
        "progress.png",
    ]
    assert sorted(p.name for p in run_dir.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.yaml",
        "log.jsonl",
        "logs",
        "machine.json",
        "report.html",
        "samples",
        "scores.json",
        "tb",
    ]
    assert (
        f"report      {run_dir}/report.html" in output
        and json.loads((run_dir / "machine.json").read_text())["ranks"] == RANKS
    )
    assert (
        set(json.loads((run_dir / "scores.json").read_text())) == {"image", "text", "real"}
        and "samples from captions, guidance 2" in output
    )
    tars = sorted((run_dir.parent / "shared").glob(f"shapes-{IMAGES}-*/*.tar"))
    assert len(tars) == 1


def test_benchmark_figure_shows_both_stages(tmp_path):
    for name, colour, size in (("first", "red", (6, 4)), ("second", "blue", (3, 8))):
        (tmp_path / name / "samples").mkdir(parents=True)
        Image.new("RGB", size, colour).save(tmp_path / name / "samples" / "progress.png")
    side_by_side(
        [tmp_path / "first", tmp_path / "second"], tmp_path / "figures" / "demo.png", gap_px=2
    )
    with Image.open(tmp_path / "figures" / "demo.png") as figure:
        assert figure.size == (11, 8)
        assert [figure.getpixel(at) for at in ((0, 0), (0, 5), (7, 0), (8, 7))] == [
            (255, 0, 0),
            (255, 255, 255),
            (255, 255, 255),
            (0, 0, 255),
        ]


# PYTHONPATH=tests/helpers python tests/end_to_end/test_demo.py LOG
# writes the file from the log.jsonl of a run.
if __name__ == "__main__":
    import sys

    first = [row["loss"] for row in rows(sys.argv[1])][:STEPS]
    LOSSES.write_text(json.dumps({"machine": machine(), "losses": first}, indent=1) + "\n")
