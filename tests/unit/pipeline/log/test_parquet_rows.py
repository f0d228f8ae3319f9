from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.events import LONGEST_ID, DataError, EventColumns, validate
from pipeline.log import parquet_rows
from pipeline.log.inputs import FileFormat, find_inputs
from pipeline.log.parquet_rows import parquet_columns, parquet_tables
from pipeline.log.readers import describe
from pipeline.times import can_be_times, nanoseconds


def tables(path, columns=("user_id",), row_group=None):
    (file,) = find_inputs(str(path), options=FileFormat())
    return list(parquet_tables(file, columns=columns, row_group=row_group))


def repeated(values, counts):
    places = np.repeat(np.arange(len(values)), counts).astype(np.int32)
    return pa.DictionaryArray.from_arrays(pa.array(places), pa.array(values))


def test_a_few_bytes_that_stand_for_many_long_strings_come_in_small_tables(tmp_path):
    path, rows = tmp_path / "log.parquet", 200_000
    long = "x" * 1_000_000
    table = pa.table({"user_id": repeated(["u", long], [rows - 1_000, 1_000]), "item_id": pa.array([1] * rows)})
    pq.write_table(table, path, compression="zstd", row_group_size=rows)
    assert path.stat().st_size < 100_000
    found = tables(path)
    # 1 GB of text, at most 256 MiB of it at a time.
    assert sum(part.height for _, part in found) == rows
    assert max(int(part["user_id"].str.len_bytes().sum()) for _, part in found) <= parquet_rows.BLOCK_BYTES + len(long)
    assert [before for before, _ in found] == np.cumsum([0, *(part.height for _, part in found[:-1])]).tolist()
    last = found[-1][1].with_columns(item_id=pl.lit("a"), timestamp=5)
    checked = validate(last, columns=EventColumns(), id_types={"user_id": "string", "item_id": "string"}, malformed=[])
    assert checked.events.height == 0
    assert set(checked.rejected["reason"]) == {"invalid user"}
    assert max(checked.rejected["record"].str.len_bytes()) < LONGEST_ID


def test_a_value_that_would_fill_the_memory_is_refused_by_its_column(tmp_path, monkeypatch):
    path = tmp_path / "log.parquet"
    pl.DataFrame({"user_id": ["x" * 50_000], "item_id": ["a"]}).write_parquet(path)
    assert tables(path)[0][1].height == 1
    monkeypatch.setattr(parquet_rows, "_COLUMN_BYTES", 10_000)
    with pytest.raises(DataError, match=r"log.parquet: column 'user_id' has 50,\d+ bytes in 1 rows; .* shorten them"):
        tables(path)
    assert tables(path, columns=["item_id"])[0][1].height == 1


@pytest.mark.parametrize("limit", [1, 100, 1_000_000])
@pytest.mark.parametrize("kind", ["strings", "categories"])
def test_any_limit_gives_the_same_rows(tmp_path, monkeypatch, limit, kind):
    rng = np.random.default_rng(0)
    names = pl.Series([None, "", "é", *map(str, range(40))]).gather(rng.integers(0, 43, 300))
    log = pl.DataFrame({"user_id": names, "item_id": rng.integers(0, 9, 300), "timestamp": 1.5})
    path = tmp_path / "log.parquet"
    stored = log.with_columns(pl.col("user_id").cast(pl.Categorical)) if kind == "categories" else log
    stored.write_parquet(path, row_group_size=70, use_pyarrow=True)
    monkeypatch.setattr(parquet_rows, "BLOCK_BYTES", limit)
    monkeypatch.setattr(parquet_rows, "BLOCK_ROWS", 50)
    columns = ["timestamp", "user_id"]
    found = pl.concat(part.select(columns) for _, part in tables(path, columns))
    assert found.equals(log.select(columns).with_columns(pl.col("user_id").cast(pl.String)))
    (before, _), *_ = tables(path, columns, row_group=2)
    assert before == 140


def lists_of(text, *, rows, length):
    """Rows of one long string, `length` times each: few bytes in a file."""
    offsets = np.arange(rows + 1) * length
    return pa.LargeListArray.from_arrays(pa.array(offsets), repeated([text], [rows * length]))


def test_lists_that_repeat_a_long_string_come_in_small_tables(tmp_path):
    path = tmp_path / "items.parquet"
    tags = lists_of("x" * 20_000, rows=100, length=1_000)
    # Without Arrow's schema, so that only the pages tell of the repetition.
    pq.write_table(pa.table({"item_id": range(100), "tags": tags}), path, store_schema=False)
    assert path.stat().st_size < 50_000
    assert pq.read_metadata(path).num_row_groups == 1
    found = tables(path, ["item_id", "tags"])
    # 2 GB of text, at most 256 MiB of it at a time.
    assert [before for before, _ in found] == np.cumsum([0, *(part.height for _, part in found[:-1])]).tolist()
    assert pl.concat(part.select("item_id") for _, part in found)["item_id"].to_list() == list(range(100))
    for _, part in found:
        assert part["tags"].dtype == pl.List(pl.String)
        assert part["tags"].list.len().to_list() == [1_000] * part.height
        assert part.height * 20_000 * 1_000 <= parquet_rows.BLOCK_BYTES + 20_016_000
    assert found[3][1]["tags"][0][999] == "x" * 20_000


