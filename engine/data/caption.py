"""Strict parsing of caption bytes to text."""

import json

from iomm.engine.data.image import Rejected

MAX_BYTES = 1 << 16


def caption_of_text(data: bytes) -> str:
    """Return the caption in the bytes of a .txt member, stripped of surrounding white space.

    Raises:
        Rejected: with reason "caption".
    """
    if len(data) > MAX_BYTES:
        raise Rejected("caption", f"{len(data)} bytes, over the limit of {MAX_BYTES}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Rejected("caption", f"not UTF-8 at byte {error.start}") from None
    return _checked(text.removeprefix("\ufeff"))


def caption_of_json(data: bytes) -> str:
    """Return the field "caption" of a .json member, or "" if it is missing or null.

    Raises:
        Rejected: with reason "caption".
    """
    if len(data) > MAX_BYTES:
        raise Rejected("caption", f"{len(data)} bytes, over the limit of {MAX_BYTES}")
    try:
        fields = json.loads(
            data.decode("utf-8").removeprefix("\ufeff"), parse_constant=_reject_constant
        )
    except (ValueError, RecursionError) as error:
        # Bad UTF-8, bad JSON, NaN, a number of 5,000 digits, 60,000 nested brackets.
        raise Rejected("caption", f"not JSON: {error}") from None
    text = fields.get("caption") if isinstance(fields, dict) else None
    if not isinstance(text, str | None):
        raise Rejected("caption", f"the caption is of type {type(text).__name__}, not text")
    return _checked(text or "")


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _checked(text: str) -> str:
    if "\0" in text:
        raise Rejected("caption", "contains a NUL character")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise Rejected("caption", "contains a lone surrogate, which UTF-8 cannot encode")
    return text.strip()
