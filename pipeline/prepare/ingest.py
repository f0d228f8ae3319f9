"""The steps that prepare a data set, each a plain function; build.py runs them in this order on Ray Data.

    make_plan     which inputs are new, and whether they may be added   (driver, plan.py)
    stage_part    a part of a file -> valid events by bucket            (one task per row group, log_parts.py)
    stage_users   a part of the users table -> its rows by bucket       (one task per row group)
    check_users   a bucket's users -> counts of wrong rows              (one task per bucket)
    build_bucket  a bucket's new events -> one more shard file          (one task per bucket)
    finish        index, counts, manifest                               (driver)

Tasks exchange files in a staging directory and return small dataclasses, so nothing large passes through Ray.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl

from pipeline.events import DataError, Reason
from pipeline.log.readers import Part
from pipeline.prepare import users
from pipeline.prepare.items import read_items
from pipeline.prepare.log_parts import StagedPart
from pipeline.prepare.plan import Plan
from pipeline.prepare.staging import Fragment, read_fragments, read_table, write_table
from pipeline.prepare.users import CheckedUsers, StagedUsers
from pipeline.shards import sequences
from pipeline.shards.dataset import Shards
from pipeline.shards.event_keys import EventKeys, Found, write_keys
from pipeline.shards.label_conflicts import stored_events
from pipeline.shards.manifest import Manifest
from pipeline.shards.rows import UserRows
from pipeline.shards.user_columns import encode_values
from pipeline.shards.vocabulary import Vocabulary
from pipeline.shards.writer import place, write_index, write_shard
from pipeline.storage import Store

_FILES_AT_ONCE = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class BucketInput:
    """The staged fragments of one bucket, from all parts."""

    bucket: int
    events: list[Fragment]
    users: list[Fragment]
    """The bucket's rows of the users table."""

    @property
    def num_events(self) -> int:
        return sum(fragment.rows for fragment in self.events)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuiltBucket:
    """The result of building one bucket."""

    bucket: int
    file: dict[str, Any] | None
    """The new shard file's entry for the manifest; None if nothing is new."""
    accepted: int
    """Number of new events."""
    conflicting: int
    """Number of events that have been read with both labels only now."""
    duplicates: int
    """Number of other rows of events that the data set has already, or that were read twice."""
    unlisted: int
    """Number of new users without a row in the users table, if users have features."""


def stage_users(part: Part, *, plan: Plan, staging: str) -> StagedUsers:
    """users.stage_users, with settings from the plan."""
    id_type, buckets = plan.schema["id_types"]["user_id"], plan.config["buckets"]
    return users.stage_users(part, id_type=id_type, buckets=buckets, staging=staging)


def check_users(row: BucketInput, *, plan: Plan, staging: str) -> CheckedUsers:
    """users.check_users, with the users in the data set so far."""
    known = _known_users(plan, row.bucket)["user_id"]
    return users.check_users(row.users, row.events, known=known, staging=staging)


def by_bucket(staged: Sequence[StagedPart], staged_users: Sequence[StagedUsers], *, plan: Plan) -> list[BucketInput]:
    """The input of every bucket that must be written, the largest first."""
    events, table = (_fragments_by_bucket(results) for results in (staged, staged_users))
    # A bucket without events has no shard, even if the users table has rows for it.
    existing = set(plan.shards.buckets) if plan.shards else set()
    changed = {b for b in table if plan.users_are_new and b in existing}
    wanted = events.keys() | changed
    rows = [BucketInput(bucket=b, events=events.get(b, []), users=table.get(b, [])) for b in wanted]
    # Largest first: the last task to finish should be a short one.
    return sorted(rows, key=lambda row: (-row.num_events, row.bucket))


def grow_vocabulary(
    staged: Sequence[StagedPart], staged_users: Sequence[StagedUsers], *, plan: Plan, staging: str
) -> Vocabulary:
    """The data set's vocabulary, extended by new items, actions, item features and values of user features."""
    store, parent = Store(staging), plan.parent
    vocabulary = Shards(plan.out, parent).vocabulary if parent else Vocabulary.empty(plan.schema["id_types"]["item_id"])
    if names := [s.items for s in staged if s.items]:
        raw = _distinct_items(names, store)
        vocabulary = vocabulary.grow(raw, {action for s in staged for action in s.actions})
    if plan.items and (plan.items_are_new or vocabulary.num_featureless):
        table = read_items(plan.items.file, vocabulary)
        vocabulary = vocabulary.with_features(table, only_featureless=not plan.items_are_new)
    if plan.users:
        names = plan.schema["user_features"]
        vocabulary = vocabulary.with_user_values(users.staged_values(staged_users, names, staging=staging))
    if clashing := [name for name in vocabulary.user_features if f"user-{name}" in vocabulary.features]:
        raise DataError(
            f"{plan.out}: item feature 'user-{clashing[0]}' and user feature {clashing[0]!r} would share a table; "
            "rename one"
        )
    return vocabulary


