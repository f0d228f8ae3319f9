"""Events that were read with both labels: the shards keep label 1, the key files (event_keys.py) remember the rest.

    log                     shards          keys                counts
    u x 12:00 label 0       u x 12:00 1     u x 12:00 labels 3  1 accepted, 1 conflicting, 1 duplicate
    u x 12:00 label 1
    u x 12:00 label 0

Key files of an earlier version have no labels. Where they matter, they are read from the rows of the shard file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from pipeline.shards.dataset import Shards
from pipeline.shards.event_keys import EventKeys, Stored, keys_in_memory, look_up
from pipeline.shards.rows import UserRows
from pipeline.shards.sequences import BOTH

_NONE = pl.DataFrame(schema={"time": pl.Int64, "key": pl.UInt64})


def stored_events(keys: EventKeys, *, data: Shards, bucket: int, latest: int | None, late_days: int) -> Stored:
    """What the files of a bucket hold of these events; see event_keys.look_up."""
    files = data.files_of(bucket)
    with contextlib.ExitStack() as opened:
        key_files = [opened.enter_context(data.part_of(file["keys"])) for file in files]
        found = look_up(keys, files=key_files, latest=latest, late_days=late_days)
    if not found.is_complete:
        with contextlib.ExitStack() as opened:
            key_files = [opened.enter_context(_keys_with_labels(file, data)) for file in files]
            found = look_up(keys, files=key_files, latest=latest, late_days=late_days)
    return found


def conflicting_events(data: Shards, bucket: int) -> pl.DataFrame:
    """time, key: the events of a bucket that were read with both labels, in whichever of its files."""
    files = data.files_of(bucket)
    if not any(file.get("conflicting") for file in files) and not data.has_repeats(bucket):
        return _NONE
    if "label" not in data.manifest.schema["columns"]:
        return _NONE
    known = []
    for file in files:
        with _keys_with_labels(file, data) as key_file:
            known.append(pl.DataFrame(key_file.read(columns=["time", "key", "labels"])))
    labels = pl.concat(known).group_by("time", "key").agg(pl.col("labels").bitwise_or())
    return labels.filter(pl.col("labels") == BOTH).select("time", "key")


def num_conflicting(data: Shards, bucket: int) -> int:
    """How many events of a bucket were read with both labels. What an ingest counted may be too low or too high where
    it did not look up old events; a compaction makes it exact."""
    if data.has_repeats(bucket):
        return conflicting_events(data, bucket).height
    return sum(file.get("conflicting", 0) for file in data.files_of(bucket))


@contextlib.contextmanager
def _keys_with_labels(file: dict[str, Any], data: Shards) -> Iterator[pq.ParquetFile]:
    """The key file of a shard file, with labels."""
    if "conflicting" in file:
        with data.part_of(file["keys"]) as parquet:
            yield parquet
    else:
        parts = [EventKeys.of(UserRows.from_table(table)) for table in data.tables_of(file)]
        with keys_in_memory(parts) as parquet:
            yield parquet
