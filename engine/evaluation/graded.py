"""Read the result files of the official graders and compare their scores with the paper's.

Formats and arithmetic are those of the graders' scripts, at the commits that layouts.py names:

    geneval   evaluate_images.py --outfile, summarized like summary_scores.py
    dpg       compute_dpg_bench.py --res-path: one line per image, then the summary
    wise      --result_scores of vllm_eval.py (verified) or gpt_eval.py (legacy), summarized like
              calculate_verified.py or Calculate.py
    imgedit   result.json, average_score.json or typescore.json of step 1 and step 2
    gedit     *_gpt_score.csv, summarized like calculate_statistics.py

The paper's figures are in targets.yaml.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml
from PIL import Image

from iomm.config import InputError
from iomm.engine.evaluation.layouts import GEDIT_TASKS, LAYOUTS, text_of

TARGETS = Path(__file__).with_name("targets.yaml")

GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# Images of each type in basic_edit.json. They weight the means of typescore.json.
IMGEDIT_TYPES = {
    "add": 95,
    "adjust": 94,
    "extract": 117,
    "replace": 92,
    "remove": 86,
    "background": 94,
    "style": 100,
    "compose": 23,
    "action": 36,
}


@dataclass(frozen=True, kw_only=True)
class Graded:
    """The scores in a grader's result files."""

    # Benchmark and protocol, as the PNGs record them.
    protocol: str
    # Score of the benchmark. None where the official script prints none.
    overall: float | None
    # Score by category, in the order of the official script.
    categories: dict[str, float]
    # Entries in the files. None if they contain only means.
    num_graded: int | None
    # Entries of the whole benchmark.
    num_expected: int
    # Reasons why these scores may differ from scores of the benchmark.
    warnings: tuple[str, ...] = ()


class WiseProtocol(NamedTuple):
    """The arithmetic of one protocol of WISE."""

    # Numbers of a line.
    keys: tuple[str, ...]
    # Line -> its score.
    score: Callable[[dict[str, Any]], float]
    # Category -> (last prompt_id, weight in the overall score).
    categories: dict[str, tuple[int, float]]


WISE = {
    "wise verified": WiseProtocol(
        keys=("score",),
        score=lambda entry: float(entry["score"]),
        categories={
            "culture": (400, 0.4),
            "time": (520, 0.12),
            "space": (640, 0.12),
            "biology": (760, 0.12),
            "physics": (880, 0.12),
            "chemistry": (1000, 0.12),
        },
    ),
    "wise legacy": WiseProtocol(
        keys=("consistency", "realism", "aesthetic_quality"),
        score=lambda entry: (
            (0.7 * entry["consistency"] + 0.2 * entry["realism"] + 0.1 * entry["aesthetic_quality"])
            / 2
        ),
        categories={
            "culture": (400, 0.4),
            "time": (567, 0.167),
            "space": (700, 0.133),
            "biology": (800, 0.1),
            "physics": (900, 0.1),
            "chemistry": (1000, 0.1),
        },
    ),
}


def read_geneval(paths: Sequence[str], prompts: Sequence[str] | None) -> Graded:
    """Read the JSON lines of evaluate_images.py.

    A task's score is the share of correct images. The overall score is the mean over six tasks.
    """
    by_tag, metadata, recorded, official = {}, set(), set(), True
    for where, entry in json_lines(single(paths)):
        tag, correct = entry.get("tag"), entry.get("correct")
        if not isinstance(tag, str) or not isinstance(correct, bool):
            raise InputError(
                f"{where}: expected a line of evaluate_images.py with a text 'tag' and a 'correct' "
                "that is true or false. Give its --outfile."
            )
        by_tag.setdefault(tag, []).append(correct)
        metadata.add(str(entry.get("metadata")))
        official &= str(entry.get("prompt", "a photo of ")).startswith("a photo of ")
        recorded.add(recorded_benchmark(entry.get("filename")))
    recorded.discard(None)
    if len(recorded) > 1:
        raise InputError(
            f"{paths[0]}: the images were sampled for {' and '.join(sorted(recorded))}. "
            "Grade each protocol in a separate folder."
        )
    warnings = []
    if recorded:
        protocol = recorded.pop()
    elif official:
        protocol = "geneval"
        warnings.append(
            "the images that the file names are not readable here, so it is unknown whether "
            "they were sampled from the official prompts"
        )
    else:
        # BAGEL writes the rewritten lines into its folders.
        protocol = "geneval, rewritten prompts"
    layout = LAYOUTS["geneval"]
    num_graded = sum(map(len, by_tag.values()))
    if len(metadata) != layout.num_prompts:
        warnings.append(f"the file contains {len(metadata)} of {layout.num_prompts} prompts")
    if missing := [tag for tag in GENEVAL_TAGS if tag not in by_tag]:
        warnings.append(f"no image of {', '.join(missing)}: the overall score omits them")
    known = [tag for tag in GENEVAL_TAGS if tag in by_tag]
    others = [tag for tag in by_tag if tag not in GENEVAL_TAGS]
    scores = {tag: fmean(by_tag[tag]) for tag in (*known, *others)}
    return Graded(
        protocol=protocol,
        overall=fmean(scores.values()),
        categories=scores,
        num_graded=num_graded,
        num_expected=layout.num_prompts * layout.num_images,
        warnings=tuple(warnings),
    )


