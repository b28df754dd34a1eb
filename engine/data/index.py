"""`iomm index`: reads every sample of every shard once, and lists the good ones."""

import fcntl
import hashlib
import json
import os
import shutil
import time
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from iomm.config import InputError
from iomm.engine.data.atomic import check_replaceable, whole_file, whole_folder
from iomm.engine.data.patterns import expand
from iomm.engine.data.validate import RECORD, Rules
from iomm.engine.data.workers import judge_shards

VERSION = 2
HEADER, RECORDS, REJECTED = "index.json", "index.bin", "rejected.jsonl"
FORMAT = {"format": "iomm-index", "version": VERSION, "record_bytes": RECORD.itemsize}
# A data set with more padded squares than this was made with img2dataset's border mode.
PADDED_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class Index:
    """A loaded index: `records` (N of RECORD, memory-mapped), the shards in order, and how it was made."""

    folder: Path
    records: np.ndarray
    # of {path, bytes, mtime_ns, num_samples}, and files if the shard is a folder
    shards: list
    # reason -> count
    rejected: dict
    # Remark on good samples -> count: trailing, icc_bad, alpha, constant, padded, no_caption.
    notes: dict
    rules: Rules


def build(shards, out, *, rules=Rules(), progress=True, workers=None, keep=False):
    """Indexes `shards` (see expand) into the folder `out`, which appears only when complete; returns its path.

    A good sample is an image (jpg, jpeg, png, webp by name; JPEG, PNG or WebP by its bytes) that decodes fully, and if
    there is a caption of the same key (txt, else the "caption" of json), a readable one. The others are listed in
    rejected.jsonl: shard, key, reason, detail. Good samples stand shard by shard in the order in which their keys first
    appear. `workers` processes (all cores if None) share the shards. What is done is kept beside `out`, shard by
    shard: a build that was stopped goes on where it was when it is started again, and a second one beside it waits.
    With `keep`, an index that is there and up to date stays. Raises InputError if nothing matches or no sample is good.
    """
    paths = expand(shards)
    entries = [_entry(path) for path in paths]
    check_replaceable(out, HEADER)
    with _parts_folder(out) as parts:
        # Another process made it while this one waited.
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
            work = judge_shards(
                [paths[i] for i in todo], rules, workers or os.cpu_count(), _rate(bar)
            )
            for number, records, rejected, notes, files in work:
                i = todo[number]
                _write_part(names[i], records, rejected, notes, files)
                bar.update(entries[i]["bytes"])
        with whole_folder(out, HEADER) as fresh:
            num_samples, rejected = _join(names, entries, rules, fresh)
            if not num_samples:
                shutil.rmtree(parts)
                raise InputError(_nothing_good(paths, rejected))
        shutil.rmtree(parts)
    return Path(out)


def _is_current(folder, rules):
    try:
        return load(folder).rules == rules
    except InputError:
        return False


def _join(names, entries, rules, fresh):
    """Parts of all shards -> the three files of an index in the folder `fresh`; returns (num_samples, rejected)."""
    rejected_counts, note_counts = Counter(), Counter()
    with (
        open(fresh / RECORDS, "wb") as records_file,
        open(fresh / REJECTED, "w", encoding="utf-8") as rejected_file,
    ):
        for name, entry in zip(names, entries):
            with open(name, "rb") as f:
                told = json.loads(f.readline())
                entry["num_samples"] = records_file.write(f.read()) // RECORD.itemsize
            if told["files"] is not None:
                entry["files"] = told["files"]
            note_counts.update(told["notes"])
            for line in told["rejected"]:
                rejected_counts[line["reason"]] += 1
                rejected_file.write(json.dumps(line) + "\n")
    num_samples = sum(entry["num_samples"] for entry in entries)
    header = FORMAT | {
        "num_samples": num_samples,
        "rules": asdict(rules),
        "notes": dict(note_counts.most_common()),
        "rejected": dict(rejected_counts.most_common()),
        "shards": entries,
    }
    (fresh / HEADER).write_text(json.dumps(header), encoding="utf-8")
    return num_samples, rejected_counts


@contextmanager
def _parts_folder(out):
    """Folder beside `out` for the shards that are done, held by one build at a time. An interrupted build leaves it."""
    out = Path(out).absolute()
    folder = out.with_name(f".{out.name}.parts")
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            # the build that held it has just removed it
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Not one that was just removed.
            if folder.exists() and os.fstat(lock).st_ino == folder.stat().st_ino:
                yield folder
                return
        finally:
            os.close(lock)


def _part_name(entry, rules):
    facts = json.dumps([FORMAT, entry, asdict(rules)], sort_keys=True)
    return hashlib.sha256(facts.encode("utf-8", "surrogateescape")).hexdigest()[:24] + ".part"


