"""The steps of preparing a data set, each a plain function; build.py strings them together with Ray Data.

    plan          what is new, and whether it may be added          (driver)
    stage_part    a part of a file -> valid events by bucket        (a task a row group)
    stage_users   a part of the users table -> its rows by bucket   (a task a row group)
    check_users   a bucket's users -> counts of what is wrong       (a task a bucket)
    build_bucket  a bucket's new events + old shard -> new shard    (a task a bucket)
    finish        index, counts, manifest                           (driver)

Tasks exchange files in a staging directory and return small dictionaries, so nothing large passes through Ray.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import polars as pl

from pipeline import readers, sequences, users
from pipeline.events import DataError, EventColumns, Reason, validate
from pipeline.items import read_items
from pipeline.manifest import Manifest, flatten
from pipeline.readers import FileFormat, Input
from pipeline.shards import Shards, write_index, write_shard
from pipeline.staged import read_fragments, read_table, write_fragments, write_table
from pipeline.storage import Store
from pipeline.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What one run of prepare does."""

    out: str
    parent: Manifest | None
    columns: EventColumns
    files: FileFormat
    schema: dict[str, Any]
    config: dict[str, Any]
    """What must stay the same as long as the data set lives."""
    inputs: list[tuple[Input, str]]
    """New event files and their checksums."""
    items: tuple[Input, str] | None
    """The items table, when it is new."""
    users: tuple[Input, str] | None
    """The users table, when it is new, or when there are new events: users who are new may be in it."""
    users_are_new: bool
    """False = the table was ingested before; what is known of earlier users stays as it is."""

    @property
    def is_done(self) -> bool:
        return not self.inputs and self.items is None and self.users is None

    @property
    def ingest(self) -> str:
        """Name of this set of inputs."""
        return hashlib.sha256(repr([checksum for _, checksum in self.inputs]).encode()).hexdigest()[:16]

    def parts(self) -> list[dict[str, Any]]:
        """{part, input, row_group} for every part of an event file that can be read on its own."""
        return _parts([file for file, _ in self.inputs])

    def user_parts(self) -> list[dict[str, Any]]:
        """The same of the users table."""
        return _parts([self.users[0]] if self.users else [])


def plan(
    found: list[Input], out: str, *, parent: Manifest | None, columns: EventColumns, files: FileFormat,
    settings: dict[str, Any], items: Input | None, users_file: Input | None = None,
) -> Plan:  # fmt: skip
    """Compare the inputs and the configuration with what the data set holds already. DataError when they disagree."""
    config = {"columns": dataclasses.asdict(columns), **settings}
    if parent is not None:
        _refuse_other_config(out, config, parent.config)
    with ThreadPoolExecutor(4) as pool:
        sums = list(pool.map(readers.checksum, found))
    seen = {entry["checksum"] for entry in parent.inputs} if parent else set()
    known_names = {entry["name"]: entry["checksum"] for entry in parent.inputs} if parent else {}
    new: list[tuple[Input, str]] = []
    for file, checksum in zip(found, sums, strict=True):
        if checksum in seen:
            continue
        if file.name in known_names:
            raise DataError(f"{file.name}: its bytes changed after it was ingested; restore it or give it another name")
        seen.add(checksum)
        new.append((file, checksum))
    fresh_items = None
    if items is not None and (checksum := readers.checksum(items)) not in seen:
        fresh_items = (items, checksum)
    schema = parent.schema if parent else readers.log_schema([file for file, _ in new], columns=columns, options=files)
    for file, _ in new:
        readers.describe(file, mapping=columns.mapping(), options=files)
    read_users, users_are_new = None, False
    if users_file is not None:
        checksum = readers.checksum(users_file)
        users_are_new = checksum not in seen
        read_users = (users_file, checksum) if users_are_new or new else None
    if users_file is not None and read_users is not None:
        names = set(users.feature_names(users_file)) | set(schema.get("user_features", []))
        schema = schema | {"user_features": sorted(names)}
    return Plan(
        out=out, parent=parent, columns=columns, files=files, schema=schema, config=config, inputs=new,
        items=fresh_items, users=read_users, users_are_new=users_are_new,
    )  # fmt: skip


