"""The steps of preparing a data set, each a plain function; build.py strings them together with Ray Data.

    make_plan     what is new, and whether it may be added          (driver, plan.py)
    stage_part    a part of a file -> valid events by bucket        (a task a row group)
    stage_users   a part of the users table -> its rows by bucket   (a task a row group)
    check_users   a bucket's users -> counts of what is wrong       (a task a bucket)
    build_bucket  a bucket's new events -> one more shard file      (a task a bucket)
    finish        index, counts, manifest                           (driver)

Tasks exchange files in a staging directory and return small dictionaries, so nothing large passes through Ray.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import numpy as np
import polars as pl

from pipeline.events import DataError, Reason, validate
from pipeline.log import readers
from pipeline.log.readers import Input
from pipeline.prepare import users
from pipeline.prepare.items import read_items
from pipeline.prepare.plan import Plan, mapping_of
from pipeline.prepare.staging import read_fragments, read_table, write_fragments, write_table
from pipeline.shards import sequences
from pipeline.shards.dataset import Shards
from pipeline.shards.event_keys import EventKeys, Found, look_up, write_keys
from pipeline.shards.manifest import Manifest
from pipeline.shards.rows import UserRows
from pipeline.shards.tombstones import Tombstones
from pipeline.shards.user_columns import encode_values
from pipeline.shards.vocabulary import Vocabulary
from pipeline.shards.writer import place, write_index, write_shard
from pipeline.storage import Store

_FILES_AT_ONCE = 16


def stage_part(part: dict[str, Any], *, plan: Plan, staging: str) -> dict[str, Any]:
    """Read and validate one part; write its events by bucket, its distinct items and its rejected rows.

    Returns read, forgotten, valid, rejected {reason: rows}, time_range, actions, items (file name) and fragments
    [[file, batch, bucket, rows], ...].
    """
    file = Input(**part["input"])
    store, number = Store(staging), part["part"]
    mapping = mapping_of(file, columns=plan.columns, files=plan.files, schema=plan.schema)
    absent = [pl.lit(None).alias(name) for name in plan.columns.mapping() if name not in mapping]
    stones = Tombstones.of(plan.out, plan.parent)
    result: dict[str, Any] = {"part": number, "time_range": None, "fragments": []}
    result |= {"read": 0, "forgotten": 0, "valid": 0}
    rejected: list[pl.DataFrame] = []
    items: list[pl.Series] = []
    actions: set[str] = set()
    try:
        blocks = readers.read_blocks(file, mapping=mapping, options=plan.files, row_group=part["row_group"])
        for count, block in enumerate(blocks):
            table = block.table.with_columns(absent)
            if stones is not None:
                is_forgotten = stones.among(table["user_id"])
                result["forgotten"] += int(is_forgotten.sum())
                table = table.filter(~is_forgotten)
            checked = validate(table, columns=plan.columns, id_types=plan.schema["id_types"], malformed=block.malformed)
            result["read"] += block.table.height + len(block.malformed)
            result["valid"] += checked.events.height
            rejected.append(checked.rejected)
            if not checked.events.height:
                continue
            items.append(checked.events["item_id"].unique())
            if "action" in mapping:
                actions |= set(checked.events["action"].drop_nulls().unique())
            if "timestamp" in mapping:
                times = checked.events["timestamp"].to_numpy()
                result["time_range"] = _join_ranges(result["time_range"], [int(times.min()), int(times.max())])
            name = f"events-{number:06d}-{count:04d}.arrow"
            result["fragments"] += write_fragments(store, name, checked.events, buckets=plan.config["buckets"])
    except DataError as error:
        text = str(error)
        raise DataError(text if text.startswith(file.name) else f"{file.name}: {text}") from None
    if items:
        result["items"] = f"items-{number:06d}.parquet"
        write_table(store, result["items"], pl.concat(items).unique().to_frame())
    table = pl.concat(rejected).with_columns(pl.lit(file.name).alias("file")) if rejected else pl.DataFrame()
    if table.height:
        write_table(Store(plan.out), f"rejected/{plan.ingest}/part-{number:06d}.parquet", table)
    counts = dict(table["reason"].value_counts().rows() if table.height else [])
    if result["forgotten"]:
        counts[Reason.FORGOTTEN_USER] = result["forgotten"]
    return result | {"rejected": counts, "actions": sorted(actions)}


def refuse_bad_log(staged: list[dict[str, Any]], *, plan: Plan, max_rejected_ratio: float) -> dict[str, Any]:
    """Counts over all parts: read, valid, rejected. DataError when nothing is valid or too much was rejected."""
    read, valid = sum(s["read"] for s in staged), sum(s["valid"] for s in staged)
    rejected = {r.value: n for r in Reason if (n := sum(s["rejected"].get(r.value, 0) for s in staged))}
    assert read == valid + sum(rejected.values())
    names = ", ".join(file.name for file, _ in plan.inputs[:3]) + (", ..." if len(plan.inputs) > 3 else "")
    reasons = ", ".join(f"{reason}: {n}" for reason, n in rejected.items())
    where = f"{plan.out}/rejected/{plan.ingest}"
    if not read:
        raise DataError(f"{names}: the log is empty; nothing was prepared")
    # Rows of forgotten users are no mistake of the log.
    of_log = read - rejected.get(Reason.FORGOTTEN_USER, 0)
    if of_log and not valid:
        raise DataError(f"{names}: all {of_log} rows are invalid ({reasons}); see {where}; nothing was prepared")
    if of_log - valid > max_rejected_ratio * of_log:
        raise DataError(
            f"{names}: {of_log - valid} of {of_log} rows are invalid ({reasons}), above max_rejected_ratio "
            f"{max_rejected_ratio}; see {where}; fix the log or raise the ratio"
        )
    return {"read": read, "valid": valid, "rejected": rejected}


def stage_users(part: dict[str, Any], *, plan: Plan, staging: str) -> dict[str, Any]:
    """users.stage_users with what the plan knows."""
    id_type, buckets = plan.schema["id_types"]["user_id"], plan.config["buckets"]
    return users.stage_users(part, id_type=id_type, buckets=buckets, staging=staging)


def check_users(bucket: dict[str, Any], *, plan: Plan, staging: str) -> dict[str, Any]:
    """users.check_users with what the data set holds so far."""
    return users.check_users(bucket, known=_known_users(plan, bucket["bucket"])["user_id"], staging=staging)


def by_bucket(staged: list[dict[str, Any]], staged_users: list[dict[str, Any]], *, plan: Plan) -> list[dict[str, Any]]:
    """{bucket, fragments of events, users: fragments of the users table} of every bucket that must be written."""
    found: dict[str, dict[int, list]] = {"fragments": {}, "users": {}}
    for kind, results in (("fragments", staged), ("users", staged_users)):
        for fragment in (fragment for result in results for fragment in result["fragments"]):
            found[kind].setdefault(fragment[2], []).append(fragment)
    events, table = found["fragments"], found["users"]
    # A bucket of the users table that has no events has no shard.
    old = set(plan.shards.buckets) if plan.shards else set()
    changed = {b for b in table if plan.users_are_new and b in old}
    wanted = events.keys() | changed
    size = {bucket: sum(f[3] for f in events.get(bucket, [])) for bucket in wanted}
    # Largest first: the last task to finish should be a short one.
    return [
        {"bucket": b, "fragments": events.get(b, []), "users": table.get(b, [])}
        for b in sorted(wanted, key=lambda b: (-size[b], b))
    ]


def grow_vocabulary(
    staged: list[dict[str, Any]], staged_users: list[dict[str, Any]], *, plan: Plan, staging: str
) -> Vocabulary:
    """The data set's vocabulary with the new items, actions, item features and values of user features."""
    store, parent = Store(staging), plan.parent
    vocabulary = Shards(plan.out, parent).vocabulary if parent else Vocabulary.empty(plan.schema["id_types"]["item_id"])
    if names := [s["items"] for s in staged if "items" in s]:
        raw = _distinct_items(names, store)
        vocabulary = vocabulary.grow(raw, {action for s in staged for action in s["actions"]})
    if plan.items:
        vocabulary = vocabulary.with_features(read_items(plan.items[0], vocabulary))
    if plan.users:
        names = plan.schema["user_features"]
        vocabulary = vocabulary.with_user_values(users.staged_values(staged_users, names, staging=staging))
    if twice := [name for name in vocabulary.user_features if f"user-{name}" in vocabulary.features]:
        raise DataError(
            f"{plan.out}: item feature 'user-{twice[0]}' and user feature {twice[0]!r} would share a table; rename one"
        )
    return vocabulary


