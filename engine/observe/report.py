"""Write report.html, samples/progress.png and samples/curves.png of a run.

Everything is read from the files of the run folder: log.jsonl, config.yaml, machine.json,
scores.json, logs/ and the grids in samples/. Each may be missing, unfinished or damaged; parts that
cannot be read are left out. A report is one file without scripts that needs no network.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
import shlex
import textwrap
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageFont

from iomm.config import InputError
from iomm.engine.data.atomic import whole_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# {row: {label: image}}
Grid = dict[str, dict[str, Image.Image]]
# (label, name of the curve, colour, steps, values)
Line = tuple[str, str, str, np.ndarray, np.ndarray]

# The final loss is the mean over this number of steps.
LAST_STEPS = 20
# Largest number of points of a curve; of longer ones groups of steps are averaged.
MOST_POINTS = 400
# Largest number of evaluations in the progress sheet.
MOST_COLUMNS = 8
# Largest number of prompts or masked images in it.
MOST_ROWS = 6
# Smallest side of an image in a sheet.
CELL_PX = 96
# Largest side; larger images are reduced.
PHOTO_PX = 192
# Gap between the images of a grid, as in pipeline.image_grid.
PAD_PX = 2
# Gap between the images of a sheet.
GAP_PX = 6
# In place of a missing value.
DASH = "\N{EN DASH}"

STEP_KEYS = ("loss", "align_loss", "grad_norm", "lr", "images_per_s", "memory_gib", "mfu")
# Curves that need no smoothing.
STEADY = ("lr", "memory_gib")
# {curve: (panel, label)}. With several runs each label is a panel with a line per run.
CURVES = {
    "loss": ("Loss", "training"),
    "heldout_loss/image": ("Loss", "held-out images"),
    "heldout_loss/pair": ("Loss", "held-out pairs"),
    "scores/fits": ("Scores", "fits"),
    "scores/number": ("Scores", "number"),
    "scores/colours": ("Scores", "colours"),
    "scores/shapes": ("Scores", "shapes"),
    "align_loss": ("Alignment loss", ""),
}
HEALTH = {
    "images_per_s": ("Images per second", ""),
    "grad_norm": ("Gradient norm", ""),
    "lr": ("Learning rate", ""),
    "memory_gib": ("Peak memory, GiB", ""),
}
COLOURS = ("#0969da", "#d1570b", "#1a7f37", "#8250df", "#bf3989", "#9a6700", "#1b7c83", "#57606a")
LOOK = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#afb8c1",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": "#57606a",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "font.size": 10,
    "grid.color": "#eaeef2",
    "legend.borderaxespad": 0,
    "legend.borderpad": 0,
    "legend.columnspacing": 1,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handlelength": 1,
    "legend.handletextpad": 0.4,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "iomm",
    "text.color": "#1f2328",
    "text.parse_math": False,
    "xtick.color": "#57606a",
    "ytick.color": "#57606a",
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}
PARTS = {
    "data": "wait for the next batch",
    "vae": "image to latents, frozen",
    "vit": "image to image tokens, frozen",
    "prefix": "MLLM over prompt and visible image tokens, frozen, no gradient",
    "adapter": "queries cross-attend to the condition",
    "suffix": "MLLM over the queries, frozen, with gradient",
    "connector": "layers between MLLM and generator",
    "generator": "diffusion transformer, forward",
    "align": "comparison of a middle block with the ViT's tokens",
    "backward": "backward pass of generator, queries and adapter",
    "optimizer": "gradient exchange and update",
    "ema": "moving average of the weights",
    "checkpoint": "copy of the state before it is saved",
    "evaluation": "held-out loss and samples between steps",
    "report": "this page",
    "other": "everything else",
}
WAYS = {
    "image": "from masked images",
    "text": "from captions",
    "edit": "from edits",
    "real": "images of the dataset",
}
# Warnings of Python, of loggers (DeepSpeed, transformers), of torch below Python: "[W712
# 09:20:...".
WARNING = re.compile(r"\b\w*Warning: |\bWARNING\b|(^|:|\s)\[?W\d{3,4} \d\d:")
STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The readable content of a run folder.

    Attributes:
        curves: {name: (steps, values)}; steps rise and values are finite.
        last: the last row of log.jsonl, {} if there is none.
        time_s: seconds of all rows by part.
        num_damaged: unreadable rows of log.jsonl.
        config: by dotted key.
        scores: content of scores.json, {way: {kind: {question: share}}}.
        warnings: {text: number of lines in the logs of all ranks}.
        grids: grids of the evaluations by step, rising.
        final: the grid sampled at the end.
    """

    name: str
    dir: Path
    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    last: dict
    time_s: dict[str, float]
    num_damaged: int
    config: dict[str, object]
    config_text: str
    machine: dict
    scores: dict
    warnings: Counter
    grids: dict[int, Path]
    final: Path | None