def stage_part(part: dict[str, Any], *, plan: Plan, staging: str) -> dict[str, Any]:
    """Read and validate one part; write its events by bucket, its distinct items and its rejected rows.

    Returns read, valid, rejected {reason: rows}, time_range, actions, fragments [[file, batch, bucket, rows], ...],
    items (file name).
    """
    file = Input(**part["input"])
    store, number = Store(staging), part["part"]
    mapping, id_types = plan.columns.mapping(), plan.schema["id_types"]
    result: dict[str, Any] = {"part": number, "read": 0, "valid": 0, "time_range": None, "fragments": []}
    rejected: list[pl.DataFrame] = []
    items: list[pl.Series] = []
    actions: set[str] = set()
    try:
        blocks = readers.read_blocks(file, mapping=mapping, options=plan.files, row_group=part["row_group"])
        for count, block in enumerate(blocks):
            checked = validate(block.table, columns=plan.columns, id_types=id_types, malformed=block.malformed)
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
    counts = table["reason"].value_counts().rows() if table.height else []
    return result | {"rejected": dict(counts), "actions": sorted(actions)}


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
    if not valid:
        raise DataError(f"{names}: all {read} rows are invalid ({reasons}); see {where}; nothing was prepared")
    if read - valid > max_rejected_ratio * read:
        raise DataError(
            f"{names}: {read - valid} of {read} rows are invalid ({reasons}), above max_rejected_ratio "
            f"{max_rejected_ratio}; see {where}; fix the log or raise the ratio"
        )
    return {"read": read, "valid": valid, "rejected": rejected}


def stage_users(part: dict[str, Any], *, plan: Plan, staging: str) -> dict[str, Any]:
    """users.stage_users with what the plan knows."""
    id_type, buckets = plan.schema["id_types"]["user_id"], plan.config["buckets"]
    return users.stage_users(part, id_type=id_type, buckets=buckets, staging=staging)


def check_users(bucket: dict[str, Any], *, plan: Plan, staging: str) -> dict[str, Any]:
    """users.check_users with what the data set holds so far."""
    known = pl.Series("user_id", [], pl.Int64 if plan.schema["id_types"]["user_id"] == "int64" else pl.String)
    if plan.parent is not None and (old := _old_file(plan.parent, bucket["bucket"])) is not None:
        known = pl.Series("user_id", Shards(plan.out, plan.parent).user_ids(old))
    return users.check_users(bucket, known=known, staging=staging)


def by_bucket(staged: list[dict[str, Any]], staged_users: list[dict[str, Any]], *, plan: Plan) -> list[dict[str, Any]]:
    """{bucket, fragments of events, users: fragments of the users table} of every bucket that must be written."""
    found: dict[str, dict[int, list]] = {"fragments": {}, "users": {}}
    for kind, results in (("fragments", staged), ("users", staged_users)):
        for fragment in (fragment for result in results for fragment in result["fragments"]):
            found[kind].setdefault(fragment[2], []).append(fragment)
    events, table = found["fragments"], found["users"]
    # A bucket of the users table that has no events has no shard.
    changed = {b for b in table if plan.users_are_new and _old_file(plan.parent, b) is not None}
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
    names = [s["items"] for s in staged if "items" in s]
    if names:
        raw = pl.concat([read_table(store, name)["item_id"] for name in names]).unique()
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
    row: dict[str, Any], *, plan: Plan, staging: str, vocabulary: str, row_group_events: int
) -> dict[str, Any]:
    """Sort, dedupe and write one bucket (of by_bucket): its new events merged into what the data set holds.

    Returns the manifest's file entry, accepted (events that are new), duplicates, places (a file of index rows).
    """
    store, bucket = Store(staging), row["bucket"]
    new = read_fragments(store, row["fragments"])
    new_users = pl.concat(read_fragments(store, row["users"])) if row["users"] else None
    old_events, old_values = [], None
    if (old := _old_file(plan.parent, bucket)) is not None:
        assert plan.parent is not None
        shards = Shards(plan.out, plan.parent)
        old_events = [shards.raw_events(shards.groups_of_file(old))]
        old_values = shards.raw_user_values(shards.groups_of_file(old))
        new = [events.select(old_events[0].columns) for events in new]
        if new_users is not None and not plan.users_are_new:
            new_users = new_users.join(old_values, on="user_id", how="anti")
    merged = sequences.build_sequences(pl.concat([*old_events, *new]))
    num_old, num_new = (sum(events.height for events in tables) for tables in (old_events, new))
    values = users.merge_values(
        merged.users()["user_id"], old=old_values, new=new_users, names=plan.schema.get("user_features", [])
    )
    entry, places = write_shard(
        merged.events, path=plan.out, bucket=bucket, row_group_events=row_group_events, user_values=values,
        vocabulary=_load_vocabulary(plan.out, vocabulary),
    )  # fmt: skip
    write_table(store, f"places-{bucket:05d}.parquet", places)
    accepted = merged.events.height - num_old
    return {"bucket": bucket, "file": entry, "accepted": accepted, "duplicates": num_new - accepted}


