"""The report of a run, also if parts of the run are missing, damaged or hostile."""

import base64
import io
import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from iomm.engine.cli import main
from iomm.engine.evaluation.sample import save_grid
from iomm.engine.observe import report
from iomm.engine.observe.metrics import Metrics
from iomm.engine.observe.report import DASH

# Side of an image; a sheet shows it twice as large.
SIDE = 48
# Side of a cell of a sheet, with the gap.
CELL = 2 * SIDE + 6


def colour(step, i, row="drawn"):
    """Return the colour of image i of a step. All of them differ."""
    return {
        "original": (200, 10 * i, 0),
        "visible": (100, 10 * i, 0),
        "drawn": (step % 251, 10 * i, 90),
    }[row]


def make_grid(folder, step, *, masked, labels, size=SIDE):
    names = ("original", "visible", "drawn") if masked else ("drawn",)
    rows = {
        name: [Image.new("RGB", (size, size), colour(step, i, name)) for i in range(len(labels))]
        for name in names
    }
    save_grid(
        rows,
        labels,
        folder / f"samples/evaluate-{step:08d}.png",
        {"step": step, "prompt": "\n".join(labels)},
    )


def make_run(
    folder, *, steps=30, every=10, masked=True, num=10, labels=None, settings=None, rows=None
):
    """Write a run folder. settings: keys of its config in addition to train.steps."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "loss": 1.0 + 1.0 / step,
            "grad_norm": 0.5,
            "lr": 1e-4,
            "images_per_s": 20.0 + step % 3,
            "mfu": None,
            "memory_gib": 1.25,
            "time_s": {"generator": 0.3, "backward": 0.6, "data": 0.1},
            "skipped_steps": 2,
            "skipped_samples": 7,
            "cut_captions": 1234,
            "gpu_hours": 0.01 * step,
            "gpu_hours_left": 0.0,
        }
        if every and step % every == 0:
            row |= {
                "evaluation_s": 2.0,
                "heldout_loss": {"image": {"mean": 1.5 - 0.01 * step, "by_time": [1.0, 2.0]}},
                "scores": {"fits": step / 100, "number": 0.5, "colours": 0.6, "shapes": 0.7},
                "metrics": {"sharpness": 3.25},
            }
            make_grid(
                folder,
                step,
                masked=masked,
                labels=labels
                or [
                    f"masked image {i}" if masked else f"a prompt of number {i}" for i in range(num)
                ],
            )
        lines.append(json.dumps(row) + "\n")
    (folder / "log.jsonl").write_text("".join(lines if rows is None else rows(lines)))
    config = {
        "run": {"dir": str(folder)},
        "train": {"data": "image", "steps": steps},
        **(settings or {}),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "machine.json").write_text(
        json.dumps({"device": "A CPU, 2 cores", "gpu": None, "torch": "2.13.0+test", "ranks": 1})
    )
    (folder / "scores.json").write_text(
        json.dumps(
            {
                "image": {"counting": {"fits": 0.25, "pictures": 8}},
                "real": {"counting": {"fits": 1.0, "pictures": 8}},
            }
        )
    )
    (folder / "logs").mkdir()
    warning = "2026-01-01 00:00:02 /x/y.py:12: UserWarning: not writable\n"
    (folder / "logs/rank-00000.txt").write_text(
        "2026-01-01 00:00:00 rank 0 of 1\n"
        "2026-01-01 00:00:01 [2026-01-01 00:00:01,966] [WARNING] [a.py:1] no GPU found\n"
        f"{warning}2026-01-01 00:00:02   warnings.warn('not writable')\n"
    )
    (folder / "logs/rank-00001.txt").write_text(
        f"{warning}2026-01-01 00:00:03 [rank1]:[W101 00:00:03.5 c.cpp:1] slow\nstep 3: no warning\n"
    )
    return folder


class Page(HTMLParser):
    """Tags with their attributes, and the text outside <style>."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.inside = [], [], None
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_data(self, data):
        if self.inside != "style":
            self.texts.append(data)

    def handle_endtag(self, tag):
        self.inside = None

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def images(self):
        return [
            Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))
            for image in self.all("img")
        ]


