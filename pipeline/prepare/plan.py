"""The plan of one run of prepare: which inputs are new, and whether they may be added to the data set."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import polars as pl

from pipeline.events import DataError, EventColumns, NotNow, flatten, quoted
from pipeline.log import inputs, readers
from pipeline.log.daily import DailyLog, log_days, whole_days
from pipeline.log.inputs import FileFormat, Input, summary, without_equal
from pipeline.log.readers import Part
from pipeline.prepare import users
from pipeline.shards.dataset import Shards
from pipeline.shards.manifest import Manifest, current_manifest
from pipeline.storage import Store

ADDABLE = ("action", "request_id")
"""Columns that a log may gain when the data set already has events. Earlier events, and those of files without the
column, have no value in it."""

_BY_NAME = ("timestamp", "order", "action", "label", "request_id")
"""Columns beside the ids that are read from a log that has them, if no mapping is given."""

_OWN_NAMES = {
    "manifests", "shards", "keys", "index", "vocabulary", "rejected", "requests", "tombstones", "leases", "removals",
}  # fmt: skip
_LEAST_BUCKETS = 16
_BUCKET_ROWS = 4_000_000
_DISK_FACTOR = 3
"""Staging and shards together take less than this multiple of the input's bytes (gzipped CSV comes closest)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HashedInput:
    """A file to read, and its checksum."""

    file: Input
    checksum: str

    def entry(self, kind: str) -> dict[str, Any]:
        """The manifest's entry of an input of this kind."""
        return {
            "name": self.file.name, "bytes": self.file.bytes, "checksum": self.checksum, "kind": kind,
            "edges": inputs.edges(self.file), "modified": inputs.modified(self.file),
        }  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What one run of prepare is to do."""

    out: str
    parent: Manifest | None
    columns: EventColumns
    files: FileFormat
    schema: dict[str, Any]
    config: dict[str, Any]
    """Settings that must stay the same for the lifetime of the data set."""
    inputs: list[HashedInput]
    """New event files."""
    items: HashedInput | None
    """The items table, if it is new or there are new events, whose new items may be in it."""
    items_are_new: bool
    """False = the table was ingested before; items that have features keep them."""
    users: HashedInput | None
    """The users table, if it is new or there are new events, whose new users may be in it."""
    users_are_new: bool
    """False = the table was ingested before; the stored features of earlier users stay unchanged."""
    left_out: list[str]
    """What of the log is not read, and why: days that are not complete yet, and files."""
    files_left_out: dict[str, str]
    """{name: why} of the files among them."""

    @property
    def is_done(self) -> bool:
        return not self.inputs and not self.items_are_new and not self.users_are_new

    @property
    def hashed(self) -> list[tuple[Input, str]]:
        """The files that are read, with their checksums."""
        read = (*self.inputs, self.items, self.users)
        return [(each.file, each.checksum) for each in read if each is not None]

    @property
    def ingest(self) -> str:
        """Identifier of this set of inputs."""
        return hashlib.sha256(repr([new.checksum for new in self.inputs]).encode()).hexdigest()[:16]

    @property
    def shards(self) -> Shards | None:
        """The data set so far; None if there is none."""
        return Shards(self.out, self.parent) if self.parent else None

    @property
    def takes_order_from_times(self) -> bool:
        """Whether the events' order is what their times have below the millisecond."""
        return "order" in self.schema["columns"] and self.columns.order is None

    @property
    def keeps_fine_times(self) -> bool:
        """Whether what times have below the millisecond becomes an order: a data set that began without goes on so."""
        return self.columns.order is None and (self.parent is None or self.takes_order_from_times)

    def with_order_from_times(self) -> Plan:
        """The plan of a new data set in which what times have below the millisecond is the order."""
        return dataclasses.replace(self, schema=self.schema | {"columns": _with_order(self.schema["columns"])})

    def empty_events(self) -> pl.DataFrame:
        """An empty table with the columns and types of the log's events."""
        ids = {"int64": pl.Int64(), "string": pl.String()}
        types = {name: ids[kind] for name, kind in self.schema["id_types"].items()}
        types |= {"timestamp": pl.Int64(), "order": pl.Int64(), "action": pl.String(), "label": pl.Int8()}
        return pl.DataFrame(schema={name: types[name] for name in self.schema["columns"]})

    def parts(self) -> list[Part]:
        """The parts of all new event files; each part can be read on its own."""
        return _parts([new.file for new in self.inputs])

    def user_parts(self) -> list[Part]:
        """The parts of the users table."""
        return _parts([self.users.file] if self.users else [])