def finish(
    built: list[dict[str, Any]], counts: dict[str, Any], *, plan: Plan, staging: str, vocabulary: dict[str, Any],
    items: int, time_range: list[int] | None,
) -> Manifest:  # fmt: skip
    """Write the index and describe the new state; the caller commits it."""
    parent, store = plan.parent, Store(staging)
    fresh = {b["bucket"]: b["file"] for b in built}
    kept = {} if parent is None else {f["bucket"]: f for f in parent.files}
    files = [fresh.get(bucket) or kept[bucket] for bucket in sorted(kept | fresh)]
    place = {entry["bucket"]: number for number, entry in enumerate(files)}
    tables = [read_table(store, f"places-{b:05d}.parquet").with_columns(file=pl.lit(place[b], pl.Int64)) for b in fresh]
    index = pl.concat(tables) if tables else pl.DataFrame()
    if parent is not None:
        index = _append_to_index(index, Shards(plan.out, parent), place, fresh)
    else:
        index = index.sort("user_id")
    accepted, duplicates = sum(b["accepted"] for b in built), sum(b["duplicates"] for b in built)
    new_counts = {"read": counts["read"], "accepted": accepted, "duplicate": duplicates, "rejected": counts["rejected"]}
    entries = [
        {"name": file.name, "bytes": file.bytes, "checksum": checksum, "kind": kind}
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
    )


def _parts(files: list[Input]) -> list[dict[str, Any]]:
    pairs = [(file, g) for file in files for g in range(readers.count_row_groups(file))]
    return [{"part": n, "input": dataclasses.asdict(file), "row_group": g} for n, (file, g) in enumerate(pairs)]


def _refuse_other_config(out: str, config: dict[str, Any], existing: dict[str, Any]) -> None:
    ours, theirs = flatten(config), flatten(existing)
    for key in sorted(ours | theirs):
        if ours.get(key) != theirs.get(key):
            raise DataError(
                f"{out} was prepared with {key} = {theirs.get(key)!r}, this run has {ours.get(key)!r}; "
                "use the same value or prepare into a new directory"
            )


@functools.lru_cache(maxsize=1)
def _load_vocabulary(out: str, name: str) -> Vocabulary:
    return Vocabulary.from_bytes(Store(out).read(name), name=name)


def _old_file(parent: Manifest | None, bucket: int) -> int | None:
    places = [n for n, entry in enumerate(parent.files) if entry["bucket"] == bucket] if parent else []
    return places[0] if places else None


def _append_to_index(index: pl.DataFrame, old: Shards, place: dict[int, int], fresh: dict[int, dict]) -> pl.DataFrame:
    """Old users keep their rows, new ones follow sorted by id."""
    bucket = pl.Series([f["bucket"] for f in old.manifest.files], dtype=pl.Int64)
    before = pl.DataFrame({"user_id": old.index.user_id, **{n: getattr(old.index, n) for n in _PLACE}})
    before = before.with_columns(bucket=bucket.gather(before["file"])).with_row_index("user_row")
    untouched = before.filter(~pl.col("bucket").is_in(list(fresh)))
    untouched = untouched.with_columns(file=pl.col("bucket").replace_strict(place, return_dtype=pl.Int64))
    columns = ["user_id", *_PLACE]
    parts = [untouched.select(columns)] + ([index.select(columns)] if index.height else [])
    joined = pl.concat(parts).join(before.select("user_id", "user_row"), on="user_id", how="left")
    return joined.sort("user_row", "user_id", nulls_last=True).drop("user_row")


_PLACE = ("file", "row_group", "row", "events")


def _join_ranges(first: list[int] | None, second: list[int] | None) -> list[int] | None:
    if first is None or second is None:
        return first or second
    return [min(first[0], second[0]), max(first[1], second[1])]


def _add_counts(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    rejected = {r.value: n for r in Reason if (n := old["rejected"].get(r, 0) + new["rejected"].get(r, 0))}
    return {key: old[key] + new[key] for key in ("read", "accepted", "duplicate")} | {"rejected": rejected}
