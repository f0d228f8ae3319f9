"""What a run of prepare reads of the log, and what it leaves out."""

import dataclasses
import os

import pytest

from pipeline.events import DataError
from pipeline.log import readers
from pipeline.log.inputs import FileFormat
from pipeline.shards.inspection import verify
from pipeline.shards.manifest import current_manifest
from tests.support.changed_files import WAYS


def test_files_of_the_log_that_are_left_out_are_told_and_stand_in_the_manifest(prepare, write_log, tmp_path):
    rows = {"user_id": [1], "item_id": [5], "timestamp": [1]}
    log, out = tmp_path / "log", tmp_path / "out"
    for name in ("a", "same"):
        write_log(rows, f"log/{name}.parquet")
    write_log({**rows, "item_id": [6]}, "log/part-0")
    with pytest.raises(DataError, match=r"1 file is not read: log/part-0 .*--files.ignore PATTERN"):
        prepare(log, out)
    assert not out.exists()
    first = prepare(log, out, files=FileFormat(ignore="part-*"))
    told = ["1 file named by files.ignore: log/part-0", "1 file equal to another file in content: log/same.parquet"]
    assert (first.manifest.counts["read"], first.left_out) == (1, told)
    assert first.manifest.left_out == {
        "log/part-0": "named by files.ignore",
        "log/same.parquet": "equal to another file in content",
    }
    # Nothing is new, and the same is told; then the other files come in, too.
    again = prepare(log, out, files=FileFormat(ignore="part-*"))
    assert (again.reused, again.left_out) == (True, told)
    both = prepare(log, out, files=FileFormat(format="parquet"))
    assert (both.manifest.counts["read"], both.left_out) == (2, told[1:])
    assert current_manifest(str(out)) == both.manifest
    # A state that leaves out nothing has the bytes that it had before there was such a list.
    assert b"left_out" not in dataclasses.replace(both.manifest, left_out={}).to_bytes()


def test_a_log_a_table_and_a_data_set_may_have_any_name(prepare, write_log, tmp_path):
    write_log({"user_id": [1], "item_id": [5], "timestamp": [1]}, "s3::log [1]/day*.parquet")
    write_log({"item_id": [5], "kind": ["x"]}, "s3::log [1]/items.parquet")
    write_log({"user_id": [1], "plan": ["y"]}, "table::of [users].parquet")
    out = tmp_path / "out::[*]"
    first = prepare(tmp_path / "s3::log [1]", out, users=str(tmp_path / "table::of [users].parquet"))
    assert [entry["kind"] for entry in first.manifest.inputs] == ["events", "items", "users"]
    assert prepare(tmp_path / "s3::log [1]/day*.parquet", out, users=None).reused
    assert verify(str(out)) == []


@pytest.mark.parametrize("table", ["items", "users"])
def test_a_table_that_is_no_file_is_refused_by_its_kind(prepare, write_log, tmp_path, table):
    write_log({"user_id": [1], "item_id": [5], "timestamp": [1]})
    os.mkfifo(tmp_path / "fifo.parquet")
    os.symlink("nowhere", tmp_path / "log" / f"{table}.parquet")
    with pytest.raises(DataError, match=r"fifo.parquet: a FIFO; name a regular file"):
        prepare(tmp_path / "log", tmp_path / "out", **{table: str(tmp_path / "fifo.parquet")})
    with pytest.raises(DataError, match=rf"1 file is not read: log/{table}.parquet \(a link to nothing\)"):
        prepare(tmp_path / "log", tmp_path / "out")


@pytest.mark.parametrize("change", WAYS)
def test_a_file_that_changes_between_its_checksum_and_its_reading_is_not_ingested(
    prepare, tmp_path, monkeypatch, change
):
    (tmp_path / "log").mkdir()
    (tmp_path / "log/a.csv").write_text("user_id,item_id,timestamp\nu,a,1\n")
    first = prepare(tmp_path / "log", tmp_path / "out").manifest
    (tmp_path / "log/b.csv").write_text("user_id,item_id,timestamp\n" + "u,a,2\nu,b,3\n" * 50)
    with monkeypatch.context() as patch:
        original = readers.read_blocks
        patch.setattr(
            readers, "read_blocks", lambda file, **named: change(tmp_path / "log/b.csv") or original(file, **named)
        )
        with pytest.raises(DataError, match=r"^log/b.csv changed while it was read; nothing was written; run the same"):
            prepare(tmp_path / "log", tmp_path / "out")
    assert current_manifest(str(tmp_path / "out")) == first
    again = prepare(tmp_path / "log", tmp_path / "out", max_rejected_ratio=0.5).manifest
    lines = (tmp_path / "log/b.csv").read_text().splitlines()
    assert again.counts["read"] == 1 + len(lines) - 1


def test_a_table_that_changes_while_it_is_read_is_not_ingested(prepare, write_log, tmp_path, monkeypatch):
    write_log({"user_id": [1], "item_id": [5], "timestamp": [1]})
    table = write_log({"item_id": [5], "kind": ["x"]}, "log/items.parquet")
    original = readers.read_blocks

    def changed(file, **named):
        write_log({"item_id": [5], "kind": ["y"]}, "log/items.parquet")
        return original(file, **named)

    monkeypatch.setattr(readers, "read_blocks", changed)
    with pytest.raises(DataError, match=rf"^log/{table.name} changed while it was read"):
        prepare(tmp_path / "log", tmp_path / "out")
    assert current_manifest(str(tmp_path / "out")) is None