def build_bucket(
    row: dict[str, Any], *, plan: Plan, staging: str, vocabulary: str, row_group_events: int, late_days: int,
    latest: int | None,
) -> dict[str, Any]:  # fmt: skip
    """Sort, dedupe and write what is new of one bucket (of by_bucket), beside what the data set holds of it.

    `latest`: the last event of all that is new. Returns file, the manifest's entry (None when nothing is new),
    accepted and duplicates (events), and leaves the places of the users of that file.
    """
    store, bucket, names = Store(staging), row["bucket"], _load_vocabulary(plan.out, vocabulary)
    known, num_groups = _known_users(plan, bucket), 0
    events = pl.concat([plan.empty_events(), *read_fragments(store, row["fragments"])])
    staged, num_read = UserRows.encode(sequences.build_sequences(events), names), events.height
    keys = EventKeys.of(staged)
    found = np.full(staged.num_events, Found.NEW)
    if plan.shards and plan.shards.files_of(bucket):
        num_groups = len(plan.shards.groups_of(bucket))
        with contextlib.ExitStack() as open_files:
            files = [open_files.enter_context(plan.shards.part_of(f["keys"])) for f in plan.shards.files_of(bucket)]
            found = look_up(keys, files=files, latest=latest, late_days=late_days)
    is_new = (found == Found.NEW) | (found == Found.UNCHECKED)
    rows = staged.filter_events(found != Found.SAME)
    rows = _with_values(rows, row, known=known, plan=plan, store=store, vocabulary=names)
    accepted = int(is_new.sum())
    result: dict[str, Any] = {"bucket": bucket, "file": None}
    placed = place(rows, known=known, num_groups=num_groups, row_group_events=row_group_events)
    entry = write_shard(placed.parts(with_rows=num_groups > 0), path=plan.out, bucket=bucket)
    if entry is not None:
        entry |= {"accepted": accepted, "unchecked": int((found == Found.UNCHECKED).sum())}
        result["file"] = entry | {"keys": write_keys([keys.filter(is_new)], path=plan.out, bucket=bucket)}
        counted = pl.DataFrame({"user_id": staged.user_id, "events": staged.filter_events(is_new).lengths})
        places = placed.frame().drop("events").join(counted, on="user_id", how="left").fill_null(0)
        write_table(store, f"places-{bucket:05d}.parquet", places.with_columns(bucket=pl.lit(bucket, pl.Int64)))
    return result | {"accepted": accepted, "duplicates": num_read - accepted}


