"""Finds event files: which files of a path, directory or pattern are read, and which are left out, and why.

`find` accounts for every file that log/listing.py lists; `Input.open` gives a file's content (log/streams.py).
log/readers.py reads rows from it.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import io
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import IO, Any

from pipeline.events import DataError
from pipeline.log.listing import Listed, list_files, shown
from pipeline.log.streams import COMPRESSIONS, open_content, open_raw
from pipeline.storage import checksum_stream, locate

_EDGE_BYTES = 64 << 10
_NAMES_SHOWN = 3
_SUFFIXES = {
    ".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "jsonl", ".jsonl": "jsonl", ".ndjson": "jsonl",
}  # fmt: skip
_FORMATS = ("auto", "parquet", "csv", "json", "jsonl")
MISSING_WORDS = ("NULL", "null", "\\N", "None", "NaN", "nan", "<NA>")
"""Fields of CSV files without a value, as databases, pandas and R write them."""
_ENCODINGS = ("utf-8", "utf-16-le", "utf-16-be", "latin-1", "cp1252")
_SOURCE = "source.json"
_TABLES = ("items.parquet", "users.parquet", "rejected.parquet")
_SOURCE_BEGINS = b'{\n "format_version"'

IGNORED = "named by files.ignore"
EMPTY = "empty"
AGAIN = "reached a second time, by a link"
EQUAL = "equal to another file in content"
"""Why a file is left out."""
UNKNOWN = "its name does not tell the format"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileFormat:
    """The format of the files."""

    format: str = "auto"
    """auto (from the file's name), parquet, csv, or json and jsonl, which are the same: one array, or one object per
    line. In a directory or pattern it is the format of the files whose names do not tell one."""
    ignore: tuple[str, ...] | str = ()
    """Files and folders to leave out of a directory or pattern: a pattern of a name, or of a path inside the directory,
    such as '*.txt'; several as '["*.txt", "old/*"]'."""
    separator: str = "auto"
    """CSV: text between two fields; auto = a tab in .tsv files, a comma in others; \\t = a tab. More than one
    character, or one beyond ASCII, is allowed, but then fields cannot be quoted."""
    header: tuple[str, ...] = ()
    """CSV: names of the columns, for files without a header line."""
    encoding: str = "utf-8"
    """Text files: utf-8, utf-16-le, utf-16-be, latin-1 or cp1252. Files that begin with the byte order mark of UTF-8,
    UTF-16 or UTF-32 are read as such under utf-8, utf-16-le and utf-16-be."""
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
        if self.separator == "\\t":
            object.__setattr__(self, "separator", "\t")
        if self.missing is not None:
            object.__setattr__(self, "missing", tuple(self.missing))
        object.__setattr__(self, "ignore", (self.ignore,) if isinstance(self.ignore, str) else tuple(self.ignore))
        if self.format not in _FORMATS:
            raise ValueError(f"format is {self.format!r}: it must be one of {', '.join(_FORMATS)}")
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
    """Where to open it: an absolute path or a URL."""
    bytes: int
    format: str
    """parquet, csv or jsonl."""
    compression: str | None = None
    """The ending of its compression, such as .gz; None = it is not compressed as a whole."""
    separator: str = ","
    """CSV: text between two fields."""
    version: tuple[Any, ...] = ()
    """As from listing.version_of, when the file was listed."""
    is_young: bool = False
    """Its version may stay the same even if it changes once more."""

    def open(self) -> IO[Any]:
        """The content; for JSON, lines. DataError: it cannot be opened, or holds something else than its name says."""
        return open_content(self.url, name=self.name, form=self.format, compression=self.compression)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """All files of a path, but for hidden ones, markers, and the tables and source.json of an event log."""

    inputs: list[Input]
    """Those to read, sorted by place."""
    left_out: dict[str, str]
    """{name: why} of those that are left out and told."""
    unread: dict[str, str]
    """{name: why} of those that nobody has said to leave out."""
    unused: frozenset[str] = frozenset()
    """Patterns of files.ignore that match nothing."""

    def refuse_unread(self, path: str) -> None:
        """DataError if there is a file that cannot be read and is not to be left out."""
        if self.unread:
            listed = [f"{name} ({why})" for name, why in sorted(self.unread.items())]
            count = f"{len(listed):,} files are not read" if len(listed) > 1 else "1 file is not read"
            nameless = "give their format with --files.format, or " if UNKNOWN in self.unread.values() else ""
            them, pattern = ("them", "'[PATTERN, ...]'") if len(listed) > 1 else ("it", "PATTERN")
            raise DataError(
                f"{path}: {count}: {some_of(listed)}; {nameless}leave {them} out with --files.ignore {pattern}"
            )


def find(path: str, *, options: FileFormat, tables: Collection[str] = ()) -> Found:
    """What the path of a file, directory or pattern stands for. `tables`: places of files that are read as tables of
    items or users, not as events. DataError: there is nothing, or a single file cannot be read."""
    listing = list_files(path)
    if listing.is_single:
        single = _single(listing.files[0], path, options=options)
        return Found(inputs=[single], left_out={}, unread={}, unused=frozenset(options.ignore))
    found, left_out, unread, used = [], {}, {}, set()
    read_as_tables = {_place(table) for table in tables}
    logs: dict[str, bool] = {}
    for file in listing.files:
        folder, _, leaf = file.url.rpartition("/")
        is_ignored = bool(ignoring := _ignoring(file.name, options.ignore))
        used |= ignoring
        if _place(file.url) in read_as_tables and not file.problem:
            continue
        if not (is_ignored or file.problem) and leaf in (*_TABLES, _SOURCE):
            if folder not in logs:
                logs[folder] = _is_event_log(folder)
            if logs[folder]:
                continue
        why = IGNORED if is_ignored else file.problem or _why_unread(file, leaf, options=options)
        if why is None:
            found.append(_input(file, options=options))
        else:
            (left_out if why in (IGNORED, EMPTY, AGAIN) else unread)[file.name] = why
    for name, other in packed_copies(file.name for file in found).items():
        unread[name] = f"beside {other}: which of the two?"
    if not (found or unread):
        others = f" ({'; '.join(f'{n} {what}' for what, n in summary(left_out).items())})" if left_out else ""
        raise DataError(f"{path}: no event files there{others}; expected {', '.join(_SUFFIXES)} files")
    unused = frozenset(options.ignore) - used
    return Found(inputs=found, left_out=left_out, unread=unread, unused=unused)


def find_inputs(path: str, *, options: FileFormat) -> list[Input]:
    """The files to read of a path, directory or pattern. DataError: there is none, or one that cannot be read."""
    found = find(path, options=options)
    found.refuse_unread(path)
    return found.inputs


def summary(left_out: Mapping[str, str]) -> dict[str, int]:
    """{reason and a few names: number of files} of files that were left out."""
    by_reason: dict[str, list[str]] = {}
    for name, why in sorted(left_out.items()):
        by_reason.setdefault(why, []).append(name)
    return {f"file{'s' * (len(names) > 1)} {why}: {some_of(names)}": len(names) for why, names in by_reason.items()}


def without_equal(
    files: Iterable[tuple[Input, str]], *, known: Iterable[str] = ()
) -> tuple[list[tuple[Input, str]], dict[str, str]]:
    """(the files with their checksums, of equal ones the first; {name: EQUAL} of the others). `known`: checksums of
    content that is not wanted again."""
    seen, first, equal = set(known), [], {}
    for file, value in files:
        if value in seen:
            equal[file.name] = EQUAL
        else:
            first.append((file, value))
        seen.add(value)
    return first, equal


def packed_copies(names: Iterable[str]) -> dict[str, str]:
    """{name: earlier name} of files that differ from an earlier one in the compression alone: one is probably made from
    the other."""
    first: dict[str, str] = {}
    copies = {}
    for name in names:
        plain = without_compression(name)
        if plain in first:
            copies[name] = first[plain]
        first.setdefault(plain, name)
    return copies


def without_compression(name: str) -> str:
    """day.csv of day.csv.gz."""
    compression = _endings(name)[1]
    return name[: -len(compression)] if compression else name


def checksum(file: Input) -> str:
    """xxh3-128 of the file's bytes as stored, not of the decompressed content."""
    with open_raw(file.url, name=file.name) as stream:
        return checksum_stream(stream)


def edges(file: Input) -> str:
    """xxh3-128 of the first and last 64 KiB of the file as stored; in a Parquet file the last ones hold the footer."""
    fs, path = locate(file.url)
    head = fs.cat_file(path, start=0, end=min(_EDGE_BYTES, file.bytes))
    tail = fs.cat_file(path, start=max(0, file.bytes - _EDGE_BYTES), end=file.bytes)
    return checksum_stream(io.BytesIO(head + tail))


def modified(file: Input) -> str | None:
    """When the file was last written, as text; None where its store does not tell."""
    fs, path = locate(file.url)
    try:
        return fs.modified(path).isoformat()
    except NotImplementedError:
        return None


def _single(file: Listed, path: str, *, options: FileFormat) -> Input:
    """The one file that the user named: it has the format that the user gives."""
    if file.problem:
        raise DataError(f"{shown(path)}: {file.problem}; name a regular file")
    given = _input(file, options=options)
    if options.format != "auto":
        return dataclasses.replace(given, format=_form(options.format))
    if not given.format:
        raise DataError(
            f"{path}: the name does not tell the format; set format to parquet, csv or jsonl (--files.format)"
        )
    return given


def _input(file: Listed, *, options: FileFormat) -> Input:
    suffix, compression = _endings(file.name)
    separator = options.separator
    if separator == "auto":
        separator = "\t" if suffix == ".tsv" else ","
    return Input(
        name=file.name, url=file.url, bytes=file.bytes, format=_SUFFIXES.get(suffix) or _form(options.format),
        compression=compression, separator=separator, version=file.version, is_young=file.is_young,
    )  # fmt: skip


def _form(given: str) -> str:
    return {"auto": "", "json": "jsonl"}.get(given, given)


def _endings(name: str) -> tuple[str, str | None]:
    """(".csv", ".gz") of log/day.csv.gz, in lower case."""
    stem, ending = os.path.splitext(name)
    compression = ending.lower() if ending.lower() in COMPRESSIONS else None
    suffix = os.path.splitext(stem)[1] if compression else ending
    return suffix.lower(), compression


def _why_unread(file: Listed, leaf: str, *, options: FileFormat) -> str | None:
    if file.is_again:
        return AGAIN
    if leaf in _TABLES:
        return "named like a table of an event log, not like events"
    if options.format == "auto" and _endings(leaf)[0] not in _SUFFIXES:
        return UNKNOWN
    return EMPTY if not file.bytes and _endings(leaf)[0] != ".parquet" else None


def _ignoring(name: str, patterns: Collection[str]) -> set[str]:
    """The patterns that match a file: its name as messages give it, its path in the directory, or a part of that."""
    inside = name.split("/", 1)[-1]
    texts = (name, inside, *inside.split("/"))
    return {
        pattern
        for pattern in patterns
        if any(text == pattern or fnmatch.fnmatchcase(text, pattern.removeprefix("./")) for text in texts)
    }


def _is_event_log(folder: str) -> bool:
    """Whether an import wrote this folder."""
    fs, path = locate(f"{folder}/{_SOURCE}")
    try:
        return fs.cat_file(path, start=0, end=len(_SOURCE_BEGINS)) == _SOURCE_BEGINS
    except OSError:
        return False


def _place(url: str) -> str:
    return url if "://" in url else os.path.realpath(url)


def some_of(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
