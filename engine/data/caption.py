"""Caption bytes -> text, strictly."""

import json

from iomm.engine.data.image import Rejected

MAX_BYTES = 1 << 16


def caption_of_text(data):
    """str, stripped of white space at its ends, of the bytes of a .txt member. Raises Rejected("caption")."""
    if len(data) > MAX_BYTES:
        raise Rejected("caption", f"{len(data)} bytes, at most {MAX_BYTES} are read")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Rejected("caption", f"not UTF-8 at byte {error.start}") from None
    return _checked(text.removeprefix("\ufeff"))


def caption_of_json(data):
    """Str of the field "caption" of a .json member; empty if it has none or null. Raises Rejected("caption")."""
    if len(data) > MAX_BYTES:
        raise Rejected("caption", f"{len(data)} bytes, at most {MAX_BYTES} are read")
    try:
        fields = json.loads(data.decode("utf-8").removeprefix("\ufeff"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        # bad UTF-8, bad JSON, NaN, 5,000 digits, 60,000 brackets
        raise Rejected("caption", f"not JSON: {error}") from None
    text = fields.get("caption") if isinstance(fields, dict) else None
    if not isinstance(text, str | None):
        raise Rejected("caption", f"the caption is a {type(text).__name__}, not text")
    return _checked(text or "")


def _refuse(name):
    raise ValueError(f"{name} is not a number of JSON")


def _checked(text):
    if "\0" in text:
        raise Rejected("caption", "has a NUL character")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise Rejected("caption", "has a lone surrogate, which cannot be written as UTF-8")
    return text.strip()
