"""Five benchmarks as layouts of a folder: their prompt files, the files that the official grader wants, its command.

Everything here was read in the graders' own sources, at these commits: djghosh13/geneval af4902f, TencentQQGYLab/ELLA
3c228f1 (DPG-Bench), PKU-YuanGroup/WISE eb51174, PKU-YuanGroup/ImgEdit 547185d, stepfun-ai/Step1X-Edit 570eba6
(GEdit-Bench); GenEval's rewritten prompts in ByteDance-Seed/Bagel 056b5fd. Prompt files are the user's.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

from PIL import Image

from iomm.config import InputError


@dataclass(frozen=True, kw_only=True)
class Item:
    """One prompt. id: its name in the folder; image: file of the picture to edit; files: text files that go with it."""

    id: str
    prompt: str
    image: Path | None = None
    # (path in the folder, its bytes or the file to copy)
    files: tuple = ()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A benchmark. Where a file takes several images, they are the quarters of a grid, row by row."""

    # Of the whole benchmark.
    num_prompts: int
    # A prompt
    num_images: int = 1
    # Prompt files
    max_files: int = 1
    # (prompt files, origin_img_root) -> (items, name of the benchmark with its protocol)
    read: Callable
    # -> {path in the folder: image indices}
    pictures: Callable = lambda item, num: {f"{item.id}.png": tuple(range(num))}
    # Patterns of what a grader leaves in the folder and does not stumble over.
    graders_own: tuple = ()
    # Of an item's id, from which file names are made. DPG-Bench cuts a name at its first dot.
    id_pattern: str = r"[A-Za-z0-9_-]+"


def read_geneval(paths, root):
    """evaluation_metadata.jsonl, an object a line: line N belongs to folder N, which gets it back as it is."""
    lines, items = text_of(paths[0]).removesuffix("\n").split("\n"), []
    for number, line in enumerate(lines):
        where, name = f"{paths[0]}:{number + 1}", f"{number:05d}"
        files = ((f"{name}/metadata.jsonl", line.encode() + b"\n"),)
        items.append(Item(id=name, prompt=field(parse(line, where), "prompt", where), files=files))
    return geneval_protocol(items, paths)


def geneval_protocol(items: list[Item], paths: list[str]) -> tuple[list[Item], str]:
    """Return the items with the prompts of their protocol, and its name.

    A second file holds rewritten prompts, as BAGEL's evaluation_metadata_long.jsonl does: the
    official lines with another "prompt". Images are generated from these, and the grader still
    receives the official lines of the first file.
    """
    official = all(item.prompt.startswith("a photo of ") for item in items)
    if len(paths) == 1:
        return items, "geneval" if official else "geneval, other prompts"
    if not official:
        raise InputError(
            f"--prompts {paths[0]}: the prompts are not GenEval's own (a photo of ...); "
            "give the official evaluation_metadata.jsonl first, then the rewritten prompts"
        )
    lines, rewritten = text_of(paths[1]).removesuffix("\n").split("\n"), []
    if len(lines) != len(items):
        raise InputError(
            f"--prompts {paths[1]}: expected a line for each of the {len(items)} official prompts, "
            f"got {len(lines)}"
        )
    for number, (item, line) in enumerate(zip(items, lines, strict=True)):
        where = f"{paths[1]}:{number + 1}"
        entry, own = parse(line, where), json.loads(item.files[0][1])
        prompt = field(entry, "prompt", where)
        if different := [key for key in entry if key != "prompt" and entry[key] != own.get(key)]:
            raise InputError(
                f"--prompts {where}: {different[0]!r} differs from the official line; "
                "the lines must be in the official order and differ only in their prompt"
            )
        rewritten.append(replace(item, prompt=prompt))
    return rewritten, "geneval, rewritten prompts"


def read_dpg(paths, root):
    """A folder of <item_id>.txt, or dpg_bench.csv, which repeats an item's text for every question."""
    path = Path(paths[0])
    if path.is_dir():
        texts = {file.stem: text_of(file) for file in sorted(path.glob("*.txt"))}
    else:
        rows, texts = csv.DictReader(io.StringIO(text_of(path), newline="")), {}
        if not {"item_id", "text"} <= set(rows.fieldnames or ()):
            raise InputError(
                f"--prompts {path}: wanted a folder of <item_id>.txt, or a csv with the columns item_id and text"
            )
        for row in rows:
            if texts.setdefault(row["item_id"], row["text"]) != row["text"]:
                raise InputError(f"--prompts {path}: item {row['item_id']} has two texts")
    return [Item(id=name, prompt=text.strip()) for name, text in texts.items()], "dpg"


