"""Cuts text into records: lines, or CSV records by RFC 4180, whose quoted fields may hold line breaks.

    1,"a        one record over two lines
    b",5        a line break between quotes belongs to the field
    2,"c,6      malformed: the quote does not close, so only this line is lost
    3,d,7       one record

Every rule looks at the text alone and not at where a block of it begins, so any size of blocks gives the same records.
Each line is looked at twice at most, whatever its quotes are.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import numpy as np

LONGEST_QUOTED = 128 << 10
"""Bytes. A record over several lines that is longer has an open quote: its first line is malformed, and the next line
begins a record. Python's csv module has the same limit for a field."""

_QUOTE, _LF, _CR = b'"\n\r'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """The complete records at the start of a text."""

    records: bytes
    """The records that can be parsed, with their line ends."""
    malformed: list[bytes]
    """Lines that are no record."""
    malformed_at: list[int]
    """The place of each malformed line among all records and malformed lines, from 0, ascending."""
    used: int
    """Bytes of the text that are cut; the rest is the start of a record."""


def cut_lines(text: bytes, *, final: bool) -> Cut:
    """Each line is a record; blank lines are none. A line with a NUL is malformed. `final`: nothing follows."""
    end = len(text) if final else text.rfind(b"\n") + 1
    if b"\0" not in text:
        return Cut(records=text[:end], malformed=[], malformed_at=[], used=end)
    found = _Found(text)
    for line in _LINES.findall(text[:end]):
        found.add(len(line), is_malformed=b"\0" in line, is_blank=not _without_end(line))
    return found.cut()


def cut_records(text: bytes, *, separator: bytes, final: bool) -> Cut:
    """The CSV records of a text that begins with a record; `separator` is one byte. `final`: nothing follows."""
    plain = _cut_plain(text, separator=separator, final=final)
    return plain or _cut_by_line(text, separator=separator, final=final)


def first_record(text: bytes, *, separator: bytes | None, final: bool) -> tuple[bytes, int] | None:
    """(the first record without its line end, where the next one begins); None if the text has no complete record.

    `separator`: None = each line is a record.
    """
    start = _BLANK_LINES.match(text).end()  # type: ignore[union-attr]
    pattern = _LINE if separator is None else _patterns(separator).record
    found = pattern.match(text, start)
    if not found or (not found["end"] and not final) or not found["record"]:
        return None
    return found["record"].removesuffix(b"\r"), found.end()


def _cut_plain(text: bytes, *, separator: bytes, final: bool) -> Cut | None:
    """All records at once, where it is certain that each quote opens or closes a field; else None."""
    if b"\0" in text or text.count(b"\r") != text.count(b"\r\n"):
        return None
    if _QUOTE not in text:
        end = len(text) if final else text.rfind(b"\n") + 1
        return Cut(records=text[:end], malformed=[], malformed_at=[], used=end)
    letters = np.frombuffer(text, np.uint8)
    quotes = np.flatnonzero(letters == _QUOTE)
    if not _are_regular(letters, quotes, separator=separator[0]):
        return None
    breaks = np.flatnonzero(letters == _LF)
    ends = breaks[np.searchsorted(quotes, breaks) % 2 == 0] + 1
    if final and len(quotes) % 2 == 0 and (not len(ends) or ends[-1] < len(text)):
        ends = np.append(ends, len(text))
    end = int(ends[-1]) if len(ends) else 0
    # The length of each record, and of the rest.
    longest = np.diff(ends, prepend=0, append=len(text)).max()
    if longest > LONGEST_QUOTED or (final and end < len(text)):
        return None
    return Cut(records=text[:end], malformed=[], malformed_at=[], used=end)


def _are_regular(letters: np.ndarray, quotes: np.ndarray, *, separator: int) -> bool:
    """Whether the quotes alternate between opening a field (at its start) and closing it (at its end); a doubled quote
    inside a field closes and opens it."""
    opening, closing = quotes[0::2], quotes[1::2]
    is_doubled = closing[: len(opening) - 1] + 1 == opening[1:]
    before = letters[opening - 1]
    starts = (before == separator) | (before == _LF) | (opening == 0)
    starts[1:] |= is_doubled
    after = letters[np.minimum(closing + 1, len(letters) - 1)]
    stops = (after == separator) | (after == _LF) | (after == _CR) | (closing == len(letters) - 1)
    stops[: len(is_doubled)] |= is_doubled
    return bool(starts.all() and stops.all())


