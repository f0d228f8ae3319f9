"""Who must be forgotten: the ids of a file, each exactly as it stands there; by two readers that share no code."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import lzma
import zipfile
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.events import DataError
from pipeline.prepare.traces import listed_users
from pipeline.prepare.user_list import few_of, read_users, sort_out
from pipeline.shards.dataset import Shards
from pipeline.shards.tombstones import Tombstones

TEXTS = {
    "byte order mark": (b"\xef\xbb\xbfada\nbea\n", ["ada", "bea"]),
    "CRLF": (b"ada\r\nbea\r\n", ["ada", "bea"]),
    "no end of the last line": (b"ada\nbea", ["ada", "bea"]),
    "spaces and tabs": (b" ada\nbea \n\tcleo\n", ["\tcleo", " ada", "bea "]),
    "separators of Unicode": (
        "a\u2028b\nc\x85d\ne\x0bf\ng\x1ch\n".encode(),
        ["a\u2028b", "c\x85d", "e\x0bf", "g\x1ch"],
    ),
    "a lone CR": (b"a\rb\nc\r", ["a\rb", "c\r"]),
    "empty lines": (b"\nada\n\r\nada\n", ["ada"]),
    "a comma": (b"ada,1\n", ["ada,1"]),
    "quotes": (b'"ada"\n', ['"ada"']),
}


def both(path: Path, **options) -> list[str]:
    """What both readers read, which must be the same."""
    options = {"column": None, "integers": False, **options}
    ids = read_users(str(path), **options).ids
    assert listed_users(str(path), **options) == set(ids)
    return ids


@pytest.mark.parametrize("kind", TEXTS)
def test_a_line_is_an_id_as_it_stands(tmp_path, kind):
    content, ids = TEXTS[kind]
    path = tmp_path / "left"
    path.write_bytes(content)
    assert both(path) == ids


def test_empty_lines_are_counted(tmp_path):
    (tmp_path / "left.txt").write_text("\nada\n\n")
    assert read_users(str(tmp_path / "left.txt"), integers=False).empty == 2


def test_a_column_of_a_table_is_read_as_a_log_is(tmp_path):
    (tmp_path / "left.csv").write_bytes(b'\xef\xbb\xbfcustomer,note\r\n ada ,x\r\n"b,ea",y\r\n,z\r\n')
    (tmp_path / "left.tsv").write_bytes(b"note\tcustomer\nx\tada\n")
    (tmp_path / "left.jsonl").write_text('{"customer": "a\\nb"}\n{"customer": 7}\n{"other": 1}\n')
    pl.DataFrame({"customer": [3, None, 1]}).write_parquet(tmp_path / "left.parquet")
    pq.write_table(pa.table({"user_id": pa.array(["b", "a"]).dictionary_encode()}), tmp_path / "codes.parquet")
    assert both(tmp_path / "left.csv", column="customer") == [" ada ", "b,ea"]
    assert both(tmp_path / "left.tsv", column="customer") == ["ada"]
    assert both(tmp_path / "left.jsonl", column="customer") == ["7", "a\nb"]
    assert both(tmp_path / "left.parquet", column="customer") == ["1", "3"]
    assert both(tmp_path / "left.parquet", column="customer", integers=True) == ["1", "3"]
    assert both(tmp_path / "codes.parquet") == ["a", "b"]


def test_integer_ids_are_numbers_in_any_writing(tmp_path):
    (tmp_path / "left.txt").write_text("007\n-3\n7\n")
    assert both(tmp_path / "left.txt", integers=True) == ["-3", "7"]
    assert both(tmp_path / "left.txt") == ["-3", "007", "7"]


def test_mistakes_in_a_list_are_named(tmp_path):
    files = {
        "empty.txt": (b"\n", "names no user"),
        "latin.txt": (b"ada\nb\xe9a\n", "line 2 is not UTF-8 (b'b\\xe9a')"),
        "wide.txt": ("ada\n".encode("utf-16"), "line 1 is not UTF-8"),
        "odd.parquet": (b"x", "not a complete Parquet file"),
        "other.csv": (b"name\nada\n", "no column 'user_id'; it has 'name'"),
        "wide.csv": (b"user_id\nada,1\n", "'ada,1' cannot be read as a row"),
    }
    for name, (content, _) in files.items():
        (tmp_path / name).write_bytes(content)
    pl.DataFrame({"user_id": [1.0, None]}).write_parquet(tmp_path / "floats.parquet")
    (tmp_path / "folder").mkdir()
    wrong = {name: words for name, (_, words) in files.items()}
    wrong |= {"none.txt": "no such file", "floats.parquet": "has type Float64", "folder": "is a directory"}
    for name, words in wrong.items():
        with pytest.raises(DataError) as error:
            read_users(str(tmp_path / name), integers=False)
        assert words in str(error.value)
        assert "\n" not in str(error.value)
    (tmp_path / "left.txt").write_text("7\nada\n 8\n9.0\n99999999999999999999\n")
    with pytest.raises(DataError, match=r"4 of 5 ids are not integers .*: ' 8', '9.0', '99999999999999999999', 'ada'"):
        read_users(str(tmp_path / "left.txt"), integers=True)
    with pytest.raises(DataError, match="has no columns"):
        read_users(str(tmp_path / "left.txt"), column="x", integers=False)


def test_ids_are_told_without_control_characters_and_not_all_of_them():
    assert few_of(["a\x1b[2J", "b\u202e"]) == "'a\\x1b[2J', 'b\\u202e'"
    told = few_of([f"user-{number}" * 20 for number in range(1000)])
    assert told.endswith("... and 995 more")
    assert len(told) < 400


def test_users_are_sorted_out_by_what_a_data_set_knows_of_them(prepare, write_log, tmp_path):
    write_log({"user_id": ["a", "b"], "item_id": [1, 2], "timestamp": [1, 2]})
    prepare(tmp_path / "log", tmp_path / "out", buckets=1)
    data = Shards.open(str(tmp_path / "out"))
    assert sort_out(["a", "x"], data=data).unknown == ["x"]
    stones = Tombstones.empty(data.path).with_users(["x"]).write(data.path)
    known = sort_out(["a", "x", "y"], data=Shards(data.path, dataclasses.replace(data.manifest, tombstones=stones)))
    assert (known.found, known.forgotten, known.unknown) == (["a"], ["x"], ["y"])


@pytest.mark.parametrize("integers", [True, False])
def test_both_readers_take_json_numbers_as_a_log_does(tmp_path, integers):
    path = tmp_path / "left.jsonl"
    path.write_text('{"user_id": 1.0}\n{"user_id": 2}\n{"user_id": "3"}\n')
    assert both(path, integers=integers) == ["1", "2", "3"]


PACKED = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda text: pa.compress(text, "zstd", asbytes=True),
}


@pytest.mark.parametrize("ending", [*PACKED, "zip", "GZ"])
@pytest.mark.parametrize("name", ["left.csv", "left.jsonl", "left.json", "left.txt", "left"])
def test_both_readers_open_every_compression(tmp_path, name, ending):
    path = tmp_path / f"{name}.{ending}"
    rows = '{"user_id": "7"}', '{"user_id": "b ea"}'
    text = {
        "left.csv": "user_id\n7\nb ea\n", "left.jsonl": "\n".join(rows), "left.json": f"[{', '.join(rows)}]",
    }.get(name, "\ufeff7\r\nb ea")  # fmt: skip
    if ending == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, text)
    else:
        path.write_bytes(PACKED[ending.lower()](text.encode()))
    assert both(path) == ["7", "b ea"]


@pytest.mark.parametrize("name", ["a::b.csv", "a::b"])
def test_both_readers_open_every_name(tmp_path, name):
    (tmp_path / name).write_text("7\n8\n" if name == "a::b" else "user_id\n7\n8\n")
    assert both(tmp_path / name) == ["7", "8"]


def test_a_json_list_has_objects_and_compressed_ones_are_whole(tmp_path):
    path = tmp_path / "left.json"
    path.write_text('[{"customer": "u11"}, {"customer": 12.0}]')
    assert both(path, column="customer") == ["12", "u11"]
    for text in ('["u11", "u12"]', "u11\nu12\n"):
        path.write_text(text)
        with pytest.raises(DataError, match=r"u11.* cannot be read as a row; write objects with 'user_id', or"):
            read_users(str(path), integers=False)
    (tmp_path / "left.txt.gz").write_bytes(gzip.compress(b"".join(b"%d\n" % (n * n) for n in range(900_000)))[:-9])
    (tmp_path / "wrong.txt.gz").write_bytes(b"u11\n")
    for name, told in (("left.txt.gz", "cannot be read .*; copy it again"), ("wrong.txt.gz", "does not hold .gz data")):
        with pytest.raises(DataError, match=told) as error:
            read_users(str(tmp_path / name), integers=False)
        assert name in str(error.value)


@pytest.mark.parametrize(
    "content", ["user_id\nu2\nNaN\n", 'user_id,x\nu2,1\n"NULL",2\nNULL,3\n,4\n', 'user_id\n"a\nb"\n']
)
def test_both_readers_take_the_same_words_of_csv_for_no_value(tmp_path, content):
    (tmp_path / "users.csv").write_text(content)
    path = str(tmp_path / "users.csv")
    removal = read_users(path, integers=False).ids
    assert listed_users(path, column=None, integers=False) == set(removal)
    assert "NaN" not in removal
    assert ("NULL" in removal) == ('"NULL"' in content)
