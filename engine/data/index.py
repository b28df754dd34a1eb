"""Build and load an index: validate every sample of every shard once and list the good ones.

`iomm index` is the command line tool.
"""

import hashlib
import json
import os
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from iomm.config import InputError
from iomm.engine.cores import num_cores
from iomm.engine.data.archive import COMPRESSED_SUFFIXES, IMAGE_SUFFIXES, LeftOut
from iomm.engine.data.atomic import check_replaceable, lock, whole_file, whole_folder
from iomm.engine.data.patterns import expand, resolve
from iomm.engine.data.sizes import describe_edges
from iomm.engine.data.validate import DEFAULT_RULES, RECORD, Rules, rejection
from iomm.engine.data.workers import ShardResult, validate_shards

VERSION = 2
HEADER = "index.json"
RECORDS = "index.bin"
REJECTED = "rejected.jsonl"
# Version of the files that an interrupted build leaves behind.
PART_VERSION = 1
FORMAT = {"format": "iomm-index", "version": VERSION, "record_bytes": RECORD.itemsize}
# A dataset with a larger share of padded squares was made with img2dataset's border mode.
PADDED_SHARE = 0.05
# Reasons in the error that no sample is usable.
NUM_REASONS = 3

# A path, a glob or a brace list, or several of them. See patterns.expand.
Patterns = str | os.PathLike | Iterable[str | os.PathLike]


@dataclass(frozen=True, kw_only=True)
class Index:
    """A loaded index: the records of the good samples, the shards in order, and the rules."""

    folder: Path
    # N of RECORD, memory-mapped.
    records: np.ndarray
    # {path, bytes, mtime_ns, num_samples} each, and files if the shard is a folder.
    shards: list[dict[str, Any]]
    # Reason -> count.
    rejected: dict[str, int]
    # Remark on good samples -> count: trailing, icc_bad, alpha, constant, padded, grey_rows,
    # no_caption.
    notes: dict[str, int]
    rules: Rules
    # What was found and not read: reason -> [how many, an example]. Empty in earlier indexes.
    left_out: dict[str, list] = field(default_factory=dict)
    # Shards that could not be read. When one of them is back, the index is out of date.
    unreadable: list[str] = field(default_factory=list)


def build(
    shards: Patterns,
    out: str | os.PathLike,
    *,
    rules: Rules = DEFAULT_RULES,
    progress: bool = True,
    workers: int | None = None,
    keep: bool = False,
) -> Path:
    """Index shards into the folder `out`, which appears only when complete. Return its path.

    A good sample is an image (by its suffix; JPEG, PNG or WebP by its bytes) that decodes fully.
    With captions="required" it also has a readable caption of the same key (txt, else the "caption"
    of json). All others are listed in rejected.jsonl by shard, key, reason and detail. Good samples
    are ordered shard by shard, by the first appearance of their key. A shard that a glob finds and
    that cannot be read is rejected.

    Finished shards are kept in a folder next to `out`. A build that was stopped therefore resumes
    where it was. A second build of the same index waits for the first.

    Args:
        shards: the shards, see patterns.expand.
        out: folder of the index.
        rules: rules for good samples.
        progress: show a progress bar.
        workers: number of processes that share the shards, or None for one per core.
        keep: do nothing if `out` is up to date already.

    Raises:
        InputError: no shard matches, no sample is good, or `out` may not be replaced.
    """
    resolved = resolve(shards)
    paths, entries, unreadable = [], [], []
    for path in resolved.paths:
        try:
            entries.append(_entry(path))
            paths.append(path)
        except InputError as error:
            detail = str(error.__cause__.strerror)
            unreadable.append(rejection(path, "", "unreadable", detail))
    check_replaceable(out, HEADER)
    with _parts_folder(out) as parts:
        # Another process may have built it while this one waited for the lock.
        if keep and _is_current(out, rules):
            shutil.rmtree(parts)
            return Path(out)
        names = [parts / _part_name(entry, rules) for entry in entries]
        todo = [i for i, name in enumerate(names) if not name.exists()]
        done_bytes = sum(entries[i]["bytes"] for i in range(len(paths)) if i not in set(todo))
        bar = tqdm(
            total=sum(entry["bytes"] for entry in entries),
            initial=done_bytes,
            unit="B",
            unit_scale=True,
            desc="index",
            disable=not progress,
        )
        with bar:
            results = validate_shards(
                [paths[i] for i in todo], rules, workers or num_cores(), _rate(bar)
            )
            for result in results:
                i = todo[result.number]
                _write_part(names[i], result)
                bar.update(entries[i]["bytes"])
        with whole_folder(out, HEADER) as fresh:
            joined = _join(names, entries, rules, fresh, unreadable, resolved.left_out)
            if not joined.num_samples:
                shutil.rmtree(parts)
                raise InputError(_no_good_sample(resolved.paths, joined))
        shutil.rmtree(parts)
    return Path(out)


