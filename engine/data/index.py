"""`iomm index`: reads every sample of every shard once, and lists the good ones."""

import glob
import hashlib
import json
import os
import re
import time
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from iomm.config import InputError
from iomm.engine.data.archive import SUFFIXES, Folder, Tar, TarError
from iomm.engine.data.caption import caption_of_json, caption_of_text
from iomm.engine.data.folder import whole_folder
from iomm.engine.data.image import Rejected, check_image

VERSION = 1
HEADER, RECORDS, REJECTED = "index.json", "index.bin", "rejected.jsonl"
CAPTION_TXT, CAPTION_JSON, TRANSPARENT = 1, 2, 4      # bits of `flags`
RECORD = np.dtype([                                   # packed, little-endian, 37 bytes: 10 M samples are 370 MB
    ("shard", "<u4"), ("image_offset", "<u8"), ("image_bytes", "<u4"), ("width", "<u2"), ("height", "<u2"),
    ("crc32", "<u4"), ("caption_offset", "<u8"), ("caption_bytes", "<u4"), ("flags", "u1")])
FORMAT = {"format": "iomm-index", "version": VERSION, "record_bytes": RECORD.itemsize}
CAPTIONS = {"txt": (CAPTION_TXT, caption_of_text), "json": (CAPTION_JSON, caption_of_json)}
MAX_ASPECT = 10.0                                     # a centre crop keeps a tenth of such a picture


@dataclass(frozen=True, kw_only=True)
class Index:
    """A loaded index: `records` (N of RECORD, memory-mapped), the shards in order, and how it was made."""

    folder: Path
    records: np.ndarray
    shards: list          # of {path, bytes, mtime_ns, num_samples}, and files if the shard is a folder
    rejected: dict        # reason -> count
    min_size_px: int


def build(shards, out, *, min_size_px=32, progress=True, workers=None):
    """Indexes `shards` (see expand) into the folder `out`, which appears only when complete; returns its path.

    A good sample is an image (jpg, jpeg, png, webp by name; JPEG, PNG or WebP by its bytes) that decodes fully, and if
    there is a caption of the same key (txt, else the "caption" of json), a readable one. The others are listed in
    rejected.jsonl: shard, key, reason, detail. Good samples stand shard by shard in the order in which their keys first
    appear. One thread per shard, `workers` of them (all cores if None): Pillow decodes without holding the interpreter
    lock. Raises InputError if nothing matches or no sample is good.
    """
    paths = expand(shards)
    entries = [_entry(path) for path in paths]
    num_bytes = sum(entry["bytes"] for entry in entries)
    bar = tqdm(total=num_bytes, unit="B", unit_scale=True, desc="index", disable=not progress)
    work = partial(_index_shard, min_size_px=min_size_px, tick=_Ticker(bar))
    with whole_folder(out, HEADER) as fresh, bar, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")      # damaged EXIF and the like: no reason to reject
        pool = ThreadPoolExecutor(workers or os.cpu_count())
        counts = Counter()
        try:
            with (open(fresh / RECORDS, "wb") as records_file,
                  open(fresh / REJECTED, "w", encoding="utf-8") as rejected_file):
                for number, (records, rejected, files) in enumerate(pool.map(work, paths)):
                    records["shard"] = number
                    records_file.write(records.tobytes())
                    entries[number] |= {"num_samples": len(records)} | ({"files": files} if files is not None else {})
                    for line in rejected:
                        counts[line["reason"]] += 1
                        rejected_file.write(json.dumps(line) + "\n")
        finally:
            pool.shutdown(cancel_futures=True)
        bar.update(max(bar.total - bar.n, 0))      # headers and padding
        num_samples = sum(entry["num_samples"] for entry in entries)
        if not num_samples:
            raise InputError(_nothing_good(paths, counts))
        header = FORMAT | {"num_samples": num_samples, "min_size_px": min_size_px,
                           "rejected": dict(counts.most_common()), "shards": entries}
        (fresh / HEADER).write_text(json.dumps(header), encoding="utf-8")
    return Path(out)


