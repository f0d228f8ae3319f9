"""A JSON array as JSON lines, one for each element, in bounded memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import IO

from pipeline.events import DataError

LONGEST_ELEMENT = 16 << 20
"""Bytes; a longer element is refused."""
_CHUNK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_BLANK = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def is_array(head: bytes) -> bool:
    """Whether a file that begins with these bytes is a JSON array: no row of JSON lines begins with a bracket."""
    return head.removeprefix(_BOM).lstrip()[:1] == b"["


def array_lines(stream: IO[bytes], *, name: str) -> Iterator[bytes]:
    """Some lines at a time, with a line break after each. DataError: the array `name` is damaged or cut short.

    Brackets, commas and quotes are single bytes in every encoding but UTF-16, in which an array is refused as damaged:
    so the text is handled as Latin-1.
    """
    text = stream.read(_CHUNK_BYTES).removeprefix(_BOM).decode("latin-1")
    place = text.index("[") + 1
    passed, is_first = 0, True
    while True:
        # Take the elements that are complete in the text so far.
        elements, is_closed = [], is_first and text[_BLANK.match(text, place).end() :][:1] == "]"  # type: ignore[union-attr]
        if is_closed:
            place = text.index("]", place) + 1
        while not is_closed and (found := _element(text, place)):
            element, place, is_closed = found
            elements.append(element.replace("\n", " ").replace("\r", " ") + "\n")
        if elements:
            yield "".join(elements).encode("latin-1")
            is_first = False
        if is_closed:
            _refuse_more(text[place:], stream, name=name)
            return

        # Read on; an element that stays incomplete is no JSON, or too long.
        passed, text, place = passed + place, text[place:], 0
        chunk = stream.read(max(_CHUNK_BYTES, len(text))).decode("latin-1") if len(text) <= LONGEST_ELEMENT else ""
        if not chunk:
            raise DataError(
                f"{name}: no complete JSON array: {_why(text)} in the element at byte {passed}; repair it, or write "
                "one object per line, where a bad one costs one row"
            )
        text += chunk


def _element(text: str, start: int) -> tuple[str, int, bool] | None:
    """(the element that begins at `start`, the place after its comma or bracket, whether it is the last one); None if
    there is no complete element."""
    begin = _BLANK.match(text, start).end()  # type: ignore[union-attr]
    try:
        _, end = _DECODER.raw_decode(text, begin)
    except (ValueError, RecursionError):
        return None
    after = _BLANK.match(text, end).end()  # type: ignore[union-attr]
    if text[after : after + 1] not in (",", "]"):
        return None
    return text[begin:end], after + 1, text[after] == "]"


def _why(text: str) -> str:
    if len(text) > LONGEST_ELEMENT:
        return f"more than {LONGEST_ELEMENT >> 20} MiB"
    try:
        _DECODER.raw_decode(text, _BLANK.match(text).end())  # type: ignore[union-attr]
    except RecursionError:
        return "too many brackets"
    except ValueError as error:
        return str(error).partition(": line ")[0].lower()
    return "no comma or bracket after it"


def _refuse_more(rest: str, stream: IO[bytes], *, name: str) -> None:
    while not (rest := rest.strip()):
        if not (rest := stream.read(_CHUNK_BYTES).decode("latin-1")):
            return
    raise DataError(f"{name}: there is more after the end of its JSON array; keep one array per file")
