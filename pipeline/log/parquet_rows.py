"""Parquet files -> tables of bounded size, whatever a small file expands to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.events import DataError
from pipeline.log.inputs import Input

BLOCK_ROWS = 1_000_000
BLOCK_BYTES = 256 << 20
"""Most bytes of the strings of a block, also of those in lists, unless one row has more."""
BLOCK_VALUES = 8 << 20
"""Most values in the lists of a block, on average."""
_COLUMN_BYTES, _ROW_BYTES = 256 << 20, 1 << 10
"""A column of a row group that has more bytes than this, and more per row, is refused: one value of it could fill the
memory, because values are read whole. The lists of one row are a value."""
_COLUMN_VALUES, _ROW_VALUES = 32 << 20, 64
"""The same for values in lists, of which equal ones take no bytes: one list could have all of the row group. Reading a
value takes 8 bytes."""
_LONGEST_LIST = BLOCK_BYTES
"""Most bytes of the strings of one list."""
_REFERENCE_BYTES = 16
"""A string in memory refers to its text, which several may share, with so many bytes."""
_PROBE_BYTES = 1 << 16


def open_parquet(file: Input) -> pq.ParquetFile:
    """DataError: it is no complete Parquet file."""
    return _opened(file, file.open())


def parquet_columns(file: Input) -> list[tuple[str, pl.DataType]]:
    """(name, type) of every column; a name may occur several times. pl.Unknown: values of the type cannot be read."""
    with open_parquet(file) as parquet:
        try:
            empty = parquet.schema_arrow.empty_table()
        except pa.ArrowException as error:
            raise DataError(f"{file.name}: unsupported column type ({_one_line(error)}); cast it") from error
    return [(name, _type_of(values)) for name, values in zip(empty.column_names, empty.columns, strict=True)]


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
    stored = [column for column in stored if _root(column, columns)]
    for column in stored:
        _refuse_large(file, column, num_rows, name=_root(column, columns))
    schema = metadata.schema.to_arrow_schema()
    texts = {field.name for field in schema if _is_text(field.type)}
    # In lists, too, a string is kept once.
    listed = {field.name for field in schema if _is_list(field.type) and _is_text(_innermost(field.type))}
    kept_once = [c.path_in_schema for c in stored if _root(c, columns) in listed and c.has_dictionary_page]
    repeated = [
        column.path_in_schema for column in stored
        if column.path_in_schema in texts and column.has_dictionary_page
        and column.total_uncompressed_size * min(num_rows, BLOCK_ROWS) > BLOCK_BYTES
    ]  # fmt: skip
    long = _long_columns(stream, metadata, group, repeated) if repeated else []
    total, values = sum(c.total_uncompressed_size for c in stored), max((c.num_values for c in stored), default=0)
    sizes = (BLOCK_ROWS, BLOCK_BYTES * num_rows // max(1, total), BLOCK_VALUES * num_rows // max(1, values))
    reader = pq.ParquetFile(stream, metadata=metadata, pre_buffer=False, read_dictionary=[*long, *kept_once])
    for batch in reader.iter_batches(batch_size=max(1, min(sizes)), row_groups=[group], columns=list(columns)):
        table = pl.DataFrame([_series(*pair) for pair in zip(batch.schema.names, batch.columns, strict=True)])
        for part in bounded(table):
            if part is not table:
                _refuse_long_lists(file, part)
            yield part


def _root(stored: pq.ColumnChunkMetaData, columns: Sequence[str]) -> str | None:
    """The column, out of `columns`, of which this is a part: `tags` is stored as tags.list.element."""
    path = stored.path_in_schema
    return path if path in columns else next((name for name in columns if path.startswith(f"{name}.")), None)


def _refuse_large(file: Input, stored: pq.ColumnChunkMetaData, num_rows: int, *, name: str | None) -> None:
    if stored.total_uncompressed_size > _COLUMN_BYTES + _ROW_BYTES * num_rows:
        raise DataError(
            f"{file.name}: column {name!r} has {stored.total_uncompressed_size:,} bytes in {num_rows:,} rows; values "
            "of this size are not read: shorten them"
        )
    if stored.num_values > _COLUMN_VALUES + _ROW_VALUES * num_rows:
        raise DataError(
            f"{file.name}: the lists of column {name!r} have {stored.num_values:,} values in {num_rows:,} rows; lists "
            "of this length are not read: shorten them, or write the file with smaller row groups"
        )


def _refuse_long_lists(file: Input, table: pl.DataFrame) -> None:
    """DataError: a list is too long for what has a copy of each of its strings, as Arrow's own form has."""
    for name in _lists_of_texts(table):
        if (size := int(_list_bytes(table[name]).max() or 0)) > _LONGEST_LIST:  # type: ignore[arg-type]
            raise DataError(
                f"{file.name}: a list in column {name!r} has {size:,} bytes; lists of this size are not read: shorten "
                "it"
            )


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


