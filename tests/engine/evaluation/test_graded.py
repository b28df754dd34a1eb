"""Scores of the official graders' result files: arithmetic, warnings and errors."""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from iomm.engine.cli import main
from iomm.engine.evaluation.graded import GENEVAL_TAGS, IMGEDIT_TYPES, READERS
from iomm.engine.evaluation.layouts import GEDIT_TASKS, LAYOUTS

# Prompts of each task in evaluation_metadata.jsonl.
GENEVAL_PROMPTS = dict(zip(GENEVAL_TAGS, (80, 99, 80, 94, 100, 100), strict=True))


def write_lines(path: Path, entries: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def geneval_lines(
    prompt: str = "a photo of a {tag}",
    filename: str = "nowhere/{n}.png",
    num_prompts: dict[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Return lines as evaluate_images.py writes them, some of each task correct."""
    lines = []
    for i, (tag, count) in enumerate((num_prompts or GENEVAL_PROMPTS).items()):
        for n in range(4 * count):
            text = prompt.format(tag=tag)
            lines.append(
                {
                    "filename": filename.format(n=len(lines)),
                    "tag": tag,
                    "prompt": text,
                    "correct": n < (i + 1) * count // 2,
                    "reason": "",
                    "metadata": json.dumps({"tag": tag, "prompt": f"{text} {n // 4}"}),
                    "details": "{}",
                }
            )
    return lines


def dpg_text(
    num_images: int = 1065,
    score: float = 0.8,
    crops: int = 4,
    summary: bool = True,
    reported: float | None = None,
) -> str:
    """Return the text that compute_dpg_bench.py writes, with categories."""
    row = ", ".join([str(score)] * crops)
    lines = [f"/data/a, b/{n}.png, {row}, {score}" for n in range(num_images)]
    if summary:
        lines += ["Model: b", "L1 category scores:", "\tentity: 91.5", "\tother: 50.0"]
        lines += ["L2 category scores:", "\tentity - whole: 91.5", "\tother - text: 50.0"]
        lines += ["Image path: /data/a, b", "Save results to: /data/r.txt"]
        lines.append(f"DPG-Bench score: {100 * score if reported is None else reported}")
    return "\n".join(lines) + "\n"


def wise_lines(protocol: str, ids: Iterable[int] = range(1, 1001)) -> Iterator[dict[str, Any]]:
    """Yield score lines in which prompts with odd ids have higher scores."""
    for n in ids:
        entry = {"prompt_id": n, "Subcategory": "x"}
        if protocol == "verified":
            yield {**entry, "score": float(n % 2)}
        else:
            yield {**entry, "consistency": 2.0 * (n % 2), "realism": 1.0, "aesthetic_quality": 2.0}


def gedit_rows(
    tasks: Sequence[str] = GEDIT_TASKS, language: str = "en"
) -> Iterator[dict[str, Any]]:
    """Yield two rows of test_gedit_score.py for each task."""
    for i, task in enumerate(tasks):
        for key, semantics in (("a", 4.0), ("b", 9.0)):
            name = f"/r/m/fullset/{task}/{language}/{key}"
            yield {
                "source_image": f"{name}_SRCIMG.png",
                "edited_image": f"{name}.png",
                "instruction": "x, y",
                "sementics_score": semantics,
                "quality_score": float(i),
                "intersection_exist": True,
                "instruction_language": language,
            }


def write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    rows = list(rows)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def evaluate(
    capsys: pytest.CaptureFixture[str], bench: str, *arguments: str
) -> tuple[int, list[str], str]:
    """Run `iomm evaluate`. Return (exit code, lines of stdout, stderr)."""
    code = main(["evaluate", bench, *arguments])
    printed = capsys.readouterr()
    return code, printed.out.splitlines(), printed.err


def test_geneval_is_the_mean_over_its_tasks(tmp_path):
    path = write_lines(tmp_path / "results.jsonl", geneval_lines())
    graded = READERS["geneval"]([path], None)
    # (i + 1) * count // 2 of 4 * count images.
    shares = {
        tag: ((i + 1) * count // 2) / (4 * count)
        for i, (tag, count) in enumerate(GENEVAL_PROMPTS.items())
    }
    assert graded.categories == pytest.approx(shares)
    assert list(graded.categories) == list(GENEVAL_TAGS)
    assert graded.overall == pytest.approx(sum(shares.values()) / 6)
    assert (graded.num_graded, graded.num_expected) == (2212, 2212)


def test_geneval_table_shows_the_papers_score_and_the_difference(tmp_path, capsys):
    path = write_lines(tmp_path / "results.jsonl", geneval_lines())
    code, lines, _ = evaluate(capsys, "geneval", "--graded", path, "--model", "iomm-b-512")
    assert code == 0
    assert lines[0] == "geneval, official prompts: 2,212 of 2,212 entries"
    assert lines[1].split() == ["yours", "iomm-b-512", "difference"]
    assert lines[2].split() == ["overall", "0.438", "0.89", "-0.452"]
    assert lines[3].split() == ["single_object", "0.125"]
    assert lines[-1] == "paper: arXiv 2603.16139, main results (table 1)"
    _, lines, _ = evaluate(capsys, "geneval", "--graded", path)
    models = ["iomm-b-512", "iomm-b-1024", "iomm-l-512", "iomm-l-1024", "iomm-xl-512"]
    assert lines[1].split() == ["yours", *models]
    assert lines[2].split() == ["overall", "0.438", "0.89", "0.87", "0.87", "0.85", "0.88"]


def test_geneval_protocol_is_the_one_that_the_images_record(tmp_path, capsys):
    def picture(name: str, benchmark: str) -> None:
        text = PngImagePlugin.PngInfo()
        text.add_text("benchmark", benchmark)
        Image.new("RGB", (4, 4)).save(tmp_path / name, pnginfo=text)

    picture("rewritten.png", "geneval, rewritten prompts")
    picture("official.png", "geneval")
    lines = geneval_lines(filename=str(tmp_path / "rewritten.png"))
    graded = READERS["geneval"]([write_lines(tmp_path / "r.jsonl", lines)], None)
    assert graded.protocol == "geneval, rewritten prompts"
    assert not graded.warnings
    # Two protocols in one file are refused.
    lines[0]["filename"] = str(tmp_path / "official.png")
    path = write_lines(tmp_path / "r.jsonl", lines)
    code, _, error = evaluate(capsys, "geneval", "--graded", path)
    assert code == 2
    assert "sampled for geneval and geneval, rewritten prompts" in error
    # BAGEL's folders contain the rewritten lines.
    path = write_lines(tmp_path / "r.jsonl", geneval_lines("A realistic {tag} stands."))
    assert READERS["geneval"]([path], None).protocol == "geneval, rewritten prompts"
    # Without the images the protocol is unknown, which is a warning.
    graded = READERS["geneval"]([write_lines(tmp_path / "r.jsonl", geneval_lines())], None)
    assert graded.protocol == "geneval"
    assert "not readable here" in graded.warnings[0]


def test_missing_geneval_images_give_a_warning(tmp_path, capsys):
    counts = {"single_object": 80, "counting": 79}
    path = write_lines(tmp_path / "r.jsonl", geneval_lines(num_prompts=counts))
    code, lines, _ = evaluate(capsys, "geneval", "--graded", path, "--model", "iomm-l-512")
    printed = "\n".join(lines)
    assert code == 0
    assert "636 of 2,212 entries" in printed
    assert "warning: entries are missing" in printed
    assert "no image of two_object, colors, position, color_attr" in printed


def test_dpg_is_the_mean_of_its_images_in_percent(tmp_path, capsys):
    path = tmp_path / "r.txt"
    path.write_text(dpg_text())
    graded = READERS["dpg"]([str(path)], None)
    assert graded.overall == pytest.approx(80)
    assert graded.categories == {
        "entity": 91.5,
        "other": 50.0,
        "entity - whole": 91.5,
        "other - text": 50.0,
    }
    assert (graded.num_graded, graded.warnings) == (1065, ())
    _, lines, _ = evaluate(capsys, "dpg", "--graded", str(path), "--model", "iomm-b-512")
    assert lines[2].split() == ["overall", "80.00", "82.95", "-2.95"]


@pytest.mark.parametrize(
    "options, warning",
    [
        ({"num_images": 1064}, "entries are missing"),
        ({"summary": False}, "the grader was interrupted"),
        ({"reported": 81.0}, "reports 81.00, but its images have a mean of 80.00"),
        ({"crops": 1}, "1 images per prompt, but the benchmark has 4"),
    ],
)
def test_partial_dpg_files_give_a_warning(options, warning, tmp_path, capsys):
    (tmp_path / "r.txt").write_text(dpg_text(**options))
    code, lines, _ = evaluate(capsys, "dpg", "--graded", str(tmp_path / "r.txt"))
    assert code == 0
    assert sum(line.startswith("warning: ") for line in lines) == 1
    assert warning in "\n".join(lines)


@pytest.mark.parametrize("protocol", ["verified", "legacy"])
def test_wise_is_the_weighted_mean_of_its_categories(protocol, tmp_path):
    lines = list(wise_lines(protocol))
    paths = [
        write_lines(tmp_path / f"{i}.jsonl", part)
        for i, part in enumerate((lines[:400], lines[400:650], lines[650:]))
    ]
    graded = READERS["wise"](paths, None)
    assert graded.protocol == f"wise {protocol}"
    last = {"verified": (400, 520, 640, 760, 880, 1000), "legacy": (400, 567, 700, 800, 900, 1000)}
    weights = {"verified": (0.4, *[0.12] * 5), "legacy": (0.4, 0.167, 0.133, 0.1, 0.1, 0.1)}
    expected, start = [], 1
    for end in last[protocol]:
        odd = sum(n % 2 for n in range(start, end + 1)) / (end + 1 - start)
        # (0.7 x 2 or 0 + 0.2 x 1 + 0.1 x 2) / 2
        expected.append(odd if protocol == "verified" else 0.7 * odd + 0.2)
        start = end + 1
    assert list(graded.categories.values()) == pytest.approx(expected)
    assert graded.overall == pytest.approx(
        sum(weight * score for weight, score in zip(weights[protocol], expected, strict=True))
    )


def test_wise_compares_only_the_legacy_protocol(tmp_path, capsys):
    legacy = write_lines(tmp_path / "legacy.jsonl", wise_lines("legacy"))
    _, lines, _ = evaluate(capsys, "wise", "--graded", legacy, "--model", "iomm-b-512")
    assert lines[2].split() == ["overall", "0.550", "0.55", "+0.000"]
    assert not any(line.startswith("warning") for line in lines)
    verified = write_lines(tmp_path / "verified.jsonl", wise_lines("verified"))
    _, lines, _ = evaluate(capsys, "wise", "--graded", verified, "--model", "iomm-b-512")
    assert "difference" not in lines[1]
    assert "warning: the paper is older than WISE_Verified" in "\n".join(lines)
    code, _, error = evaluate(capsys, "wise", "--graded", legacy, verified)
    assert code == 2
    assert "Give those of one." in error
    _, lines, _ = evaluate(capsys, "wise", "--graded", legacy, "--model", "iomm-xl-512")
    assert "warning: the paper has no wise score of iomm-xl-512" in lines


def test_incomplete_wise_files_have_no_overall_score(tmp_path, capsys):
    path = write_lines(tmp_path / "r.jsonl", wise_lines("legacy", range(1, 401)))
    code, lines, _ = evaluate(capsys, "wise", "--graded", path, "--model", "iomm-b-512")
    assert code == 0
    assert lines[2].split() == ["overall", "-", "0.55"]
    assert lines[3].split() == ["culture", "0.550"]
    assert "warning: the official script prints an overall score only for all 1000" in "\n".join(
        lines
    )


def answer(*scores: int) -> str:
    """Return an answer of ImgEdit's grading model."""
    return "Brief reasoning: it fits: well.\n" + "\n".join(f"Item {n}: {n}" for n in scores)


def test_imgedit_follows_both_steps(tmp_path, capsys):
    result = {"1": answer(5, 5, 4), "2": answer(1, 2, 2), "3": answer(3, 3, 3)}
    (tmp_path / "result.json").write_text(json.dumps(result))
    edits = {"1": {"edit_type": "add"}, "2": {"edit_type": "add"}, "3": {"edit_type": "style"}}
    (tmp_path / "basic_edit.json").write_text(json.dumps(edits))
    average = {"1": 4.67, "2": 1.67, "3": 3.0}
    (tmp_path / "average_score.json").write_text(json.dumps(average))
    types = {"style": 3.0, "add": 3.17}
    (tmp_path / "typescore.json").write_text(json.dumps(types))
    prompts = [str(tmp_path / "basic_edit.json")]
    for name in ("result", "average_score"):
        graded = READERS["imgedit"]([str(tmp_path / f"{name}.json")], prompts)
        assert graded.overall == pytest.approx((4.67 + 1.67 + 3) / 3)
        assert graded.categories == types
        assert list(graded.categories) == ["add", "style"]
        assert graded.num_graded == 3
    both = [str(tmp_path / f"{name}.json") for name in ("average_score", "typescore")]
    assert READERS["imgedit"](both, None).categories == types
    _, lines, _ = evaluate(capsys, "imgedit", "--graded", both[0])
    assert lines[1].split() == ["yours", "image", "pre-training", "pair", "pre-training"]
    assert lines[2].split() == ["overall", "3.11", "2.82", "2.61"]
    assert "give --prompts basic_edit.json" in "\n".join(lines)


def test_imgedit_weights_the_types_by_their_images(tmp_path):
    types = {name: 1.0 + i / 4 for i, name in enumerate(IMGEDIT_TYPES)}
    (tmp_path / "typescore.json").write_text(json.dumps(types))
    graded = READERS["imgedit"]([str(tmp_path / "typescore.json")], None)
    total = sum(types[name] * count for name, count in IMGEDIT_TYPES.items())
    assert sum(IMGEDIT_TYPES.values()) == LAYOUTS["imgedit"].num_prompts
    assert graded.overall == pytest.approx(total / 737)
    assert graded.num_graded is None


def test_imgedit_omits_errors(tmp_path, capsys):
    result = {"1": answer(5, 5, 5), "2": {"error": "timeout"}, "3": "I cannot help with that."}
    (tmp_path / "result.json").write_text(json.dumps(result))
    code, lines, _ = evaluate(capsys, "imgedit", "--graded", str(tmp_path / "result.json"))
    assert code == 0
    assert lines[0] == "imgedit: 1 of 737 entries"
    assert "warning: 2 entries contain no score and are omitted" in "\n".join(lines)


def test_gedit_is_the_mean_of_geometric_means_over_the_tasks(tmp_path, capsys):
    path = write_csv(tmp_path / "m_combined_gpt_score.csv", gedit_rows())
    graded = READERS["gedit"]([path], None)
    expected = [(2 + 3) / 2 * math.sqrt(i) for i in range(11)]
    assert graded.protocol == "gedit en"
    assert graded.overall == pytest.approx(sum(expected) / 11)
    assert graded.categories["tone_transfer"] == pytest.approx(expected[-1])
    assert graded.categories["semantic consistency"] == pytest.approx(6.5)
    assert graded.categories["perceptual quality"] == pytest.approx(5)
    code, lines, _ = evaluate(capsys, "gedit", "--graded", path)
    assert code == 0
    assert lines[1].split() == ["yours"]
    assert "warning: the paper has no gedit score" in lines
    path = write_csv(tmp_path / "part.csv", gedit_rows(GEDIT_TASKS[:2], "cn"))
    graded = READERS["gedit"]([path], None)
    assert (graded.protocol, graded.overall) == ("gedit cn", None)


@pytest.mark.parametrize(
    "bench, text, message",
    [
        ("geneval", "", "is empty"),
        ("geneval", "Summary\n=======\n", ":1 is not JSON"),
        ("geneval", '{"tag": "counting", "correct": true}\n[]\n', ":2: expected an object"),
        ("geneval", '{"tag": "counting", "correct": 1}\n', "with a text 'tag' and a 'correct'"),
        ("dpg", "", "contains no images"),
        ("dpg", dpg_text(0), "contains no images"),
        ("dpg", "a.png, (0, 0, 512, 512), is it red?, yes\n", "_detail.txt"),
        ("dpg", "a.png, 1.0, 1.0\na.png, 1.0, 1.0\n", ":2: duplicate image a.png"),
        ("wise", '{"prompt_id": 1, "score": 2}\n', "'score' must be 0 or 1, got 2"),
        ("wise", '{"prompt_id": 1, "score": "1"}\n', "'score' must be 0 or 1, got '1'"),
        ("wise", '{"prompt_id": 1, "consistency": 2}\n', "'realism' must be a number from 0 to 2"),
        ("wise", '{"prompt_id": 0, "score": 1}\n', "prompt_id must be an integer from 1 to 1000"),
        ("wise", '{"prompt_id": 7, "score": 1}\n' * 2, ":2: duplicate prompt 7"),
        ("imgedit", "[]", "expected a JSON object"),
        ("imgedit", '{"1": [3]}', "expected the grading model's answer or a number"),
        ("imgedit", '{"add": "x"}', "the score of add must be a number, got 'x'"),
        ("gedit", "a,b\n1,2\n", "expected edited_image, sementics_score and quality_score"),
        ("gedit", "", "expected rows of one language, got 0"),
    ],
)
def test_invalid_result_files_give_a_one_line_error(bench, text, message, tmp_path, capsys):
    (tmp_path / "results").write_text(text)
    code, lines, error = evaluate(capsys, bench, "--graded", str(tmp_path / "results"))
    assert (code, lines) == (2, [])
    assert error.startswith("iomm: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--graded", "nowhere"], "--graded nowhere cannot be read"),
        (["--graded", "a", "b"], "got 2 files, but this benchmark has one"),
        (["--graded", "a", "--model", "iomm-m"], "--model must be one of iomm-b-512, iomm-b-1024"),
        (["--graded", "a", "--check"], "--graded only reads result files"),
        (["--graded", "a", "--out", "b"], "--graded only reads result files"),
        (["--graded", "a", "--run", "b"], "--graded only reads result files"),
        (["--model", "iomm-b-512"], "--model is an option of --graded"),
        ([], "the following arguments are required: --prompts, --out."),
        (["--prompts", "a"], "the following arguments are required: --out."),
        (["--out", "a"], "the following arguments are required: --prompts."),
    ],
)
def test_invalid_arguments_give_a_one_line_error(arguments, message, capsys):
    code, _, error = evaluate(capsys, "dpg", *arguments)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_benchmarks_have_the_official_numbers_of_prompts():
    counts = {bench: layout.num_prompts for bench, layout in LAYOUTS.items()}
    assert counts == {"geneval": 553, "dpg": 1065, "wise": 1000, "imgedit": 737, "gedit": 606}
    assert sum(GENEVAL_PROMPTS.values()) == 553
