"""Folder layouts of five benchmarks: prompt files, the files a grader expects, its command.

Everything here follows the sources of the official graders at these commits: djghosh13/geneval
af4902f, TencentQQGYLab/ELLA 3c228f1 (DPG-Bench), PKU-YuanGroup/WISE eb51174, PKU-YuanGroup/ImgEdit
547185d, stepfun-ai/Step1X-Edit 570eba6 (GEdit-Bench). GenEval's rewritten prompts have the format
of ByteDance-Seed/Bagel 056b5fd. Users provide the prompt files.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

from PIL import Image

from iomm.config import InputError


@dataclass(frozen=True, kw_only=True)
class Item:
    """One prompt of a benchmark."""

    # Name of its files or folder.
    id: str
    prompt: str
    # File of the picture to edit.
    image: Path | None = None
    # Files that accompany the images: (path in the folder, bytes or the file to copy).
    files: tuple[tuple[str, bytes | Path], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A benchmark. A file of several images holds them as the quarters of a grid, row by row."""

    # Prompts of the whole benchmark.
    num_prompts: int
    # Images per prompt.
    num_images: int = 1
    # Maximum number of prompt files.
    max_files: int = 1
    # (prompt files, origin_img_root) -> (items, name of the benchmark including its protocol)
    read: Callable[[Sequence[str], str | None], tuple[list[Item], str]]
    # (item, images per prompt) -> {path in the folder: indices of the images in that file}
    pictures: Callable[[Item, int], dict[str, tuple[int, ...]]] = lambda item, num: {
        f"{item.id}.png": tuple(range(num))
    }
    # Patterns of files that the grader writes into the folder and later ignores.
    grader_outputs: tuple[str, ...] = ()
    # Pattern of the ids, from which file names are made. DPG-Bench cuts a name at its first dot.
    id_pattern: str = r"[A-Za-z0-9_-]+"


def read_geneval(paths: Sequence[str], root: str | None) -> tuple[list[Item], str]:
    """Read evaluation_metadata.jsonl, one JSON object per line.

    Line N belongs to folder N, which receives an unchanged copy of it.
    """
    lines = text_of(paths[0]).removesuffix("\n").split("\n")
    items = []
    for number, line in enumerate(lines):
        where, name = f"{paths[0]}:{number + 1}", f"{number:05d}"
        files = ((f"{name}/metadata.jsonl", line.encode() + b"\n"),)
        items.append(Item(id=name, prompt=field(parse(line, where), "prompt", where), files=files))
    return geneval_protocol(items, paths)


def geneval_protocol(items: list[Item], paths: Sequence[str]) -> tuple[list[Item], str]:
    """Return the items with the prompts of their protocol, and the protocol's name.

    A second file contains rewritten prompts in the format of BAGEL's
    evaluation_metadata_long.jsonl: the official lines with another "prompt". Images are sampled
    from these prompts. The grader still receives the official lines of the first file.

    Raises:
        InputError: if the first file is not the official one, or the second does not match it.
    """
    official = all(item.prompt.startswith("a photo of ") for item in items)
    if len(paths) == 1:
        return items, "geneval" if official else "geneval, other prompts"
    if not official:
        raise InputError(
            f"--prompts {paths[0]}: the prompts are not GenEval's (a photo of ...). "
            "Give the official evaluation_metadata.jsonl first, then the rewritten prompts."
        )
    lines, rewritten = text_of(paths[1]).removesuffix("\n").split("\n"), []
    if len(lines) != len(items):
        raise InputError(
            f"--prompts {paths[1]}: expected {len(items)} lines, one for each official prompt, "
            f"got {len(lines)}"
        )
    for number, (item, line) in enumerate(zip(items, lines, strict=True)):
        where = f"{paths[1]}:{number + 1}"
        entry, expected = parse(line, where), json.loads(item.files[0][1])
        prompt = field(entry, "prompt", where)
        for key, value in entry.items():
            if key != "prompt" and value != expected.get(key):
                raise InputError(
                    f"--prompts {where}: {key!r} differs from the official line. The lines must "
                    "be in the official order and differ from it only in their prompt."
                )
        rewritten.append(replace(item, prompt=prompt))
    return rewritten, "geneval, rewritten prompts"


