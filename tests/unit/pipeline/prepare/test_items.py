"""The items table that `prepare` reads: its columns, several rows of an item, lists that repeat long strings."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.events import DataError
from pipeline.log import parquet_rows
from pipeline.log.inputs import FileFormat, find_inputs
from pipeline.prepare.items import read_items


class Known:
    """A vocabulary that knows every item."""

    item_type = "int64"

    def rows(self, items):
        import numpy as np

        return np.full(len(items), 9)


@pytest.fixture
def read(tmp_path):
    def run(table, **options):
        path = tmp_path / "items.parquet"
        pq.write_table(table, path, **options)
        (file,) = find_inputs(str(path), options=FileFormat())
        return read_items(file, Known())  # type: ignore[arg-type]

    return run


def test_equal_rows_of_an_item_are_one_and_different_ones_are_refused(read):
    tags = [["a"], None, ["a"], None, ["a"]]
    found = read(pa.table({"item_id": [1, 2, 1, 2, 3], "tags": tags}))
    assert found.rows() == [(1, ["a"]), (2, None), (3, ["a"])]
    with pytest.raises(DataError, match=r"items.parquet: 2 rows are of an item that has another row; keep one row"):
        read(pa.table({"item_id": [1, 1, 1, 1, 2], "tags": [["a"], ["b"], None, ["b"], ["c"]]}))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({" item_id": pa.array([1])}, "no column 'item_id'; it has ' item_id'; rename the id column"),
        ({"item_id": pa.array([1]), "x": pa.array([1.5])}, "feature 'x' is Float64; features are categories"),
        ({"item_id": pa.array([1]), "x": pa.array([[["a"]]])}, r"feature 'x' is List\(List\(String\)\); features are"),
    ],
)
def test_a_table_with_other_columns_is_refused(read, columns, words):
    with pytest.raises(DataError, match=words):
        read(pa.table(columns))


def test_columns_of_one_name_and_damaged_files_are_refused(read, tmp_path):
    with pytest.raises(DataError, match="several columns are called 'x'; rename all but one"):
        read(pa.table([pa.array([1]), pa.array(["a"]), pa.array(["b"])], names=["item_id", "x", "x"]))
    path = tmp_path / "items.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    (file,) = find_inputs(str(path), options=FileFormat())
    with pytest.raises(DataError, match="not a complete Parquet file"):
        read_items(file, Known())  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [1, 100, 1 << 20])
def test_a_table_is_read_in_parts_of_bounded_size(read, monkeypatch, limit):
    monkeypatch.setattr(parquet_rows, "BLOCK_BYTES", limit)
    tags = [["a" * (place % 7)] * (place % 5) for place in range(50)]
    found = read(pa.table({"item_id": range(50), "tags": tags}), row_group_size=20)
    assert found.rows() == list(enumerate(tags))
