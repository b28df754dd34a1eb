"""Import rules, one door per third-party library, names that collide with none, and language."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Trees of this repository that each tree may import.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "iomm": {"kernels", "iomm"},
    "engine": {"kernels", "iomm", "engine"},
    "benchmarks": {"kernels", "iomm", "engine", "benchmarks"},
    "tests": {"kernels", "iomm", "engine", "benchmarks", "tests"},
}
# Files and folders of engine/ from bottom to top. Each imports only from those above it in this
# list and from itself.
LAYERS = (
    "cores",
    "config_parser",
    "arguments",
    "config",
    "data",
    "shapes",
    "resilience",
    "parallel",
    "observe",
    "builders",
    "evaluation",
    "activations",
    "dry_run",
    "state",
    "loop",
    "launch",
    "torchrun",
    "cli",
)
# Where each third-party library may be imported: files, or folders that end in a slash.
DOORS = {
    "transformers": ("iomm/internvl.py", "engine/shapes/mllm.py", "tests/"),
    "diffusers": ("iomm/vae.py", "benchmarks/lib/baseline.py", "tests/"),
    "nvidia": ("engine/data/decode.py",),
    "deepspeed": (
        "engine/parallel/zero.py",
        "engine/parallel/ranks.py",
        "engine/launch.py",
        "tests/engine/test_arguments.py",
    ),
    "triton": ("kernels/", "tests/helpers/offline.py", "tests/helpers/pretended_inductor.py"),
    "wandb": ("engine/observe/metrics.py",),
    "matplotlib": ("engine/observe/report.py", "benchmarks/"),
}
# Installed modules that a file of the same name next to a script would hide: Python puts the
# script's folder first on sys.path.
WELL_KNOWN = {
    "kernels",
    "evaluate",
    "datasets",
    "data",
    "torch",
    "numpy",
    "triton",
    "transformers",
    "diffusers",
    "deepspeed",
    "apex",
    "yaml",
    "tqdm",
    "PIL",
    "accelerate",
    "peft",
    "packaging",
    "requests",
    "regex",
    "attr",
    "attrs",
    "six",
    "setup",
    "conftest",
    "wheel",
    "pip",
    "models",
    "utils",
}


def sources():
    """Return every Python file of the five trees."""
    return [path for tree in MAY_IMPORT for path in sorted((ROOT / tree).rglob("*.py"))]


def imports(path):
    """Yield (line, dotted name) of every import; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{path.relative_to(ROOT)}:{node.lineno}: relative import; use an absolute one"
            )
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def tree_of(module):
    """Return the tree of this repository that a dotted name belongs to, or None."""
    parts = module.split(".")
    if parts[0] in ("tests", "benchmarks"):
        return parts[0]
    if parts[0] == "iomm":
        return parts[1] if len(parts) > 1 and parts[1] in ("kernels", "engine") else "iomm"
    return None


def test_imports_go_downward():
    wrong = []
    for path in sources():
        tree = path.relative_to(ROOT).parts[0]
        for line, module in imports(path):
            if (other := tree_of(module)) and other not in MAY_IMPORT[tree]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_imports_inside_engine_go_downward():
    wrong, seen = [], set()
    for path in sorted((ROOT / "engine").rglob("*.py")):
        own = path.relative_to(ROOT / "engine").with_suffix("").parts[0]
        seen.add(own)
        for line, module in imports(path):
            if module.startswith("iomm.engine."):
                other = module.split(".")[2]
                if other != own and LAYERS.index(other) > LAYERS.index(own):
                    wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)
    assert seen == set(LAYERS)


def test_each_third_party_library_has_one_door():
    wrong = []
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        for line, module in imports(path):
            doors = DOORS.get(module.split(".")[0])
            if doors and not any(
                name.startswith(door) if door.endswith("/") else name == door for door in doors
            ):
                wrong.append(f"{name}:{line} imports {module}; allowed in {', '.join(doors)}")
    assert not wrong, "\n".join(wrong)


def test_trees_are_imported_by_their_full_name():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in sources()
        for line, module in imports(path)
        if module.split(".")[0] in ("kernels", "engine")
    ]
    assert not wrong, "\n".join(wrong)


