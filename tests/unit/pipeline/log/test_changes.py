"""A file that is not the same when it was read as when it was listed is refused, whatever the reader made of it."""

from __future__ import annotations

import os
import time

import fsspec
import pytest

from pipeline.events import DataError
from pipeline.log import changes, inputs
from pipeline.log.changes import unchanged
from pipeline.log.inputs import FileFormat, find_inputs
from tests.support.changed_files import WAYS, grown, overwritten

TEXT = b"user_id,item_id,timestamp\nu,a,1\nu,b,2\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "b.csv"
    path.write_bytes(TEXT)
    return path


def hashed(path, *, age_seconds=60.0):
    if "://" not in str(path):
        moment = time.time_ns() - int(age_seconds * 1e9)
        os.utime(path, ns=(moment, moment))
    return [(file, inputs.checksum(file)) for file in find_inputs(str(path), options=FileFormat())]


def happens(change, *paths, error=None):
    for path in paths:
        change(path)
    if error:
        raise error


@pytest.mark.parametrize("change", [*WAYS, os.remove])
@pytest.mark.parametrize("error", [None, DataError("b.csv: damaged"), OSError("gone"), IndexError("no such row group")])
def test_a_change_is_told_in_one_line_instead_of_what_it_caused(file, change, error):
    read = hashed(file)
    told = rf"^{file.parent.name}/b.csv changed while it was read; nothing was written; run the same command again$"
    with pytest.raises(DataError, match=told), unchanged(read):
        happens(change, file, error=error)


def test_files_that_stay_are_hashed_once_and_errors_stay_what_they_are(file, monkeypatch):
    read = hashed(file)
    monkeypatch.setattr(changes, "checksum", lambda file: pytest.fail("read again"))
    with unchanged(read):
        file.read_bytes()
    with pytest.raises(DataError, match=r"^b.csv: damaged$"), unchanged(read):
        raise DataError("b.csv: damaged")


def test_a_change_that_a_coarse_clock_hides_is_seen_in_the_bytes(file):
    [(young, checksum)] = hashed(file, age_seconds=0.5)
    with unchanged([(young, checksum)]):
        pass
    stamp = file.stat().st_mtime_ns
    with pytest.raises(DataError, match="changed while it was read"), unchanged([(young, checksum)]):
        happens(lambda path: (overwritten(path), os.utime(path, ns=(stamp, stamp))), file)


def test_of_several_files_one_is_named_and_the_others_counted(tmp_path, file):
    (tmp_path / "c.csv").write_bytes(TEXT + b"v,c,3\n")
    (tmp_path / "d.csv").write_bytes(TEXT + b"v,d,3\n")
    read = hashed(tmp_path)
    with (
        pytest.raises(DataError, match=r"/b.csv and 1 more file changed while they were read; nothing"),
        unchanged(read),
    ):
        happens(grown, file, tmp_path / "d.csv")


def test_a_store_tells_changes_by_its_time(monkeypatch):
    store = fsspec.filesystem("memory")
    store.pipe_file("/changes/b.csv", TEXT)
    read = hashed("memory://changes/b.csv")
    monkeypatch.setattr(changes, "checksum", lambda file: pytest.fail("read again"))
    with unchanged(read):
        pass
    with pytest.raises(DataError, match="changed while it was read"), unchanged(read):
        store.pipe_file("/changes/b.csv", TEXT.replace(b"u,", b"w,"))
    store.rm("/changes", recursive=True)
