"""CSV, JSON lines or Parquet files of any layout -> event log, by a column mapping. Streams in bounded memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import polars as pl

from pipeline.events import DataError, EventColumns, Validated, validate
from pipeline.log import inputs, readers
from pipeline.log.changes import unchanged
from pipeline.log.inputs import FileFormat, Input
from pipeline.log.row_counts import RowCounts
from pipeline.sources.event_log import EventLogWriter, Imported, find_event_log, write_event_log
from pipeline.sources.feature_tables import ItemColumns, UserColumns, read_features, read_items, refuse_bad_features

Progress = Callable[[str, int, int], None]
Reshape = Callable[[pl.DataFrame], pl.DataFrame]
"""Rows as they are in the file, under canonical names -> one row per event, with a label."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """How the files are interpreted."""

    columns: EventColumns = dataclasses.field(default_factory=EventColumns)
    """Which column has which role."""
    files: FileFormat = dataclasses.field(default_factory=FileFormat)
    """The format of the event files."""
    items: ItemColumns = dataclasses.field(default_factory=ItemColumns)
    """The items table, when one is given."""
    users: UserColumns = dataclasses.field(default_factory=UserColumns)
    """The users table, when one is given."""
    max_rejected_ratio: float = 0.01
    """Largest share of invalid rows; above it nothing is written."""
    min_item_events: int = 0
    """Events of items with fewer valid rows in these files are left out and counted; the files are then read twice.
    Published protocols use 5. This is one pass over items alone: users are not filtered, and items are not counted
    again."""

    min_label: float | None = None
    """For numeric labels such as ratings: values of at least this count as 1, lower ones as 0."""

    def __post_init__(self) -> None:
        if self.min_label is not None and self.columns.label is None:
            raise ValueError(f"min_label is {self.min_label}: name the label column with columns.label")
        if self.min_item_events < 0:
            raise ValueError(f"min_item_events is {self.min_item_events}: it must be 0 or more")
        if not 0 <= self.max_rejected_ratio <= 1:
            raise ValueError(f"max_rejected_ratio is {self.max_rejected_ratio}: it must be between 0 and 1")


def import_files(
    events: str | Sequence[str], out: str, *, config: ImportConfig, items: str | Sequence[str] | None = None,
    users: str | None = None, reshape: Reshape | None = None, left_out: Mapping[str, str] | None = None,
    published: str | None = None, progress: Progress | None = None,
) -> Imported:  # fmt: skip
    """Write the event log `out` from the file, directory or pattern `events` (or several), and its tables from `items`
    (or several) and `users`. `reshape` converts rows of another form to one row per event with a label. `left_out`:
    {name: why} of files beside them that the caller leaves out. `published`: the name of the public data set, whose
    layout no option changes.

    DataError, with nothing written: a file is missing, cannot be read completely or changes while it is read, a column
    is missing, the log is empty, too many rows are invalid, or `out` has other content.
    """
    item_paths = [items] if isinstance(items, str) else items or []
    if item_paths and not (config.items.features or config.items.list_features):
        raise DataError(f"{item_paths[0]}: no item feature is named; set items.features or items.list_features")
    if users is not None and not (config.users.features or config.users.list_features):
        raise DataError(f"{users}: no user feature is named; set users.features or users.list_features")
    # List the files and describe the source.
    item_files = [file for path in item_paths for file in inputs.find_inputs(path, options=config.items.files)]
    user_files = inputs.find_inputs(users, options=config.users.files) if users else []
    found, unused = _find_events(
        [events] if isinstance(events, str) else events, config, [file.url for file in (*item_files, *user_files)]
    )
    for file in user_files:
        refuse_bad_features(file, config.users)
    read, items_read, users_read = (
        [(file, inputs.checksum(file)) for file in kind] for kind in (found, item_files, user_files)
    )
    # Options that are off are omitted: the description then equals that of a log from before the options existed.
    omitted = {"max_rejected_ratio"} if users else {"max_rejected_ratio", "users"}
    omitted |= {name for name in ("min_item_events", "min_label") if not getattr(config, name)}
    source = {
        "source": "files",
        "inputs": _entries(read),
        "item_inputs": _entries(items_read),
        **({"user_inputs": _entries(users_read)} if users else {}),
        "mapping": _mapping(config, omitted=omitted, separators={file.separator for file in found}),
    }
    if existing := find_event_log(out, source=source):
        return existing
    report = progress or (lambda stage, done, total: None)
    first, equal = inputs.without_equal(read)

    def fill(writer: EventLogWriter) -> None:
        writer.leave_out_files({**(left_out or {}), **unused, **equal})
        written = dataclasses.replace(config.columns, label=None) if reshape else config.columns
        files = [file for file, _ in first]
        with unchanged([*read, *items_read, *users_read]):
            id_types = readers.log_schema(files, columns=written, options=config.files)["id_types"]
            log = _Log(
                files=files, config=config, id_types=id_types, written=written, reshape=reshape, published=published
            )
            _import_events(log, writer, report=report)
            _import_tables(item_files, user_files, log, writer)

    return write_event_log(out, source=source, fill=fill)


def _find_events(paths: Sequence[str], config: ImportConfig, tables: list[str]) -> tuple[list[Input], dict[str, str]]:
    """The event files behind the paths, and {name: why} of the files that are left out."""
    found, left_out, unused = [], {}, set(config.files.ignore)
    for path in paths:
        here = inputs.find(path, options=config.files, tables=tables)
        here.refuse_unread(path)
        found += here.inputs
        left_out |= here.left_out
        unused &= here.unused
    if unused:
        raise DataError(f"{paths[0]}: files.ignore {min(unused)!r} matches no file there; correct or omit it")
    return found, left_out


def _mapping(config: ImportConfig, *, omitted: set[str], separators: set[str]) -> dict[str, Any]:
    """The part of the configuration that the log depends on; newer options are omitted where they are off.

    `separators`: those of the event files. Which files were read is told by their list, not by files.ignore.
    """
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in omitted}
    for files in (part["files"] for part in (fields, fields["items"], fields.get("users")) if part):
        del files["ignore"]
        # A log from before the separator could be found by itself has a comma here.
        if files["separator"] == "auto" and (files is not fields["files"] or separators == {","}):
            files["separator"] = ","
        for name, off in (("typed_header", False), ("quoted", True), ("missing", None)):
            if files[name] == off:
                del files[name]
    return fields


def _entries(files: list[tuple[Input, str]]) -> list[dict[str, Any]]:
    return [{"name": file.name, "bytes": file.bytes, "checksum": checksum} for file, checksum in files]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Log:
    """The event files and how to read them."""

    files: list[Input]
    config: ImportConfig
    id_types: dict[str, str]
    written: EventColumns
    """The columns that the files have, before `reshape`."""
    reshape: Reshape | None
    published: str | None

    def blocks(self, report: Progress, counts: RowCounts) -> Iterator[tuple[Input, Validated]]:
        """(file, validated rows) of every block of every file, which are added to the counts. A DataError names the
        file."""
        columns = self.config.columns
        for done, file in enumerate(self.files):
            report("import", done, len(self.files))
            try:
                for block in readers.read_blocks(file, mapping=self.written.mapping(), options=self.config.files):
                    table = self.reshape(block.table) if self.reshape else block.table
                    if self.config.min_label is not None:
                        table = _with_labels(table, self.config.min_label)
                    checked = validate(table, columns=columns, id_types=self.id_types, malformed=block.malformed)
                    raw = None if self.reshape else block
                    counts.add(checked, num_rows=table.height + len(block.malformed), file=file.name, block=raw)
                    yield file, checked
            except DataError as error:
                raise DataError(error.args[0] if file.name in str(error) else f"{file.name}: {error}") from None
        report("import", len(self.files), len(self.files))


def _with_labels(table: pl.DataFrame, min_label: float) -> pl.DataFrame:
    """Label 1 for numbers of at least `min_label`, else 0; other texts, also true and false, become invalid labels."""
    text = pl.col("label").cast(pl.String).str.strip_chars()
    number = text.cast(pl.Float64, strict=False)
    liked = (number >= min_label).cast(pl.Int8).cast(pl.String)
    other = None if table.schema["label"].is_float() else pl.when(text != "").then(text + " (no number)")
    return table.with_columns(label=pl.when(number.is_finite()).then(liked).otherwise(other))


def _import_events(log: _Log, writer: EventLogWriter, *, report: Progress) -> None:
    found, config = log.files, log.config
    rows, rare = RowCounts(), 0
    kept = _frequent_items(log, report=report) if config.min_item_events else None
    for file, checked in log.blocks(report, rows):
        events = checked.events if kept is None else checked.events.filter(pl.col("item_id").is_in(kept.implode()))
        rare += checked.events.height - events.height
        writer.add_events(events if config.columns.order else _with_whole_times(events))
        writer.add_rejected(checked.rejected.with_columns(pl.lit(file.name).alias("file")))
    if kept is not None:
        writer.leave_out({f"events of items with fewer than {config.min_item_events}": rare})
    names = ", ".join(file.name for file in found[:3]) + (", ..." if len(found) > 3 else "")
    if not rows.read:
        raise DataError(f"{names}: the log is empty; nothing was written")
    _refuse_bad_rows(rows, log, names=names)
    if note := rows.note_on_times(config.columns.timestamp_unit):
        writer.notes.append(note)
    if kept is not None and not len(kept):
        raise DataError(f"{names}: no item has {config.min_item_events} events; lower min_item_events")


def _refuse_bad_rows(rows: RowCounts, log: _Log, *, names: str) -> None:
    """DataError: the times fit another unit, or too many rows are invalid. It names a way out that the command has."""
    columns, ratio = log.config.columns, log.config.max_rejected_ratio
    # No option of the command changes the layout of a public data set.
    again, elsewhere = f"get {log.published} again", "read it with `solar import files`"
    if right := rows.other_unit(columns.timestamp_unit):
        way = f"{again}, or {elsewhere} and" if log.published else "set"
        told = rows.in_unit(right, columns.timestamp_unit, column=columns.timestamp)
        raise DataError(f"{names}: {told}: {way} columns.timestamp_unit {right}")
    bad = rows.rejected.total()
    way = f"{again}, {elsewhere} and a mapping" if log.published else "check the rows, columns and files"
    if bad and bad == rows.read:
        hint = readers.first_row_hint(log.files[0], mapping=log.written.mapping(), options=log.config.files)
        raise DataError(f"{names}: all {bad} rows are invalid ({rows.reasons()}); {rows.first_of_each()}{hint}; {way}")
    if bad > ratio * rows.read:
        raise DataError(
            f"{names}: {bad} of {rows.read} rows are invalid ({rows.reasons()}), above max_rejected_ratio {ratio}; "
            f"{rows.first_of_each()}; {way}, or raise max_rejected_ratio"
        )


def _import_tables(items: list[Input], users: list[Input], log: _Log, writer: EventLogWriter) -> None:
    config = log.config
    if items:
        table, nameless = read_items(items, config.items, id_type=log.id_types["item_id"])
        writer.add_items(table)
        writer.leave_out(_nameless("items", nameless))
    nameless = 0
    for file in users:
        # Block by block: the users table may not fit into memory. `solar prepare` compares the ids of all blocks.
        for block, omitted in read_features(file, config.users, id_type=log.id_types["user_id"]):
            nameless += omitted
            if twice := int((block["user_id"].value_counts()["count"] > 1).sum()):
                raise DataError(f"{file.name}: {twice:,} user ids are in more than one row; keep one row per user")
            writer.add_users(block)
    writer.leave_out(_nameless("users", nameless))


def _nameless(table: str, rows: int) -> dict[str, int]:
    return {f"rows of the {table} table whose id is missing or of another type": rows} if rows else {}


def _with_whole_times(events: pl.DataFrame) -> pl.DataFrame:
    """Times in nanoseconds where they have a part below the millisecond, which validation hands over as the order."""
    if "order" not in events.columns:
        return events
    whole = pl.col("timestamp") * 1_000_000 + pl.col("order")
    return events.with_columns(timestamp=whole.cast(pl.Datetime("ns", "UTC"))).drop("order")


def _frequent_items(log: _Log, *, report: Progress) -> pl.Series:
    """The ids of items with at least `min_item_events` valid rows."""
    counts = [checked.events.group_by("item_id").len() for _, checked in log.blocks(report, RowCounts())]
    if not counts:
        return pl.Series("item_id", [], pl.Int64 if log.id_types["item_id"] == "int64" else pl.String)
    total = pl.concat(counts).group_by("item_id").agg(pl.col("len").sum())
    return total.filter(pl.col("len") >= log.config.min_item_events)["item_id"]
