"""Folders for the official graders: complete, resumed, checked, the same on one and two ranks."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_models import build

from iomm.engine.cli import main
from iomm.engine.evaluation.folder import image_number
from iomm.engine.evaluation.layouts import LAYOUTS, next_step, read_items
from iomm.pipeline import Pipeline

SIDE = 16
# GEdit-Bench, whose folder also holds the source images, has its own file: test_gedit.py.
BENCHES = ("geneval", "dpg", "wise", "imgedit")


@pytest.fixture(scope="module")
def run(mllm, mllm_folder, tmp_path_factory):
    pipe = Pipeline(build(mllm), SIDE, origin={"run": "runs/tiny", "step": "7", "weights": "ema"})
    folder = pipe.save_pretrained(tmp_path_factory.mktemp("export"), mllm="shapes", vae="pixel:4")
    # A folder of an earlier version names the path of its MLLM.
    card = json.loads((folder / "iomm.json").read_text()) | {"mllm": str(mllm_folder)}
    (folder / "iomm.json").write_text(json.dumps(card))
    return str(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small prompt files in the benchmarks' formats.

    Returns {benchmark: arguments} and {benchmark: picture names}.
    """
    root = tmp_path_factory.mktemp("prompts")
    (root / "evaluation_metadata.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "tag": "single_object",
                    "include": [{"class": c, "count": 1}],
                    "prompt": f"a photo of a {c}",
                }
            )
            + "\n"
            for c in ("bench", "cow")
        )
    )
    (root / "prompts").mkdir()
    for name in ("partiprompts97", "0", "drawtext27"):
        (root / "prompts" / f"{name}.txt").write_text(f'a long text {name}, "quoted"\n')
    for part, numbers in {
        "a": [(1, "Cultural knowledge"), (2, "Cultural knowledge")],
        "b": [(641, "Biology"), (642, "Biology")],
    }.items():
        (root / f"{part}.json").write_text(
            json.dumps(
                [
                    {
                        "Prompt": f"the food of day {n}",
                        "Explanation": "x",
                        "Category": c,
                        "Subcategory": "y",
                        "prompt_id": n,
                    }
                    for n, c in numbers
                ]
            )
        )
    (root / "pictures/animal").mkdir(parents=True)
    edits = {}
    for i, key in enumerate(("1082", "673", "281")):
        Image.new("RGB", (20 + i, 30), (80 * i, 100, 40)).save(root / f"pictures/animal/{i}.jpg")
        edits[key] = {"id": f"animal/{i}.jpg", "prompt": f"make it {i}", "edit_type": "adjust"}
    (root / "basic_edit.json").write_text(json.dumps(edits))
    arguments = {
        "geneval": ["--prompts", str(root / "evaluation_metadata.jsonl")],
        "dpg": ["--prompts", str(root / "prompts")],
        "wise": ["--prompts", str(root / "a.json"), str(root / "b.json")],
        "imgedit": [
            "--prompts",
            str(root / "basic_edit.json"),
            "--origin-img-root",
            str(root / "pictures"),
        ],
    }
    names = {
        "geneval": {f"0000{n}/samples/000{k}.png" for n in range(2) for k in range(4)},
        "dpg": {"partiprompts97.png", "0.png", "drawtext27.png"},
        "wise": {"1.png", "2.png", "641.png", "642.png"},
        "imgedit": {"1082.png", "673.png", "281.png"},
    }
    return arguments, names


def pictures(folder):
    return {
        p.relative_to(folder).as_posix(): np.asarray(Image.open(p)).astype(int)
        for p in sorted(folder.rglob("*.png"))
    }


def fill(bench, run, arguments, out, *more):
    """Run `iomm evaluate` with the arguments of a benchmark, of which `more` replaces the last."""
    own = arguments[bench]
    if "--origin-img-root" in more:
        own = own[: own.index("--origin-img-root")]
    return main(
        [
            "evaluate",
            bench,
            "--run",
            run,
            *own,
            "--out",
            str(out),
            "--steps",
            "1",
            "--guidance",
            "2",
            *more,
        ]
    )