def assert_self_contained(page):
    """Check that the page has no script, no link and nothing that a browser would fetch."""
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {
        tag for tag, _ in page.tags
    }
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("data:image/png;base64,", "#")), value
            assert name.startswith("data") or "://" not in (value or ""), (name, value)
            assert "url(" not in (value or "") or "url(#" in value
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_page_shows_the_whole_run_in_one_file(tmp_path):
    run = make_run(tmp_path / "demo", settings={"optim": {"lr": 0.25}})
    path = report.write_run(run)
    page = Page(path)
    assert path == run / "report.html"
    assert_self_contained(page)
    final = np.mean([1.0 + 1.0 / step for step in range(11, 31)])
    for words in (
        f"demo {DASH} IOMM run report",
        "finished · trains on images · A CPU, 2 cores",
        "30 of 30 steps",
        f"{final:.4f} loss, last 20 steps",
        "1.2000 held-out loss, images",
        "30% samples that match",
        "21.0 images/s, median",
        "1.25 GiB peak memory",
        "0.300 rank-hours",
        "2 skipped steps",
        "7 skipped samples",
        "1,234 cut captions",
        "4 warnings",
        "3.25 sharpness",
        "counting 25% 100%",
        "backward 18.0 s 50.0%",
        "generator 9.0 s 25.0%",
        "evaluation 6.0 s 16.7%",
        "data 3.0 s 8.3%",
        "4 lines in logs/, 3 different",
        "2 /x/y.py:12: UserWarning: not writable",
        "lr: 0.25",
        "torch 2.13.0+test",
    ):
        assert words in page.text, words
    assert len(page.all("svg")) == 2
    for words in (
        "Loss",
        "training",
        "held-out images",
        "fits",
        "colours",
        "sharpness",
        "Images per second",
        "Gradient norm",
        "Learning rate",
        "Peak memory, GiB",
    ):
        # The curves have text, not paths.
        assert words in page.texts, words
    assert "Alignment loss" not in page.text and "damaged" not in page.text
    progress, *grids = page.images()
    assert (
        np.array_equal(np.asarray(progress), np.asarray(Image.open(run / "samples/progress.png")))
        and len(grids) == 3
    )
    assert Image.open(run / "samples/curves.png").size == (
        1380,
        362,
        # loss, scores and the hook's metric in a row
    )
    assert not list(run.rglob(".*.partial"))


def test_sheet_shows_the_same_images_over_steps(tmp_path):
    run = make_run(tmp_path / "run", steps=30, num=10)
    report.write_run(run)
    sheet = Image.open(run / "samples/progress.png")
    assert sheet.size == (5 * CELL - 6, 28 + 6 * CELL - 6)
    for row in range(6):
        shown = [
            sheet.getpixel((column * CELL + SIDE, 28 + row * CELL + SIDE)) for column in range(5)
        ]
        assert shown == [
            colour(0, row, "original"),
            colour(0, row, "visible"),
            *(colour(step, row) for step in (10, 20, 30)),
        ]


def test_sheet_has_prompts_and_includes_the_last_step(tmp_path):
    run = make_run(
        tmp_path / "run", steps=201, every=10, masked=False, labels=["a", "b", "a", "c", "b", "d"]
    )
    make_grid(run, 201, masked=False, labels=["a", "b", "a", "c", "b", "d"])
    sheet = report.progress(report.read_run(run))
    assert sheet.size == (176 + 8 * CELL - 6, 28 + 6 * CELL - 6)
    steps = [10, 40, 70, 100, 120, 150, 180, 201]
    shown = [sheet.getpixel((176 + column * CELL + SIDE, 28 + SIDE)) for column in range(8)]
    assert shown == [colour(step, 0) for step in steps]
    left = np.asarray(sheet.convert("L"))[28:, :170]
    assert all((left[row * CELL : row * CELL + 2 * SIDE] < 128).any() for row in range(6))
    assert report.few(["a", "b", "a (2)", "c", "b (2)", "d", "e", "f"]) == [
        "a",
        "b",
        "c",
        "d",
        "e",
        "f",
    ]
    assert report.few(["a", "a (2)", "b"]) == ["a", "a (2)", "b"]


