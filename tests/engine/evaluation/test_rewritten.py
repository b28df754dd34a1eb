"""GenEval with rewritten prompts, in BAGEL's format: the official lines with another prompt."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from iomm.engine.cli import main
from iomm.engine.evaluation.layouts import LAYOUTS, next_step


def write_lines(path: Path, entries: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def test_rewritten_prompts_are_a_separate_protocol(tmp_path, capsys):
    official = [
        {"tag": "counting", "include": [{"class": c, "count": 2}], "prompt": f"a photo of two {c}s"}
        for c in ("cow", "bench")
    ]
    rewritten = [{**line, "prompt": f"A field.\n\n{line['prompt']}."} for line in official]
    own = write_lines(tmp_path / "own.jsonl", official)
    long = write_lines(tmp_path / "long.jsonl", rewritten)
    layout = LAYOUTS["geneval"]

    def read(*paths: str) -> tuple[list[str], list[bytes], str]:
        items, name = layout.read(list(paths), None)
        return [item.prompt for item in items], [item.files[0][1] for item in items], name

    prompts, metadata, name = read(own, long)
    assert (prompts, name) == (
        [line["prompt"] for line in rewritten],
        "geneval, rewritten prompts",
    )
    # The grader receives the official lines, byte for byte.
    assert metadata == (tmp_path / "own.jsonl").read_bytes().splitlines(keepends=True)
    assert read(own)[::2] == ([line["prompt"] for line in official], "geneval")
    assert read(long)[2] == "geneval, other prompts"

    check = ("--out", str(tmp_path / "out"), "--check")
    assert main(["evaluate", "geneval", "--prompts", own, long, *check]) == 1
    assert "2 prompts of geneval, rewritten prompts in" in capsys.readouterr().out
    swapped = [rewritten[1], rewritten[0]]
    for paths, message in [
        ((long, own), "Give the official evaluation_metadata.jsonl first"),
        (
            (own, write_lines(tmp_path / "short.jsonl", rewritten[:1])),
            "expected 2 lines, one for each official prompt, got 1",
        ),
        (
            (own, write_lines(tmp_path / "swapped.jsonl", swapped)),
            "'include' differs from the official",
        ),
        ((own, long, long), "got 3 files, but this benchmark has at most 2"),
    ]:
        assert main(["evaluate", "geneval", "--prompts", *paths, *check]) == 2
        assert message in capsys.readouterr().err


def test_next_step_of_geneval_names_the_protocol(tmp_path):
    for name, printed in [
        ("geneval", "GenEval with its official prompts"),
        ("geneval, rewritten prompts", "GenEval with rewritten prompts"),
    ]:
        text = next_step(name, tmp_path, 512, ["evaluation_metadata.jsonl"], None)
        assert printed in text
        assert text.endswith(f"iomm evaluate geneval --graded {tmp_path}-results.jsonl")