def _is_current(folder: str | os.PathLike, rules: Rules) -> bool:
    try:
        index = load(folder)
    except InputError:
        return False
    return index.rules == rules and not any(map(os.path.exists, index.unreadable))


class _Joined(NamedTuple):
    """The counts of an index: good samples, and the others by reason, as in LeftOut."""

    num_samples: int
    rejected: LeftOut
    left_out: LeftOut


def _join(
    names: list[Path],
    entries: list[dict[str, Any]],
    rules: Rules,
    fresh: Path,
    unreadable: list[dict[str, str]],
    left_out: LeftOut,
) -> _Joined:
    """Join the parts of all shards into the three files of an index.

    Args:
        names: the file of each part.
        entries: what the index stores of each shard. num_samples is added, and files of a folder.
        rules: rules for good samples.
        fresh: an empty folder for the files.
        unreadable: rejections of shards without a part.
        left_out: what was found beside the shards.
    """
    rejected_counts = LeftOut()
    left_out = LeftOut(left_out)
    note_counts = Counter()

    def reject(line: dict[str, str]) -> None:
        example = f"{line['shard']}: {line['key']}" if line["key"] else line["shard"]
        rejected_counts.add(
            line["reason"], f"{example}: {line['detail']}" if line["detail"] else example
        )
        rejected_file.write(json.dumps(line) + "\n")

    with (
        open(fresh / RECORDS, "wb") as records_file,
        open(fresh / REJECTED, "w", encoding="utf-8") as rejected_file,
    ):
        for name, entry in zip(names, entries, strict=True):
            with open(name, "rb") as f:
                head = json.loads(f.readline())
                entry["num_samples"] = records_file.write(f.read()) // RECORD.itemsize
            if head["files"] is not None:
                entry["files"] = head["files"]
            note_counts.update(head["notes"])
            for reason, (num, example) in head["left_out"].items():
                left_out.add(reason, f"{entry['path']}: {example}", num)
            for line in head["rejected"]:
                reject(line)
        for line in unreadable:
            reject(line)
    num_samples = sum(entry["num_samples"] for entry in entries)
    header = FORMAT | {
        "num_samples": num_samples,
        "rules": asdict(rules),
        "notes": dict(note_counts.most_common()),
        "rejected": {reason: num for reason, (num, _) in rejected_counts.by_count()},
        "left_out": left_out,
        "unreadable": [line["shard"] for line in unreadable],
        "shards": entries,
    }
    (fresh / HEADER).write_text(json.dumps(header), encoding="utf-8")
    return _Joined(num_samples, rejected_counts, left_out)


@contextmanager
def _parts_folder(out: str | os.PathLike) -> Iterator[Path]:
    """Yield a folder next to `out` for finished shards, locked by one build at a time.

    An interrupted build leaves it behind.
    """
    out = Path(out).absolute()
    folder = out.with_name(f".{out.name}.parts")
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            # The build that held the lock has just removed the folder.
            continue
        try:
            lock(handle, folder)
            # The locked folder may have been removed, and even created anew, in the meantime.
            if folder.exists() and os.fstat(handle).st_ino == folder.stat().st_ino:
                yield folder
                return
        finally:
            os.close(handle)