def recorded_benchmark(path: Any) -> str | None:
    """Return the benchmark that an image was sampled for, or None if it is unreadable."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return image.info.get("benchmark")
    except (OSError, AttributeError, ValueError, SyntaxError):
        return None


def read_dpg(paths: Sequence[str], prompts: Sequence[str] | None) -> Graded:
    """Read the text file of compute_dpg_bench.py.

    An image's line has its path, the scores of its crops, and their mean, separated by ", ". The
    scores by category, in percent, and "DPG-Bench score: ..." follow these lines.
    """
    path = single(paths)
    images, categories, reported, in_summary, warnings = {}, {}, None, False, []
    crops = set()
    for number, line in enumerate(text_of(path, "--graded").splitlines(), 1):
        where = f"{path}:{number}"
        if line.startswith("Model: "):
            in_summary = True
        elif not in_summary:
            name, scores = dpg_image(line, where)
            if name in images:
                raise InputError(f"{where}: duplicate image {name}. Grade with a new --res-path.")
            images[name] = scores[-1]
            crops.add(len(scores) - 1)
        elif match := re.fullmatch(r"\t(.+): ([0-9.]+|nan)", line):
            categories[match[1]] = float(match[2])
        elif match := re.fullmatch(r"DPG-Bench score: ([0-9.]+)", line):
            reported = float(match[1])
    if not images:
        raise InputError(f"{path} contains no images. Give the --res-path of compute_dpg_bench.py.")
    overall = 100 * fmean(images.values())
    if reported is None:
        warnings.append("the summary with the categories is missing: the grader was interrupted")
    elif not math.isclose(reported, overall, rel_tol=0, abs_tol=1e-6):
        warnings.append(
            f"the file reports {reported:.2f}, but its images have a mean of {overall:.2f}: "
            "grade again with a new --res-path"
        )
    if crops != {LAYOUTS["dpg"].num_images}:
        warnings.append(
            f"{' or '.join(map(str, sorted(crops)))} images per prompt, but the benchmark has 4: "
            "grade with --pic-num 4"
        )
    return Graded(
        protocol="dpg",
        overall=overall,
        categories=categories,
        num_graded=len(images),
        num_expected=LAYOUTS["dpg"].num_prompts,
        warnings=tuple(warnings),
    )


def dpg_image(line: str, where: str) -> tuple[str, list[float]]:
    """Return the path and the numbers of an image's line. The last number is the mean."""
    name, *texts = line.split(", ")
    # A folder may have ", " in its name.
    while texts and not is_numeral(texts[0]):
        name += f", {texts.pop(0)}"
    scores = [float(text) for text in texts if is_numeral(text)]
    if len(scores) < 2 or len(scores) != len(texts):
        raise InputError(
            f"{where}: expected an image's path, its scores and their mean, got {line[:60]!r}. "
            "Give the --res-path itself, not the file that ends in _detail.txt."
        )
    return name, scores


