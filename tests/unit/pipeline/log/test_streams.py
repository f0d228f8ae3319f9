"""The content of files: compressed in any way, damaged, or not what the name says."""

import bz2
import gzip
import io
import lzma
import tracemalloc
import zipfile

import polars as pl
import pyarrow as pa
import pytest

from pipeline.events import DataError
from pipeline.log.inputs import FileFormat, find_inputs
from pipeline.log.readers import count_row_groups, read_blocks

TEXT = b"".join(b"%d,%d\n" % (n, n * n) for n in range(20_000))
HALF = len(TEXT) // 2


def zstd(data):
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(data)
    return packed.getvalue().to_pybytes()


def zipped(*contents):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, content in enumerate(contents):
            archive.writestr(f"day-{number}.csv", content)
    return packed.getvalue()


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
each_compression = pytest.mark.parametrize("ending", PACK)


def content(path, data, **options):
    path.write_bytes(data)
    (file,) = find_inputs(str(path), options=FileFormat(**options))
    with file.open() as stream:
        return stream.read()


@each_compression
def test_one_or_several_streams_in_a_file_are_all_read(tmp_path, ending):
    pack = PACK[ending]
    path = tmp_path / f"log.csv{ending.upper()}"
    assert content(path, pack(TEXT)) == TEXT
    assert content(path, pack(TEXT[:HALF]) + pack(b"") + pack(TEXT[HALF:])) == TEXT


@each_compression
def test_damage_anywhere_is_an_error(tmp_path, ending):
    pack = PACK[ending]
    first, whole = pack(TEXT[:HALF]), pack(TEXT)
    several = bytearray(first + pack(TEXT[HALF:]))
    several[len(first)] ^= 1
    path = tmp_path / f"log.csv{ending}"
    for data in (whole[: len(whole) // 2], whole[:-1], first + whole[:3], whole + b"more than that", bytes(several)):
        with pytest.raises((OSError, DataError), match=r"(?i)truncated|failed|format|corrupt|invalid|cannot be read"):
            content(path, data)


def test_a_damaged_file_is_named_when_its_rows_are_read(tmp_path):
    path = tmp_path / "log.csv.zst"
    path.write_bytes(zstd(b"user_id\n" + TEXT)[:-9])
    (file,) = find_inputs(str(path), options=FileFormat(header=("user_id", "item_id")))
    with pytest.raises(DataError, match=r"log.csv.zst: cannot be read \(Truncated"):
        list(read_blocks(file, mapping={"user_id": "user_id"}, options=FileFormat(header=("user_id", "item_id"))))


def test_a_zip_of_one_file_is_read_and_of_several_refused(tmp_path):
    assert content(tmp_path / "log.csv.zip", zipped(TEXT)) == TEXT
    with pytest.raises(DataError, match=r"log.csv.zip: holds 2 files; unpack it and name the directory"):
        content(tmp_path / "log.csv.zip", zipped(TEXT, TEXT))


def test_parquet_that_is_compressed_as_a_whole_is_read_in_one_part(tmp_path):
    table = pl.DataFrame({"user_id": range(1000)})
    plain = io.BytesIO()
    table.write_parquet(plain, row_group_size=100)
    path = tmp_path / "log.parquet.gz"
    path.write_bytes(gzip.compress(plain.getvalue()))
    (file,) = find_inputs(str(path), options=FileFormat())
    assert count_row_groups(file) == 1
    blocks = read_blocks(file, mapping={"user_id": "user_id"}, options=FileFormat(), row_group=0)
    assert pl.concat([block.table for block in blocks]).equals(table)
    path.write_bytes(gzip.compress(plain.getvalue())[:-20])
    with pytest.raises(DataError, match=r"log.parquet.gz: cannot be read \(Truncated"):
        file.open()


@pytest.mark.parametrize("ending", [*PACK, ".zip", ".parquet"])
@pytest.mark.parametrize("name", ["log.csv", "log.jsonl", "log.csv.gz", "log.csv.zst", "log.parquet"])
def test_a_file_that_holds_something_else_than_its_name_says_is_named(tmp_path, ending, name):
    parquet = io.BytesIO()
    pl.DataFrame({"a": [1]}).write_parquet(parquet)
    data = (PACK | {".zip": zipped, ".parquet": lambda _: parquet.getvalue()})[ending](TEXT)
    if name.endswith(ending):
        assert content(tmp_path / name, data)
        return
    with pytest.raises(DataError, match=rf"{name}: holds {ending} data, whatever its name says"):
        content(tmp_path / name, data)


def test_text_in_a_file_with_the_ending_of_a_compression_is_named(tmp_path):
    with pytest.raises(DataError, match=r"log.csv.xz: does not hold .xz data, whatever its name says"):
        content(tmp_path / "log.csv.xz", TEXT)
    with pytest.raises(DataError, match=r"log.csv.gz: holds .gz data, whatever"):
        content(tmp_path / "log.csv.gz", gzip.compress(gzip.compress(TEXT)))


def test_a_file_that_disappears_is_named(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(TEXT)
    (file,) = find_inputs(str(path), options=FileFormat())
    path.unlink()
    with pytest.raises(DataError, match=r"log.csv: cannot be opened \(No such file or directory\)"):
        file.open()


@each_compression
def test_what_expands_a_thousandfold_takes_little_memory(tmp_path, ending):
    path = tmp_path / f"log.csv{ending}"
    path.write_bytes(PACK[ending](b"0" * (64 << 20)))
    (file,) = find_inputs(str(path), options=FileFormat())
    with file.open() as stream:
        tracemalloc.start()
        total = 0
        while chunk := stream.read(1 << 20):
            total += len(chunk)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert total == 64 << 20
    # One chunk at each of the steps; the content has 64 MiB.
    assert peak < 16 << 20
