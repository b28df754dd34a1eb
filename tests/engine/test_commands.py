"""Errors of the system and signals end every command with one sentence; commands are quoted."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from launches import PIXELS, ROOT, environment, rows

from iomm.config import InputError
from iomm.engine import arguments, cli, launch
from iomm.engine.config import parse
from iomm.engine.evaluation.layouts import LAYOUTS, read_items
from iomm.engine.parallel.ranks import Ranks
from iomm.engine.resilience.preemption import REQUEUE, Stop

COMMANDS = {
    "index": ["x", "--out", "y"],
    "cache": ["--out", "y"],
    "sample": ["--run", "x"],
    "edit": ["--run", "x", "--image", "y", "--instruction", "z"],
    "evaluate": ["dpg", "--prompts", "x", "--out", "y"],
    "export": ["--run", "x"],
    "report": ["x"],
    "doctor": [],
}


def run(command, error, monkeypatch, capsys):
    """Return the exit code and the only line of a command that raises an error."""

    def fail(args):
        raise error

    monkeypatch.setattr(cli, command, fail)
    code = cli.main([command, *COMMANDS[command]])
    (line,) = capsys.readouterr().err.splitlines()
    return code, line


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_iomm_ends_with_a_sentence(command, monkeypatch, capsys):
    full = OSError(errno.ENOSPC, "No space left on device", "/data/x.png")
    assert run(command, full, monkeypatch, capsys) == (
        2,
        "iomm: /data/x.png: No space left on device; free some space on that disk",
    )
    assert run(command, OSError("no\nroute"), monkeypatch, capsys) == (2, "iomm: no route")
    code, line = run(command, KeyboardInterrupt(), monkeypatch, capsys)
    resumes = command in ("index", "cache", "evaluate")
    assert code == 130 and line.startswith("iomm: interrupted; ")
    assert ("the same command continues" in line) == resumes


def test_a_closed_pipe_ends_with_a_sentence():
    code = (
        "import sys, time\n"
        "from iomm.engine import cli\n"
        "cli.doctor = lambda args: [time.sleep(1), print('line\\n' * 50_000)] and 0\n"
        "sys.exit(cli.main(['doctor']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 128 + signal.SIGPIPE
    assert error == "iomm: the program that reads the output has ended\n"


def test_an_error_of_rank_0_reaches_all_ranks_in_a_sentence(monkeypatch):
    sent = []
    monkeypatch.setattr(
        "torch.distributed.broadcast_object_list",
        lambda outcome, src, group: sent.append(list(outcome)),
    )
    ranks = Ranks(rank=0, local_rank=0, local_size=1, size=1, device=None, control_group=None)

    def fail():
        raise OSError(errno.EROFS, "Read-only file system", "/data/index")

    message = "/data/index: Read-only file system; give a place that can be written"
    with pytest.raises(InputError, match=message):
        ranks.on_first(fail)
    assert sent == [[None, message]]


def test_training_ends_with_a_sentence(monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "/data/x")

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(launch, "load_config", full)
    assert launch.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "iomm: /data/x: No space left on device; free some space on that disk"

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "load_config", interrupt)
    assert launch.main(["run.dir=my runs/x"]) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("iomm: interrupted without saving. Continue with: ")
    assert line.endswith("--stage=pretrain --resume auto 'run.dir=my runs/x'")


def test_prompts_of_a_benchmark_must_be_text(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a \udcff circle"}) + "\n")
    with pytest.raises(InputError, match="is not valid Unicode text"):
        read_items(LAYOUTS["geneval"], [str(path)], None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_request_a_stop(number, capfd):
    before = signal.getsignal(number)
    with Stop(reports=True) as stop:
        signal.raise_signal(number)
        assert stop.requested
        if number == signal.SIGINT:
            assert "stopping after this step" in capfd.readouterr().err
            # DeepSpeed's launcher sends SIGTERM as well.
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
    assert signal.getsignal(number) == before


def test_ctrl_c_during_the_imports_ends_with_a_sentence(tmp_path):
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "engine/launch.py"), f"run.dir={tmp_path}/x"],
        cwd=ROOT,
        env={**environment(), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 130
    assert done.stderr.strip() == "iomm: interrupted before the start. Start it again"


def test_ctrl_c_saves_the_step_and_names_the_command_that_continues(tmp_path):
    run_dir = tmp_path / "my runs/x"
    script = os.path.relpath(ROOT / "engine/launch.py", ROOT)
    words = ["--config", PIXELS, "--resume=auto", f"run.dir={run_dir}", "train.steps=100000"]
    words += ["train.global_batch=4", "data.num_images=32", "log.sample_images=0"]
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(
            [sys.executable, script, *words],
            cwd=ROOT,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    until = time.monotonic() + 200
    while not rows(run_dir / "log.jsonl"):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    text_of = (tmp_path / "output").read_text
    assert process.wait(60) == REQUEUE, text_of()
    text = text_of()
    assert "Traceback" not in text and "stopping after this step" in text
    (line,) = [line for line in text.splitlines() if "Continue with: " in line]
    python, started, *given = shlex.split(line.partition("Continue with: ")[2])
    assert python.startswith("python") and started == script
    args = launch.parse_args(given)
    assert args.resume == "auto" and args.config == PIXELS
    assert f"run.dir={run_dir}" in args.overrides and "train.steps=100000" in args.overrides
    saved = os.listdir(run_dir / "checkpoints")
    assert saved == [f"step-{rows(run_dir / 'log.jsonl')[-1]['step']:08d}"]


SCRIPT = "engine/launch.py"


@pytest.mark.parametrize(
    "words, expected",
    [
        (["/v/python", "/v/bin/deepspeed", SCRIPT, "a=1"], ["deepspeed", SCRIPT]),
        (
            ["/v/python3", "/v/bin/deepspeed", "--num_gpus", "2", SCRIPT, "--stage", "pretrain"],
            ["deepspeed", "--num_gpus", "2", SCRIPT],
        ),
        (
            ["python", "/v/torchrun", "--nproc-per-node", "8", SCRIPT],
            ["torchrun", "--nproc-per-node", "8", SCRIPT],
        ),
        (
            ["python", "-m", "torch.distributed.run", "--nproc-per-node=2", SCRIPT],
            ["python", "-m", "torch.distributed.run", "--nproc-per-node=2", SCRIPT],
        ),
        (
            ["python", "/v/deepspeed", "--module", "iomm.engine.launch", "a=1"],
            ["deepspeed", "--module", "iomm.engine.launch"],
        ),
        (["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x", SCRIPT], []),
        (["bash", "-c", f"deepspeed {SCRIPT}"], []),
        (["python", "/v/deepspeed", "other.py"], []),
    ],
)
def test_launchers_are_found_by_their_command_line(words, expected):
    assert arguments.launcher_words(words, {SCRIPT, "iomm.engine.launch"}) == expected


def test_next_commands_are_quoted_and_start_as_the_user_did(monkeypatch):
    start = ["torchrun", "--nproc-per-node", "2", "my checkout/engine/launch.py"]
    monkeypatch.setattr(arguments, "start_of_command", lambda module: list(start))
    words = ["--config", "iomm-b-512", "data.shards=/my photos/*.tar", "train.steps=5"]
    args = launch.parse_args(words)
    config = parse("", overrides=["run.dir=/my runs/x", "train.steps=5"])
    lines = [line[12:].partition("   # ")[0] for line in launch.next_commands(config, args)]
    sample, finetune, more = map(shlex.split, lines)
    assert sample == ["iomm", "sample", "--run", "/my runs/x", "--num", "16"]
    stage_2 = ["--stage", "finetune", "--init", "/my runs/x", "--config", "iomm-b-512-finetune"]
    assert finetune == [*start, *stage_2]
    given = ["--stage=pretrain", "--config=iomm-b-512", "--resume", "auto"]
    assert more == [*start, *given, "data.shards=/my photos/*.tar", "train.steps=10"]


def test_start_without_a_launcher_is_that_of_python(monkeypatch):
    monkeypatch.setattr(arguments, "command_of_process", lambda pid: (["bash"], 1))
    monkeypatch.setattr(sys, "argv", ["/x/iomm/engine/launch.py", "a=1", "b=2"])
    monkeypatch.setattr(
        sys, "orig_argv", ["/v/bin/python3", "-m", "iomm.engine.launch", "a=1", "b=2"]
    )
    assert arguments.start_of_command("iomm.engine.launch") == [
        "python3",
        "-m",
        "iomm.engine.launch",
    ]
    # A process that was forked for several programs has the command line of another one.
    for other in (["/v/bin/python3", "-c", "x"], ["/v/bin/python3", "-c", "x", "y", "z"]):
        monkeypatch.setattr(sys, "orig_argv", other)
        script = "/x/iomm/engine/launch.py"
        assert arguments.start_of_command("iomm.engine.launch") == ["python", script]