def read_wise(paths: Sequence[str], prompts: Sequence[str] | None) -> Graded:
    """Read one or more score files of one of the two protocols.

    The overall score is a weighted mean of six categories, which follow from the prompt_id. As in
    the official scripts, it exists only if all 1000 prompts are graded.
    """
    lines = [found for path in paths for found in json_lines(path)]
    has_score = {"score" in entry for _, entry in lines}
    if len(has_score) > 1:
        raise InputError(
            "--graded: got files of the legacy and of the verified protocol. Give those of one."
        )
    protocol = "wise verified" if has_score.pop() else "wise legacy"
    rules = WISE[protocol]
    by_category = {name: [] for name in rules.categories}
    seen = {}
    for where, entry in lines:
        prompt_id = entry.get("prompt_id")
        if type(prompt_id) is not int or not 1 <= prompt_id <= 1000:
            raise InputError(
                f"{where}: prompt_id must be an integer from 1 to 1000, got {prompt_id!r}"
            )
        if prompt_id in seen:
            raise InputError(
                f"{where}: duplicate prompt {prompt_id}, first in {seen[prompt_id]}. "
                "Give each score file once."
            )
        seen[prompt_id] = where
        wrong = [key for key in rules.keys if not is_number(entry.get(key))]
        if wrong or (protocol == "wise verified" and entry["score"] not in (0, 1)):
            wanted = "0 or 1" if protocol == "wise verified" else "a number from 0 to 2"
            key = (wrong or ["score"])[0]
            raise InputError(
                f"{where}: {key!r} must be {wanted}, got {entry.get(key)!r}. Give the files of "
                "--result_scores, which end in .jsonl."
            )
        category = next(name for name, (last, _) in rules.categories.items() if prompt_id <= last)
        by_category[category].append(rules.score(entry))
    categories = {name: fmean(scores) for name, scores in by_category.items() if scores}
    overall, warnings = None, ()
    if len(seen) == LAYOUTS["wise"].num_prompts:
        overall = sum(weight * categories[name] for name, (_, weight) in rules.categories.items())
    else:
        warnings = ("the official script prints an overall score only for all 1000 prompts",)
    return Graded(
        protocol=protocol,
        overall=overall,
        categories=categories,
        num_graded=len(seen),
        num_expected=LAYOUTS["wise"].num_prompts,
        warnings=warnings,
    )


def read_imgedit(paths: Sequence[str], prompts: Sequence[str] | None) -> Graded:
    """Read result.json, average_score.json or typescore.json.

    The official scripts print means by type of edit and no overall score. Here, the overall score
    is the mean over all images, as in ByteDance-Seed/Bagel's version of step 2. `prompts` is
    basic_edit.json, which contains the type of each edit.
    """
    averages, types, warnings = {}, {}, []
    for path in paths:
        entries = parse(text_of(path, "--graded"), path)
        if not isinstance(entries, dict) or not entries:
            raise InputError(
                f"{path}: expected a JSON object. Give result.json, average_score.json or "
                "typescore.json."
            )
        if set(entries) <= {*IMGEDIT_TYPES, "overall"}:
            if wrong := [name for name, score in entries.items() if not is_number(score)]:
                raise InputError(
                    f"{path}: the score of {wrong[0]} must be a number, got {entries[wrong[0]]!r}"
                )
            types |= entries
            continue
        answers = {key: imgedit_score(entry, f"{path}: {key}") for key, entry in entries.items()}
        averages |= {key: score for key, score in answers.items() if score is not None}
        if omitted := sum(score is None for score in answers.values()):
            warnings.append(
                f"{omitted} entries contain no score and are omitted; step 1 stops at an entry "
                "with an error, so grade these again"
            )
    if averages and prompts:
        edits = parse(text_of(prompts[0]), prompts[0])
        if not isinstance(edits, dict):
            raise InputError(f"--prompts {prompts[0]}: expected basic_edit.json")
        by_type = {}
        for key, score in averages.items():
            edit = edits.get(key)
            if not isinstance(edit, dict) or "edit_type" not in edit:
                raise InputError(f"--prompts {prompts[0]}: edit {key} is missing or has no type")
            by_type.setdefault(edit["edit_type"], []).append(score)
        types = {name: round(sum(scores) / len(scores), 2) for name, scores in by_type.items()}
    elif averages and not types:
        warnings.append("give --prompts basic_edit.json for the scores by type of edit")
    overall = types.pop("overall", None)
    if averages:
        overall = fmean(averages.values())
    elif overall is None and set(types) == set(IMGEDIT_TYPES):
        weights = [IMGEDIT_TYPES[name] for name in types]
        overall = fmean(types.values(), weights)
        warnings.append("overall is the mean of the types, weighted by their numbers of images")
    order = [*IMGEDIT_TYPES, *(name for name in types if name not in IMGEDIT_TYPES)]
    return Graded(
        protocol="imgedit",
        overall=overall,
        categories={name: types[name] for name in order if name in types},
        num_graded=len(averages) if averages else None,
        num_expected=LAYOUTS["imgedit"].num_prompts,
        warnings=tuple(warnings),
    )