def _part_name(entry: dict[str, Any], rules: Rules) -> str:
    facts = json.dumps([FORMAT, PART_VERSION, entry, asdict(rules)], sort_keys=True)
    return hashlib.sha256(facts.encode("utf-8", "surrogateescape")).hexdigest()[:24] + ".part"


def _write_part(path: Path, result: ShardResult) -> None:
    keys = ("rejected", "notes", "left_out", "files")
    head = json.dumps({key: getattr(result, key) for key in keys})
    with whole_file(path) as partial:
        partial.write_bytes(head.encode() + b"\n" + result.records.tobytes())


def load(folder: str | os.PathLike) -> Index:
    """Load the index in a folder.

    Raises:
        InputError: the index is unreadable, or a shard has changed since it was built.
    """
    folder = Path(folder)
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        if any(header[key] != value for key, value in FORMAT.items()):
            raise ValueError("written by another version")
        records = np.memmap(folder / RECORDS, dtype=RECORD, mode="r")
        if {len(records)} != {
            header["num_samples"],
            sum(shard["num_samples"] for shard in header["shards"]),
        }:
            raise ValueError(f"{RECORDS} does not match {HEADER}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"the index {folder} cannot be read ({error}); run `iomm index` again"
        ) from None
    for shard in header["shards"]:
        now = _entry(shard["path"])
        if now["mtime_ns"] != shard["mtime_ns"] or now["bytes"] != shard["bytes"]:
            raise InputError(
                f"{shard['path']} has changed since it was indexed; run `iomm index` again"
            )
    return Index(
        folder=folder,
        records=records,
        rules=Rules(**header["rules"]),
        **{key: header[key] for key in ("shards", "rejected", "notes")},
        left_out=header.get("left_out", {}),
        unreadable=header.get("unreadable", []),
    )


def records_crc32(index: Index) -> int:
    """Return the CRC-32 of all records, computed in parts because 10 M samples are 370 MB."""
    crc = 0
    for start in range(0, len(index.records), 1 << 20):
        crc = zlib.crc32(index.records[start : start + (1 << 20)].tobytes(), crc)
    return crc


def ensure_index(
    shards: Patterns,
    cache_root: str | os.PathLike,
    *,
    rules: Rules = DEFAULT_RULES,
    progress: bool = True,
    workers: int | None = None,
) -> Path:
    """Return the folder of an up-to-date index of `shards` under cache_root.

    It is built if it is missing or a shard has changed. If `shards` is itself the folder of an
    index, that one is used, whatever its rules.

    Args:
        shards: the shards, see patterns.expand, or the folder of an index.
        cache_root: folder of all indexes that training builds.
        rules: rules for good samples.
        progress: show a progress bar.
        workers: number of processes, or None for one per core.

    Raises:
        InputError: see build and load.
    """
    found = find_index(shards, cache_root, rules)
    if found is not None:
        return found
    folder = default_index_dir(shards, cache_root, rules)
    return build(shards, folder, rules=rules, progress=progress, workers=workers, keep=True)


def find_index(
    shards: Patterns, cache_root: str | os.PathLike, rules: Rules = DEFAULT_RULES
) -> Path | None:
    """Return the folder that ensure_index would return without building, or None.

    Raises:
        InputError: no shard matches, or an index given as `shards` is out of date.
    """
    if is_index(shards):
        load(shards)
        return Path(shards)
    folder = default_index_dir(shards, cache_root, rules)
    return folder if _is_current(folder, rules) else None


def is_index(shards: Patterns) -> bool:
    """Return whether `shards` is the folder of an index."""
    return isinstance(shards, str | os.PathLike) and (Path(shards) / HEADER).is_file()


