"""Command-line words: empty, repeated and out-of-range values are refused in one line."""

import json
import shutil
import subprocess
import sys

import pytest

from iomm import __version__
from iomm.config import InputError
from iomm.engine import arguments, launch
from iomm.engine.cli import main as iomm
from iomm.engine.config import RunConfig, all_keys, load_config, parse
from iomm.engine.config_parser import field_type, given_once, layered

TEXT_KEYS = [
    key
    for key in all_keys(RunConfig)
    if field_type(RunConfig, tuple(key.split(".")), "test") in (str, str | None)
]


def error_of(run, capsys, *words):
    """Return the only line that a command prints to stderr. It ends with exit code 2."""
    assert run(list(words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("iomm: ")
    return line


@pytest.mark.parametrize("key", [key for key in TEXT_KEYS if key != "prompt.empty"])
def test_an_empty_value_is_refused_by_name(key):
    assert "run.dir" in TEXT_KEYS and "data.latents" in TEXT_KEYS
    for value in ("", "  "):
        with pytest.raises(InputError, match=f"command line: {key} is empty"):
            parse("", overrides=[f"{key}={value}"])
    section, _, name = key.rpartition(".")
    text = f"{section}:\n  {name}: ''\n" if section else f"{name}: ''\n"
    with pytest.raises(InputError, match=rf"f\.yaml:\d: {key} is empty"):
        parse(text, "f.yaml")


def test_null_and_the_empty_prompt_remain_values():
    config = parse("run:\n  init:\nprompt:\n  empty: ''\n", overrides=["prompt.empty="])
    assert config.run.init is None and config.prompt.empty == ""
    assert parse("", overrides=["run.init=null"]).run.init is None


@pytest.mark.parametrize("value", ["a.tar,", ",a.tar", "a.tar, ,b.tar", "{a,b}.tar,"])
def test_an_empty_name_among_shards_is_refused(value):
    with pytest.raises(InputError, match=r"data\.shards has an empty name between its commas"):
        parse("", overrides=[f"data.shards={value}"])
    assert parse("", overrides=["data.shards=x{,_b}.tar,y"]).data.shards == "x{,_b}.tar,y"


@pytest.mark.parametrize("value", [".", "./", "..", "/", "runs/.."])
def test_a_run_never_fills_the_current_folder(value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    found = error_of(launch.main, capsys, f"run.dir={value}")
    assert "which is the current folder or one above it" in found
    assert not list(tmp_path.iterdir())
    # A run that is there may be resumed from its own folder.
    (tmp_path / "config.yaml").touch()
    launch.check_run_dir(tmp_path)


@pytest.mark.parametrize("text", ["\udcff", "a\ud800", "a\0b"])
def test_values_must_be_text(text, capsys):
    for key in ("run.dir", "data.shards", "evaluate.prompts", "prompt.empty"):
        with pytest.raises(InputError, match=f"{key} must (be UTF-8 text|not contain a null)"):
            parse("", overrides=[f"{key}={text}"])
    if "\0" not in text:
        assert "--out must be UTF-8 text" in error_of(iomm, capsys, "export", "--out", text)


def test_an_empty_run_dir_trains_nowhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    assert "run.dir is empty" in error_of(launch.main, capsys, "run.dir=")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--config", "--init", "--resume", "--hook"])
def test_empty_options_of_training_are_refused(option, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    assert f"{option} is empty. Give a value" in error_of(launch.main, capsys, option, "")


@pytest.mark.parametrize(
    "words, name",
    [
        (["index", "", "--out", "x"], "shards"),
        (["index", "x", "--out", ""], "--out"),
        (["cache", "--out", ""], "--out"),
        (["cache", "--out", "x", "--config", ""], "--config"),
        (["cache", "--out", "x", "data.shards="], "data.shards"),
        (["sample", "--run", ""], "--run"),
        (["sample", "--run", "x", "--out", " "], "--out"),
        (["edit", "--run", "x", "--instruction", "y", "--image", ""], "--image"),
        (["evaluate", "dpg", "--prompts", ""], "--prompts"),
        (["evaluate", "dpg", "--prompts", "x", "--out", ""], "--out"),
        (["evaluate", "dpg", "--graded", ""], "--graded"),
        (["evaluate", "imgedit", "--origin-img-root", ""], "--origin-img-root"),
        (["export", "--run", "x", "--out", ""], "--out"),
        (["report", ""], "RUN"),
        (["sample", "--run", "x", "--size", ""], "--size"),
        (["sample", "--run", "x", "--mllm", ""], "--mllm"),
        (["export", "--run", "x", "--vae", ""], "--vae"),
        (["evaluate", "dpg", "--graded", "x", "--model", ""], "--model"),
    ],
)
def test_empty_arguments_of_iomm_are_refused(words, name, capsys):
    assert f"{name} is empty" in error_of(iomm, capsys, *words)


def test_a_key_with_two_values_is_refused(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    message = "optim.lr is given 2 times, as '1e-3', '1e-4'. Give it once"
    assert message in error_of(launch.main, capsys, "optim.lr=1e-3", "optim.lr=1e-4")
    words = ["--init", "runs/a", "run.init=runs/b"]
    assert "run.init is given 2 times" in error_of(launch.main, capsys, *words)
    words = ["cache", "--out", "x", "model.vae=a", "model.vae=b"]
    assert "model.vae is given 2 times" in error_of(iomm, capsys, *words)
    for option in ("--config", "--init", "--resume", "--hook", "--stage"):
        found = error_of(launch.main, capsys, f"{option}=a", f"{option}=b")
        assert f"{option} is given twice, as 'a' and 'b'" in found
    found = error_of(iomm, capsys, "sample", "--run=runs/a", "--run=runs/b")
    assert "--run is given twice" in found


def test_equal_repetitions_are_one():
    assert given_once(["a.b=1", "a.b=1", "c.d=2"]) == ["a.b=1", "c.d=2"]
    args = launch.parse_args(["--resume", "auto", "train.steps=3", "--resume=auto"])
    assert args.resume == "auto" and args.overrides == ["train.steps=3"]


def test_shards_that_a_shell_expanded_are_a_list():
    words = ["data.shards=a/0.tar", "train.steps=3", "data.shards=a/1.tar", "data.pairs=p.tar"]
    args = launch.parse_args([*words, "data.shards=a/0.tar"])
    config = load_config("demo-finetune", args.overrides)
    assert config.data.shards == "a/0.tar,a/1.tar" and config.data.pairs == "p.tar"
    # A comma would be taken for the end of a pattern.
    with pytest.raises(InputError, match=r"data\.shards is given 2 times"):
        given_once(["data.shards=a,b.tar", "data.shards=c.tar"], ("data.shards",))


def test_later_layers_of_a_program_win():
    words = ["--config", "x", "a.b=1", "--num", "3", "a.b=2", "--num", "3"]
    assert layered(words) == ["--config", "x", "a.b=2", "--num", "3", "--num", "3"]


def test_words_without_a_key_say_what_to_do(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    found = error_of(launch.main, capsys, "data.shards=a.tar", "b.tar")
    assert "'b.tar' must look like section.key=value" in found and "put it in quotes" in found


# Replaces pdsh and ssh to one machine: joins its words with blanks for a shell, as ssh does.
PDSH = """#!/bin/bash
while [ $# -gt 0 ]; do case "$1" in -S) shift;; -f|-w) shift 2;; *) break;; esac; done
exec bash -c "${*//%n/0}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    "given, expected",
    [
        ("/data/{0..2}.tar", "/data/0.tar,/data/1.tar,/data/2.tar"),
        # The second pair of quotes is for the shell of the other machine.
        ("'/data/{0..2}.tar'", "/data/{0..2}.tar"),
        ("/data/*.tar", "/data/*.tar"),
        ("'/data/a&b/*.tar'", "/data/a&b/*.tar"),
        ("/data/my photos/*.tar", "/data/my photos/*.tar"),
    ],
)
def test_arguments_survive_the_shell_of_another_machine(given, expected, tmp_path):
    from deepspeed.launcher import multinode_runner, runner

    for name, text in (("pdsh", PDSH), ("ssh", "#!/bin/bash\nhostname\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    script = tmp_path / "words.py"
    script.write_text("import json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    prompts = "evaluate.prompts=a red circle | two (blue) squares"
    args = runner.parse_args([str(script), f"data.shards={given}", prompts])
    words = multinode_runner.PDSHRunner(args, "none").user_arguments
    done = subprocess.run(
        [str(tmp_path / "pdsh"), "-S", "-w", "localhost", f"{sys.executable} {script}", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    config = load_config("demo", launch.parse_args(json.loads(done.stdout)).overrides)
    assert config.data.shards == expected
    assert config.evaluate.prompts == "a red circle | two (blue) squares"


@pytest.mark.parametrize(
    "words, message",
    [
        (["sample", "--run", "x", "--num", "0"], "--num must be a whole number >= 1, got '0'"),
        (["sample", "--run", "x", "--num", str(2**64)], "--num must be a whole number >= 1"),
        (["sample", "--run", "x", "--steps", "1.5"], "--steps must be a whole number >= 1"),
        (["sample", "--run", "x", "--steps", "1_0"], "--steps must be a whole number >= 1"),
        (["sample", "--run", "x", "--seed", str(2**64)], "--seed must be a whole number from 0"),
        (["sample", "--run", "x", "--seed", "-1"], "--seed must be a whole number from 0"),
        (["sample", "--run", "x", "--seed", "²"], "--seed must be a whole number from 0"),
        (["sample", "--run", "x", "--guidance", "nan"], "--guidance must be a number >= 0"),
        (["sample", "--run", "x", "--guidance", "inf"], "--guidance must be a number >= 0"),
        (["sample", "--run", "x", "--guidance", "-1"], "--guidance must be a number >= 0"),
        (["sample", "--run", "x", "--size", "99999"], "--size must be at most 67,108,864 pixels"),
        (
            ["sample", "--run", "x", "--shift", "0"],
            "--shift must be flux, qwen-image or a number > 0, got '0'",
        ),
        (["sample", "--run", "x", "--shift", "nan"], "--shift must be flux, qwen-image or a num"),
        (["sample", "--run", "x", "--prompt", "\udcff"], "--prompt must be UTF-8 text"),
        (["index", "x", "--out", "y", "--max-aspect", "nan"], "--max-aspect must be a number >= 1"),
        (["index", "x", "--out", "y", "--workers", "0"], "--workers must be a whole number >= 1"),
        (
            ["index", "x", "--out", "y", "--min-size", "-1"],
            "--min-size must be a whole number >= 1",
        ),
        (["cache", "--out", "y", "--batch", "0"], "--batch must be a whole number >= 1"),
        (["cache", "--out", "y", "--ranks", "0"], "--ranks must be a whole number >= 1"),
        (["evaluate", "dpg", "--rank", "-1"], "--rank must be a whole number >= 0"),
        (["evaluate", "nobench"], "invalid choice"),
        (["sample", "--run", "x", "--numb", "2"], "unrecognized arguments: --numb 2"),
    ],
)
def test_wrong_values_of_iomm_are_refused(words, message, capsys):
    assert message in error_of(iomm, capsys, *words)


def test_more_prompts_than_images_are_refused(capsys):
    words = ["sample", "--run", "x", "--num", "1", "--prompt", "a", "--prompt", "b"]
    assert "--num is 1, but 2 prompts were given" in error_of(iomm, capsys, *words)


def test_version(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        iomm(["--version"])
    assert capsys.readouterr().out == f"iomm {__version__}\n"


def test_types_read_what_config_values_may_be():
    assert arguments.whole(0)("7") == 7 and arguments.seed(str(2**64 - 1)) == 2**64 - 1
    assert arguments.number(0)("1e3") == 1000 and arguments.shift("flux") == "flux"
    assert arguments.shift("2.5") == 2.5 and arguments.text_of_shell("zwölf") == "zwölf"