def load(folder):
    """The Index in `folder`. Raises InputError if it cannot be read, or if a shard has changed since."""
    folder = Path(folder)
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        if any(header[key] != value for key, value in FORMAT.items()):
            raise ValueError("made by another version")
        records = np.memmap(folder / RECORDS, dtype=RECORD, mode="r")
        if {len(records)} != {header["num_samples"], sum(shard["num_samples"] for shard in header["shards"])}:
            raise ValueError(f"{RECORDS} does not fit {HEADER}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"the index {folder} cannot be read ({error}): run `iomm index` again") from None
    for shard in header["shards"]:
        now = _entry(shard["path"])
        if now["mtime_ns"] != shard["mtime_ns"] or now["bytes"] != shard["bytes"]:
            raise InputError(f"{shard['path']} has changed since it was indexed: run `iomm index` again")
    return Index(folder=folder, records=records,
                 **{key: header[key] for key in ("shards", "rejected", "min_size_px")})


def ensure_index(shards, cache_root, *, min_size_px=32, progress=True, workers=None):
    """Folder of an up-to-date index of `shards` under cache_root; built if it is missing or a shard has changed."""
    folder = default_index_dir(shards, cache_root)
    try:
        if load(folder).min_size_px == min_size_px:
            return folder
    except InputError:
        pass      # build says what is wrong, if anything is
    return build(shards, folder, min_size_px=min_size_px, progress=progress, workers=workers)


def default_index_dir(shards, cache_root):
    """Where training keeps the index that it makes itself: named by a hash of the resolved list of shards."""
    names = "\n".join(str(path) for path in expand(shards))
    return Path(cache_root) / f"index-{hashlib.sha256(names.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"


def summary(folder):
    """One line on the good samples of an index, and a table of the rejected ones by reason (str)."""
    index = load(folder)
    lines = [f"{len(index.records):,} samples in {len(index.shards):,} shards"]
    lines += [f"  {count:>9,}  {reason}" for reason, count in index.rejected.items()]
    return "\n".join(lines + ([f"  listed in {index.folder / REJECTED}"] if index.rejected else []))


def expand(shards):
    """Sorted absolute paths that `shards` (a pattern or a list of them) names. Raises InputError if one names nothing.

    A pattern is a path, a glob, a brace list ({00000..00099}, {a,b}), or a folder: its tars if it holds any, else its
    images.
    """
    patterns = [shards] if isinstance(shards, str | os.PathLike) else list(shards)
    found = set()
    for pattern in patterns:
        pattern = os.path.expanduser(os.fspath(pattern))
        paths = [pattern]
        if not os.path.exists(pattern):      # a name with braces or brackets in it may simply exist
            paths = [path for part in _braces(pattern) for path in glob.glob(part, recursive=True)]
        if not paths:
            raise InputError(
                f"no shard matches {pattern!r}: give a tar, a folder, a glob or a list like {{00000..00099}}.tar")
        for path in map(os.path.abspath, paths):
            tars = glob.glob(os.path.join(glob.escape(path), "*.tar")) if os.path.isdir(path) else []
            found.update(tars or [path])
    if not found:
        raise InputError("no shards were given: data.shards is a path, a glob or a list of them")
    return [Path(path) for path in sorted(found)]


def _braces(pattern):
    """The patterns without braces that a pattern with braces stands for."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        parts = [f"{n:0{len(span[1])}d}" for n in range(int(span[1]), int(span[2]) + 1)]
    else:
        parts = match[1].split(",")
    return [pattern[:match.start()] + part + rest for rest in _braces(pattern[match.end():]) for part in parts]


def _entry(path):
    """What tells whether a shard has changed. Raises InputError if it is gone."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise InputError(f"the shard {path} cannot be read: {error.strerror}") from None
    is_file = not os.path.isdir(path)
    return {"path": str(path), "bytes": status.st_size if is_file else 0, "mtime_ns": status.st_mtime_ns}


def _index_shard(path, *, min_size_px, tick):
    """(records, rejected, files) of one shard; files is the list of a folder, else None. Damage is reported, not
    raised."""
    rejected = []

    def reject(key, reason, detail=""):
        rejected.append({"shard": str(path), "key": key, "reason": reason, "detail": str(detail)})

    records = []
    shard = None
    try:
        shard = Folder(path) if os.path.isdir(path) else Tar(path)
        members = shard.members()
        samples = _group_by_key(members, reject)
        for key, member in samples.items():
            try:
                records.append(_record(shard, member, min_size_px))
            except Rejected as error:
                reject(key, error.reason, error)
            tick(sum(num_bytes for _, num_bytes in member.values()))
    except OSError as error:
        reject("", "unreadable", error)
    records = np.array(records, dtype=RECORD)
    return records, rejected, getattr(shard, "files", None)


def _group_by_key(members, reject):
    """{key: {suffix: (offset, num_bytes)}} in the order of first appearance; names that may not be keys are
    rejected."""
    samples, twice = {}, set()
    try:
        for name, offset, num_bytes in members:
            key, _, suffix = name.rpartition(".")
            suffix = suffix.lower()
            if suffix not in SUFFIXES:
                continue
            if not _is_safe(name):
                reject(repr(name), "bad_name", "absolute, with .., or with unprintable characters")
                continue
            sample = samples.setdefault(key, {})
            slot = suffix if suffix in CAPTIONS else "image"
            if slot in sample:
                twice.add(key)
            sample[slot] = offset, num_bytes
    except TarError as error:
        reject("", "bad_tar", error)
    for key in twice:
        # nobody can say which image belongs to which caption
        del samples[key]
        reject(key, "duplicate", "the key has several images or captions")
    for key in [key for key, sample in samples.items() if "image" not in sample]:
        del samples[key]
        reject(key, "incomplete", "a caption without an image")
    return samples


def _is_safe(name):
    return name.isprintable() and not name.startswith("/") and ".." not in name.split("/")


def _record(shard, member, min_size_px):
    """One RECORD (its shard number still 0). Raises Rejected."""
    offset, num_bytes = member["image"]
    data = _read(shard, offset, num_bytes)
    width, height, transparent = check_image(data, min_size_px=min_size_px, max_aspect=MAX_ASPECT)
    flags, caption = TRANSPARENT if transparent else 0, (0, 0)
    for suffix in ("txt", "json"):
        if suffix in member:
            bit, parse = CAPTIONS[suffix]
            parse(_read(shard, *member[suffix]))
            flags, caption = flags | bit, member[suffix]
            break
    return 0, offset, num_bytes, width, height, zlib.crc32(data), *caption, flags


def _read(shard, offset, num_bytes):
    if num_bytes > 0xFFFFFFFF:
        raise Rejected("too_large", f"{num_bytes} bytes")
    try:
        data = shard.read(offset, num_bytes)
    except OSError as error:
        raise Rejected("unreadable", error.strerror) from None
    if len(data) != num_bytes:
        raise Rejected("unreadable", "the file changed while it was read")
    return data


def _nothing_good(paths, counts):
    where = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    if not counts or set(counts) <= {"incomplete"}:
        return f"{where}: no images inside (wanted members named *.jpg, *.jpeg, *.png or *.webp)"
    reasons = ", ".join(f"{reason} ({count})" for reason, count in counts.most_common())
    return f"{where}: no usable image; rejected as {reasons}"


class _Ticker:
    """Counts samples over all threads and shows images/s on the bar."""

    def __init__(self, bar):
        self.bar, self.started, self.num_images = bar, time.monotonic(), 0

    def __call__(self, num_bytes):
        self.num_images += 1
        if self.num_images % 64 == 0:
            images_per_s = self.num_images / (time.monotonic() - self.started)
            self.bar.set_postfix_str(f"{images_per_s:.0f} images/s", refresh=False)
        self.bar.update(num_bytes)
