"""User features inside a shard file: a column "user:<feature>" of lists of value rows, one list per user.

Where a file lacks the column, the feature did not exist when the file was written: no user in it has a value.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.shards.sequences import UserCodes, offsets_of
from pipeline.shards.vocabulary import NUM_RESERVED, Vocabulary

PREFIX = "user:"


def encode_values(values: pl.DataFrame, vocabulary: Vocabulary) -> dict[str, pa.Array]:
    """{column: lists of value rows} from a table of user_id and lists of raw values; null lists stay null."""
    columns = {}
    for name in (name for name in values.columns if name != "user_id"):
        raw, lengths = values[name].explode().drop_nulls(), values[name].list.len().fill_null(0).to_numpy()
        codes = {value: row for row, value in enumerate(vocabulary.user_features[name], start=NUM_RESERVED)}
        rows = pa.array(raw.replace_strict(codes, return_dtype=pl.Int64).to_numpy(), pa.int64())
        columns[f"{PREFIX}{name}"] = pa.LargeListArray.from_arrays(
            pa.array(offsets_of(lengths)), rows, mask=pa.array(values[name].is_null().to_numpy())
        )
    return columns


def decode_values(table: pa.Table, vocabulary: Vocabulary, names: Sequence[str]) -> pl.DataFrame:
    """user_id and a list of raw values for each feature: the inverse of encode_values."""
    columns: dict = {"user_id": table["user_id"].combine_chunks()}
    for name in names:
        rows, lengths = _flat(table, name)
        raw = pa.array(vocabulary.user_features[name], pa.large_string()).take(pa.array(rows - NUM_RESERVED))
        columns[name] = pa.LargeListArray.from_arrays(pa.array(offsets_of(lengths)), raw)
    return pl.DataFrame(pa.table(columns))


def read_codes(table: pa.Table, names: Sequence[str]) -> UserCodes:
    """The feature codes of the table's users, features in the order of `names`."""
    lengths = np.zeros((table.num_rows, len(names)), np.int64)
    cells, values = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for place, name in enumerate(names):
        rows, lengths[:, place] = _flat(table, name)
        cells.append(np.repeat(np.arange(table.num_rows) * len(names) + place, lengths[:, place]))
        values.append(rows)
    # A stable sort from by-feature to by-user order keeps the values of each (user, feature) cell in order.
    order = np.argsort(np.concatenate(cells), kind="stable")
    return UserCodes(lengths=lengths, values=np.concatenate(values)[order])


def _flat(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(value rows of all users, [U] number of values of each user)."""
    if f"{PREFIX}{name}" not in table.column_names:
        return np.zeros(0, np.int64), np.zeros(table.num_rows, np.int64)
    lists = table[f"{PREFIX}{name}"].combine_chunks()
    return np.asarray(lists.flatten()), np.asarray(pc.list_value_length(lists)).astype(np.int64)  # type: ignore[attr-defined]