def check(bench, arguments, out, *more):
    return main(["evaluate", bench, *arguments[bench], "--out", str(out), "--check", *more])


@pytest.fixture(scope="module")
def filled(run, files, tmp_path_factory):
    """All four folders, filled by one rank in batches of 8."""
    root = tmp_path_factory.mktemp("filled")
    for bench in BENCHES:
        assert fill(bench, run, files[0], root / bench, "--batch", "8") == 0
    return root


def copy(filled, bench, tmp_path):
    return shutil.copytree(filled / bench, tmp_path / bench)


@pytest.mark.parametrize("bench", BENCHES)
def test_folder_holds_exactly_the_expected_files(filled, files, bench, capsys):
    found = pictures(filled / bench)
    assert set(found) == files[1][bench]
    side = 2 * SIDE if bench == "dpg" else SIDE
    assert all(picture.shape == (side, side, 3) for picture in found.values())
    others = sorted(
        p.relative_to(filled / bench).as_posix()
        for p in (filled / bench).rglob("*")
        if p.is_file() and p.suffix != ".png"
    )
    assert others == (
        ["00000/metadata.jsonl", "00001/metadata.jsonl"] if bench == "geneval" else []
    )
    # No temporary file is left next to it.
    assert sorted(p.name for p in filled.iterdir()) == sorted(BENCHES)
    assert check(bench, files[0], filled / bench) == 0
    assert f"the benchmark has {LAYOUTS[bench].num_prompts} prompts" in capsys.readouterr().out


def test_geneval_folders_hold_their_prompt_lines(filled, files):
    lines = Path(files[0]["geneval"][1]).read_bytes().splitlines(keepends=True)
    assert [(filled / f"geneval/0000{n}/metadata.jsonl").read_bytes() for n in range(2)] == lines
    found = list(pictures(filled / "geneval").values())
    assert all((a != b).any() for i, a in enumerate(found) for b in found[:i])


def test_png_records_origin_and_settings(filled):
    assert Image.open(filled / "wise/641.png").text == {
        "benchmark": "wise verified",
        "run": "tiny",
        "step": "7",
        "weights": "ema",
        "size": "16x16",
        "steps": "1",
        "seed": "0",
        "guidance": "2",
        "shift": "1.0",
        "item": "641",
        "prompt": "the food of day 641",
    }


@pytest.mark.parametrize("bench", BENCHES)
def test_folder_is_independent_of_ranks_and_batch(filled, run, files, bench, tmp_path, capsys):
    out = tmp_path / bench
    assert fill(bench, run, files[0], out, "--batch", "3", "--rank", "1", "--ranks", "2") == 0
    assert "files of other ranks are still missing" in capsys.readouterr().out
    assert check(bench, files[0], out) == 1
    assert fill(bench, run, files[0], out, "--batch", "3", "--rank", "0", "--ranks", "2") == 0
    output = capsys.readouterr().out
    assert "rank 0 of 2, " in output and "complete\n" in output and "Next: in" in output
    assert check(bench, files[0], out) == 0
    ours, theirs = pictures(out), pictures(filled / bench)
    assert set(ours) == set(theirs)
    assert all(np.abs(ours[name] - theirs[name]).max() <= 1 for name in ours)


def test_grid_quarter_equals_the_image_sampled_alone(filled, run, files):
    pipe = Pipeline.from_pretrained(run, device="cpu")
    text = next(
        item for item in read_items(LAYOUTS["dpg"], files[0]["dpg"][1:], None)[0] if item.id == "0"
    ).prompt
    grid = pictures(filled / "dpg")["0.png"]
    for k, (row, column) in enumerate([(0, 0), (0, SIDE), (SIDE, 0), (SIDE, SIDE)]):
        alone = np.asarray(
            pipe(text, steps=1, guidance=2.0, numbers=[image_number("0", k)])[0]
        ).astype(int)
        assert np.abs(alone - grid[row : row + SIDE, column : column + SIDE]).max() <= 1