def test_lists_of_too_many_values_are_refused_before_any_is_read(tmp_path, monkeypatch):
    path = tmp_path / "items.parquet"
    pq.write_table(pa.table({"item_id": ["a", "b"], "my.tags": lists_of("", rows=2, length=500)}), path)
    assert tables(path, ["my.tags"])[0][1]["my.tags"].list.len().to_list() == [500, 500]
    monkeypatch.setattr(parquet_rows, "_COLUMN_VALUES", 10)
    with pytest.raises(DataError) as error:
        tables(path, ["item_id", "my.tags"])
    assert str(error.value) == (
        f"{tmp_path.name}/items.parquet: the lists of column 'my.tags' have 1,000 values in 2 rows; lists of this "
        "length are not read: shorten them, or write the file with smaller row groups"
    )
    assert tables(path, ["item_id"])[0][1].height == 2


def test_the_size_of_a_column_of_lists_counts_as_that_of_any_other(tmp_path, monkeypatch):
    path = tmp_path / "items.parquet"
    pl.DataFrame({"tags": [["x" * 50_000]]}).write_parquet(path)
    monkeypatch.setattr(parquet_rows, "_COLUMN_BYTES", 10_000)
    with pytest.raises(DataError, match=r"items.parquet: column 'tags' has 50,\d+ bytes in 1 rows; .* shorten them"):
        tables(path, ["tags"])


def test_one_list_that_is_longer_than_a_block_is_refused(tmp_path):
    path = tmp_path / "items.parquet"
    rows = [[["a"]] * 5, lists_of("x" * 100_000, rows=1, length=3_000).to_pylist(), [["b"], None, []]]
    pq.write_table(pa.table({"tags": pa.array([value for part in rows for value in part])}), path)
    with pytest.raises(DataError, match=r"a list in column 'tags' has 300,048,000 bytes; .* are not read: shorten it"):
        tables(path, ["tags"])


@pytest.mark.parametrize("limit", [1, 100, 1_000_000])
@pytest.mark.parametrize("values", [5, 1_000])
@pytest.mark.parametrize("kind", ["strings", "large", "plain", "categories", "integers"])
def test_any_limit_gives_the_same_lists(tmp_path, monkeypatch, limit, values, kind):
    rng = np.random.default_rng(0)
    names = [None, "", "\u00e9", *map(str, range(40))]
    if kind == "integers":
        names = [None, *range(42)]
    lists: list[Any] = [[names[n] for n in rng.integers(0, 43, rng.integers(0, 9))] for _ in range(300)]
    for place in (0, 1, 69, 70, 71, 299):
        lists[place] = None
    item = pa.int64() if kind == "integers" else pa.string()
    dtype = pa.large_list(pa.large_string()) if kind == "large" else pa.list_(item)
    if kind == "categories":
        dtype = pa.list_(pa.dictionary(pa.int32(), pa.string()))
    path = tmp_path / "items.parquet"
    table = pa.table({"item_id": range(300), "tags": pa.array(lists, dtype)})
    pq.write_table(table, path, row_group_size=70, use_dictionary=kind != "plain")
    monkeypatch.setattr(parquet_rows, "BLOCK_BYTES", limit)
    monkeypatch.setattr(parquet_rows, "BLOCK_VALUES", values)
    monkeypatch.setattr(parquet_rows, "BLOCK_ROWS", 50)
    found = tables(path, ["item_id", "tags"])
    assert [row for _, part in found for row in part["tags"].to_list()] == lists
    assert [row for _, part in found for row in part["item_id"]] == list(range(300))


@pytest.mark.parametrize("zone", ["+05:30", "-03:00", "+0530", "Asia/Kolkata", "UTC", "Mars/Base", None])
@pytest.mark.parametrize("unit", ["s", "ns"])
def test_times_of_any_zone_are_the_same_moments(tmp_path, zone, unit):
    moments = [1_706_700_000, None] if unit == "s" else [1_706_700_000_123_456_789, None]
    table = pa.table({"timestamp": pa.array(moments, pa.timestamp(unit, zone))})
    pq.write_table(table, tmp_path / "log.parquet")
    (file,) = find_inputs(str(tmp_path / "log.parquet"), options=FileFormat())
    [(name, dtype)] = parquet_columns(file)
    assert (name, can_be_times(dtype)) == ("timestamp", True)
    [(_, read)] = tables(tmp_path / "log.parquet", ["timestamp"])
    seconds = 1_000_000_000 if unit == "s" else 1
    assert nanoseconds(read["timestamp"], unit="s").to_list() == [moments[0] * seconds, None]


@pytest.mark.parametrize("dtype", [pa.decimal256(60, 2), pa.list_(pa.timestamp("ms", "+05:30"))])
def test_a_type_that_cannot_be_read_matters_where_it_is_used(tmp_path, dtype):
    ids = pa.array([1, 2])
    table = pa.table({"user_id": ids, "item_id": ids, "timestamp": ids, "x": pa.array([None, None], dtype)})
    pq.write_table(table, tmp_path / "log.parquet")
    (file,) = find_inputs(str(tmp_path / "log.parquet"), options=FileFormat())
    assert describe(file, mapping=EventColumns().mapping(), options=FileFormat())["user_id"] == pl.Int64
    with pytest.raises(DataError, match=r"column 'x' \(mapped to order\) has a type that cannot be read; cast it"):
        describe(file, mapping=EventColumns(order="x").mapping(), options=FileFormat())
