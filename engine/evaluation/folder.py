"""Fill, resume and check the folder of one benchmark. The layouts are in layouts.py.

The noise of a picture belongs to (seed, prompt id, image index). The folder is therefore the same
from any number of GPUs and any batch size, up to the rounding of a matrix product. Each PNG records
its settings, and files of two runs are never mixed in one folder.
"""

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from tqdm import tqdm

from iomm.caption_limit import CaptionLimit
from iomm.config import InputError
from iomm.engine import builders
from iomm.engine.config import positive
from iomm.engine.data.atomic import whole_file
from iomm.engine.evaluation import sample
from iomm.engine.evaluation.layouts import LAYOUTS, Item, Layout, next_step, read_items
from iomm.pipeline import Pipeline, height_width, image_grid

# Number of faults of each kind that are listed. The others are only counted.
NUM_LISTED = 10

T = TypeVar("T", bound=Hashable)


def evaluate(
    bench: str,
    *,
    prompts: Sequence[str],
    out: str | Path,
    run: str | Path | None = None,
    root: str | None = None,
    num: int | None = None,
    size: tuple[int, int] | None = None,
    steps: int = 20,
    seed: int = 0,
    guidance: float = 4.0,
    shift: float | str = 1.0,
    weights: str = "ema",
    batch: int = 16,
    compiled: bool = False,
    rank: int | None = None,
    num_ranks: int | None = None,
    check_only: bool = False,
    mllm: str | None = None,
    vae: str | None = None,
) -> int:
    """Sample this rank's missing files of a benchmark, check the folder, and print the result.

    Ranks need no connection: each samples and checks its share of the prompts. An intact PNG with
    the same settings is kept, and a damaged one is sampled again.

    Args:
        bench: name of the benchmark, a key of LAYOUTS.
        prompts: prompt files.
        out: folder to fill or check.
        run: folder of a run, or an exported one. Not needed with check_only.
        root: folder of the pictures to edit, for imgedit.
        num: images per prompt, by default the benchmark's.
        size: (height, width) in pixels, by default the run's.
        steps: sampler steps.
        seed: seed of the noise.
        guidance: classifier-free guidance, 1 for none.
        shift: time shift of the sampler, see the pipeline.
        weights: "ema" or "raw".
        batch: images sampled at once.
        compiled: use torch.compile.
        rank: number of this process, by default from the environment, as torchrun sets it.
        num_ranks: number of processes, by default from the environment.
        check_only: check the folder without sampling.
        mllm: MLLM to use instead of the one that `run` names.
        vae: VAE to use instead of the one that `run` names.

    Returns:
        The exit code: 0 if this rank's share is complete, 1 otherwise.

    Raises:
        InputError: for invalid settings or prompt files, or if the folder holds other files or PNGs
            with other settings.
    """
    layout, out = LAYOUTS[bench], Path(out).resolve()
    num = layout.num_images if num is None else num
    positive("--num", num)
    positive("--steps", steps)
    positive("--batch", batch)
    if num != layout.num_images and bench != "geneval":
        raise InputError(f"--num: {bench} requires {layout.num_images} image(s) per prompt")
    if bench == "imgedit" and root is None and not check_only:
        raise InputError("imgedit needs --origin-img-root, the folder of the pictures to edit")
    items, name = read_items(layout, prompts, None if check_only else root)
    own, share = items, ""
    if not check_only:
        if run is None:
            raise InputError(
                "--run is missing: give the folder of a run or an exported one, "
                "or --check to check the folder without sampling"
            )
        rank, num_ranks, device = builders.share(rank, num_ranks)
        own = items[rank::num_ranks]
        if num_ranks > 1:
            share = f"rank {rank} of {num_ranks}, {len(own)} of "
        pipe, _ = sample.open_pipeline(run, weights=weights, device=device, mllm=mllm, vae=vae)
        pipe.batch, size = batch, height_width(size or pipe.size_px)
        # Raises if the size does not divide.
        pipe.model.frozen[1].grid(*size)
        if bench == "dpg" and size[0] != size[1]:
            raise InputError(
                "dpg cuts its grids into squares, so --size must be a square, "
                f"got {sample.size_text(size)}"
            )
        if extra := unexpected_files(layout, items, num, out):
            raise InputError(
                f"--out {out} contains files that do not belong to {bench}, "
                f"the first is {extra[0]}. Remove them, or choose another folder."
            )
        if long := long_prompts(pipe, own):
            print(
                f"{len(long)} of {len(own)} prompts exceed the MLLM's context and are cut: "
                f"{', '.join(long[:NUM_LISTED])}{' ...' if len(long) > NUM_LISTED else ''}"
            )
        settings = dict(steps=steps, seed=seed, guidance=guidance, shift=shift)
        metadata = {"benchmark": name, **sample.sampling_metadata(pipe, size, **settings)}
        sample_files(
            pipe.compile() if compiled else pipe,
            layout,
            own,
            num,
            out,
            out.with_name(f".{out.name}.rank-{rank}"),
            metadata,
            dict(size=size, **settings),
            quiet=rank > 0,
        )
    faults, size = check(layout, items, num, out, own=own, size=size)
    for kind, found in faults.items():
        for line in found[:NUM_LISTED]:
            print(f"{kind}: {line}")
        if len(found) > NUM_LISTED:
            print(f"{kind}: and {len(found) - NUM_LISTED} more")
    counts = ", ".join(f"{len(found)} files {kind}" for kind, found in faults.items() if found)
    print(f"{share}{len(items)} prompts of {name} in {out}: {counts or 'complete'}")
    if any(faults.values()):
        return 1
    if len(items) != layout.num_prompts:
        print(
            f"the benchmark has {layout.num_prompts} prompts, "
            f"so scores of these {len(items)} are not comparable with published ones"
        )
    paths = [out / path for item in items for path in layout.pictures(item, num)]
    if remaining := sum(not path.exists() for path in paths):
        print(
            f"{remaining} files of other ranks are still missing. "
            "Run again with --check when all ranks have finished."
        )
    else:
        print(next_step(name, out, size[0], prompts, root))
    return 0


