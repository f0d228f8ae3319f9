"""Looking for events among those of earlier ingests, by their keys alone."""

import dataclasses

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from pipeline.shards.event_keys import EventKeys, Found, look_up, write_keys
from pipeline.shards.rows import UserRows
from pipeline.shards.vocabulary import Vocabulary

DAY = 86_400_000
VOCABULARY = Vocabulary.empty("int64").grow([5, 6, 7], ["click", "view"])


def keys(*rows, further=()):
    """Of events (user, item, time, action[, further columns])."""
    names = ["user_id", "item_id", "timestamp", "action", *further]
    table = pl.DataFrame([dict(zip(names, row, strict=True)) for row in rows]).sort("user_id", maintain_order=True)
    return EventKeys.of(UserRows.encode(table, VOCABULARY))


def stored(tmp_path, *parts):
    return [pq.ParquetFile(tmp_path / write_keys([part], path=str(tmp_path), bucket=0)["name"]) for part in parts]


def find(new, files, *, latest: int | None = 0, late_days=10_000):
    return [Found(n) for n in look_up(new, files=files, latest=latest, late_days=late_days).found]


def test_an_event_is_known_by_user_item_time_and_action(tmp_path):
    files = stored(tmp_path, keys(("a", 5, 1, "click"), ("b", 6, DAY, None)), keys(("c", 7, 9, "view")))
    new = keys(("a", 5, 1, "click"), ("a", 5, 1, "view"), ("a", 5, 2, "click"), ("a", 6, 1, "click"),
               ("b", 5, 1, "click"), ("b", 6, DAY, None), ("c", 7, 9, "view"))  # fmt: skip
    assert find(new, files) == [Found.SAME, *[Found.NEW] * 4, Found.SAME, Found.SAME]


def test_another_label_is_told_from_the_very_same_event(tmp_path):
    files = stored(tmp_path, labelled(("a", 5, 1, "click", 0, 1), ("a", 6, 1, "click", 1, 1)))
    new = labelled(("a", 5, 1, "click", 0, 1), ("a", 6, 1, "click", 0, 1), ("a", 7, 1, "click", 0, 1))
    assert find(new, files) == [Found.SAME, Found.OTHER, Found.NEW]


def labelled(*rows):
    """Of events (user, item, time, action, label, request)."""
    return keys(*rows, further=["label", "request_id"])


SAME_EVENT = ("a", 5, 1, "click")


@pytest.mark.parametrize(
    ("read", "new", "expected", "conflicts"),
    [
        # (label, request) of the rows read before, and of the new row.
        ([(0, 1)], (1, 1), Found.OTHER, 1),
        ([(1, 1)], (0, 1), Found.OTHER, 1),
        ([(1, 1), (0, 1)], (0, 9), Found.SAME, 0),
        ([(0, 1), (1, 1)], (1, 1), Found.SAME, 0),
        # Which of two requests is the smaller is not in the keys.
        ([(0, 1), (1, 1)], (1, 9), Found.OTHER, 0),
        ([(1, 1)], (1, 9), Found.OTHER, 0),
    ],
)
def test_a_row_is_written_again_if_it_may_win_or_brings_a_label(tmp_path, read, new, expected, conflicts):
    files = stored(tmp_path, *(labelled((*SAME_EVENT, *row)) for row in read))
    row = labelled((*SAME_EVENT, *new))
    found = look_up(row, files=files, latest=0, late_days=9)
    assert (found.found.tolist(), found.num_conflicting(row)) == ([expected], conflicts)
    assert found.is_complete


def test_keys_without_labels_leave_open_which_were_read_unless_the_row_is_the_same(tmp_path):
    old = dataclasses.replace(labelled((*SAME_EVENT, 1, 1)), labels=None)
    files = stored(tmp_path, old)
    assert look_up(labelled((*SAME_EVENT, 1, 1)), files=files, latest=0, late_days=9).is_complete
    assert not look_up(labelled((*SAME_EVENT, 0, 1)), files=files, latest=0, late_days=9).is_complete


def test_keys_from_before_the_log_had_requests_leave_it_open_which_event_stays(tmp_path):
    files = stored(tmp_path, keys(("a", 5, 1, "click")))
    assert find(keys(("a", 5, 1, "click", 3), further=["request_id"]), files) == [Found.OTHER]


def test_a_number_as_text_is_the_same_user():
    assert keys(("7", 5, 1, "click")).key.tolist() == keys((7, 5, 1, "click")).key.tolist()


@pytest.mark.parametrize(("num_old", "expected"), [(100, Found.SAME), (101, Found.UNCHECKED)])
def test_an_old_day_is_read_where_the_new_events_are_a_good_part_of_it(tmp_path, num_old, expected):
    files = stored(tmp_path, keys(*(("a", 5, time, "click") for time in range(num_old))))
    assert find(keys(("a", 5, 1, "click")), files, latest=9 * DAY, late_days=8) == [expected]
    assert find(keys(("a", 5, 1, "click")), files, latest=9 * DAY, late_days=9) == [Found.SAME]


def test_a_day_that_holds_nothing_is_new_however_old(tmp_path):
    files = stored(tmp_path, keys(("a", 5, 50 * DAY, "click")))
    assert find(keys(("a", 5, 1, "click")), files, latest=50 * DAY, late_days=0) == [Found.NEW]


def test_only_the_asked_days_are_read(tmp_path, monkeypatch):
    (file,) = stored(tmp_path, keys(*(("a", 5, day * DAY, "click") for day in range(9))))
    assert file.metadata.num_row_groups == 9
    read, original = [], pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, group: read.append(group) or original(self, group)
    )
    assert find(keys(("a", 5, 3 * DAY, "click"), ("a", 5, 20 * DAY, "click")), [file]) == [Found.SAME, Found.NEW]
    assert read == [3]


def test_a_log_without_time_is_one_day(tmp_path):
    def ordered(*orders):
        table = pl.DataFrame({"user_id": ["a"] * len(orders), "item_id": [5] * len(orders), "order": orders})
        return EventKeys.of(UserRows.encode(table, VOCABULARY))

    (file,) = stored(tmp_path, ordered(1, DAY, 5 * DAY))
    assert file.metadata.num_row_groups == 1
    assert find(ordered(DAY, DAY + 1), [file], latest=None) == [Found.SAME, Found.NEW]


def test_no_event_has_a_file_without_row_groups(tmp_path):
    empty = keys(("a", 5, 1, "click")).filter(np.array([False]))
    (file,) = stored(tmp_path, empty)
    assert find(keys(("a", 5, 1, "click")), [file]) == [Found.NEW]
