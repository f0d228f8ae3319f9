"""Rewriting what is there: a bucket's files as one (compact), and a data set of the previous format (migrate).

    compact_bucket   a bucket's files -> one file; events that stood twice are counted as duplicates   (a task a bucket)
    index_bucket     a bucket of format 1 -> the keys of its file                                      (a task a bucket)
    finish, migrated counts, index, manifest                                                           (driver)

Users keep their rows; what a reader gets is the same before and after.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from typing import Any

import polars as pl
import pyarrow as pa

from pipeline.event_keys import EventKeys, write_keys
from pipeline.events import DataError
from pipeline.manifest import FORMAT_VERSION, Manifest, fingerprint_of, manifest_name, manifest_numbers
from pipeline.rows import UserRows, runs
from pipeline.shard_writer import write_index, write_shard
from pipeline.shards import Shards
from pipeline.staged import read_table, write_table
from pipeline.storage import Store
from pipeline.user_columns import PREFIX


def crowded(data: Shards, *, max_deltas: int) -> list[int]:
    """Buckets that have more files over their first one than that."""
    return [bucket for bucket in data.buckets if len(data.files_of(bucket)) - 1 > max_deltas]


def compact_bucket(row: dict[str, Any], *, data: Shards, staging: str) -> dict[str, Any]:
    """Write the bucket as one file; bucket and the manifest's entry. Leaves the places of its users."""
    bucket, keys, places = row["bucket"], [], []

    def parts() -> Iterator[tuple[int, pa.Table]]:
        for group, rows in enumerate(_regrouped(data, bucket)):
            keys.append(EventKeys.of(rows))
            users = pl.DataFrame({"user_id": rows.user_id, "events": rows.lengths})
            places.append(users.with_columns(bucket=bucket, group=group, row=pl.int_range(pl.len())))
            yield group, rows.to_table()

    entry = write_shard(parts(), path=data.path, bucket=bucket)
    entry |= {"accepted": entry["events"], "unchecked": 0, "keys": write_keys(keys, path=data.path, bucket=bucket)}
    write_table(Store(staging), f"places-{bucket:05d}.parquet", pl.concat(places))
    return {"bucket": bucket, "file": entry}


def finish(built: list[dict[str, Any]], *, data: Shards, staging: str) -> Manifest:
    """Describe the data set with these buckets rewritten; the caller commits it."""
    fresh = {b["bucket"]: b["file"] for b in built}
    files = [file for file in data.manifest.files if file["bucket"] not in fresh]
    files = sorted([*files, *fresh.values()], key=lambda entry: entry["bucket"])
    repeated = sum(entry["accepted"] for entry in data.manifest.files) - sum(entry["accepted"] for entry in files)
    counts = data.manifest.counts
    counts = counts | {"accepted": counts["accepted"] - repeated, "duplicate": counts["duplicate"] + repeated}
    moved = [read_table(Store(staging), f"places-{bucket:05d}.parquet") for bucket in fresh]
    before = data.index_table()
    after = before.select("user_id").join(pl.concat(moved), on="user_id", how="left", maintain_order="left")
    columns = [pl.coalesce(after[name], before[name]).alias(name) for name in before.columns if name != "user_id"]
    index = before.select("user_id", *columns)
    return dataclasses.replace(
        data.manifest, number=data.manifest.number + 1, parent=data.manifest.fingerprint, counts=counts, files=files,
        index=write_index(index, path=data.path),
    )  # fmt: skip


def open_version_1(path: str) -> tuple[Shards, str]:
    """A data set whose latest manifest has format version 1, without keys yet, and that manifest's fingerprint.

    DataError where there is none, or one of another version.
    """
    store = Store(path)
    numbers = manifest_numbers(store)
    content = store.read(manifest_name(numbers[-1])) if numbers else b"{}"
    fields = json.loads(content)
    if (version := fields.get("format_version")) != 1:
        found = "no prepared data set" if version is None else f"a data set of format version {version}"
        raise DataError(f"{path}: {found} there; `solar migrate` makes version {FORMAT_VERSION} of version 1")
    files = [
        {k: v for k, v in file.items() if k != "row_groups"}
        | {"groups": list(range(file["row_groups"])), "accepted": file["events"], "unchecked": 0}
        for file in fields["files"]
    ]
    # None: how a file's ends looked was not kept; the whole file is compared instead.
    inputs = [entry | {"edges": None} for entry in fields["inputs"]]
    manifest = Manifest(**fields | {"files": files, "inputs": inputs, "format_version": FORMAT_VERSION})
    return Shards(path, manifest), fingerprint_of(content)


def index_bucket(row: dict[str, Any], *, data: Shards) -> dict[str, Any]:
    """Write the keys of the bucket's one file; bucket and their entry."""
    keys = [EventKeys.of(UserRows.from_table(data.read_table(group))) for group in data.groups_of(row["bucket"])]
    return {"bucket": row["bucket"], "keys": write_keys(keys, path=data.path, bucket=row["bucket"])}


def migrated(built: list[dict[str, Any]], *, data: Shards, parent: str) -> Manifest:
    """Describe the data set in the present format; the caller commits it. `parent`: fingerprint of the old manifest."""
    keys = {b["bucket"]: b["keys"] for b in built}
    files = [file | {"keys": keys[file["bucket"]]} for file in data.manifest.files]
    old = data.index_table()
    bucket = pl.Series([file["bucket"] for file in files], dtype=pl.Int64)
    index = old.select("user_id", "row", "events", group="row_group", bucket=bucket.gather(old["file"]))
    return dataclasses.replace(
        data.manifest, number=data.manifest.number + 1, parent=parent, files=files,
        index=write_index(index, path=data.path),
    )  # fmt: skip


def _regrouped(data: Shards, bucket: int) -> Iterator[UserRows]:
    """The bucket's users in their order, cut into groups anew; two groups are in memory at a time."""
    limit = data.manifest.config["row_group_events"]
    rest: UserRows | None = None
    for group in data.groups_of(bucket):
        rows = UserRows.from_table(data.read_table(group))
        rows = rows.with_values([f"{PREFIX}{name}" for name in data.user_features])
        rows = UserRows.concat([rest, rows]) if rest else rows
        *full, (first, last) = itertools.pairwise(runs(rows.lengths, limit).tolist())
        yield from (rows.slice(*run) for run in full)
        rest = rows.slice(first, last)
    assert rest is not None, "a bucket has users"
    yield rest
