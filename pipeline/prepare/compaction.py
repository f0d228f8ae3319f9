"""Compaction: the files of a bucket rewritten as one.

    compact_bucket   a bucket's files -> one file without repeated events and forgotten users     (one task per bucket)
    finish           counts, index, manifest                                                      (driver)

Users keep their rows, and readers get the same before and after.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.events import Reason
from pipeline.prepare.staging import read_table, write_table
from pipeline.shards.dataset import Shards
from pipeline.shards.event_keys import EventKeys, write_keys
from pipeline.shards.label_conflicts import conflicting_events
from pipeline.shards.manifest import Manifest
from pipeline.shards.rows import UserRows, runs
from pipeline.shards.tombstones import Tombstones
from pipeline.shards.user_columns import PREFIX
from pipeline.shards.writer import write_index, write_shard
from pipeline.storage import Store


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewrittenBucket:
    """The result of rewriting a bucket as one file."""

    bucket: int
    file: dict[str, Any] | None
    """The file's entry for the manifest; None if no user is left."""
    forgotten: int
    """Number of events, and of conflicting rows of them, that were left out because their users are forgotten."""


def crowded(data: Shards, *, max_deltas: int) -> list[int]:
    """Buckets that have more than `max_deltas` files besides their first one."""
    return [bucket for bucket in data.buckets if len(data.files_of(bucket)) - 1 > max_deltas]


def compact_bucket(bucket: int, *, data: Shards, staging: str, forgotten: Tombstones | None = None) -> RewrittenBucket:
    """Write the bucket as one file, without forgotten users. Stages the places of its users for `finish`."""
    keys, places, dropped = [], [data.index_table().clear()], 0
    conflicting = conflicting_events(data, bucket)

    # The generators run while write_shard reads from them; they also collect keys, places and what was dropped.
    def parts() -> Iterator[tuple[int, pa.Table]]:
        for group, rows in enumerate(_regrouped(kept(), limit=data.manifest.config["row_group_events"])):
            keys.append(EventKeys.of(rows).with_both_labels(conflicting))
            users = pl.DataFrame({"user_id": rows.user_id, "events": rows.lengths})
            users = users.with_columns(bucket=pl.lit(bucket, pl.Int64), group=pl.lit(group, pl.Int64))
            places.append(users.with_columns(row=pl.int_range(pl.len())).select(places[0].columns))
            yield group, rows.to_table()

    def kept() -> Iterator[UserRows]:
        nonlocal dropped
        for group in data.groups_of(bucket):
            rows = UserRows.from_table(data.read_table(group))
            rows = rows.with_values([f"{PREFIX}{name}" for name in data.user_features])
            if forgotten is not None:
                stays = ~forgotten.among(rows.user_id).to_numpy()
                gone = EventKeys.of(rows.take(np.flatnonzero(~stays))).with_both_labels(conflicting)
                dropped += len(gone.key) + gone.num_conflicting
                rows = rows.take(np.flatnonzero(stays))
            if len(rows.user_id):
                yield rows

    entry = write_shard(parts(), path=data.path, bucket=bucket)
    if entry is not None:
        entry |= {"accepted": entry["events"], "unchecked": 0, "keys": write_keys(keys, path=data.path, bucket=bucket)}
        if "label" in data.manifest.schema["columns"]:
            entry["conflicting"] = sum(part.num_conflicting for part in keys)
    write_table(Store(staging), f"places-{bucket:05d}.parquet", pl.concat(places))
    return RewrittenBucket(bucket=bucket, file=entry, forgotten=dropped)


def finish(built: Sequence[RewrittenBucket], *, data: Shards, staging: str) -> Manifest:
    """The manifest of the data set with these buckets rewritten; the caller commits it."""
    # Files: those of the rewritten buckets replace the old ones.
    fresh = {b.bucket: b.file for b in built}
    files = [file for file in data.manifest.files if file["bucket"] not in fresh]
    files = sorted([*files, *filter(None, fresh.values())], key=lambda entry: entry["bucket"])

    # Counts: what is neither stored, nor conflicting, nor of forgotten users is a duplicate, perhaps found only now.
    counts, forgotten = dict(data.manifest.counts), sum(b.forgotten for b in built)
    counts["accepted"] = sum(entry["accepted"] for entry in files)
    if "label" in data.manifest.schema["columns"]:
        counts["conflicting"] = sum(entry.get("conflicting", 0) for entry in files)
    if forgotten:
        before = counts["rejected"].get(Reason.FORGOTTEN_USER, 0)
        counts["rejected"] = counts["rejected"] | {Reason.FORGOTTEN_USER.value: before + forgotten}
    others = counts["accepted"] + counts.get("conflicting", 0) + sum(counts["rejected"].values())
    counts["duplicate"] = counts["read"] - others

    # Index: new places for users of the rewritten buckets; users keep their order.
    places = [read_table(Store(staging), f"places-{bucket:05d}.parquet") for bucket in fresh]
    before = data.index_table().with_row_index("user_row")
    stays = before.filter(~pl.col("bucket").is_in(list(fresh))).drop("user_row")
    found = pl.concat([stays, *places]).join(before.select("user_id", "user_row"), on="user_id").sort("user_row")
    index = found.drop("user_row")
    return dataclasses.replace(
        data.manifest, number=data.manifest.number + 1, parent=data.manifest.fingerprint, counts=counts, files=files,
        users=index.height, index=write_index(index, path=data.path),
    )  # fmt: skip


def _regrouped(groups: Iterable[UserRows], *, limit: int) -> Iterator[UserRows]:
    """The same users in the same order, divided into groups of at most `limit` events. Two groups are in memory at a
    time."""
    rest: UserRows | None = None
    for group in groups:
        rows = UserRows.concat([rest, group]) if rest else group
        *full, (first, last) = itertools.pairwise(runs(rows.lengths, limit).tolist())
        yield from (rows.slice(*run) for run in full)
        rest = rows.slice(first, last)
    if rest is not None:
        yield rest
