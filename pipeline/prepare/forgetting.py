"""Forgetting users: their events are removed from every file of a data set, and later ingests drop new ones.

    read_users      reads the file that names the users
    clean_rejected  removes their rows from the quarantine
    traces          finds what is left of them

build.forget combines these with the rewriting of buckets (compaction.py) and the removal of all older states.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.events import DataError, Reason
from pipeline.prepare.staging import write_table
from pipeline.shards.dataset import Shards
from pipeline.shards.manifest import manifest_numbers
from pipeline.shards.tombstones import Tombstones
from pipeline.storage import Store


def read_users(path: str) -> list[str]:
    """The ids in a text file with one per line, or in column user_id of a Parquet file. DataError: there are none."""
    folder, _, leaf = path.rpartition("/")
    store = Store(folder or ".")
    try:
        content = store.read(leaf)
        if leaf.endswith(".parquet"):
            ids = (
                pl.Series(pq.read_table(io.BytesIO(content), columns=["user_id"])["user_id"]).cast(pl.String).to_list()
            )
        else:
            ids = content.decode().splitlines()
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; name one with one id per line, or a Parquet file with a column user_id"
        ) from None
    except (KeyError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"{path}: neither text with one id per line nor Parquet with a column user_id") from error
    found = sorted({user.strip() for user in ids if user is not None and user.strip()})
    if not found:
        raise DataError(f"{path}: names no user; write one id per line")
    return found


def clean_rejected(path: str, users: Sequence[str]) -> int:
    """Rewrite the quarantine without the rows of these users; returns how many were removed. A line that could not be
    parsed is removed if it contains one of the ids as a word."""
    store, removed = Store(path), 0
    for name in _rejected(store):
        rows = pl.DataFrame(pq.read_table(io.BytesIO(store.read(name))))
        kept = rows.filter(~_about(rows, users))
        if kept.height < rows.height:
            removed += rows.height - kept.height
            write_table(store, name, kept)
    return removed


def traces(path: str, users: Sequence[str], *, outputs: Sequence[str] = ()) -> list[str]:
    """What is left of these users in the data set and in result files with a column user_id; one line per place."""
    # The current state: index, shards, tombstones.
    found = []
    data = Shards.open(path)
    known = set(data.index_table()["user_id"].cast(pl.String).to_list())
    if known & set(users):
        found.append(f"{data.manifest.index['name']}: {len(known & set(users))} of them")
    for bucket in data.buckets:
        for group in data.groups_of(bucket):
            stored = data.read_table(group)["user_id"].cast(pa.large_string()).to_pylist()
            if left := set(stored) & set(users):
                found.append(f"bucket {bucket}: {len(left)} of them")
    stones = Tombstones.of(path, data.manifest)
    if stones is None or not stones.among(pl.Series(users, dtype=pl.String)).all():
        found.append("tombstones: not all of them, so a later ingest would bring them back")

    # Older states, the quarantine, result files.
    for number in manifest_numbers(Store(path))[:-1]:
        before = set(Shards.open(path, number=number).index_table()["user_id"].cast(pl.String).to_list())
        if before & set(users):
            found.append(f"manifest {number}: an older state with {len(before & set(users))} of them is still there")
    found += [f"{name}: some rows" for name in _rejected(Store(path)) if _about(_table(path, name), users).any()]
    found += [f"{output}: some rows" for output in outputs if _of_users(output, users).any()]
    return found


def clean_output(path: str, users: Sequence[str]) -> int:
    """Rewrite a result file (Parquet with user_id) without these users' rows; returns how many were
    removed."""
    is_theirs = _of_users(path, users)
    if is_theirs.any():
        folder, _, leaf = path.rpartition("/")
        table = pq.read_table(path).filter(pa.array(~is_theirs.to_numpy()))
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        Store(folder or ".").write(leaf, sink.getvalue())
    return int(is_theirs.sum())


def _rejected(store: Store) -> list[str]:
    folders = [f"rejected/{name}" for name in store.names("rejected")]
    return [f"{folder}/{name}" for folder in folders for name in store.names(folder)]


def _table(path: str, name: str) -> pl.DataFrame:
    return pl.DataFrame(pq.read_table(io.BytesIO(Store(path).read(name))))


def _about(rows: pl.DataFrame, users: Sequence[str]) -> pl.Series:
    """[n] bool: which rejected rows are about these users."""
    wanted = set(users)
    words = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, users))})(?![\w-])")
    return pl.Series(
        [
            bool(words.search(record)) if reason == Reason.MALFORMED_ROW else _user_of(record) in wanted
            for reason, record in rows.select("reason", "record").iter_rows()
        ],
        dtype=pl.Boolean,
    )


def _user_of(record: str) -> str:
    return str(json.loads(record).get("user_id"))


def _of_users(path: str, users: Sequence[str]) -> pl.Series:
    """[n] bool: which rows of a result file are about these users."""
    try:
        ids: Any = pq.read_table(path, columns=["user_id"])["user_id"]
    except (OSError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a Parquet file with a column user_id; name results of `solar score`") from error
    return pl.Series(ids).cast(pl.String).is_in(pl.Series(users, dtype=pl.String).implode()).fill_null(False)