def default_index_dir(
    shards: Patterns, cache_root: str | os.PathLike, rules: Rules = DEFAULT_RULES
) -> Path:
    """Return the folder in which training keeps an index that it builds itself.

    Its name is a hash of the resolved list of shards and the rules.
    """
    names = "\n".join([*map(str, expand(shards)), json.dumps(asdict(rules), sort_keys=True)])
    return (
        Path(cache_root)
        / f"index-{hashlib.sha256(names.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"
    )


def summary(folder: str | os.PathLike) -> str:
    """Return a summary of an index for the console.

    It has a line on the good samples and one on their sizes, tables of the rejected ones by reason
    and of the remarks on good ones, and a warning if the images look padded.
    """
    index = load(folder)
    lines = [
        f"{len(index.records):,} samples in {len(index.shards):,} shards",
        describe_edges(index.records),
    ]
    lines += [f"  {count:>9,}  {reason}" for reason, count in index.rejected.items()]
    if index.rejected:
        lines.append(f"  listed in {index.folder / REJECTED}")
    lines += [f"  {count:>9,}  good, but {note}" for note, count in index.notes.items()]
    return "\n".join(lines + warnings_on(index) + omissions(index))


def omissions(index: Index) -> list[str]:
    """Return a line on what was found and not used, by reason, or nothing."""
    unused = LeftOut(index.left_out)
    for reason, num in index.rejected.items():
        unused.add(f"rejected as {reason}", "", num)
    return [f"not used: {unused.describe()}"] if unused else []


def warnings_on(index: Index) -> list[str]:
    """Return a line for each problem of the dataset as a whole."""
    padded = index.notes.get("padded", 0)
    if padded <= PADDED_SHARE * len(index.records):
        return []
    return [
        f"warning: {padded:,} of {len(index.records):,} images are padded to a square with white, "
        "as img2dataset's resize_mode=border does. The model will learn to draw the bars. Make the "
        "shards with resize_mode=keep_ratio or center_crop"
    ]


def _entry(path: str | os.PathLike) -> dict[str, Any]:
    """Return the path, size and time of a shard, by which a change is detected.

    Raises:
        InputError: the shard does not exist or is unreadable.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise InputError(f"the shard {path} cannot be read: {error.strerror}") from error
    is_file = not os.path.isdir(path)
    return {
        "path": str(path),
        "bytes": status.st_size if is_file else 0,
        "mtime_ns": status.st_mtime_ns,
    }


def _rate(bar: tqdm) -> Callable[[int], None]:
    """Return a callback that counts samples of all processes and shows images/s on the bar."""
    started = time.monotonic()
    num_images = 0

    def progress(num_samples: int) -> None:
        nonlocal num_images
        num_images += num_samples
        rate = num_images / (time.monotonic() - started + 1e-9)
        bar.set_postfix_str(f"{num_images:,} images, {rate:.0f} images/s")

    return progress


def _no_good_sample(paths: list[Path], joined: _Joined) -> str:
    """Return an error with the three most frequent reasons and an example of each."""
    where = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    reasons = LeftOut(joined.rejected)
    reasons.update_from(joined.left_out)
    problem = "no usable image"
    if set(joined.rejected) <= {"incomplete"}:
        suffixes = ", ".join(f"*.{suffix}" for suffix in IMAGE_SUFFIXES)
        problem = f"no images inside (expected files named {suffixes})"
    most = [
        f"{num:,} {reason}, e.g. {example}{_advice(reason)}"
        for reason, (num, example) in reasons.by_count()[:NUM_REASONS]
    ]
    return f"{where}: {problem}" + (f". Found {'; '.join(most)}" if most else "")


def _advice(reason: str) -> str:
    """Return what to do about something that was left out, to append to an example, or ""."""
    if reason == "named *.tar":
        return " (a tar in a subfolder; name that folder, or use a glob such as FOLDER/*/*.tar)"
    if reason.removeprefix("named *.") in COMPRESSED_SUFFIXES:
        return " (compressed; make it a tar first)"
    if reason == "in a hidden or thumbnail folder":
        return " (name that folder itself to use it)"
    return ""
