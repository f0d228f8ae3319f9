"""A night's journal: a step is noted once, whoever did it."""

from __future__ import annotations

import datetime
import json

import pytest

from jobs.host.errors import UserError
from jobs.nightly.journal import Journal, TryLater, past_nights
from jobs.nightly.nights import dates

DAYS = [datetime.date(2026, 3, day) for day in range(1, 8)]


def ended(root, day, verdict="promoted"):
    Journal(root, day).write("night", {"verdict": verdict})


def test_a_step_is_noted_once_and_the_second_process_learns_of_it(tmp_path):
    first, second = Journal(tmp_path, DAYS[0]), Journal(tmp_path, DAYS[0])
    assert first.read("train") is None
    assert first.write("train", {"steps": 3, "loss": float("nan"), "where": (1, 2)}) == second.read("train")
    assert second.read("train") == {"steps": 3, "loss": None, "where": [1, 2]}
    with pytest.raises(TryLater, match="another process did the step 'train'"):
        second.write("train", {"steps": 4})
    assert json.loads((tmp_path / "2026-03-01" / "train.json").read_text())["steps"] == 3


def test_a_night_that_starts_over_keeps_what_it_did_and_counts(tmp_path):
    journal = Journal(tmp_path, DAYS[0])
    for attempt in (1, 2, 3):
        assert journal.attempt == attempt
        journal.write("prepare", {"attempt": attempt})
        journal.start_over()
    assert journal.read("prepare") is None
    assert past_nights(tmp_path) == []


def test_nights_to_do(tmp_path):
    assert dates(tmp_path, DAYS[3], catch_up=True) == [DAYS[3]]
    ended(tmp_path, DAYS[0])
    ended(tmp_path, DAYS[2], "no_input")
    Journal(tmp_path, DAYS[3]).write("prepare", {})
    assert [night.date for night in past_nights(tmp_path)] == [DAYS[0], DAYS[2]]
    assert dates(tmp_path, DAYS[5], catch_up=True) == DAYS[3:6]
    assert dates(tmp_path, DAYS[5], catch_up=False) == [DAYS[5]]
    assert dates(tmp_path, DAYS[2], catch_up=True) == [DAYS[2]]
    with pytest.raises(UserError, match="--date 2026-03-02: the night of 2026-03-03 is done already"):
        dates(tmp_path, DAYS[1], catch_up=True)
