"""Opens event files: Parquet, CSV and JSON lines, on a local path or any fsspec store.

`find_inputs` lists the files of a path, directory or pattern; `describe` checks one file's columns; `read_blocks`
streams its rows under canonical names in bounded memory. A file that cannot be read completely raises a DataError that
names it; a line that cannot be parsed is returned as text, which events.validate rejects.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from typing import IO, Any

import fsspec
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.events import ID_COLUMNS, DataError, EventColumns, id_type
from pipeline.log.text_rows import csv_parser, json_parser, split_line
from pipeline.storage import checksum_stream

_BLOCK_BYTES = 16 << 20
_EDGE_BYTES = 64 << 10
_BLOCK_ROWS = 1_000_000
_LINE_BYTES, _PACKING = 32, 4
"""To estimate rows: bytes of a short line of text, and by which factor compression shrinks text."""
_SUFFIXES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_COMPRESSIONS = (".gz", ".bz2", ".xz")
_NOT_EVENTS = ("items.parquet", "users.parquet", "rejected.parquet")
_ENCODINGS = ("utf-8", "latin-1", "cp1252")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileFormat:
    """The format of the files."""

    format: str = "auto"
    """auto (from the file's name), parquet, csv or jsonl."""
    separator: str = ","
    """CSV: text between two fields; more than one character is allowed, but then fields cannot be quoted."""
    header: tuple[str, ...] = ()
    """CSV: names of the columns, for files without a header line."""
    encoding: str = "utf-8"
    """Text files: utf-8, latin-1 or cp1252."""
    quoted: bool = True
    """CSV: a field may be enclosed in double quotes; false = a quote is an ordinary character."""
    typed_header: bool = False
    """CSV: the header line has name:type for each column, as in RecBole's files; only the name is kept."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "header", tuple(self.header))
        if self.format not in ("auto", "parquet", "csv", "jsonl"):
            raise ValueError(f"format is {self.format!r}: it must be auto, parquet, csv or jsonl")
        if self.encoding not in _ENCODINGS:
            raise ValueError(f"encoding is {self.encoding!r}: it must be one of {', '.join(_ENCODINGS)}")
        if not self.separator or "\n" in self.separator or '"' in self.separator:
            raise ValueError(
                f"separator is {self.separator!r}: it must be one or more characters without quote or newline"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """One file to read."""

    name: str
    """The input directory's name and the path inside it: the name of the file in manifests and messages."""
    url: str
    """Where to open it."""
    bytes: int
    format: str
    """parquet, csv or jsonl."""

    def open(self) -> IO[Any]:
        return _open(self.url, compression="infer" if self.format != "parquet" else None)


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


def find_inputs(path: str, *, options: FileFormat) -> list[Input]:
    """The event files that a path, directory or pattern stands for, sorted by name. DataError when there is none."""
    fs, root = fsspec.core.url_to_fs(path)
    root = root.rstrip("/")
    if any(letter in root for letter in "*?["):
        found, base = sorted(fs.glob(root)), root[: min(root.find(c) for c in "*?[" if c in root)].rpartition("/")[0]
    elif fs.isdir(root):
        found, base = sorted(fs.find(root)), root
    elif fs.exists(root):
        found, base = [root], root.rpartition("/")[0]
    else:
        raise DataError(f"{path}: no such file or directory; check the path")
    single = found == [root]
    inputs = []
    for file in found:
        leaf = file.rsplit("/", 1)[-1]
        file_format = _format_of(leaf) if options.format == "auto" or not single else options.format
        name = file[len(base.rpartition("/")[0]) :].lstrip("/") if base else file
        # Spark and others keep incomplete files in folders such as _temporary.
        is_hidden = any(part.startswith((".", "_")) for part in name.split("/")[1:])
        if not single and (file_format is None or is_hidden or leaf in _NOT_EVENTS):
            continue
        if file_format is None:
            raise DataError(f"{path}: the name does not tell the format; set format to parquet, csv or jsonl")
        inputs.append(
            Input(name=name, url=fs.unstrip_protocol(file), bytes=int(fs.info(file)["size"]), format=file_format)
        )
    if not inputs:
        raise DataError(f"{path}: no event files there; expected .parquet, .csv, .tsv or .jsonl files")
    return inputs


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
        names = options.header or tuple(split_line(line, options.separator, quoted=options.quoted) or ())
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


def checksum(file: Input) -> str:
    """xxh3-128 of the file's bytes as stored, not of the decompressed content."""
    with _open(file.url) as stream:
        return checksum_stream(stream)


def edges(file: Input) -> str:
    """xxh3-128 of the first and last 64 KiB of the file as stored; in a Parquet file the last ones hold the footer."""
    fs, path = fsspec.core.url_to_fs(file.url)
    head = fs.cat_file(path, start=0, end=min(_EDGE_BYTES, file.bytes))
    tail = fs.cat_file(path, start=max(0, file.bytes - _EDGE_BYTES), end=file.bytes)
    return checksum_stream(io.BytesIO(head + tail))


def count_row_groups(file: Input) -> int:
    """How many parts of the file can be read separately: the row groups of a Parquet file, 1 for a text file."""
    if file.format != "parquet":
        return 1
    with _open_parquet(file) as parquet:
        return parquet.metadata.num_row_groups


def estimate_rows(file: Input) -> int:
    """Number of rows: exact for a Parquet file, for a text file an estimate from its size."""
    if file.format == "parquet":
        with _open_parquet(file) as parquet:
            return parquet.metadata.num_rows
    packed = 1 if _SUFFIXES.get(file.name[file.name.rfind(".") :].lower()) else _PACKING
    return packed * file.bytes // _LINE_BYTES


def read_blocks(
    file: Input, *, mapping: dict[str, str], options: FileFormat, row_group: int | None = None
) -> Iterator[Block]:
    """The rows of the file (or of one row group) in blocks of bounded size."""
    if file.format == "parquet":
        yield from _read_parquet(file, mapping, row_group)
        return
    skip_header = file.format == "csv" and not options.header
    names = list(read_schema(file, options=options))
    parse = json_parser(mapping)
    if file.format == "csv":
        parse = csv_parser(names, mapping, separator=options.separator, quoted=options.quoted)
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


def _format_of(leaf: str) -> str | None:
    for compression in _COMPRESSIONS:
        leaf = leaf.removesuffix(compression)
    return _SUFFIXES.get(leaf[leaf.rfind(".") :].lower()) if "." in leaf else None


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


def _open(url: str, compression: str | None = None) -> IO[Any]:
    return fsspec.open(url, "rb", compression=compression).open()  # type: ignore[union-attr]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