def read_dpg(paths: Sequence[str], root: str | None) -> tuple[list[Item], str]:
    """Read a folder of <item_id>.txt, or dpg_bench.csv, which has one row per question."""
    path = Path(paths[0])
    if path.is_dir():
        texts = {file.stem: text_of(file) for file in sorted(path.glob("*.txt"))}
    else:
        rows = csv.DictReader(io.StringIO(text_of(path), newline=""))
        texts = {}
        if not {"item_id", "text"} <= set(rows.fieldnames or ()):
            raise InputError(
                f"--prompts {path}: expected a folder of <item_id>.txt, "
                "or a csv with the columns item_id and text"
            )
        for row in rows:
            if texts.setdefault(row["item_id"], row["text"]) != row["text"]:
                raise InputError(f"--prompts {path}: item {row['item_id']} has two different texts")
    return [Item(id=name, prompt=text.strip()) for name, text in texts.items()], "dpg"


def read_wise(paths: Sequence[str], root: str | None) -> tuple[list[Item], str]:
    """Read one or more lists of objects with prompt_id and Prompt.

    The two protocols use different ranges of prompt ids. Prompt 641 therefore identifies the
    protocol of a complete set: its category is Space in the legacy files and Biology in the
    verified ones.
    """
    items, category = [], None
    for path in paths:
        entries = parse(text_of(path), path)
        for entry in entries if isinstance(entries, list) else [entries]:
            prompt, number = field(entry, "Prompt", path), entry.get("prompt_id")
            if type(number) is not int or not 1 <= number <= 1000:
                raise InputError(
                    f"--prompts {path}: prompt_id must be an integer from 1 to 1000, got {number!r}"
                )
            items.append(Item(id=str(number), prompt=prompt))
            category = entry.get("Category") if number == 641 else category
    protocol = {"Space": "legacy", "Biology": "verified"}.get(category, "of unknown protocol")
    if any("rewrite" in Path(path).stem for path in paths):
        protocol += ", rewritten prompts"
    return items, f"wise {protocol}"


def read_imgedit(paths: Sequence[str], root: str | None) -> tuple[list[Item], str]:
    """Read basic_edit.json, {key: {id, prompt, edit_type}}.

    The picture to edit is root/id. With root None the pictures are not needed.
    """
    entries = parse(text_of(paths[0]), paths[0])
    items = []
    for key, entry in entries.items() if isinstance(entries, dict) else [(None, entries)]:
        prompt, name = field(entry, "prompt", paths[0]), field(entry, "id", paths[0])
        items.append(
            Item(id=str(key), prompt=prompt, image=None if root is None else Path(root) / name)
        )
    missing = [item.image for item in items if item.image is not None and not item.image.is_file()]
    if missing:
        raise InputError(
            f"--origin-img-root {root}: {len(missing)} of {len(items)} pictures are missing, "
            f"the first is {missing[0]}"
        )
    return items, "imgedit"


# In the order of GEdit-Bench's scripts.
GEDIT_TASKS = (
    "background_change",
    "color_alter",
    "material_alter",
    "motion_change",
    "ps_human",
    "style_change",
    "subject-add",
    "subject-remove",
    "subject-replace",
    "text_change",
    "tone_transfer",
)


def read_gedit(paths: Sequence[str], root: str | None) -> tuple[list[Item], str]:
    """Read one language of GEdit-Bench: JSON lines and the PNGs that they name.

    engine/README.md shows how to export them. A line has the dataset's task_type, key, instruction
    and instruction_language. Its `image` is the path of the input_image, relative to the file. The
    grader expects a copy of that image in the folder.
    """
    items, languages = [], set()
    for number, line in enumerate(text_of(paths[0]).removesuffix("\n").split("\n")):
        where = f"{paths[0]}:{number + 1}"
        entry = parse(line, where)
        task, language, key = (
            field(entry, name, where) for name in ("task_type", "instruction_language", "key")
        )
        languages.add(language)
        if task not in GEDIT_TASKS or language not in ("en", "cn"):
            raise InputError(
                f"--prompts {where}: expected a task_type of GEdit-Bench and the language en or "
                f"cn, got {task!r} and {language!r}"
            )
        image = Path(paths[0]).parent / field(entry, "image", where)
        try:
            with Image.open(image) as picture:
                found = f"{picture.format} in {picture.mode}"
        except Exception as error:
            # Pillow raises exceptions of many types for a damaged file.
            raise InputError(f"--prompts {where}: {image} cannot be read: {error}") from error
        if found != "PNG in RGB":
            # The grader saves it as JPEG. For RGBA this fails and is retried 10,000 times.
            raise InputError(f"--prompts {where}: {image} must be a PNG in RGB, got {found}")
        name = f"{task}/{language}/{key}"
        items.append(
            Item(
                id=name,
                prompt=field(entry, "instruction", where),
                image=image,
                files=((f"fullset/{name}_SRCIMG.png", image),),
            )
        )
    if len(languages) > 1:
        raise InputError(
            f"--prompts {paths[0]} contains two languages. "
            "Give one file and one folder for each language."
        )
    return items, f"gedit {languages.pop()}"