def test_image_numbers_are_fixed():
    assert (image_number("00000", 0), image_number("1082", 3)) == (
        6345119748487236046,
        1803652048396911819,
    )
    numbers = {image_number(f"{item:05d}", k) for item in range(553) for k in range(4)}
    assert len(numbers) == 553 * 4 and all(0 <= n < 2**63 for n in numbers)


@pytest.mark.parametrize("bench", BENCHES)
def test_resume_samples_only_missing_or_damaged_files(filled, run, files, bench, tmp_path, capsys):
    out = copy(filled, bench, tmp_path)
    gone, cut, flipped = sorted(p for p in out.rglob("*.png"))[:3]
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-20])
    data = bytearray(flipped.read_bytes())
    data[-25] ^= 1
    flipped.write_bytes(data)
    if bench == "geneval":
        (out / "00000/metadata.jsonl").write_text("{}")
    kept = {p: p.stat().st_mtime_ns for p in out.rglob("*.png") if p not in (cut, flipped)}
    capsys.readouterr()
    assert check(bench, files[0], out) == 1
    output = capsys.readouterr().out
    assert (
        f"missing: {gone.relative_to(out)}" in output
        and f"malformed: {cut.relative_to(out)}: not an intact PNG" in output
    )
    assert f"malformed: {flipped.relative_to(out)}: not an intact PNG" in output
    assert ("metadata.jsonl: differs from the line of the prompt file" in output) == (
        bench == "geneval"
    )
    assert fill(bench, run, files[0], out) == 0
    assert all(p.stat().st_mtime_ns == time for p, time in kept.items())
    ours, theirs = pictures(out), pictures(filled / bench)
    assert set(ours) == set(theirs) and all(
        np.abs(ours[name] - theirs[name]).max() <= 1 for name in ours
    )


@pytest.mark.parametrize(
    "bench, name, accepted",
    [
        ("geneval", "00002/", False),
        ("geneval", "00000/samples/0004.png", False),
        ("geneval", "00000/grid.png", True),
        ("dpg", "dpg-bench_20260101_results.txt", False),
        ("dpg", "Thumbs.db", False),
        ("wise", "0.png", False),
        ("wise", "Results-qwen35/scores.jsonl", True),
        ("imgedit", "result.json", True),
        ("imgedit", "1082.jpg", False),
    ],
)
def test_extra_files_are_reported(filled, files, bench, name, accepted, tmp_path, capsys):
    out = copy(filled, bench, tmp_path)
    if name.endswith("/"):
        (out / name).mkdir()
    else:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"x")
    capsys.readouterr()
    assert check(bench, files[0], out) == (0 if accepted else 1)
    assert (f"extra: {name.rstrip('/')}\n" in capsys.readouterr().out) == (not accepted)


