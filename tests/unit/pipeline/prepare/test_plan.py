"""What a run of prepare reads of the log, and what it leaves out."""

import dataclasses

import pytest

from pipeline.events import DataError
from pipeline.log.inputs import FileFormat
from pipeline.shards.manifest import current_manifest


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
