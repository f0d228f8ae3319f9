"""Writes the files that dataset.py reads: shard files, the index and the vocabulary, named by a hash of the content."""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.shards.rows import ROW, UserRows, runs
from pipeline.shards.vocabulary import Vocabulary
from pipeline.storage import Store, adopt


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Placed:
    """Users and their (group, row) places in a bucket, sorted by place."""

    rows: UserRows
    group: np.ndarray
    """[U] int64, counted within the bucket."""
    row: np.ndarray
    """[U] int64: row within the group."""

    def frame(self) -> pl.DataFrame:
        """user_id, group, row and events of each user."""
        return pl.DataFrame(
            {"user_id": self.rows.user_id, "group": self.group, "row": self.row, "events": self.rows.lengths}
        )

    def parts(self, *, with_rows: bool) -> Iterator[tuple[int, pa.Table]]:
        """(group, table) of each group. `with_rows`: the table has a column with the users' rows in the group."""
        starts = np.flatnonzero(np.diff(self.group, prepend=-1))
        for first, last in itertools.pairwise([*starts.tolist(), len(self.group)]):
            table = self.rows.slice(first, last).to_table()
            if with_rows:
                table = table.append_column(ROW, pa.array(self.row[first:last]))
            yield int(self.group[first]), table


def place(rows: UserRows, *, known: pl.DataFrame, num_groups: int, row_group_events: int) -> Placed:
    """Users in `known` (user_id, group, row) keep their place; new users, by id, get groups from `num_groups` on."""
    users = pl.DataFrame({"user_id": rows.user_id}).join(known, on="user_id", how="left", maintain_order="left")
    is_new = users["group"].is_null().to_numpy()
    group, row = (users[name].fill_null(-1).to_numpy().copy() for name in ("group", "row"))
    fresh = np.flatnonzero(is_new)
    fresh = fresh[rows.user_id.gather(fresh).arg_sort().to_numpy()]
    starts = runs(rows.lengths[fresh], row_group_events)
    number = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    group[fresh], row[fresh] = num_groups + number, np.arange(len(fresh)) - starts[number]
    order = np.lexsort((row, group))
    return Placed(rows=rows.take(order), group=group[order], row=row[order])


def write_shard(parts: Iterable[tuple[int, pa.Table]], *, path: str, bucket: int) -> dict[str, Any] | None:
    """Write a shard file with one row group per (group, table).

    Returns its name, bytes, checksum, bucket, groups, rows and events; None, without a file, if there is no group.
    """
    store, groups, num_rows, events = Store(path), [], 0, 0
    with store.scratch() as scratch:
        local, writer = f"{scratch}/shard.parquet", None
        try:
            for group, table in parts:
                writer = writer or pq.ParquetWriter(
                    local, table.schema, compression="zstd", write_statistics=False, write_page_checksum=True
                )
                writer.write_table(table, row_group_size=max(1, len(table)))
                groups.append(group)
                num_rows += len(table)
                events += len(table["item"].combine_chunks().flatten())
        finally:
            if writer is not None:
                writer.close()
        if writer is None:
            return None
        entry = adopt(store, local, f"shards/bucket-{bucket:05d}-")
    return entry | {"bucket": bucket, "groups": groups, "rows": num_rows, "events": events}


def write_vocabulary(vocabulary: Vocabulary, *, path: str) -> dict[str, Any]:
    """Write the vocabulary; returns the entry for the manifest."""
    entry = write_bytes(path, vocabulary.to_bytes(), "vocabulary/") | {"fingerprint": vocabulary.fingerprint}
    features = sorted(vocabulary.features)
    return entry | ({"features": features, "featureless": vocabulary.num_featureless} if features else {})


def write_index(places: pl.DataFrame, *, path: str) -> dict[str, Any]:
    """Write user_id, bucket, group, row, events in user-row order; returns the entry for the manifest."""
    table = places.select("user_id", *(pl.col(c).cast(pl.Int64) for c in ("bucket", "group", "row", "events")))
    sink = io.BytesIO()
    pq.write_table(table.to_arrow(compat_level=pl.CompatLevel.oldest()), sink, compression="zstd")
    return write_bytes(path, sink.getvalue(), "index/")


def write_bytes(path: str, data: bytes, prefix: str) -> dict[str, Any]:
    """Write a Parquet file's bytes under a name of prefix and hash; returns the entry for the manifest."""
    store = Store(path)
    with store.scratch() as scratch:
        local = f"{scratch}/file"
        with open(local, "wb") as stream:
            stream.write(data)
        return adopt(store, local, prefix)
