"""A night's journal: a step is noted once, whoever did it."""

from __future__ import annotations

import datetime
import json
import math
from typing import Any

import pytest

from jobs.host.errors import UserError
from jobs.nightly.journal import Journal, TryLater, past_nights
from jobs.nightly.nights import dates
from jobs.nightly.steps import BuiltStates, ChampionBefore, Outcome, Prepared

DAYS = [datetime.date(2026, 3, day) for day in range(1, 8)]


def ended(root, day, verdict="promoted"):
    Journal(root, day).write(Outcome(date=day, verdict=verdict, reasons=("r",), champion=None))


def prepared(**fields) -> Prepared:
    whole: dict[str, Any] = {"manifest": 1, "events": 2, "days": {}, "refused": {}, "left_out": {}}
    return Prepared(**whole | fields)


def test_a_step_is_noted_once_and_the_second_process_learns_of_it(tmp_path):
    first, second = Journal(tmp_path, DAYS[0]), Journal(tmp_path, DAYS[0])
    assert first.read(Prepared) is None
    assert first.write(prepared(events=3, seconds=1.5)) == second.read(Prepared) == prepared(events=3, seconds=1.5)
    with pytest.raises(TryLater, match="another process did the step 'prepare'"):
        second.write(prepared(events=4))
    assert json.loads((tmp_path / "2026-03-01" / "prepare.json").read_text())["events"] == 3


def test_a_document_has_the_keys_that_apply_and_no_number_that_json_lacks(tmp_path):
    def stored(document) -> dict[str, Any]:
        journal.write(document)
        return json.loads(journal.file(type(document)).read_text())

    journal = Journal(tmp_path, DAYS[0])
    assert stored(ChampionBefore(version=None)) == {"version": None}
    assert stored(BuiltStates(built=None, why="none")) == {"built": None, "why": "none"}
    assert stored(Outcome(date=DAYS[0], verdict="failed", reasons=("r",), champion="1")) == {
        "date": "2026-03-01", "verdict": "failed", "reasons": ["r"], "champion": "1",
    }  # fmt: skip
    journal = Journal(tmp_path, DAYS[1])
    assert stored(ChampionBefore(version="1", metrics={"auc": math.nan}, primary="auc")) == {
        "version": "1", "checkpoint": None, "trained_until": None, "events_then": 0, "metrics": {"auc": None},
        "primary": "auc",
    }  # fmt: skip
    found = journal.read(ChampionBefore)
    assert found is not None
    assert found.metrics is not None
    assert math.isnan(found.metrics["auc"])


def test_a_document_without_a_key_that_it_needs_is_refused(tmp_path):
    (tmp_path / "2026-03-01").mkdir()
    journal = Journal(tmp_path, DAYS[0])
    journal.file(Prepared).write_text('{"manifest": 1, "of_a_later_version": 2}')
    with pytest.raises(ValueError, match="Prepared: the document has no 'events', it has manifest, of_a_later_version"):
        journal.read(Prepared)


def test_a_night_that_starts_over_keeps_what_it_did_and_counts(tmp_path):
    journal = Journal(tmp_path, DAYS[0])
    for attempt in (1, 2, 3):
        assert journal.attempt == attempt
        journal.write(prepared(manifest=attempt))
        journal.start_over()
    assert journal.read(Prepared) is None
    assert past_nights(tmp_path) == []


def test_nights_to_do(tmp_path):
    assert dates(tmp_path, DAYS[3], catch_up=True) == [DAYS[3]]
    ended(tmp_path, DAYS[0])
    ended(tmp_path, DAYS[2], "no_input")
    Journal(tmp_path, DAYS[3]).write(prepared())
    assert [night.date for night in past_nights(tmp_path)] == [DAYS[0], DAYS[2]]
    assert dates(tmp_path, DAYS[5], catch_up=True) == DAYS[3:6]
    assert dates(tmp_path, DAYS[5], catch_up=False) == [DAYS[5]]
    assert dates(tmp_path, DAYS[2], catch_up=True) == [DAYS[2]]
    with pytest.raises(UserError, match="--date 2026-03-02: the night of 2026-03-03 is done already"):
        dates(tmp_path, DAYS[1], catch_up=True)