def test_large_images_are_reduced_and_small_ones_enlarged(tmp_path):
    for size, wanted in ((16, 96), (64, 128), (100, 100), (512, 192)):
        run = make_run(tmp_path / str(size), steps=1, every=0)
        make_grid(run, 1, masked=False, labels=["x"], size=size)
        sheet = report.progress(report.read_run(run))
        assert sheet.size == (176 + wanted, 28 + wanted) and sheet.getpixel(
            (176 + wanted // 2, 28 + wanted // 2)
        ) == colour(1, 0)


def test_grid_round_trip(tmp_path):
    labels = [*(f"label {i}" for i in range(9)), "label 0"]
    make_grid(tmp_path, 7, masked=True, labels=labels)
    grid = report.read_grid(tmp_path / "samples/evaluate-00000007.png")
    assert list(grid) == ["original", "visible", "drawn"]
    for name, row in grid.items():
        assert list(row) == [*labels[:9], "label 0 (2)"]
        assert all(
            np.array_equal(np.asarray(picture), np.full((SIDE, SIDE, 3), colour(7, i, name)))
            for i, picture in enumerate(row.values())
        )


def test_leftovers_of_a_kill_and_a_resume_are_ignored(tmp_path):
    """A cut image, one of a later step, one of an older version, and a cut last line."""
    run = make_run(tmp_path / "run", steps=40, rows=lambda lines: [*lines[:33], lines[33][:40]])
    cut = run / "samples/evaluate-00000020.png"
    cut.write_bytes(cut.read_bytes()[:300])
    Image.new("RGB", (20, 20)).save(run / "samples/evaluate-00000005.png")
    (run / "samples/evaluate-wide.png").write_bytes(b"")
    assert list(report.read_run(run).grids) == [5, 10, 20, 30]
    report.write_run(run)
    page = Page(run / "report.html")
    assert (
        "33 of 40" in page.text
        and "not finished" in page.text
        and "1 damaged log lines" in page.text
    )
    assert Image.open(run / "samples/progress.png").size == (4 * CELL - 6, 28 + 6 * CELL - 6)


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 31, "loss": NaN, "time_s": [1], "heldout_loss": 3, "scores": {"fits": "x"}}',
        '{"step": 31, "time_s": {"data": NaN}, "metrics": null, "evaluation_s": "x"}',
        '{"step": 31, "loss": "1"}',
        '{"step": 31, "loss": 1' + 400 * "0" + "}",
    ],
)
def test_values_of_a_wrong_type_are_left_out(line, tmp_path):
    run = make_run(tmp_path / "run", rows=lambda lines: [*lines, line + "\n"])
    report.write_run(run)
    page = Page(run / "report.html")
    assert (
        "31 of 30" in page.text
        and "damaged" not in page.text
        and "30% samples that match" in page.text
    )


def test_damaged_rows_are_counted_and_left_out(tmp_path):
    damage = [
        "\n",
        "{\n",
        "[1, 2]\n",
        '"step"\n',
        "7\n",
        '{"loss": 1.0}\n',
        '{"step": "5"}\n',
        "\x00\xff\n",
        "[" * 5000 + "\n",
    ]
    run = make_run(tmp_path / "run", rows=lambda lines: [*lines[:10], *damage, *lines[10:]])
    for name in ("machine.json", "scores.json", "config.yaml"):
        (run / name).write_text("{" if name != "config.yaml" else "a: [")
    report.write_run(run)
    page = Page(run / "report.html")
    assert (
        "8 damaged log lines" in page.text and "30 of ?" in page.text and "Machine" not in page.text
    )
    assert_self_contained(page)


def test_run_without_steps_samples_or_config(tmp_path, capsys):
    empty, bare = (
        make_run(tmp_path / "empty", steps=1),
        make_run(tmp_path / "bare", steps=3, every=0),
    )
    for path in (
        empty / "log.jsonl",
        bare / "config.yaml",
        bare / "machine.json",
        bare / "scores.json",
    ):
        path.unlink()
    shutil.rmtree(bare / "logs")
    page = Page(report.write_run(empty))
    assert (
        "no step logged yet" in page.text
        and "Curves" not in page.text
        and "Samples" not in page.text
    )
    page = Page(report.write_run(bare))
    assert (
        "3 of ?" in page.text
        and "Curves" in page.text
        and "Config" not in page.text
        and not page.all("img")
    )
    assert not (bare / "samples/progress.png").exists() and (bare / "samples/curves.png").exists()
    (tmp_path / "none").mkdir()
    assert (
        main(["report", str(tmp_path / "none")]) == 2
        and "is not a run folder" in capsys.readouterr().err
    )
    assert (
        main(["report", str(bare), "--out", str(bare)]) == 2
        and "the report cannot be written" in capsys.readouterr().err
    )