def _cut_by_line(text: bytes, *, separator: bytes, final: bool) -> Cut:
    """All records, whatever the quotes are."""
    patterns, lines = _patterns(separator), _LINES.findall(text)
    complete = len(lines) if final or text.endswith(b"\n") else len(lines) - 1
    starts = np.cumsum([0, *map(len, lines)]).tolist()
    closing = _Closing(lines[:complete], patterns.inside)
    found, number = _Found(text), 0
    while number < complete:
        line = _without_end(lines[number])
        matched, last = patterns.start.match(line), number
        if matched and matched["open"] is not None:
            last = closing.line(number + 1)
            if last == complete and not final and len(text) - starts[number] <= LONGEST_QUOTED:
                break
        is_closed = matched is not None and number <= last < complete
        if not is_closed or (last > number and starts[last + 1] - starts[number] > LONGEST_QUOTED):
            is_closed, last = False, number
        found.add(starts[last + 1] - starts[number], is_malformed=not is_closed, is_blank=not line)
        number = last + 1
    return found.cut()


class _Closing:
    """Finds the line in which an open quote closes. What is found for a line is kept, so each is matched once."""

    def __init__(self, lines: list[bytes], inside: re.Pattern[bytes]) -> None:
        self._lines, self._inside = lines, inside
        self._known: list[int | None] = [*[None] * len(lines), len(lines)]

    def line(self, number: int) -> int:
        """The line that closes a quote which is open where line `number` begins; -1 if a quote is wrong before that,
        the number of lines if none closes it."""
        passed = []
        while (known := self._known[number]) is None:
            matched = self._inside.match(_without_end(self._lines[number]))
            if matched and (matched["open"] is not None or matched["again"] is not None):
                passed.append(number)
                number += 1
            else:
                self._known[number] = number if matched else -1
        for each in passed:
            self._known[each] = known
        return known


class _Found:
    """Collects records from the start of a text on."""

    def __init__(self, text: bytes) -> None:
        self._text, self._end, self._kept_from = text, 0, 0
        self._kept: list[bytes] = []
        self._malformed: list[bytes] = []
        self._at: list[int] = []
        self._count = 0

    def add(self, size: int, *, is_malformed: bool, is_blank: bool) -> None:
        """The next `size` bytes are a record, a malformed line or a blank line."""
        if is_malformed:
            self._kept.append(self._text[self._kept_from : self._end])
            self._malformed.append(_without_end(self._text[self._end : self._end + size]))
            self._at.append(self._count)
            self._kept_from = self._end + size
        self._end += size
        self._count += not is_blank

    def cut(self) -> Cut:
        kept = b"".join([*self._kept, self._text[self._kept_from : self._end]])
        return Cut(records=kept, malformed=self._malformed, malformed_at=self._at, used=self._end)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Patterns:
    start: re.Pattern[bytes]
    """A line at which a record begins. Group `open`: a field that the line does not close."""
    inside: re.Pattern[bytes]
    """A line that begins inside a quoted field. Group `open`: the field goes on; `again`: a later one does."""
    record: re.Pattern[bytes]
    """A whole record, over several lines if need be."""


@functools.cache
def _patterns(separator: bytes) -> _Patterns:
    # No pattern gives back what it has matched, so each takes time in proportion to the text.
    mark = re.escape(separator)
    content = rb'(?:[^"\0]++|"")*+'
    field = rb'(?:"%s"|[^"\r\n\0%s][^\r\n\0%s]*+)?+' % (content, mark, mark)
    fields = rb"(?:%s%s)*+" % (field, mark)
    open_field = rb'"%s\Z' % content
    start = rb"%s(?:%s\Z|(?P<open>%s))" % (fields, field, open_field)
    inside = rb'%s(?:(?P<open>\Z)|"(?:\Z|%s%s(?:%s\Z|(?P<again>%s))))' % (content, mark, fields, field, open_field)
    record = rb"(?P<record>%s%s)(?:(?P<end>\r?\n)|\Z)" % (fields, field)
    return _Patterns(start=re.compile(start), inside=re.compile(inside), record=re.compile(record))


_BLANK_LINES = re.compile(rb"(?:[ \t]*+\r?\n)*+")
_LINES = re.compile(rb"[^\n]*\n|[^\n]+")
_LINE = re.compile(rb"(?P<record>[^\n]*+)(?:(?P<end>\n)|\Z)")


def _without_end(line: bytes) -> bytes:
    return line.removesuffix(b"\n").removesuffix(b"\r")
