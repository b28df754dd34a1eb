"""Read YAML text into nested frozen dataclasses. Every key is typed, every error has file and line.

Scalars stay text until the field's type reads them, so `lr: 1e-4` is a number, `NO` is a string in
a string field and `010` is not octal. Aliases, unknown keys and repeated keys are errors. Nothing
in a file can run code.
"""

import ast
import difflib
import inspect
import io
import math
import textwrap
import tokenize
import types
import typing
from collections.abc import Collection, Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import yaml

from iomm.config import InputError

T = TypeVar("T")
# A key as the tuple of its names: ("optim", "lr").
Names = tuple[str, ...]
# YAML nested deeper than this is refused.
MAX_DEPTH = 10


def read(cls: type[T], text: str, source: str = "config", overrides: Iterable[str] = ()) -> T:
    """Return an instance of a dataclass, whose fields may be dataclasses, from YAML and overrides.

    Args:
        cls: the dataclass.
        text: YAML.
        source: name of the file in errors.
        overrides: "section.key=value"; they win over the text, and later ones over earlier ones.

    Raises:
        InputError: in one line, with file, line and key.
    """
    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
                event, yaml.CollectionEndEvent
            )
            line = event.start_mark.line + 1
            # 100,000 brackets keep PyYAML busy for minutes.
            if depth > MAX_DEPTH:
                raise InputError(f"{source}:{line}: nested more than {MAX_DEPTH} levels deep")
            if isinstance(event, yaml.AliasEvent):
                raise InputError(
                    f"{source}:{line}: YAML aliases (*name) are not allowed; write the value out"
                )
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(
            f"{source}{line}: not valid YAML: {getattr(error, 'problem', error)}"
        ) from error
    values, where = {}, {}
    if node is not None:
        read_section(cls, node, source, (), values, where)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise InputError(
                f"{override!r} must look like section.key=value. If a shell made several words of "
                "one value, put it in quotes: data.shards='/data/*.tar'"
            )
        names = tuple(key.split("."))
        kind = field_type(cls, names, "command line")
        if is_dataclass(kind):
            raise InputError(
                f"command line: {key} is a section; set one of its keys: "
                + ", ".join(f"{key}.{f.name}" for f in fields(kind))
            )
        if not value.strip():
            check_empty(cls, names, "command line")
        values[names], where[names] = scalar(kind, value, f"command line: {key}"), "command line"
    try:
        return build(cls, (), values)
    except InputError as error:
        # A value out of range: add where it was given.
        given = [place for names, place in where.items() if ".".join(names) in str(error)]
        raise InputError(f"{given[-1]}: {error}" if given else str(error)) from None


def given_once(overrides: Iterable[str], lists: Collection[str] = ()) -> list[str]:
    """Return what a user gave as "section.key=value", with the values of a list joined by commas.

    A shell makes several words of a glob or of a brace list that is not in quotes. For the keys in
    `lists` they are one list again. A repeated word counts once.

    Raises:
        InputError: any other key is given with several values, of which the last one would win.
    """
    values: dict[str, list[str]] = {}
    for override in overrides:
        key, equals, _ = override.partition("=")
        found = values.setdefault(key if equals else override, [])
        if override not in found:
            found.append(override)
    words = []
    for key, found in values.items():
        given = [word.partition("=")[2] for word in found]
        if len(found) == 1:
            words += found
        elif key in lists and all(given) and not any("," in text for text in given):
            words.append(f"{key}={','.join(given)}")
        else:
            raise InputError(
                f"command line: {key} is given {len(found)} times, as "
                f"{', '.join(map(repr, given[:3]))}{' ...' * (len(found) > 3)}. Give it once, and "
                "put a value with braces, globs or blanks in quotes"
            )
    return words


def layered(overrides: Iterable[str]) -> list[str]:
    """Return "section.key=value" words without those that a later word of the same key replaces.

    For programs that put a user's settings on top of their own. Other words are kept.
    """
    last: dict[str, str] = {}
    for number, word in enumerate(overrides):
        key, equals, _ = word.partition("=")
        last[key if equals and not word.startswith("-") else f"{number} {word}"] = word
    return list(last.values())