def read_wise(paths, root):
    """Lists of objects with prompt_id and Prompt, one or several files. Which protocol they are of, a complete set says
    itself: prompt 641 is of Space in the legacy files, of Biology in the verified ones, whose ranges are others.
    """
    items, category = [], None
    for path in paths:
        entries = parse(text_of(path), path)
        for entry in entries if isinstance(entries, list) else [entries]:
            prompt, number = field(entry, "Prompt", path), entry.get("prompt_id")
            if type(number) is not int or not 1 <= number <= 1000:
                raise InputError(
                    f"--prompts {path}: prompt_id must be from 1 to 1000, got {number!r}"
                )
            items.append(Item(id=str(number), prompt=prompt))
            category = entry.get("Category") if number == 641 else category
    protocol = {"Space": "legacy", "Biology": "verified"}.get(category, "of unknown protocol")
    protocol += ", rewritten prompts" if any("rewrite" in Path(path).stem for path in paths) else ""
    return items, f"wise {protocol}"


def read_imgedit(paths, root):
    """basic_edit.json, {key: {id, prompt, edit_type}}; the picture to edit is origin_img_root/id. root None: not needed."""
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
            f"--origin-img-root {root}: {len(missing)} of {len(items)} pictures are not there, {missing[0]} first"
        )
    return items, "imgedit"


# As its scripts list them.
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


def read_gedit(paths: list[str], root: str | None) -> tuple[list[Item], str]:
    """Read one language of GEdit-Bench: JSON lines with PNGs beside them.

    engine/README.md shows how to export them. A line has the dataset's task_type, key, instruction
    and instruction_language, and `image`: the path of its input_image relative to the file. The
    grader expects that image in the folder as well.
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
        except OSError as error:
            raise InputError(f"--prompts {where}: {image} cannot be read: {error}") from error
        if found != "PNG in RGB":
            # The grader saves it as JPEG, which fails for RGBA, and retries 10,000 times.
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
            f"--prompts {paths[0]}: both languages are in it; give one file and one folder for each"
        )
    return items, f"gedit {languages.pop()}"


LAYOUTS = {
    "geneval": Layout(
        num_prompts=553,
        num_images=4,
        max_files=2,
        read=read_geneval,
        graders_own=("*/grid.png",),
        pictures=lambda item, num: {f"{item.id}/samples/{k:04d}.png": (k,) for k in range(num)},
    ),
    "dpg": Layout(num_prompts=1065, num_images=4, read=read_dpg),
    "wise": Layout(num_prompts=1000, max_files=3, read=read_wise, graders_own=("Results*",)),
    "imgedit": Layout(num_prompts=737, read=read_imgedit, graders_own=("result.json",)),
    # Of one language.
    "gedit": Layout(
        num_prompts=606,
        read=read_gedit,
        graders_own=("gpt4o*", "qwen25vl*"),
        pictures=lambda item, num: {f"fullset/{item.id}.png": tuple(range(num))},
        id_pattern=r"[a-z_-]+/(en|cn)/[A-Za-z0-9_-]+",
    ),
}

WISE_TRAPS = """
Verified (200 prompts changed, 0 or 1 by Qwen) and legacy (three scales of 0 to 2 by GPT-4o, other ranges of ids) are not
comparable: say which. Both go on from results they find: remove old ones after drawing anew. A missing picture is one line
of warning, and then no score is printed."""

# The official grader's commands, and what it does not tell. Fields are quoted for a shell.
NEXT = {
    "geneval": """\
in a checkout of github.com/djghosh13/geneval, on a GPU:
  python evaluation/evaluate_images.py {out} --outfile {results}.jsonl --model-path <OBJECT_DETECTOR_FOLDER>
  python evaluation/summary_scores.py {results}.jsonl
It scores what it finds: a missing folder or picture is left out silently, and any samples/<digits>.png is counted.
Protocol: GenEval with {variant}. State it with the score: rewritten and official prompts are not
comparable.""",
    "dpg": """\
in a checkout of github.com/TencentQQGYLab/ELLA (8 GPUs; on one, --num_processes 1 and no --multi_gpu):
  PYTHONHASHSEED=0 accelerate launch --num_machines 1 --num_processes 8 --multi_gpu --mixed_precision fp16 \\
    dpg_bench/compute_dpg_bench.py --image-root-path {out} --resolution {side} --pic-num 4 --vqa-model mplug \\
    --res-path {results}.txt
Its dist_eval.sh gives no --res-path: the results go into the picture folder and count as pictures from then on. Without
PYTHONHASHSEED=0 each process walks the categories in an order of its own and mixes their scores up. Category scores are of
the last of the four images alone (ELLA issue 60) and the first question of the csv is skipped (61): published scores are
so too. A picture that is missing or fails is left out of the mean, with one line of output.""",
    "wise verified": """\
in a checkout of github.com/PKU-YuanGroup/WISE, with vLLM serving the judge:
  IMAGE_DIR={out} VLLM_API_BASE=http://127.0.0.1:8000/v1 JUDGE_MODEL=Qwen3.5-35B-A3B bash eval_qwen.sh