def caption_limit(pipe: Pipeline, items: Sequence[Item]) -> CaptionLimit:
    """Return the limit of the prompts of a benchmark, or of its instructions."""
    recipe, edit = pipe.model.recipe, any(item.image is not None for item in items)
    return CaptionLimit(pipe.model.frozen[0], recipe.adapter, recipe.prompt, edit=edit)


def long_prompts(pipe: Pipeline, items: Sequence[Item]) -> list[str]:
    """Return the ids of the prompts that the pipeline cannot read as a whole."""
    limit = caption_limit(pipe, items)
    return [item.id for item in items if limit.cut(item.prompt) != item.prompt]


def sample_files(
    pipe: Pipeline,
    layout: Layout,
    items: Sequence[Item],
    num: int,
    out: Path,
    partial: Path,
    metadata: dict[str, Any],
    settings: dict[str, Any],
    quiet: bool,
) -> None:
    """Sample the missing files of these items.

    Each file is written as `partial`, next to the folder, and then renamed. A grader therefore
    never sees an incomplete file or an unexpected name.

    Args:
        pipe: the pipeline.
        layout: the benchmark.
        items: prompts of this rank.
        num: images per prompt.
        out: folder of the benchmark.
        partial: path of this rank's temporary file.
        metadata: text chunks of every PNG, without item and prompt.
        settings: keyword arguments of the pipeline.
        quiet: do not show a progress bar.
    """
    todo = []
    limit = caption_limit(pipe, items)
    for item in items:
        for name, data in item.files:
            content = content_of(data)
            if not (out / name).is_file() or (out / name).read_bytes() != content:
                with renamed_to(out / name, partial):
                    partial.write_bytes(content)
        for name, indices in layout.pictures(item, num).items():
            if not is_current(out / name, {**metadata, "item": item.id, "prompt": item.prompt}):
                todo.append((item, name, indices))
    files_per_batch = max(1, pipe.batch // max((len(indices) for _, _, indices in todo), default=1))
    with tqdm(
        total=len(todo), unit="file", desc="evaluate", disable=True if quiet or not todo else None
    ) as bar:
        for start in range(0, len(todo), files_per_batch):
            part = todo[start : start + files_per_batch]
            wanted = [(item, k) for item, _, indices in part for k in indices]
            # Of a prompt that is too long, the part that fits is used.
            texts = [limit.cut(item.prompt) for item, _ in wanted]
            numbers = [image_number(item.id, k) for item, k in wanted]
            if wanted[0][0].image is None:
                images = pipe(texts, numbers=numbers, **settings)
            else:
                sources = [
                    sample.open_image(item.image, "the image to edit,") for item, _ in wanted
                ]
                images = pipe.edit(sources, texts, numbers=numbers, **settings)
            for item, name, indices in part:
                own, images = images[: len(indices)], images[len(indices) :]
                picture = own[0] if len(own) == 1 else image_grid(own, 2, pad_px=0)
                text = {**metadata, "item": item.id, "prompt": item.prompt}
                with renamed_to(out / name, partial):
                    sample.save_png(picture, partial, text)
            bar.update(len(part))
    # An interrupted run may have left one.
    partial.unlink(missing_ok=True)


def content_of(data: bytes | Path) -> bytes:
    """Return the content of a file that accompanies the images: Item.files has bytes or a path."""
    return data.read_bytes() if isinstance(data, Path) else data


@contextmanager
def renamed_to(path: Path, partial: Path) -> Iterator[None]:
    """Rename `partial`, which the `with` block writes, to `path`. Raises InputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, partial=partial):
            yield
    except OSError as error:
        raise InputError(f"--out: {path} cannot be written: {error}") from error


def image_number(item_id: str, index: int) -> int:
    """Return the number of an image, which together with the seed determines its noise.

    It is 63 bits of the SHA-256 of "<prompt id>/<index>".
    """
    return int.from_bytes(hashlib.sha256(f"{item_id}/{index}".encode()).digest()[:8], "big") >> 1


def is_current(path: Path, metadata: dict[str, Any]) -> bool:
    """Return whether a picture exists, is intact, and was sampled with these settings.

    Raises:
        InputError: if it is intact but was sampled with other settings.
    """
    if not path.is_file():
        return False
    try:
        _, text = read_png(path)
    except ValueError:
        return False
    other = differences(text, {key: str(value) for key, value in metadata.items()})
    if other:
        raise InputError(
            f"{path} was sampled with other settings ({other}). "
            "Choose another --out, or remove the existing files."
        )
    return True


def check(
    layout: Layout,
    items: Sequence[Item],
    num: int,
    out: Path,
    *,
    own: Sequence[Item],
    size: tuple[int, int] | None = None,
) -> tuple[dict[str, list[str]], tuple[int, int] | None]:
    """Check the folder of a benchmark.

    All pictures must have the same settings and their own prompt, as far as their text chunks
    record these.

    Args:
        layout: the benchmark.
        items: all prompts. Files that belong to none of them are extra.
        num: images per prompt.
        out: folder of the benchmark.
        own: the prompts whose files are read.
        size: (height, width) of one image, by default that of most pictures.

    Returns:
        {"missing": [...], "extra": [...], "malformed": [...]} and the size of one image.
    """
    missing, malformed, seen = [], [], {}
    for item in own:
        for name, data in item.files:
            if not (out / name).is_file():
                missing.append(name)
            elif (out / name).read_bytes() != content_of(data):
                origin = data if isinstance(data, Path) else "the line of the prompt file"
                malformed.append(f"{name}: differs from {origin}")
        for name, indices in layout.pictures(item, num).items():
            if not (out / name).is_file():
                missing.append(name)
                continue
            try:
                (width, height), text = read_png(out / name)
            except ValueError as error:
                malformed.append(f"{name}: {error}")
                continue
            prompt, item_id = text.pop("prompt", item.prompt), text.pop("item", item.id)
            if prompt != item.prompt or item_id != item.id:
                malformed.append(f"{name}: sampled from another prompt")
                continue
            side = 1 if len(indices) == 1 else 2
            if side == 2 and (width != height or width % 2):
                malformed.append(f"{name}: {width} x {height} px is not a 2R x 2R grid")
            else:
                seen[name] = (height // side, width // side), text
    size = size or most_common(found for found, _ in seen.values())
    usual = dict(most_common(tuple(sorted(text.items())) for _, text in seen.values()) or ())
    for name, (found, text) in seen.items():
        if found != size:
            got, expected = sample.size_text(found), sample.size_text(size)
            malformed.append(f"{name}: {got} px per image, expected {expected}")
        if other := differences(text, usual):
            malformed.append(f"{name}: sampled with other settings than most ({other})")
    extra = unexpected_files(layout, items, num, out)
    return {"missing": missing, "extra": extra, "malformed": malformed}, size


def unexpected_files(layout: Layout, items: Sequence[Item], num: int, out: Path) -> list[str]:
    """Return what `out` contains besides the files of these items and of the grader."""
    expected = {
        Path(name) for item in items for name in (*dict(item.files), *layout.pictures(item, num))
    }
    expected |= {parent for path in expected for parent in path.parents}
    return sorted(
        path.as_posix()
        for path in (p.relative_to(out) for p in out.rglob("*"))
        if path not in expected
        and not any(fnmatch(path.as_posix(), pattern) for pattern in layout.grader_outputs)
    )


def read_png(path: Path) -> tuple[tuple[int, int], dict[str, str]]:
    """Return the (width, height) and the text chunks of an intact RGB PNG.

    Raises:
        ValueError: if it is damaged or not RGB. The message names the problem.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            # Checks the CRC-32 of every chunk.
            image.verify()
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            mode, size, text = image.mode, image.size, dict(image.text)
    except Exception as error:
        # Pillow raises exceptions of many types for a damaged file.
        raise ValueError(f"not an intact PNG ({error})") from error
    if mode != "RGB":
        raise ValueError(f"mode {mode}, expected RGB")
    return size, text


def differences(text: dict[str, str], wanted: dict[str, str]) -> str:
    """Return the differences between two sets of text chunks in words, or ""."""
    keys = [key for key in sorted({*text, *wanted}) if text.get(key) != wanted.get(key)]
    return ", ".join(
        f"{key} {text.get(key, 'missing')!s:.60} instead of {wanted.get(key, 'none')!s:.60}"
        for key in keys
    )


def most_common(values: Iterable[T]) -> T | None:
    """Return the most frequent value, or None if there are none."""
    return next((value for value, _ in Counter(values).most_common(1)), None)
