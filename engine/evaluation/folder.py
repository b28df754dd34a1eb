"""The folder of one benchmark: drawn, resumed and checked. What lies where says layouts.py.

A picture's noise belongs to (seed, prompt id, image index), so the folder is the same from any number of GPUs, in any
batch, to the rounding of a matrix product; and each PNG carries what it was drawn with, so that nothing mixes two runs.
"""

import hashlib
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from iomm.config import InputError
from iomm.engine import builders
from iomm.engine.config import positive
from iomm.engine.data.atomic import whole_file
from iomm.engine.evaluation import sample
from iomm.engine.evaluation.layouts import LAYOUTS, next_step, read_items
from iomm.pipeline import height_width, image_grid

# Faults of a kind that are named; the others are counted.
NAMED = 10


def evaluate(
    bench,
    *,
    prompts,
    out,
    run=None,
    root=None,
    num=None,
    size=None,
    steps=20,
    seed=0,
    guidance=4.0,
    shift=1.0,
    weights="ema",
    batch=16,
    compiled=False,
    rank=None,
    num_ranks=None,
    check_only=False,
):
    """Draws what is not there yet, this rank's share of it, then checks -> exit code: 0 complete, 1 not. Prints.

    size: (height, width), default the run's own. Ranks need no connection: each draws and checks its share of the
    prompts. An intact PNG of the same settings stays; one of other settings is an InputError, a damaged one is drawn anew.
    """
    layout, out = LAYOUTS[bench], Path(out).resolve()
    num = layout.num_images if num is None else num
    positive("--num", num), positive("--steps", steps), positive("--batch", batch)
    if num != layout.num_images and bench != "geneval":
        raise InputError(f"--num: {bench} has {layout.num_images} images a prompt")
    if bench == "imgedit" and root is None and not check_only:
        raise InputError("imgedit needs --origin-img-root, the folder of the pictures to edit")
    items, name = read_items(layout, prompts, None if check_only else root)
    own, whose = items, ""
    if not check_only:
        if run is None:
            raise InputError(
                "--run is missing: a run's folder or an exported one; or --check to look at a folder alone"
            )
        rank, num_ranks, device = builders.share(rank, num_ranks)
        own, whose = (
            items[rank::num_ranks],
            f"rank {rank} of {num_ranks}: its share of " if num_ranks > 1 else "",
        )
        pipe, _ = sample.open_pipeline(run, weights=weights, device=device)
        pipe.batch, size = batch, height_width(size or pipe.size_px)
        # Raises if the size does not divide.
        pipe.model.frozen[1].grid(*size)
        if bench == "dpg" and size[0] != size[1]:
            raise InputError(
                f"dpg cuts its grids into squares: --size must be one, got {sample.size_text(size)}"
            )
        if extra := strangers(layout, items, num, out):
            raise InputError(
                f"--out {out} holds what does not belong to {bench}, {extra[0]} first: remove it, or choose another"
            )
        settings = dict(steps=steps, seed=seed, guidance=guidance, shift=shift)
        facts = {"benchmark": name, **sample.drawing_facts(pipe, size, **settings)}
        draw_share(
            pipe.compile() if compiled else pipe,
            layout,
            own,
            num,
            out,
            out.with_name(f".{out.name}.rank-{rank}"),
            facts,
            dict(size=size, **settings),
            quiet=rank > 0,
        )
    faults, size = check(layout, items, num, out, own=own, size=size)
    for kind, found in faults.items():
        for line in found[:NAMED] + (
            [f"and {len(found) - NAMED} more"] if len(found) > NAMED else []
        ):
            print(f"{kind}: {line}")
    print(
        f"{whose}{len(items)} prompts of {name} in {out}: "
        + (
            ", ".join(f"{len(found)} files {kind}" for kind, found in faults.items() if found)
            or "complete"
        )
    )
    if any(faults.values()):
        return 1
    if len(items) != layout.num_prompts:
        print(
            f"the benchmark has {layout.num_prompts} prompts: scores of {len(items)} are not its scores"
        )
    if others := sum(
        not (out / path).exists() for item in items for path in layout.pictures(item, num)
    ):
        print(
            f"{others} files of other ranks are still to come; when all ranks are done, look with --check"
        )
    else:
        print(next_step(name, out, size[0], prompts, root))
    return 0