Protocol: verified."""
    + WISE_TRAPS,
    "wise legacy": """\
in WISE_legacy of a checkout of github.com/PKU-YuanGroup/WISE (its result paths must be absolute, as these are):
  for part in cultural_common_sense natural_science spatio-temporal_reasoning; do
    python gpt_eval.py --json_path data/${{part}}{rewrite}.json --image_dir {out} --output_dir {results} --max_workers 96 \\
      --result_full {results}/$part.json --result_scores {results}/$part.jsonl --model gpt-4o-2024-05-13 --api_key KEY; done
  python Calculate.py {results}/*.jsonl --category all
Protocol: legacy."""
    + WISE_TRAPS,
    "wise of unknown protocol": "tell WISE's protocol: these files lack prompt 641, by which it is known."
    + WISE_TRAPS,
    "imgedit": """\
in Benchmark/Basic of a checkout of github.com/PKU-YuanGroup/ImgEdit, with key and url written into basic_bench.py:
  python basic_bench.py --result_img_folder {out} --edit_json {prompts} --origin_img_root {root} \\
    --num_processes 32 --prompts_json prompts.json
  python step1_get_avgscore.py --result_json {out}/result.json --average_score_json average_score.json
  python step2_typescore.py --average_score_json average_score.json --basic_edit {prompts} --typescore_json typescore.json
The flag of basic_bench.py is --edit_json: the --basic_edit of its readme is refused, but step 2 takes it. A missing picture
is an error entry in result.json, on which step 1 stops.""",
    "gedit": """\
in GEdit-Bench of a checkout of github.com/stepfun-ai/Step1X-Edit, with the key in secret_t2.env:
  sed -i 's|("stepfun-ai/GEdit-Bench")|("stepfun-ai/GEdit-Bench")["train"]|' test_gedit_score.py
  sed -i 's|"en", "zh"|"en", "cn"|' calculate_statistics.py
  python test_gedit_score.py --save_path {parent} --model_name {folder} --backbone gpt4o
  python calculate_statistics.py --save_path {parent} --model_name {folder} --backbone gpt4o \\
    --language {language}
Without the first sed the script iterates over the names of the splits and fails; without the second
it has no language for the rows in cn. A missing picture is skipped with one line of output. Each
picture is stretched to the size of its source image before it is judged. Existing results are kept:
remove {out}/gpt4o after generating again. GPT-4.1 varies by about 0.1 between runs and has changed
over the months (issue 74 of Step1X-Edit): state the judge and the date.""",
}

# Benchmark with its protocol -> what `iomm evaluate BENCHMARK --graded` reads after these commands.
RESULT_FILES = {
    "geneval": "{results}.jsonl",
    "dpg": "{results}.txt",
    "wise verified": "{out}/Results-qwen35/*_scores_results.jsonl",
    "wise legacy": "{results}/*.jsonl",
    "imgedit": "average_score.json --prompts {prompts}",
    "gedit": "{out}/gpt4o/eval_results_new/{folder}_combined_gpt_score.csv",
}


def next_step(name, out, side, paths, root):
    """What to type next, for a folder of this benchmark with images of `side` pixels."""
    name, _, variant = name.partition(", ")
    # "gedit en": one text for both languages.
    name, _, language = name.partition(" ") if name.startswith("gedit") else (name, "", "")
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
    text = "next, " + NEXT[name].format(**fields)
    if name in RESULT_FILES:
        text += (
            "\nthen, to see the scores beside the paper's:\n"
            f"  iomm evaluate {name.split()[0]} --graded {RESULT_FILES[name].format(**fields)}"
        )
    return text


def read_items(layout, paths, root):
    """-> (items, name). Raises InputError for prompt files that are not as the benchmark has them."""
    if len(paths) > layout.max_files:
        most = "one prompt file" if layout.max_files == 1 else f"{layout.max_files} prompt files"
        raise InputError(f"--prompts: this benchmark has at most {most}, got {len(paths)}")
    items, name = layout.read(paths, root)
    for item in items:
        if not re.fullmatch(layout.id_pattern, item.id):
            raise InputError(
                f"--prompts {paths[0]}: {item.id!r} cannot be a file name: wanted letters, digits, _ and -"
            )
    twice = [item_id for item_id, count in Counter(item.id for item in items).items() if count > 1]
    if twice or not items:
        raise InputError(
            "--prompts: "
            + (
                f"{twice[0]} stands there twice; give each prompt once"
                if twice
                else "no prompt in it"
            )
        )
    return items, name


def text_of(path):
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {path} cannot be read: {error}") from error


def parse(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--prompts {where} is not JSON: {error}") from error


def field(entry, key, where):
    """A text of a JSON object that must be there."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise InputError(
            f"--prompts {where}: wanted an object with a text {key!r}, got {str(entry)[:60]}"
        )
    return value
