"""Sequence shards: Parquet files for buckets of users, one row per user, and the index that finds them.

    manifests/00000002.json            the commit (manifest.py)
    shards/bucket-00003-<hash>.parquet user_id, then one large list per user for each of item, timestamp, order, action,
                                       ...; and a list of value rows for each user feature, "user:<feature>"
    keys/bucket-00003-<hash>.parquet   which events that file has (event_keys.py)
    index/<hash>.parquet               user row -> bucket, group, row, events, user_id
    vocabulary/<hash>.parquet          items and features (vocabulary.py)

A bucket's users are divided into groups; a group is the unit of reading. The bucket's first file has one row group per
group; later files hold what was added since, and readers merge it in (layers.py). File names contain a hash of the
content, and files never change. Readers check size and checksum once per process before use. Files that no manifest
names are garbage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import operator
import shlex
import threading
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.events import DataError
from pipeline.hashing import hash_text
from pipeline.shards.layers import lay_over, with_columns
from pipeline.shards.manifest import Manifest, current_manifest, read_manifest, why_removed
from pipeline.shards.rows import ROW, event_columns, event_lengths, to_arrow
from pipeline.shards.sequences import UserEvents, offsets_of
from pipeline.shards.user_columns import decode_values, read_codes
from pipeline.shards.vocabulary import Vocabulary
from pipeline.storage import Store

_checked: set[tuple[str, str]] = set()
_checking = threading.Lock()
_NO_USERS = pl.DataFrame(schema={"user_id": pl.Int64, "group": pl.Int64, "row": pl.Int64})


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """Where each user is stored. The user row is the position in these arrays; it changes only when users before it
    are forgotten."""

    bucket: np.ndarray
    """[users] int64."""
    group: np.ndarray
    """[users] int64: the user's group, counted over all buckets."""
    row: np.ndarray
    """[users] int64: row within the group."""
    events: np.ndarray
    """[users] int64: length of the user's sequence; an upper bound until compaction has removed unchecked repeats."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Bucket:
    """The files of a bucket, oldest first."""

    files: list[dict[str, Any]]
    first_group: int
    """Number of the bucket's first group, counted over all buckets."""

    @property
    def num_groups(self) -> int:
        return 1 + max(max(file["groups"]) for file in self.files)

    @property
    def has_repeats(self) -> bool:
        """Whether the same event may be in more than one file."""
        return any(file["events"] > file["accepted"] or file["unchecked"] for file in self.files)