LAYOUTS = {
    "geneval": Layout(
        num_prompts=553,
        num_images=4,
        max_files=2,
        read=read_geneval,
        grader_outputs=("*/grid.png",),
        pictures=lambda item, num: {f"{item.id}/samples/{k:04d}.png": (k,) for k in range(num)},
    ),
    "dpg": Layout(num_prompts=1065, num_images=4, read=read_dpg),
    "wise": Layout(num_prompts=1000, max_files=3, read=read_wise, grader_outputs=("Results*",)),
    "imgedit": Layout(num_prompts=737, read=read_imgedit, grader_outputs=("result.json",)),
    # One language.
    "gedit": Layout(
        num_prompts=606,
        read=read_gedit,
        grader_outputs=("gpt4o*", "qwen25vl*"),
        pictures=lambda item, num: {f"fullset/{item.id}.png": tuple(range(num))},
        id_pattern=r"[a-z_-]+/(en|cn)/[A-Za-z0-9_-]+",
    ),
}

WISE_NOTES = """
The verified protocol (200 prompts changed, scores of 0 or 1 by Qwen) and the legacy one (three
scales of 0 to 2 by GPT-4o, different ranges of ids) are not comparable: report which one you used.
Both continue from existing results: delete these after sampling again. A missing picture causes one
line of warning, and then no score is printed."""

# The commands of the official graders, and the pitfalls about which they print nothing. Fields are
# quoted for a shell.
NEXT = {
    "geneval": """\
in a checkout of github.com/djghosh13/geneval, on a GPU:
  python evaluation/evaluate_images.py {out} --outfile {results}.jsonl \\
    --model-path <OBJECT_DETECTOR_FOLDER>
  python evaluation/summary_scores.py {results}.jsonl
It scores the files that it finds: a missing folder or picture is left out silently, and every
samples/<digits>.png counts.
Protocol: GenEval with {variant}. Report it with the score: rewritten and official prompts are not
comparable.""",
    "dpg": """\
in a checkout of github.com/TencentQQGYLab/ELLA (8 GPUs; on one, --num_processes 1 and no
--multi_gpu):
  PYTHONHASHSEED=0 accelerate launch --num_machines 1 --num_processes 8 --multi_gpu \\
    --mixed_precision fp16 dpg_bench/compute_dpg_bench.py --image-root-path {out} \\
    --resolution {side} --pic-num 4 --vqa-model mplug --res-path {results}.txt
Its dist_eval.sh does not pass --res-path: the results then go into the picture folder and count as
pictures in later runs. Without PYTHONHASHSEED=0 each process visits the categories in a different
order, which mixes up their scores. Category scores use only the last of the four images (ELLA issue
60), and the first question of the csv is skipped (issue 61). Published scores have both defects
too. A picture that is missing or fails is left out of the mean, with one line of output.""",
    "wise verified": """\
in a checkout of github.com/PKU-YuanGroup/WISE, with vLLM serving the grading model:
  IMAGE_DIR={out} VLLM_API_BASE=http://127.0.0.1:8000/v1 JUDGE_MODEL=Qwen3.5-35B-A3B \\
    bash eval_qwen.sh
Protocol: verified."""
    + WISE_NOTES,
    "wise legacy": """\
in WISE_legacy of a checkout of github.com/PKU-YuanGroup/WISE (result paths must be absolute, as
they are here):
  for part in cultural_common_sense natural_science spatio-temporal_reasoning; do
    python gpt_eval.py --json_path data/${{part}}{rewrite}.json --image_dir {out} \\
      --output_dir {results} --max_workers 96 --result_full {results}/$part.json \\
      --result_scores {results}/$part.jsonl --model gpt-4o-2024-05-13 --api_key KEY; done
  python Calculate.py {results}/*.jsonl --category all
Protocol: legacy."""
    + WISE_NOTES,
    "wise of unknown protocol": (
        "find out the WISE protocol: these files lack prompt 641, which would identify it."
    )
    + WISE_NOTES,
    "imgedit": """\
in Benchmark/Basic of a checkout of github.com/PKU-YuanGroup/ImgEdit, after writing key and url into
basic_bench.py:
  python basic_bench.py --result_img_folder {out} --edit_json {prompts} --origin_img_root {root} \\
    --num_processes 32 --prompts_json prompts.json
  python step1_get_avgscore.py --result_json {out}/result.json \\
    --average_score_json average_score.json
  python step2_typescore.py --average_score_json average_score.json --basic_edit {prompts} \\
    --typescore_json typescore.json
The flag of basic_bench.py is --edit_json. It rejects the --basic_edit of its readme, which step 2
accepts. A missing picture becomes an error entry in result.json, at which step 1 stops.""",
    "gedit": """\
in GEdit-Bench of a checkout of github.com/stepfun-ai/Step1X-Edit, with the key in secret_t2.env:
  sed -i 's|("stepfun-ai/GEdit-Bench")|("stepfun-ai/GEdit-Bench")["train"]|' test_gedit_score.py
  sed -i 's|"en", "zh"|"en", "cn"|' calculate_statistics.py
  python test_gedit_score.py --save_path {parent} --model_name {folder} --backbone gpt4o
  python calculate_statistics.py --save_path {parent} --model_name {folder} --backbone gpt4o \\
    --language {language}
Without the first sed the script iterates over the names of the splits and fails. Without the second
it finds no language for rows in cn. A missing picture is skipped with one line of output. Each
picture is stretched to the size of its source image before grading. Existing results are kept:
remove {out}/gpt4o after generating again. GPT-4.1 varies by about 0.1 between runs and has changed
over the months (issue 74 of Step1X-Edit): report the grading model and the date.""",
}

