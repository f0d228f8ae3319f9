"""Parquet files -> tables of bounded size, whatever a small file expands to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO, Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.events import DataError
from pipeline.log.inputs import Input

BLOCK_ROWS = 1_000_000
BLOCK_BYTES = 256 << 20
"""Most bytes of the strings of a block, unless one row has more."""
_COLUMN_BYTES, _ROW_BYTES = 256 << 20, 1 << 10
"""A column of a row group that has more bytes than this, and more per row, is refused: one value of it could fill the
memory, because values are read whole."""
_PROBE_BYTES = 1 << 16


def open_parquet(file: Input) -> pq.ParquetFile:
    """DataError: it is no complete Parquet file."""
    return _opened(file, file.open())


def parquet_columns(file: Input) -> list[tuple[str, pl.DataType]]:
    """(name, type) of every column; a name may occur several times."""
    with open_parquet(file) as parquet:
        try:
            empty = parquet.schema_arrow.empty_table()
            return [(name, pl.Series(empty[at]).dtype) for at, name in enumerate(empty.column_names)]
        except (pa.ArrowException, pl.exceptions.PolarsError) as error:
            raise DataError(f"{file.name}: unsupported column type ({_one_line(error)}); cast it") from error


def parquet_tables(file: Input, *, columns: Sequence[str], row_group: int | None) -> Iterator[tuple[int, pl.DataFrame]]:
    """These columns of the file or of one row group, in tables of at most BLOCK_ROWS rows and about BLOCK_BYTES, each
    with the number of rows before it."""
    with file.open() as stream:
        metadata = _opened(file, stream).metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        for group in range(len(sizes)) if row_group is None else [row_group]:
            before = sum(sizes[:group])
            try:
                for table in _read_group(file, stream, metadata, group, columns):
                    yield before, table
                    before += table.height
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{file.name}: damaged Parquet data ({_one_line(error)}); copy it again") from error


def _opened(file: Input, stream: IO[Any]) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(stream, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        stream.close()
        raise DataError(f"{file.name}: not a complete Parquet file ({_one_line(error)}); copy it again") from error


def _read_group(
    file: Input, stream: IO[Any], metadata: pq.FileMetaData, group: int, columns: Sequence[str]
) -> Iterator[pl.DataFrame]:
    num_rows = metadata.row_group(group).num_rows
    stored = [metadata.row_group(group).column(place) for place in range(metadata.num_columns)]
    stored = [column for column in stored if column.path_in_schema in columns]
    for column in stored:
        if column.total_uncompressed_size > _COLUMN_BYTES + _ROW_BYTES * num_rows:
            raise DataError(
                f"{file.name}: column {column.path_in_schema!r} has {column.total_uncompressed_size:,} bytes in "
                f"{num_rows:,} rows; values of this size are not read: shorten them"
            )
    texts = {field.name for field in metadata.schema.to_arrow_schema() if _is_text(field.type)}
    repeated = [
        column.path_in_schema for column in stored
        if column.path_in_schema in texts and column.has_dictionary_page
        and column.total_uncompressed_size * min(num_rows, BLOCK_ROWS) > BLOCK_BYTES
    ]  # fmt: skip
    long = _long_columns(stream, metadata, group, repeated) if repeated else []
    total = sum(column.total_uncompressed_size for column in stored)
    size = max(1, min(BLOCK_ROWS, BLOCK_BYTES * num_rows // max(1, total)))
    reader = pq.ParquetFile(stream, metadata=metadata, pre_buffer=False, read_dictionary=long)
    for batch in reader.iter_batches(batch_size=size, row_groups=[group], columns=list(columns)):
        table = pl.DataFrame([_series(*pair) for pair in zip(batch.schema.names, batch.columns, strict=True)])
        yield from _bounded(table)


def _long_columns(stream: IO[Any], metadata: pq.FileMetaData, group: int, columns: Sequence[str]) -> list[str]:
    """The columns whose longest repeated string would exceed BLOCK_BYTES if every row had it. Parquet stores a repeated
    string once, so a few bytes may stand for many long strings."""
    probe = pq.ParquetFile(
        stream, metadata=metadata, pre_buffer=False, read_dictionary=list(columns), buffer_size=_PROBE_BYTES
    )
    rows, long = min(metadata.row_group(group).num_rows, BLOCK_ROWS), []
    for name in columns:
        # The first row comes with all strings that are stored once.
        first = next(probe.iter_batches(batch_size=1, row_groups=[group], columns=[name]))
        lengths: Any = pc.binary_length(first.column(0).dictionary)  # type: ignore[attr-defined]
        if (pc.max(lengths).as_py() or 0) * rows > BLOCK_BYTES:  # type: ignore[attr-defined]
            long.append(name)
    return long


def _is_text(dtype: pa.DataType) -> bool:
    return pa.types.is_string(dtype) or pa.types.is_large_string(dtype)


def _series(name: str, values: pa.Array) -> pl.Series:
    if isinstance(values, pa.DictionaryArray):
        # Each row refers to its string, which stays in memory once.
        return pl.Series(name, values.dictionary).gather(pl.Series(values.indices))
    return pl.Series(name, values)


def _bounded(table: pl.DataFrame) -> Iterator[pl.DataFrame]:
    strings = [name for name, dtype in table.schema.items() if dtype == pl.String]
    lengths = table.select(pl.col(strings).str.len_bytes().cast(pl.Int64).fill_null(0))
    sizes = lengths.sum_horizontal() if strings else pl.Series([0])
    if sizes.sum() <= BLOCK_BYTES:
        yield table
        return
    place = 0
    for length in (sizes.cum_sum() // BLOCK_BYTES).rle().struct.field("len"):
        yield table.slice(place, length)
        place += length


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