def draw_share(pipe, layout, items, num, out, partial, facts, settings, quiet):
    """Draws the missing files of these items. Each is written under the name `partial` beside the folder and renamed into it:
    a grader never sees half a file, nor a name that is not its own.
    """
    todo = []
    for item in items:
        for name, data in item.files:
            data = data.read_bytes() if isinstance(data, Path) else data
            if not (out / name).is_file() or (out / name).read_bytes() != data:
                place(partial, out / name, lambda: partial.write_bytes(data))
        for name, indices in layout.pictures(item, num).items():
            if not kept(out / name, {**facts, "item": item.id, "prompt": item.prompt}):
                todo.append((item, name, indices))
    together = max(1, pipe.batch // max((len(indices) for _, _, indices in todo), default=1))
    with tqdm(
        total=len(todo), unit="file", desc="evaluate", disable=True if quiet or not todo else None
    ) as bar:
        for start in range(0, len(todo), together):
            part = todo[start : start + together]
            wanted = [(item, k) for item, _, indices in part for k in indices]
            texts, numbers = (
                [item.prompt for item, _ in wanted],
                [image_number(item.id, k) for item, k in wanted],
            )
            if wanted[0][0].image is None:
                images = pipe(texts, numbers=numbers, **settings)
            else:
                images = pipe.edit(
                    [sample.open_image(item.image) for item, _ in wanted],
                    texts,
                    numbers=numbers,
                    **settings,
                )
            for item, name, indices in part:
                own, images = images[: len(indices)], images[len(indices) :]
                picture = own[0] if len(own) == 1 else image_grid(own, 2, pad_px=0)
                text = {**facts, "item": item.id, "prompt": item.prompt}
                place(partial, out / name, lambda: sample.save_png(picture, partial, text))
            bar.update(len(part))
    # What a killed run left.
    partial.unlink(missing_ok=True)


def place(partial, path, write):
    """Has `partial` written and gives it its name. Raises InputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, partial=partial):
            write()
    except OSError as error:
        raise InputError(f"--out: {path} cannot be written: {error}") from error


def image_number(item_id, index):
    """Number of an image, whose noise is that of (seed, number): 63 bits of SHA-256 of "<prompt id>/<index>"."""
    return int.from_bytes(hashlib.sha256(f"{item_id}/{index}".encode()).digest()[:8], "big") >> 1


def kept(path, facts):
    """Whether a picture is there, intact and drawn like this. Raises InputError if it is of something else."""
    if not path.is_file():
        return False
    try:
        _, text = look(path)
    except ValueError:
        return False
    other = differences(text, {key: str(value) for key, value in facts.items()})
    if other:
        raise InputError(
            f"{path} was drawn otherwise ({other}): choose another --out, or remove what is there"
        )
    return True


def check(layout, items, num, out, *, own, size=None):
    """-> ({"missing": [...], "extra": [...], "malformed": [...]}, (height, width) of one image).

    Files of the items `own` are read, and what is in the folder is held against all items. size: of one image; unknown, it
    is that of most pictures. All must be of one set of settings and of their own prompt, where they say it.
    """
    missing, malformed, seen = [], [], {}
    for item in own:
        for name, data in item.files:
            if not (out / name).is_file():
                missing.append(name)
            elif isinstance(data, Path) and (out / name).read_bytes() != data.read_bytes():
                malformed.append(f"{name}: differs from {data}")
            elif isinstance(data, bytes) and (out / name).read_bytes() != data:
                malformed.append(f"{name}: not the line of the prompt file")
        for name, indices in layout.pictures(item, num).items():
            if not (out / name).is_file():
                missing.append(name)
                continue
            try:
                (width, height), text = look(out / name)
            except ValueError as error:
                malformed.append(f"{name}: {error}")
                continue
            if (
                text.pop("prompt", item.prompt) != item.prompt
                or text.pop("item", item.id) != item.id
            ):
                malformed.append(f"{name}: drawn from another prompt")
                continue
            side = 1 if len(indices) == 1 else 2
            if side == 2 and (width != height or width % 2):
                malformed.append(f"{name}: {width} x {height} px is no 2R x 2R grid")
            else:
                seen[name] = (height // side, width // side), text
    size = size or most_common(found for found, _ in seen.values())
    usual = dict(most_common(tuple(sorted(text.items())) for _, text in seen.values()) or ())
    for name, (found, text) in seen.items():
        if found != size:
            malformed.append(
                f"{name}: {sample.size_text(found)} px an image, wanted {sample.size_text(size)}"
            )
        if other := differences(text, usual):
            malformed.append(f"{name}: drawn otherwise than most ({other})")
    return {
        "missing": missing,
        "extra": strangers(layout, items, num, out),
        "malformed": malformed,
    }, size


def strangers(layout, items, num, out):
    """Files and folders in `out` that neither belong to these items nor are the grader's own."""
    expected = {
        Path(name) for item in items for name in (*dict(item.files), *layout.pictures(item, num))
    }
    expected |= {parent for path in expected for parent in path.parents}
    return sorted(
        path.as_posix()
        for path in (p.relative_to(out) for p in out.rglob("*"))
        if path not in expected
        and not any(fnmatch(path.as_posix(), own) for own in layout.graders_own)
    )


def look(path):
    """Intact PNG in RGB -> (its (width, height), its text). Raises ValueError that says what is wrong with it."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            # the CRC-32 of every chunk
            image.verify()
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            mode, size, text = image.mode, image.size, dict(image.text)
    except Exception as error:
        # Pillow raises nearly anything on a damaged file
        raise ValueError(f"no intact PNG ({error})") from error
    if mode != "RGB":
        raise ValueError(f"mode {mode}, wanted RGB")
    return size, text


def differences(text, wanted):
    """Which keys are otherwise, as words, or ""."""
    keys = [key for key in sorted({*text, *wanted}) if text.get(key) != wanted.get(key)]
    return ", ".join(
        f"{key} {text.get(key, 'not said')!s:.60} instead of {wanted.get(key, 'none')!s:.60}"
        for key in keys
    )


def most_common(values):
    return next((value for value, _ in Counter(values).most_common(1)), None)
