"""Which events a bucket holds, without reading them: the time and a 64-bit key of each event, by day.

    keys/bucket-00003-<hash>.parquet    one row group per UTC day, days ascending: time, key, and also full where the
                                        log has columns in which equal events may differ (label, request_id), and
                                        labels where it has labels

`key` hashes the columns that identify an event (user, item, time, order, action), `full` hashes all columns. `labels`
says which labels the event was read with (1 = label 0, 2 = label 1, 3 = both): the shards keep only the row with the
largest. Every shard file has such a key file, so a repeated event is looked up only in its bucket and its day. A log
without times counts as one day.

A row of an event that is stored already is written again, into the new file, if it may win over the stored row or has a
label that was not read before; readers merge the two (layers.py). An event counts once as accepted, once as conflicting
if both labels were read, and every further row is a duplicate. So the counts do not depend on the order of the rows.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import io
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.hashing import hash64, hash_text
from pipeline.shards.rows import UserRows
from pipeline.shards.sequences import BOTH
from pipeline.storage import Store, adopt

_DAY = 86_400_000
_WORTH_READING = 100
"""An old day is read too if it has at most this many stored events per new event."""


class Found(enum.IntEnum):
    """Result of the look-up of an event."""

    NEW = 0
    SAME = 1
    """Stored already, and this row changes nothing: it is equal in every column, or its label is smaller and known."""
    OTHER = 2
    """Stored already with another label or request: written again, readers keep one of the two (`in_total_order`)."""
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
    labels: np.ndarray | None
    """[E] uint8: which labels the event was read with: 1 = label 0, 2 = label 1, 3 = both; None without labels."""
    has_time: bool

    @classmethod
    def of(cls, rows: UserRows, *, labels: np.ndarray | None = None) -> EventKeys:
        """The keys of the rows' events, in their order. `labels` [E]: None = no event was read with another label than
        the row's."""
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
        if "label" in columns and labels is None:
            labels = (1 + (_integers(columns["label"]) > 0)).astype(np.uint8)
        has_time = "timestamp" in columns
        return cls(time=time if has_time else order, key=key, full=full, labels=labels, has_time=has_time)

    @property
    def num_conflicting(self) -> int:
        """Number of events that were read with both labels."""
        return 0 if self.labels is None else int((self.labels == BOTH).sum())

    def filter(self, mask: np.ndarray) -> EventKeys:
        """Keep the events where mask [E] is true."""
        full, labels = (None if values is None else values[mask] for values in (self.full, self.labels))
        return dataclasses.replace(self, time=self.time[mask], key=self.key[mask], full=full, labels=labels)

    def with_both_labels(self, conflicting: pl.DataFrame) -> EventKeys:
        """These keys, and that the events in `conflicting` (time, key) were read with both labels."""
        if self.labels is None or conflicting.is_empty():
            return self
        places = self.frame().with_row_index("place").join(conflicting, on=["time", "key"], how="semi")["place"]
        labels = self.labels.copy()
        labels[places.to_numpy()] = BOTH
        return dataclasses.replace(self, labels=labels)

    def days(self) -> np.ndarray:
        """[E] int64 days since 1970 UTC; zeros in a log without time."""
        return self.time // _DAY if self.has_time else np.zeros(len(self.time), np.int64)

    def frame(self) -> pl.DataFrame:
        """time, key and, if they exist, full and labels."""
        columns = {"time": self.time, "key": self.key, "full": self.full, "labels": self.labels}
        return pl.DataFrame({name: values for name, values in columns.items() if values is not None})


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """What a bucket's files hold of E events."""

    found: np.ndarray
    """[E] uint8: the Found of each event."""
    labels: np.ndarray | None
    """[E] uint8: the labels with which it was read before, 0 = none; None without labels."""
    is_complete: bool
    """False if the labels of an event are not known: its key file is from before the keys had labels."""

    def num_conflicting(self, keys: EventKeys) -> int:
        """How many of the events have been read with both labels only now, with these rows."""
        if keys.labels is None or self.labels is None:
            return 0
        return int(((keys.labels | self.labels == BOTH) & (self.labels != BOTH)).sum())


def write_keys(parts: Sequence[EventKeys], *, path: str, bucket: int) -> dict[str, Any]:
    """Write the keys of a shard file; returns the entry for the manifest."""
    store = Store(path)
    with store.scratch() as scratch:
        local = f"{scratch}/keys.parquet"
        _write(parts, local)
        return adopt(store, local, f"keys/bucket-{bucket:05d}-")