def test_foreign_folder_is_refused_and_unchanged(run, files, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("x")
    assert fill("dpg", run, files[0], tmp_path) == 2
    assert (
        "contains files that do not belong to dpg, the first is notes.txt."
        in capsys.readouterr().err
    )
    assert fill("dpg", run, files[0], tmp_path / "notes.txt") == 2
    assert "cannot be written" in capsys.readouterr().err and [
        p.name for p in tmp_path.iterdir()
    ] == ["notes.txt"]


def test_wrong_sizes_modes_and_settings_are_reported(filled, run, files, tmp_path, capsys):
    out = copy(filled, "dpg", tmp_path)
    Image.new("RGB", (2 * SIDE, SIDE)).save(out / "0.png")
    assert check("dpg", files[0], out) == 1
    assert "malformed: 0.png: 32 x 16 px is not a 2R x 2R grid" in capsys.readouterr().out
    Image.new("L", (2 * SIDE, 2 * SIDE)).save(out / "0.png")
    assert check("dpg", files[0], out) == 1
    assert "malformed: 0.png: mode L, expected RGB" in capsys.readouterr().out
    Image.new("RGB", (4 * SIDE, 4 * SIDE)).save(out / "0.png")
    assert check("dpg", files[0], out) == 1
    assert "malformed: 0.png: 32x32 px per image, expected 16x16" in capsys.readouterr().out
    out = copy(filled, "wise", tmp_path)
    assert check("wise", files[0], out, "--size", "32") == 1
    assert "malformed: 1.png: 16x16 px per image, expected 32x32" in capsys.readouterr().out
    (out / "1.png").unlink()
    assert fill("wise", run, files[0], out, "--seed", "1") == 2
    output = capsys.readouterr().err
    assert (
        "was sampled with other settings (seed 0 instead of 1)" in output
        and not (out / "1.png").exists()
    )
    other = tmp_path / "other"
    assert fill("wise", run, files[0], other, "--seed", "1") == 0
    (other / "1.png").rename(out / "1.png")
    (out / "641.png").write_bytes((filled / "wise/2.png").read_bytes())
    capsys.readouterr()
    assert check("wise", files[0], out) == 1
    output = capsys.readouterr().out
    assert "malformed: 1.png: sampled with other settings than most (seed 1 instead of 0)" in output
    assert "malformed: 641.png: sampled from another prompt" in output


def test_missing_files_are_counted(filled, files, tmp_path, capsys):
    arguments = {"geneval": ["--prompts", str(tmp_path / "three.jsonl")]}
    (tmp_path / "three.jsonl").write_text(
        Path(files[0]["geneval"][1]).read_text() + '{"prompt": "a photo of a cat"}\n'
    )
    assert check("geneval", arguments, filled / "geneval") == 1
    output = capsys.readouterr().out
    assert (
        "missing: 00002/metadata.jsonl\nmissing: 00002/samples/0000.png" in output
        and "5 files missing" in output
    )
    assert check("geneval", arguments, tmp_path / "nothing") == 1
    assert "missing: and 5 more" in capsys.readouterr().out


@pytest.mark.parametrize(
    "bench, notes",
    [
        (
            "geneval",
            ["python evaluation/evaluate_images.py", "-results.jsonl", "left out silently"],
        ),
        (
            "dpg",
            [
                "PYTHONHASHSEED=0 accelerate launch",
                "--resolution 16 --pic-num 4",
                "--res-path",
                "-results.txt",
            ],
        ),
        ("wise", ["bash eval_qwen.sh", "Protocol: verified", "report which one you used"]),
        ("imgedit", ["--edit_json", "It rejects the --basic_edit of its readme"]),
    ],
)
def test_next_step_names_the_command_and_its_pitfalls(filled, files, bench, notes, capsys):
    assert check(bench, files[0], filled / bench) == 0
    output = capsys.readouterr().out
    assert all(note in output for note in [str(filled / bench), *notes])


def test_wise_protocol_is_identified(tmp_path):
    def name(file, category, number=641):
        path = tmp_path / file
        path.write_text(json.dumps([{"Prompt": "x", "Category": category, "prompt_id": number}]))
        return read_items(LAYOUTS["wise"], [str(path)], None)[1]

    for file, facts, protocol, command in [
        ("merge.json", ("Biology",), "wise verified", "eval_qwen.sh"),
        ("spatio-temporal_reasoning.json", ("Space",), "wise legacy", "data/${part}.json"),
        (
            "spatio-temporal_reasoning_rewrite.json",
            ("Space",),
            "wise legacy, rewritten prompts",
            "data/${part}_rewrite.json",
        ),
        (
            "culture.json",
            ("Cultural knowledge", 3),
            "wise of unknown protocol",
            "these files lack prompt 641",
        ),
    ]:
        assert name(file, *facts) == protocol
        assert command in next_step(protocol, tmp_path, 512, [file], None)


def test_dpg_csv_and_folder_give_equal_items(files, tmp_path):
    items, _ = read_items(LAYOUTS["dpg"], files[0]["dpg"][1:], None)
    with open(tmp_path / "dpg_bench.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["item_id", "text", "keywords", "proposition_id"])
        writer.writerows(
            [item.id, item.prompt, "", question] for item in items for question in (1, 2)
        )
    assert read_items(LAYOUTS["dpg"], [str(tmp_path / "dpg_bench.csv")], None)[0] == items


@pytest.mark.parametrize(
    "bench, text, message",
    [
        ("geneval", '{"prompt": "x"}\n\n{"prompt": "y"}\n', "prompts:2 is not JSON"),
        ("geneval", '{"tag": "x"}\n', "expected an object with a text 'prompt'"),
        (
            "dpg",
            "item,text\n1,x\n",
            "expected a folder of <item_id>.txt, or a csv with the columns item_id and text",
        ),
        ("dpg", "item_id,text\na.b,x\n", "'a.b' cannot be a file name"),
        ("dpg", "item_id,text\na,x\na,y\n", "item a has two different texts"),
        (
            "wise",
            '[{"Prompt": "x", "prompt_id": 1001}]',
            "prompt_id must be an integer from 1 to 1000, got 1001",
        ),
        (
            "wise",
            '[{"Prompt": "x", "prompt_id": 1}, {"Prompt": "y", "prompt_id": 1}]',
            "duplicate prompt id '1'",
        ),
        ("wise", "[]", "contains no prompts"),
        ("imgedit", '{"../x": {"id": "a.jpg", "prompt": "x"}}', "'../x' cannot be a file name"),
        ("imgedit", '["x"]', "expected an object with a text 'prompt'"),
    ],
)
def test_invalid_prompt_files_give_a_one_line_error(bench, text, message, tmp_path, capsys):
    path = tmp_path / "prompts"
    path.write_text(text)
    assert check(bench, {bench: ["--prompts", str(path)]}, tmp_path / "out") == 2
    output = capsys.readouterr().err.splitlines()
    assert len(output) == 1 and output[0].startswith("iomm: ") and message in output[0]


@pytest.mark.parametrize(
    "bench, more, message",
    [
        ("wise", ["--num", "2"], "wise requires 1 image(s) per prompt"),
        ("dpg", ["--size", "16x32"], "dpg cuts its grids into squares"),
        ("dpg", ["--size", "30"], "image size must be a positive multiple of 4 px"),
        ("dpg", ["--size", "0x"], "--size must be a side in pixels"),
        ("wise", ["--rank", "2", "--ranks", "2"], "--rank must be from 0 to --ranks - 1"),
        (
            "imgedit",
            ["--origin-img-root", "nowhere"],
            "--origin-img-root nowhere: 3 of 3 pictures are missing",
        ),
    ],
)
def test_invalid_settings_write_nothing(run, files, bench, more, message, tmp_path, capsys):
    assert fill(bench, run, files[0], tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_prompts_longer_than_the_context_are_cut_and_reported(run, files, tmp_path, capsys):
    """One prompt of 300 words among three does not end the evaluation."""
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for name, text in {"a": "a dog", "b": "a dog and a cat " * 60, "c": "a cat"}.items():
        (prompts / f"{name}.txt").write_text(text)
    out = tmp_path / "dpg"
    command = ["evaluate", "dpg", "--run", run, "--prompts", str(prompts), "--out", str(out)]
    for _ in range(2):
        assert main([*command, "--steps", "1", "--guidance", "2"]) == 0
        printed = capsys.readouterr().out
        assert "1 of 3 prompts exceed the MLLM's context and are cut: b\n" in printed
    assert sorted(p.stem for p in out.glob("*.png")) == ["a", "b", "c"]
    with Image.open(out / "b.png") as image:
        assert image.text["prompt"] == ("a dog and a cat " * 60).strip()


def test_num_changes_geneval_and_run_is_required(run, files, tmp_path, capsys):
    out = tmp_path / "geneval"
    assert fill("geneval", run, files[0], out, "--num", "1") == 0
    assert sorted(pictures(out)) == ["00000/samples/0000.png", "00001/samples/0000.png"]
    assert (
        check("geneval", files[0], out) == 1 and check("geneval", files[0], out, "--num", "1") == 0
    )
    assert main(["evaluate", "geneval", *files[0]["geneval"], "--out", str(out)]) == 2
    assert "--run is missing" in capsys.readouterr().err
