"""Blocks of complete lines -> rows of strings, and the lines that cannot be parsed. CSV and JSON lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable

import polars as pl
import pyarrow as pa
import pyarrow.csv

Parser = Callable[[bytes], tuple[pl.DataFrame, list[str]]]
"""UTF-8 lines -> (the mapped columns under their canonical names, malformed lines)."""


def csv_parser(names: list[str], mapping: dict[str, str], *, separator: str, quoted: bool) -> Parser:
    """names: all columns of a line, in order. mapping: {canonical name: column}. quoted: fields may be in quotes."""
    wanted = list(mapping.values())

    def parse(block: bytes) -> tuple[pl.DataFrame, list[str]]:
        fast = _parse_csv_block(block, names, wanted, separator, quoted) if len(separator) == 1 else None
        table, malformed = fast or _parse_csv_lines(block, names, wanted, separator, quoted)
        return table.select(pl.col(column).alias(name) for name, column in mapping.items()), malformed

    return parse


def json_parser(mapping: dict[str, str]) -> Parser:
    """A parser of lines that are one JSON object each: missing keys become null, unmapped keys are ignored."""

    def parse(block: bytes) -> tuple[pl.DataFrame, list[str]]:
        rows, malformed = [], []
        for line in block.split(b"\n"):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                rows.append([_as_text(row.get(column)) for column in mapping.values()])
            except (ValueError, AttributeError, TypeError, RecursionError):
                malformed.append(line.decode("utf-8", "replace").rstrip("\r"))
        return pl.DataFrame(rows, schema=dict.fromkeys(mapping, pl.String), orient="row"), malformed

    return parse


def split_line(line: str, separator: str, *, quoted: bool) -> list[str] | None:
    """The fields of a CSV line; None when its quotes do not close."""
    if len(separator) > 1 or not quoted:
        return line.split(separator)
    try:
        return next(csv.reader([line], delimiter=separator, strict=True))
    except csv.Error:
        return None


def _parse_csv_block(
    block: bytes, names: list[str], wanted: list[str], separator: str, quoted: bool
) -> tuple[pl.DataFrame, list[str]] | None:
    """Parse the whole block at once; None where a stray quote or an invalid byte makes rows run into each other."""
    malformed: list[str] = []

    def keep_invalid(row: pyarrow.csv.InvalidRow) -> str:
        malformed.append(row.text)
        return "skip"

    try:
        table = pyarrow.csv.read_csv(
            io.BytesIO(block),
            read_options=pyarrow.csv.ReadOptions(column_names=names, use_threads=False),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=separator, quote_char='"' if quoted else False, invalid_row_handler=keep_invalid
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types={name: pa.string() for name in names}, include_columns=wanted, strings_can_be_null=False
            ),
        )
    except pa.ArrowException:
        return None
    lines = sum(1 for line in block.split(b"\n") if line.rstrip(b"\r"))
    return (pl.DataFrame(table), malformed) if table.num_rows + len(malformed) == lines else None


def _parse_csv_lines(
    block: bytes, names: list[str], wanted: list[str], separator: str, quoted: bool
) -> tuple[pl.DataFrame, list[str]]:
    places = [names.index(column) for column in wanted]
    rows, malformed = [], []
    for line in block.split(b"\n"):
        if not (line := line.rstrip(b"\r")):
            continue
        text = line.decode("utf-8", "replace")
        fields = split_line(text, separator, quoted=quoted)
        if fields is None or len(fields) != len(names) or "\ufffd" in text:
            malformed.append(text)
        else:
            rows.append([fields[place] for place in places])
    return pl.DataFrame(rows, schema=dict.fromkeys(wanted, pl.String), orient="row"), malformed


def _as_text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (dict, list)):
        raise TypeError("a nested value cannot be an id, time or category")
    return json.dumps(value)
