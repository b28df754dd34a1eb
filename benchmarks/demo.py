"""The README's default command, both stages, run and read: python benchmarks/demo.py

Writes benchmarks/results/demo-<device>-<date>.json: seconds from start to end and in training, images/s, first and last
loss; and the grids that the two stages drew beside it."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "benchmarks"))]

import json  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402

from iomm.engine.doctor import machine  # noqa: E402


def run(arguments, folder):
    """One launch -> (seconds of the whole command, rows of log.jsonl)."""
    started = time.perf_counter()
    subprocess.run([str(Path(sys.executable).with_name("deepspeed")), str(ROOT / "engine/launch.py"), *arguments,
                    f"run.dir={folder}"], cwd=ROOT, check=True)
    seconds = time.perf_counter() - started
    return seconds, [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def summary(seconds, rows):
    return {"command_s": seconds, "training_s": sum(row["step_s"] for row in rows), "steps": len(rows),
            "images_per_s": statistics.median(row["images_per_s"] for row in rows), "first_loss": rows[0]["loss"],
            "last_loss": statistics.mean(row["loss"] for row in rows[-20:]), "memory_gib": rows[-1]["memory_gib"],
            "half_of_first_loss_at_step": next((row["step"] for row in rows if row["loss"] < rows[0]["loss"] / 2), None)}


def main():
    with tempfile.TemporaryDirectory() as folder:
        stage_1 = summary(*run(["--stage", "pretrain"], f"{folder}/demo"))
        grids = {"pretrain": f"{folder}/demo", "finetune": f"{folder}/demo-finetune"}
        stage_2 = summary(*run(["--stage", "finetune", "--init", f"{folder}/demo"], f"{folder}/demo-finetune"))
        for stage, run_dir in grids.items():
            (ROOT / f"benchmarks/results/demo-{stage}.png").write_bytes(next(Path(run_dir).glob("samples/*.png")).read_bytes())
    facts = machine()
    result = {"machine": facts, "pretrain": stage_1, "finetune": stage_2}
    path = ROOT / "benchmarks/results" / f"demo-{'cuda' if facts['gpu'] else 'cpu'}-{facts['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
