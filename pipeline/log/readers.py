"""Reads event files that log/inputs.py found: Parquet, CSV and JSON lines.

`describe` checks one file's columns; `read_blocks` streams its rows under canonical names in bounded memory. A file
that cannot be read completely raises a DataError that names it; a line that cannot be parsed is returned as text, which
events.validate rejects.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl

from pipeline.events import ID_COLUMNS, DataError, EventColumns, id_type, quoted
from pipeline.log.inputs import MISSING_WORDS, FileFormat, Input
from pipeline.log.parquet_rows import open_parquet, parquet_columns, parquet_tables
from pipeline.log.records import first_record
from pipeline.log.text import LONGEST_LINE, text_pieces
from pipeline.log.text_rows import csv_format, json_format, split_record

_BLOCK_BYTES = 16 << 20
_HEAD_BYTES = (64 << 10, 2 * LONGEST_LINE)
"""How much of a file is read to find its first record; nearly always the first suffices."""
_PROBE_BYTES = 1 << 10
_SEPARATORS = (",", ";", "\t", "|")
"""Those that a header is tried with."""
_EXCEL_NOTE = re.compile(r'"?sep=(.)"?', re.IGNORECASE)
_LINE_BYTES, _PACKING = 32, 4
"""To estimate rows: bytes of a short line of text, and by which factor compression shrinks text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of an input file that one task reads on its own."""

    number: int
    """Its place among the parts of all files."""
    input: Input
    row_group: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """Some rows of a file."""

    table: pl.DataFrame
    """The mapped columns under their canonical names; all strings for text files."""
    malformed: list[str]
    """The beginning of each record that cannot be parsed as a row."""
    malformed_at: list[int] = dataclasses.field(default_factory=list)
    """The place of each of them among the block's rows and malformed records, from 0."""
    before: int = 0
    """Number of rows and malformed records of the file, or of its row group, before this block."""

    def row_number(self, row: int) -> int:
        """The place in the file, from 1 and without the header, of a row of the table."""
        for place in sorted(self.malformed_at):
            row += place <= row
        return self.before + row + 1


def describe(
    file: Input, *, mapping: dict[str, str], options: FileFormat, section: str = "files"
) -> dict[str, pl.DataType]:
    """{canonical name: type in the file}; empty for an empty text file. DataError names a column that is missing.

    `section`: where the user sets the options.
    """
    found = _columns(file, options)
    if not found:
        return {}
    schema, names = dict(found), [name for name, _ in found]
    for canonical, column in mapping.items():
        if column not in schema and file.format != "jsonl":
            fix = separator_hint(file, column, options=options, section=section) or "fix the mapping"
            raise DataError(
                f"{file.name}: no column {column!r} (mapped to {canonical}); it has {quoted(schema)}; {fix}"
            )
        if names.count(column) > 1:
            raise DataError(
                f"{file.name}: {names.count(column)} columns are called {column!r} (mapped to {canonical}); "
                "rename all but one"
            )
        if schema.get(column) == pl.Unknown:
            raise DataError(
                f"{file.name}: column {column!r} (mapped to {canonical}) has a type that cannot be read; cast it"
            )
    return {canonical: schema.get(column, pl.String()) for canonical, column in mapping.items()}


def read_schema(file: Input, *, options: FileFormat) -> dict[str, pl.DataType]:
    """{column: type} of the file: all strings for text files; the keys of the first row for JSON lines."""
    return dict(_columns(file, options))


def separator_hint(file: Input, column: str, *, options: FileFormat, section: str = "files") -> str | None:
    """What to set if a CSV file seems to lack the column because something else separates its fields; else None."""
    if file.format != "csv" or options.header:
        return None
    header = _first_record(file, options)[0].decode("utf-8", "replace")
    is_whole = len(split_record(header, file.separator, quoted=options.quoted) or []) == 1
    return _likely_separator(file, header, options, has=None if is_whole else column, section=section)


def first_row_hint(file: Input, *, mapping: dict[str, str], options: FileFormat) -> str:
    """What is odd about the first row of a JSON file of which no row is valid, to be added to a message; else ""."""
    if file.format != "jsonl":
        return ""
    if encoding := _encoding_of(_first_record(file, options)[0]):
        return f"; it looks like UTF-16 without its mark: set files.encoding {encoding}"
    keys = read_schema(file, options=options)
    if not keys:
        return "; its first line is no JSON object: write one object per line, or one array of objects"
    absent = [column for column in mapping.values() if column not in keys]
    return f"; its first row has {quoted(keys)}, but not {quoted(absent)}" if absent else ""


def _columns(file: Input, options: FileFormat) -> Sequence[tuple[str, pl.DataType]]:
    """(name, type) of every column; a name may occur several times."""
    if file.format == "parquet":
        return parquet_columns(file)
    if file.format == "csv":
        return [(name, pl.String()) for name in _csv_names(file, options)]
    try:
        row = json.loads(_first_record(file, options)[0])
    except (ValueError, RecursionError):
        row = None
    return [(str(key), pl.String()) for key in row] if isinstance(row, dict) else []


def log_schema(files: list[Input], *, columns: EventColumns, options: FileFormat) -> dict[str, Any]:
    """The log's canonical columns, and "int64" or "string" for each id: "int64" only if every file has integers."""
    types: dict[str, set[str]] = {name: set() for name in ID_COLUMNS if getattr(columns, name)}
    for file in files:
        described = describe(file, mapping=columns.mapping(), options=options)
        for name, found in types.items():
            if name in described:
                is_text = file.format != "parquet"
                found.add(id_type(described[name], integer_ids=columns.integer_ids, is_text=is_text) or "string")
    id_types = {name: "int64" if found == {"int64"} else "string" for name, found in types.items()}
    return {"columns": list(columns.mapping()), "id_types": id_types}


