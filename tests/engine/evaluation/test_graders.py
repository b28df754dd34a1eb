"""Folders for the official graders: complete, resumed, checked, the same from one rank and from two."""

import csv
import json
import shutil

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
    return str(
        pipe.save_pretrained(tmp_path_factory.mktemp("export"), mllm=mllm_folder, vae="pixel:4")
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small prompt files in the benchmarks' own formats -> {benchmark: arguments}, {benchmark: picture names}."""
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


def draw(bench, run, arguments, out, *more):
    return main(
        [
            "evaluate",
            bench,
            "--run",
            run,
            *arguments[bench],
            "--out",
            str(out),
            "--steps",
            "1",
            "--guidance",
            "2",
            *more,
        ]
    )


def look(bench, arguments, out, *more):
    return main(["evaluate", bench, *arguments[bench], "--out", str(out), "--check", *more])


@pytest.fixture(scope="module")
def drawn(run, files, tmp_path_factory):
    """All four folders, from one rank in batches of 8."""
    root = tmp_path_factory.mktemp("drawn")
    for bench in BENCHES:
        assert draw(bench, run, files[0], root / bench, "--batch", "8") == 0
    return root


def copy(drawn, bench, tmp_path):
    return shutil.copytree(drawn / bench, tmp_path / bench)


@pytest.mark.parametrize("bench", BENCHES)
def test_a_folder_holds_what_its_grader_wants_and_nothing_else(drawn, files, bench, capsys):
    found = pictures(drawn / bench)
    assert set(found) == files[1][bench]
    side = 2 * SIDE if bench == "dpg" else SIDE
    assert all(picture.shape == (side, side, 3) for picture in found.values())
    others = sorted(
        p.relative_to(drawn / bench).as_posix()
        for p in (drawn / bench).rglob("*")
        if p.is_file() and p.suffix != ".png"
    )
    assert others == (
        ["00000/metadata.jsonl", "00001/metadata.jsonl"] if bench == "geneval" else []
    )
    # Nothing left beside it.
    assert sorted(p.name for p in drawn.iterdir()) == sorted(BENCHES)
    assert look(bench, files[0], drawn / bench) == 0
    assert f"the benchmark has {LAYOUTS[bench].num_prompts} prompts" in capsys.readouterr().out


def test_geneval_gets_its_own_lines_back(drawn, files):
    lines = open(files[0]["geneval"][1], "rb").readlines()
    assert [(drawn / f"geneval/0000{n}/metadata.jsonl").read_bytes() for n in range(2)] == lines
    found = list(pictures(drawn / "geneval").values())
    assert all((a != b).any() for i, a in enumerate(found) for b in found[:i])


def test_a_picture_says_what_it_is(drawn):
    assert Image.open(drawn / "wise/641.png").text == {
        "benchmark": "wise verified",
        "run": "runs/tiny",
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
def test_two_ranks_and_another_batch_draw_the_same(drawn, run, files, bench, tmp_path, capsys):
    out = tmp_path / bench
    assert draw(bench, run, files[0], out, "--batch", "3", "--rank", "1", "--ranks", "2") == 0
    assert "files of other ranks are still to come" in capsys.readouterr().out
    assert look(bench, files[0], out) == 1
    assert draw(bench, run, files[0], out, "--batch", "3", "--rank", "0", "--ranks", "2") == 0
    said = capsys.readouterr().out
    assert "rank 0 of 2: its share of" in said and "complete\n" in said and "next, in" in said
    assert look(bench, files[0], out) == 0
    ours, theirs = pictures(out), pictures(drawn / bench)
    assert set(ours) == set(theirs)
    assert all(np.abs(ours[name] - theirs[name]).max() <= 1 for name in ours)


def test_a_quarter_of_a_grid_is_the_picture_drawn_alone(drawn, run, files):
    pipe = Pipeline.from_pretrained(run, device="cpu")
    text = next(
        item for item in read_items(LAYOUTS["dpg"], files[0]["dpg"][1:], None)[0] if item.id == "0"
    ).prompt
    grid = pictures(drawn / "dpg")["0.png"]
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
def test_resuming_draws_what_is_missing_or_damaged_and_keeps_the_rest(
    drawn, run, files, bench, tmp_path, capsys
):
    out = copy(drawn, bench, tmp_path)
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
    assert look(bench, files[0], out) == 1
    said = capsys.readouterr().out
    assert (
        f"missing: {gone.relative_to(out)}" in said
        and f"malformed: {cut.relative_to(out)}: no intact PNG" in said
    )
    assert f"malformed: {flipped.relative_to(out)}: no intact PNG" in said
    assert ("metadata.jsonl: not the line of the prompt file" in said) == (bench == "geneval")
    assert draw(bench, run, files[0], out) == 0
    assert all(p.stat().st_mtime_ns == time for p, time in kept.items())
    ours, theirs = pictures(out), pictures(drawn / bench)
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
def test_what_does_not_belong_there_is_named(drawn, files, bench, name, accepted, tmp_path, capsys):
    out = copy(drawn, bench, tmp_path)
    if name.endswith("/"):
        (out / name).mkdir()
    else:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"x")
    capsys.readouterr()
    assert look(bench, files[0], out) == (0 if accepted else 1)
    assert (f"extra: {name.rstrip('/')}\n" in capsys.readouterr().out) == (not accepted)


def test_nothing_is_drawn_into_a_folder_of_something_else(run, files, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("x")
    assert draw("dpg", run, files[0], tmp_path) == 2
    assert "holds what does not belong to dpg, notes.txt first" in capsys.readouterr().err
    assert draw("dpg", run, files[0], tmp_path / "notes.txt") == 2
    assert "cannot be written" in capsys.readouterr().err and [
        p.name for p in tmp_path.iterdir()
    ] == ["notes.txt"]


def test_wrong_sizes_modes_and_mixed_settings_are_named(drawn, run, files, tmp_path, capsys):
    out = copy(drawn, "dpg", tmp_path)
    Image.new("RGB", (2 * SIDE, SIDE)).save(out / "0.png")
    assert look("dpg", files[0], out) == 1
    assert "malformed: 0.png: 32 x 16 px is no 2R x 2R grid" in capsys.readouterr().out
    Image.new("L", (2 * SIDE, 2 * SIDE)).save(out / "0.png")
    assert look("dpg", files[0], out) == 1
    assert "malformed: 0.png: mode L, wanted RGB" in capsys.readouterr().out
    Image.new("RGB", (4 * SIDE, 4 * SIDE)).save(out / "0.png")
    assert look("dpg", files[0], out) == 1
    assert "malformed: 0.png: 32x32 px an image, wanted 16x16" in capsys.readouterr().out
    out = copy(drawn, "wise", tmp_path)
    assert look("wise", files[0], out, "--size", "32") == 1
    assert "malformed: 1.png: 16x16 px an image, wanted 32x32" in capsys.readouterr().out
    (out / "1.png").unlink()
    assert draw("wise", run, files[0], out, "--seed", "1") == 2
    said = capsys.readouterr().err
    assert "was drawn otherwise (seed 0 instead of 1)" in said and not (out / "1.png").exists()
    other = tmp_path / "other"
    assert draw("wise", run, files[0], other, "--seed", "1") == 0
    (other / "1.png").rename(out / "1.png")
    (out / "641.png").write_bytes((drawn / "wise/2.png").read_bytes())
    capsys.readouterr()
    assert look("wise", files[0], out) == 1
    said = capsys.readouterr().out
    assert "malformed: 1.png: drawn otherwise than most (seed 1 instead of 0)" in said
    assert "malformed: 641.png: drawn from another prompt" in said


def test_a_prompt_without_pictures_and_an_empty_folder(drawn, files, tmp_path, capsys):
    arguments = {"geneval": ["--prompts", str(tmp_path / "three.jsonl")]}
    (tmp_path / "three.jsonl").write_text(
        open(files[0]["geneval"][1]).read() + '{"prompt": "a photo of a cat"}\n'
    )
    assert look("geneval", arguments, drawn / "geneval") == 1
    said = capsys.readouterr().out
    assert (
        "missing: 00002/metadata.jsonl\nmissing: 00002/samples/0000.png" in said
        and "5 files missing" in said
    )
    assert look("geneval", arguments, tmp_path / "nothing") == 1
    assert "missing: and 5 more" in capsys.readouterr().out


@pytest.mark.parametrize(
    "bench, traps",
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
        ("wise", ["bash eval_qwen.sh", "Protocol: verified", "say which"]),
        ("imgedit", ["--edit_json", "the --basic_edit of its readme is refused"]),
    ],
)
def test_the_next_command_and_its_traps(drawn, files, bench, traps, capsys):
    assert look(bench, files[0], drawn / bench) == 0
    said = capsys.readouterr().out
    assert all(trap in said for trap in [str(drawn / bench), *traps])


def test_wise_protocols_are_told_apart(tmp_path):
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


def test_dpg_reads_its_csv_as_its_folder(files, tmp_path):
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
        ("geneval", '{"tag": "x"}\n', "wanted an object with a text 'prompt'"),
        (
            "dpg",
            "item,text\n1,x\n",
            "wanted a folder of <item_id>.txt, or a csv with the columns item_id and text",
        ),
        ("dpg", "item_id,text\na.b,x\n", "'a.b' cannot be a file name"),
        ("dpg", "item_id,text\na,x\na,y\n", "item a has two texts"),
        (
            "wise",
            '[{"Prompt": "x", "prompt_id": 1001}]',
            "prompt_id must be from 1 to 1000, got 1001",
        ),
        (
            "wise",
            '[{"Prompt": "x", "prompt_id": 1}, {"Prompt": "y", "prompt_id": 1}]',
            "1 stands there twice",
        ),
        ("wise", "[]", "no prompt in it"),
        ("imgedit", '{"../x": {"id": "a.jpg", "prompt": "x"}}', "'../x' cannot be a file name"),
        ("imgedit", '["x"]', "wanted an object with a text 'prompt'"),
    ],
)
def test_bad_prompt_files_are_one_clear_line(bench, text, message, tmp_path, capsys):
    path = tmp_path / "prompts"
    path.write_text(text)
    assert look(bench, {bench: ["--prompts", str(path)]}, tmp_path / "out") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("iomm: ") and message in said[0]


