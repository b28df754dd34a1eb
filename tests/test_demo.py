"""The default command, shortened: its losses are a file, compared exactly on the machine kind that the file names."""

import json
import platform
from pathlib import Path

import pytest
import torch
from launches import launch, rows
from PIL import Image

from benchmarks.demo import enlarge
from iomm.engine.draw import save_png

LOSSES = Path(__file__).parent / "demo_losses.json"
STEPS, THREADS = 20, 1         # two threads would wait for each other where other tests run


def machine():
    """What decides the bits of a CPU run: torch build, vector unit, processor (its BLAS path), threads."""
    try:
        model = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    return {"torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability(), "processor": model,
            "threads": THREADS}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("demo") / "demo"
    done = launch(1, "--stage", "pretrain", f"run.dir={run_dir}", f"train.steps={STEPS}", f"train.threads={THREADS}",
                  f"checkpoint.every_steps={STEPS}", "log.sample_steps=1", "precision=fp32")       # bf16 is not every machine's
    assert done.returncode == 0, done.stdout
    return run_dir, done.stdout


def test_losses_are_the_file(demo):
    losses = [row["loss"] for row in rows(demo[0] / "log.jsonl")]
    saved = json.loads(LOSSES.read_text())
    if saved["machine"] == machine():
        assert losses == saved["losses"]
    else:
        assert losses == pytest.approx(saved["losses"], abs=1e-3)


def test_loss_falls_below_half_of_its_first_value(demo):
    losses = [row["loss"] for row in rows(demo[0] / "log.jsonl")]
    assert min(losses[-5:]) < losses[0] / 2


def test_the_run_leaves_what_the_readme_says(demo):
    run_dir, said = demo
    assert f"step 10/{STEPS}  loss" in said and "next        iomm sample --run" in said
    assert sorted(p.name for p in (run_dir / "samples").iterdir()) == ["curves.png", f"step-{STEPS:08d}-seed0.png"]
    assert sorted(p.name for p in run_dir.iterdir()) == [".lock", "checkpoints", "config.yaml", "log.jsonl", "logs", "machine.json",
                                                         "report.html", "samples", "scores.json", "tb"]
    assert f"report      {run_dir}/report.html" in said and json.loads((run_dir / "machine.json").read_text())["ranks"] == 1
    assert set(json.loads((run_dir / "scores.json").read_text())) == {"image", "text", "real"} and "captions drawn, guidance 2" in said
    tars = sorted((run_dir.parent / "shared").glob("shapes-4096-*/*.tar"))
    assert len(tars) == 4


def test_the_benchmark_shows_the_newest_grid_and_its_prompts(tmp_path):
    for name, colour in (("step-00000100-seed0", "red"), ("step-00002000-a-red-circle-seed0", "green"), ("step-00000500-seed0", "blue"),
                         ("evaluate-00003000", "black"), ("step-00000900-seed0", "white")):
        save_png(Image.new("RGB", (6, 4), colour), tmp_path / f"run/samples/{name}.png", {"prompt": f"a {colour} circle"})
    enlarge(tmp_path / "run", tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (24, 16) and grid.getpixel((0, 0)) == (0, 128, 0) and grid.text == {"prompt": "a green circle"}


if __name__ == "__main__":       # python tests/test_demo.py LOG: writes the file anew from a run's log.jsonl
    import sys
    first = [row["loss"] for row in rows(sys.argv[1])][:STEPS]
    LOSSES.write_text(json.dumps({"machine": machine(), "losses": first}, indent=1) + "\n")