def test_final_grid_is_shown_without_evaluations(tmp_path):
    run = make_run(tmp_path / "run", steps=3, every=0)
    make_grid(run, 3, masked=True, labels=["x"] * 4)
    (run / "samples/evaluate-00000003.png").rename(run / "samples/step-00000003-seed0.png")
    Image.new("RGB", (20, 20)).save(run / "samples/step-00000003-a-prompt-seed0.png")
    page = Page(report.write_run(run))
    assert (
        "sampled at the end" in page.text
        and len(page.images()) == 1
        and [d for d in page.all("details") if "open" in d]
    )


EVIL = "<script>alert('$x_1$')</script> &amp; \"quoted\""


def test_text_is_escaped(tmp_path):
    def rename(lines):
        return [
            line.replace("sharpness", json.dumps(EVIL)[1:-1]).replace(
                '"generator"', json.dumps(EVIL)
            )
            for line in lines
        ]

    run = make_run(
        tmp_path / "<b>$run$",
        masked=False,
        labels=[EVIL] * 3,
        settings={"data": {"shards": EVIL}},
        rows=rename,
    )
    (run / "machine.json").write_text(json.dumps({EVIL: EVIL}))
    (run / "scores.json").write_text(json.dumps({"image": {EVIL: {"fits": 0.5}}}))
    with open(run / "logs/rank-00000.txt", "a") as log:
        log.write(f"UserWarning: {EVIL}\n")
    other = make_run(
        tmp_path / "other", masked=False, labels=[EVIL] * 3, settings={"data": {"shards": "x"}}
    )
    for path in (report.write_run(run), report.write([run, other], tmp_path / "both.html")):
        page = Page(path)
        assert_self_contained(page)
        assert not page.all("b") or all("<" not in text for text in page.text.split("<b>$run$")[0])
        assert (
            page.text.count("alert('$x_1$')") >= 5 and EVIL in page.text and "<b>$run$" in page.text
        )


