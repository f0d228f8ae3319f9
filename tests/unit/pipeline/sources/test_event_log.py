"""An event log appears whole or not at all, whatever the system refuses."""

from __future__ import annotations

import errno
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from pipeline.events import DataError, NotNow
from pipeline.sources.event_log import EventLogWriter, write_event_log

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
