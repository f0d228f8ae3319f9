"""Finds event files and opens them: on a local path or in any fsspec store, plain or compressed.

`find_inputs` lists the files of a path, directory or pattern; `Input.open` gives a file's decompressed bytes.
log/readers.py reads rows from them.
"""

from __future__ import annotations

import dataclasses
import io
from typing import IO, Any

import fsspec

from pipeline.events import DataError
from pipeline.storage import checksum_stream

_EDGE_BYTES = 64 << 10
_SUFFIXES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_COMPRESSIONS = (".gz", ".bz2", ".xz")
_NOT_EVENTS = ("items.parquet", "users.parquet", "rejected.parquet")
MISSING_WORDS = ("NULL", "null", "\\N", "None", "NaN", "nan", "<NA>")
"""Fields of CSV files without a value, as databases, pandas and R write them."""
_ENCODINGS = ("utf-8", "latin-1", "cp1252")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileFormat:
    """The format of the files."""

    format: str = "auto"
    """auto (from the file's name), parquet, csv or jsonl."""
    separator: str = ","
    """CSV: text between two fields. More than one character, or one beyond ASCII, is allowed, but then fields cannot be
    quoted."""
    header: tuple[str, ...] = ()
    """CSV: names of the columns, for files without a header line."""
    encoding: str = "utf-8"
    """Text files: utf-8, latin-1 or cp1252. Files that begin with the byte order mark of UTF-16 or UTF-32 are read as
    such under utf-8."""
    quoted: bool = True
    """CSV: a field may be enclosed in double quotes and may then hold line breaks (RFC 4180); a record over several
    lines has at most 128 KiB, or its first line is malformed. false = a quote is an ordinary character."""
    missing: tuple[str, ...] | None = None
    """Words that mean that there is no value, such as '["NULL", \\N]'. By default a field of a CSV file is missing if
    it is empty or one of NULL, null, \\N, None, NaN, nan, <NA> without quotes, while each string of a JSON or Parquet
    file is a value. Words named here count in all formats, in CSV files without quotes; [] = none."""
    typed_header: bool = False
    """CSV: the header line has name:type for each column, as in RecBole's files; only the name is kept."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "header", tuple(self.header))
        if self.missing is not None:
            object.__setattr__(self, "missing", tuple(self.missing))
        if self.format not in ("auto", "parquet", "csv", "jsonl"):
            raise ValueError(f"format is {self.format!r}: it must be auto, parquet, csv or jsonl")
        if self.encoding not in _ENCODINGS:
            raise ValueError(f"encoding is {self.encoding!r}: it must be one of {', '.join(_ENCODINGS)}")
        if not self.separator or set(self.separator) & set('\r\n\0"'):
            raise ValueError(
                f"separator is {self.separator!r}: it must be one or more characters without quote or newline"
            )
        if self.quoted and len(self.separator) == 1 and not self.separator.isascii():
            raise ValueError(f"separator is {self.separator!r}: beyond ASCII it needs quoted = false")


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


def is_packed(file: Input) -> bool:
    """Whether the file's bytes are compressed as a whole."""
    return file.name.lower().endswith(_COMPRESSIONS)


def _format_of(leaf: str) -> str | None:
    for compression in _COMPRESSIONS:
        leaf = leaf.removesuffix(compression)
    return _SUFFIXES.get(leaf[leaf.rfind(".") :].lower()) if "." in leaf else None


def _open(url: str, compression: str | None = None) -> IO[Any]:
    return fsspec.open(url, "rb", compression=compression).open()  # type: ignore[union-attr]
