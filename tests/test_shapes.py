"""The shapes world as a judge: pictures read from pixels, edits, grades of a model, and the table of recipes."""

import importlib.util
import io
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launches import PIXELS
from PIL import Image, ImageDraw

from benchmarks.recipes import BUDGETS, EXPERIMENTS, Runs, interval, judged, main, paper_table, show, summed
from benchmarks.report import short
from iomm.config import InputError
from iomm.engine.config import load_config
from iomm.engine.data.index import build as build_index
from iomm.engine.data.shards import Shards
from iomm.engine.data.source import ImageSource
from iomm.engine.parts import build_model
from iomm.engine.shapes.grade import GUIDANCE, WAYS, ceiling, describe, grade, overall
from iomm.engine.shapes.mllm import TASKS, WEIGHTS, accuracies, metadata, train, vit_pixels
from iomm.engine.shapes.score import look, parse, score
from iomm.engine.shapes.world import COLOURS, KINDS, OPPOSITE, PLACES, SHAPES, draw, edit, held_out, scene, write_world
from iomm.internvl import Captioner, load_mllm
from iomm.mllm import IMAGE_STD

ROOT = Path(__file__).resolve().parents[1]


def rendered(i, split, kind, px):
    """A scene and its picture as a data set holds it: JPEG of 64 px, resized."""
    picture, file = scene(11, i, split, kind), io.BytesIO()
    draw(picture, 64).save(file, "JPEG", quality=92, subsampling=0)
    return picture, Image.open(file).convert("RGB").resize((px, px), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("px, num", [(64, 12), (32, 12), pytest.param(64, 400, marks=pytest.mark.slow)])
def test_real_pictures_fit_their_captions_and_no_others(px, num):
    pictures = [rendered(i, ("train", "test")[i % 2], kind, px) for kind in KINDS for i in range(num)]
    for kind in KINDS:
        right = [score(image, picture.caption)["fits"] for picture, image in pictures if picture.kind == kind]
        assert sum(right) >= 0.99 * len(right) - (num < 100), kind            # of 12, one may be wrong
    captions = [picture.caption for picture, _ in pictures]
    random.Random(0).shuffle(captions)
    others = [(image, caption) for (picture, image), caption in zip(pictures, captions) if caption != picture.caption]
    assert sum(score(image, caption)["fits"] for image, caption in others) <= 0.01 * len(others)


def test_at_16_px_real_pictures_are_the_ceiling():
    """Of single shapes all are found right, of several nine in ten: there are 3.7 px across the smallest."""
    table = ceiling(16, per_kind=12)
    assert set(table) == set(KINDS) and table["single_object"]["fits"] == table["colors"]["fits"] == 1
    assert 0.9 <= overall(table) < 1 and 1 == overall(ceiling(64, per_kind=2))


def test_each_part_of_a_caption_is_judged_by_itself():
    canvas = Image.new("RGB", (64, 64), (140, 140, 140))
    pen = ImageDraw.Draw(canvas)
    pen.ellipse((6, 24, 26, 44), fill=(230, 10, 10))
    pen.rectangle((40, 26, 54, 40), fill=(20, 40, 230))
    verdict = {"fits": True, "number": True, "colours": True, "shapes": True, "relation": True}
    assert score(canvas, "a red circle left of a blue square") == verdict
    assert score(canvas, "a red circle right of a blue square") == {**verdict, "fits": False, "relation": False}
    assert score(canvas, "a blue circle and a red square") == {**verdict, "fits": False, "relation": None}
    assert score(canvas, "a red circle above a green square") == {**verdict, "fits": False, "colours": False, "relation": False}
    assert score(canvas, "a red circle") == {"fits": False, "number": False, "colours": False, "shapes": False, "relation": None}
    pen.polygon(((32, 4), (60, 4), (32, 10)), fill=(20, 150, 40))              # green, and no shape of the world
    assert {(piece.colour, piece.shape) for piece in look(canvas)} == {("red", "circle"), ("blue", "square"), ("green", None)}
    noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    assert not any(score(noise, f"a {colour} {shape}")["fits"] for colour in COLOURS for shape in SHAPES)


GLUED = [("a red circle", "blue", (33, 26, 45, 38)), ("a red square", "blue", "circle over its corner"),
         ("a red square", "green", (35, 21, 53, 39)),              # 80 % of its area
         ("a white circle", "black", (33, 26, 45, 38)), ("a red circle", "orange", (19, 25, 31, 37))]     # the last on top of it


@pytest.mark.parametrize("caption, colour, where", GLUED)
def test_a_colour_that_touches_another_is_an_object_of_its_own(caption, colour, where):
    rgb = {"red": (230, 10, 10), "blue": (20, 40, 230), "green": (20, 150, 40), "white": (250, 250, 250), "black": (10, 10, 10),
           "orange": (240, 115, 10)}
    canvas = Image.new("RGB", (256, 256), (140, 140, 140))           # reduced by 4, as the world is drawn
    pen, (_, its_colour, its_shape) = ImageDraw.Draw(canvas), caption.split()
    {"circle": pen.ellipse, "square": pen.rectangle}[its_shape]((56, 80, 136, 160), fill=rgb[its_colour])
    assert score(canvas.reduce(4), caption)["fits"]
    if where == "circle over its corner":
        pen.ellipse((112, 136, 160, 184), fill=rgb[colour])
    else:
        pen.rectangle(tuple(4 * side for side in where), fill=rgb[colour])
    verdict = score(canvas.reduce(4), caption)
    assert not verdict["fits"] and not verdict["number"] and not verdict["colours"]
    assert {piece.colour for piece in look(canvas.reduce(4))} == {its_colour, colour}


@pytest.mark.parametrize("caption", ["", "a red cat", "two red circle", "a red circle beside a blue square", "an red circle and"])
def test_captions_of_another_world_are_refused(caption):
    with pytest.raises(InputError, match="not a caption of the shapes world"):
        parse(caption)


def test_edits_ask_for_what_training_may_show():
    for i in range(300):
        picture = scene(3, i, "train", "single_object")
        instruction, caption = edit(picture, 3, i)
        objects, relation = parse(caption)
        before = picture.shapes[0]
        if relation is None:
            assert instruction == f"make it {objects[0][0]}" and objects[0][1] == before.shape and objects[0][0] != before.colour
            assert not held_out(*objects[0], "alone")
        else:
            assert instruction.startswith("add ") and objects[1] == (before.colour, before.shape)
            assert relation in PLACES.values() and not held_out(*objects[0], relation)
            assert not held_out(*objects[1], OPPOSITE[relation])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A fresh one, what starts at zero filled: it draws neither its noise alone nor the same from every condition."""
    config = load_config(PIXELS, [f"run.dir={tmp_path_factory.mktemp('grade')}/run", "precision=fp32"])
    model, random = build_model(config, "cpu"), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3, generator=random)
    return model


@pytest.mark.parametrize("way", WAYS)
def test_a_grade_is_a_function_of_model_and_seed(model, way):
    def levels(**how):
        table, pictures = grade(model, 32, way, per_kind=1, steps=1, **how)
        return table, torch.stack([torch.from_numpy(np.array(picture)).int() for picture in pictures])
    (table, drawn), (again, in_fours) = levels(), levels(batch=4)
    assert {kind: row["pictures"] for kind, row in table.items()} == ({"make": 3, "add": 3} if way == "edit" else {
        "single_object": 1, "two_object": 1, "counting": 1, "colors": 1, "position": 1, "color_attr": 1})
    assert all(row.keys() == {"fits", "number", "colours", "shapes", "relation", "pictures"} for row in table.values())
    assert drawn.shape == (6, 32, 32, 3) and drawn.float().std() > 20
    assert again == table and (in_fours - drawn).abs().max() <= 1         # sums of another order may round to the next level
    for how in ({"seed": 1}, {"split": "test"}):                          # another noise; of the same noise another condition
        assert ((levels(**how)[1] - drawn).abs().amax(dim=(1, 2, 3)) > 1).all(), how
    assert "fits" in describe(table) and overall(table) == sum(row["fits"] * row["pictures"] for row in table.values()) / len(drawn)


@pytest.mark.parametrize("size_px", [16, 64])
def test_the_vit_is_shown_what_the_loader_of_a_run_shows_it(tmp_path, size_px):
    shards = Shards(build_index(write_world(tmp_path / "world", num_images=6, seed=4), tmp_path / "index", progress=False))
    batch, = ImageSource(shards, seed=0, global_batch=6, micro_batch=6, rank=0, world_size=1, size_px=size_px, vit_px=32,
                         device="cpu", num_steps=1)
    shown = torch.stack([vit_pixels(draw(scene(4, k)), 32, size_px) for k in batch.entry_B.tolist()])
    levels_BCHW = (shown - batch.vit_pixels_BCHW).abs() * 255 * torch.tensor(IMAGE_STD)[:, None, None]
    assert levels_BCHW.max() < 1.01          # here 0; another JPEG decoder may be a level off. Sharp pictures are 70 off at 16 px


def test_a_tiny_mllm_is_trained_and_loaded(tmp_path):
    found = train(tmp_path / "mllm", steps=2, batch=16, lr=1e-3, num_images=40, seed=0, num_judged=20, say=lambda *_, **__: None)
    assert set(found) == {f"{task}, {split}" for task in TASKS for split in ("train", "test")}
    mllm = load_mllm(str(tmp_path / "mllm"), dtype=torch.float32)
    assert mllm.num_image_tokens == 16 and (tmp_path / "mllm/model.safetensors").stat().st_size < 6e6


def test_the_shipped_mllm_answers_as_its_head_says():
    """New scenes; within three standard errors of the shares in the head, which were found on other ones."""
    head, num = metadata(WEIGHTS), 200
    said, legs = json.loads(head["accuracy"]), json.loads(head["legs"])
    assert (WEIGHTS / "model.safetensors").stat().st_size <= 6e6
    found = accuracies(Captioner(WEIGHTS), legs[-1]["seed"], legs[-1]["images"] + 2000, num)
    assert set(found) == set(said)
    for task, share in said.items():
        assert abs(found[task] - share) <= 3 * max(share * (1 - share), 1 / num)**0.5 / num**0.5, task


def test_intervals_are_students():
    assert interval([0.5]) == (0.5, None)
    mean, half = interval([0.1, 0.2, 0.3])
    assert mean == pytest.approx(0.2) and half == pytest.approx(4.303 * 0.1 / 3 ** 0.5)
    keys = ("fits", "number", "colours", "shapes")
    cells = {cell: summed([{7: {"text, train": dict.fromkeys(keys, share), "text, test": dict.fromkeys(keys, share / 2)}}
                           for share in (0.1, 0.2, 0.3)]) for cell in EXPERIMENTS["recipes"]}
    assert "0.200 +-0.248" in show("recipes", cells) and paper_table(cells).count("0.200 +-0.248") == 6
    assert paper_table(cells, split="test").count("0.100 +-0.124") == 6 and "unseen" in paper_table(cells, split="test")


def test_cells_share_the_runs_that_they_have_in_common(tmp_path):
    """Of one seed: stage 1 on images and on pairs, of 3 adapters, 6 ratios and 3 choices; stage 2 after each, once more with
    each of its own settings; and stage 1 of 4 adapters up to each quarter."""
    begun = []

    class Named(Runs):
        def train(self, stage, steps, settings, init=None, before=None):
            assert before is None or before in begun
            begun.append(self.dir(stage, steps, settings, init))
            return begun[-1]

        def scores(self, run_dir, ways, steps):
            return {f"{way}, train": {"fits": 0.5} for way in ways}
    runs = Named(tmp_path, BUDGETS["cpu-night"])
    found = {name: {cell: runs.cell(what, 0)[0] for cell, what in cells.items()} for name, cells in EXPERIMENTS.items()}
    assert len({run for run in begun if run.name.startswith("finetune")}) == 6 + 3 + 6 + 5 + 3
    assert len({run for run in begun if run.name.startswith("pretrain") and run.name.endswith("-400")}) == 2 + 3 + 6 + 3
    assert len({run for run in begun if run.name.startswith("pretrain")}) == 14 + 4 * 3
    assert list(found["adapter"]["rqa"].items())[2:4] == [(300, {"image, train": {"fits": 0.5}}), (400, {"image, train": {"fits": 0.5}})]
    assert all(set(points) == ({100, 200, 300, 400, 800} if name == "adapter" else {800}) for name in found for points in found[name].values())


@pytest.fixture
def played(monkeypatch):
    """recipes.main() without training or drawing: what is launched leaves a run, and every picture is half right. Says at which
    commit it runs, how often it drew, and which error drawing ends in."""
    world = SimpleNamespace(commit="a" * 40, drawn=0, error=None)

    def launch(*arguments, said):
        said.write(b"done")
        return 0

    def draw_and_judge(model, size_px, way, *, split, per_kind, steps, guidance):
        world.drawn += 1
        if world.error is not None and world.drawn == 1:
            raise world.error
        share = {"train": 0.5, "test": 0.25}[split]
        return {"colors": {**dict.fromkeys(("fits", "number", "colours", "shapes"), share), "pictures": 4}}, []

    def newest(folder, say):
        return folder if (folder.parent / "said.txt").exists() else None
    for name, value in {"launch": launch, "grade": draw_and_judge, "machine": lambda: {"date": "2026-01-02", "commit": world.commit},
                        "limit_of_the_judge": lambda size_px: {"size_px": 16, "per_kind": 1, "fits": {"colors": 1.0}},
                        "checkpoint.newest": newest, "checkpoint.step_of": lambda folder: 10**9, "pyplot": lambda: None,
                        "parts.load_run": lambda *_, **__: (load_config(PIXELS), None, None)}.items():
        monkeypatch.setattr(f"benchmarks.recipes.{name}", value)
    return world


def results(tmp_path, *arguments, ends=0):
    """{file name: content} after one recipes.main()."""
    assert main(["--budget", "cpu-smoke", "--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), *arguments]) == ends
    return {path.name: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}


def test_results_of_other_steps_or_seeds_are_files_of_their_own(tmp_path, played):
    own, = results(tmp_path).items()
    assert own[0] == "recipes-cpu-smoke-2026-01-02.json"
    for given, name in ((("--steps", "3"), "3-steps-"), (("--seeds", "2"), "2-seeds-"), (("--steps", "3", "--seeds", "2"), "3-steps-2-seeds-"),
                        (("--steps", "2", "--seeds", "1"), "")):
        found = results(tmp_path, *given)
        assert f"recipes-cpu-smoke-{name}2026-01-02.json" in found and found[own[0]] == own[1]
    assert len(found) == 4


@pytest.mark.parametrize("option", ["--seeds", "--steps"])
def test_no_seeds_and_no_steps_are_mistakes(tmp_path, played, capsys, option):
    with pytest.raises(SystemExit, match="2"):
        results(tmp_path, option, "0")
    assert "must be a whole number above 0, got 0" in capsys.readouterr().err and not (tmp_path / "results").exists()


def test_unseen_combinations_are_quoted(tmp_path, played):
    (_, found), = results(tmp_path).items()
    rows = {what.rpartition(": ")[2]: figure for what, figure in found["rows"].items() if ", recipes, " in what}
    assert set(rows) == {"number and colours right", "all of the caption right", "number and colours right, unseen combinations"}
    assert rows["number and colours right, unseen combinations"].count(" 0.250") == rows["number and colours right"].count(" 0.500") == 6


def test_rows_name_the_commits_of_their_runs(tmp_path, played):
    def commits():
        (_, found), = results(tmp_path).items()
        return {facts["commit"] for facts in found["of"].values()}
    assert commits() == {"a" * 40}
    played.commit = "b" * 40                                   # a summary written later says what it sums up
    assert commits() == {"a" * 40}
    sorted((tmp_path / "runs/cpu-smoke").glob("finetune-*"))[0].joinpath("machine.json").unlink()      # of a run that does not say
    assert {*commits().pop().split(", ")} == {"a" * 40, "b" * 40}
    assert short(f"{'a' * 40}, {'b' * 40} and changes") == "aaaaaaaaa, bbbbbbbbb+" and short("c" * 40) == "ccccccccc"


@pytest.mark.parametrize("error, said", [(InputError("no such run"), "image: no such run"), (RuntimeError("out of memory"),
                                                                                            "image: RuntimeError('out of memory')")])
def test_a_cell_that_fails_is_said_and_the_others_go_on(tmp_path, played, capsys, error, said):
    played.error = error
    (_, found), = results(tmp_path, ends=1).items()
    assert set(found["experiments"]["recipes"]) == set(EXPERIMENTS["recipes"]) - {"pair -> image"}
    words = capsys.readouterr().err
    assert f"iomm: recipes, pair -> {said}" in words and ("Traceback" in words) == isinstance(error, RuntimeError)
    (_, found), = results(tmp_path).items()
    assert set(found["experiments"]["recipes"]) == set(EXPERIMENTS["recipes"])


def test_kept_scores_are_whole_and_of_the_settings_asked_for(tmp_path, played, monkeypatch):
    runs = Runs(tmp_path, BUDGETS["cpu-night"])
    path, wanted = tmp_path / "scores-400.json", {f"text, {split}": dict.fromkeys(("fits", "number", "colours", "shapes"), share)
                                                  for split, share in (("train", 0.5), ("test", 0.25))}

    def drawn(runs):
        before = played.drawn
        assert runs.scores(tmp_path, ("text",), 400) == wanted and not list(tmp_path.glob(".*"))
        return played.drawn - before
    path.write_text(json.dumps(wanted)[:40])                   # a kill in the middle of a write that was none of ours
    assert drawn(runs) == 2 and drawn(runs) == 0
    kept = path.read_text()
    path.write_text(json.dumps(wanted))                        # of the first judge, which did not say so
    assert drawn(runs) == 2 and path.read_text() == kept
    for changed in (replace(runs.budget, per_kind=8), replace(runs.budget, draw_steps=10)):
        assert drawn(Runs(tmp_path, changed)) == 2
    for name, value in (("score.VERSION", 99), ("world.VERSION", 99), ("GUIDANCE", {**GUIDANCE, "text": 3.0})):
        monkeypatch.setattr(f"benchmarks.recipes.{name}", value)
        assert drawn(runs) == 2 and drawn(runs) == 0
    kept = path.read_text()
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception, match="killed"):
        runs.scores(tmp_path, ("image",), 400)
    assert path.read_text() == kept                            # what was there is there until the new is whole


@pytest.mark.slow
def test_the_smoke_budget_runs_and_goes_on(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/recipes.py"), "--budget", "cpu-smoke", "--out", str(tmp_path / "runs"),
               "--results", str(tmp_path)]
    subprocess.run(command, check=True, timeout=900)
    result, = tmp_path.glob("recipes-cpu-smoke-*.json")
    first = json.loads(result.read_text())["experiments"]
    assert set(first["recipes"]) == set(EXPERIMENTS["recipes"])
    assert result.with_suffix(".png").exists() or importlib.util.find_spec("matplotlib") is None
    runs = list((tmp_path / "runs/cpu-smoke").glob("*/config.yaml"))
    assert len(runs) == 2 + 6                                                  # stage 1 is shared by the cells
    subprocess.run(command, check=True, timeout=60)                            # nothing is run again
    assert json.loads(result.read_text())["experiments"] == first
    subprocess.run([*command, "editing"], check=True, timeout=120)             # of a model that is there: only drawn and scored
    both = json.loads(result.read_text())
    assert both["experiments"].keys() == {"recipes", "editing"}
    assert set(both["rows"]) - set(both["of"]) == set(judged(both["real"]))        # every row of an experiment says what measured it
    assert len(list((tmp_path / "runs/cpu-smoke").glob("*/config.yaml"))) == len(runs)
