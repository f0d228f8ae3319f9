"""Which events a bucket holds, without reading them: the time and a 64-bit key of each event, by day.

    keys/bucket-00003-<hash>.parquet    one row group per UTC day, days ascending: time, key, and also full where the
                                        log has columns in which equal events may differ (label, request_id)

`key` hashes the columns that identify an event (user, item, time, order, action), `full` hashes all columns. Every
shard file has such a key file, so a repeated event is looked up only in its bucket and its day. A log without times
counts as one day.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.hashing import hash64, hash_text
from pipeline.shards.rows import UserRows
from pipeline.storage import Store, adopt

_DAY = 86_400_000
_WORTH_READING = 100
"""An old day is read too if it has at most this many stored events per new event."""


class Found(enum.IntEnum):
    """Result of the look-up of an event."""

    NEW = 0
    SAME = 1
    """Stored already, equal in every column."""
    OTHER = 2
    """Stored already with another label or request: readers keep the one that is first in the total order."""
    UNCHECKED = 3
    """Too old to be looked up: counted as new; the next compaction counts it as a duplicate if it is one."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EventKeys:
    """The keys of E events."""

    time: np.ndarray
    """[E] int64: milliseconds since 1970 UTC, or the order in a log without time."""
    key: np.ndarray
    """[E] uint64."""
    full: np.ndarray | None
    """[E] uint64; None where `key` already covers every column."""
    has_time: bool

    @classmethod
    def of(cls, rows: UserRows) -> EventKeys:
        """The keys of the rows' events, in their order."""
        columns, size = rows.columns, rows.num_events
        user = np.repeat(hash_text(rows.user_id), rows.lengths)
        zeros = np.zeros(size, np.int64)
        time, order, action = (
            _integers(columns[n]) if n in columns else zeros for n in ("timestamp", "order", "action")
        )
        key, full = hash64(user, _integers(columns["item"]), time, order, action), None
        if "label" in columns or "request_id" in columns:
            label = _integers(columns["label"]) + 1 if "label" in columns else zeros
            request = hash_text(pl.Series(columns["request_id"])) if "request_id" in columns else zeros
            full = hash64(key, label, request)
        has_time = "timestamp" in columns
        return cls(time=time if has_time else order, key=key, full=full, has_time=has_time)

    def filter(self, mask: np.ndarray) -> EventKeys:
        """Keep the events where mask [E] is true."""
        full = None if self.full is None else self.full[mask]
        return dataclasses.replace(self, time=self.time[mask], key=self.key[mask], full=full)

    def days(self) -> np.ndarray:
        """[E] int64 days since 1970 UTC; zeros in a log without time."""
        return self.time // _DAY if self.has_time else np.zeros(len(self.time), np.int64)

    def frame(self) -> pl.DataFrame:
        """time, key and, if it exists, full."""
        columns = {"time": self.time, "key": self.key} | ({} if self.full is None else {"full": self.full})
        return pl.DataFrame(columns)


def write_keys(parts: Sequence[EventKeys], *, path: str, bucket: int) -> dict[str, Any]:
    """Write the keys of a shard file; returns the entry for the manifest."""
    has_time = all(part.has_time for part in parts)
    table = pl.concat([part.frame() for part in parts]).sort("time", "key")
    day = table["time"].to_numpy() // _DAY if has_time else np.zeros(table.height, np.int64)
    starts = np.flatnonzero(np.diff(day, prepend=np.int64(-1) << 40)).tolist()
    arrow = table.to_arrow()
    store = Store(path)
    with store.scratch() as scratch:
        local = f"{scratch}/keys.parquet"
        # Hashes do not compress; sorted times do.
        options: dict[str, Any] = {
            "column_encoding": {n: "DELTA_BINARY_PACKED" if n == "time" else "PLAIN" for n in arrow.column_names},
            "compression": {n: "zstd" if n == "time" else "none" for n in arrow.column_names},
            "write_statistics": ["time"],
        }
        with pq.ParquetWriter(local, arrow.schema, use_dictionary=False, write_page_checksum=True, **options) as writer:
            for first, last in itertools.pairwise([*starts, len(arrow)]):
                writer.write_table(arrow.slice(first, last - first), row_group_size=last - first)
        return adopt(store, local, f"keys/bucket-{bucket:05d}-")


def look_up(keys: EventKeys, *, files: Sequence[pq.ParquetFile], latest: int | None, late_days: int) -> np.ndarray:
    """[E] the Found of each event in a bucket's key files.

    Reads the days from `late_days` before the day of `latest` (the last event of the ingest) on, and earlier days with
    at most _WORTH_READING stored events per new event. So the cost grows with the new events, not with the stored ones.
    """
    # Choose the days that are worth reading.
    found = np.full(len(keys.time), Found.NEW, np.uint8)
    days = keys.days()
    wanted, num_new = np.unique(days, return_counts=True)
    stored = [
        (file, group, *_day_of(file, group, keys.has_time))
        for file in files
        for group in range(file.metadata.num_row_groups)
    ]
    num_stored = collections.Counter()
    for _, _, day, size in stored:
        num_stored[day] += size
    worth = np.array([num_stored[day] for day in wanted.tolist()]) <= _WORTH_READING * num_new
    if latest is None or not keys.has_time:
        worth[:] = True
    else:
        worth |= wanted >= latest // _DAY - late_days
    read = wanted[worth]
    found[~np.isin(days, read)] = Found.UNCHECKED
    # Look up the events in these days.
    tables = [pl.DataFrame(file.read_row_group(group)) for file, group, day, _ in stored if day in read]
    if not tables:
        return found
    # A file from before the log had labels or requests has no `full`: whether an event there is SAME is not known.
    known = pl.concat(tables, how="diagonal")
    looked_up = keys.frame().with_row_index("place")
    present = looked_up.join(known, on=["time", "key"], how="semi")["place"].to_numpy()
    found[present] = Found.SAME if keys.full is None else Found.OTHER
    if keys.full is not None and "full" in known.columns:
        same = looked_up.join(known, on=["time", "key", "full"], how="semi")["place"].to_numpy()
        found[same] = Found.SAME
    return found


def _day_of(reader: pq.ParquetFile, group: int, has_time: bool) -> tuple[int, int]:
    """(day, events) of a row group."""
    column = reader.metadata.row_group(group).column(0)
    return int(column.statistics.min) // _DAY if has_time else 0, column.num_values


def _integers(values: pa.Array) -> np.ndarray:
    return np.asarray(values).astype(np.int64)
