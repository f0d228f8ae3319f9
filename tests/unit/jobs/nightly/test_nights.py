"""Nights that cannot be done now, and what becomes of those that were missed."""

from __future__ import annotations

import datetime

import pytest

from jobs.config.reader import load_config
from jobs.host.console import Console
from jobs.host.errors import UserError
from jobs.nightly import nights as nightly_module
from jobs.nightly.context import NightContext, nights_directory
from jobs.nightly.ingest_day import require_input
from jobs.nightly.journal import Journal, NoInput, TryLater
from jobs.nightly.nights import NightlyOptions, night_of, nightly, plan_lines
from jobs.nightly.steps import Outcome
from jobs.training.checkpoint import CheckpointError, CheckpointNotWritten
from pipeline.events import NotNow

DAY = datetime.date(2026, 3, 4)


@pytest.fixture
def config(tmp_path):
    folder = ["--data.prepare.daily.folder", "dt=%Y-%m-%d"]
    config = load_config("nightly", "movielens-100k", ["--workspace", str(tmp_path), *folder])
    last = Journal(nights_directory(config), DAY - datetime.timedelta(days=2))
    last.write(Outcome(date=last.date, verdict="promoted", reasons=("r",), champion="1"))
    return config


def refuse(monkeypatch, error: Exception) -> list[datetime.date]:
    """Every night raises this; the nights that were begun."""
    begun: list[datetime.date] = []

    def run_night(night):
        begun.append(night.date)
        raise error

    monkeypatch.setattr(nightly_module, "run_night", run_night)
    return begun


@pytest.mark.parametrize("error", [CheckpointNotWritten("run: not written"), NotNow("1 MiB free"), OSError(28, "full")])
def test_full_disk_is_no_reason_to_give_a_missed_night_up(config, monkeypatch, error):
    begun = refuse(monkeypatch, error)
    with pytest.raises(TryLater):
        nightly(config, NightlyOptions(date=DAY, catch_up=True), Console())
    missed = DAY - datetime.timedelta(days=1)
    assert begun == [missed]
    assert Journal(nights_directory(config), missed).ended is None


def test_missed_night_with_a_damaged_checkpoint_is_given_up_and_the_last_one_says_why(config, monkeypatch):
    begun = refuse(monkeypatch, CheckpointError("run: damaged"))
    with pytest.raises(CheckpointError, match="damaged"):
        nightly(config, NightlyOptions(date=DAY, catch_up=True), Console())
    missed = DAY - datetime.timedelta(days=1)
    assert begun == [missed, DAY]
    ended = Journal(nights_directory(config), missed).ended
    assert ended is not None
    assert (ended.verdict, ended.reasons) == ("failed", ("run: damaged",))


def test_names_of_columns_that_a_night_does_not_read_are_refused(tmp_path):
    recipe, daily = tmp_path / "shop.yaml", "daily: {folder: dt=%Y-%m-%d}"
    columns = "columns: {user_id: customer, item_id: sku, timestamp: at}"
    recipe.write_text(f"source: {{files: {{{columns}}}}}\ndata: {{events: /logs, prepare: {{{daily}}}}}\n")
    with pytest.raises(UserError, match=r"^source.files.columns: has no effect in a night, .* data.prepare.columns$"):
        night_of(load_config("nightly", str(recipe), []), NightlyOptions(date=DAY, catch_up=False))
    recipe.write_text(f"data: {{events: /logs, prepare: {{{daily}, {columns}}}}}\n")
    assert night_of(load_config("nightly", str(recipe), []), NightlyOptions(date=DAY, catch_up=False)) == DAY


def test_a_log_that_ended_long_ago_is_told_with_its_latest_day(tmp_path):
    for day in ("2025-10-20", "2025-10-21"):
        (tmp_path / "log" / f"dt={day}").mkdir(parents=True)
        (tmp_path / "log" / f"dt={day}" / "a.csv").write_text("user_id,item_id,timestamp\n1,2,3\n")
    daily = ("--data.events", str(tmp_path / "log"), "--data.prepare.daily.folder", "dt=%Y-%m-%d")
    config = load_config("nightly", "movielens-100k", ["--workspace", str(tmp_path / "ws"), *daily])
    why = (
        f"no input (no files in dt={DAY}); the latest complete day of the log is 2025-10-21: --date 2025-10-21 runs "
        "its night"
    )
    lines = plan_lines(config, NightlyOptions(date=DAY, catch_up=False))
    assert f"this night   {why}" in lines
    assert not [line for line in lines if line.startswith(("trained on", "judged by"))]
    with pytest.raises(NoInput) as caught:
        require_input(NightContext.of(config, DAY, Console(), verbose=False))
    assert str(caught.value) == f"{DAY}: {why}"
    # Where that day's night has been, nothing but waiting helps.
    last = Journal(nights_directory(config), datetime.date(2025, 10, 21))
    last.write(Outcome(date=last.date, verdict="promoted", reasons=("r",), champion="1"))
    with pytest.raises(NoInput, match=rf"no input \(no files in dt={DAY}\)$"):
        require_input(NightContext.of(config, DAY, Console(), verbose=False))


def test_night_before_the_last_one_is_refused(config):
    with pytest.raises(UserError, match="the night of 2026-03-02 is done already"):
        nightly(config, NightlyOptions(date=datetime.date(2026, 3, 1), catch_up=False), Console())
