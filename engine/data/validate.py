"""One shard -> records of its good samples, and why the others are not. Runs in the worker processes of `iomm index`;
imports neither torch nor DALI, so that a worker starts in 0.1 s.
"""

import json
import os
import time
import zlib
from collections import Counter
from dataclasses import dataclass

import numpy as np

from iomm.config import InputError, choice
from iomm.engine.data.archive import SUFFIXES, Folder, Tar
from iomm.engine.data.caption import caption_of_json, caption_of_text
from iomm.engine.data.image import MAX_PIXELS, Rejected, check_image

# Bits of `flags`
CAPTION_TXT, CAPTION_JSON, TRANSPARENT, UNVERIFIED = 1, 2, 4, 8
# packed, little-endian, 37 bytes: 10 M samples are 370 MB
RECORD = np.dtype(
    [
        ("image_offset", "<u8"),
        ("image_bytes", "<u4"),
        ("crc32", "<u4"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("caption_offset", "<u8"),
        ("caption_bytes", "<u4"),
        ("caption_crc32", "<u4"),
        ("flags", "u1"),
    ]
)
CAPTIONS = {"txt": (CAPTION_TXT, caption_of_text), "json": (CAPTION_JSON, caption_of_json)}
# Where verify="fast" looks for an image's header first.
HEADER_BYTES = 1 << 16
# Samples told at once: what a crash costs at most to read again.
CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a good sample is. An index keeps them; another set of rules is another index."""

    # Of the shorter edge.
    min_size_px: int = 32
    # Longer edge / shorter edge; a centre crop keeps a tenth of such a picture.
    max_aspect: float = 10.0
    max_pixels: int = MAX_PIXELS
    # optional | required: a sample without a caption, or with an empty one, is rejected
    captions: str = "optional"
    # full: every image is decoded | fast: headers only, no checksums
    verify: str = "full"

    def __post_init__(self):
        choice("captions", self.captions, ("optional", "required"))
        choice("verify", self.verify, ("full", "fast"))
        if self.min_size_px < 1 or self.max_pixels < 1 or self.max_aspect < 1:
            raise InputError(
                "min_size_px, max_pixels and max_aspect must be >= 1, got "
                f"{self.min_size_px}, {self.max_pixels} and {self.max_aspect}"
            )


def judge_shard(path, rules, *, start=0, part=0, num_parts=1, poison=(), begin=lambda i: None):
    """Yields (num_judged, records, rejected, notes) of one shard, CHUNK samples or a second at a time, samples numbered
    from `start` on; then returns its list of files if it is a folder, else None. Of several parts, CHUNK samples each in
    turn, only one is looked at: chunks of all parts, sorted by num_judged, are those of the whole.

    records: RECORD array. rejected: list of {shard, key, reason, detail}. notes: counts of remarks on good samples.
    num_judged: samples done in all, from where another call may go on. poison: {number: (reason, detail)} of samples
    that are not looked at. begin(i) is called before sample i. Damage is told, never raised; what concerns the shard
    and not one sample comes with key "" and only if start and part are 0.
    """
    records, rejected, notes = [], [], Counter()

    def reject(key, reason, detail=""):
        rejected.append({"shard": str(path), "key": key, "reason": reason, "detail": str(detail)})

    def told(num_judged):
        chunk = np.array(records, dtype=RECORD), rejected[:], dict(notes)
        records.clear(), rejected.clear(), notes.clear()
        return num_judged, *chunk

    shard, num, last_told_s = None, 0, time.monotonic()
    try:
        shard = Folder(path) if os.path.isdir(path) else Tar(path)
        samples = group_by_key(
            shard.members(lambda reason, message: reject("", reason, message)), reject
        )
        missing = told_missing(path, len(samples) + sum(line["key"] != "" for line in rejected))
        if missing:
            reject("", "missing", missing)
        if start or part:
            rejected.clear()
        for num, (key, members) in enumerate(samples.items(), start=1):
            if num <= start or (num - 1) // CHUNK % num_parts != part:
                continue
            begin(num - 1)
            try:
                if num - 1 in poison:
                    raise Rejected(*poison[num - 1])
                record, remarks = judge_sample(shard, members, rules)
                records.append(record)
                notes.update(remarks)
            except Rejected as error:
                reject(key, error.reason, error)
            if num % CHUNK == 0 or time.monotonic() > last_told_s + 1:
                yield told(num)
                last_told_s = time.monotonic()
    except OSError as error:
        reject("", "unreadable", error)
    yield told(num)
    return getattr(shard, "files", None)


def group_by_key(members, reject):
    """{key: {suffix: (offset, num_bytes)}} in the order of first appearance; names that may not be keys are
    rejected.
    """
    samples, twice = {}, set()
    for name, offset, num_bytes in members:
        key, _, suffix = name.rpartition(".")
        suffix = suffix.lower()
        if suffix not in SUFFIXES:
            continue
        if not is_safe(name):
            reject(repr(name), "bad_name", "absolute, with .., or with unprintable characters")
            continue
        sample = samples.setdefault(key, {})
        slot = suffix if suffix in CAPTIONS else "image"
        if slot in sample:
            twice.add(key)
        sample[slot] = offset, num_bytes
    for key in twice:
        # nobody can say which image belongs to which caption
        del samples[key]
        reject(key, "duplicate", "the key has several images or captions")
    for key in [key for key, sample in samples.items() if "image" not in sample]:
        del samples[key]
        reject(key, "incomplete", "a caption without an image")
    return samples


def is_safe(name):
    return name.isprintable() and not name.startswith("/") and ".." not in name.split("/")


def told_missing(path, num_samples):
    """What is missing by the count that img2dataset writes beside a tar (NAME_stats.json), or None."""
    try:
        with open(os.path.splitext(path)[0] + "_stats.json", "rb") as f:
            wanted = json.loads(f.read(1 << 20))["successes"]
        if isinstance(wanted, int) and wanted > num_samples:
            return f"{wanted - num_samples} of {wanted} samples that its _stats.json counts"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        # Most shards have none.
        pass
    return None


def judge_sample(shard, members, rules):
    """(one RECORD, remarks) of a sample, or raises Rejected."""
    offset, num_bytes = members["image"]
    fast = rules.verify == "fast"
    limits = {
        "min_size_px": rules.min_size_px,
        "max_aspect": rules.max_aspect,
        "max_pixels": rules.max_pixels,
    }
    if fast:
        data, verdict = _header(shard, offset, num_bytes, limits)
    else:
        data = read_exactly(shard, offset, num_bytes)
        verdict = check_image(data, **limits)
    flags = (TRANSPARENT if verdict.transparent else 0) | (UNVERIFIED if fast else 0)
    remarks, caption, caption_crc32, text = list(verdict.notes), (0, 0), 0, ""
    for suffix in ("txt", "json"):
        if suffix in members:
            bit, parse = CAPTIONS[suffix]
            caption_data = read_exactly(shard, *members[suffix])
            text = parse(caption_data)
            flags, caption, caption_crc32 = flags | bit, members[suffix], zlib.crc32(caption_data)
            break
    if not text:
        if rules.captions == "required":
            raise Rejected(
                "incomplete" if not flags & (CAPTION_TXT | CAPTION_JSON) else "caption",
                "no caption",
            )
        remarks.append("no_caption")
    return (
        offset,
        num_bytes,
        0 if fast else zlib.crc32(data),
        verdict.width,
        verdict.height,
        *caption,
        caption_crc32,
        flags,
    ), remarks


def _header(shard, offset, num_bytes, limits):
    """(first bytes, Verdict) by the header alone; the whole image is read only where its header is longer."""
    if num_bytes > HEADER_BYTES:
        data = read_exactly(shard, offset, HEADER_BYTES)
        try:
            return data, check_image(data, whole=False, **limits)
        except Rejected as error:
            if error.reason not in ("truncated", "bad_header"):
                raise
    data = read_exactly(shard, offset, num_bytes)
    return data, check_image(data, whole=False, **limits)


def read_exactly(shard, offset, num_bytes):
    """Bytes of a member. Raises Rejected("unreadable")."""
    if num_bytes > 0xFFFFFFFF:
        raise Rejected("too_large", f"{num_bytes} bytes")
    try:
        data = shard.read(offset, num_bytes)
    except OSError as error:
        raise Rejected("unreadable", error.strerror) from None
    if len(data) < num_bytes:
        raise Rejected("unreadable", "the file changed while it was read")
    return data[:num_bytes]