def _write_part(path, records, rejected, notes, files):
    head = json.dumps({"rejected": rejected, "notes": notes, "files": files})
    with whole_file(path) as partial:
        partial.write_bytes(head.encode() + b"\n" + records.tobytes())


def load(folder):
    """The Index in `folder`. Raises InputError if it cannot be read, or if a shard has changed since."""
    folder = Path(folder)
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        if any(header[key] != value for key, value in FORMAT.items()):
            raise ValueError("made by another version")
        records = np.memmap(folder / RECORDS, dtype=RECORD, mode="r")
        if {len(records)} != {
            header["num_samples"],
            sum(shard["num_samples"] for shard in header["shards"]),
        }:
            raise ValueError(f"{RECORDS} does not fit {HEADER}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"the index {folder} cannot be read ({error}): run `iomm index` again"
        ) from None
    for shard in header["shards"]:
        now = _entry(shard["path"])
        if now["mtime_ns"] != shard["mtime_ns"] or now["bytes"] != shard["bytes"]:
            raise InputError(
                f"{shard['path']} has changed since it was indexed: run `iomm index` again"
            )
    return Index(
        folder=folder,
        records=records,
        rules=Rules(**header["rules"]),
        **{key: header[key] for key in ("shards", "rejected", "notes")},
    )


def records_crc32(index):
    """Of all records: by parts, as 10 M samples are 370 MB."""
    crc = 0
    for start in range(0, len(index.records), 1 << 20):
        crc = zlib.crc32(index.records[start : start + (1 << 20)].tobytes(), crc)
    return crc


def ensure_index(shards, cache_root, *, rules=Rules(), progress=True, workers=None):
    """Folder of an up-to-date index of `shards` by `rules` under cache_root; built if it is missing or a shard has
    changed. `shards` may be the folder of an index itself: then it is that one, whatever its rules.
    """
    if isinstance(shards, str | os.PathLike) and (Path(shards) / HEADER).is_file():
        load(shards)
        return Path(shards)
    folder = default_index_dir(shards, cache_root, rules)
    if _is_current(folder, rules):
        return folder
    return build(shards, folder, rules=rules, progress=progress, workers=workers, keep=True)


def default_index_dir(shards, cache_root, rules=Rules()):
    """Where training keeps the index that it makes itself: named by a hash of the resolved list of shards and the
    rules.
    """
    names = "\n".join([*map(str, expand(shards)), json.dumps(asdict(rules), sort_keys=True)])
    return (
        Path(cache_root)
        / f"index-{hashlib.sha256(names.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"
    )


def summary(folder):
    """One line on the good samples of an index, tables of the rejected ones by reason and of remarks on good ones, and
    a warning if they look padded (str).
    """
    index = load(folder)
    lines = [f"{len(index.records):,} samples in {len(index.shards):,} shards"]
    lines += [f"  {count:>9,}  {reason}" for reason, count in index.rejected.items()]
    lines += [f"  listed in {index.folder / REJECTED}"] if index.rejected else []
    lines += [f"  {count:>9,}  good, but {note}" for note, count in index.notes.items()]
    return "\n".join(lines + warnings_on(index))


def warnings_on(index):
    """Lines on what is wrong with the data as a whole; none if nothing is."""
    padded = index.notes.get("padded", 0)
    if padded <= PADDED_SHARE * len(index.records):
        return []
    return [
        f"warning: {padded:,} of {len(index.records):,} images are padded to a square with white, as img2dataset's "
        "resize_mode=border does: the model will learn to draw the bars. Make the shards with "
        "resize_mode=keep_ratio or center_crop"
    ]


def _entry(path):
    """What tells whether a shard has changed. Raises InputError if it is gone."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise InputError(f"the shard {path} cannot be read: {error.strerror}") from None
    is_file = not os.path.isdir(path)
    return {
        "path": str(path),
        "bytes": status.st_size if is_file else 0,
        "mtime_ns": status.st_mtime_ns,
    }


def _rate(bar):
    """Counts samples over all processes and shows images/s on the bar."""
    started, num_images = time.monotonic(), 0

    def progress(num_samples):
        nonlocal num_images
        num_images += num_samples
        bar.set_postfix_str(
            f"{num_images:,} images, {num_images / (time.monotonic() - started + 1e-9):.0f} images/s"
        )

    return progress


def _nothing_good(paths, counts):
    where = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    if not counts or set(counts) <= {"incomplete"}:
        return f"{where}: no images inside (wanted members named *.jpg, *.jpeg, *.png or *.webp)"
    reasons = ", ".join(f"{reason} ({count})" for reason, count in counts.most_common())
    return f"{where}: no usable image; rejected as {reasons}"
