"""Sequence shards: one Parquet file a bucket of users, one row a user, and the index that finds them.

    manifests/00000002.json            the commit (manifest.py)
    shards/bucket-00003-<hash>.parquet user_id, then one large list a user of item, timestamp, order, action, ...; and
                                       of value rows for each user feature, "user:<feature>"
    index/<hash>.parquet               user row -> file, row group, row, events, user_id
    vocabulary/<hash>.parquet          items and features (vocabulary.py)

Files carry a hash of their content in the name and never change. Readers check size and checksum once per process
before use. What no manifest names is garbage.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import threading

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from pipeline.events import DataError
from pipeline.manifest import Manifest, current_manifest, read_manifest
from pipeline.sequences import UserEvents, offsets_of
from pipeline.storage import Store
from pipeline.user_columns import PREFIX, decode_values, encode_values, read_codes
from pipeline.vocabulary import Vocabulary

__all__ = ["Index", "Shards", "bucket_of", "current_manifest", "write_index", "write_shard", "write_vocabulary"]

_checked: set[tuple[str, str]] = set()
_checking = threading.Lock()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """Where each user stands. A user's row is its place here; it never moves within a data set."""

    file: np.ndarray
    """[users] int64: place in manifest.files."""
    row_group: np.ndarray
    """[users] int64: row group of the file."""
    row: np.ndarray
    """[users] int64: row of the row group."""
    events: np.ndarray
    """[users] int64: length of the user's sequence."""
    group: np.ndarray
    """[users] int64: the row group, counted over all files."""
    user_id: pa.Array
    """[users] raw ids."""


