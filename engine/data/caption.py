"""Strict parsing of caption bytes to text."""

import json

from iomm.engine.data.image import Rejected

MAX_BYTES = 1 << 16


class BadCaption(Rejected):
    """A caption that cannot be used.

    `kind` is one word, by which images are counted that are kept without it.
    """

    def __init__(self, kind: str, detail: object = "", reason: str = "caption") -> None:
        super().__init__(reason, detail)
        self.kind = kind


def check_size(num_bytes: int) -> None:
    """Raise BadCaption for a file that is too large to be read."""
    if num_bytes > MAX_BYTES:
        raise BadCaption("too_large", f"{num_bytes} bytes, over the limit of {MAX_BYTES}")


def caption_of_text(data: bytes) -> str:
    """Return the caption in the bytes of a .txt member, stripped of surrounding white space.

    Raises:
        BadCaption: with reason "caption".
    """
    check_size(len(data))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadCaption("not_utf8", f"not UTF-8 at byte {error.start}") from None
    return _checked(text.removeprefix("\ufeff"))


def caption_of_json(data: bytes) -> str:
    """Return the field "caption" of a .json member, or "" if it is missing or null.

    Raises:
        BadCaption: with reason "caption".
    """
    check_size(len(data))
    try:
        fields = json.loads(
            data.decode("utf-8").removeprefix("\ufeff"), parse_constant=_reject_constant
        )
    except (ValueError, RecursionError) as error:
        # Bad UTF-8, bad JSON, NaN, a number of 5,000 digits, 60,000 nested brackets.
        raise BadCaption("not_json", f"not JSON: {error}") from None
    text = fields.get("caption") if isinstance(fields, dict) else None
    if not isinstance(text, str | None):
        raise BadCaption("not_text", f"the caption is of type {type(text).__name__}, not text")
    return _checked(text or "")


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _checked(text: str) -> str:
    if "\0" in text:
        raise BadCaption("nul", "contains a NUL character")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise BadCaption("surrogate", "contains a lone surrogate, which UTF-8 cannot encode")
    return text.strip()
