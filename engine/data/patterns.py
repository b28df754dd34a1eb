"""Resolve names of shards to paths."""

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path

from iomm.config import InputError


def expand(shards: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """Return the sorted absolute paths that a pattern, or a list of patterns, names.

    A pattern is a path, a glob, a brace list ({00000..00099}, {a,b}) or a folder. A folder stands
    for the tars in it, or for its images if it has no tars. A string may hold several patterns,
    separated by commas.

    Raises:
        InputError: a pattern matches nothing, or none is given.
    """
    patterns = [shards] if isinstance(shards, str | os.PathLike) else list(shards)
    patterns = [part for pattern in patterns for part in _parts(os.fspath(pattern))]
    found = set()
    for pattern in patterns:
        pattern = os.path.expanduser(os.fspath(pattern))
        paths = [pattern]
        # A file may have braces or brackets in its name.
        if not os.path.exists(pattern):
            paths = [path for part in _braces(pattern) for path in glob.glob(part, recursive=True)]
        if not paths:
            raise InputError(
                f"no shard matches {pattern!r}; give a tar, a folder, a glob or a list like "
                "{00000..00099}.tar"
            )
        for path in map(os.path.abspath, paths):
            tars = (
                glob.glob(os.path.join(glob.escape(path), "*.tar")) if os.path.isdir(path) else []
            )
            found.update(tars or [path])
    if not found:
        raise InputError(
            "no shards were given; data.shards must be a path, a glob or a list of them"
        )
    return [Path(path) for path in sorted(found)]


def absolute(shards: str, base: str | os.PathLike = ".") -> str:
    """Return a pattern, or several separated by commas, with names relative to `base` resolved.

    Braces and globs stay as they are, so files that are added later are found later.
    """
    base = os.path.abspath(base)
    whole = os.path.join(base, os.path.expanduser(shards))
    if os.path.exists(whole):
        return os.path.normpath(whole)
    parts = [os.path.join(base, os.path.expanduser(part)) for part in _parts(shards)]
    return ",".join(map(os.path.normpath, parts))


def _parts(pattern: str) -> list[str]:
    """Split a pattern at commas outside braces, unless it is the name of an existing file."""
    if "," not in pattern or os.path.exists(pattern):
        return [pattern]
    return [
        part.strip() for part in re.findall(r"(?:\{[^{}]*\}|[^,{}]|[{}])+", pattern) if part.strip()
    ]


def _braces(pattern: str) -> list[str]:
    """Expand the braces of a pattern into a list of patterns."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        parts = [f"{n:0{len(span[1])}d}" for n in range(int(span[1]), int(span[2]) + 1)]
    else:
        parts = match[1].split(",")
    return [
        pattern[: match.start()] + part + rest
        for rest in _braces(pattern[match.end() :])
        for part in parts
    ]