def read_section(
    cls: type,
    node: yaml.Node,
    source: str,
    path: Names,
    values: dict[Names, Any],
    places: dict[Names, str],
) -> None:
    """Read the keys of a YAML mapping into `values`, and "file:line" of each into `places`."""
    if not isinstance(node, yaml.MappingNode):
        where = f"{source}:{node.start_mark.line + 1}"
        raise InputError(f"{where}: {'.'.join(path) or 'the file'} must be a section of keys")
    for key_node, value_node in node.value:
        where = f"{source}:{key_node.start_mark.line + 1}"
        names = (*path, str(key_node.value))
        kind = field_type(cls, names, where)
        if is_dataclass(kind):
            read_section(cls, value_node, source, names, values, places)
            continue
        if names in values:
            raise InputError(f"{where}: {'.'.join(names)} is given twice")
        if is_blank(value_node) and not (is_optional(kind) and value_node.style is None):
            check_empty(cls, names, where)
        values[names], places[names] = (
            value_of(kind, value_node, f"{where}: {'.'.join(names)}"),
            where,
        )


def field_type(cls: type, names: Names, where: str) -> Any:
    """Return the type of the field at a path of names.

    Raises:
        InputError: there is no such key; the error names the nearest known one.
    """
    kind, hints = cls, {}
    for name in names:
        hints = typing.get_type_hints(kind) if is_dataclass(kind) else {}
        if name not in hints:
            key = ".".join(names)
            near = difflib.get_close_matches(key, all_keys(cls), n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"{where}: unknown key {key}{hint}")
        kind = hints[name]
    return kind


def check_empty(cls: type, names: Names, where: str) -> None:
    """Raise InputError unless the key at a path of names may be empty, as its default is."""
    *sections, name = names
    for section in sections:
        cls = typing.get_type_hints(cls)[section]
    if next(field.default for field in fields(cls) if field.name == name) != "":
        raise InputError(
            f"{where}: {'.'.join(names)} is empty. Give a value, or leave it out; a shell variable "
            "may be unset"
        )


def is_blank(node: yaml.Node) -> bool:
    """Return whether a YAML node is a text without characters other than blanks."""
    return isinstance(node, yaml.ScalarNode) and not node.value.strip()


def is_optional(kind: Any) -> bool:
    """Return whether null is a value of a type."""
    return types.NoneType in typing.get_args(kind)


def all_keys(cls: type, prefix: str = "") -> list[str]:
    """Return the dotted names of all keys."""
    keys = []
    for name, kind in typing.get_type_hints(cls).items():
        keys += all_keys(kind, f"{prefix}{name}.") if is_dataclass(kind) else [prefix + name]
    return keys


class Documented(typing.NamedTuple):
    """Documentation of a key. `meaning` is "" if the field has no comment."""

    key: str
    kind: str
    default: object
    meaning: str


def documented(cls: type, prefix: str = "") -> Iterator[Documented]:
    """Yield every key with its type, its default and the comment of its field.

    The comment is above the field, or to its right. One to the right may continue in the lines
    below, if they are indented further than the field.
    """
    source = textwrap.dedent(inspect.getsource(cls))
    # {line: text} of comments after code, {line: (column, text)} of comments on their own line.
    trailing, own_line = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            (line, column), text = token.start, token.string.removeprefix("#").strip()
            if token.line[:column].isspace():
                own_line[line] = column, text
            else:
                trailing[line] = text
    hints, members = typing.get_type_hints(cls), {field.name: field for field in fields(cls)}
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        name, words = node.target.id, []
        if is_dataclass(hints[name]):
            yield from documented(hints[name], f"{prefix}{name}.")
            continue
        if node.end_lineno in trailing:
            words, line = [trailing[node.end_lineno]], node.end_lineno + 1
            while line in own_line and own_line[line][0] > node.col_offset:
                words.append(own_line[line][1])
                line += 1
        else:
            line = node.lineno - 1
            while line in own_line and own_line[line][0] == node.col_offset:
                words.insert(0, own_line[line][1])
                line -= 1
        kind = ast.unparse(node.annotation).replace(" | None", " or null")
        kind = kind.replace(" | tuple[str, ...]", " or list").replace(" | str", " or str")
        yield Documented(prefix + name, kind, members[name].default, " ".join(words))


