"""Compare the paper's findings with the cells of recipes.py.

All intervals are at 95 %. Each end of an interval is the wider of two. The first is Student's t
over the seeds; each seed is scored on different scenes, so their spread includes the errors of
training and of the pictures. The second is Wilson's score interval over all pictures (Newcombe's
for a difference), which matters when seeds agree by chance.
"""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.report import pyplot

# Student's t, two-sided 95 %, by number of seeds less one.
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
Z_95 = 1.960
# Combinations of colour, shape and role.
SPLITS = {"train": "seen", "test": "unseen"}
# The largest difference of shares that counts as the paper's "as good as".
LEVEL = 0.05
# The smallest share at which a model has learned enough for an "as good as" comparison.
LEARNED = 0.2
ABOVE, NO_WORSE, AS_GOOD = (0.0, math.inf), (-LEVEL, math.inf), (-LEVEL, LEVEL)


class Interval(NamedTuple):
    """A share, or a difference of two, with its 95 % interval."""

    mean: float
    low: float
    high: float


def wilson(share: float, pictures: int) -> tuple[float, float]:
    """Return Wilson's score interval of a share of `pictures` pictures (Wilson 1927)."""
    square = Z_95**2 / pictures
    centre = (share + square / 2) / (1 + square)
    half = Z_95 / (1 + square) * math.sqrt(share * (1 - share) / pictures + square / (4 * pictures))
    return max(0.0, centre - half), min(1.0, centre + half)


def newcombe(a: float, b: float, pictures: int) -> tuple[float, float]:
    """Return the interval of a - b, two shares of `pictures` pictures each.

    Newcombe 1998, method 10, which assumes independent pictures. The pictures of two cells show the
    same scenes, so their errors partly cancel and the interval is too wide rather than too narrow.
    """
    (a_low, a_high), (b_low, b_high) = wilson(a, pictures), wilson(b, pictures)
    return a - b - math.hypot(a - a_low, b_high - b), a - b + math.hypot(a_high - a, b - b_low)


def widened(values: list[float], low: float, high: float) -> Interval:
    """Return the seeds' mean with the wider of the given interval and Student's t."""
    mean = statistics.mean(values)
    half = 0.0
    if len(values) > 1:
        half = T_95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, min(low, mean - half), max(high, mean + half))


def interval(shares: list[float], pictures: int) -> Interval:
    """Return the interval of a share from the seeds' shares of `pictures` pictures each."""
    found = widened(shares, *wilson(statistics.mean(shares), pictures * len(shares)))
    return Interval(found.mean, max(0.0, found.low), min(1.0, found.high))


def difference(a: list[float], b: list[float], pictures: int) -> Interval:
    """Return the interval of a - b from two cells' shares, given in the same order of seeds."""
    both = newcombe(statistics.mean(a), statistics.mean(b), pictures * len(a))
    return widened([one - other for one, other in zip(a, b, strict=True)], *both)


