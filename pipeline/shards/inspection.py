"""Checks of a whole data set: whether it is undamaged (`verify`), and a hash of its content (`digest`)."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import xxhash

from pipeline.events import DataError
from pipeline.shards.dataset import Shards
from pipeline.shards.label_conflicts import conflicting_events, num_conflicting
from pipeline.shards.sequences import build_sequences
from pipeline.shards.vocabulary import NUM_RESERVED, Vocabulary

_ORDERED = ("timestamp", "order", "item", "action", "label", "request_id")


def verify(path: str, *, number: int | None = None) -> list[str]:
    """Every problem of a data set, one line each; empty when there is none.

    Reads every file again and checks sizes, checksums, the counts of the manifest, the index, and that sequences are
    sorted and without duplicates. DataError when there is no readable manifest.
    """
    data = Shards.open(path, number=number)
    manifest = data.manifest
    problems = [problem for entry in manifest.entries() if (problem := data.problem_with(entry))]
    if problems:
        return problems
    counts = manifest.counts
    known = counts["accepted"] + counts["duplicate"] + manifest.conflicting
    if counts["read"] != known + sum(counts["rejected"].values()):
        problems.append("manifest: accepted + duplicate + conflicting + rejected does not equal read")
    if data.vocabulary.fingerprint != manifest.vocabulary["fingerprint"]:
        problems.append(f"{manifest.vocabulary['name']}: its fingerprint differs from the manifest's")
    if len(data.index.events) != manifest.users:
        problems.append(f"{manifest.index['name']}: {len(data.index.events)} users instead of {manifest.users}")
    if sum(entry["accepted"] for entry in manifest.files) != counts["accepted"]:
        problems.append("manifest: the files' events do not add up to the accepted ones")
    if sum(entry.get("conflicting", 0) for entry in manifest.files) != manifest.conflicting:
        problems.append("manifest: the files' events with both labels do not add up to the conflicting ones")
    for bucket in data.buckets:
        problems += _problems_of_bucket(data, bucket)
    return problems


def digest(path: str, *, number: int | None = None) -> str:
    """Hexadecimal hash of a data set's content: sequences, user and item features in raw values, and its counts.

    It does not depend on the order of users, nor on how the log was split into ingests, as row numbers and files do.
    """
    data = Shards.open(path, number=number)
    total, accepted = 0, 0
    raw_items = data.vocabulary.raw(np.arange(data.vocabulary.size)).cast(pa.large_string())
    item_hash = _hash_each(raw_items.fill_null("").to_pylist())
    action_hash = _hash_each(data.vocabulary.actions)
    for group in range(data.num_groups):
        table = data.read_table(group)
        lists = {c: table[c].combine_chunks() for c in _ORDERED if c in table.column_names}
        offsets = np.asarray(next(iter(lists.values())).offsets)
        columns = [_hashable(name, column.values, item_hash, action_hash) for name, column in lists.items()]
        users = table["user_id"].cast(pa.large_string()).to_pylist()
        known = [""] * len(users)
        if data.user_features:
            values = data.raw_user_values(range(group, group + 1)).select(pl.struct(data.user_features).alias("known"))
            known = values["known"].struct.json_encode().to_list()
        for user, values, start, end in zip(users, known, offsets[:-1], offsets[1:], strict=True):
            state = xxhash.xxh3_128(user.encode() + values.encode())
            for column in columns:
                state.update(column[start:end].tobytes())
            total = (total + state.intdigest()) % (1 << 128)
        accepted += int(offsets[-1])
    # Repeats of old events count as accepted until the next compaction, but readers see each event once.
    counts, conflicting = data.manifest.counts, sum(num_conflicting(data, bucket) for bucket in data.buckets)
    others = accepted + conflicting + sum(counts["rejected"].values())
    counted = {"read": counts["read"], "rejected": counts["rejected"]}
    counted |= {"accepted": accepted, "duplicate": counts["read"] - others}
    # Where no labels differ, the digest is that of earlier versions, which did not count them.
    counted |= {"conflicting": conflicting} if conflicting else {}
    features = {"items": _hash_of_features(data.vocabulary)} if data.vocabulary.features else {}
    content = features | {"sequences": f"{total:032x}", "counts": counted, "columns": data.manifest.schema["columns"]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _hash_of_features(vocabulary: Vocabulary) -> str:
    """Of the features of all items that have any, in any order."""
    columns: dict[str, Any] = {"id": vocabulary.items.cast(pa.large_string())}
    for name, feature in sorted(vocabulary.features.items()):
        values = pa.array(feature.names, pa.large_string()).take(pa.array(feature.values - NUM_RESERVED))
        offsets = pa.array(feature.offsets[NUM_RESERVED:])
        columns[name] = pa.LargeListArray.from_arrays(offsets, values)
    has_any = ~vocabulary.is_featureless[NUM_RESERVED:]
    known = pl.DataFrame({f"{place}": column for place, column in enumerate(columns.values())}).filter(has_any)
    texts = known.select(pl.struct(pl.all()).struct.json_encode()).to_series()
    total = sum(xxhash.xxh3_128_intdigest(text.encode()) for text in texts) % (1 << 128)
    return hashlib.sha256(json.dumps([sorted(vocabulary.features), f"{total:032x}"]).encode()).hexdigest()


def _problems_of_bucket(data: Shards, bucket: int) -> list[str]:
    files, index, groups = data.files_of(bucket), data.index, data.groups_of(bucket)
    names = ", ".join(file["name"] for file in files)
    try:
        events = data.raw_events(groups)
    except (DataError, OSError, pa.ArrowException) as error:
        return [f"{names}: cannot be read ({error})"]
    problems = []
    problems += _unknown_values(data, bucket)
    accepted, unchecked = (sum(file[name] for file in files) for name in ("accepted", "unchecked"))
    if not accepted - unchecked <= events.height <= accepted:
        problems.append(f"{names}: {events.height} events instead of {accepted}")
    if not build_sequences(events).equals(events.sort("user_id", maintain_order=True)):
        problems.append(f"{names}: sequences are not sorted or hold duplicates")
    mine = np.flatnonzero(index.bucket == bucket)
    stored = mine[np.lexsort((index.row[mine], index.group[mine]))]
    users = events.group_by("user_id", maintain_order=True).len()
    ids = pl.Series("user_id", data.user_ids.take(pa.array(stored)))
    longer = index.events[stored] - users["len"].to_numpy() if users["user_id"].equals(ids) else np.array([-1])
    if longer.min(initial=0) < 0 or longer.sum() != accepted - events.height:
        problems.append(f"{data.manifest.index['name']}: does not describe {names}")
    for file in files:
        with data.part_of(file["keys"]) as parquet:
            num_keys, wanted = parquet.metadata.num_rows, file["events" if "conflicting" in file else "accepted"]
        if num_keys != wanted:
            problems.append(f"{file['keys']['name']}: {num_keys} keys for {wanted} events")
    counted = sum(file.get("conflicting", 0) for file in files)
    if not unchecked and all("conflicting" in file for file in files):
        found = conflicting_events(data, bucket).height
        if found != counted:
            problems.append(f"{names}: {found} events with both labels instead of {counted}")
    return problems


def _unknown_values(data: Shards, bucket: int) -> list[str]:
    sizes = [len(data.vocabulary.user_features[name]) for name in data.user_features]
    for group in data.groups_of(bucket):
        if (codes := data.read(group).codes) is not None:
            limit = np.repeat(np.tile(np.array(sizes) + NUM_RESERVED, len(codes.lengths)), codes.lengths.ravel())
            if ((codes.values < NUM_RESERVED) | (codes.values >= limit)).any():
                names = ", ".join(file["name"] for file in data.files_of(bucket))
                return [f"{names}: a user feature has a value that the vocabulary lacks"]
    return []


def _hash_each(texts: list[str] | tuple[str, ...]) -> np.ndarray:
    return np.array([xxhash.xxh64_intdigest(text.encode()) for text in texts], np.uint64)


def _hashable(name: str, values: pa.Array, item_hash: np.ndarray, action_hash: np.ndarray) -> np.ndarray:
    """One number per event, which depends only on the raw value."""
    if name == "item":
        return item_hash[np.asarray(values)]
    if name == "action":
        return action_hash[np.asarray(values)]
    if name == "request_id":
        encoded = values.dictionary_encode()
        texts = _hash_each(encoded.dictionary.cast(pa.large_string()).to_pylist())
        codes = np.asarray(encoded.indices.fill_null(-1))
        return np.where(codes >= 0, np.append(texts, np.uint64(0))[codes], np.uint64(0))
    return np.ascontiguousarray(np.asarray(values), "<i8")