def make_plan(
    events: str, out: str, *, columns: EventColumns | None, files: FileFormat, daily: DailyLog,
    settings: dict[str, Any], items: str | None, users_table: str | None,
) -> Plan:  # fmt: skip
    """Compare the inputs and the configuration with the data set so far. DataError: they do not fit together.

    `items` and `users_table`: None = items.parquet and users.parquet in the log's directory, if they exist.
    """
    # The log's tables and complete days, and the data set so far.
    items_file, users_file = _table(items, events, "items.parquet"), _table(users_table, events, "users.parquet")
    tables = [table.file.url for table in (items_file, users_file) if table]
    # An older table of the log is no file of events either.
    tables += [f"{events.rstrip('/')}/{name}" for name in ("items.parquet", "users.parquet")]
    log, left_out = whole_days(inputs.find(events, options=files, tables=tables), events=events, daily=daily)
    log.refuse_unread(events)
    found = log.inputs
    _refuse_foreign(out)
    parent = current_manifest(out)
    if not found and parent is None:
        why = left_out[-1] if left_out else f"the log begins after {daily.until}"
        raise DataError(f"{events}: no day is complete yet ({why}); wait, or see daily.marker and daily.until")

    # The configuration, which must equal that of the data set.
    by_name = columns is None
    if columns is None:
        columns = _canonical_columns(found[0], files) if parent is None else EventColumns(**parent.config["columns"])
    if settings["buckets"] is None:
        settings = settings | {"buckets": parent.config["buckets"] if parent else _buckets_for(found)}
    config = {"columns": dataclasses.asdict(columns), **settings}
    if parent is not None:
        _refuse_other_config(out, config, parent.config)

    # The inputs that are new.
    ingested = {entry["name"]: entry for entry in parent.inputs} if parent else {}
    new, equal = _new_inputs(found, ingested)
    files_left_out = log.left_out | equal
    schema = _schema(parent, [each.file for each in new], columns=columns, files=files)
    items_are_new = _is_new_table(items_file, "items", parent, is_named=items is not None)
    users_are_new = _is_new_table(users_file, "users", parent, is_named=users_table is not None)
    if users_file is not None and (users_are_new or new):
        names = set(users.feature_names(users_file.file)) | set(schema.get("user_features", []))
        schema = schema | {"user_features": sorted(names)}
    return Plan(
        out=out, parent=parent, columns=columns, files=files, schema=schema, config=config, inputs=new,
        items=items_file if items_are_new or new else None, items_are_new=items_are_new,
        users=users_file if users_are_new or new else None, users_are_new=users_are_new,
        left_out=[
            *left_out, *(f"{count:,} {what}" for what, count in summary(files_left_out).items()),
            *(_unread_columns([each.file for each in new], columns, files) if by_name else ()),
        ],
        files_left_out=files_left_out,
    )  # fmt: skip


def pending_days(
    events: str, out: str, *, files: FileFormat, daily: DailyLog
) -> tuple[list[datetime.date], dict[datetime.date, str]]:
    """The complete days of a daily log to ingest, and the days that are left out, with the reason.

    A day is to be ingested if `out` does not have all its files by name and size. So a refused day is listed again
    until it is repaired; each day can be ingested on its own (`daily.days`).
    """
    found = inputs.find(events, options=files)
    if not found.inputs:
        found.refuse_unread(events)
    log = log_days(found.inputs, events=events, daily=daily)
    parent = current_manifest(out)
    known = {entry["name"]: entry["bytes"] for entry in parent.inputs} if parent else {}
    pending = [day for day in sorted(log.files) if any(known.get(file.name) != file.bytes for file in log.files[day])]
    return pending, log.left_out