def imgedit_score(entry: Any, where: str) -> float | None:
    """Return the mean score of the grading model's answer like step 1, or None without scores."""
    if isinstance(entry, dict):
        return None
    if is_number(entry):
        return float(entry)
    if not isinstance(entry, str):
        raise InputError(f"{where}: expected the grading model's answer or a number, got {entry!r}")
    parts = [line.strip().split(": ") for line in entry.splitlines()]
    scores = [int(part[1]) for part in parts if len(part) == 2 and part[1].isdigit()]
    return round(sum(scores) / len(scores), 2) if scores else None


def read_gedit(paths: Sequence[str], prompts: Sequence[str] | None) -> Graded:
    """Read the combined CSV of test_gedit_score.py, or those of the eleven tasks.

    An image's score is the geometric mean of semantics and quality. The overall score is the mean
    over the tasks.
    """
    by_task, languages, seen = {task: [] for task in GEDIT_TASKS}, set(), set()
    for path in paths:
        rows = csv.DictReader(io.StringIO(text_of(path, "--graded"), newline=""))
        for row, line in enumerate(rows, 2):
            where = f"{path}:{row}"
            task = re.search(r"/fullset/([^/]+)/[^/]+/[^/]+$", line.get("edited_image") or "")
            semantics, quality = (line.get(key) for key in ("sementics_score", "quality_score"))
            if not task or task[1] not in by_task or not all(map(is_numeral, (semantics, quality))):
                raise InputError(
                    f"{where}: expected edited_image, sementics_score and quality_score as "
                    "test_gedit_score.py writes them. Give its *_gpt_score.csv."
                )
            if line["edited_image"] in seen:
                raise InputError(
                    f"{where}: duplicate image {line['edited_image']}. Give only the combined csv."
                )
            seen.add(line["edited_image"])
            languages.add(line.get("instruction_language"))
            by_task[task[1]].append((float(semantics), float(quality)))
    if len(languages) != 1:
        raise InputError(
            f"--graded: expected rows of one language, got {len(languages)}. "
            "Grade each language in a separate folder."
        )
    scored = {task: scores for task, scores in by_task.items() if scores}
    categories = {
        task: fmean(math.sqrt(semantics * quality) for semantics, quality in scores)
        for task, scores in scored.items()
    }
    for name, column in (("semantic consistency", 0), ("perceptual quality", 1)):
        categories[name] = fmean(
            fmean(score[column] for score in scores) for scores in scored.values()
        )
    missing = [task for task in GEDIT_TASKS if task not in scored]
    return Graded(
        protocol=f"gedit {languages.pop()}",
        overall=None if missing else fmean(categories[task] for task in GEDIT_TASKS),
        categories=categories,
        num_graded=len(seen),
        num_expected=LAYOUTS["gedit"].num_prompts,
        warnings=(f"no image of {', '.join(missing)}, so no overall score",) if missing else (),
    )


# {benchmark: reader of (result files, prompt files)}
READERS: dict[str, Callable[[Sequence[str], Sequence[str] | None], Graded]] = {
    "geneval": read_geneval,
    "dpg": read_dpg,
    "wise": read_wise,
    "imgedit": read_imgedit,
    "gedit": read_gedit,
}


def load_targets() -> dict[str, Any]:
    """Return the paper's figures, from targets.yaml."""
    return yaml.safe_load(TARGETS.read_text(encoding="utf-8"))


