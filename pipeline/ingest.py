"""The steps of preparing a data set, each a plain function; build.py strings them together with Ray Data.

    plan          what is new, and whether it may be added          (driver)
    stage_part    a part of a file -> valid events by bucket        (a task a row group)
    build_bucket  a bucket's new events + old shard -> new shard    (a task a bucket)
    finish        index, counts, manifest                           (driver)

Tasks exchange files in a staging directory and return small dictionaries, so nothing large passes through Ray.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import readers, sequences
from pipeline.events import DataError, EventColumns, Reason, validate
from pipeline.items import read_items
from pipeline.manifest import Manifest, flatten
from pipeline.readers import FileFormat, Input
from pipeline.shards import Shards, bucket_of, write_index, write_shard
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

    @property
    def is_done(self) -> bool:
        return not self.inputs and self.items is None

    @property
    def ingest(self) -> str:
        """Name of this set of inputs."""
        return hashlib.sha256(repr([checksum for _, checksum in self.inputs]).encode()).hexdigest()[:16]

    def parts(self) -> list[dict[str, Any]]:
        """{part, input, row_group} for every part of a file that can be read on its own."""
        pairs = [(file, g) for file, _ in self.inputs for g in range(readers.count_row_groups(file))]
        return [{"part": n, "input": dataclasses.asdict(file), "row_group": g} for n, (file, g) in enumerate(pairs)]


def plan(
    found: list[Input], out: str, *, parent: Manifest | None, columns: EventColumns, files: FileFormat,
    settings: dict[str, Any], items: Input | None,
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
    return Plan(
        out=out, parent=parent, columns=columns, files=files, schema=schema, config=config, inputs=new,
        items=fresh_items,
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
            result["fragments"] += _write_fragment(store, name, checked.events, plan.config["buckets"])
    except DataError as error:
        text = str(error)
        raise DataError(text if text.startswith(file.name) else f"{file.name}: {text}") from None
    if items:
        result["items"] = f"items-{number:06d}.parquet"
        _write_table(store, result["items"], pl.concat(items).unique().to_frame())
    table = pl.concat(rejected).with_columns(pl.lit(file.name).alias("file")) if rejected else pl.DataFrame()
    if table.height:
        _write_table(Store(plan.out), f"rejected/{plan.ingest}/part-{number:06d}.parquet", table)
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


def grow_vocabulary(staged: list[dict[str, Any]], *, plan: Plan, staging: str) -> Vocabulary:
    """The data set's vocabulary with the new items, actions and item features."""
    store, parent = Store(staging), plan.parent
    vocabulary = Shards(plan.out, parent).vocabulary if parent else Vocabulary.empty(plan.schema["id_types"]["item_id"])
    names = [s["items"] for s in staged if "items" in s]
    if names:
        raw = pl.concat([_read_table(store, name)["item_id"] for name in names]).unique()
        vocabulary = vocabulary.grow(raw, {action for s in staged for action in s["actions"]})
    return vocabulary.with_features(read_items(plan.items[0], vocabulary)) if plan.items else vocabulary


def build_bucket(
    bucket: int, fragments: list[list], *, plan: Plan, staging: str, vocabulary: str, row_group_events: int
) -> dict[str, Any]:
    """Sort, dedupe and write one bucket: its new events merged into what the data set holds.

    Returns the manifest's file entry, accepted (events that are new), duplicates, places (a file of index rows).
    """
    store = Store(staging)
    new = pl.concat([_read_fragment(store, name, batch) for name, batch, *_ in sorted(fragments)])
    old_events = 0
    if (old := _old_file(plan.parent, bucket)) is None:
        merged = sequences.build_sequences(new)
    else:
        assert plan.parent is not None
        shards = Shards(plan.out, plan.parent)
        events = shards.raw_events(shards.groups_of_file(old))
        old_events = events.height
        merged = sequences.merge(events, new)
    entry, places = write_shard(
        merged.events, path=plan.out, bucket=bucket, row_group_events=row_group_events,
        vocabulary=_load_vocabulary(plan.out, vocabulary),
    )  # fmt: skip
    _write_table(store, f"places-{bucket:05d}.parquet", places)
    accepted = merged.events.height - old_events
    return {"bucket": bucket, "file": entry, "accepted": accepted, "duplicates": new.height - accepted}


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
    tables = [
        _read_table(store, f"places-{b:05d}.parquet").with_columns(file=pl.lit(place[b], pl.Int64)) for b in fresh
    ]
    index = pl.concat(tables) if tables else pl.DataFrame()
    if parent is not None:
        index = _append_to_index(index, Shards(plan.out, parent), place, fresh)
    else:
        index = index.sort("user_id")
    accepted, duplicates = sum(b["accepted"] for b in built), sum(b["duplicates"] for b in built)
    new_counts = {"read": counts["read"], "accepted": accepted, "duplicate": duplicates, "rejected": counts["rejected"]}
    entries = [
        {"name": file.name, "bytes": file.bytes, "checksum": checksum, "kind": kind}
        for kind, found in (("events", plan.inputs), ("items", [plan.items] if plan.items else []))
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


def _refuse_other_config(out: str, config: dict[str, Any], existing: dict[str, Any]) -> None:
    ours, theirs = flatten(config), flatten(existing)
    for key in sorted(ours | theirs):
        if ours.get(key) != theirs.get(key):
            raise DataError(
                f"{out} was prepared with {key} = {theirs.get(key)!r}, this run has {ours.get(key)!r}; "
                "use the same value or prepare into a new directory"
            )


def _write_fragment(store: Store, name: str, events: pl.DataFrame, buckets: int) -> list[list]:
    """One Arrow file, one record batch a bucket: a bucket's task then reads only its own batches."""
    events = events.with_columns(bucket_of(events["user_id"], buckets=buckets).alias("bucket"))
    fragments, sink = [], io.BytesIO()
    writer = None
    for batch, part in enumerate(events.sort("bucket", maintain_order=True).partition_by("bucket")):
        table = part.drop("bucket").to_arrow(compat_level=pl.CompatLevel.oldest()).combine_chunks()
        writer = writer or pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd"))
        writer.write_batch(table.to_batches()[0])
        fragments.append([name, batch, int(part["bucket"][0]), part.height])
    assert writer is not None
    writer.close()
    store.write(name, sink.getvalue(), durable=False)
    return fragments


def _read_fragment(store: Store, name: str, batch: int) -> pl.DataFrame:
    with store.open(name) as stream:
        return pl.DataFrame(pa.ipc.open_file(stream).get_batch(batch))


def _write_table(store: Store, name: str, table: pl.DataFrame) -> None:
    sink = io.BytesIO()
    pq.write_table(table.to_arrow(compat_level=pl.CompatLevel.oldest()), sink, compression="zstd")
    store.write(name, sink.getvalue(), durable=False)


def _read_table(store: Store, name: str) -> pl.DataFrame:
    return pl.DataFrame(pq.read_table(io.BytesIO(store.read(name))))


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