def value_of(kind: Any, node: yaml.Node, where: str) -> Any:
    """Return a YAML node as `kind`. Raises InputError for lists, sections and quoted numbers."""
    if isinstance(node, yaml.SequenceNode):
        kinds = (kind, *typing.get_args(kind))
        listed = next((k for k in kinds if typing.get_origin(k) is tuple), None)
        if listed is None:
            raise InputError(f"{where} must be {spell(kind)}, got a list")
        if not all(isinstance(item, yaml.ScalarNode) for item in node.value):
            raise InputError(f"{where} must be {spell(kind)}, got a nested list")
        items = [str(item.value) for item in node.value]
        check_text("".join(items), where)
        return tuple(items) if is_texts(listed) else scalar(listed, ",".join(items), where)
    if not isinstance(node, yaml.ScalarNode):
        raise InputError(f"{where} must be {spell(kind)}, got a section")
    if node.style in ("'", '"') and str not in (kind, *typing.get_args(kind)):
        raise InputError(f"{where} must be {spell(kind)}, got the quoted text {node.value!r}")
    return scalar(kind, node.value, where)


def scalar(kind: Any, text: str, where: str) -> Any:
    """Return `text` as `kind`. Raises InputError unless it is written exactly as that type."""
    check_text(text, where)
    if typing.get_origin(kind) is types.UnionType:
        if text in ("null", "~", "") and types.NoneType in typing.get_args(kind):
            return None
        kinds = [k for k in typing.get_args(kind) if k is not types.NoneType]
        # A number or a word, which the section checks.
        if kinds == [int, str] and not text.lstrip("+-").isdigit():
            return text
        kind = kinds[0]
    try:
        if kind is bool:
            return {"true": True, "false": False}[text]
        if kind is int:
            if text.lstrip("+-") != str(abs(int(text))):
                raise ValueError
            return int(text)
        if kind is float:
            if not math.isfinite(float(text)):
                raise ValueError
            return float(text)
        if is_texts(kind):
            return tuple(part.strip() for part in text.split(" | "))
        if typing.get_origin(kind) is tuple:
            kinds, items = typing.get_args(kind), text.strip("[]()").split(",")
            if len(items) != len(kinds):
                raise ValueError
            return tuple(
                scalar(k, item.strip(), where) for k, item in zip(kinds, items, strict=True)
            )
        return text
    except (ValueError, KeyError):
        raise InputError(f"{where} must be {spell(kind)}, got {text!r}") from None


def check_text(text: str, where: str) -> None:
    """Raise InputError unless a value is text that a file can hold: a shell passes any bytes on."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where} must be UTF-8 text, got {text!r}") from None
    if "\0" in text:
        raise InputError(f"{where} must not contain a null character, got {text!r}")


def is_texts(kind: Any) -> bool:
    """Return whether a type is tuple[str, ...]."""
    return typing.get_origin(kind) is tuple and typing.get_args(kind) == (str, ...)


def spell(kind: Any) -> str:
    """Return the name of a type in errors."""
    if typing.get_origin(kind) is types.UnionType:
        kinds = typing.get_args(kind)
        # "a text or a list of texts" includes text.
        if any(is_texts(k) for k in kinds):
            kinds = [k for k in kinds if k is not str]
        return " or ".join(spell(k) for k in kinds)
    if is_texts(kind):
        return "a text or a list of texts"
    if typing.get_origin(kind) is tuple:
        return f"{len(typing.get_args(kind))} numbers separated by commas"
    return {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        types.NoneType: "null",
    }[kind]


def build(cls: type[T], path: Names, values: dict[Names, Any]) -> T:
    """Return an instance of a dataclass from {names: value}. Missing keys keep their default."""
    given = {}
    for name, kind in typing.get_type_hints(cls).items():
        if is_dataclass(kind):
            given[name] = build(kind, (*path, name), values)
        elif (*path, name) in values:
            given[name] = values[(*path, name)]
    return cls(**given)
