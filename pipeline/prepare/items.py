"""The items table of an event log: one row per item, with categorical features."""

from __future__ import annotations

from typing import Any

import polars as pl

from pipeline.events import DataError, quoted, table_ids
from pipeline.log.inputs import Input
from pipeline.log.parquet_rows import parquet_columns, parquet_tables
from pipeline.shards.vocabulary import NUM_RESERVED, Vocabulary

_CATEGORIES = (pl.String, pl.Categorical, pl.Enum, pl.Boolean, pl.Null)


def read_items(file: Input, vocabulary: Vocabulary) -> pl.DataFrame:
    """item_id, and features as strings or lists of strings: the input of Vocabulary.with_features.

    DataError: the file is damaged, has no item_id or a feature that is not a category, or shares no item with the
    vocabulary.
    """
    # Check the columns, then read them in parts.
    columns = parquet_columns(file)
    names = [name for name, _ in columns]
    if "item_id" not in names:
        raise DataError(f"{file.name}: no column 'item_id'; it has {quoted(names)}; rename the id column")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{file.name}: several columns are called {twice!r}; rename all but one")
    for name, dtype in columns:
        inner: Any = dtype.inner if isinstance(dtype, pl.List) else dtype
        is_category = inner.is_integer() or isinstance(inner, _CATEGORIES)
        if name != "item_id" and not is_category:
            raise DataError(f"{file.name}: feature {name!r} is {dtype}; features are categories: cast it to strings")
    parts = [part for _, part in parquet_tables(file, columns=names, row_group=None)]
    table = pl.concat(parts or [pl.DataFrame(schema=dict(columns))])
    table = table.with_columns(table_ids(table["item_id"], id_type=vocabulary.item_type, file=file.name))
    table = table.filter(pl.col("item_id").is_not_null())
    # Equal rows are one. Only rows of items in several rows are compared: that takes a copy of all their strings.
    repeated = table.filter(pl.col("item_id").is_duplicated()).unique()
    if twice := repeated.height - repeated["item_id"].n_unique():
        raise DataError(f"{file.name}: {twice} rows are of an item that has another row; keep one row per item")
    table = table.unique("item_id", keep="first", maintain_order=True)
    if not (vocabulary.rows(table["item_id"]) >= NUM_RESERVED).any():
        raise DataError(f"{file.name}: none of its item ids is in the log; check that both name items the same way")
    return table.with_columns(
        pl.col(n).cast(pl.List(pl.String) if isinstance(t, pl.List) else pl.String)
        for n, t in table.schema.items()
        if n != "item_id"
    )
