import contextlib
import gzip
import json
import re

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.events import DataError, EventColumns
from pipeline.log import readers
from pipeline.log.inputs import FileFormat, find_inputs
from pipeline.log.readers import read_blocks
from pipeline.sources.feature_tables import ItemColumns, UserColumns, read_features, refuse_bad_features

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


def test_a_quoted_line_break_belongs_to_its_field_and_makes_no_event(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(
        'user_id,item_id,timestamp,text\n1,a,5,"first\n9,forged,6,second"\n2,"b\n9,forged,6,x"\n3,"c\r\nd",7,"""q"""\n',
        newline="",
    )
    rows, malformed = read(path)
    assert rows == [("1", "a", "5"), ("3", "c\r\nd", "7")]
    assert malformed == ['2,"b\n9,forged,6,x"']


def test_a_header_may_hold_line_breaks_empty_names_and_equal_names_that_nobody_uses(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text('\ufeff"user_id","a\nb",,item_id,a,a,timestamp\n1,x,x,2,x,x,3\n', encoding="utf-8")
    assert read(path) == ([("1", "2", "3")], [])
    path.write_text("user_id,item_id,timestamp,item_id\n1,2,3,4\n")
    with pytest.raises(DataError, match=r"log.csv: 2 columns are called 'item_id' \(mapped to item_id\); rename all"):
        read(path)
    path.write_text('user_id,"item_id\n1,2\n')
    with pytest.raises(DataError, match=r"log.csv: the first line cannot be read.*files.quoted"):
        read(path)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["log.csv", "log.jsonl"])
def test_utf_16_is_read_and_without_its_mark_refused_by_the_key(tmp_path, encoding, name):
    path, text = tmp_path / name, "user_id,item_id,timestamp\r\n1,\u00e9\u4e2d,3\r\n"
    if name == "log.jsonl":
        text = '{"user_id": "1", "item_id": "\u00e9\u4e2d", "timestamp": 3}\n'
    rows = [("1", "\u00e9\u4e2d", "3")]
    path.write_bytes(text.encode("utf-16"))
    assert read(path) == (rows, [])
    assert read(path, FileFormat(encoding=encoding)) == (rows, [])
    path.write_bytes(text.encode(encoding))
    assert read(path, FileFormat(encoding=encoding)) == (rows, [])
    told = f"looks like UTF-16 without its mark[:;] set files.encoding {encoding}"
    if name == "log.csv":
        with pytest.raises(DataError, match=rf"^{tmp_path.name}/log.csv: {told}$"):
            read(path)
    else:
        (file,) = find_inputs(str(path), options=FileFormat())
        assert re.search(told, readers.first_row_hint(file, mapping=MAPPING, options=FileFormat()))


@pytest.mark.parametrize(
    ("header", "separator", "likely"),
    [
        ("user_id;item_id;timestamp", "auto", "';'"),
        ("user_id\titem_id\ttimestamp", "auto", r"'\t'"),
        ("user_id,item_id,timestamp", r"\t", "','"),
        ("customer|sku|at", "auto", "'|'"),
        ("user_id;item_id;a,b", "auto", "';'"),
        ('"user_id";"item_id";"timestamp"', "auto", "';'"),
        ('"user_id","item_id"', ";", "','"),
    ],
)
def test_the_separator_that_a_header_seems_to_have_is_named(tmp_path, header, separator, likely):
    path = tmp_path / "log.csv"
    path.write_text(f"{header}\n1{likely}2{likely}3\n")
    with pytest.raises(DataError) as error:
        read(path, FileFormat(separator=separator))
    assert str(error.value).endswith(f"the header looks separated by {likely}: set files.separator {likely}")
    # What the message says does it: nothing is said of separators any more.
    with contextlib.suppress(DataError):
        read(path, FileFormat(separator=likely.strip("'")))
    path.write_text("user,item_id,timestamp\n1,2,3\n")
    with pytest.raises(DataError, match=r"fix the mapping$"):
        read(path)


def test_the_separator_of_a_table_is_set_where_the_options_of_the_table_are(tmp_path):
    path = tmp_path / "items.csv"
    path.write_text("item_id;kind\n1;x\n")
    (file,) = find_inputs(str(path), options=FileFormat())
    with pytest.raises(DataError, match=r"set items.files.separator ';'$"):
        list(read_features(file, ItemColumns(features=("kind",)), id_type="string"))
    with pytest.raises(DataError, match=r"set users.files.separator ';'$"):
        refuse_bad_features(file, UserColumns(user_id="item_id", features=("kind",)))


def test_a_note_to_excel_in_the_first_line_is_named(tmp_path):
    path = tmp_path / "log.csv"
    for text, separator, told in (
        (
            "sep=;\r\nuser_id;item_id;timestamp\r\n1;2;3\r\n",
            "auto",
            "'sep=;', .* remove it, and set files.separator ';'$",
        ),
        ("\ufeffsep=;\nuser_id;item_id;timestamp\n", ";", "'sep=;', a note to Excel: remove it$"),
        ('"sep=\t"\nuser_id\titem_id\ttimestamp\n', "auto", r"remove it, and set files.separator '\\t'$"),
    ):
        path.write_text(text, newline="")
        with pytest.raises(DataError, match=told):
            read(path, FileFormat(separator=separator))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"data": [{"user_id": 1}]}', r"^; its first row has 'data', but not 'user_id', 'item_id', 'timestamp'$"),
        ('{"user_id": 1, "item": 2, "timestamp": 3}', r"^; its first row has 'user_id', .*, but not 'item_id'$"),
        (
            '{\n "data": [\n',
            r"^; its first line is no JSON object: write one object per line, or one array of objects$",
        ),
        ('["u", "v"]', r"^; its first line is no JSON object: write one object per line"),
        ('{"user_id": 1, "item_id": 2, "timestamp": 3}', "^$"),
    ],
)
def test_what_is_odd_about_the_first_row_of_a_json_file_is_told(tmp_path, text, told):
    path = tmp_path / "log.json"
    path.write_text(text)
    (file,) = find_inputs(str(path), options=FileFormat())
    assert re.search(told, readers.first_row_hint(file, mapping=MAPPING, options=FileFormat()))