def write(run_dirs: list[str | Path], out: str | Path | None = None) -> Path:
    """Write the report of one run, or of several side by side, and return its path.

    out: default RUN/report.html, for several runs report.html next to the first of them.

    Raises:
        InputError: a folder holds no run, or the path cannot be written.
    """
    try:
        if len(run_dirs) == 1 and out is None:
            return write_run(run_dirs[0])
        runs = [read_run(run_dir) for run_dir in run_dirs]
        if len({run.name for run in runs}) < len(runs):
            runs = [replace(run, name=run.dir.as_posix()) for run in runs]
        out = Path(out) if out is not None else runs[0].dir.resolve().parent / "report.html"
        put(out, page(runs, curves_of(runs), [progress(run) for run in runs]).encode())
    except OSError as error:
        raise InputError(f"the report cannot be written: {error}") from error
    return out


def write_run(run_dir: str | Path) -> Path:
    """Write samples/progress.png, samples/curves.png and report.html of one run.

    Return the path of report.html.

    Raises:
        InputError: the folder holds no run.
        OSError: it cannot be written.
    """
    run = read_run(run_dir)
    curves, pictures = curves_of([run]), progress(run)
    if curves is not None:
        put(run.dir / "samples" / "curves.png", saved(curves, "png"))
    if pictures is not None:
        put(run.dir / "samples" / "progress.png", png(pictures))
    path = run.dir / "report.html"
    put(path, page([run], curves, [pictures]).encode())
    return path


def put(path: Path, data: bytes) -> None:
    """Write a file atomically: a browser may be reading the previous one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_bytes(data)


# Reading


def read_run(run_dir: str | Path) -> Run:
    """Read a run folder. Raises InputError if it has neither a config nor a log."""
    folder = Path(run_dir)
    if not any((folder / name).is_file() for name in ("config.yaml", "log.jsonl")):
        raise InputError(
            f"{folder} is not a run folder: it has no config.yaml and no log.jsonl. Give the "
            "run.dir of a run"
        )
    curves, last, time_s, num_damaged = read_log(folder / "log.jsonl")
    text = read_text(folder / "config.yaml")
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        config = None
    # A run that was set back to an earlier checkpoint leaves later grids behind.
    grids = {
        step: path
        for step, path in numbered(folder, r"evaluate-(\d+)").items()
        if step <= last.get("step", step)
    }
    final = numbered(folder, r"step-(\d+)-seed0(?:-[0-9a-f]{8})?")
    return Run(
        name=folder.resolve().name,
        dir=folder,
        curves=curves,
        last=last,
        time_s=time_s,
        num_damaged=num_damaged,
        config=dict(flattened(config)),
        config_text=text,
        machine=read_json(folder / "machine.json"),
        scores=read_json(folder / "scores.json"),
        warnings=read_warnings(folder / "logs"),
        grids=grids,
        final=final[max(final)] if final else None,
    )


def numbered(folder: Path, pattern: str) -> dict[int, Path]:
    """Return {number: path} of the PNGs in samples/ whose stem matches, rising.

    Of several with the same number, the newest one counts.
    """
    paths = [(re.fullmatch(pattern, path.stem), path) for path in folder.glob("samples/*.png")]
    found = [(int(match[1]), path) for match, path in paths if match]
    return dict(sorted(found, key=lambda item: (item[0], item[1].stat().st_mtime_ns, item[1])))


def read_log(path: Path) -> tuple[dict, dict, dict[str, float], int]:
    """Return Run.curves, Run.last, Run.time_s and Run.num_damaged from log.jsonl."""
    found, time_s, num_damaged, last = {}, Counter(), 0, {}
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
                step = row["step"]
            # A kill or a full disk has cut the line.
            except (ValueError, KeyError, TypeError, RecursionError):
                step = None
            if not isinstance(step, int):
                num_damaged += bool(line.strip())
                continue
            last = row
            for name, value in values_of(row):
                found.setdefault(name, {})[step] = value
            spent = [*pairs(row.get("time_s")), ("evaluation", row.get("evaluation_s"))]
            for part, seconds in spent:
                # Ignores NaN.
                time_s[part] += max(0.0, number(seconds))
    curves = {}
    for name, by_step in found.items():
        steps = np.array(sorted(by_step))
        values = np.array([by_step[step] for step in steps.tolist()])
        curves[name] = steps[np.isfinite(values)], values[np.isfinite(values)]
    curves = {name: curve for name, curve in curves.items() if len(curve[0])}
    time_s = {part: seconds for part, seconds in time_s.most_common() if seconds > 0}
    return curves, last, time_s, num_damaged


def values_of(row: dict) -> list[tuple[str, float]]:
    """Return (name of the curve, value) of every value in a row of log.jsonl."""
    values = [(key, number(row[key])) for key in STEP_KEYS if key in row]
    for kind, loss in pairs(row.get("heldout_loss")):
        values.append((f"heldout_loss/{kind}", number(dict(pairs(loss)).get("mean"))))
    for group in ("scores", "metrics"):
        values += [(f"{group}/{name}", number(value)) for name, value in pairs(row.get(group))]
    return values


def number(value: Any) -> float:
    """Return a number as a float, NaN for anything else."""
    with suppress(OverflowError):
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return math.nan


def pairs(value: Any) -> list[tuple[Any, Any]]:
    """Return the items of a dict, [] for anything else."""
    return list(value.items()) if isinstance(value, dict) else []


def read_text(path: Path) -> str:
    """Return the text of a file, "" if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_json(path: Path) -> dict:
    """Return the dict in a JSON file, {} if there is none."""
    try:
        return dict(pairs(json.loads(read_text(path))))
    except (ValueError, RecursionError):
        return {}


