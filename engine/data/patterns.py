"""Resolve names of shards to paths."""

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from iomm.config import InputError
from iomm.engine.data.archive import (
    COMPRESSED_SUFFIXES,
    IMAGE_SUFFIXES,
    OTHER_IMAGE_SUFFIXES,
    LeftOut,
    hidden_reason,
)

# Pieces between commas that are tried together as one path.
MAX_JOINED = 8
# Names that an error lists.
MAX_NAMED = 3
# Shards that one brace list may name.
MAX_ALTERNATIVES = 1_000_000
URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://|pipe:")


class Resolved(NamedTuple):
    """The shards that patterns name, and what was found beside them and is not read."""

    paths: list[Path]
    left_out: LeftOut


def expand(shards: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """Return the sorted absolute paths that a pattern, or a list of patterns, names.

    A pattern is a path, a glob, a brace list ({00000..00099}, {a,b}) or a folder. A folder stands
    for the tars in it, or for its images if it has no tars. A string may hold several patterns,
    separated by commas. Where a path exists literally, its commas, brackets and braces have no
    other meaning.

    Raises:
        InputError: a pattern, or a part of a brace list, matches nothing, or none is given.
    """
    return resolve(shards).paths


def resolve(shards: str | os.PathLike | Iterable[str | os.PathLike]) -> Resolved:
    """Return the paths of `expand`, and what the folders hold besides them. Raises InputError."""
    patterns = [shards] if isinstance(shards, str | os.PathLike) else list(shards)
    patterns = [part for pattern in patterns for part in _parts(os.fspath(pattern))]
    found, left_out = set(), LeftOut()
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        is_glob = not os.path.exists(pattern) and glob.has_magic(os.path.basename(pattern))
        for path in map(os.path.abspath, _paths(pattern)):
            # A name that the user wrote out is read, whatever it is.
            if is_glob:
                reason = hidden_reason(os.path.basename(path), os.path.isdir(path))
                if reason:
                    left_out.add(reason, path)
                    continue
            found.update(_tars_in(path, left_out) or [path])
    if not found:
        raise InputError(
            "no shards were given; data.shards must be a path, a glob or a list of them"
            if not left_out
            else f"only hidden files and folders match: {left_out.describe()}. Name one of them "
            "without a glob to use it"
        )
    return Resolved([Path(path) for path in sorted(found)], left_out)


def _paths(pattern: str) -> list[str]:
    """Return the paths that one pattern names.

    Raises:
        InputError: the pattern, or an alternative of its braces, matches nothing.
    """
    head, rest = _literal_head(pattern)
    alternatives = [head + part for part in _braces(rest)]
    matches = {alternative: _matches(alternative) for alternative in alternatives}
    missing = [alternative for alternative, paths in matches.items() if not paths]
    if not missing:
        return [path for paths in matches.values() for path in paths]
    if URL.match(pattern):
        raise InputError(
            f"{pattern!r} is a URL, but shards are read from files; download it or mount it first"
        )
    if len(missing) == len(alternatives):
        raise InputError(
            f"no shard matches {pattern!r}; give a tar, a folder, a glob or a list like "
            "{00000..00099}.tar"
        )
    names = ", ".join(missing[:MAX_NAMED]) + (" ..." if len(missing) > MAX_NAMED else "")
    raise InputError(
        f"{len(missing)} of the {len(alternatives)} shards that {pattern!r} names do not exist: "
        f"{names}; restore them, or name only those that exist"
    )


def _tars_in(path: str, left_out: LeftOut) -> list[str]:
    """Return the tars in a folder, and count other data beside them."""
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError:
        # Not a folder, or an unreadable one, which indexing reports.
        return []
    tars = [
        entry.path
        for entry in entries
        if _suffix(entry.name) == "tar" and not entry.name.startswith(".")
    ]
    if tars:
        for entry in entries:
            if entry.name.startswith("."):
                if _is_data(entry.name):
                    left_out.add("hidden files", entry.path)
            elif _suffix(entry.name) in COMPRESSED_SUFFIXES:
                left_out.add(f"named *.{_suffix(entry.name)}", entry.path)
            elif _suffix(entry.name) in IMAGE_SUFFIXES + OTHER_IMAGE_SUFFIXES:
                left_out.add("images beside tars", entry.path)
            elif _suffix(entry.name) != "tar" and _holds_data(entry.path):
                left_out.add("folders beside tars", entry.path)
    return tars


def _holds_data(path: str) -> bool:
    """Return whether a folder holds tars or images, and is not hidden."""
    if hidden_reason(os.path.basename(path), is_folder=True):
        return False
    try:
        with os.scandir(path) as entries:
            return any(_is_data(entry.name) for entry in entries)
    except OSError:
        return False


def _is_data(name: str) -> bool:
    return _suffix(name) in ("tar", *IMAGE_SUFFIXES, *OTHER_IMAGE_SUFFIXES)


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()


def absolute(shards: str | tuple[str, ...], base: str | os.PathLike = ".") -> str | tuple[str, ...]:
    """Return a pattern, or several separated by commas, with names relative to `base` resolved.

    Braces and globs stay as they are, so files that are added later are found later. A list of
    patterns stays one.
    """
    if not isinstance(shards, str):
        return tuple(absolute(pattern, base) for pattern in shards)
    base = os.path.abspath(base)
    whole = os.path.join(base, os.path.expanduser(shards))
    if os.path.exists(whole):
        return os.path.normpath(whole)
    return ",".join(
        part if URL.match(part) else os.path.normpath(os.path.join(base, os.path.expanduser(part)))
        for part in _parts(shards)
    )


def _parts(pattern: str) -> list[str]:
    """Split a pattern at commas outside braces that are not in the name of an existing path."""
    if "," not in pattern or os.path.exists(os.path.expanduser(pattern)):
        return [pattern]
    pieces = re.findall(r"(?:\{[^{}]*\}|[^,{}]|[{}])+", pattern)
    parts, start = [], 0
    while start < len(pieces):
        alone = _matches_any(_trimmed(pieces[start]))
        for end in range(min(len(pieces), start + MAX_JOINED), start, -1):
            joined = _trimmed(",".join(pieces[start:end]))
            if end == start + 1 or _is_one(joined, alone):
                parts.append(joined)
                start = end
                break
    return [part for part in parts if part]


def _is_one(pattern: str, starts_another: bool) -> bool:
    """Return whether the commas outside braces belong to the names that a pattern matches.

    They are in the start of the pattern that exists literally, or what precedes the first one is
    no pattern by itself (starts_another) and the whole matches something.
    """
    head, rest = _literal_head(os.path.expanduser(pattern))
    if "," in head and "," not in re.sub(r"\{[^{}]*\}", "", rest):
        return True
    return not starts_another and _matches_any(pattern)


def _trimmed(text: str) -> str:
    """Return a part of a list without blanks around it, unless they belong to a name."""
    return text if os.path.exists(os.path.expanduser(text)) else text.strip()


def _matches_any(pattern: str) -> bool:
    head, rest = _literal_head(os.path.expanduser(pattern))
    return any(_matches(head + part) for part in _braces(rest))


def _literal_head(pattern: str) -> tuple[str, str]:
    """Split a pattern into its longest start that exists as a path, and the rest.

    The rest is "" or starts with a slash, unless nothing exists.
    """
    end = len(pattern)
    while end > 0:
        if os.path.exists(pattern[:end]):
            return pattern[:end], pattern[end:]
        end = pattern.rfind("/", 0, end)
    return ("", pattern)


def _matches(pattern: str) -> list[str]:
    """Return the paths that a glob matches. A part that exists literally is no glob."""
    head, rest = _literal_head(pattern)
    if not rest:
        return [head]
    rest = rest.lstrip("/")
    root = head or ("/" if pattern.startswith("/") else "")
    first, slash, tail = rest.partition("/")
    if "**" in first:
        return glob.glob(os.path.join(glob.escape(root), rest), recursive=True)
    if not glob.has_magic(first):
        return []
    found = glob.glob(os.path.join(glob.escape(root), first))
    if not slash:
        return found
    return [path for part in found if os.path.isdir(part) for path in _matches(f"{part}/{tail}")]


def _braces(pattern: str) -> list[str]:
    """Expand the braces of a pattern into a list of patterns, each once."""
    todo, done = [pattern], []
    while todo:
        text = todo.pop()
        match = re.search(r"\{([^{}]*)\}", text)
        if not match:
            done.append(text)
            continue
        todo += [text[: match.start()] + part + text[match.end() :] for part in _choices(match[1])]
        if len(todo) + len(done) > MAX_ALTERNATIVES:
            raise InputError(f"{pattern!r} names more than {MAX_ALTERNATIVES:,} shards")
    return sorted(set(done))


def _choices(text: str) -> list[str]:
    """Return the alternatives of a brace group: FIRST..LAST, FIRST..LAST..STEP, or a list."""
    span = re.fullmatch(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?", text)
    if not span:
        return text.split(",")
    first, last, step = int(span[1]), int(span[2]), max(1, int(span[3] or 1))
    if abs(last - first) // step > MAX_ALTERNATIVES:
        raise InputError(f"{{{text}}} names more than {MAX_ALTERNATIVES:,} shards")
    numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    return [f"{n:0{len(span[1])}d}" for n in numbers]