def latest_day(events: str, *, files: FileFormat, daily: DailyLog) -> datetime.date | None:
    """The latest complete day of a daily log that has files; None if there is none."""
    found = inputs.find(events, options=files).inputs
    return max(log_days(found, events=events, daily=daily).files, default=None) if found else None


def require_disk(plan: Plan) -> None:
    """NotNow if the disk has too little free space for what the plan writes."""
    free = Store(plan.out).free_bytes()
    read = [*plan.inputs, *([plan.users] if plan.users else [])]
    needed = _DISK_FACTOR * sum(each.file.bytes for each in read) + (64 << 20)
    if free is not None and free < needed:
        raise NotNow(
            f"{plan.out}: {free >> 20} MiB free, preparing needs about {needed >> 20} MiB; free some disk space"
        )


def _buckets_for(files: list[Input]) -> int:
    """The number of buckets with which each has a few million events after the first ingest."""
    return min(99_999, max(_LEAST_BUCKETS, -(-sum(map(readers.estimate_rows, files)) // _BUCKET_ROWS)))


def _table(path: str | None, events: str, name: str) -> HashedInput | None:
    """The items or users table: at `path`, or by default `name` in the log's directory; None if there is none."""
    if path is None and Store(events).exists(name):
        path = f"{events.rstrip('/')}/{name}"
    if path is None:
        return None
    found = inputs.find_inputs(path, options=FileFormat(format="parquet"))
    if len(found) > 1:
        raise DataError(f"{path}: {len(found)} files; a table of items or users is one Parquet file")
    if path.lower().endswith((".csv", ".tsv", ".json", ".jsonl", ".ndjson")):
        raise DataError(f"{path}: must be a Parquet file here; `solar import files` reads tables of other formats")
    return HashedInput(file=found[0], checksum=inputs.checksum(found[0]))


def _is_new_table(table: HashedInput | None, kind: str, parent: Manifest | None, *, is_named: bool) -> bool:
    """Whether the values of a table of items or users replace those so far. A table that the user names does if another
    one was read since; the log's own, if its content is another one than when it was last read."""
    if table is None:
        return False
    before = [entry for entry in parent.inputs if entry["kind"] == kind] if parent else []
    own = [entry for entry in before if entry["name"] == table.file.name]
    if latest := before[-1:] if is_named else own[-1:]:
        return latest[0]["checksum"] != table.checksum
    return table.checksum not in {entry["checksum"] for entry in before}


def _new_inputs(found: list[Input], ingested: dict[str, dict[str, Any]]) -> tuple[list[HashedInput], dict[str, str]]:
    """The files whose content was not ingested before, under any name, of equal files only one; and {name: why} of the
    others that were not ingested under their own name."""
    with ThreadPoolExecutor(4) as pool:
        known = pool.map(functools.partial(_is_ingested, ingested=ingested), found)
        unknown = [file for file, is_known in zip(found, known, strict=True) if not is_known]
        sums = list(pool.map(inputs.checksum, unknown))
    before = (entry["checksum"] for entry in ingested.values())
    new, equal = without_equal(zip(unknown, sums, strict=True), known=before)
    return [HashedInput(file=file, checksum=checksum) for file, checksum in new], equal


def _is_ingested(file: Input, *, ingested: dict[str, dict[str, Any]]) -> bool:
    """Whether a file was ingested. DataError: it changed after that.

    To add a day, a log of years is not read again: name, size and first and last bytes decide. Only a file that was
    written since, perhaps with the same content, is read as a whole.
    """
    known = ingested.get(file.name)
    if known is None:
        return False
    if known["bytes"] != file.bytes:
        change = "grew" if file.bytes > known["bytes"] else "shrank"
        raise DataError(
            f"{file.name}: {change} from {known['bytes']} to {file.bytes} bytes after it was ingested; "
            "restore it, and put new events into a file with another name"
        )
    # Manifests of an earlier version do not have the time.
    was_written_since = "modified" in known and inputs.modified(file) != known["modified"]
    if was_written_since or not known["edges"]:
        same = inputs.checksum(file) == known["checksum"]
    else:
        same = inputs.edges(file) == known["edges"]
    if not same:
        raise DataError(f"{file.name}: its bytes changed after it was ingested; restore it or give it another name")
    return True


def _schema(parent: Manifest | None, new: list[Input], *, columns: EventColumns, files: FileFormat) -> dict[str, Any]:
    """The log's columns, the types of its ids, and which columns were added later. DataError: a file does not fit."""
    if parent is None:
        schema = readers.log_schema(new, columns=columns, options=files)
        if "label" in schema["columns"]:
            schema = schema | {"kept_label": "largest"}
    else:
        schema = parent.schema
        if added := [name for name in columns.mapping() if name not in schema["columns"]]:
            found = readers.log_schema(new, columns=columns, options=files)
            schema = schema | {
                "columns": _with_order(found["columns"]) if "order" in schema["columns"] else found["columns"],
                "added": [*schema.get("added", []), *added],
                "id_types": found["id_types"] | schema["id_types"],
            }
    for file in new:
        readers.describe(file, mapping=mapping_of(file, columns=columns, files=files, schema=schema), options=files)
    return schema


def _with_order(columns: list[str]) -> list[str]:
    if "order" in columns:
        return columns
    place = columns.index("timestamp") + 1
    return [*columns[:place], "order", *columns[place:]]


def mapping_of(file: Input, *, columns: EventColumns, files: FileFormat, schema: dict[str, Any]) -> dict[str, str]:
    """{canonical name: column} for the columns that the file must have: all, except that it may lack those that were
    added to the log later."""
    present = readers.read_schema(file, options=files)
    mapping = columns.mapping()
    return {
        name: column for name, column in mapping.items() if column in present or name not in schema.get("added", [])
    }


def _parts(files: list[Input]) -> list[Part]:
    pairs = [(file, group) for file in files for group in range(readers.count_row_groups(file))]
    return [Part(number=n, input=file, row_group=group) for n, (file, group) in enumerate(pairs)]


def _refuse_other_config(out: str, config: dict[str, Any], existing: dict[str, Any]) -> None:
    ours, theirs = flatten(config), flatten(existing)
    for key in sorted(ours | theirs):
        is_added = key.removeprefix("columns.") in ADDABLE and theirs.get(key) is None
        if ours.get(key) != theirs.get(key) and not is_added:
            raise DataError(
                f"{out} was prepared with {key} = {theirs.get(key)!r}, this run has {ours.get(key)!r}; "
                "use the same value or prepare into a new directory"
            )


def _canonical_columns(file: Input, files: FileFormat) -> EventColumns:
    present = readers.read_schema(file, options=files)
    if "timestamp" not in present and "order" not in present:
        fix = readers.separator_hint(file, "timestamp", options=files)
        fix = fix or "set columns.timestamp, in a recipe data.prepare.columns.timestamp"
        raise DataError(f"{file.name}: no column 'timestamp' or 'order'; it has {quoted(present)}; {fix}")
    found: dict[str, Any] = {name: name if name in present else None for name in _BY_NAME}
    return EventColumns(**found)


def _unread_columns(new: list[Input], columns: EventColumns, files: FileFormat) -> list[str]:
    """The columns that would be read by their names if the first file of the data set had had them, each with a file
    that has it."""

    def columns_of(file: Input) -> Iterable[str]:
        try:
            return readers.read_schema(file, options=files)
        except DataError:
            return ()  # reading its rows tells why

    with ThreadPoolExecutor(4) as pool:
        schemas = list(pool.map(columns_of, new))
    told = []
    for name in (name for name in _BY_NAME if getattr(columns, name) is None):
        having = [file.name for file, schema in zip(new, schemas, strict=True) if name in schema]
        if having:
            more = f" and {len(having) - 1:,} more files" if len(having) > 1 else ""
            told.append(f"column {name!r} of {having[0]}{more}: the data set is read without it")
    return told


def _refuse_foreign(out: str) -> None:
    store = Store(out)
    if store.is_local and os.path.isfile(store.path):
        raise DataError(f"{out}: is a file; name a directory for the prepared data")
    for name in store.names():
        if name not in _OWN_NAMES and not name.startswith(("staging-", ".")):
            raise DataError(f"{out}: holds {name!r}, which is not prepared data; name an empty or new directory")