def test_roots_have_no_init_file():
    # A top-level package `kernels` breaks transformers and pip where Hugging Face's `kernels` is
    # installed.
    for tree in ("kernels", "engine"):
        assert not (ROOT / tree / "__init__.py").exists()
        for folder in (ROOT / tree).iterdir():
            if folder.is_dir() and any(folder.glob("*.py")):
                assert (folder / "__init__.py").exists(), (
                    f"{folder.relative_to(ROOT)} needs an __init__.py"
                )


def test_no_file_hides_a_module():
    for folder in ("engine", "benchmarks", "benchmarks/lib", "benchmarks/studies"):
        for path in (ROOT / folder).glob("*.py"):
            assert path.stem not in sys.stdlib_module_names, (
                f"{path.relative_to(ROOT)} hides a module of the standard library"
            )
            assert path.stem not in WELL_KNOWN, (
                f"{path.relative_to(ROOT)} hides an installed module"
            )


def test_child_processes_import_nothing_from_the_current_folder():
    wrong = []
    for path in sources():
        tree = path.relative_to(ROOT).parts[0]
        for node in ast.walk(ast.parse(path.read_text())) if tree != "tests" else ():
            words = [ast.unparse(word) for word in getattr(node, "elts", [])]
            if "sys.executable" in words and {"'-m'", "'-c'"} & set(words) and "'-P'" not in words:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} needs -P")
    assert not wrong, "\n".join(wrong)


@pytest.fixture
def hugging_face_kernels(tmp_path):
    """Return a folder with a stand-in for Hugging Face's `kernels` 0.18.2.

    transformers accepts it and imports names from it.
    """
    package = tmp_path / "kernels"
    (package / "layer").mkdir(parents=True)
    answer = "MARK = 'hugging face'\ndef __getattr__(name):\n    return type(name, (), {})\n"
    (package / "__init__.py").write_text(answer)
    (package / "layer" / "__init__.py").write_text(answer)
    (package / "layer" / "mode.py").write_text("class Mode:\n    pass\n")
    info = tmp_path / "kernels-0.18.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    (info / "RECORD").write_text("kernels/__init__.py,,\n")
    (info / "top_level.txt").write_text("kernels\n")
    return tmp_path


def test_hugging_face_kernels_can_be_installed_too(hugging_face_kernels):
    code = (
        "import kernels, transformers; from transformers.integrations import hub_kernels;"
        "from transformers.utils.import_utils import is_kernels_available;"
        "import iomm.kernels.dispatch, iomm.kernels.philox;"
        "assert kernels.MARK == 'hugging face' and is_kernels_available();"
        "print(iomm.kernels.dispatch.__file__)"
    )
    # As for a script in the checkout, the root of the repository precedes site-packages.
    path = os.pathsep.join([str(ROOT), str(hugging_face_kernels)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).samefile(ROOT / "kernels" / "dispatch.py")


# Phrases of a translated style, and how often each is meant literally.
PHRASES = {
    r"goes on\b": 0,
    r"go on (with|from|to)\b": 0,
    r"be had\b": 0,
    r"\b(some|no)body\b": 0,
    r"\bwhoever\b": 0,
    r"of its own\b": 1,
    r"\b(stands?|lies?) (for|in|there|here|beside)\b": 0,
    r"\b(is|are|was) told\b": 0,
    r"\bit seems\b": 0,
    r"nothing is lost\b": 0,
    r"\bthe judge\b": 0,
    r"\bshapes world\b": 0,
}
TEXT = ("*.py", "*.md", "*.yaml", "*.yml", "*.toml", "*.cpp", "*.cu", "*.h", ".ci/run")


def test_phrases_of_a_translated_style_stay_out():
    listed = subprocess.run(
        ["git", "ls-files", *TEXT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = {phrase: [] for phrase in PHRASES}
    for name in listed.stdout.split():
        if name == "tests/test_house.py":
            continue
        text = (ROOT / name).read_text(encoding="utf-8")
        for phrase in PHRASES:
            for match in re.finditer(phrase, text, re.IGNORECASE):
                line = text.count("\n", 0, match.start()) + 1
                found[phrase].append(f"{name}:{line}: {match[0]}")
    wrong = [place for phrase, places in found.items() for place in places[PHRASES[phrase] :]]
    assert not wrong, "\n".join(wrong)