def count_row_groups(file: Input) -> int:
    """How many parts of the file can be read separately: the row groups of a Parquet file; 1 for a text file, and for
    one that is compressed as a whole."""
    if file.format != "parquet" or file.compression:
        return 1
    with open_parquet(file) as parquet:
        return parquet.metadata.num_row_groups


def estimate_rows(file: Input) -> int:
    """Number of rows: exact for a Parquet file, for a text file an estimate from its size."""
    if file.format == "parquet":
        with open_parquet(file) as parquet:
            return parquet.metadata.num_rows
    return (_PACKING if file.compression else 1) * file.bytes // _LINE_BYTES


def read_blocks(
    file: Input, *, mapping: dict[str, str], options: FileFormat, row_group: int | None = None
) -> Iterator[Block]:
    """The rows of the file (or of one row group) in blocks of bounded size."""
    if file.format == "parquet":
        yield from _parquet_blocks(file, mapping, options, None if file.compression else row_group)
        return
    header = 0
    if file.format == "csv":
        if not (names := _csv_names(file, options)):
            return
        header = 0 if options.header else _first_record(file, options)[1]
        missing = MISSING_WORDS if options.missing is None else options.missing
        rows_of = csv_format(names, mapping, separator=file.separator, quoted=options.quoted, missing=missing).rows
    else:
        rows_of = json_format(mapping).rows
    before = 0
    for rows in rows_of(_after(header, text_pieces(file, encoding=options.encoding, size=_BLOCK_BYTES))):
        if count := rows.table.height + len(rows.malformed):
            table = _without_words(rows.table, options) if file.format == "jsonl" else rows.table
            yield Block(table=table, malformed=rows.malformed, malformed_at=rows.malformed_at, before=before)
            before += count


def _csv_names(file: Input, options: FileFormat) -> list[str]:
    """The names of all columns, as they stand in the header; empty for an empty file."""
    names = list(options.header)
    if not names and (header := _first_record(file, options)[0]):
        text = header.decode("utf-8", "replace")
        if note := _EXCEL_NOTE.fullmatch(text):
            others = "" if note[1] == file.separator else f", and set files.separator {note[1]!r}"
            raise DataError(f"{file.name}: the first line is {text!r}, a note to Excel: remove it{others}")
        names = split_record(text, file.separator, quoted=options.quoted)
        if names is None or "\0" in text:
            raise _bad_header(file, header, options)
    return [name.partition(":")[0] for name in names] if options.typed_header else names


def _first_record(file: Input, options: FileFormat) -> tuple[bytes, int]:
    """(the first record, its length in bytes with all that stands before the second one); empty for an empty file."""
    is_quoted = file.format == "csv" and options.quoted and len(file.separator) == 1
    separator = file.separator.encode() if is_quoted else None
    head = b""
    for size in _HEAD_BYTES:
        pieces = text_pieces(file, encoding=options.encoding, size=size)
        head = next(pieces, b"")
        if found := first_record(head, separator=separator, final=not any(pieces)):
            return found
    if head.strip():
        raise _bad_header(file, head, options)
    return b"", 0


def _bad_header(file: Input, head: bytes, options: FileFormat) -> DataError:
    if encoding := _encoding_of(head):
        return DataError(f"{file.name}: looks like UTF-16 without its mark; set files.encoding {encoding}")
    line = head.partition(b"\n")[0].removesuffix(b"\r").decode("utf-8", "replace")
    fix = _likely_separator(file, line, options) if file.format == "csv" else None
    return DataError(
        f"{file.name}: the first line cannot be read: "
        + (fix or "its quotes do not close, or it is no text; set files.quoted, files.separator or files.encoding")
    )


def _likely_separator(
    file: Input, header: str, options: FileFormat, *, has: str | None = None, section: str = "files"
) -> str | None:
    """What to set if another separator gives the header several names, among them `has`; else None."""
    for separator in _SEPARATORS:
        names = split_record(header, separator, quoted=options.quoted) or []
        if separator != file.separator and len(names) > 1 and (has is None or has in names):
            return f"the header looks separated by {separator!r}: set {section}.separator {separator!r}"
    return None


def _encoding_of(head: bytes) -> str | None:
    """The UTF-16 of a text without a mark, in which every other byte of plain letters is 0; None if it is none."""
    zeros = [head[place:_PROBE_BYTES:2].count(0) for place in (0, 1)]
    if 4 * max(zeros) < len(head[:_PROBE_BYTES]):
        return None
    return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"


def _after(size: int, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The pieces without their first `size` bytes."""
    for piece in pieces:
        yield piece[size:]
        size = max(0, size - len(piece))


def _without_words(table: pl.DataFrame, options: FileFormat) -> pl.DataFrame:
    """Null in place of the strings that options.missing names; of no others, because a string is a value here."""
    if not options.missing:
        return table
    is_value = ~pl.col(pl.String).is_in(options.missing)
    return table.with_columns(pl.when(is_value).then(pl.col(pl.String)).name.keep())


def _parquet_blocks(
    file: Input, mapping: dict[str, str], options: FileFormat, row_group: int | None
) -> Iterator[Block]:
    before = 0
    columns = list(dict.fromkeys(mapping.values()))
    for before, table in parquet_tables(file, columns=columns, row_group=row_group):
        renamed = table.select(pl.col(column).alias(name) for name, column in mapping.items())
        yield Block(table=_without_words(renamed, options), malformed=[], before=before)