def verdict(found: Interval, agree: tuple[float, float], *, seeds: int, best: float) -> str:
    """Return "reproduced", "contradicted" or "not decided".

    Args:
        found: difference of two shares.
        agree: range of differences that agree with the paper's finding.
        seeds: number of seeds; a single one decides nothing about training.
        best: the larger share. Two models that learned next to nothing are equally good, which
            means nothing, so below LEARNED no "as good as" comparison is decided.
    """
    if seeds == 1 or (agree[0] < 0 and best < LEARNED):
        return "not decided"
    if agree[0] <= found.low and found.high <= agree[1]:
        return "reproduced"
    if found.high < agree[0] or agree[1] < found.low:
        return "contradicted"
    return "not decided"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A finding of the paper about two cells.

    paper: the paper's figures; agree: range of differences that agree with the finding.
    """

    what: str
    experiment: str
    one: str
    other: str
    paper: str
    agree: tuple[float, float] = ABOVE


FINDINGS = (
    Finding(
        what="fine-tuning needs captions: mix above image, pre-trained on images",
        experiment="recipes",
        one="image -> mix",
        other="image -> image",
        paper="0.89, 0.61",
    ),
    Finding(
        what="mix above image, pre-trained on pairs",
        experiment="recipes",
        one="pair -> mix",
        other="pair -> image",
        paper="0.88, 0.78",
    ),
    Finding(
        what="mix no worse than pair, pre-trained on images",
        experiment="recipes",
        one="image -> mix",
        other="image -> pair",
        paper="0.89, 0.87",
        agree=NO_WORSE,
    ),
    Finding(
        what="mix no worse than pair, pre-trained on pairs",
        experiment="recipes",
        one="pair -> mix",
        other="pair -> pair",
        paper="0.88, 0.86",
        agree=NO_WORSE,
    ),
    Finding(
        what="images no worse than pairs to pre-train on, before mix",
        experiment="recipes",
        one="image -> mix",
        other="pair -> mix",
        paper="0.89, 0.88",
        agree=NO_WORSE,
    ),
    Finding(
        what="images no worse than pairs to pre-train on, before pair",
        experiment="recipes",
        one="image -> pair",
        other="pair -> pair",
        paper="0.87, 0.86",
        agree=NO_WORSE,
    ),
    Finding(
        what="without captions in fine-tuning, captions in pre-training help",
        experiment="recipes",
        one="pair -> image",
        other="image -> image",
        paper="0.78, 0.61",
    ),
    Finding(
        what="masking helps: ratio 0.5 (paper 0.45) above 0",
        experiment="ratio",
        one="0.5",
        other="0.0",
        paper="0.88, 0.82",
    ),
    Finding(
        what="masking nearly all hurts: ratio 0.5 (paper 0.45) above 0.95",
        experiment="ratio",
        one="0.5",
        other="0.95",
        paper="0.88, 0.77",
    ),
    Finding(
        what="the residual query adapter above none",
        experiment="adapter",
        one="rqa",
        other="none",
        paper="0.82, 0.44",
    ),
    Finding(
        what="the residual query adapter above MetaQuery at equal steps",
        experiment="adapter",
        one="rqa",
        other="metaquery",
        paper="0.82 8K steps earlier",
    ),
    Finding(
        what="few captions hurt: lambda 0.5 above 0.9",
        experiment="mix",
        one="0.5",
        other="0.9",
        paper="0.86, 0.78",
    ),
    Finding(
        what="flat below lambda 0.5: 0.5 as good as 0.3",
        experiment="mix",
        one="0.5",
        other="0.3",
        paper="0.86, 0.85",
        agree=AS_GOOD,
    ),
    Finding(
        what="flat below lambda 0.5: 0.5 as good as 0.1",
        experiment="mix",
        one="0.5",
        other="0.1",
        paper="0.86, 0.85",
        agree=AS_GOOD,
    ),
    Finding(
        what="zero-shot edits: pre-trained on images above on pairs",
        experiment="editing",
        one="image -> mix",
        other="pair -> mix",
        paper="ImgEdit 2.82, 2.61",
    ),
)
# (experiment, cell) of every cell that a finding compares.
COMPARED = {(found.experiment, cell) for found in FINDINGS for cell in (found.one, found.other)}

# An experiment: {cell: {seed: {"text, train": {"fits": share, ..., "pictures": number}, ...}}}.
Cells = dict[str, dict[int, dict[str, dict[str, float]]]]


def figure_of(experiment: str) -> tuple[str, str]:
    """Return (way, key) of the figure that decides an experiment."""
    return ("edit", "edited") if experiment == "editing" else ("text", "fits")


def shares_of(seeds: dict[int, dict], way: str, key: str) -> tuple[list[float], int]:
    """Return the shares in order of the seeds, and the number of pictures of each."""
    rows = [seeds[seed][way] for seed in sorted(seeds)]
    return [row[key] for row in rows], rows[0]["pictures"]


def compare(finding: Finding, cells: Cells, split: str) -> dict:
    """Compare a finding's two cells over the seeds that both have; return {} without any."""
    one, other = cells.get(finding.one, {}), cells.get(finding.other, {})
    common = sorted(set(one) & set(other))
    if not common:
        return {}
    way, key = figure_of(finding.experiment)
    (a, pictures), (b, _) = (
        shares_of({seed: cell[seed] for seed in common}, f"{way}, {split}", key)
        for cell in (one, other)
    )
    found, best = difference(a, b, pictures), max(statistics.mean(a), statistics.mean(b))
    return {
        "one": statistics.mean(a),
        "other": statistics.mean(b),
        "difference": found._asdict(),
        "seeds": len(common),
        "verdict": verdict(found, finding.agree, seeds=len(common), best=best),
    }