def finish(
    built: list[dict[str, Any]], counts: dict[str, Any], *, plan: Plan, staging: str, vocabulary: dict[str, Any],
    items: int, time_range: list[int] | None,
) -> Manifest:  # fmt: skip
    """Write the index and describe the new state; the caller commits it."""
    parent, store = plan.parent, Store(staging)
    written = [b["file"] for b in built if b["file"]]
    # Stable: the files of a bucket stay in the order in which they came.
    old = parent.files if parent else []
    files = sorted([*old, *written], key=lambda entry: entry["bucket"])
    places = [read_table(store, f"places-{entry['bucket']:05d}.parquet") for entry in written]
    index = _grown_index(plan.shards, places)
    accepted, duplicates = sum(b["accepted"] for b in built), sum(b["duplicates"] for b in built)
    new_counts = {"read": counts["read"], "accepted": accepted, "duplicate": duplicates, "rejected": counts["rejected"]}
    entries = [
        {"name": file.name, "bytes": file.bytes, "checksum": checksum, "edges": readers.edges(file), "kind": kind}
        for kind, found in (
            ("events", plan.inputs),
            ("items", [plan.items] if plan.items else []),
            ("users", [plan.users] if plan.users and plan.users_are_new else []),
        )
        for file, checksum in found
    ]
    return Manifest(
        number=parent.number + 1 if parent else 1,
        schema=plan.schema,
        config=plan.config,
        counts=_add_counts(parent.counts, new_counts) if parent else new_counts,
        users=index.height,
        items=items,
        time_range=_join_ranges(parent.time_range if parent else None, time_range),
        files=files,
        vocabulary=vocabulary,
        index=write_index(index, path=plan.out),
        inputs=[*(parent.inputs if parent else []), *entries],
        parent=parent.fingerprint if parent else None,
        tombstones=parent.tombstones if parent else None,
        oldest=parent.oldest if parent else 1,
    )


