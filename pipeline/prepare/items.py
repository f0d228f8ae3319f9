"""The items table of an event log: one row per item, with categorical features."""

from __future__ import annotations

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.events import DataError, quoted
from pipeline.log.inputs import Input
from pipeline.shards.vocabulary import NUM_RESERVED, Vocabulary


def read_items(file: Input, vocabulary: Vocabulary) -> pl.DataFrame:
    """item_id, and features as strings or lists of strings: the input of Vocabulary.with_features.

    DataError: the file is damaged, has no item_id or a feature that is not a category, or shares no item with the
    vocabulary.
    """
    try:
        with file.open() as stream:
            table = pl.DataFrame(pq.read_table(stream))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file.name}: not a complete Parquet file; copy it again") from error
    if "item_id" not in table.columns:
        raise DataError(f"{file.name}: no column 'item_id'; it has {quoted(table.columns)}; rename the id column")
    for name, dtype in table.schema.items():
        inner = dtype.inner if isinstance(dtype, pl.List) else dtype
        if name != "item_id" and not (inner.is_integer() or isinstance(inner, (pl.String, pl.Categorical, pl.Boolean))):
            raise DataError(f"{file.name}: feature {name!r} is {dtype}; features are categories: cast it to strings")
    table = table.unique(maintain_order=True)
    if twice := table.height - table["item_id"].n_unique():
        raise DataError(f"{file.name}: {twice} rows are of an item that has another row; keep one row per item")
    if not (vocabulary.rows(table["item_id"]) >= NUM_RESERVED).any():
        raise DataError(f"{file.name}: none of its item ids is in the log; check that both name items the same way")
    return table.with_columns(
        pl.col(n).cast(pl.List(pl.String) if isinstance(t, pl.List) else pl.String)
        for n, t in table.schema.items()
        if n != "item_id"
    )
