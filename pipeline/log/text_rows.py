"""Complete records of text -> rows of strings, and the records that are no row. CSV and JSON lines."""

from __future__ import annotations

import csv
import dataclasses
import decimal
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv

from pipeline.events import ID_COLUMNS
from pipeline.log.records import Cut, cut_lines, cut_records
from pipeline.log.text import UNREADABLE, decode

_EXACT = 1 << 53
"""Below this a float64 tells all integers apart; it stands for the next one, too."""
LONGEST_MALFORMED = 1_000
"""Characters of a malformed record that are kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of some text."""

    table: pl.DataFrame
    """The mapped columns under their canonical names, all strings; null where there is no value."""
    malformed: list[str]
    """The beginning of each record that is no row."""
    malformed_at: list[int]
    """The place of each of them among all rows and malformed records, from 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFormat:
    """How text becomes rows."""

    cut: Callable[[bytes, bool], Cut]
    """(text, whether it is the end of the file) -> the complete records at its start."""
    parse: Callable[[bytes], Rows]
    """Complete records -> rows."""

    def rows(self, pieces: Iterator[bytes]) -> Iterator[Rows]:
        """The rows of a text that comes in pieces."""
        rest = b""
        for piece in pieces:
            if piece:
                text = rest + piece
                cut = self.cut(text, False)
                rest = text[cut.used :]
                yield self._parsed(cut)
        yield self._parsed(self.cut(rest, True))

    def _parsed(self, cut: Cut) -> Rows:
        rows = self.parse(cut.records)
        if not cut.malformed:
            return rows
        # Places among the records that were parsed -> places among all.
        total = rows.table.height + len(rows.malformed) + len(cut.malformed)
        parsed = np.setdiff1d(np.arange(total), cut.malformed_at, assume_unique=True)
        places = [*cut.malformed_at, *parsed[rows.malformed_at].tolist()]
        return Rows(
            table=rows.table,
            malformed=[*map(_shortened, cut.malformed), *rows.malformed],
            malformed_at=places,
        )


def csv_format(
    names: Sequence[str], mapping: dict[str, str], *, separator: str, quoted: bool, missing: Sequence[str]
) -> TextFormat:
    """names: all columns of a record, in order. mapping: {canonical name: column}. quoted: fields may be in quotes.
    missing: words that, without quotes, mean that there is no value."""
    places = {name: names.index(column) for name, column in mapping.items()}
    mark = separator.encode()

    def parse(records: bytes) -> Rows:
        # The fast reader would end a line at a CR alone; where fields may be in quotes, such a line is malformed.
        if len(mark) == 1 and (quoted or records.count(b"\r") == records.count(b"\r\n")):
            return _parse_csv(records, len(names), places, separator=separator, quoted=quoted, missing=missing)
        return _split_lines(records, len(names), places, separator=mark, missing=missing)

    if quoted and len(mark) == 1:
        return TextFormat(cut=lambda text, final: cut_records(text, separator=mark, final=final), parse=parse)
    return TextFormat(cut=lambda text, final: cut_lines(text, final=final), parse=parse)


def json_format(mapping: dict[str, str]) -> TextFormat:
    """Lines that are one JSON object each: missing keys become null, unmapped keys are ignored.

    An id that is written as 1.0 is the integer 1; other fractions, true and false are no ids, and cost their row. A
    time is the number as it is written: a float64 of seconds would lose what is below a microsecond. A row in which a
    mapped key stands twice is malformed: which of the values is meant? To see it costs 1 of 20 microseconds per row.
    """
    special = dict.fromkeys(ID_COLUMNS, _id_as_text) | {"timestamp": _time_as_text}
    readers = [(column, special.get(name, _as_text)) for name, column in mapping.items()]

    def parse(records: bytes) -> Rows:
        rows, malformed, malformed_at, count = [], [], [], 0
        for line in records.split(b"\n"):
            if not line.strip():
                continue
            try:
                # Bytes and escapes that are no text become lone surrogates, which only a used column refuses.
                row = _JSON.decode(line.decode("utf-8", "surrogateescape"))
                if isinstance(row, _Doubled):
                    row.refuse(mapping.values())
                rows.append([read(row.get(column)) for column, read in readers])
            except (ValueError, AttributeError, TypeError, RecursionError):
                malformed.append(_shortened(line))
                malformed_at.append(count)
            count += 1
        table = pl.DataFrame(rows, schema=dict.fromkeys(mapping, pl.String), orient="row")
        return Rows(table=table, malformed=malformed, malformed_at=malformed_at)

    return TextFormat(cut=lambda text, final: cut_lines(text, final=final), parse=parse)


def split_record(record: str, separator: str, *, quoted: bool) -> list[str] | None:
    """The fields of one CSV record; None when its quotes do not fit."""
    if len(separator) > 1 or not quoted:
        return record.split(separator)
    try:
        return next(csv.reader([record], delimiter=separator, strict=True))
    except csv.Error:
        return None


def _parse_csv(
    records: bytes, num_columns: int, places: dict[str, int], *, separator: str, quoted: bool, missing: Sequence[str]
) -> Rows:
    """Records whose quotes are known to be right: what is malformed has another number of fields, or is no text."""
    if not records.strip(b"\r\n"):
        return Rows(table=_table([], places), malformed=[], malformed_at=[])
    try:
        records.decode()
    except UnicodeDecodeError:
        records = decode(records).encode()
    malformed: list[str] = []
    malformed_at: list[int] = []

    def keep_invalid(row: pyarrow.csv.InvalidRow) -> str:
        malformed.append(_shortened(row.text.encode()))
        malformed_at.append(row.number - 1)
        return "skip"

    wanted = {name: str(place) for name, place in places.items()}
    table = pyarrow.csv.read_csv(
        io.BytesIO(records),
        read_options=pyarrow.csv.ReadOptions(
            # One block: the reader would end a block at a line break inside quotes.
            column_names=[str(number) for number in range(num_columns)], use_threads=False, block_size=len(records) + 1,
        ),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=separator, quote_char='"' if quoted else False, invalid_row_handler=keep_invalid
        ),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={name: pa.string() for name in wanted.values()}, include_columns=list(wanted.values()),
            strings_can_be_null=bool(missing), null_values=list(missing), quoted_strings_can_be_null=False,
        ),
    )  # fmt: skip
    found = pl.DataFrame(table).select(pl.col(column).alias(name) for name, column in wanted.items())
    rows = Rows(table=found, malformed=malformed, malformed_at=malformed_at)
    return _without_unreadable(rows, separator=separator) if UNREADABLE.encode() in records else rows


def _without_unreadable(rows: Rows, *, separator: str) -> Rows:
    """Rows with a value that could not be decoded are malformed."""
    is_bad = rows.table.select(pl.any_horizontal(pl.all().str.contains(UNREADABLE, literal=True).fill_null(False)))
    mask = is_bad.to_series()
    places = np.setdiff1d(np.arange(rows.table.height + len(rows.malformed)), rows.malformed_at)[mask.to_numpy()]
    text = [separator.join(value or "" for value in row) for row in rows.table.filter(mask).iter_rows()]
    return Rows(
        table=rows.table.filter(~mask),
        malformed=[*rows.malformed, *(_shortened(line.encode()) for line in text)],
        malformed_at=[*rows.malformed_at, *places.tolist()],
    )


def _split_lines(
    records: bytes, num_columns: int, places: dict[str, int], *, separator: bytes, missing: Sequence[str]
) -> Rows:
    """Lines without quotes, where the fast reader does not know the separator or would end a line at a CR."""
    rows, malformed, malformed_at, count = [], [], [], 0
    for line in records.split(b"\n"):
        if not (line := line.removesuffix(b"\r")):
            continue
        fields = line.split(separator)
        texts = [decode(fields[place]) for place in places.values()] if len(fields) == num_columns else None
        if texts is None or any(UNREADABLE in text for text in texts):
            malformed.append(_shortened(line))
            malformed_at.append(count)
        else:
            rows.append([None if text in missing else text for text in texts])
        count += 1
    return Rows(table=_table(rows, places), malformed=malformed, malformed_at=malformed_at)


def _table(rows: list[list[str | None]], names: dict[str, int]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")


class _Fraction(str):
    """A JSON number with a fraction or an exponent, as it is written."""


class _Doubled(dict):
    """A JSON object in which a key stands twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self._counts = Counter(key for key, _ in pairs)

    def refuse(self, keys: Iterable[str]) -> None:
        """ValueError if one of these keys stands twice."""
        if any(self._counts[key] > 1 for key in keys):
            raise ValueError("a key stands twice")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Doubled(pairs)