def read_warnings(folder: Path) -> Counter:
    """Count the warnings in the log files of all ranks, by line without its time."""
    found = Counter()
    for path in sorted(folder.glob("rank-*.txt")):
        with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
            lines = (STAMP.sub("", line).strip() for line in file)
            found.update(line for line in lines if WARNING.search(line))
    return found


def flattened(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested dicts."""
    for key, value in pairs(config):
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# Images


def read_grid(path: Path) -> Grid:
    """Read a PNG of evaluation.sample.save_grid, {} if that fails.

    Equal labels are numbered. Images larger than PHOTO_PX are reduced.
    """
    try:
        stat = path.stat()
        return cut_grid(path, stat.st_mtime_ns, stat.st_size)
    # Pillow raises any of these for a damaged PNG, whose text may contain anything.
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError):
        return {}
    except Image.DecompressionBombError:
        return {}


# At each evaluation only one grid is new.
@lru_cache(maxsize=16)
def cut_grid(path: Path, modified_ns: int, num_bytes: int) -> Grid:
    """Read an intact grid. The other arguments identify the version of the file in the cache."""
    with Image.open(path) as file:
        grid, image = json.loads(file.text["grid"]), file.convert("RGB")
    columns, names, labels = int(grid["columns"]), [str(name) for name in grid["rows"]], []
    seen = Counter()
    for label in map(str, grid["labels"]):
        seen[label] += 1
        labels.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    num_lines = -(-len(labels) // columns) * len(names)
    width, height = (image.width + PAD_PX) // columns, (image.height + PAD_PX) // num_lines
    rows = {name: {} for name in names}
    for i, label in enumerate(labels):
        for k, name in enumerate(names):
            left, top = i % columns * width, (i // columns * len(names) + k) * height
            picture = image.crop((left, top, left + width - PAD_PX, top + height - PAD_PX))
            picture.thumbnail((PHOTO_PX, PHOTO_PX), Image.Resampling.LANCZOS)
            rows[name][label] = picture
    return rows


def evenly(values: list, most: int) -> list:
    """Return up to `most` of the values, evenly spread, with the first and the last."""
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def read_grids(run: Run, steps: list[int]) -> dict[int, Grid]:
    """Return the readable grids of these steps."""
    grids = {step: read_grid(run.grids[step]) for step in steps}
    return {step: grid for step, grid in grids.items() if "drawn" in grid}


def progress(run: Run) -> Image.Image | None:
    """Return the sheet of images over steps, None without evaluations.

    A row per prompt or masked image, a column per evaluation, of a few of them.
    """
    grids = read_grids(run, evenly(list(run.grids), MOST_COLUMNS))
    if not grids:
        return None
    last, columns = grids[max(grids)], []
    labels = few(list(last["drawn"]))
    for name, head in (("original", "original"), ("visible", "visible part")):
        if name in last:
            columns.append((head, [last[name][label] for label in labels]))
    for step, grid in grids.items():
        columns.append((f"step {step:,}", [grid["drawn"].get(label) for label in labels]))
    return sheet(columns, [] if "visible" in last else labels)


def few(labels: list[str]) -> list[str]:
    """Return the labels of up to MOST_ROWS rows, preferring different texts."""
    texts = [re.sub(r" \(\d+\)$", "", label) for label in labels]
    order = sorted(range(len(texts)), key=lambda i: texts[i] in texts[:i])
    return [labels[i] for i in sorted(order[:MOST_ROWS])]


def side_by_side(runs: list[Run]) -> Image.Image | None:
    """Return the sheet of the last images of several runs, a column per run.

    None if they were not sampled from the same prompts or images.
    """
    grids = [(run, read_grids(run, list(run.grids)[-1:])) for run in runs]
    grids = {run.name: grid for run, found in grids for grid in found.values()}
    if len(grids) < 2:
        return None
    shown = [
        {(label, original_of(grid, label)) for label in grid["drawn"]} for grid in grids.values()
    ]
    common = {label for label, _ in set.intersection(*shown)}
    first = next(iter(grids.values()))
    labels = few([label for label in first["drawn"] if label in common])
    if not labels:
        return None
    columns = [(name, [grid["drawn"][label] for label in labels]) for name, grid in grids.items()]
    if "original" in first:
        columns.insert(0, ("original", [first["original"][label] for label in labels]))
    return sheet(columns, [] if "original" in first else labels)


def original_of(grid: Grid, label: str) -> bytes | None:
    """Return the pixels of the masked image behind a sample, None for a prompt."""
    return grid["original"][label].tobytes() if "original" in grid else None


def sheet(columns: list[tuple[str, list[Image.Image | None]]], labels: list[str]) -> Image.Image:
    """Return a sheet of columns of equal length, with enlarged images.

    columns: (head, images); empty heads take no room. labels: of the rows, on the left; may be [].
    """
    font = ImageFont.load_default(15)
    top, left = 28 if any(head for head, _ in columns) else 0, 176 if labels else 0
    side = next(picture.size for _, pictures in columns for picture in pictures if picture)
    width, height = (length * math.ceil(CELL_PX / max(side)) for length in side)
    right = left + len(columns) * (width + GAP_PX) - GAP_PX
    bottom = top + len(columns[0][1]) * (height + GAP_PX) - GAP_PX
    image = Image.new("RGB", (right, bottom), "white")
    pen = ImageDraw.Draw(image)
    for row, label in enumerate(labels):
        text = "\n".join(textwrap.wrap(label, 22)[:5])
        place = 0, top + row * (height + GAP_PX) + height / 2
        pen.multiline_text(place, text, "#1f2328", font, anchor="lm", spacing=5)
    for column, (head, pictures) in enumerate(columns):
        x = left + column * (width + GAP_PX)
        while font.getlength(head) > width and len(head) > 1:
            head = head.rstrip("…")[:-1] + "…"
        pen.text((x + width / 2, top / 2), head, "#57606a", font, anchor="mm")
        for row, picture in enumerate(pictures):
            if picture is not None:
                large = picture.resize((width, height), Image.Resampling.NEAREST)
                image.paste(large, (x, top + row * (height + GAP_PX)))
    return image


def contact_sheet(grid: Grid, num_columns: int = 8) -> Image.Image:
    """Return the rows of a grid, enlarged, in the layout of evaluation.sample.save_grid."""
    rows, lines = [list(row.values()) for row in grid.values()], []
    for start in range(0, len(rows[0]), num_columns):
        for row in rows:
            line = row[start : start + num_columns]
            lines.append(line + [None] * (min(num_columns, len(rows[0])) - len(line)))
    return sheet([("", list(pictures)) for pictures in zip(*lines, strict=True)], [])


def png(image: Image.Image) -> bytes:
    """Return an image as a PNG file."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


# Curves


def curves_of(runs: list[Run]) -> Figure | None:
    """Return the figure of losses, scores and the hooks' metrics, None without a step."""
    names = dict.fromkeys(name for run in runs for name in run.curves)
    hooks = {name: (name.partition("/")[2], "") for name in names if name.startswith("metrics/")}
    return figure(runs, CURVES | hooks)


def figure(
    runs: list[Run], curves: dict, max_columns: int = 3, height: float = 2.8
) -> Figure | None:
    """Return a figure of the curves (as CURVES) that the runs have, None if they have none.

    Panels of one run have a line per curve, panels of several runs a line per run. height: of a
    panel in inches.
    """
    several, panels = len(runs) > 1, {}
    for name, (title, label) in curves.items():
        if several and label:
            title = f"{title}: {label}"
        for i, run in enumerate(runs):
            if name in run.curves:
                lines = panels.setdefault(title, [])
                colour = COLOURS[(i if several else len(lines)) % len(COLOURS)]
                lines.append((run.name if several else label, name, colour, *run.curves[name]))
    if not panels:
        return None
    # Imported here: it takes half a second, which only a report needs.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns = 2 if len(panels) == 4 and max_columns == 3 else min(max_columns, len(panels))
    rows = -(-len(panels) // columns)
    # Room for the legends of one run, between title and panel: inside it they cover the curves.
    room = 0.0 if several or max(map(len, panels.values())) == 1 else 0.22
    pitch = height + room
    wide, high = 11.5, rows * pitch + 0.35 * several
    last_step = max(1, *(steps[-1] for lines in panels.values() for *_, steps, _ in lines))
    handles = {}
    with rc_context(LOOK):
        whole = Figure(figsize=(wide, high))
        for i, (title, lines) in enumerate(panels.items()):
            # Placed by hand: matplotlib's own layouts take as long as everything else together.
            left = i % columns * wide / columns + 0.5
            bottom = (rows - 1 - i // columns) * pitch + 0.5
            place = left / wide, bottom / high, 1 / columns - 0.8 / wide, (height - 0.9) / high
            axes = whole.add_axes(place)
            handles |= draw_panel(axes, lines)
            axes.set_xlim(0, 1.01 * last_step)
            axes.set_title(title, pad=LOOK["axes.titlepad"] + 72 * room)
            if not several and len(lines) > 1:
                axes.legend(loc="lower left", bbox_to_anchor=(0, 1.03), ncols=4)
        if several:
            names = [name if len(name) <= 40 else f"…{name[-39:]}" for name in handles]
            whole.legend(handles.values(), names, loc="upper left", ncols=4, borderpad=0.5)
    return whole


def draw_panel(axes: Axes, lines: list[Line]) -> dict[str, Line2D]:
    """Draw the lines of a panel and return {label: its artist}.

    Curves with a value per step are drawn faintly and, smoothed, on top; others point by point.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    handles, seen = {}, []
    for label, name, colour, steps, values in lines:
        if "/" in name:
            (handles[label],) = axes.plot(steps, values, "o-", color=colour, ms=3.5, label=label)
        else:
            steps, values = thinned(steps, values)
            if name not in STEADY:
                axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.9)
            calm = values if name in STEADY else smoothed(values)
            (handles[label],) = axes.plot(steps, calm, color=colour, label=label)
        seen.append(values)
    low, high = np.concatenate(seen).min(), np.concatenate(seen).max()
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    kind = lines[0][1].partition("/")[0]
    if kind == "scores":
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
    elif kind in HEALTH and low >= 0:
        axes.set_ylim(0, 1.05 * high if high > 0 else 1)
    elif "loss" in kind and 0 < 6 * low < high:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    return handles


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return up to MOST_POINTS points, means over groups of neighbours of the same size."""
    size = -(-len(steps) // MOST_POINTS)
    groups = [slice(start, start + size) for start in range(0, len(steps), size)]
    return tuple(np.array([curve[group].mean() for group in groups]) for curve in (steps, values))


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return running means over 2.5 % of all values on either side of each."""
    reach = len(values) // 40
    return np.array([values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(values))])


def saved(curves: Figure, kind: str) -> bytes:
    """Return a figure as a "png" or "svg" file."""
    from matplotlib import rc_context

    file = io.BytesIO()
    with rc_context(LOOK):
        curves.savefig(file, format=kind, dpi=120)
    return file.getvalue()


def inline_svg(curves: Figure, prefix: str, words: str) -> str:
    """Return a figure as <svg> without links. `prefix` keeps the ids of two figures apart."""
    svg = saved(curves, "svg").decode()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    for before in ('id="', 'href="#', "url(#"):
        svg = svg.replace(before, before + prefix)
    return svg.replace("<svg", f'<svg role="img" aria-label="{words}"', 1)


# The page


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body, svg text {{ font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans",
  sans-serif !important; }}
body {{ font-size: 15px; line-height: 1.5; color: #1f2328; background: #fff; max-width: 1180px;
  margin: 0 auto; padding: 28px 24px 48px; }}
h1 {{ font-size: 26px; margin: 0; line-height: 1.25; overflow-wrap: anywhere; }}
h2 {{ font-size: 18px; margin: 36px 0 10px; padding-bottom: 5px;
  border-bottom: 1px solid #d8dee4; }}
p {{ margin: 4px 0 10px; }}
.quiet, figcaption {{ color: #57606a; font-size: 13px; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px;
  margin-top: 18px; }}
.cards div {{ border: 1px solid #d8dee4; border-radius: 6px; padding: 8px 12px; }}
.cards b {{ display: block; font-size: 19px; font-variant-numeric: tabular-nums; }}
.cards span {{ color: #57606a; font-size: 12.5px; }}
table {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: 3px 18px 3px 0; border-bottom: 1px solid #eaeef2;
  vertical-align: top; overflow-wrap: anywhere; }}
th {{ font-weight: 600; white-space: nowrap; }}
.number {{ text-align: right; white-space: nowrap; }}
.bar {{ background: #0969da; height: 9px; border-radius: 2px; margin-top: 6px; min-width: 1px; }}
.track {{ width: 260px; }}
.scroll {{ overflow-x: auto; }}
svg, img {{ display: block; max-width: 100%; height: auto; }}
svg {{ width: 100%; }}
figure {{ margin: 0 0 16px; }}
figcaption {{ margin-top: 5px; }}
details {{ margin: 8px 0; }}
summary {{ cursor: pointer; }}
pre {{ background: #f6f8fa; border-radius: 6px; padding: 12px; font-size: 12px;
  line-height: 1.45; overflow-x: auto; }}
footer {{ margin-top: 40px; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def page(runs: list[Run], curves: Figure | None, sheets: list[Image.Image | None]) -> str:
    """Return the HTML of one or several runs.

    curves: curves_of(runs). sheets: progress(run) of each.
    """
    body = [*head_section(runs)]
    if curves is not None:
        body += [
            "<h2>Curves</h2>",
            inline_svg(curves, "curves-", "curves over steps"),
            quiet(
                "Faint: single steps or means of a few. Strong: running means over 5 % of the run."
            ),
        ]
    body += samples_section(runs, sheets)
    body += scores_section(runs)
    body += time_section(runs)
    health = figure(runs, HEALTH, max_columns=4, height=2.3)
    if health is not None:
        body += ["<h2>Health</h2>", inline_svg(health, "health-", "speed and health over steps")]
    body += warnings_section(runs)
    body += config_section(runs)
    keys = dict.fromkeys(key for run in runs for key in run.machine)
    rows = [[key, *(plain(run.machine.get(key)) for run in runs)] for key in keys]
    if rows:
        names = [run.name for run in runs] if len(runs) > 1 else [""]
        body += ["<h2>Machine and versions</h2>", table(["", *names], rows)]
    now, where = time.strftime("%Y-%m-%d %H:%M"), shlex.join(run.dir.as_posix() for run in runs)
    body += [f"<footer>{quiet(f'Written {now}. To update it: iomm report {where}')}</footer>"]
    title = f"{', '.join(run.name for run in runs)} {DASH} IOMM run report"
    return PAGE.format(title=esc(title), body="\n".join(body))


def head_section(runs: list[Run]) -> list[str]:
    """Return name and final values, as cards for one run and as a table for several."""
    values = [final_values(run) for run in runs]
    title = f"<h1>{esc(' · '.join(run.name for run in runs))}</h1>"
    if len(runs) == 1:
        cards = [
            f"<div><b>{esc(value)}</b><span>{esc(what)}</span></div>"
            for what, value in values[0].items()
            if not what.endswith(" right")
        ]
        return [title, quiet(state_of(runs[0])), '<div class="cards">', *cards, "</div>"]
    rows = [
        [what, *(one.get(what, DASH) for one in values)]
        for what in dict.fromkeys(what for one in values for what in one)
    ]
    names = [run.name for run in runs]
    final = table(["", *names], rows, numbers=True)
    return [title, quiet(f"{len(runs)} runs side by side"), "<h2>Final values</h2>", final]


def state_of(run: Run) -> str:
    """Return in one line how far the run is, what it trains on, and where."""
    if not run.last:
        return "no step logged yet"
    steps, data = run.config.get("train.steps"), run.config.get("train.data")
    words = [
        "finished" if isinstance(steps, int) and run.last["step"] >= steps else "not finished",
        {
            "image": "trains on images",
            "pair": "trains on pairs",
            "mix": "trains on images and pairs",
        }.get(data),
        run.machine.get("device"),
        run.machine.get("date"),
    ]
    return " · ".join(str(word) for word in words if word)


def hours_name(gpu: object) -> str:
    """Return what the hours of all ranks are called on a machine with a GPU or without."""
    return "GPU-hours" if gpu else "rank-hours"


def final_values(run: Run) -> dict[str, str]:
    """Return {name: value} of the run's final values, as text."""
    found = {}
    if run.last:
        found["steps"] = f"{run.last['step']:,} of {plain(run.config.get('train.steps', '?'), ',')}"
    for name, words in (("loss", "loss"), ("align_loss", "alignment loss")):
        if name in run.curves:
            mean = run.curves[name][1][-LAST_STEPS:].mean()
            found[f"{words}, last {LAST_STEPS} steps"] = f"{mean:.4f}"
    for name, (_, values) in run.curves.items():
        group, _, which = name.partition("/")
        if group == "heldout_loss":
            found[f"held-out loss, {which}s"] = f"{values[-1]:.4f}"
        elif group == "scores":
            what = "samples that match" if which == "fits" else f"{which} right"
            found[what] = f"{values[-1]:.0%}"
        elif group == "metrics":
            found[which] = f"{values[-1]:.4g}"
    if "images_per_s" in run.curves:
        found["images/s, median"] = f"{np.median(run.curves['images_per_s'][1]):.1f}"
    if "mfu" in run.curves:
        found["MFU, median"] = f"{np.median(run.curves['mfu'][1]):.1%}"
    if "memory_gib" in run.curves:
        found["peak memory"] = f"{run.curves['memory_gib'][1].max():.2f} GiB"
    if "gpu_hours" in run.last:
        found[hours_name(run.machine.get("gpu"))] = f"{number(run.last['gpu_hours']):,.3f}"
    for key in ("skipped_steps", "skipped_samples"):
        if key in run.last:
            found[key.replace("_", " ")] = f"{number(run.last[key]):,.0f}"
    if run.last.get("cut_captions"):
        found["cut captions"] = f"{number(run.last['cut_captions']):,.0f}"
    found["warnings"] = f"{run.warnings.total():,}"
    if run.num_damaged:
        found["damaged log lines"] = f"{run.num_damaged:,}"
    return found


def samples_section(runs: list[Run], sheets: list[Image.Image | None]) -> list[str]:
    """Return runs side by side, each run over its steps, and folded the whole grids."""
    body = []
    if len(runs) > 1 and (image := side_by_side(runs)) is not None:
        body.append(
            picture(image, "The last evaluation of each run, from the same prompts or images.")
        )
    for run, image in zip(runs, sheets, strict=True):
        if image is not None:
            body.append(picture(image, named(run, runs, progress_words(run))))
    for run in runs:
        steps = evenly(list(run.grids), MOST_COLUMNS)
        grids = read_grids(run, steps if len(runs) == 1 else steps[-1:])
        for step, grid in grids.items():
            title = f"step {step:,}: all {len(grid['drawn'])} samples"
            image = grid_picture(grid, drawn_only=step < max(grids))
            body.append(folded(named(run, runs, title), image))
        grid = read_grid(run.final) if run.final is not None else {}
        if "drawn" in grid:
            title = named(run, runs, "sampled at the end from training data")
            body.append(folded(title, grid_picture(grid), is_open=not grids))
    return ["<h2>Samples</h2>", *body] if body else []


def progress_words(run: Run) -> str:
    """Return the caption of the progress sheet."""
    words = "after the given steps, always from the same noise."
    grids = read_grids(run, evenly(list(run.grids), MOST_COLUMNS))
    if "visible" in grids[max(grids)]:
        return (
            "Visible part: what the MLLM sees of the image, with hidden patches hatched. To its "
            f"right: what the model generates from it {words}"
        )
    return f"What the model generates from each prompt {words}"


def grid_picture(grid: Grid, drawn_only: bool = False) -> str:
    """Return a grid as one figure, with the names of its rows or the prompts as its caption."""
    words = " · ".join(grid["drawn"])
    if len(grid) > 1:
        rows = ", ".join(grid).replace("visible", "its visible part").replace("drawn", "generated")
        words = f"From top to bottom: {rows}."
    if drawn_only:
        words = words if len(grid) == 1 else ""
        grid = {"drawn": grid["drawn"]}
    return picture(contact_sheet(grid), words)


def picture(image: Image.Image, words: str) -> str:
    """Return an image as <figure> with a caption."""
    data, words = base64.b64encode(png(image)).decode(), esc(words)
    return (
        f'<figure><img alt="{words}" width="{image.width}" height="{image.height}" '
        f'src="data:image/png;base64,{data}"><figcaption>{words}</figcaption></figure>'
    )


def scores_section(runs: list[Run]) -> list[str]:
    """Return the shares of matching samples in scores.json, by kind of caption."""
    columns = [(run, way) for run in runs for way in WAYS if pairs(run.scores.get(way))]
    if not columns:
        return []
    rows = []
    for kind in dict.fromkeys(kind for run, way in columns for kind in run.scores[way]):
        shares = [
            number(dict(pairs(run.scores[way].get(kind))).get("fits")) for run, way in columns
        ]
        rows.append([kind, *(f"{x:.0%}" if math.isfinite(x) else DASH for x in shares)])
    head = ["kind of caption", *(named(run, runs, WAYS[way]) for run, way in columns)]
    words = quiet("Share of samples that show exactly what the caption names.")
    return ["<h2>Scores at the end</h2>", table(head, rows, numbers=True), words]


def time_section(runs: list[Run]) -> list[str]:
    """Return the time by part: seconds and a bar for one run, shares for several."""
    parts = dict.fromkeys(part for run in runs for part in run.time_s)
    if not parts:
        return []
    totals = [max(sum(run.time_s.values()), 1e-9) for run in runs]
    rows = []
    for part in parts:
        seconds = [run.time_s.get(part, 0.0) for run in runs]
        cells = [f"{100 * s / total:.1f}%" for s, total in zip(seconds, totals, strict=True)]
        bar = ""
        if len(runs) == 1:
            bar = f'<td class="track"><div class="bar" style="width: {cells[0]}"></div>'
            cells.insert(0, f"{seconds[0]:,.1f} s")
        cells = "".join(f'<td class="number">{cell}' for cell in cells)
        words = f'<td class="quiet">{esc(PARTS.get(part, ""))}'
        rows.append(f"<tr><td>{esc(part)}{cells}{bar}{words}")
    heads = ["time", "share", ""] if len(runs) == 1 else [run.name for run in runs]
    top = "".join(f"<th>{esc(text)}" for text in ("part", *heads, ""))
    body = f'<div class="scroll"><table><tr>{top}{"".join(rows)}</table></div>'
    hours = [
        named(run, runs, f"{total / 3600:.2f} h") for run, total in zip(runs, totals, strict=True)
    ]
    words = quiet(f"Rank 0, all steps and evaluations: {'; '.join(hours)}.")
    return ["<h2>Time by part</h2>", body, words]


def warnings_section(runs: list[Run]) -> list[str]:
    """Return the most frequent warnings of each run, folded."""
    body = []
    for run in runs:
        if run.warnings:
            title = f"{run.warnings.total():,} lines in logs/, {len(run.warnings):,} different"
            rows = [[str(lines), text[:300]] for text, lines in run.warnings.most_common(20)]
            body.append(folded(named(run, runs, title), table(["lines", "warning"], rows)))
    return ["<h2>Warnings</h2>", *body] if body else []


def config_section(runs: list[Run]) -> list[str]:
    """Return the config of one run, or the keys in which several differ."""
    if len(runs) == 1:
        inner = f"<pre>{esc(runs[0].config_text)}</pre>"
        return ["<h2>Config</h2>", folded("config.yaml, resolved", inner)] if runs[0].config else []
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run.config if key != "run.dir"):
        values = [plain(run.config[key]) if key in run.config else "not set" for run in runs]
        if len(set(values)) > 1:
            rows.append([key, *values])
    differ = table(["", *(run.name for run in runs)], rows) if rows else quiet("None.")
    return ["<h2>Config keys that differ</h2>", differ]


def named(run: Run, runs: list[Run], text: str) -> str:
    """Return the text, with the name of the run in front if there are several."""
    return f"{run.name}: {text}" if len(runs) > 1 else text


def folded(title: str, inner: str, is_open: bool = False) -> str:
    """Return HTML that opens at a click on its title."""
    state = " open" if is_open else ""
    return f"<details{state}><summary>{esc(title)}</summary>\n{inner}</details>"


def quiet(text: str) -> str:
    """Return a small grey paragraph."""
    return f'<p class="quiet">{esc(text)}</p>'


def table(head: list[str], rows: list[list[str]], numbers: bool = False) -> str:
    """Return an HTML table. numbers: align all columns but the first to the right."""
    kind = ' class="number"' if numbers else ""
    lines = ["".join(f"<th>{esc(text)}" for text in head)] if any(head) else []
    for first, *others in rows:
        lines.append(f"<td>{esc(first)}" + "".join(f"<td{kind}>{esc(text)}" for text in others))
    return f'<div class="scroll"><table><tr>{"<tr>".join(lines)}</table></div>'


def plain(value: Any, form: str = "") -> str:
    """Return a value of a config or of machine.json as text. form: format of whole numbers."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return format(value, form)
    return ", ".join(map(plain, value)) if isinstance(value, list) else str(value)


def esc(text: Any) -> str:
    """Return text escaped for HTML, inside tags or quotes."""
    return html.escape(str(text))