def keys_in_memory(parts: Sequence[EventKeys]) -> pq.ParquetFile:
    """A key file that is written nowhere."""
    sink = io.BytesIO()
    _write(parts, sink)
    return pq.ParquetFile(sink)


def _write(parts: Sequence[EventKeys], sink: str | io.BytesIO) -> None:
    has_time = all(part.has_time for part in parts)
    table = pl.concat([part.frame() for part in parts]).sort("time", "key")
    day = table["time"].to_numpy() // _DAY if has_time else np.zeros(table.height, np.int64)
    starts = np.flatnonzero(np.diff(day, prepend=np.int64(-1) << 40)).tolist()
    arrow = table.to_arrow()
    # Hashes do not compress; sorted times and labels do.
    options: dict[str, Any] = {
        "column_encoding": {n: "DELTA_BINARY_PACKED" if n == "time" else "PLAIN" for n in arrow.column_names},
        "compression": {n: "zstd" if n in ("time", "labels") else "none" for n in arrow.column_names},
        "write_statistics": ["time"],
    }
    with pq.ParquetWriter(sink, arrow.schema, use_dictionary=False, write_page_checksum=True, **options) as writer:
        for first, last in itertools.pairwise([*starts, len(arrow)]):
            writer.write_table(arrow.slice(first, last - first), row_group_size=last - first)


def look_up(keys: EventKeys, *, files: Sequence[pq.ParquetFile], latest: int | None, late_days: int) -> Stored:
    """What a bucket's key files hold of the events.

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
    labels = None if keys.labels is None else np.zeros(len(found), np.uint8)
    if not tables:
        return Stored(found=found, labels=labels, is_complete=True)
    # A file from before the log had requests has no `full`: whether an event there is SAME is not known.
    known = pl.concat(tables, how="diagonal")
    looked_up = keys.frame().with_row_index("place")
    present = looked_up.join(known, on=["time", "key"], how="semi")["place"].to_numpy()
    found[present] = Found.SAME if keys.full is None else Found.OTHER
    if keys.full is not None and "full" in known.columns:
        same = looked_up.join(known, on=["time", "key", "full"], how="semi")["place"].to_numpy()
        found[same] = Found.SAME
    if keys.labels is None or labels is None:
        return Stored(found=found, labels=None, is_complete=True)
    # Compare the labels with those that are known.
    before = _labels_before(looked_up, known)
    labels[before["place"].to_numpy()] = before["labels"].to_numpy()
    found[present] = _with_labels(found[present], now=keys.labels[present], before=labels[present])
    return Stored(found=found, labels=labels, is_complete=bool(before["is_complete"].all()))


def _labels_before(looked_up: pl.DataFrame, known: pl.DataFrame) -> pl.DataFrame:
    """place, labels, is_complete of the events that are `known`: the labels with which each was read before."""
    if "labels" not in known.columns:
        known = known.with_columns(labels=pl.lit(None, pl.UInt8))
    joined = looked_up.join(known, on=["time", "key"], how="inner", suffix="_known")
    # A file from before the keys had labels: of a row that is equal in every column the label is known all the same.
    row_label = pl.when(pl.col("full") == pl.col("full_known")).then(pl.col("labels").clip(upper_bound=2))
    labels = pl.coalesce("labels_known", row_label)
    return joined.group_by("place").agg(labels=labels.fill_null(0).bitwise_or(), is_complete=labels.is_not_null().all())


def _with_labels(found: np.ndarray, *, now: np.ndarray, before: np.ndarray) -> np.ndarray:
    """The Found of stored events, now that the labels are compared: a row with a new label is OTHER, and one that is
    smaller than a known label, and known itself, is SAME."""
    is_smaller = (now == 1) & (before == BOTH)
    return np.where(now & ~before, Found.OTHER, np.where(is_smaller, Found.SAME, found)).astype(np.uint8)


def _day_of(reader: pq.ParquetFile, group: int, has_time: bool) -> tuple[int, int]:
    """(day, events) of a row group."""
    column = reader.metadata.row_group(group).column(0)
    return int(column.statistics.min) // _DAY if has_time else 0, column.num_values


def _integers(values: pa.Array) -> np.ndarray:
    return np.asarray(values).astype(np.int64)
