"""Forgetting users: their rows are removed from the quarantine of a data set and from results of `solar score`.

    clean_rejected   removes their rows from the quarantine
    clean_output     removes their rows from a result file

build.forget combines the first with the rewriting of buckets (compaction.py) and the removal of all older states
(garbage.py); user_list.py reads who they are; traces.py finds what is left of them.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.events import DataError, Reason
from pipeline.prepare.staging import write_table
from pipeline.storage import Store

_WORD = re.compile(r"[\w-]+")


def clean_rejected(path: str, users: Sequence[str], *, integers: bool) -> int:
    """Rewrite the quarantine without the rows of these users; returns how many were removed. `integers`: the ids of the
    data set are integers. A line that could not be parsed is removed if it contains one of the ids: as a word, or
    anywhere if the id is not a single word."""
    store, removed = Store(path), 0
    for name in rejected_files(store):
        rows = pl.DataFrame(pq.read_table(io.BytesIO(store.read(name))))
        kept = rows.filter(~_about(rows, users, integers=integers))
        if kept.height < rows.height:
            removed += rows.height - kept.height
            write_table(store, name, kept)
    return removed


def clean_output(path: str, users: Sequence[str]) -> int:
    """Rewrite a result file (Parquet with user_id) without these users' rows; returns how many were removed."""
    is_theirs = rows_of_users(path, users)
    if is_theirs.any():
        folder, _, leaf = path.rpartition("/")
        table = pq.read_table(path).filter(pa.array(~is_theirs.to_numpy()))
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        Store(folder or ".").write(leaf, sink.getvalue())
    return int(is_theirs.sum())


def rows_of_users(path: str, users: Iterable[str]) -> pl.Series:
    """[n] bool: which rows of a result file are about these users. DataError: it has no column user_id."""
    try:
        ids: Any = pq.read_table(path, columns=["user_id"])["user_id"]
    except (OSError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a Parquet file with a column user_id; name results of `solar score`") from error
    return pl.Series(ids).cast(pl.String).is_in(pl.Series(list(users), dtype=pl.String).implode()).fill_null(False)


def rejected_files(store: Store) -> list[str]:
    """The files of a data set's quarantine."""
    folders = [f"rejected/{name}" for name in store.names("rejected")]
    return [f"{folder}/{name}" for folder in folders for name in store.names(folder)]


def written_forms(user: str) -> set[str]:
    """An id as it is, inside a JSON string, and inside a quoted CSV field."""
    return {user, json.dumps(user)[1:-1], json.dumps(user, ensure_ascii=False)[1:-1], user.replace('"', '""')}


def _about(rows: pl.DataFrame, users: Sequence[str], *, integers: bool) -> pl.Series:
    """[n] bool: which rejected rows are about these users."""
    wanted = set(users)
    # In a line that was not parsed, an id may be written as in JSON or CSV; where its words end is not known.
    parts = [form for user in users if not _WORD.fullmatch(user) for form in written_forms(user)]
    has_part = rows["record"].str.contains_any(parts) if parts else pl.repeat(False, rows.height, eager=True)

    def is_theirs(reason: str, record: str, has_part: bool) -> bool:
        if reason == Reason.MALFORMED_ROW:
            return has_part or not wanted.isdisjoint(_WORD.findall(record))
        return _user_of(record, integers=integers) in wanted

    columns = rows.select("reason", "record", has_part.alias("has_part"))
    return pl.Series([is_theirs(*row) for row in columns.iter_rows()], dtype=pl.Boolean)


def _user_of(record: str, *, integers: bool) -> str | None:
    """The id in a rejected row; in its decimal form where ids are integers: 007 is user 7."""
    value = json.loads(record).get("user_id")
    text = value if value is None or isinstance(value, str) else json.dumps(value)
    return str(int(text)) if text and integers and re.fullmatch(r"[+-]?\d+", text) else text
