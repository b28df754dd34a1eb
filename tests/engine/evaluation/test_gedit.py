"""GEdit-Bench: reading the exported dataset, and filling the folder that its grader expects."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_models import build

from iomm.engine.cli import main
from iomm.engine.evaluation.layouts import LAYOUTS, next_step, read_items
from iomm.pipeline import Pipeline

SIDE = 16
KEYS = {"4a7d36259ad94d238a6e7e7e0bd6b643": "background_change", "0b2": "subject-add"}


def export(root: Path, *, language: str = "en", mode: str = "RGB", **changes: str) -> str:
    """Write a small dataset in the format of engine/README.md. Return the path of its lines."""
    lines = []
    for i, (key, task) in enumerate(KEYS.items()):
        Image.new(mode, (20 + i, 30)).save(root / f"{language}-{key}.png")
        lines.append(
            {
                "task_type": task,
                "key": key,
                "instruction": f"change it, {i}",
                "instruction_language": language,
                "Intersection_exist": True,
                "image": f"{language}-{key}.png",
                **changes,
            }
        )
    path = root / f"{language}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def run(mllm, mllm_folder, tmp_path_factory):
    pipe = Pipeline(build(mllm), SIDE, origin={"run": "runs/tiny", "step": "7", "weights": "ema"})
    folder = pipe.save_pretrained(tmp_path_factory.mktemp("export"), mllm="shapes", vae="pixel:4")
    # A folder of an earlier version names the path of its MLLM.
    card = json.loads((folder / "iomm.json").read_text()) | {"mllm": str(mllm_folder)}
    (folder / "iomm.json").write_text(json.dumps(card))
    return str(folder)


def evaluate(prompts: str, out: Path, *more: str) -> int:
    return main(["evaluate", "gedit", "--prompts", prompts, "--out", str(out), *more])


def test_folder_is_filled_checked_and_resumed(run, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    prompts, out = export(tmp_path / "data"), tmp_path / "gedit"
    sampling = ("--run", run, "--steps", "1", "--guidance", "2")
    assert evaluate(prompts, out, *sampling) == 0
    printed = capsys.readouterr().out
    assert "the benchmark has 606 prompts" in printed
    assert f"--save_path {tmp_path} --model_name gedit --backbone gpt4o" in printed
    names = {f"fullset/{task}/en/{key}" for key, task in KEYS.items()}
    found = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert found == {f"{name}{end}" for name in names for end in (".png", "_SRCIMG.png")}
    for key, task in KEYS.items():
        source = out / f"fullset/{task}/en/{key}_SRCIMG.png"
        assert source.read_bytes() == (tmp_path / f"data/en-{key}.png").read_bytes()
        edited = Image.open(out / f"fullset/{task}/en/{key}.png")
        assert edited.size == (SIDE, SIDE)
        assert edited.text["benchmark"] == "gedit en"
        assert edited.text["item"] == f"{task}/en/{key}"

    # Files of the grader are accepted, all others are reported.
    (out / "gpt4o/eval_results_new").mkdir(parents=True)
    (out / "gpt4o/eval_results_new/gedit_combined_gpt_score.csv").write_text("x")
    assert evaluate(prompts, out, "--check") == 0
    source.write_bytes(b"x")
    edited_path = out / "fullset/background_change/en" / f"{next(iter(KEYS))}.png"
    before = np.asarray(Image.open(edited_path))
    edited_path.unlink()
    (out / "fullset/subject-add/cn").mkdir()
    capsys.readouterr()
    assert evaluate(prompts, out, "--check") == 1
    printed = capsys.readouterr().out
    assert f"missing: {edited_path.relative_to(out)}" in printed
    assert "0b2_SRCIMG.png: differs from" in printed
    assert "extra: fullset/subject-add/cn\n" in printed
    (out / "fullset/subject-add/cn").rmdir()
    assert evaluate(prompts, out, *sampling) == 0
    assert (np.asarray(Image.open(edited_path)) == before).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "RGBA"}, "must be a PNG in RGB, got PNG in RGBA"),
        ({"task_type": "subject_add"}, "expected a task_type of GEdit-Bench"),
        ({"instruction_language": "zh"}, "the language en or cn, got 'background_change' and 'zh'"),
        ({"image": "nowhere.png"}, "cannot be read"),
        ({"instruction": ""}, "expected an object with a text 'instruction'"),
        ({"key": "../x"}, "cannot be a file name"),
    ],
)
def test_invalid_exports_give_a_one_line_error(options, message, tmp_path, capsys):
    assert evaluate(export(tmp_path, **options), tmp_path / "out", "--check") == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert message in error[0]


def test_each_language_is_a_separate_protocol(tmp_path, capsys):
    english, chinese = export(tmp_path), export(tmp_path, language="cn")
    items, name = read_items(LAYOUTS["gedit"], [chinese], None)
    assert name == "gedit cn"
    assert items[1].id == "subject-add/cn/0b2"
    text = next_step(name, tmp_path / "out", SIDE, [chinese], None)
    assert "--language cn\n" in text
    assert "out_combined_gpt_score.csv" in text
    both = tmp_path / "both.jsonl"
    both.write_text((tmp_path / "en.jsonl").read_text() + (tmp_path / "cn.jsonl").read_text())
    assert evaluate(str(both), tmp_path / "out", "--check") == 2
    assert "contains two languages" in capsys.readouterr().err
    assert evaluate(english, tmp_path / "out", "--check") == 1
