"""Tables of items and users beside a log: which of their columns become features, and their rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import polars as pl

from pipeline.events import DataError, refuse_bad_feature, table_ids
from pipeline.log import readers
from pipeline.log.inputs import FileFormat, Input


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
    def section(self) -> str:
        """Where the user sets the options of the table's file."""
        return f"{self.id_name.removesuffix('_id')}s.files"

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


def read_items(files: list[Input], columns: ItemColumns, *, id_type: str) -> tuple[pl.DataFrame, int]:
    """(the table of all items, number of rows without an id of the log's type). Several rows of an item in one file are
    joined: its lists together. An item in several files has the features of the first one. DataError: rows of an item
    differ in a feature."""
    tables, nameless = [], 0
    for file in files:
        blocks = list(read_features(file, columns, id_type=id_type))
        nameless += sum(omitted for _, omitted in blocks)
        tables.append(_one_row_each(pl.concat([block for block, _ in blocks]), columns, file=file))
    return pl.concat(tables).unique("item_id", keep="first", maintain_order=True), nameless


def _one_row_each(table: pl.DataFrame, columns: ItemColumns, *, file: Input) -> pl.DataFrame:
    if table["item_id"].n_unique() == table.height:
        return table
    by_item = table.group_by("item_id", maintain_order=True)
    for name in columns.features:
        clashing = by_item.agg(pl.col(name).n_unique() > 1).filter(pl.col(name))
        if clashing.height:
            raise DataError(
                f"{file.name}: {clashing.height} items are in several rows with different {name}, such as "
                f"{clashing['item_id'][0]!r}; keep one row an item, or make it one of list_features"
            )
    return by_item.agg(
        *(pl.col(name).first() for name in columns.features),
        *(pl.col(name).explode().drop_nulls().unique(maintain_order=True) for name in columns.list_features),
    )


def read_features(file: Input, columns: FeatureColumns, *, id_type: str) -> Iterator[tuple[pl.DataFrame, int]]:
    """The id and features of each row, and how many rows are omitted: their id is missing or not of the log's type."""
    name, mapping = columns.id_name, columns.mapping
    types = readers.describe(file, mapping=mapping, options=columns.files, section=columns.section)
    for feature in (*columns.features, *columns.list_features):
        if feature in types:
            _refuse_other_values(types[feature], feature, is_list=feature in columns.list_features, file=file)
    known = 0
    for block in readers.read_blocks(file, mapping=mapping, options=columns.files):
        if block.malformed:
            fix = "check separator, header and quotes"
            if file.format == "jsonl":
                fix = "a value is a text or a number: write a list as one text, split at list_separator, or in Parquet"
            raise DataError(
                f"{file.name}: {len(block.malformed)} malformed lines, such as {block.malformed[0][:60]!r}; {fix}"
            )
        ids = table_ids(block.table[name].alias(mapping[name]), id_type=id_type, file=file.name)
        table = block.table.with_columns(ids.alias(name))
        table = table.filter(pl.col(name).is_not_null() & (pl.col(name).cast(pl.String) != ""))
        known += table.height
        rows = table.with_columns(
            [_without_gaps(table[feature]).cast(pl.String).alias(feature) for feature in columns.features]
            + [_as_list(table[feature], columns.list_separator).alias(feature) for feature in columns.list_features]
        )
        yield rows, block.table.height - table.height
    if not known:
        raise DataError(f"{file.name}: no id in {mapping[name]!r} is {id_type}, the log's type; map another column")


def refuse_bad_features(file: Input, columns: FeatureColumns) -> None:
    """DataError when a mapped column is missing, or cannot be a user feature."""
    types = readers.describe(file, mapping=columns.mapping, options=columns.files, section=columns.section)
    for name, dtype in types.items():
        if name != columns.id_name:
            refuse_bad_feature(name, dtype, file=file.name)


def _refuse_other_values(dtype: pl.DataType, name: str, *, is_list: bool, file: Input) -> None:
    """DataError unless a column of this type has categories, or lists of them where `is_list`."""
    if isinstance(dtype, pl.List) and not is_list:
        raise DataError(f"{file.name}: feature {name!r} has lists: name it in list_features instead of features")
    inner: Any = dtype.inner if isinstance(dtype, pl.List) else dtype
    if inner.is_nested() or isinstance(inner, (pl.Binary, pl.Object, pl.BaseExtension)):
        raise DataError(f"{file.name}: feature {name!r} is {dtype}; features are categories: cast it to strings")


def _without_gaps(values: pl.Series) -> pl.Series:
    """NaN and infinities are missing values, in lists, too."""
    inner = values.dtype.inner if isinstance(values.dtype, pl.List) else values.dtype
    if inner not in (pl.Float32, pl.Float64):
        return values
    finite = pl.when(pl.element().is_finite()).then(pl.element())
    if isinstance(values.dtype, pl.List):
        return values.list.eval(finite)
    return pl.select(pl.when(values.is_finite()).then(values)).to_series()


def _as_list(values: pl.Series, separator: str) -> pl.Series:
    values = _without_gaps(values)
    if isinstance(values.dtype, pl.List):
        return values.cast(pl.List(pl.String))
    return values.cast(pl.String).str.split(separator)
