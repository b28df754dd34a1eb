"""READMEs: length, links, paths, commands and codes exist, generated parts are up to date.

Commands are parsed, never run: those of the engine and of `iomm` by their own parsers, those of a
script by the options that its source declares.
"""

import ast
import importlib
import inspect
import re
import shlex
import subprocess
import textwrap
from pathlib import Path

import pytest

from benchmarks import report
from iomm.config import InputError
from iomm.engine import cli, launch
from iomm.engine.config import RunConfig, all_keys, load_config, parse
from iomm.engine.config_parser import documented
from iomm.engine.observe.metrics import Metrics

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("engine", "iomm", "kernels", "csrc", "benchmarks", "tests", ".ci", ".github")
READMES = [
    "README.md",
    ".github/CONTRIBUTING.md",
    *(
        f"{folder}/README.md"
        for folder in ("engine", "engine/data", "iomm", "kernels", "benchmarks", "tests")
    ),
]
# Programs of others, whose arguments are not checked.
FOREIGN = {"hf", "ruff", "srun", "tensorboard", "python3", ".", "git"}
SOURCE = re.compile(r"[\w./-]*\w\.(?:py|cpp|cu|h|toml|md)")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, kind: str) -> list[str]:
    """Return the contents of all fenced blocks of a language; "" for blocks without one."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    """Return a text without fenced blocks and without generated parts."""
    text = re.sub(r"<!-- generated.*?<!-- /generated -->", "", text, flags=re.DOTALL)
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """Return the words of every command in bash blocks and in code spans."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`((?:deepspeed|iomm|pytest|pip|python) [^`]+)`", prose(text))
    found = []
    for line in lines:
        # An assignment from another program's output.
        if re.match(r"\w+=\$\(", line):
            continue
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            # Environment variables before a command.
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            found += [words] if words else []
    return found


def declared(path: Path) -> set[str]:
    """Return the options that a script's source passes to add_argument."""
    calls = (
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"
    )
    return {name.value for call in calls for name in call.args if isinstance(name, ast.Constant)}


def check_engine(arguments: list[str]) -> None:
    """Raise InputError or SystemExit unless engine/launch.py would accept these arguments."""
    args = launch.parse_args(arguments)
    assert args.stage in launch.STAGES
    load_config(args.config or launch.STAGES[args.stage], args.overrides)


def check_console(arguments: list[str], monkeypatch) -> None:
    """Raise SystemExit unless `iomm` would accept these arguments."""
    # A mention of the command without arguments.
    if len(arguments) == 1 and arguments[0] != "doctor":
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.main([*arguments, "--help"])
        return
    called = []
    for name in ("index", "cache", "sample", "edit", "evaluate", "export", "report", "doctor"):
        monkeypatch.setattr(cli, name, lambda args: called.append(args) or 0, raising=False)
    assert cli.main(arguments) == 0
    if getattr(called[0], "overrides", None) is not None:
        load_config(called[0].config, called[0].overrides)


def check_script(path: Path, arguments: list[str]) -> None:
    """Check a script's options against its source, and its settings against the config keys."""
    assert path.is_file(), f"no script {path}"
    options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    assert set(options) <= declared(path) | {"--help"}, (
        f"{path.name} declares {sorted(declared(path))}"
    )
    settings = [word for word in arguments if "=" in word and not word.startswith("--")]
    parse("", overrides=settings)


def check_command(words: list[str], monkeypatch) -> None:
    program, *arguments = words
    if program == "deepspeed" and "engine/launch.py" not in words:
        assert all(word.startswith("-") for word in arguments), (
            "without a script only options of DeepSpeed's launcher are allowed"
        )
    elif "engine/launch.py" in words:
        check_engine(words[words.index("engine/launch.py") + 1 :])
    elif program == "sbatch":
        script = next(word for word in arguments if word.endswith(".sh"))
        assert script == "engine/slurm.sh" and (ROOT / script).is_file()
        check_engine(words[words.index(script) + 1 :])
    elif program == "iomm":
        check_console(arguments, monkeypatch)
    elif program == "python" and arguments[:1] == ["-m"]:
        check_script(
            ROOT / f"{arguments[1].replace('iomm.', '', 1).replace('.', '/')}.py", arguments[2:]
        )
    elif program == "python":
        check_script(ROOT / arguments[0], arguments[1:])
    elif program == "pytest":
        missing = [
            word for word in arguments if word.startswith("tests/") and not (ROOT / word).exists()
        ]
        assert not missing, f"no {missing[0]}"
    elif program == "pip":
        extras = re.findall(r"\.\[(\w+)\]", " ".join(arguments))
        assert all(f"\n{extra} = [" in read("pyproject.toml") for extra in extras), (
            "pyproject.toml has no such extra"
        )
    else:
        assert program in FOREIGN, f"add a check for commands of {program}"


def test_root_readme_is_short():
    lines = read("README.md").splitlines()
    assert len(lines) <= 150
    assert [
        f"{number}: {len(line)}" for number, line in enumerate(lines, 1) if len(line) > 160
    ] == []


@pytest.mark.parametrize("name", READMES)
def test_no_placeholder_is_left(name):
    assert re.findall(r"\{\{.*?\}\}|\bTODO\b", read(name)) == []


@pytest.mark.parametrize("name", READMES)
def test_no_document_outside_the_repository_is_cited(name):
    text = read(name)
    found = re.findall(
        r"\b(?:METHOD|RELIABILITY|DESIGN|STYLE|FACTS)\b(?:\.md)?|\bissue \d+|/work/\S+", text
    )
    assert found == []
    if name != "benchmarks/README.md":
        assert re.findall(r"\b[CFHDSNO][1-9]\d?\b", prose(text)) == [], (
            "a code of the reliability table without its meaning"
        )


