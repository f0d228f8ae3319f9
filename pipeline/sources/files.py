"""CSV, JSON lines or Parquet files of any layout -> event log, by a column mapping. Streams in bounded memory."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import polars as pl

from pipeline.events import DataError, EventColumns, Reason, Validated, refuse_bad_feature, validate
from pipeline.log import inputs, readers
from pipeline.log.inputs import FileFormat, Input
from pipeline.sources.event_log import EventLogWriter, Imported, find_event_log, write_event_log

Progress = Callable[[str, int, int], None]
Reshape = Callable[[pl.DataFrame], pl.DataFrame]
"""Rows as they are in the file, under canonical names -> one row per event, with a label."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureColumns:
    """Which columns of a table of items or users become features, and the format of the table."""

    features: tuple[str, ...] = ()
    """Columns with one category per row."""
    list_features: tuple[str, ...] = ()
    """Columns with several categories per row: lists, or text split at `list_separator`."""
    list_separator: str = "|"
    """Separates the categories in a text."""
    files: FileFormat = dataclasses.field(default_factory=FileFormat)
    """The format of the file."""

    def __post_init__(self) -> None:
        for name in ("features", "list_features"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        names = [getattr(self, self.id_name), *self.features, *self.list_features]
        table = self.id_name.replace("_id", "s")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{table} column {twice[0]!r} appears twice: list it once as id, feature or list feature")
        if not self.list_separator:
            raise ValueError(f"{table}.list_separator is empty: it must be one or more characters")

    @property
    def id_name(self) -> str:
        """The id's canonical name."""
        raise NotImplementedError

    @property
    def mapping(self) -> dict[str, str]:
        """{canonical name: column in the file}."""
        names = (*self.features, *self.list_features)
        return {self.id_name: getattr(self, self.id_name)} | {name: name for name in names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ItemColumns(FeatureColumns):
    """The format of the items table, and which of its columns become features."""

    item_id: str = "item_id"
    """Column with the item ids that events use."""

    @property
    def id_name(self) -> str:
        return "item_id"


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserColumns(FeatureColumns):
    """The format of the users table, and which of its columns become features."""

    user_id: str = "user_id"
    """Column with the user ids that events use."""

    @property
    def id_name(self) -> str:
        return "user_id"


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
    progress: Progress | None = None,
) -> Imported:  # fmt: skip
    """Write the event log `out` from the file, directory or pattern `events` (or several), and its tables from `items`
    (or several) and `users`. `reshape` converts rows of another form to one row per event with a label. `left_out`:
    {name: why} of files beside them that the caller leaves out.

    DataError, with nothing written: a file is missing or cannot be read completely, a column is missing, the log is
    empty, too many rows are invalid, or `out` has other content.
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
        _refuse_bad_features(file, config.users)
    identified = [_identify(file) for file in found]
    # Options that are off are omitted: the description then equals that of a log from before the options existed.
    omitted = {"max_rejected_ratio"} if users else {"max_rejected_ratio", "users"}
    omitted |= {name for name in ("min_item_events", "min_label") if not getattr(config, name)}
    source = {
        "source": "files",
        "inputs": identified,
        "item_inputs": [_identify(file) for file in item_files],
        **({"user_inputs": [_identify(file) for file in user_files]} if users else {}),
        "mapping": _mapping(config, omitted=omitted, separators={file.separator for file in found}),
    }
    if existing := find_event_log(out, source=source):
        return existing
    report = progress or (lambda stage, done, total: None)
    first, equal = inputs.without_equal((file, each["checksum"]) for file, each in zip(found, identified, strict=True))

    def fill(writer: EventLogWriter) -> None:
        writer.leave_out_files({**(left_out or {}), **unused, **equal})
        written = dataclasses.replace(config.columns, label=None) if reshape else config.columns
        files = [file for file, _ in first]
        schema = readers.log_schema(files, columns=written, options=config.files)
        log = _Log(files=files, config=config, id_types=schema["id_types"], written=written, reshape=reshape)
        _import_events(log, writer, report=report)
        if item_files:
            writer.add_items(_read_items(item_files, config.items, id_type=schema["id_types"]["item_id"]))
        for file in user_files:
            # Block by block: the users table may not fit into memory.
            for block in _read_features(file, config.users, id_type=schema["id_types"]["user_id"]):
                writer.add_users(block)

    return write_event_log(out, source=source, fill=fill)


def _find_events(paths: Sequence[str], config: ImportConfig, tables: list[str]) -> tuple[list[Input], dict[str, str]]:
    """The event files behind the paths, and {name: why} of the files that are left out."""
    found, left_out = [], {}
    for path in paths:
        here = inputs.find(path, options=config.files, tables=tables)
        here.refuse_unread(path)
        found += here.inputs
        left_out |= here.left_out
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
        for name, off in (("typed_header", False), ("quoted", True)):
            if files[name] == off:
                del files[name]
    return fields


def _identify(file: Input) -> dict[str, Any]:
    return {"name": file.name, "bytes": file.bytes, "checksum": inputs.checksum(file)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Log:
    """The event files and how to read them."""

    files: list[Input]
    config: ImportConfig
    id_types: dict[str, str]
    written: EventColumns
    """The columns that the files have, before `reshape`."""
    reshape: Reshape | None

    def blocks(self, report: Progress) -> Iterator[tuple[Input, int, Validated]]:
        """(file, number of rows, validated rows) of every block of every file. A DataError names the file."""
        columns = self.config.columns
        for done, file in enumerate(self.files):
            report("import", done, len(self.files))
            try:
                for block in readers.read_blocks(file, mapping=self.written.mapping(), options=self.config.files):
                    table = self.reshape(block.table) if self.reshape else block.table
                    if self.config.min_label is not None:
                        table = _with_labels(table, self.config.min_label)
                    checked = validate(table, columns=columns, id_types=self.id_types, malformed=block.malformed)
                    yield file, table.height + len(block.malformed), checked
            except DataError as error:
                raise DataError(error.args[0] if file.name in str(error) else f"{file.name}: {error}") from None
        report("import", len(self.files), len(self.files))


def _with_labels(table: pl.DataFrame, min_label: float) -> pl.DataFrame:
    """Label 1 for numbers of at least `min_label`, else 0; other values are kept, so that validation rejects them."""
    number = pl.col("label").cast(pl.Float64, strict=False)
    liked = (number >= min_label).cast(pl.Int8).cast(pl.String)
    return table.with_columns(label=pl.when(number.is_finite()).then(liked).otherwise(pl.col("label").cast(pl.String)))


def _import_events(log: _Log, writer: EventLogWriter, *, report: Progress) -> None:
    found, config = log.files, log.config
    read, rare, reasons = 0, 0, Counter[str]()
    kept = _frequent_items(log, report=report) if config.min_item_events else None
    for file, num_rows, checked in log.blocks(report):
        read += num_rows
        reasons.update(checked.rejected["reason"].to_list())
        events = checked.events if kept is None else checked.events.filter(pl.col("item_id").is_in(kept.implode()))
        rare += checked.events.height - events.height
        writer.add_events(events)
        writer.add_rejected(checked.rejected.with_columns(pl.lit(file.name).alias("file")))
    if kept is not None:
        writer.leave_out({f"events of items with fewer than {config.min_item_events}": rare})
    names = ", ".join(file.name for file in found[:3]) + (", ..." if len(found) > 3 else "")
    if not read:
        raise DataError(f"{names}: the log is empty; nothing was written")
    if kept is not None and not len(kept):
        raise DataError(f"{names}: no item has {config.min_item_events} events; lower min_item_events")
    if (bad := reasons.total()) > config.max_rejected_ratio * read:
        counts = ", ".join(f"{reason}: {reasons[reason]}" for reason in Reason if reasons[reason])
        raise DataError(
            f"{names}: {bad} of {read} rows are invalid ({counts}), above max_rejected_ratio "
            f"{config.max_rejected_ratio}; check the mapping or raise the ratio"
        )


def _frequent_items(log: _Log, *, report: Progress) -> pl.Series:
    """The ids of items with at least `min_item_events` valid rows."""
    counts = [checked.events.group_by("item_id").len() for _, _, checked in log.blocks(report)]
    if not counts:
        return pl.Series("item_id", [], pl.Int64 if log.id_types["item_id"] == "int64" else pl.String)
    total = pl.concat(counts).group_by("item_id").agg(pl.col("len").sum())
    return total.filter(pl.col("len") >= log.config.min_item_events)["item_id"]


def _read_items(files: list[Input], columns: ItemColumns, *, id_type: str) -> pl.DataFrame:
    """The table of all items. An item in several files has the features of the first one."""
    tables = [pl.concat(_read_features(file, columns, id_type=id_type)) for file in files]
    return tables[0] if len(tables) == 1 else pl.concat(tables).unique("item_id", keep="first", maintain_order=True)


def _read_features(file: Input, columns: FeatureColumns, *, id_type: str) -> Iterator[pl.DataFrame]:
    """The id and features of each row; rows whose id does not have the log's id type are omitted."""
    name, mapping = columns.id_name, columns.mapping
    readers.describe(file, mapping=mapping, options=columns.files)
    wanted = pl.Int64 if id_type == "int64" else pl.String
    known = 0
    for block in readers.read_blocks(file, mapping=mapping, options=columns.files):
        if block.malformed:
            raise DataError(f"{file.name}: {len(block.malformed)} malformed lines; check separator and header")
        table = block.table.with_columns(pl.col(name).cast(wanted, strict=False)).filter(pl.col(name).is_not_null())
        known += table.height
        yield table.with_columns(
            [pl.col(feature).cast(pl.String) for feature in columns.features]
            + [_as_list(table[feature], columns.list_separator).alias(feature) for feature in columns.list_features]
        )
    if not known:
        raise DataError(f"{file.name}: no id in {mapping[name]!r} is {id_type}, the log's type; map another column")


def _refuse_bad_features(file: Input, columns: FeatureColumns) -> None:
    """DataError when a mapped column is missing, or cannot be a user feature."""
    types = readers.describe(file, mapping=columns.mapping, options=columns.files)
    for name, dtype in types.items():
        if name != columns.id_name:
            refuse_bad_feature(name, dtype, file=file.name)


def _as_list(values: pl.Series, separator: str) -> pl.Series:
    if isinstance(values.dtype, pl.List):
        return values.cast(pl.List(pl.String))
    return values.cast(pl.String).str.split(separator)