def compare(
    bench: str,
    paths: Sequence[str],
    *,
    model: str | None = None,
    prompts: Sequence[str] | None = None,
) -> str:
    """Return a table of a grader's scores and the paper's.

    Args:
        bench: name of the benchmark, a key of LAYOUTS.
        paths: result files of its grader.
        model: model of targets.yaml to compare with, by default all that have a score.
        prompts: basic_edit.json, for imgedit.

    Raises:
        InputError: if a file is not in the grader's format, or the model is unknown.
    """
    targets = load_targets()
    if model is not None and model not in targets["models"]:
        raise InputError(f"--model must be one of {', '.join(targets['models'])}, got {model!r}")
    graded = READERS[bench](paths, prompts)
    notes = list(graded.warnings)
    title = "geneval, official prompts" if graded.protocol == "geneval" else graded.protocol
    if graded.num_graded is not None:
        title += f": {graded.num_graded:,} of {graded.num_expected:,} entries"
        if graded.num_graded < graded.num_expected:
            notes.insert(0, "entries are missing, so these are not scores of the whole benchmark")
        elif graded.num_graded > graded.num_expected:
            notes.insert(0, "the files have more entries than the benchmark")
    paper = paper_scores(targets, bench, model)
    protocols = targets["protocols"][bench]
    comparable = graded.protocol in protocols["names"]
    if paper and protocols["names"] != [graded.protocol]:
        notes.append(protocols["note"])
    if not paper:
        notes.append(f"the paper has no {bench} score" + (f" of {model}" if model else ""))
    # The difference is shown for a single score of the same protocol.
    compared = len(paper) == 1 and comparable and graded.overall is not None

    digits = 2 if bench in ("dpg", "imgedit") else 3
    rows = [["", "yours", *paper, *(["difference"] if compared else [])]]
    overall = "-" if graded.overall is None else f"{graded.overall:.{digits}f}"
    rows.append(["overall", overall, *(f"{score:.2f}" for score in paper.values())])
    if compared:
        (score,) = paper.values()
        # The difference of the printed scores. Adding 0.0 turns -0.0 into 0.0.
        difference = round(round(graded.overall, digits) - score, digits) + 0.0
        rows[-1].append(f"{difference:+.{digits}f}")
    for name, score in graded.categories.items():
        rows.append([f"  {name}", f"{score:.{digits}f}"])
    sources = {targets["models"][name]["source"] for name in paper if name in targets["models"]}
    if bench == "imgedit":
        sources = {targets["imgedit"]["source"]}
    lines = [title, *table(rows), *(f"warning: {note}" for note in notes)]
    if sources:
        sources = {source.removesuffix(" (place not recorded)") for source in sources}
        lines.append(f"paper: arXiv 2603.16139, {'; '.join(sorted(sources))}")
    return "\n".join(lines)


def paper_scores(targets: dict[str, Any], bench: str, model: str | None) -> dict[str, float]:
    """Return {column of the table: the paper's score}.

    For ImgEdit, the paper does not name the model: its two scores differ in the pre-training.
    """
    if bench == "imgedit":
        return {f"{kind} pre-training": targets["imgedit"][kind] for kind in ("image", "pair")}
    models = targets["models"] if model is None else [model]
    scores = {name: targets["models"][name].get(bench) for name in models}
    return {name: score for name, score in scores.items() if score is not None}


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the rows as text, with the first column aligned left and the others right."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    for row in rows:
        first, *others = (
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=False))
        )
        yield "  ".join([first, *others]).rstrip()


def single(paths: Sequence[str]) -> str:
    """Return the only path. Raises InputError if there are several."""
    if len(paths) > 1:
        raise InputError(f"--graded: got {len(paths)} files, but this benchmark has one")
    return paths[0]


def json_lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, object) for each line of a file. Raises InputError for other content."""
    lines = text_of(path, "--graded").removesuffix("\n").split("\n")
    if not any(line.strip() for line in lines):
        raise InputError(f"{path} is empty. Run the grader again.")
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        entry = parse(line, where)
        if not isinstance(entry, dict):
            raise InputError(f"{where}: expected an object on each line, got {line[:60]!r}")
        yield where, entry


def parse(text: str, where: str) -> Any:
    """Parse JSON. Raises InputError, which names the place `where`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where} is not JSON ({error}). Give the file as the grader wrote it."
        ) from error


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a finite number."""
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def is_numeral(text: str | None) -> bool:
    """Return whether a text is a finite number."""
    try:
        return text is not None and math.isfinite(float(text))
    except ValueError:
        return False
