"""Command-line arguments of the engine's programs, validated as strictly as config values."""

import argparse
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn

from iomm.config import InputError
from iomm.engine.config import SHARD_LISTS
from iomm.engine.config_parser import given_once

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