def test_every_code_is_explained():
    text = read("benchmarks/README.md")
    explained = set(re.findall(r"^\| ([A-Z]\d+)(?: to [A-Z]\d+)? \|", text, re.MULTILINE))
    explained |= {f"D{i}" for i in range(1, 9)} if "D1" in explained else set()
    used = {
        code
        for table in (report.table("reliability"),)
        for code in re.findall(r"^\| ([A-Z]\d+)\b", table, re.MULTILINE)
    }
    assert used <= explained
    trials = re.findall(
        r'^    "(\w+)": \(\s*"([A-Z]\d+) ', read("tests/faults/survival.py"), re.MULTILINE
    )
    assert dict(trials) == {
        name: what[:3].rstrip(": ") for name, (what, _) in report.PROMISES.items()
    }


@pytest.mark.parametrize("name", READMES)
def test_links_resolve(name):
    broken = []
    for words, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", read(name)):
        path, _, anchor = target.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        file = (ROOT / name).parent / path if path else ROOT / name
        if not file.exists() or (
            anchor and anchor not in anchors(file.read_text(encoding="utf-8"))
        ):
            broken.append(target)
        elif (
            file.suffix == ".py"
            and (symbol := re.fullmatch(r"`([\w.]+)`", words))
            and file.stem != symbol[1]
        ):
            broken += [] if defines(file, symbol[1]) else [f"{symbol[1]} in {target}"]
    assert broken == []


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a Markdown text."""
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


def defines(file: Path, symbol: str) -> bool:
    """Return whether a module defines or imports a name, or both parts of "Class.method".

    The name of a package's folder counts as defined in its __init__.py.
    """
    text = file.read_text(encoding="utf-8")
    return file.parent.name == symbol or all(
        re.search(rf"^\s*(?:def|class) {part}\b|^from .* import .*\b{part}\b", text, re.MULTILINE)
        for part in symbol.split(".")
    )


@pytest.mark.parametrize("name", READMES)
def test_paths_exist(name):
    """Check paths in code spans and listings, relative to the README or to the root.

    A path is recognised by its first folder or by the suffix of a source file.
    """
    here, missing = (ROOT / name).parent, []
    spans = re.findall(r"`([^`\n]+)`", prose(read(name))) + [
        line.split()[0]
        for block in blocks(read(name), "")
        for line in block.splitlines()
        if line and not line[0].isspace()
    ]
    for span in spans:
        for path in span.split() if span.startswith(("python ", "pytest ")) else [span]:
            ours = path.split("/")[0] in FOLDERS and re.fullmatch(r"[\w./-]+", path)
            if (
                (ours or SOURCE.fullmatch(path))
                and path not in (".cpp", ".cu")
                and not any((folder / path).exists() for folder in (here, ROOT))
            ):
                missing.append(path)
    assert missing == []


@pytest.mark.parametrize("name", READMES)
def test_commands_parse(name, monkeypatch, capsys):
    wrong = []
    for words in commands(read(name)):
        try:
            check_command(words, monkeypatch)
        except (InputError, AssertionError, SystemExit, FileNotFoundError) as error:
            wrong.append(f"{shlex.join(words)}: {error} {capsys.readouterr().err}")
    assert wrong == []


@pytest.mark.parametrize("name", READMES)
def test_python_blocks_parse_and_import(name):
    for block in blocks(read(name), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_generated_parts_are_up_to_date():
    for name, generated in report.parts().items():
        text = read(name)
        for part, markdown in generated.items():
            assert report.written(text, part, markdown) == text, (
                f"{name}, {part}: run python benchmarks/report.py"
            )
    with pytest.raises(ValueError, match="once"):
        report.written(text.replace(report.END, ""), part, markdown)


def test_every_config_key_is_documented():
    rows = list(documented(RunConfig))
    assert [row.key for row in rows] == all_keys(RunConfig)
    assert [row.key for row in rows if not row.meaning] == []
    assert {row.key: row.default for row in rows}["zero.stage"] == 3
    meanings = {row.key: row.meaning for row in rows}
    assert meanings["zero.stage"].startswith("0 splits nothing") and meanings[
        "zero.reduce_precision"
    ].startswith("bf16 | fp32: ")


def test_tables_match_reasons_and_log_keys_in_code():
    """Compare the tables with the rejection reasons and log.jsonl keys found in the code."""
    source = "".join(path.read_text() for path in (ROOT / "engine/data").glob("*.py"))
    reasons = set(
        re.findall(r'(?:Rejected\(|reject\([^,\n]+, |report\(|replaced\()"(\w+)"', source)
    )
    table = read("engine/data/README.md").partition("## Reasons")[2].partition("\n## ")[0]
    assert reasons == set(
        re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)))
    )
    keys = {
        key.value
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(Metrics.record))))
        if isinstance(node, ast.Dict)
        for key in node.keys
    }
    table = read("engine/README.md").partition("## Log keys")[2].partition("\n## ")[0]
    assert {"step", "loss", "mfu", "gpu_hours_left"} <= keys <= set(re.findall(r"`(\w+)`", table))


def test_every_readme_is_checked():
    listed = subprocess.run(
        [
            "git",
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
            "*README.md",
            "*CONTRIBUTING.md",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert sorted(listed.stdout.split()) == sorted(READMES)
