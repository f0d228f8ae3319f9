"""How many requests each user has in each part: with it, order.py deals users to batches without reading a shard.

Cached as `<shards>/requests/<fingerprint>.parquet` for (manifest, the fields of RequestConfig that affect counts). The
file can be recomputed at any time, so it is not part of the manifest. Where the task uses the log's labels, each user's
positives and other events are counted too.
"""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.batches.requests import PARTS, RequestConfig, carried, list_requests, of_part, too_short
from pipeline.batches.sampling import evaluated
from pipeline.events import DataError
from pipeline.shards.dataset import Shards
from pipeline.storage import Store

_COLUMNS = ("requests", "candidates", "largest", "events", "skipped")
_LABELS = ("positives", "only_shown")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PartCounts:
    """One part's requests, per user row."""

    requests: np.ndarray
    """[users] int64, before max_requests."""
    candidates: np.ndarray
    """[users] int64: candidates of all the user's requests, without drawn negatives."""
    largest: np.ndarray
    """[users] int64: candidates of the user's largest request."""
    events: np.ndarray
    """[users] int64: events that a batch holds of the user."""
    skipped: np.ndarray
    """[users] int64: requests left out because their history is shorter than min_history."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LabelCounts:
    """Events by label, per user row."""

    positives: np.ndarray
    """[users] int64: events with a positive label."""
    only_shown: np.ndarray
    """[users] int64: the other events."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RequestCounts:
    """The counts of all parts, and of events by label."""

    train: PartCounts
    valid: PartCounts
    test: PartCounts
    labels: LabelCounts | None
    """None where the task does not use labels, or the log has none."""


def request_counts(data: Shards, config: RequestConfig) -> RequestCounts:
    """The cached counts; if there is no cache, counts in this process (build.index_requests counts with Ray)."""
    cached = load(data, config)
    if cached is not None:
        return cached
    parts = [_count(data, bucket, config) for bucket in data.buckets]
    return _save(data, config, parts)


def load(data: Shards, config: RequestConfig) -> RequestCounts | None:
    """The cached counts; None if there are none, or the file is damaged."""
    columns = _cached(data, config)
    # A version that did not count labels left the file.
    return None if columns is None or (uses_labels(data, config) and _LABELS[0] not in columns) else _counts(columns)


def part_counts(data: Shards, config: RequestConfig, part: str) -> PartCounts:
    """The counts of one part alone: a third of the memory."""
    columns = _cached(data, config, [f"{part}_{name}" for name in _COLUMNS])
    return getattr(request_counts(data, config), part) if columns is None else _of_part(columns, part)


def _cached(data: Shards, config: RequestConfig, columns: list[str] | None = None) -> dict[str, np.ndarray] | None:
    """These columns of the cache, by default all; None if there is none, or the file is damaged."""
    check_log(data, config)
    store, name = Store(data.path), _name(data, config)
    if not store.exists(name):
        return None
    try:
        table = pq.read_table(io.BytesIO(store.read(name)), columns=columns)
    except (OSError, pa.ArrowException):
        return None
    return {column: np.asarray(table[column]) for column in table.column_names}


def check_log(data: Shards, config: RequestConfig) -> None:
    """DataError where the log lacks a column that the task or split needs."""
    columns = data.manifest.schema["columns"]
    if config.split == "temporal" and "timestamp" not in columns:
        raise DataError(f"{data.path}: requests.split is temporal but the log has no timestamps; use leave_one_out")
    if config.task == "impressions" and "label" not in columns:
        raise DataError(f"{data.path}: requests.task is impressions but the log has no labels; map a label column")
    if config.task == "impressions" and not {"request_id", "timestamp"} & set(columns):
        raise DataError(f"{data.path}: sessions need timestamps, which the log lacks; map request_id")


def leaves_out(data: Shards, config: RequestConfig) -> bool:
    """Whether the task reads only some of this log's events: it is next_item, and others were only shown."""
    return data.manifest.has_labels and config.least_label > 0


def uses_labels(data: Shards, config: RequestConfig) -> bool:
    """Whether the labels of this log matter to the task."""
    return data.manifest.has_labels and (config.task == "impressions" or config.least_label > 0)