def build_bucket(
    row: BucketInput, *, plan: Plan, staging: str, vocabulary: str, row_group_events: int, late_days: int,
    latest: int | None,
) -> BuiltBucket:  # fmt: skip
    """Sort and deduplicate the new events of one bucket, and write them as one more file of the bucket.

    `latest`: time of the last new event in all buckets. Stages the places of the file's users for `finish`.
    """
    # Sort the staged events into sequences.
    store, bucket, names = Store(staging), row.bucket, _load_vocabulary(plan.out, vocabulary)
    known, num_groups = _known_users(plan, bucket), 0
    events = pl.concat([plan.empty_events(), *read_fragments(store, row.events)], how="diagonal")
    if plan.takes_order_from_times:
        # A fragment has no order where all its times are whole milliseconds.
        events = events.with_columns(pl.col("order").fill_null(0))
    distinct = sequences.sequences_with_labels(events)
    staged, num_read = UserRows.encode(distinct, names), events.height
    has_labels = "label" in distinct.columns
    keys = EventKeys.of(staged, labels=distinct[sequences.LABELS].to_numpy() if has_labels else None)

    # Look up which of them the bucket's files hold already.
    found, conflicting = np.full(staged.num_events, Found.NEW), keys.num_conflicting
    if plan.shards and plan.shards.files_of(bucket):
        num_groups = len(plan.shards.groups_of(bucket))
        stored = stored_events(keys, data=plan.shards, bucket=bucket, latest=latest, late_days=late_days)
        found, conflicting = stored.found, stored.num_conflicting(keys)

    # Write the shard file with the new events and user features, its keys, and the places of its users.
    is_new = (found == Found.NEW) | (found == Found.UNCHECKED)
    rows = staged.filter_events(found != Found.SAME)
    rows, unlisted = _with_values(rows, row.users, known=known, plan=plan, store=store, vocabulary=names)
    accepted = int(is_new.sum())
    placed = place(rows, known=known, num_groups=num_groups, row_group_events=row_group_events)
    entry = write_shard(placed.parts(with_rows=num_groups > 0), path=plan.out, bucket=bucket)
    if entry is not None:
        entry |= {"accepted": accepted, "unchecked": int((found == Found.UNCHECKED).sum())}
        # A log with labels has a key for every row of the file, so that a later ingest knows all labels.
        entry |= {"conflicting": conflicting} if has_labels else {}
        with_keys = found != Found.SAME if has_labels else is_new
        entry |= {"keys": write_keys([keys.filter(with_keys)], path=plan.out, bucket=bucket)}
        counted = pl.DataFrame({"user_id": staged.user_id, "events": staged.filter_events(is_new).lengths})
        places = placed.frame().drop("events").join(counted, on="user_id", how="left").fill_null(0)
        write_table(store, f"places-{bucket:05d}.parquet", places.with_columns(bucket=pl.lit(bucket, pl.Int64)))
    return BuiltBucket(
        bucket=bucket, file=entry, accepted=accepted, conflicting=conflicting,
        duplicates=num_read - accepted - conflicting, unlisted=unlisted,
    )  # fmt: skip


def finish(
    built: Sequence[BuiltBucket], counts: dict[str, Any], *, plan: Plan, staging: str, vocabulary: dict[str, Any],
    items: int, time_range: list[int] | None,
) -> Manifest:  # fmt: skip
    """Write the index and return the manifest of the new state; the caller commits it."""
    # Files. The sort is stable: the files of a bucket stay in the order in which they were added.
    parent, store = plan.parent, Store(staging)
    written = [b.file for b in built if b.file]
    old = parent.files if parent else []
    files = sorted([*old, *written], key=lambda entry: entry["bucket"])

    # Index, counts and inputs.
    places = [read_table(store, f"places-{entry['bucket']:05d}.parquet") for entry in written]
    index = _grown_index(plan.shards, places)
    accepted, duplicates = sum(b.accepted for b in built), sum(b.duplicates for b in built)
    new_counts = {"read": counts["read"], "accepted": accepted, "duplicate": duplicates, "rejected": counts["rejected"]}
    if "label" in plan.schema["columns"]:
        new_counts["conflicting"] = sum(b.conflicting for b in built)
    kinds = {
        "events": plan.inputs,
        "items": [plan.items if plan.items_are_new else None],
        "users": [plan.users if plan.users_are_new else None],
    }
    entries = [new.entry(kind) for kind, found in kinds.items() for new in found if new]
    return Manifest(
        number=parent.number + 1 if parent else 1,
        schema=plan.schema,
        config=plan.config,
        counts=_add_counts(parent.counts, new_counts) if parent else new_counts,
        users=index.height,
        items=items,
        time_range=join_ranges([parent.time_range if parent else None, time_range]),
        files=files,
        vocabulary=vocabulary,
        index=write_index(index, path=plan.out),
        inputs=[*(parent.inputs if parent else []), *entries],
        parent=parent.fingerprint if parent else None,
        tombstones=parent.tombstones if parent else None,
        oldest=parent.oldest if parent else 1,
        left_out=plan.files_left_out,
    )