_JSON = json.JSONDecoder(parse_float=_Fraction, object_pairs_hook=_object)


def _as_text(value: object) -> str | None:
    """A JSON value as the text of a CSV field; null, NaN and infinity as None. UnicodeEncodeError: it is no text."""
    if isinstance(value, _Fraction):
        value = float(value)
    if isinstance(value, str):
        value.encode()
        if UNREADABLE in value:
            raise ValueError("a part of it could not be decoded")
        return value
    if isinstance(value, (dict, list)):
        raise TypeError("a nested value cannot be an id, time or category")
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return json.dumps(value)


def _time_as_text(value: object) -> str | None:
    # What no float64 can hold is infinite, also for Python's own reader.
    return str(value) if isinstance(value, _Fraction) and math.isfinite(float(value)) else _as_text(value)


def _id_as_text(value: object) -> str | None:
    if isinstance(value, bool):
        raise TypeError("an id is an integer or a string")
    if not isinstance(value, _Fraction) or not math.isfinite(float(value)):
        return _as_text(value)
    number = decimal.Decimal(value)
    if number != number.to_integral_value():
        raise TypeError("an id is an integer or a string")
    if abs(number) >= _EXACT:
        raise ValueError("a float of this size is no exact integer")
    return str(int(float(value)))


def _shortened(record: bytes) -> str:
    """A malformed record as text: its beginning and its length where it is long."""
    text = record[: 4 * LONGEST_MALFORMED].decode("utf-8", "replace").replace(UNREADABLE, "\ufffd").rstrip("\r\n")
    if len(record) <= 4 * LONGEST_MALFORMED and len(text) <= LONGEST_MALFORMED:
        return text
    return f"{text[:LONGEST_MALFORMED]}... ({len(record)} bytes)"
