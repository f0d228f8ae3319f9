"""The list of users to forget: a text file with one id per line, or one column of a table.

    users.txt        LF or CRLF ends a line, a byte order mark is dropped, all other characters belong to the id
    users.csv, ...   the column of a CSV, JSON or Parquet file, read as an event log is read

Both may be compressed as event files may.

traces.py reads the same files by other code, to check what was forgotten.
"""

from __future__ import annotations

import codecs
import dataclasses
import re
from collections.abc import Iterable, Iterator

import polars as pl

from pipeline.events import DataError, id_type, quoted
from pipeline.log.inputs import FileFormat, find_inputs
from pipeline.log.readers import read_blocks, read_schema
from pipeline.log.streams import COMPRESSIONS
from pipeline.shards.dataset import Shards
from pipeline.shards.tombstones import Tombstones
from pipeline.storage import Store

COLUMN = "user_id"
"""The column of a table that is read if no other is named."""
_TABLE = re.compile(r".*\.(parquet|csv|tsv|json|jsonl|ndjson)(\.(gz|bz2|xz|zst|zip))?", re.IGNORECASE | re.DOTALL)
_SHOWN, _SHOWN_LENGTH = 5, 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserList:
    """The users that a file names."""

    ids: list[str]
    """Distinct ids in their decimal or string form, sorted."""
    empty: int
    """Empty lines or cells, which name nobody: no user has an empty id."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SortedOut:
    """The users of a list by what a data set knows of them."""

    found: list[str]
    """They have events."""
    forgotten: list[str]
    """They were named to an earlier forget: they had events, or are only kept out."""
    unknown: list[str]
    """They never had an event there."""


def is_table(path: str) -> bool:
    """Whether the name is that of a table; any other file is text with one id per line."""
    return _TABLE.fullmatch(path) is not None


def read_users(path: str, *, column: str | None = None, integers: bool) -> UserList:
    """The ids that a file names. `integers`: the ids of the data set are integers.

    DataError: no such file, no such column, a line that is not UTF-8 or not a row, an id that is not an integer where
    ids are integers, or no id at all.
    """
    if column and not is_table(path):
        raise DataError(f"{path}: has no columns: a name such as users.csv or users.parquet is that of a table")
    store = Store(path)
    if store.fs.isdir(store.path):
        raise DataError(f"{path}: is a directory; name one file")
    texts = list(_cells(path, column or COLUMN) if is_table(path) else _lines(path))
    ids = sorted({text for text in texts if text})
    if not ids:
        raise DataError(f"{path}: names no user; write one id per line")
    return UserList(ids=_as_integers(ids, path) if integers else ids, empty=sum(not text for text in texts))


def sort_out(ids: Iterable[str], *, data: Shards) -> SortedOut:
    """Which of the users the data set has, which were forgotten before, and which it never had."""
    known = set(data.index_table()["user_id"].cast(pl.String).to_list())
    absent = pl.Series([user for user in ids if user not in known], dtype=pl.String)
    stones = Tombstones.of(data.path, data.manifest)
    before = stones.among(absent) if stones else pl.repeat(False, len(absent), dtype=pl.Boolean, eager=True)
    return SortedOut(
        found=[user for user in ids if user in known],
        forgotten=absent.filter(before).to_list(),
        unknown=absent.filter(~before).to_list(),
    )


def few_of(ids: list[str]) -> str:
    """The first ids, shortened and with every invisible character as an escape sequence; and how many more."""
    shown = [repr(text[:_SHOWN_LENGTH]) + ("..." if len(text) > _SHOWN_LENGTH else "") for text in ids[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(ids) - _SHOWN:,} more" if len(ids) > _SHOWN else "")


def _lines(path: str) -> Iterator[str]:
    try:
        content = _unpacked(path) if path.lower().endswith(COMPRESSIONS) else _stored(path)
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; name one with one id per line, or a table with a column of ids"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; name a file with one id per line") from None
    *lines, rest = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    ended = [line.removesuffix(b"\r") for line in lines]
    for number, line in enumerate([*ended, rest] if rest else ended, start=1):
        try:
            yield line.decode()
        except UnicodeDecodeError:
            raise DataError(f"{path}: line {number} is not UTF-8 ({line[:20]!r}); save the file as UTF-8") from None


def _stored(path: str) -> bytes:
    folder, _, leaf = path.rpartition("/")
    return Store(folder or ("/" if path.startswith("/") else ".")).read(leaf)


def _unpacked(path: str) -> bytes:
    [file] = find_inputs(path, options=FileFormat(format="csv"))
    with file.open() as stream:
        try:
            return stream.read()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())}); copy it again") from None


def _cells(path: str, column: str) -> Iterator[str | None]:
    options = FileFormat()
    for file in find_inputs(path, options=options):
        schema = read_schema(file, options=options)
        if column not in schema and file.format != "jsonl":
            raise DataError(f"{path}: no column {column!r}; it has {quoted(schema)}; name one with --users_column")
        if column in schema and id_type(schema[column], integer_ids=False, is_text=file.format != "parquet") is None:
            raise DataError(
                f"{path}: column {column!r} has type {schema[column]}; ids are integers or strings: cast it"
            )
        for block in read_blocks(file, mapping={COLUMN: column}, options=options):
            if block.malformed:
                fix = f"write objects with {column!r}, or one id per line in a text file"
                raise DataError(
                    f"{path}: {block.malformed[0][:80]!r} cannot be read as a row; "
                    + (fix if file.format == "jsonl" else "fix it")
                )
            yield from block.table[COLUMN].cast(pl.String)


def _as_integers(ids: list[str], path: str) -> list[str]:
    """The ids in their decimal form, as an ingest reads integer ids from text."""
    numbers = pl.Series(ids, dtype=pl.String).cast(pl.Int64, strict=False)
    if wrong := pl.Series(ids).filter(numbers.is_null()).to_list():
        raise DataError(
            f"{path}: {len(wrong):,} of {len(ids):,} ids are not integers of 64 bits, as all ids of this data set are: "
            f"{few_of(wrong)}; correct or remove them"
        )
    return numbers.unique().cast(pl.String).sort().to_list()