def test_several_runs_are_side_by_side(tmp_path, capsys):
    settings = [
        {"optim": {"lr": lr, "betas": [0.9, 0.95]}, "mask": {"ratio": 0.5}, "model": {"vae": None}}
        for lr in (0.001, 0.002)
    ]
    one, two = (
        make_run(tmp_path / f"runs/{name}", settings=its, steps=steps)
        for name, its, steps in zip(("one", "two"), settings, (20, 30), strict=True)
    )
    assert main(["report", str(one), str(two)]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "runs/report.html" and not (one / "report.html").exists()
    page = Page(path)
    assert_self_contained(page)
    for words in (
        f"one, two {DASH} IOMM run report",
        "2 runs side by side",
        "steps 20 of 20 30 of 30",
        "samples that match 20% 30%",
        "optim.lr 0.001 0.002",
        "train.steps 20 30",
        "Loss: training",
        "Loss: held-out images",
        "Scores: fits",
    ):
        assert words in page.text, words
    for words in ("betas", "mask.ratio", "model.vae", "run.dir", "resolved"):
        assert words not in page.text, words
    assert {"one", "two"} <= set(page.texts)
    sheet = page.images()[0]
    assert sheet.size == (3 * CELL - 6, 28 + 6 * CELL - 6)
    assert [sheet.getpixel((column * CELL + SIDE, 28 + CELL + SIDE)) for column in range(3)] == [
        colour(0, 1, "original"),
        colour(20, 1),
        colour(30, 1),
    ]
    # Side by side, over steps, and the last whole grid of each.
    assert len(page.images()) == 5
    out = tmp_path / "elsewhere/page.html"
    assert (
        main(["report", str(one), str(one), str(tmp_path / "runs/../runs/two"), "--out", str(out)])
        == 0
    )
    assert one.as_posix() in Page(out).text and "three" not in Page(out).text


def test_runs_with_other_images_are_not_side_by_side(tmp_path):
    runs = [
        report.read_run(make_run(tmp_path / "one")),
        report.read_run(make_run(tmp_path / "text", masked=False)),
        report.read_run(make_run(tmp_path / "bare", every=0)),
    ]
    assert report.side_by_side(runs) is None
    page = Page(report.write([run.dir for run in runs], tmp_path / "all.html"))
    assert len(page.images()) == 4 and "Samples" in page.text


def test_alignment_loss_has_its_own_panel(tmp_path):
    run = make_run(
        tmp_path / "run",
        rows=lambda lines: [
            line.replace('"loss": 1', '"align_loss": 0.5, "loss": 1') for line in lines
        ],
    )
    page = Page(report.write_run(run))
    assert "Alignment loss" in page.texts and "0.5000 alignment loss, last 20" in page.text


def test_legends_cover_neither_curves_nor_titles(tmp_path):
    pairs = '"heldout_loss": {"pair": {"mean": 1.7, "by_time": []}, '
    run = make_run(
        tmp_path / "run",
        rows=lambda lines: [line.replace('"heldout_loss": {', pairs) for line in lines],
    )
    whole = report.curves_of([report.read_run(run)])
    whole.draw_without_rendering()
    found = {axes.get_title("left"): axes for axes in whole.axes}
    assert [len(found[title].get_legend().texts) for title in ("Loss", "Scores")] == [3, 4]
    for axes, right in zip(whole.axes[:2], whole.axes[1:], strict=False):
        legend = axes.get_legend().get_window_extent()
        assert axes.get_window_extent().y1 <= legend.y0
        assert legend.y1 <= axes.title.get_window_extent().y0
        assert legend.x1 < right.get_tightbbox().x0


def test_long_curves_are_thinned_and_keep_their_mean():
    steps, values = np.arange(1, 10_001), np.random.default_rng(0).normal(size=10_000)
    x, y = report.thinned(steps, values)
    assert (
        len(x) == 400
        and x[0] == np.arange(1, 26).mean()
        and y.mean() == pytest.approx(values.mean())
    )
    assert (
        report.smoothed(np.ones(400)).tolist() == [1.0] * 400
        and len(report.thinned(steps[:7], values[:7])[0]) == 7
    )


def test_failing_report_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Metrics, "open_board", lambda *_: None)
    ranks = SimpleNamespace(size=1, device=torch.device("cpu"))
    metrics = Metrics(tmp_path, flops_per_image=1, global_batch=1, num_steps=1, ranks=ranks)
    # A log without a row yet.
    assert metrics.report() == tmp_path / "report.html"

    def fails(_):
        raise MemoryError("no room")

    monkeypatch.setattr(report, "write_run", fails)
    assert metrics.report() is None and metrics.report() is None
    assert caplog.messages == ["report.html cannot be written: no room; training continues"]
    metrics.close()


def test_import_loads_neither_matplotlib_nor_torch():
    code = (
        "import sys, iomm.engine.observe.report; "
        "assert not {'matplotlib', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_browser_renders_the_page(tmp_path):
    make_run(tmp_path / "run")
    path, shot = report.write_run(tmp_path / "run"), tmp_path / "page.png"
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1280,1400",
    ]
    dom = subprocess.run(
        [*command, "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    (tmp_path / "dom.html").write_text(dom)
    page = Page(tmp_path / "dom.html")
    assert (
        page.texts[page.texts.index(f"run {DASH} IOMM run report")]
        and "held-out images" in page.texts
        and len(page.all("svg")) == 2
    )
    subprocess.run(
        [*command, f"--screenshot={shot}", path.as_uri()],
        capture_output=True,
        timeout=120,
        check=True,
    )
    image = Image.open(shot).convert("RGB")
    seen = {pixel for _, pixel in image.getcolors(image.width * image.height)}
    assert (
        image.size == (1280, 1400) and {(9, 105, 218), (209, 87, 11)} <= seen
        # The first two colours of the curves.
    )
    assert colour(30, 1) in seen and colour(0, 1, "visible") in seen


# python tests/engine/observe/test_report.py FOLDER: writes a run folder to look at.
if __name__ == "__main__":
    print(report.write_run(make_run(Path(sys.argv[1]), steps=300, every=50)))
