"""Reads event files that log/inputs.py found: Parquet, CSV and JSON lines.

`describe` checks one file's columns; `read_blocks` streams its rows under canonical names in bounded memory. A file
that cannot be read completely raises a DataError that names it; a line that cannot be parsed is returned as text, which
events.validate rejects.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.events import ID_COLUMNS, DataError, EventColumns, id_type
from pipeline.log.inputs import FileFormat, Input
from pipeline.log.text_rows import csv_parser, json_parser, split_line

_BLOCK_BYTES = 16 << 20
_BLOCK_ROWS = 1_000_000
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
    """Lines that cannot be parsed as a row."""


def describe(file: Input, *, mapping: dict[str, str], options: FileFormat) -> dict[str, pl.DataType]:
    """{canonical name: type in the file}; empty for an empty text file. DataError names a column that is missing."""
    schema = read_schema(file, options=options)
    if not schema:
        return {}
    for canonical, column in mapping.items():
        if column not in schema and file.format != "jsonl":
            raise DataError(
                f"{file.name}: no column {column!r} (mapped to {canonical}); it has {', '.join(schema)}; "
                "fix the mapping"
            )
    return {canonical: schema.get(column, pl.String()) for canonical, column in mapping.items()}


def read_schema(file: Input, *, options: FileFormat) -> dict[str, pl.DataType]:
    """{column: type} of the file: all strings for text files; the keys of the first row for JSON lines."""
    if file.format == "parquet":
        with _open_parquet(file) as parquet:
            try:
                empty = parquet.schema_arrow.empty_table()
                return {name: pl.Series(empty[name]).dtype for name in empty.column_names}
            except (pa.ArrowException, pl.exceptions.PolarsError) as error:
                raise DataError(f"{file.name}: unsupported column type ({_one_line(error)}); cast it") from error
    first = next(iter(_lines(file, options)), None)
    if first is None:
        return {}
    if file.format == "csv":
        line = first.decode("utf-8", "replace")
        names = options.header or tuple(split_line(line, file.separator, quoted=options.quoted) or ())
        if options.typed_header:
            names = tuple(name.partition(":")[0] for name in names)
        return {name: pl.String() for name in names}
    try:
        row = json.loads(first)
    except ValueError:
        row = None
    return {str(key): pl.String() for key in row} if isinstance(row, dict) else {}


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
    with _open_parquet(file) as parquet:
        return parquet.metadata.num_row_groups


def estimate_rows(file: Input) -> int:
    """Number of rows: exact for a Parquet file, for a text file an estimate from its size."""
    if file.format == "parquet":
        with _open_parquet(file) as parquet:
            return parquet.metadata.num_rows
    return (_PACKING if file.compression else 1) * file.bytes // _LINE_BYTES


def read_blocks(
    file: Input, *, mapping: dict[str, str], options: FileFormat, row_group: int | None = None
) -> Iterator[Block]:
    """The rows of the file (or of one row group) in blocks of bounded size."""
    if file.format == "parquet":
        yield from _read_parquet(file, mapping, None if file.compression else row_group)
        return
    skip_header = file.format == "csv" and not options.header
    names = list(read_schema(file, options=options))
    parse = json_parser(mapping)
    if file.format == "csv":
        parse = csv_parser(names, mapping, separator=file.separator, quoted=options.quoted)
    for block in _line_blocks(file, options):
        if skip_header:
            block, skip_header = block.partition(b"\n")[2], False
        if block:
            rows, malformed = parse(block)
            yield Block(table=rows, malformed=malformed)


def _read_parquet(file: Input, mapping: dict[str, str], row_group: int | None) -> Iterator[Block]:
    with _open_parquet(file) as parquet:
        groups = None if row_group is None else [row_group]
        columns = list(dict.fromkeys(mapping.values()))
        batches = parquet.iter_batches(batch_size=_BLOCK_ROWS, row_groups=groups, columns=columns)
        while True:
            try:
                batch = next(batches, None)
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{file.name}: damaged Parquet data ({_one_line(error)}); copy it again") from error
            if batch is None:
                return
            frame = pl.DataFrame(batch)
            yield Block(table=frame.select(pl.col(c).alias(name) for name, c in mapping.items()), malformed=[])


def _open_parquet(file: Input) -> pq.ParquetFile:
    stream = file.open()
    try:
        return pq.ParquetFile(stream, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        stream.close()
        raise DataError(f"{file.name}: not a complete Parquet file ({_one_line(error)}); copy it again") from error


def _lines(file: Input, options: FileFormat) -> Iterator[bytes]:
    for block in _line_blocks(file, options):
        yield from (line.rstrip(b"\r") for line in block.split(b"\n") if line.strip())


def _line_blocks(file: Input, options: FileFormat) -> Iterator[bytes]:
    """Complete lines, about _BLOCK_BYTES at a time, as UTF-8 (not checked where the file's encoding is utf-8)."""
    rest, first = b"", True
    with file.open() as stream:
        while True:
            try:
                chunk = stream.read(_BLOCK_BYTES)
            except (OSError, EOFError) as error:
                raise DataError(f"{file.name}: cannot be read ({_one_line(error)}); copy it again") from error
            if first:
                chunk, first = chunk.removeprefix(b"\xef\xbb\xbf"), False
            lines, newline, tail = (rest + chunk).rpartition(b"\n") if chunk else (rest, b"", b"")
            rest = tail
            if lines or newline:
                block = lines + newline
                yield block if options.encoding == "utf-8" else block.decode(options.encoding, "replace").encode()
            if not chunk:
                return


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
