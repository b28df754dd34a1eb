"""Command lines of the engine's programs: strict arguments, and errors as one sentence.

Imports nothing heavy, so that `iomm --help` is quick.
"""

import argparse
import errno
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from iomm.config import InputError
from iomm.engine.config_parser import given_once

# Keys that name shards. On the command line they may be given several times, as a shell does that
# expands a pattern.
SHARD_LISTS = ("data.shards", "data.pairs")
# Largest whole number of an option: a count beyond it can only be a mistake.
MOST = 2**31 - 1


class Parser(argparse.ArgumentParser):
    """An argument parser that raises InputError, and that refuses an option with two values.

    argparse itself would use the last one, so that `--run=runs/{a,b}`, which a shell turns into two
    options, would read one run.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name in (None, "store"):
            self.register("action", name, StoreOnce)

    def error(self, message: str) -> NoReturn:
        """Raise InputError with argparse's message."""
        own = re.fullmatch(r"argument ([^:]+): ((?:must|is) .*)", message, re.DOTALL)
        if own:
            raise InputError(f"{own[1]} {own[2]}")
        raise InputError(f"{message.removeprefix('argument ')}. See {self.prog} --help")


class StoreOnce(argparse.Action):
    """Store the value of an option, which may be repeated only with the same value."""

    value: Any = None

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if self.option_strings:
            if self.value not in (None, values):
                parser.error(
                    f"argument {self.option_strings[0]}: is given twice, as {self.value!r} and "
                    f"{values!r}: give it once, and put braces and globs in quotes"
                )
            self.value = values
        setattr(namespace, self.dest, values)


def path(text: str) -> str:
    """Return a path, a name or a pattern, which must not be empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError(
            "is empty. Give a value, or leave it out; a shell variable may be unset"
        )
    return text


def text(value: str) -> str:
    """Return a text, which may be empty but must be text: a shell passes any bytes on."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"must be UTF-8 text, got {value!r}") from None
    return value


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """Return the type of a whole number from `least` to `most`, written in decimal digits."""

    def read(value: str) -> int:
        if re.fullmatch(r"[+-]?[0-9]{1,20}", value) and least <= int(value) <= most:
            return int(value)
        limit = f"from {least} to {most}" if most != MOST else f">= {least}"
        raise argparse.ArgumentTypeError(f"must be a whole number {limit}, got {value!r}")

    return read


def number(least: float | None = None, *, above: float | None = None) -> Callable[[str], float]:
    """Return the type of a finite number that is at least `least`, or above `above`."""

    def read(value: str) -> float:
        try:
            found = float(value)
        except ValueError:
            found = math.nan
        low = (least is not None and found < least) or (above is not None and found <= above)
        if not math.isfinite(found) or low:
            limit = f">= {least:g}" if least is not None else f"> {above:g}"
            raise argparse.ArgumentTypeError(f"must be a number {limit}, got {value!r}")
        return found

    return read


def whole_variable(name: str, default: int, most: int = MOST) -> int:
    """Return an environment variable of a launcher as a whole number from 0 to `most`.

    Raises:
        InputError: it is something else.
    """
    try:
        return whole(0, most)(os.environ.get(name, str(default)))
    except argparse.ArgumentTypeError as error:
        raise InputError(
            f"the environment variable {name} {error}. Start with deepspeed or torchrun, which set "
            "it, or unset it"
        ) from None


# A seed selects a stream of the counter-based generator, which has 64 bits for it.
seed = whole(0, 2**64 - 1)


def shift(value: str) -> float | str:
    """Return the resolution shift of the time steps: "flux", or a number above 0."""
    if value == "flux":
        return value
    try:
        return number(above=0)(value)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(str(error).replace("must be", "must be flux or")) from None


class Overrides(argparse.Action):
    """Store "section.key=value" words, each key of which may have one value."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, given_once(values, SHARD_LISTS))


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the positional arguments `overrides`, which set keys of the config."""
    parser.add_argument("overrides", nargs="*", action=Overrides, metavar="section.key=value")


# What a user can do about an error of the operating system.
ADVICE = {
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "free some of your quota on that disk",
    errno.EACCES: "give a place that you may read and write",
    errno.EPERM: "give a place that you may read and write",
    errno.EROFS: "give a place that can be written",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOTDIR: "one of the folders in this path is a file",
    errno.EEXIST: "remove it, or give another place",
    errno.EISDIR: "a file was expected, not a folder",
}


def sentence(error: OSError) -> str:
    """Return an error of the operating system in one sentence, with the file that it concerns."""
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    advice = ADVICE.get(error.errno)
    return f"{where}{reason}{f'; {advice}' if advice else ''}"


def command_of_process(pid: int) -> tuple[list[str], int]:
    """Return the command line of a process and the process id of its parent."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return [os.fsdecode(word) for word in words], parent


def start_of_command(module: str) -> list[str]:
    """Return the words with which the user started this program, up to its own arguments.

    They are those of the launcher above this process, such as ["deepspeed", "--num_gpus", "2",
    "engine/launch.py"], and else those of Python, such as ["python", "engine/launch.py"].

    module: the program's dotted name, as `python -m` and `deepspeed --module` start it.
    """
    script = {sys.argv[0], os.path.abspath(sys.argv[0]), module}
    try:
        pid = os.getppid()
        while pid > 1:
            words, pid = command_of_process(pid)
            if found := launcher_words(words, script):
                return found
    except (OSError, ValueError, IndexError):
        # No /proc, or a process that has ended.
        pass
    number = len(sys.orig_argv) - len(sys.argv[1:])
    python, *rest = sys.orig_argv[:number]
    return [Path(python).name, *rest]


def launcher_words(words: list[str], script: set[str]) -> list[str]:
    """Return a launcher's command line up to the script, [] for another program's."""
    for at, word in enumerate(words[:4]):
        name = Path(word).name
        as_module = at > 0 and words[at - 1] == "-m" and name.startswith("torch.distributed.")
        if name not in ("deepspeed", "torchrun") and not as_module:
            continue
        for end in range(at + 1, len(words)):
            if words[end] in script:
                start = ["python", "-m", word] if as_module else [name]
                return [*start, *words[at + 1 : end + 1]]
    return []