class Shards:
    """A committed data set, open for reading."""

    def __init__(self, path: str, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._store = Store(path)
        self._group_file = np.repeat(np.arange(len(manifest.files)), [f["row_groups"] for f in manifest.files])
        self._first_group = offsets_of(np.array([f["row_groups"] for f in manifest.files], np.int64))

    @classmethod
    def open(cls, path: str, *, number: int | None = None) -> Shards:
        """The current state, or a certain one. DataError when there is none."""
        manifest = current_manifest(path) if number is None else read_manifest(path, number=number)
        if manifest is None:
            raise DataError(f"{path}: no prepared data set there; run `solar prepare --events ... --out {path}`")
        return cls(path, manifest)

    def __reduce__(self):
        return type(self), (self.path, self.manifest)

    @property
    def user_features(self) -> list[str]:
        """Names, sorted: the order of the codes of a user."""
        return self.manifest.schema.get("user_features", [])

    @property
    def num_groups(self) -> int:
        """Row groups over all files."""
        return len(self._group_file)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        name = self.manifest.vocabulary["name"]
        return Vocabulary.from_bytes(self._read(self.manifest.vocabulary), name=f"{self.path}/{name}")

    @functools.cached_property
    def index(self) -> Index:
        table = pq.read_table(io.BytesIO(self._read(self.manifest.index)))
        file, row_group, row, events = (np.asarray(table[c]) for c in ("file", "row_group", "row", "events"))
        return Index(
            file=file,
            row_group=row_group,
            row=row,
            events=events,
            group=self._first_group[file] + row_group,
            user_id=table["user_id"].combine_chunks(),
        )

    def read_table(self, group: int) -> pa.Table:
        """One row group as it is stored; group counts over all files."""
        file = int(self._group_file[group])
        entry = self.manifest.files[file]
        self.check(entry)
        with self._store.open(entry["name"]) as stream:
            return pq.ParquetFile(stream, pre_buffer=True).read_row_group(group - int(self._first_group[file]))

    def read(self, group: int) -> UserEvents:
        """The sequences of one row group, in row order."""
        table = self.read_table(group)
        lists = table["item"].combine_chunks()
        flat = _flat_events(table)
        item = np.asarray(flat["item"])
        zeros = np.zeros(len(item), np.int64)
        time = np.asarray(flat["timestamp"]) if "timestamp" in flat else zeros
        request = None
        if "request_id" in flat:
            codes = flat["request_id"].dictionary_encode().indices
            request = np.asarray(pc.fill_null(codes, -1)).astype(np.int64)  # type: ignore[attr-defined]
        return UserEvents(
            offsets=offsets_of(np.asarray(pc.list_value_length(lists))),  # type: ignore[attr-defined]
            item=item,
            time=time,
            before=time if "timestamp" in flat else np.asarray(flat["order"]),
            action=np.asarray(flat["action"]).astype(np.int64) if "action" in flat else zeros,
            label=np.asarray(flat["label"]).astype(np.float32) if "label" in flat else None,
            request=request,
            codes=read_codes(table, self.user_features) if self.user_features else None,
        )

    def raw_user_values(self, groups: range) -> pl.DataFrame:
        """user_id and a list of raw values for each user feature, one row a user in row order."""
        tables = map(self.read_table, groups)
        return pl.concat([decode_values(table, self.vocabulary, self.user_features) for table in tables])

    def user_ids(self, file: int) -> pa.Array:
        """The users of a shard file, in row order."""
        entry = self.manifest.files[file]
        self.check(entry)
        with self._store.open(entry["name"]) as stream:
            return pq.ParquetFile(stream).read(columns=["user_id"])["user_id"].combine_chunks()

    def raw_events(self, groups: range) -> pl.DataFrame:
        """The events of row groups with raw ids, as validation made them: one row an event, users in row order."""
        frames = [_explode(self.read_table(group), self.vocabulary) for group in groups]
        return pl.concat(frames)

    def groups_of_file(self, file: int) -> range:
        return range(int(self._first_group[file]), int(self._first_group[file + 1]))

    def check(self, entry: dict) -> None:
        """DataError that names the file unless its size and checksum are the manifest's; once per process and file."""
        key = (self.path, entry["name"])
        with _checking:
            if key in _checked:
                return
        if problem := self.problem_with(entry):
            raise DataError(f"{self.path}: {problem}; restore the file or prepare again into a new directory")
        with _checking:
            _checked.add(key)

    def problem_with(self, entry: dict) -> str | None:
        """What is wrong with a file of the manifest, None when nothing is. Always reads it."""
        name = entry["name"]
        try:
            size = self._store.size(name)
        except FileNotFoundError:
            return f"{name} is missing"
        if size != entry["bytes"]:
            return f"{name} has {size} bytes instead of {entry['bytes']}"
        return None if self._store.checksum(name) == entry["checksum"] else f"{name} is damaged (checksum differs)"

    def _read(self, entry: dict) -> bytes:
        self.check(entry)
        return self._store.read(entry["name"])


def bucket_of(user_ids: pl.Series, *, buckets: int) -> pl.Series:
    """[n] Int64: xxh64 (seed 0) of the id's decimal or string form, modulo the number of buckets."""
    distinct = user_ids.unique()
    places = [xxhash.xxh64_intdigest(text.encode()) % buckets for text in distinct.cast(pl.String).to_list()]
    return user_ids.replace_strict(distinct, pl.Series(places, dtype=pl.Int64), return_dtype=pl.Int64)


def write_shard(
    events: pl.DataFrame,
    *,
    path: str,
    bucket: int,
    vocabulary: Vocabulary,
    row_group_events: int,
    user_values: pl.DataFrame | None = None,
) -> tuple[dict, pl.DataFrame]:
    """Write a bucket's sequences (raw ids, sorted by user and total order).

    `user_values` has user_id and a list of raw values for each user feature, users in the order of the events. Returns
    the manifest's entry and a table of user_id, row_group, row, events.
    """
    users = events.group_by("user_id", maintain_order=True).agg(pl.len().cast(pl.Int64).alias("events"))
    lengths = users["events"].to_numpy()
    starts = _row_group_starts(lengths, row_group_events)
    offsets = offsets_of(lengths)
    flat = _encode(events, vocabulary)
    known = encode_values(user_values, vocabulary) if user_values is not None else {}
    id_column = to_arrow(users["user_id"])
    store = Store(path)
    with store.scratch() as scratch:
        local = f"{scratch}/shard.parquet"
        schema = pa.schema([("user_id", id_column.type), *((n, pa.large_list(a.type)) for n, a in flat.items())])
        for name, lists in known.items():
            schema = schema.append(pa.field(name, lists.type))
        with pq.ParquetWriter(local, schema, compression="zstd", write_statistics=False) as writer:
            for first, last in itertools.pairwise(starts):
                bounds = pa.array(offsets[first : last + 1] - offsets[first], pa.int64())
                part = slice(int(offsets[first]), int(offsets[last]))
                lists = [pa.LargeListArray.from_arrays(bounds, a[part]) for a in flat.values()]
                lists += [values[int(first) : int(last)] for values in known.values()]
                table = pa.table([id_column[int(first) : int(last)], *lists], schema=schema)
                writer.write_table(table, row_group_size=max(1, len(table)))
        entry = _adopt(store, local, f"shards/bucket-{bucket:05d}-")
    row_group = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    entry |= {"bucket": bucket, "rows": users.height, "row_groups": len(starts) - 1, "events": events.height}
    places = users.with_columns(row_group=row_group, row=np.arange(users.height) - starts[row_group])
    return entry, places


def write_vocabulary(vocabulary: Vocabulary, *, path: str) -> dict:
    """The manifest's entry."""
    return _write_bytes(path, vocabulary.to_bytes(), "vocabulary/") | {"fingerprint": vocabulary.fingerprint}


def write_index(places: pl.DataFrame, *, path: str) -> dict:
    """Write user_id, file, row_group, row, events in user-row order; the manifest's entry."""
    table = places.select("user_id", *(pl.col(c).cast(pl.Int64) for c in ("file", "row_group", "row", "events")))
    sink = io.BytesIO()
    pq.write_table(table.to_arrow(compat_level=pl.CompatLevel.oldest()), sink, compression="zstd")
    return _write_bytes(path, sink.getvalue(), "index/")


def to_arrow(values: pl.Series) -> pa.Array:
    """Strings as large_string: the newer string views are not read everywhere."""
    return values.to_arrow(compat_level=pl.CompatLevel.oldest())


def _write_bytes(path: str, data: bytes, prefix: str) -> dict:
    store = Store(path)
    with store.scratch() as scratch:
        local = f"{scratch}/file"
        with open(local, "wb") as stream:
            stream.write(data)
        return _adopt(store, local, prefix)


def _adopt(store: Store, local: str, prefix: str) -> dict:
    scratch = Store(local.rpartition("/")[0])
    leaf = local.rpartition("/")[2]
    checksum, size = scratch.checksum(leaf), scratch.size(leaf)
    name = f"{prefix}{checksum[:16]}.parquet"
    store.adopt(local, name)
    return {"name": name, "bytes": size, "checksum": checksum}


def _row_group_starts(lengths: np.ndarray, limit: int) -> np.ndarray:
    """First user of each row group, and the end: the longest runs of users within `limit` events, never none."""
    ends = np.cumsum(lengths)
    starts = [0]
    while starts[-1] < len(lengths):
        done = ends[starts[-1] - 1] if starts[-1] else 0
        starts.append(max(starts[-1] + 1, int(np.searchsorted(ends, done + limit, side="right"))))
    return np.array(starts, np.int64)


def _encode(events: pl.DataFrame, vocabulary: Vocabulary) -> dict[str, pa.Array]:
    columns: dict[str, pa.Array] = {"item": pa.array(vocabulary.rows(events["item_id"]), pa.int64())}
    for name in ("timestamp", "order", "label", "request_id"):
        if name in events.columns:
            columns[name] = to_arrow(events[name])
    if "action" in events.columns:
        codes = {name: code for code, name in enumerate(vocabulary.actions)}
        code = events["action"].fill_null("").replace_strict(codes, return_dtype=pl.Int32)
        columns["action"] = to_arrow(code)
    return columns


def _flat_events(table: pa.Table) -> dict[str, pa.Array]:
    names = [name for name in table.column_names if name != "user_id" and not name.startswith(PREFIX)]
    return {name: table[name].combine_chunks().flatten() for name in names}


def _explode(table: pa.Table, vocabulary: Vocabulary) -> pl.DataFrame:
    flat = _flat_events(table)
    lengths = np.asarray(pc.list_value_length(table["item"].combine_chunks()))  # type: ignore[attr-defined]
    users = np.repeat(np.arange(table.num_rows), lengths)
    columns: dict = {"user_id": table["user_id"].combine_chunks().take(pa.array(users))}
    columns["item_id"] = vocabulary.raw(np.asarray(flat["item"]))
    for name in ("timestamp", "order", "action", "label", "request_id"):
        if name == "action" and name in flat:
            names = pa.array([None, *vocabulary.actions[1:]], pa.large_string())
            columns[name] = names.take(flat[name])
        elif name in flat:
            columns[name] = flat[name]
    return pl.DataFrame(columns)
