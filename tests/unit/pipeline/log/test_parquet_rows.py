import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.events import LONGEST_ID, DataError, EventColumns, validate
from pipeline.log import parquet_rows
from pipeline.log.inputs import FileFormat, find_inputs
from pipeline.log.parquet_rows import parquet_tables


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
