"""Validate one shard: records of its good samples, and the reason for each rejected one.

Runs in the worker processes of `iomm index`. It imports neither torch nor DALI, so a worker starts
in 0.1 s.
"""

import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from iomm.config import InputError, choice
from iomm.engine.data.archive import (
    OTHER_IMAGE_SUFFIXES,
    Folder,
    LeftOut,
    Member,
    Tar,
    reason_to_leave_out,
)
from iomm.engine.data.caption import BadCaption, caption_of_json, caption_of_text, check_size
from iomm.engine.data.image import MAX_PIXELS, ImageInfo, Rejected, check_image

# Bits of `flags`.
CAPTION_TXT = 1
CAPTION_JSON = 2
TRANSPARENT = 4
UNVERIFIED = 8
# Packed and little-endian, 37 bytes. 10 M samples are 370 MB.
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
# verify="fast" reads this much of an image first, to find its header.
HEADER_BYTES = 1 << 16
# Samples reported at a time. After a crash at most this many are validated again.
CHUNK = 256
# In a sample's members: its key has several captions with the same suffix.
TWO_CAPTIONS = "two captions"
# Why a mask or a depth map is left out.
MORE_PICTURES = "of the form K.x.png beside K.jpg"

# Called with key, reason and detail of a rejected sample.
Reject = Callable[..., None]
# Suffix of a caption, "image" or TWO_CAPTIONS -> (offset, num_bytes).
Members = dict[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Rules for good samples. They are stored in the index, and other rules need another index."""

    # Of the shorter edge.
    min_size_px: int = 32
    # Longer edge / shorter edge. At 10 a centre crop keeps a tenth of the picture.
    max_aspect: float = 10.0
    max_pixels: int = MAX_PIXELS
    # optional, or required: a sample without a caption, or with an empty one, is rejected.
    captions: str = "optional"
    # full: every image is decoded. fast: only headers are read, without checksums.
    verify: str = "full"

    def __post_init__(self) -> None:
        choice("captions", self.captions, ("optional", "required"))
        choice("verify", self.verify, ("full", "fast"))
        if self.min_size_px < 1 or self.max_pixels < 1 or self.max_aspect < 1:
            raise InputError(
                "min_size_px, max_pixels and max_aspect must be >= 1, got "
                f"{self.min_size_px}, {self.max_pixels} and {self.max_aspect}"
            )


DEFAULT_RULES = Rules()


class Chunk(NamedTuple):
    """The result for some consecutive samples of a shard."""

    # Samples of the shard that are done, from where another call may resume.
    num_validated: int
    # RECORD array of the good samples.
    records: np.ndarray
    # {shard, key, reason, detail} of each rejected sample.
    rejected: list[dict[str, str]]
    # Counts of remarks on the good samples.
    notes: dict[str, int]
    # See LeftOut. In the first chunk of a shard.
    left_out: dict[str, list]


def validate_shard(
    path: str | os.PathLike,
    rules: Rules,
    *,
    start: int = 0,
    part: int = 0,
    num_parts: int = 1,
    known_bad: dict[int, tuple[str, str]] | None = None,
    begin: Callable[[int], None] = lambda i: None,
) -> Generator[Chunk, None, list[str] | None]:
    """Yield the results for a shard in chunks of CHUNK samples, or of one second.

    Damage is returned as rejections and not raised. A file that cannot be read costs its sample.
    Damage of the shard itself has the key "". It is reported only if start and part are 0, except
    that every part reports a shard that cannot be read at all.

    Args:
        path: a tar or a folder.
        rules: rules for good samples.
        start: number of the first sample to validate.
        part: which part of the shard to validate. Parts take turns of CHUNK samples. The chunks of
            all parts, sorted by num_validated, are the chunks of the whole shard.
        num_parts: number of parts.
        known_bad: {number: (reason, detail)} of samples that are rejected unread.
        begin: called with the number of each sample before it is read.

    Returns:
        The list of files if the shard is a folder, else None.
    """
    known_bad = known_bad or {}
    records = []
    rejected = []
    notes = Counter()
    left_out = LeftOut()

    def reject(key: str, reason: str, detail: object = "") -> None:
        rejected.append(rejection(path, key, reason, detail))

    def take_chunk(num_validated: int) -> Chunk:
        chunk = Chunk(
            num_validated,
            np.array(records, dtype=RECORD),
            rejected[:],
            dict(notes),
            dict(left_out),
        )
        left_out.clear()
        records.clear()
        rejected.clear()
        notes.clear()
        return chunk

    shard = None
    num = 0
    last_chunk_s = time.monotonic()
    try:
        shard = Folder(path) if os.path.isdir(path) else Tar(path)
        samples = group_by_key(
            shard.members(lambda reason, message: reject("", reason, message), left_out),
            reject,
            left_out,
        )
        missing = missing_samples(path, len(samples) + sum(line["key"] != "" for line in rejected))
        if missing:
            reject("", "missing", missing)
        if start or part:
            rejected.clear()
            left_out.clear()
        for num, (key, members) in enumerate(samples.items(), start=1):
            if num <= start or (num - 1) // CHUNK % num_parts != part:
                continue
            begin(num - 1)
            try:
                if num - 1 in known_bad:
                    raise Rejected(*known_bad[num - 1])
                record, remarks = validate_sample(shard, members, rules)
                records.append(record)
                notes.update(remarks)
            except Rejected as error:
                reject(key, error.reason, error)
            if num % CHUNK == 0 or time.monotonic() > last_chunk_s + 1:
                yield take_chunk(num)
                last_chunk_s = time.monotonic()
    except OSError as error:
        reject("", "unreadable", error.strerror or error)
    yield take_chunk(num)
    return getattr(shard, "files", None)


def rejection(
    path: str | os.PathLike, key: str, reason: str, detail: object = ""
) -> dict[str, str]:
    """Return a line of rejected.jsonl. key: "" for the shard itself."""
    return {"shard": str(path), "key": key, "reason": reason, "detail": str(detail)}


def group_by_key(
    members: Iterable[Member], reject: Reject, left_out: LeftOut
) -> dict[str, Members]:
    """Return {key: {suffix: (offset, num_bytes)}} in the order in which keys first appear.

    Unsafe names, duplicate images and captions without an image are passed to `reject`. Members
    that belong to no sample are counted in `left_out`: see reason_to_leave_out, and K.x.png where
    K.jpg is an image, which is another picture of that sample, such as a mask.
    """
    samples = {}
    # Images with unusual suffixes.
    others = {}
    duplicates = set()
    for name, offset, num_bytes in members:
        reason = reason_to_leave_out(name)
        if reason:
            left_out.add(reason, name)
            continue
        if not is_safe(name):
            reject(repr(name), "bad_name", "absolute, with .., or with unprintable characters")
            continue
        key, _, suffix = name.rpartition(".")
        suffix = suffix.lower()
        sample = samples.setdefault(key, {})
        if suffix in OTHER_IMAGE_SUFFIXES:
            others.setdefault(key, []).append((name, offset, num_bytes))
            continue
        slot = suffix if suffix in CAPTIONS else "image"
        if slot not in sample:
            sample[slot] = offset, num_bytes
        elif slot == "image":
            duplicates.add(key)
        else:
            sample[TWO_CAPTIONS] = offset, num_bytes
    for key, found in others.items():
        if "image" not in samples[key]:
            _, *samples[key]["image"] = found.pop(0)
        for name, _, _ in found:
            left_out.add(MORE_PICTURES, name)
    for key in [key for key in samples if _is_picture_of(key, samples)]:
        left_out.add(MORE_PICTURES, key, len(samples.pop(key)))
        duplicates.discard(key)
    for key in duplicates:
        # It is unknown which image belongs to which caption.
        del samples[key]
        reject(key, "duplicate", "the key has several images")
    for key in [key for key, sample in samples.items() if "image" not in sample]:
        del samples[key]
        reject(key, "incomplete", "a caption without an image")
    return samples


def _is_picture_of(key: str, samples: dict[str, Members]) -> bool:
    """Return whether a key like 0.seg belongs to the image of the key 0."""
    start = key.rfind("/") + 1
    end = key.find(".", start + 1)
    while end > 0:
        if "image" in samples.get(key[:end], ()):
            return True
        end = key.find(".", end + 1)
    return False


def is_safe(name: str) -> bool:
    return name.isprintable() and not name.startswith("/") and ".." not in name.split("/")


def missing_samples(path: str | os.PathLike, num_samples: int) -> str | None:
    """Return how many samples a tar lacks, as text, or None if it lacks none.

    The expected number is in NAME_stats.json, which img2dataset writes next to a tar.
    """
    try:
        with open(os.path.splitext(path)[0] + "_stats.json", "rb") as f:
            expected = json.loads(f.read(1 << 20))["successes"]
        if isinstance(expected, int) and expected > num_samples:
            return f"{expected - num_samples} of {expected} samples counted by its _stats.json"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        # Most shards have no such file.
        pass
    return None


def validate_sample(
    shard: Tar | Folder, members: Members, rules: Rules
) -> tuple[tuple[int, ...], list[str]]:
    """Return (the fields of a RECORD, remarks) of a sample. Raises Rejected."""
    offset, num_bytes = members["image"]
    fast = rules.verify == "fast"
    limits = {
        "min_size_px": rules.min_size_px,
        "max_aspect": rules.max_aspect,
        "max_pixels": rules.max_pixels,
    }
    if fast:
        data, info = _header(shard, offset, num_bytes, limits)
    else:
        data = read_exactly(shard, offset, num_bytes)
        info = check_image(data, **limits)
    flags = (TRANSPARENT if info.transparent else 0) | (UNVERIFIED if fast else 0)
    remarks = list(info.notes)
    caption = (0, 0)
    caption_crc32 = 0
    text = ""
    problem = None
    if TWO_CAPTIONS in members:
        problem = BadCaption("duplicate", "the key has several captions", "duplicate")
    for suffix, (bit, parse) in CAPTIONS.items():
        if suffix not in members or TWO_CAPTIONS in members:
            continue
        try:
            caption_data = _read_caption(shard, *members[suffix])
            found = parse(caption_data)
        except BadCaption as error:
            problem = problem or error
            continue
        # The first caption with a text counts, or else the first readable one.
        if found or not flags & (CAPTION_TXT | CAPTION_JSON):
            flags = flags & ~(CAPTION_TXT | CAPTION_JSON) | bit
            caption = members[suffix]
            caption_crc32 = zlib.crc32(caption_data)
            text = found
        if text:
            break
    if not text:
        if rules.captions == "required":
            if problem:
                raise problem
            if flags & (CAPTION_TXT | CAPTION_JSON):
                raise Rejected("caption", "no caption")
            raise Rejected("incomplete", "no caption")
        remarks.append("no_caption")
    if problem:
        remarks.append(f"caption_{problem.kind}")
    return (
        offset,
        num_bytes,
        0 if fast else zlib.crc32(data),
        info.width,
        info.height,
        *caption,
        caption_crc32,
        flags,
    ), remarks


def _read_caption(shard: Tar | Folder, offset: int, num_bytes: int) -> bytes:
    """Return the bytes of a caption. Raises BadCaption."""
    check_size(num_bytes)
    try:
        return read_exactly(shard, offset, num_bytes)
    except Rejected as error:
        raise BadCaption("unreadable", error, error.reason) from None


def _header(
    shard: Tar | Folder, offset: int, num_bytes: int, limits: dict[str, Any]
) -> tuple[bytes, ImageInfo]:
    """Validate the header of an image.

    The whole image is read only where its header is longer than HEADER_BYTES.

    Args:
        shard: the shard.
        offset: offset of the image.
        num_bytes: size of the image.
        limits: keyword arguments of check_image.

    Returns:
        The bytes that were read, and the properties of the image.
    """
    if num_bytes > HEADER_BYTES:
        data = read_exactly(shard, offset, HEADER_BYTES)
        try:
            return data, check_image(data, whole=False, **limits)
        except Rejected as error:
            if error.reason not in ("truncated", "bad_header"):
                raise
    data = read_exactly(shard, offset, num_bytes)
    return data, check_image(data, whole=False, **limits)


def read_exactly(shard: Tar | Folder, offset: int, num_bytes: int) -> bytes:
    """Return the bytes of a member.

    Raises:
        Rejected: with reason "unreadable", or "too_large" for 4 GiB and more.
    """
    if num_bytes > 0xFFFFFFFF:
        raise Rejected("too_large", f"{num_bytes} bytes")
    try:
        data = shard.read(offset, num_bytes)
    except OSError as error:
        raise Rejected("unreadable", error.strerror or error) from None
    if len(data) < num_bytes:
        raise Rejected("unreadable", "the file changed while it was read")
    return data[:num_bytes]