def _is_list(dtype: pa.DataType) -> bool:
    return pa.types.is_list(dtype) or pa.types.is_large_list(dtype)


def _innermost(dtype: pa.DataType) -> pa.DataType:
    return _innermost(dtype.value_type) if _is_list(dtype) else dtype


def _is_text(dtype: pa.DataType) -> bool:
    return pa.types.is_string(dtype) or pa.types.is_large_string(dtype)


def _type_of(values: pa.ChunkedArray) -> pl.DataType:
    # For this type polars has no error but a panic.
    if "decimal256" in str(values.type):
        return pl.Unknown()
    try:
        return pl.Series(_in_utc(values)).dtype
    except (pa.ArrowException, pl.exceptions.PolarsError):
        return pl.Unknown()


def _in_utc(values: Any) -> Any:
    """The same times in UTC: polars knows names of zones, but not the offsets such as +05:30 that Arrow allows."""
    if pa.types.is_timestamp(values.type) and values.type.tz:
        return values.cast(pa.timestamp(values.type.unit, "UTC"))
    return values


def _series(name: str, values: pa.Array) -> pl.Series:
    if isinstance(values, pa.DictionaryArray):
        # Each row refers to its string, which stays in memory once.
        return pl.Series(name, values.dictionary).gather(pl.Series(values.indices))
    if _is_list(values.type) and pa.types.is_dictionary(values.type.value_type):
        lists: Any = values
        items = _series(name, lists.flatten()).to_arrow(compat_level=pl.CompatLevel.newest())
        lengths = np.asarray(lists.value_lengths().fill_null(0), np.int64)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
        return pl.Series(name, pa.LargeListArray.from_arrays(offsets, items, mask=lists.is_null()))
    return pl.Series(name, _in_utc(values))


def bounded(table: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """The rows in tables of about BLOCK_BYTES; more only if a single row has more."""
    strings = [name for name, dtype in table.schema.items() if dtype == pl.String]
    lengths = table.select(pl.col(strings).str.len_bytes().cast(pl.Int64).fill_null(0))
    lists = [_list_bytes(table[name]) for name in _lists_of_texts(table)]
    sizes = pl.DataFrame([*lengths, *(size.alias(f"list {place}") for place, size in enumerate(lists))])
    sizes = sizes.sum_horizontal() if sizes.width else pl.Series([0])
    if sizes.sum() <= BLOCK_BYTES:
        yield table
        return
    place = 0
    for length in (sizes.cum_sum() // BLOCK_BYTES).rle().struct.field("len"):
        # Gathered: a slice of lists drags along the values of all rows, and Arrow's form would have a copy of each.
        yield table.select(pl.all().gather(pl.int_range(place, place + length)))
        place += length


def _lists_of_texts(table: pl.DataFrame) -> list[str]:
    return [name for name, dtype in table.schema.items() if dtype == pl.List(pl.String)]


def _list_bytes(lists: pl.Series) -> pl.Series:
    """[n] int64: the size of each list of strings in memory, if no two strings share their text."""
    text = lists.list.eval(pl.element().str.len_bytes().cast(pl.Int64)).list.sum()
    return (text + lists.list.len().cast(pl.Int64) * _REFERENCE_BYTES).fill_null(0)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