@pytest.mark.parametrize(
    "bench, more, message",
    [
        ("wise", ["--num", "2"], "wise has 1 images a prompt"),
        ("dpg", ["--size", "16x32"], "dpg cuts its grids into squares"),
        ("dpg", ["--size", "30"], "image size must be a positive multiple of 4 px"),
        ("dpg", ["--size", "0x"], "--size must be a side in pixels"),
        ("wise", ["--rank", "2", "--ranks", "2"], "--rank must be from 0 to --ranks - 1"),
        (
            "imgedit",
            ["--origin-img-root", "nowhere"],
            "--origin-img-root nowhere: 3 of 3 pictures are not there",
        ),
    ],
)
def test_bad_requests_draw_nothing(run, files, bench, more, message, tmp_path, capsys):
    assert draw(bench, run, files[0], tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_more_pictures_a_prompt_and_no_run(run, files, tmp_path, capsys):
    out = tmp_path / "geneval"
    assert draw("geneval", run, files[0], out, "--num", "1") == 0
    assert sorted(pictures(out)) == ["00000/samples/0000.png", "00001/samples/0000.png"]
    assert look("geneval", files[0], out) == 1 and look("geneval", files[0], out, "--num", "1") == 0
    assert main(["evaluate", "geneval", *files[0]["geneval"], "--out", str(out)]) == 2
    assert "--run is missing" in capsys.readouterr().err
