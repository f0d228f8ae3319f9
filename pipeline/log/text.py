"""Text files as UTF-8, in pieces of bounded size that may end anywhere.

A byte order mark is dropped (UTF-16 and UTF-32 are recognised by theirs), a file whose lines end with CR alone gets LF,
and of an endless line only the beginning is passed on. Bytes that are no text in the file's encoding become
UNREADABLE, except in UTF-8, which is passed on unchecked.
"""

from __future__ import annotations

import codecs
import lzma
import re
import zlib
from collections.abc import Iterator

from pipeline.events import DataError
from pipeline.log.inputs import Input

LONGEST_LINE = 16 << 20
"""Bytes. A longer line is malformed, so that a small compressed file cannot fill the memory."""
UNREADABLE = "\ufdd0"
"""Stands for bytes that cannot be decoded. Unicode guarantees that no text has this code point."""

_MARKS = {
    codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
"""UTF-32 first: its little-endian mark begins with that of UTF-16."""
_LONGEST_MARK = 4
_FIRST_LINE_END = re.compile(rb"\r\n|\n|\r(?=.)", re.DOTALL)

codecs.register_error("unreadable", lambda error: (UNREADABLE, error.end))  # type: ignore[attr-defined]


def text_pieces(file: Input, *, encoding: str, size: int) -> Iterator[bytes]:
    """The file's text as UTF-8, at most about `size` bytes at a time. A line of more than LONGEST_LINE bytes is cut
    there and gets a NUL, which makes it malformed. DataError: the file cannot be read completely."""
    return _cut_endless_lines(_with_lf(_decoded(_stored(file, size), encoding)))


def decode(text: bytes) -> str:
    """UTF-8 -> text, with UNREADABLE in place of what is no UTF-8."""
    return text.decode("utf-8", "unreadable")


def _stored(file: Input, size: int) -> Iterator[bytes]:
    with file.open() as stream:
        try:
            piece = stream.read(max(size, _LONGEST_MARK))
            while piece:
                yield piece
                piece = stream.read(size)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            reason = " ".join(str(error).split())[:120]
            raise DataError(f"{file.name}: cannot be read ({reason}); copy it again") from error


def _decoded(pieces: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    first = next(pieces, b"")
    mark = next((mark for mark in _MARKS if first.startswith(mark)), b"")
    if mark and encoding.startswith("utf"):
        encoding = _MARKS[mark]
    if mark == codecs.BOM_UTF8:
        first = first.removeprefix(mark)
    if encoding == "utf-8":
        yield first
        yield from pieces
        return
    decoder = codecs.getincrementaldecoder(encoding)("unreadable")
    yield decoder.decode(first).encode()
    for piece in pieces:
        yield decoder.decode(piece).encode()
    yield decoder.decode(b"", final=True).encode()


def _with_lf(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Unchanged, except for files in which the first line ends with CR alone, as on old Macs: LF for each line end."""
    rest = b""
    for piece in pieces:
        rest += piece
        if found := _FIRST_LINE_END.search(rest):
            break
        # Hold back no more than a CR that may be the first half of a CR LF.
        whole = rest.removesuffix(b"\r")
        yield whole
        rest = rest[len(whole) :]
    else:
        yield rest.replace(b"\r", b"\n")
        return
    if found[0] != b"\r":
        yield rest
        yield from pieces
        return
    for piece in pieces:
        whole = rest.removesuffix(b"\r")
        yield whole.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        rest = rest[len(whole) :] + piece
    yield rest.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _cut_endless_lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    length = 0
    for piece in pieces:
        first = piece.find(b"\n")
        head = length + (first if first >= 0 else len(piece))
        if max(head, len(piece) - first - 1) <= LONGEST_LINE:
            yield piece
        else:
            yield b"\n".join(_cut(part, length if number == 0 else 0) for number, part in enumerate(piece.split(b"\n")))
        length = head if first < 0 else len(piece) - piece.rfind(b"\n") - 1


def _cut(part: bytes, before: int) -> bytes:
    """A part of a line that follows `before` bytes of the same line, without what is beyond LONGEST_LINE."""
    if before + len(part) <= LONGEST_LINE:
        return part
    return part[: LONGEST_LINE - before] + b"\0" if before <= LONGEST_LINE else b""