# Benchmark and protocol -> what `iomm evaluate BENCHMARK --graded` reads after these commands.
RESULT_FILES = {
    "geneval": "{results}.jsonl",
    "dpg": "{results}.txt",
    "wise verified": "{out}/Results-qwen35/*_scores_results.jsonl",
    "wise legacy": "{results}/*.jsonl",
    "imgedit": "average_score.json --prompts {prompts}",
    "gedit": "{out}/gpt4o/eval_results_new/{folder}_combined_gpt_score.csv",
}


def next_step(name: str, out: Path, side: int, paths: Sequence[str], root: str | None) -> str:
    """Return the next commands to type, with notes on the grader.

    Args:
        name: name of the benchmark, as read_items returns it.
        out: folder of the images.
        side: side of an image in pixels.
        paths: prompt files.
        root: folder of the pictures to edit, if known.
    """
    name, _, variant = name.partition(", ")
    language = ""
    if name.startswith("gedit"):
        # The commands for both languages are the same.
        name, _, language = name.partition(" ")
    prompts, root = (
        quote(str(Path(path).resolve())) if path else "<origin_img_root>"
        for path in (paths[0], root)
    )
    fields = dict(
        out=quote(str(out)),
        parent=quote(str(Path(out).parent)),
        folder=quote(Path(out).name),
        results=quote(f"{out}-results"),
        side=side,
        prompts=prompts,
        root=root,
        rewrite="_rewrite" if variant else "",
        variant=variant or "its official prompts",
        language=language,
    )
    text = "Next: " + NEXT[name].format(**fields)
    if name in RESULT_FILES:
        text += (
            "\nTo compare the scores with the paper's:\n"
            f"  iomm evaluate {name.split()[0]} --graded {RESULT_FILES[name].format(**fields)}"
        )
    return text


def read_items(layout: Layout, paths: Sequence[str], root: str | None) -> tuple[list[Item], str]:
    """Return the items of the prompt files and the name of the benchmark, including its protocol.

    Raises:
        InputError: if the files are not in the benchmark's format.
    """
    if len(paths) > layout.max_files:
        raise InputError(
            f"--prompts: got {len(paths)} files, but this benchmark has at most {layout.max_files}"
        )
    items, name = layout.read(paths, root)
    if not items:
        raise InputError(f"--prompts {paths[0]} contains no prompts")
    for item in items:
        try:
            item.prompt.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"--prompts {paths[0]}: the prompt {item.prompt!r} is not valid Unicode text"
            ) from None
        if not re.fullmatch(layout.id_pattern, item.id):
            raise InputError(
                f"--prompts {paths[0]}: the id {item.id!r} cannot be a file name, "
                "use only letters, digits, _ and -"
            )
    for item_id, count in Counter(item.id for item in items).items():
        if count > 1:
            raise InputError(f"--prompts {paths[0]}: duplicate prompt id {item_id!r}")
    return items, name


def text_of(path: str | Path, option: str = "--prompts") -> str:
    """Return the text of an option's file, without a byte order mark. Raises InputError."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{option} {path} cannot be read: {error}") from error


def parse(text: str, where: str | Path) -> Any:
    """Parse JSON. Raises InputError, which names the place `where`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--prompts {where} is not JSON: {error}") from error


def field(entry: Any, key: str, where: str | Path) -> str:
    """Return a required text of a JSON object. Raises InputError, which names the place `where`."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise InputError(
            f"--prompts {where}: expected an object with a text {key!r}, got {str(entry)[:60]}"
        )
    return value
