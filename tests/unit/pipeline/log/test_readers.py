import gzip
import json

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.events import DataError, EventColumns
from pipeline.log import readers
from pipeline.log.inputs import FileFormat, find_inputs
from pipeline.log.readers import read_blocks

MAPPING = EventColumns().mapping()


def read(path, options=FileFormat(), mapping=MAPPING):
    (file,) = find_inputs(str(path), options=options)
    readers.describe(file, mapping=mapping, options=options)
    blocks = list(read_blocks(file, mapping=mapping, options=options))
    rows = [row for block in blocks for row in block.table.rows()]
    return rows, [line for block in blocks for line in block.malformed]


def test_csv_columns_are_found_by_name_and_malformed_lines_are_handed_back(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text('x,item_id,user_id,timestamp\n0,"a,b",1,5\n0,a,2\n\n0,c,3,7\r\n0,c,4,8,9\n')
    assert read(path) == ([("1", "a,b", "5"), ("3", "c", "7")], ["0,a,2", "0,c,4,8,9"])


def test_an_open_quote_costs_its_line_and_no_other(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text('user_id,item_id,timestamp\n1,"a,5\n2,b,6\n3,"c",7\n')
    assert read(path) == ([("2", "b", "6"), ("3", "c", "7")], ['1,"a,5'])


def test_a_line_that_is_no_utf8_costs_itself_alone(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(b"user_id,item_id,timestamp\n1,\xff,5\n2,b,6\n")
    rows, malformed = read(path)
    assert rows == [("2", "b", "6")]
    assert len(malformed) == 1


def test_long_separator_other_encoding_and_named_columns(tmp_path):
    path = tmp_path / "log.dat"
    path.write_bytes("1::Café::5\n2::b\n".encode("latin-1"))
    options = FileFormat(format="csv", separator="::", encoding="latin-1", header=("user_id", "item_id", "timestamp"))
    assert read(path, options) == ([("1", "Café", "5")], ["2::b"])


def test_json_lines_become_text_and_bad_lines_are_handed_back(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"user_id": 1, "item_id": "a", "timestamp": 1.5}), "{", "3", json.dumps({"user_id": [1]}), "{}"]
    path.write_text("\n".join(lines))
    assert read(path) == ([("1", "a", "1.5"), (None, None, None)], lines[1:4])


def test_compressed_text_is_read(tmp_path):
    path = tmp_path / "log.csv.gz"
    path.write_bytes(gzip.compress(b"user_id,item_id,timestamp\n1,2,3\n"))
    assert read(path) == ([("1", "2", "3")], [])


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(b"\xef\xbb\xbfuser_id,item_id,timestamp\n1,2,3\n")
    assert read(path) == ([("1", "2", "3")], [])


field = st.text(st.characters(codec="utf-8", exclude_characters='\n\r\x00"'), max_size=4)


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(st.lists(field, min_size=1, max_size=4), max_size=12), block=st.integers(1, 40))
def test_any_block_size_reads_the_same_lines(tmp_path_factory, lines, block):
    path = tmp_path_factory.mktemp("csv") / "log.csv"
    texts = [",".join(fields) for fields in lines]
    path.write_text("user_id,item_id,timestamp\n" + "\n".join(texts), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_BLOCK_BYTES", block)
        rows, malformed = read(path)
    full = [tuple(text.split(",")) for text in texts if text]
    assert rows == [fields for fields in full if len(fields) == 3]
    assert malformed == [",".join(fields) for fields in full if len(fields) != 3]


def test_a_missing_column_is_refused_with_those_that_exist(tmp_path):
    path = tmp_path / "log.parquet"
    pl.DataFrame({"user": [1], "item_id": [2], "timestamp": [3]}).write_parquet(path)
    with pytest.raises(DataError, match=r"log.parquet: no column 'user_id'.*it has user, item_id, timestamp"):
        read(path)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_a_parquet_file_cut_short_is_refused_by_name(tmp_path, share):
    path = tmp_path / "log.parquet"
    pl.DataFrame({"user_id": range(1000), "item_id": 1, "timestamp": 3}).write_parquet(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match=r"log.parquet: not a complete Parquet file.*copy it again"):
        read(path)


def test_a_gzip_file_cut_short_is_refused_by_name(tmp_path):
    path = tmp_path / "log.csv.gz"
    text = b"user_id,item_id,timestamp\n" + b"".join(b"%d,%d,3\n" % (n, n * n) for n in range(5000))
    path.write_bytes(gzip.compress(text)[:9000])
    with pytest.raises(DataError, match=r"log.csv.gz: cannot be read"):
        read(path)


@pytest.mark.parametrize("change", [{"format": "xml"}, {"encoding": "utf-16"}, {"separator": ""}])
def test_a_wrong_format_is_refused(change):
    with pytest.raises(ValueError, match="must be"):
        FileFormat(**change)