@functools.lru_cache(maxsize=1)
def _load_vocabulary(out: str, name: str) -> Vocabulary:
    return Vocabulary.from_bytes(Store(out).read(name), name=name)


def _distinct_items(names: list[str], store: Store) -> pl.Series:
    """What files of distinct items hold together: some at a time, since each has most of what is popular."""
    found = read_table(store, names[0])["item_id"]
    for first in range(1, len(names), _FILES_AT_ONCE):
        several = [read_table(store, name)["item_id"] for name in names[first : first + _FILES_AT_ONCE]]
        found = pl.concat([found, *several]).unique()
    return found


def _known_users(plan: Plan, bucket: int) -> pl.DataFrame:
    """user_id, group, row of the bucket's users in the data set so far."""
    if plan.shards:
        return plan.shards.users_of(bucket)
    return plan.empty_events().select("user_id", group=pl.lit(0, pl.Int64), row=pl.lit(0, pl.Int64)).clear()


def _with_values(
    rows: UserRows, bucket: dict[str, Any], *, known: pl.DataFrame, plan: Plan, store: Store, vocabulary: Vocabulary
) -> UserRows:
    """The users that must be written: those with events, and those of whom the users table says something new."""
    table = pl.concat(read_fragments(store, bucket["users"])) if bucket["users"] else None
    if table is not None and not plan.users_are_new:
        # What is known of earlier users stays as it is.
        table = table.join(known, on="user_id", how="anti")
    with_events = rows.user_id.filter(pl.Series(rows.lengths > 0))
    described = with_events
    if table is not None:
        described = pl.concat(
            [with_events, known["user_id"].filter(known["user_id"].is_in(table["user_id"].implode()))]
        )
    wanted = described.unique().sort()
    rows = rows.with_users(wanted)
    names = plan.schema.get("user_features", [])
    is_new = ~wanted.is_in(known["user_id"].implode()).to_numpy()
    values = users.values_of(wanted, is_new=is_new, table=table, names=names)
    return dataclasses.replace(rows, values=encode_values(values, vocabulary))


def _grown_index(old: Shards | None, places: list[pl.DataFrame]) -> pl.DataFrame:
    """Old users keep their rows, with what came counted in; new ones follow, sorted by id."""
    before = old.index_table() if old else None
    if not places:
        assert before is not None, "the first ingest has events"
        return before
    came = pl.concat(places)
    if before is None:
        return came.sort("user_id")
    more = came.select("user_id", more="events")
    grown = before.join(more, on="user_id", how="left", maintain_order="left")
    grown = grown.with_columns(events=pl.col("events") + pl.col("more").fill_null(0)).drop("more")
    new = came.join(before, on="user_id", how="anti").sort("user_id")
    return pl.concat([grown, new.select(grown.columns)])


def _join_ranges(first: list[int] | None, second: list[int] | None) -> list[int] | None:
    if first is None or second is None:
        return first or second
    return [min(first[0], second[0]), max(first[1], second[1])]


def _add_counts(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    rejected = {r.value: n for r in Reason if (n := old["rejected"].get(r, 0) + new["rejected"].get(r, 0))}
    return {key: old[key] + new[key] for key in ("read", "accepted", "duplicate")} | {"rejected": rejected}