def test_old_line_ends_nul_bytes_and_a_last_line_without_end(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(b'user_id,item_id,timestamp\r1,"a\rb",5\r2,c\0d,6\r3,e,7')
    rows, malformed = read(path)
    assert rows == [("1", "a\nb", "5"), ("3", "e", "7")]
    assert malformed == ["2,c\0d,6"]
    path.write_bytes(b"user_id,item_id,timestamp\n1,a\rb,5\n")
    assert read(path) == ([], ["1,a\rb,5"])
    assert read(path, FileFormat(quoted=False)) == ([("1", "a\rb", "5")], [])


def test_what_is_no_text_costs_a_row_only_in_a_column_that_is_read(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(b"user_id,item_id,timestamp,text\n1,a,5,\xff\n2,\xff,6,x\n3,b,\xff\n4,\xef\xbf\xbd,7,x\n")
    rows, malformed = read(path)
    assert rows == [("1", "a", "5"), ("4", "\ufffd", "7")]
    assert len(malformed) == 2
    path.write_bytes(b"user_id,item_id,timestamp\n1,\x81,5\n2,\x80,6\n")
    assert read(path, FileFormat(encoding="cp1252")) == ([("2", "€", "6")], ["1,\ufffd,5"])


def test_a_row_knows_its_number_in_the_file(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text('user_id,item_id,timestamp\n1,a\n2,"b"c\n\n3,c,5\n4,d\n5,e,6\n')
    (file,) = find_inputs(str(path), options=FileFormat())
    (block,) = read_blocks(file, mapping=MAPPING, options=FileFormat())
    assert [block.row_number(row) for row in range(2)] == [3, 5]
    assert sorted(zip(block.malformed_at, block.malformed, strict=True)) == [(0, "1,a"), (1, '2,"b"c'), (3, "4,d")]


def test_of_a_long_malformed_record_the_beginning_is_kept(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\n" + "x" * 5_000 + "\n" + "é" * 5_000 + '\n"' + "z" * 5_000 + "\n")
    assert [(line[0], len(line) < 1_100, line[-13:]) for line in read(path)[1]] == [
        ("x", True, " (5000 bytes)"), ("é", True, "(10000 bytes)"), ('"', True, " (5001 bytes)"),
    ]  # fmt: skip


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


@pytest.mark.parametrize("name", ["log.jsonl", "log.json"])
def test_a_json_number_is_a_time_as_it_is_written_and_any_other_value_as_python_reads_it(tmp_path, name):
    written = [
        "1706700000123456789", "1706700000.123456789", "1.706700000123456789e9", "-0.0", "1e400", "-1E+400", "NaN",
        "5.000", "1706700000.1234567890123456789012345678901234567890", '"1706700000.120"', "1E2", "null",
    ]  # fmt: skip
    path, mapping = tmp_path / name, EventColumns(action="action", label="label").mapping()
    rows = [
        f'{{"user_id": 7.00, "item_id": 1e1, "timestamp": {time}, "action": 1.50, "label": 1.0}}' for time in written
    ]
    path.write_text(f"[{','.join(rows)}]" if name == "log.json" else "\n".join(rows))
    found, malformed = read(path, mapping=mapping)
    assert malformed == []
    infinite = {"1e400", "-1E+400", "NaN", "null"}
    assert [row[2] for row in found] == [None if text in infinite else text.strip('"') for text in written]
    assert {(row[0], row[1], *row[3:]) for row in found} == {("7", "10", "1.5", "1.0")}
    # Ids that are no integers, or that a float64 could not tell apart.
    for number in (
        "9007199254740992.0",
        "-9007199254740992.0",
        "9007199254740993.0",
        "9.007199254740992e15",
        "7.25",
        "1e-5",
        "7.00000000000000000000000000001",
    ):
        path.write_text(f'{{"user_id": {number}, "item_id": 1, "timestamp": 1}}\n')
        assert read(path) == ([], [path.read_text().strip()])
    path.write_text('{"user_id": 0e999999999, "item_id": -9007199254740991.0, "timestamp": 1}\n')
    assert read(path)[0] == [("0", "-9007199254740991", "1")]
    path.write_text('{"user_id": 9007199254740993, "item_id": 1, "timestamp": 1}\n')
    assert read(path)[0] == [("9007199254740993", "1", "1")]


def test_words_for_nothing_are_missing_in_csv_only_without_quotes_and_elsewhere_only_if_named(tmp_path):
    words = ["NULL", "\\N", "nan", "None", "null", "NaN", "<NA>", "NA", ""]
    kept = [None] * 7 + ["NA", ""]
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\n" + "".join(f'{word},"{word}",5\n' for word in words))
    rows, _ = read(path)
    assert [row[0] for row in rows] == kept
    assert [row[1] for row in rows] == words
    named = FileFormat(missing=("NA",))
    assert [row[0] for row in read(path, named)[0]] == [*words[:7], None, ""]
    assert [row[0] for row in read(path, FileFormat(missing=()))[0]] == words

    # Where fields cannot be quoted, also on the slower way.
    for separator in (";", "::"):
        path.write_text(separator.join(["user_id", "item_id", "timestamp"]) + "\n" + f"NULL{separator}a{separator}5\n")
        assert read(path, FileFormat(quoted=False, separator=separator)) == ([(None, "a", "5")], [])

    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"user_id": word, "item_id": None, "timestamp": 5}) + "\n" for word in words))
    assert [row[0] for row in read(path)[0]] == words
    assert [row[0] for row in read(path, named)[0]] == [*words[:7], None, ""]
    path = tmp_path / "log.parquet"
    pl.DataFrame({"user_id": words, "item_id": 1, "timestamp": None}).write_parquet(path)
    assert [row[0] for row in read(path)[0]] == words
    assert read(path, named)[0][7] == (None, 1, None)