def compared(experiments: dict[str, Cells]) -> list[dict]:
    """Return a row per finding with the paper's figures and ours, seen and unseen combinations."""
    return [
        {
            "what": finding.what,
            "experiment": finding.experiment,
            "paper": finding.paper,
            **{
                shown: compare(finding, experiments.get(finding.experiment, {}), split)
                for split, shown in SPLITS.items()
            },
        }
        for finding in FINDINGS
    ]


def in_words(row: dict) -> str:
    """Return a comparison as text: "0.62, 0.41: +0.21 (+0.10 to +0.32), reproduced"."""
    if not row:
        return "not run"
    mean, low, high = row["difference"].values()
    alone = " (one seed)" if row["seeds"] == 1 else ""
    shares = f"{row['one']:.2f}, {row['other']:.2f}"
    return f"{shares}: {mean:+.2f} ({low:+.2f} to {high:+.2f}), {row['verdict']}{alone}"


def findings_table(rows: list[dict]) -> str:
    """Return a Markdown table of the paper's figures and ours."""
    lines = ["| finding | paper | here, seen combinations | here, unseen |", "|---|---|---|---|"]
    lines += [
        f"| {row['what']} | {row['paper']} | {in_words(row['seen'])} | {in_words(row['unseen'])} |"
        for row in rows
    ]
    return "\n".join(lines)


def share_in_words(found: Interval) -> str:
    """Return a share as "0.62 (0.55 to 0.69)"."""
    return f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f})"


def summary(cells: Cells) -> dict[str, dict[str, dict[str, dict]]]:
    """Return {cell: {"text, train": {key: {"mean", "low", "high", "seeds"}}}} of an experiment."""
    rows = {}
    for cell, seeds in cells.items():
        ways = next(iter(seeds.values()))
        rows[cell] = {
            way: {
                key: interval(*shares_of(seeds, way, key))._asdict()
                | {"seeds": shares_of(seeds, way, key)[0]}
                for key in keys
                if key != "pictures"
            }
            for way, keys in ways.items()
        }
    return rows


def draw(experiments: dict[str, Cells], path: Path, limits: dict[str, float]) -> None:
    """Draw a PNG with the deciding figure of each experiment, a row per cell.

    limits: {way: share that real pictures reach}, drawn as a dashed line.
    """
    if not experiments or (plt := pyplot()) is None:
        return
    heights = [len(cells) + 1.5 for cells in experiments.values()]
    figure = plt.Figure(figsize=(8, 0.34 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(experiments), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (name, cells) in zip(axes, experiments.items(), strict=True):
        way, key = figure_of(name)
        for split, shift, marker, colour in (
            ("train", -0.12, "o", "tab:blue"),
            ("test", 0.12, "s", "tab:orange"),
        ):
            found = [
                interval(*shares_of(seeds, f"{way}, {split}", key)) for seeds in cells.values()
            ]
            means = [one.mean for one in found]
            errors = [
                [max(0.0, one.mean - one.low) for one in found],
                [max(0.0, one.high - one.mean) for one in found],
            ]
            axis.errorbar(
                means,
                [row + shift for row in range(len(found))],
                xerr=errors,
                linestyle="none",
                capsize=2,
                marker=marker,
                markersize=4,
                color=colour,
                label=f"{SPLITS[split]} combinations",
            )
        axis.axvline(
            limits[way], linestyle="--", linewidth=0.8, color="grey", label="real pictures"
        )
        axis.set_yticks(
            range(len(cells)),
            [f"{cell} ({len(seeds)})" for cell, seeds in cells.items()],
            fontsize=7,
        )
        axis.set_xlim(0, 1.02)
        axis.set_ylim(len(cells) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(axis="x", labelsize=7)
        what = "edit fits and keeps the rest" if way == "edit" else "all of the caption right"
        axis.set_title(f"{name}: {what} (seeds in brackets)", fontsize=8, loc="left")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7)
    figure.savefig(path, dpi=130)