class Shards:
    """A committed data set, open for reading."""

    def __init__(self, path: str, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._store = Store(path)
        self._buckets: dict[int, _Bucket] = {}
        first_group = 0
        for number, files in itertools.groupby(manifest.files, key=operator.itemgetter("bucket")):
            self._buckets[number] = bucket = _Bucket(files=list(files), first_group=first_group)
            first_group += bucket.num_groups
        self.num_groups = first_group
        """Groups of all buckets."""

    @classmethod
    def open(cls, path: str, *, number: int | None = None) -> Shards:
        """The current state, or the one with this number. DataError when there is none."""
        manifest = current_manifest(path) if number is None else read_manifest(path, number=number)
        if manifest is None:
            raise DataError(
                f"{path}: no prepared data set there; run `solar prepare --events ... --out {shlex.quote(path)}`"
            )
        return cls(path, manifest)

    def __reduce__(self):
        return type(self), (self.path, self.manifest)

    @property
    def user_features(self) -> list[str]:
        """Sorted names; a user's codes are in this order."""
        return self.manifest.schema.get("user_features", [])

    @property
    def buckets(self) -> list[int]:
        """The buckets that have users, ascending."""
        return list(self._buckets)

    def files_of(self, bucket: int) -> list[dict[str, Any]]:
        """The manifest's entries of a bucket, oldest first; none for a bucket without users."""
        return self._buckets[bucket].files if bucket in self._buckets else []

    def has_repeats(self, bucket: int) -> bool:
        """Whether the same event may be in more than one file of the bucket."""
        return self._buckets[bucket].has_repeats

    def groups_of(self, bucket: int) -> range:
        """The bucket's groups, counted over all buckets."""
        found = self._buckets[bucket]
        return range(found.first_group, found.first_group + found.num_groups)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        name = self.manifest.vocabulary["name"]
        return Vocabulary.from_bytes(self._read(self.manifest.vocabulary), name=f"{self.path}/{name}")

    @functools.cached_property
    def index(self) -> Index:
        table = self.index_table("bucket", "group", "row", "events")
        bucket, group, row, events = (table[name].to_numpy() for name in ("bucket", "group", "row", "events"))
        first = np.zeros(max(self._buckets, default=-1) + 1, np.int64)
        first[self.buckets] = [found.first_group for found in self._buckets.values()]
        return Index(bucket=bucket, group=first[bucket] + group, row=row, events=events)

    @functools.cached_property
    def user_ids(self) -> pa.Array:
        """[users] raw ids, in the order of `index`."""
        return to_arrow(self.index_table("user_id")["user_id"])

    def index_table(self, *columns: str) -> pl.DataFrame:
        """user_id, bucket, group (counted within the bucket), row, events, or only these columns: one line per user, in
        user-row order."""
        content = io.BytesIO(self._read(self.manifest.index))
        return pl.DataFrame(pq.read_table(content, columns=list(columns) or None))

    def read_table(self, group: int) -> pa.Table:
        """A group's users, one row each, merged from all files of their bucket. `group` counts over all buckets."""
        bucket = next(found for found in reversed(self._buckets.values()) if found.first_group <= group)
        here = group - bucket.first_group
        found = [(file, file["groups"].index(here)) for file in bucket.files if here in file["groups"]]
        first, *later = (self._read_part(file, row_group) for file, row_group in found)
        if later:
            return lay_over(first, later, vocabulary=self.vocabulary, distinct=bucket.has_repeats)
        return first.drop_columns([ROW]) if ROW in first.column_names else first

    def tables_of(self, entry: dict[str, Any]) -> Iterator[pa.Table]:
        """The row groups of one shard file, not merged with those of its bucket's other files."""
        return (self._read_part(entry, row_group) for row_group in range(len(entry["groups"])))

    @contextlib.contextmanager
    def part_of(self, entry: dict[str, Any]) -> Iterator[pq.ParquetFile]:
        """A Parquet file of the manifest, for reading a small part: checks only the pages that are read, not the whole.

        DataError names the file when it is damaged.
        """
        if problem := self._wrong_size(entry):
            raise self._damaged(problem)
        try:
            with (
                self._store.open(entry["name"]) as stream,
                pq.ParquetFile(stream, pre_buffer=False, page_checksum_verification=True) as parquet,
            ):
                yield parquet
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(f"{entry['name']} is damaged ({' '.join(str(error).split())[:120]})") from error

    def read(self, group: int, *, min_label: int = 0) -> UserEvents:
        """The sequences of one row group, in row order; of a log with labels only the events with at least this label.

        What the task reads (`RequestConfig.least_label`) is chosen here, before any position or count is computed.
        """
        table = self.read_table(group)
        flat = _flat_events(table)
        item = np.asarray(flat["item"])
        zeros = np.zeros(len(item), np.int64)
        time = np.asarray(flat["timestamp"]) if "timestamp" in flat else zeros
        request = None
        if "request_id" in flat:
            codes = flat["request_id"].dictionary_encode().indices
            request = np.asarray(pc.fill_null(codes, -1)).astype(np.int64)  # type: ignore[attr-defined]
        events = UserEvents(
            offsets=offsets_of(event_lengths(table)),
            item=item,
            time=time,
            before=time if "timestamp" in flat else np.asarray(flat["order"]),
            action=np.asarray(flat["action"]).astype(np.int64) if "action" in flat else zeros,
            label=np.asarray(flat["label"]).astype(np.float32) if "label" in flat else None,
            request=request,
            codes=read_codes(table, self.user_features) if self.user_features else None,
        )
        return events.with_labels_from(min_label)

    def raw_user_values(self, groups: range) -> pl.DataFrame:
        """user_id and a list of raw values for each user feature: one row per user, in row order."""
        tables = map(self.read_table, groups)
        return pl.concat([decode_values(table, self.vocabulary, self.user_features) for table in tables])

    def users_of(self, bucket: int) -> pl.DataFrame:
        """user_id, group (counted within the bucket) and row of a bucket's users; empty if there are none."""
        found, seen = [_NO_USERS.with_columns(pl.col("user_id").cast(self._user_type))], -1
        for file in self.files_of(bucket):
            with self.part_of(file) as parquet:
                # The first file with a group is the one that added its users.
                for row_group, group in enumerate(file["groups"]):
                    if group > seen:
                        ids = pl.Series("user_id", parquet.read_row_group(row_group, columns=["user_id"])["user_id"])
                        rows = pl.DataFrame({"user_id": ids, "group": np.int64(group), "row": np.arange(len(ids))})
                        found.append(rows)
            seen = max(seen, *file["groups"])
        return pl.concat(found)

    def raw_events(self, groups: range) -> pl.DataFrame:
        """The events of row groups with raw ids, as validation produced them: one row per event, users in row order."""
        frames = [_explode(self.read_table(group), self.vocabulary) for group in groups]
        return pl.concat(frames)

    def check(self, entry: dict) -> None:
        """DataError, naming the file, unless size and checksum are the manifest's; checks a file once per process."""
        key = (self.path, entry["name"])
        with _checking:
            if key in _checked:
                return
        if problem := self.problem_with(entry):
            raise self._damaged(problem)
        with _checking:
            _checked.add(key)

    def problem_with(self, entry: dict) -> str | None:
        """What is wrong with a file of the manifest; None if nothing is. Always reads the whole file."""
        if problem := self._wrong_size(entry):
            return problem
        name = entry["name"]
        try:
            same = self._store.checksum(name) == entry["checksum"]
        except FileNotFoundError:
            return f"{name} is missing"
        return None if same else f"{name} is damaged (checksum differs)"

    def _wrong_size(self, entry: dict) -> str | None:
        name = entry["name"]
        try:
            size = self._store.size(name)
        except FileNotFoundError:
            return f"{name} is missing"
        return None if size == entry["bytes"] else f"{name} has {size} bytes instead of {entry['bytes']}"

    def _damaged(self, problem: str) -> DataError:
        if why := why_removed(self.path, number=self.manifest.number):
            return DataError(f"{self.path}: manifest {self.manifest.number} was removed: {why}")
        return DataError(f"{self.path}: {problem}; restore the file or prepare again into a new directory")

    @property
    def _user_type(self) -> pl.DataType:
        return pl.Int64() if self.manifest.schema["id_types"]["user_id"] == "int64" else pl.String()

    def _read_part(self, entry: dict[str, Any], row_group: int) -> pa.Table:
        with self._opened(entry) as stream:
            table = pq.ParquetFile(stream, pre_buffer=True).read_row_group(row_group)
        return with_columns(table, self.manifest.schema)

    def _read(self, entry: dict[str, Any]) -> bytes:
        with self._opened(entry) as stream:
            return stream.read()

    @contextlib.contextmanager
    def _opened(self, entry: dict[str, Any]) -> Iterator[IO[Any]]:
        self.check(entry)
        try:
            with self._store.open(entry["name"]) as stream:
                yield stream
        except FileNotFoundError as error:
            # In an object store a file may vanish while it is read.
            raise self._damaged(f"{entry['name']} is missing") from error


def bucket_of(user_ids: pl.Series, *, buckets: int) -> pl.Series:
    """[n] Int64: xxh64 (seed 0) of the id's decimal or string form, modulo the number of buckets."""
    return pl.Series((hash_text(user_ids) % np.uint64(buckets)).astype(np.int64))


def _flat_events(table: pa.Table) -> dict[str, pa.Array]:
    return {name: table[name].combine_chunks().flatten() for name in event_columns(table)}


def _explode(table: pa.Table, vocabulary: Vocabulary) -> pl.DataFrame:
    flat = _flat_events(table)
    users = np.repeat(np.arange(table.num_rows), event_lengths(table))
    columns: dict = {"user_id": table["user_id"].combine_chunks().take(pa.array(users))}
    columns["item_id"] = vocabulary.raw(np.asarray(flat["item"]))
    for name in ("timestamp", "order", "action", "label", "request_id"):
        if name == "action" and name in flat:
            names = pa.array([None, *vocabulary.actions[1:]], pa.large_string())
            columns[name] = names.take(flat[name])
        elif name in flat:
            columns[name] = flat[name]
    return pl.DataFrame(columns)
