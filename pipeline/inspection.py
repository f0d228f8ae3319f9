"""Looking at a data set as a whole: is it undamaged (`verify`), and what does it hold (`digest`)?"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import polars as pl
import pyarrow as pa
import xxhash

from pipeline.events import DataError
from pipeline.sequences import build_sequences
from pipeline.shards import Shards
from pipeline.vocabulary import NUM_RESERVED

_ORDERED = ("timestamp", "order", "item", "action", "label", "request_id")


def verify(path: str, *, number: int | None = None) -> list[str]:
    """Every problem of a data set, one line each; empty when it is whole.

    Re-reads every file: sizes, checksums, the counts of the manifest, the index, and that sequences are sorted and
    without duplicates. DataError when there is no readable manifest.
    """
    data = Shards.open(path, number=number)
    manifest = data.manifest
    problems = [p for e in (*manifest.files, manifest.vocabulary, manifest.index) if (p := data.problem_with(e))]
    if problems:
        return problems
    counts = manifest.counts
    if counts["read"] != counts["accepted"] + counts["duplicate"] + sum(counts["rejected"].values()):
        problems.append("manifest: accepted + duplicate + rejected is not read")
    if data.vocabulary.fingerprint != manifest.vocabulary["fingerprint"]:
        problems.append(f"{manifest.vocabulary['name']}: its fingerprint is not the manifest's")
    if len(data.index.events) != manifest.users:
        problems.append(f"{manifest.index['name']}: {len(data.index.events)} users instead of {manifest.users}")
    if sum(entry["events"] for entry in manifest.files) != counts["accepted"]:
        problems.append("manifest: the files' events do not add up to the accepted ones")
    for file in range(len(manifest.files)):
        problems += _problems_of_file(data, file)
    return problems


def digest(path: str, *, number: int | None = None) -> str:
    """Hexadecimal hash of what a data set holds: sequences and user features on raw values, in any order of users, and
    its counts.

    Equal for every split of the same log into ingests, unlike row numbers and files.
    """
    data = Shards.open(path, number=number)
    total = 0
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
    content = {"sequences": f"{total:032x}", "counts": data.manifest.counts, "columns": data.manifest.schema["columns"]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _problems_of_file(data: Shards, file: int) -> list[str]:
    entry, index = data.manifest.files[file], data.index
    try:
        events = data.raw_events(data.groups_of_file(file))
    except (DataError, OSError, pa.ArrowException) as error:
        return [f"{entry['name']}: cannot be read ({error})"]
    problems = []
    problems += _unknown_values(data, file)
    if events.height != entry["events"]:
        problems.append(f"{entry['name']}: {events.height} events instead of {entry['events']}")
    if not build_sequences(events).events.equals(events):
        problems.append(f"{entry['name']}: sequences are not sorted or hold duplicates")
    mine = np.flatnonzero(index.file == file)
    stored = mine[np.lexsort((index.row[mine], index.row_group[mine]))]
    users = events.group_by("user_id", maintain_order=True).len()
    same = users.height == len(stored) and users["user_id"].equals(
        pl.Series("user_id", index.user_id.take(pa.array(stored)))
    )
    if not same or (users["len"].to_numpy() != index.events[stored]).any():
        problems.append(f"{data.manifest.index['name']}: does not describe {entry['name']}")
    return problems


def _unknown_values(data: Shards, file: int) -> list[str]:
    sizes = [len(data.vocabulary.user_features[name]) for name in data.user_features]
    for group in data.groups_of_file(file):
        if (codes := data.read(group).codes) is not None:
            limit = np.repeat(np.tile(np.array(sizes) + NUM_RESERVED, len(codes.lengths)), codes.lengths.ravel())
            if ((codes.values < NUM_RESERVED) | (codes.values >= limit)).any():
                return [f"{data.manifest.files[file]['name']}: a user feature has a value that the vocabulary lacks"]
    return []


def _hash_each(texts: list[str] | tuple[str, ...]) -> np.ndarray:
    return np.array([xxhash.xxh64_intdigest(text.encode()) for text in texts], np.uint64)


def _hashable(name: str, values: pa.Array, item_hash: np.ndarray, action_hash: np.ndarray) -> np.ndarray:
    """One number an event that depends on raw values alone."""
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