def test_a_broken_surrogate_costs_its_row_and_only_in_a_column_that_is_read(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [
        rb'{"user_id": "\ud83d", "item_id": "a", "timestamp": 5}',
        rb'{"user_id": "u", "x": "\ud83d", "item_id": 1}',
    ]
    lines += [b'{"user_id": "\xed\xa0\xbd"}', b'{"user_id": "\xff"}', b'{"user_id": "v", "x": "\xff"}']
    lines += [rb'{"user_id": "\ud83d\ude42"}']
    path.write_bytes(b"\n".join(lines))
    rows, malformed = read(path)
    assert rows == [("u", "1", None), ("v", None, None), ("\U0001f642", None, None)]
    assert [line[:20] for line in malformed] == [
        '{"user_id": "\\ud83d"', '{"user_id": "\ufffd\ufffd\ufffd"}'[:20], '{"user_id": "\ufffd"}',
    ]  # fmt: skip


def test_numbers_of_json_without_a_value_are_missing_and_large_ones_stay_texts(tmp_path):
    path = tmp_path / "log.jsonl"
    numbers = ["NaN", "Infinity", "-Infinity", "1e400", "null", "1" * 30, "1.50", "1e22", "9" * 5_000]
    path.write_text("".join(f'{{"user_id": 1, "item_id": 2, "timestamp": {n}}}\n' for n in numbers))
    rows, malformed = read(path)
    assert [row[2] for row in rows] == [None] * 5 + ["1" * 30, "1.50", "1e22"]
    # Python refuses to convert so many digits.
    assert [line[-13:] for line in malformed] == [" (5043 bytes)"]


def test_names_of_columns_are_quoted_so_that_blanks_and_characters_without_a_shape_are_seen(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(" user_id,user_id\t,user\u200b_id,\u00e9,it's,\x1b[1m,,item_id,timestamp\n1,2,3,4,5,6,7,8,9\n")
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value) == (
        f"{tmp_path.name}/log.csv: no column 'user_id' (mapped to user_id); it has ' user_id', 'user_id\\t', "
        "'user\\u200b_id', '\u00e9', \"it's\", '\\x1b[1m', '', 'item_id', 'timestamp'; fix the mapping"
    )
    path.write_text(",".join(f"c{number}{'x' * 100}" for number in range(1_000)) + "\n")
    with pytest.raises(DataError, match=r"it has 'c0x{58}'\.\.\., .* and 970 more; fix the mapping"):
        read(path)


@pytest.mark.parametrize("name", ["log.jsonl", "log.json"])
def test_a_key_that_stands_twice_costs_its_row_where_it_is_read(tmp_path, name):
    doubled = [
        '{"user_id": 1, "user_id": 2}',
        '{"user_id": 1, "user\\u005fid": 1}',
        '{"item_id": 1, "x": 2, "item_id": 3}',
    ]
    single = ['{"user_id": 1, "x": 2, "x": 3}', '{"user_id": 2, "x": {"user_id": 3, "user_id": 4}}']
    path, lines = tmp_path / name, [*doubled, *single]
    path.write_text(f"[{','.join(lines)}]" if name == "log.json" else "\n".join(lines))
    assert read(path) == ([("1", None, None), ("2", None, None)], doubled)


@pytest.mark.parametrize("name", ["log.jsonl", "log.json", "log.csv"])
def test_a_file_of_one_line_needs_no_end_of_it(tmp_path, name):
    path = tmp_path / name
    path.write_text(
        "user_id,item_id,timestamp" if name == "log.csv" else '{"user_id": 1, "item_id": 2, "timestamp": 3}'
    )
    assert read(path) == ([] if name == "log.csv" else [("1", "2", "3")], [])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_deep_nesting_costs_its_row(tmp_path, place):
    path, lines = tmp_path / "log.jsonl", ['{"user_id": 1}', '{"user_id": 3}']
    lines.insert(place, '{"x": ' + "[" * 100_000 + "]" * 100_000 + "}")
    path.write_text("\n".join(lines) + "\n")
    rows, malformed = read(path)
    assert rows == [("1", None, None), ("3", None, None)]
    assert len(malformed) == 1


def test_compressed_text_is_read(tmp_path):
    path = tmp_path / "log.csv.gz"
    path.write_bytes(gzip.compress(b"user_id,item_id,timestamp\n1,2,3\n"))
    assert read(path) == ([("1", "2", "3")], [])


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(b"\xef\xbb\xbfuser_id,item_id,timestamp\n1,2,3\n")
    assert read(path) == ([("1", "2", "3")], [])


field = st.text(st.characters(codec="utf-8", exclude_characters='\n\r\x00"\ufdd0'), max_size=4)


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(st.lists(field, min_size=1, max_size=4), max_size=12), block=st.integers(1, 40))
def test_any_block_size_reads_the_same_lines(tmp_path_factory, lines, block):
    path = tmp_path_factory.mktemp("csv") / "log.csv"
    texts = [",".join(fields) for fields in lines]
    path.write_text("user_id,item_id,timestamp\n" + "\n".join(texts), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_BLOCK_BYTES", block)
        rows, malformed = read(path, FileFormat(missing=()))
    full = [tuple(text.split(",")) for text in texts if text]
    assert rows == [fields for fields in full if len(fields) == 3]
    assert malformed == [",".join(fields) for fields in full if len(fields) != 3]


def test_a_missing_column_is_refused_with_those_that_exist(tmp_path):
    path = tmp_path / "log.parquet"
    pl.DataFrame({"user": [1], "item_id": [2], "timestamp": [3]}).write_parquet(path)
    with pytest.raises(DataError, match=r"log.parquet: no column 'user_id'.*it has 'user', 'item_id', 'timestamp'"):
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


@pytest.mark.parametrize("change", [{"format": "xml"}, {"encoding": "utf-16"}, {"separator": ""}, {"separator": "\r"}])
def test_a_wrong_format_is_refused(change):
    with pytest.raises(ValueError, match="must be"):
        FileFormat(**change)


@pytest.mark.parametrize("name", ["log.csv.gz", "log.jsonl.gz"])
def test_an_endless_line_in_a_small_file_is_one_malformed_row(tmp_path, name):
    path = tmp_path / name
    good = b'{"user_id": 1, "item_id": 2, "timestamp": 3}' if "jsonl" in name else b"1,2,3"
    header = b"" if "jsonl" in name else b"user_id,item_id,timestamp\n"
    path.write_bytes(gzip.compress(header + good + b"\n" + b"x" * (40 << 20) + b"\n" + good, compresslevel=1))
    assert path.stat().st_size < 400_000
    rows, (malformed,) = read(path)
    assert rows == [("1", "2", "3")] * 2
    assert len(malformed) < 1_100


def test_an_endless_first_line_is_refused(tmp_path):
    path = tmp_path / "log.csv.gz"
    path.write_bytes(gzip.compress(b"x" * (40 << 20), compresslevel=1))
    with pytest.raises(DataError, match=r"log.csv.gz: the first line cannot be read"):
        read(path)


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_times_in_many_forms_are_read_from_every_format(tmp_path, form):
    from pipeline.events import validate

    texts = ["2024-02-29", "2024-02-29 00:00", "2024-02-29T01:00:00.000+01:00", "1709164800", "1709164800.0", "soon"]
    path = tmp_path / f"log.{form}"
    if form == "csv":
        path.write_text("user_id,item_id,timestamp\n" + "".join(f"u,i,{text}\n" for text in texts))
    elif form == "jsonl":
        values = [*texts[:3], 1709164800, 1709164800.0, "soon"]
        rows = [{"user_id": "u", "item_id": "i", "timestamp": value} for value in values]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pl.DataFrame({"user_id": "u", "item_id": "i", "timestamp": texts}).write_parquet(path)
    (file,) = find_inputs(str(path), options=FileFormat())
    (block,) = read_blocks(file, mapping=MAPPING, options=FileFormat())
    types = {"user_id": "string", "item_id": "string"}
    found = validate(block.table, columns=EventColumns(), id_types=types, malformed=[])
    assert found.events["timestamp"].to_list() == [1_709_164_800_000] * 5
    assert found.rejected["reason"].to_list() == ["invalid time"]