def _fragments_by_bucket(staged: Iterable[StagedPart | StagedUsers]) -> dict[int, list[Fragment]]:
    found: dict[int, list[Fragment]] = {}
    for fragment in (fragment for result in staged for fragment in result.fragments):
        found.setdefault(fragment.bucket, []).append(fragment)
    return found


@functools.lru_cache(maxsize=1)
def _load_vocabulary(out: str, name: str) -> Vocabulary:
    return Vocabulary.from_bytes(Store(out).read(name), name=name)


def _distinct_items(names: list[str], store: Store) -> pl.Series:
    """The distinct items of several files. A few are read at a time, because popular items are in most of them."""
    found = read_table(store, names[0])["item_id"]
    for first in range(1, len(names), _FILES_AT_ONCE):
        several = [read_table(store, name)["item_id"] for name in names[first : first + _FILES_AT_ONCE]]
        found = pl.concat([found, *several]).unique()
    return found


def _known_users(plan: Plan, bucket: int) -> pl.DataFrame:
    """user_id, group and row of the bucket's users in the data set so far."""
    if plan.shards:
        return plan.shards.users_of(bucket)
    return plan.empty_events().select("user_id", group=pl.lit(0, pl.Int64), row=pl.lit(0, pl.Int64)).clear()


def _with_values(
    rows: UserRows, fragments: list[Fragment], *, known: pl.DataFrame, plan: Plan, store: Store, vocabulary: Vocabulary
) -> tuple[UserRows, int]:
    """The rows of the users that must be written, with their features: users with events, and users for whom the users
    table has new values. And the number of new users without a row in the table, if users have features."""
    table = pl.concat(read_fragments(store, fragments)) if fragments else None
    if table is not None and not plan.users_are_new:
        # The stored features of earlier users stay unchanged.
        table = table.join(known, on="user_id", how="anti")
    with_events = rows.user_id.filter(pl.Series(rows.lengths > 0))
    written = with_events
    if table is not None:
        written = pl.concat([with_events, known["user_id"].filter(known["user_id"].is_in(table["user_id"].implode()))])
    wanted = written.unique().sort()
    rows = rows.with_users(wanted)
    names = plan.schema.get("user_features", [])
    is_new = ~wanted.is_in(known["user_id"].implode()).to_numpy()
    values = users.values_of(wanted, is_new=is_new, table=table, names=names)
    listed = [] if table is None else table["user_id"].implode()
    unlisted = int((is_new & ~wanted.is_in(listed).to_numpy()).sum()) if names else 0
    return dataclasses.replace(rows, values=encode_values(values, vocabulary)), unlisted


def _grown_index(old: Shards | None, places: list[pl.DataFrame]) -> pl.DataFrame:
    """The new index: earlier users keep their rows, their new events are added to the counts; new users follow,
    sorted by id."""
    before = old.index_table() if old else None
    if not places:
        assert before is not None, "the first ingest has events"
        return before
    added = pl.concat(places)
    if before is None:
        return added.sort("user_id")
    more = added.select("user_id", more="events")
    grown = before.join(more, on="user_id", how="left", maintain_order="left")
    grown = grown.with_columns(events=pl.col("events") + pl.col("more").fill_null(0)).drop("more")
    new = added.join(before, on="user_id", how="anti").sort("user_id")
    return pl.concat([grown, new.select(grown.columns)])


def join_ranges(ranges: Iterable[list[int] | None]) -> list[int] | None:
    """The range from the earliest start to the latest end; None if no range is known."""
    bounds = [moment for known in ranges if known for moment in known]
    return [min(bounds), max(bounds)] if bounds else None


def _add_counts(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    rejected = {r.value: n for r in Reason if (n := old["rejected"].get(r, 0) + new["rejected"].get(r, 0))}
    return {key: old.get(key, 0) + new[key] for key in new if key != "rejected"} | {"rejected": rejected}
