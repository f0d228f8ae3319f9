"""An event log appears whole or not at all, whatever the system refuses."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from pipeline.events import DataError, NotNow
from pipeline.sources.event_log import EventLogWriter, find_event_log, write_event_log
from pipeline.storage import owner

EVENTS = pl.DataFrame({"user_id": [1, 2], "item_id": [3, 4], "timestamp": [5, 6]})


def fill(writer: EventLogWriter) -> None:
    writer.add_rejected(pl.DataFrame({"row": [9], "reason": ["missing user"]}))
    writer.add_events(EVENTS)


def full(*_, **__) -> None:
    raise OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left on device")


@pytest.mark.parametrize("method", ["write_table", "close"])
def test_a_full_disk_is_one_line_that_names_the_log_and_leaves_nothing(tmp_path, monkeypatch, method):
    out = tmp_path / "logs" / "shop"
    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, method, full)
        with pytest.raises(NotNow) as raised:
            write_event_log(str(out), source={}, fill=fill)
    assert str(raised.value) == f"{out}: No space left on device: free some disk; what was committed is still there"
    assert list(out.parent.iterdir()) == []
    assert write_event_log(str(out), source={}, fill=fill).events == 2


def test_a_mistake_in_the_source_is_not_hidden_by_the_disk(tmp_path, monkeypatch):
    def mistaken(writer: EventLogWriter) -> None:
        writer.add_events(EVENTS)
        raise DataError("log.csv: no column user_id")

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", full)
        with pytest.raises(DataError, match=r"^log\.csv: no column user_id$"):
            write_event_log(str(tmp_path / "shop"), source={}, fill=mistaken)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["log", "deep/log"])
def test_a_place_below_a_file_is_told(tmp_path, below):
    file: Path = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(DataError, match=rf"{file}.*: Not a directory: a part of this path is a file") as raised:
        write_event_log(str(file / below), source={}, fill=fill)
    assert not isinstance(raised.value, NotNow)
    assert file.read_text() == "mine"


def test_of_two_imports_at_once_the_later_may_be_tried_again(tmp_path):
    out = str(tmp_path / "shop")

    def overtaken(writer: EventLogWriter) -> None:
        write_event_log(out, source={"source": "files"}, fill=fill)
        fill(writer)

    with pytest.raises(NotNow, match=rf"^{out}: another import finished first; run again to reuse its log$"):
        write_event_log(out, source={"source": "files"}, fill=overtaken)
    assert [path.name for path in tmp_path.iterdir()] == ["shop"]
    assert find_event_log(out, source={"source": "files"}).reused  # type: ignore[union-attr]


def test_what_a_killed_import_left_is_removed_by_the_next_and_that_of_a_running_one_is_not(tmp_path):
    def killed(writer: EventLogWriter) -> None:
        (writer.folder / "events-00000.parquet").write_bytes(b"raw events")
        os._exit(9)

    def import_in_fork() -> None:
        if (child := os.fork()) == 0:
            write_event_log(str(tmp_path / "shop"), source={}, fill=killed)
        os.waitpid(child, 0)

    import_in_fork()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".shop-")
    others = [tmp_path / f".shop-{owner()}-x", tmp_path / f".shop-elsewhere-{2**22 + 1}-x", tmp_path / ".shopping-x"]
    for other in others:
        other.mkdir()
    # The log is written, or it is there already.
    for _ in range(2):
        assert left.exists()
        if find_event_log(str(tmp_path / "shop"), source={}) is None:
            write_event_log(str(tmp_path / "shop"), source={}, fill=fill)
        assert set(tmp_path.iterdir()) == {*others, tmp_path / "shop"}
        import_in_fork()
        (left,) = set(tmp_path.iterdir()) - {*others, tmp_path / "shop"}
