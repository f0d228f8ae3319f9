"""Columns of Parquet tables that can be features, and those that cannot."""

from __future__ import annotations

import math

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.events import DataError
from pipeline.log import parquet_rows
from pipeline.log.inputs import FileFormat, find_inputs
from pipeline.sources.feature_tables import ItemColumns, read_items

CATEGORY = "features are categories: cast it to strings"


def read(path, **columns):
    return read_items(find_inputs(str(path), options=FileFormat()), ItemColumns(**columns), id_type="string")[0]


@pytest.fixture
def table(tmp_path):
    def write(tags):
        path = tmp_path / "items.parquet"
        pq.write_table(pa.table({"item_id": [f"i{place}" for place in range(len(tags))], "tags": tags}), path)
        return path

    return write


@pytest.mark.parametrize(
    ("values", "key", "words"),
    [
        (pa.array([["a"]]), "features", "feature 'tags' has lists: name it in list_features instead of features"),
        (pa.array([[["a"]]]), "list_features", rf"feature 'tags' is List\(List\(String\)\); {CATEGORY}"),
        (pa.array([[{"a": 1}]]), "list_features", rf"feature 'tags' is List\(Struct\(.*; {CATEGORY}"),
        (pa.array([{"a": 1}]), "features", rf"feature 'tags' is Struct\(.*; {CATEGORY}"),
        (pa.array([b"\xff"]), "features", f"feature 'tags' is Binary; {CATEGORY}"),
        (pa.array([[b"\xff"]]), "list_features", rf"feature 'tags' is List\(Binary\); {CATEGORY}"),
        (pa.array([["a"]], pa.list_(pa.string(), 1)), "list_features", rf"feature 'tags' is Array\(.*; {CATEGORY}"),
        (pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string())), "features", f"'tags' is Map.*; {CATEGORY}"),
    ],
)
def test_a_column_that_cannot_be_a_feature_is_one_line(table, values, key, words):
    with pytest.raises(DataError, match=rf"items.parquet: .*{words}"):
        read(table(values), **{key: ("tags",)})


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (pa.array([["a", None], None, []]), [["a", None], None, []]),
        (pa.array([["a"], ["b"]], pa.list_(pa.dictionary(pa.int32(), pa.string()))), [["a"], ["b"]]),
        (pa.array([[1, None], [2]]), [["1", None], ["2"]]),
        (pa.array([[1.5, math.nan], [math.inf], None]), [["1.5", None], [None], None]),
        (pa.array([1.5, math.nan, -math.inf]), [["1.5"], None, None]),
        (pa.array(["a|b", None]), [["a", "b"], None]),
        (pa.array([None, None]), [None, None]),
    ],
)
def test_lists_of_any_category_and_texts_become_lists_of_strings(table, values, wanted):
    assert read(table(values), list_features=("tags",))["tags"].to_list() == wanted


def test_numbers_that_are_none_are_missing_features(table):
    values = pa.array([1.0, math.nan, math.inf, None], pa.float32())
    assert read(table(values), features=("tags",))["tags"].to_list() == ["1.0", None, None, None]


def test_a_table_that_is_read_in_parts_is_joined_as_one(table, monkeypatch):
    path = table(pa.array([["a", "b"], None, ["c"] * 50, []]))
    whole = read(path, list_features=("tags",))
    monkeypatch.setattr(parquet_rows, "BLOCK_BYTES", 20)
    parts = read(path, list_features=("tags",))
    assert parts.equals(whole)
    assert parts["tags"].dtype == pl.List(pl.String)
