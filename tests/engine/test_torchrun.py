"""torchrun with the exit codes of the ranks, and the SLURM job that requeues itself.

The ranks are scripts without torch. SLURM is a stand-in that runs the job once more when it has
been requeued.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launches import LIMIT_S, ROOT, environment, rows

from iomm.engine.parallel.cpu_ranks import free_port
from iomm.engine.resilience.preemption import REQUEUE
from iomm.engine.resilience.watchdog import DEAD, HUNG, REFUSED
from iomm.engine.torchrun import exit_code

# Ends attempt n of a rank with the n-th of its words; "wait" waits for SIGTERM and ends with 75.
RANK = """
import os, pathlib, signal, sys, time
count = pathlib.Path(sys.argv[1] + os.environ["RANK"])
attempt = len(count.read_text()) if count.exists() else 0
count.write_text("x" * (attempt + 1))
word = sys.argv[2 + int(os.environ["RANK"])].split(",")[attempt]
if word == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("waiting", flush=True)
    time.sleep(60)
if word == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(word))
"""


@pytest.mark.parametrize(
    "codes, expected",
    [
        ([REQUEUE, REQUEUE], REQUEUE),
        ([-9, DEAD], DEAD),
        ([-9], DEAD),
        # Ranks that torchrun stopped after the first failure.
        ([REFUSED, -15], REFUSED),
        ([HUNG, DEAD], HUNG),
        ([DEAD, 1], 1),
        ([0, REQUEUE], REQUEUE),
        ([], 1),
    ],
)
def test_exit_code_of_a_host(codes, expected):
    assert exit_code(codes) == expected


def start(tmp_path, *words, restarts=0):
    (tmp_path / "rank.py").write_text(RANK)
    return subprocess.Popen(
        [
            *(sys.executable, str(ROOT / "engine/torchrun.py"), "--standalone"),
            *("--nproc-per-node", str(len(words)), "--max-restarts", str(restarts)),
            *("--monitor-interval", "0.05", str(tmp_path / "rank.py")),
            *(str(tmp_path / "attempts"), *words),
        ],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def attempts(tmp_path, rank=0):
    return len((tmp_path / f"attempts{rank}").read_text())


def test_killed_rank_is_restarted_and_a_preempted_one_is_not(tmp_path):
    process = start(tmp_path, "kill,75", restarts=3)
    _, err = process.communicate(timeout=120)
    assert process.returncode == REQUEUE and attempts(tmp_path) == 2, err
    assert "Traceback" not in err


def test_signal_to_torchrun_ends_with_the_code_of_the_ranks(tmp_path):
    process = start(tmp_path, "wait", restarts=3)
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == REQUEUE and attempts(tmp_path) == 1, err
    assert "Traceback" not in err


def run_slurm(folder, checkout, arguments, most_starts=5, act=None, **variables):
    """Run engine/slurm.sh until it does not requeue itself, and return its exit codes.

    act: called with the process of each start.
    """
    tools = folder / "tools"
    tools.mkdir()
    requeued = folder / "requeued"
    for name, script in (
        ("srun", 'while [[ "$1" == --* ]]; do shift; done; exec "$@"'),
        ("scontrol", f'if [ "$1" = requeue ]; then touch {requeued}; else echo 127.0.0.1; fi'),
    ):
        (tools / name).write_text(f"#!/bin/bash\n{script}\n")
        (tools / name).chmod(0o755)
    inherited, codes, output = environment(), [], ""
    while len(codes) < most_starts:
        requeued.unlink(missing_ok=True)
        process = subprocess.Popen(
            ["bash", str(ROOT / "engine/slurm.sh"), *arguments],
            cwd=checkout,
            env={
                **inherited,
                "PATH": f"{tools}{os.pathsep}{inherited['PATH']}",
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_NODELIST": "node",
                "SLURM_JOB_NUM_NODES": "1",
                "SLURM_GPUS_ON_NODE": "1",
                "SLURM_RESTART_COUNT": str(len(codes)),
                "MASTER_PORT": str(free_port()),
                **variables,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if act is not None:
            act(len(codes))
        output += process.communicate(timeout=400)[0]
        codes.append(process.returncode)
        if not requeued.exists():
            break
    return codes, output


@pytest.mark.parametrize(
    "word, codes",
    [
        # A rank dies once more than it may be restarted.
        ("kill,kill,kill,kill,75,0", [DEAD, REQUEUE, 0]),
        pytest.param("2", [REFUSED], marks=pytest.mark.slow),
    ],
)
def test_slurm_job_requeues_itself_until_it_is_done(word, codes, tmp_path):
    checkout = tmp_path / "checkout/engine"
    checkout.mkdir(parents=True)
    (checkout / "torchrun.py").symlink_to(ROOT / "engine/torchrun.py")
    # The script passes --resume auto first.
    (checkout / "launch.py").write_text(f"import sys; sys.argv[1:3] = []\n{RANK}")
    found, output = run_slurm(tmp_path, checkout.parent, [str(tmp_path / "attempts"), word])
    assert found == codes, output
    assert attempts(tmp_path) == len(word.split(","))


@pytest.mark.slow
def test_unattended_run_survives_kills_and_a_preemption(tmp_path):
    """A rank is killed (torchrun restarts it), then torchrun, then the job is preempted."""
    from faults.real import small_run

    run_dir = tmp_path / "run"

    def find(script):
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if f"run.dir={run_dir}" in words and any(w.endswith(script) for w in words[1:3]):
                yield int(folder.name)

    def act(start):
        def steps(number):
            until = time.monotonic() + LIMIT_S
            while len(rows(run_dir / "log.jsonl")) < number:
                assert time.monotonic() < until, f"step {number} was not reached"
                time.sleep(0.05)

        first = len(rows(run_dir / "log.jsonl"))
        if start == 0:
            steps(4)
            os.kill(next(find("engine/launch.py")), signal.SIGKILL)
            steps(8)
            # SLURM kills whatever else belongs to the step.
            for script in ("engine/torchrun.py", "engine/launch.py"):
                os.kill(next(find(script)), signal.SIGKILL)
        elif start == 1:
            steps(first + 3)
            os.kill(next(find("engine/torchrun.py")), signal.SIGTERM)

    codes, output = run_slurm(
        tmp_path,
        ROOT,
        [
            *small_run(tmp_path),
            "train.steps=40",
            "checkpoint.every_steps=2",
            "train.micro_batch=4",
            f"run.dir={run_dir}",
        ],
        act=act,
    )
    assert codes == [128 + signal.SIGKILL, REQUEUE, 0], output
    steps = [row["step"] for row in rows(run_dir / "log.jsonl")]
    assert steps[-1] == 40 and set(steps) == set(range(1, 41))