def settings_on(data: Shards, config: RequestConfig) -> dict[str, Any]:
    """The settings that determine requests from this log, to be compared with those of another time.

    `min_label` is among them only where it leaves events out: without it they equal those stored before it existed.
    """
    settings = dataclasses.asdict(config)
    del settings["min_label"]
    return settings | ({"min_label": config.least_label} if leaves_out(data, config) else {})


def count_bucket(data: Shards, bucket: int, *, config: RequestConfig, staging: str) -> None:
    """Count a bucket's users into a file of the staging directory."""
    sink = io.BytesIO()
    pq.write_table(pa.table(_count(data, bucket, config)), sink)
    Store(staging).write(f"requests-{bucket:05d}.parquet", sink.getvalue(), durable=False)


def assemble(data: Shards, config: RequestConfig, *, staging: str) -> RequestCounts:
    """Join the files that count_bucket wrote for every bucket, cache the counts and return them."""
    parts = []
    for bucket in data.buckets:
        table = pq.read_table(io.BytesIO(Store(staging).read(f"requests-{bucket:05d}.parquet")))
        parts.append({column: np.asarray(table[column]) for column in table.column_names})
    return _save(data, config, parts)


def _count(data: Shards, bucket: int, config: RequestConfig) -> dict[str, np.ndarray]:
    """{column: [users of the bucket]} in the order of groups and rows."""
    counted = []
    for group in data.groups_of(bucket):
        whole = data.read(group)
        events = whole.with_labels_from(config.least_label)
        every = list_requests(events, config)
        short = every.take(too_short(every, config))
        columns: dict[str, np.ndarray] = {}
        if uses_labels(data, config):
            positives = np.diff(whole.with_labels_from(config.least_label or 1).offsets)
            columns |= {"positives": positives, "only_shown": np.diff(whole.offsets) - positives}
        for part in PARTS:
            chosen = of_part(every, part, config)
            chosen = chosen if part == "train" else evaluated(chosen, config=config)
            start, last = carried(chosen, num_users=events.num_users, part=part, config=config)
            sizes = np.diff(chosen.offsets)
            largest = np.zeros(events.num_users, np.int64)
            np.maximum.at(largest, chosen.user, sizes)
            values = (
                np.bincount(chosen.user, minlength=events.num_users),
                np.bincount(chosen.user, weights=sizes, minlength=events.num_users).astype(np.int64),
                largest,
                last - start,
                np.bincount(short.user[short.part == PARTS.index(part)], minlength=events.num_users),
            )
            columns |= {f"{part}_{name}": value for name, value in zip(_COLUMNS, values, strict=True)}
        counted.append(columns)
    return {name: np.concatenate([columns[name] for columns in counted]) for name in counted[0]}


def _save(data: Shards, config: RequestConfig, parts: list[dict[str, np.ndarray]]) -> RequestCounts:
    index = data.index
    # Buckets list users by (group, row); the index lists them by user row.
    stored = np.lexsort((index.row, index.group))
    columns = {}
    for name in parts[0]:
        values = np.empty(len(stored), np.int64)
        values[stored] = np.concatenate([part[name] for part in parts])
        columns[name] = values
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    Store(data.path).write(_name(data, config), sink.getvalue())
    return _counts(columns)


def _of_part(columns: dict[str, np.ndarray], part: str) -> PartCounts:
    return PartCounts(**{name: columns[f"{part}_{name}"] for name in _COLUMNS})


def _counts(columns: dict[str, np.ndarray]) -> RequestCounts:
    parts = {part: _of_part(columns, part) for part in PARTS}
    labels = LabelCounts(**{name: columns[name] for name in _LABELS}) if {*_LABELS} <= {*columns} else None
    return RequestCounts(**parts, labels=labels)


def _name(data: Shards, config: RequestConfig) -> str:
    read = f"-label{config.least_label}" if leaves_out(data, config) else ""
    return f"requests/{data.manifest.fingerprint[:16]}-{config.counting_fingerprint}{read}.parquet"
