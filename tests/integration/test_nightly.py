"""Nights as a user types them: plan, first champion, nothing twice, no input, who the champion is, and back."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from mlflow.tracking import MlflowClient

from jobs.tracking.mlflow_runs import mlflow_client
from tests.support.commands import refused, solar
from tests.support.daily_log import events_of, write_day, write_nightly_recipe

RECIPE = {
    "nightly": "states: false",
    "more": 'notify: {command: "cat >> told.jsonl; echo >> told.jsonl"}',
}
"""What it adds to a small one; test_submitted_night.py has the users' states."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """Three days of a log; the second one is not there yet, and half of the third is broken."""
    directory = tmp_path_factory.mktemp("nights")
    write_nightly_recipe(directory / "shop.yaml", workspace=Path("workspace"), log=Path("log"), **RECIPE)
    write_day(directory / "log", 0)
    third = events_of(2)
    broken = third.with_columns(user_id=pl.when(pl.int_range(third.height) % 2 == 0).then(pl.col("user_id")))
    write_day(directory / "log", 2, events=broken)
    return directory


@pytest.fixture(scope="module")
def first_night(workplace) -> str:
    done = solar("nightly", "shop.yaml", "--date", "2026-03-01", cwd=workplace)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def told(workplace: Path) -> list[dict]:
    return [json.loads(line) for line in (workplace / "told.jsonl").read_text().splitlines()]


def client(workplace: Path) -> MlflowClient:
    return mlflow_client(f"sqlite:///{workplace}/workspace/mlflow/mlflow.db")


def test_plan_is_told_without_writing_anything(workplace):
    done = solar("nightly", "shop.yaml", "--date", "2026-03-01", "--dry-run", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert "champion     solar-daily has none: training from scratch" in done.stdout
    assert "judged by    requests from 2026-03-01 18:00 to 2026-03-02 00:00 UTC" in done.stdout
    assert {path.name for path in (workplace / "workspace").iterdir()} <= {"logs"}


def test_first_night_has_a_champion_a_report_and_tells_people(first_night, workplace):
    assert "2026-03-01 promoted: there is no champion yet" in first_night
    version = client(workplace).get_model_version_by_alias("solar-daily", "champion")
    assert version.version == 1
    report = workplace / "workspace/nightly/shop/2026-03-01/report.html"
    assert "promoted" in report.read_text()
    assert [(each["event"], each["date"], each["version"]) for each in told(workplace)] == [
        ("promoted", "2026-03-01", "1")
    ]
    tags = client(workplace).get_model_version("solar-daily", "1").tags
    assert tags["solar.night.verdict"] == "promoted"
    assert tags["solar.night.date"] == "2026-03-01"


def test_the_same_night_again_changes_nothing(first_night, workplace):
    before = {path: path.stat().st_mtime_ns for path in workplace.glob("workspace/nightly/**/*") if path.is_file()}
    again = solar("nightly", "shop.yaml", "--date", "2026-03-01", cwd=workplace)
    assert again.returncode == 0
    assert "2026-03-01 promoted: there is no champion yet" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(told(workplace)) == 1


def test_a_day_without_input_or_with_a_broken_one_is_for_later_and_says_so(first_night, workplace):
    missing = solar("nightly", "shop.yaml", "--date", "2026-03-02", cwd=workplace)
    assert missing.returncode == 75
    assert missing.stderr.strip() == (
        "solar: 2026-03-02: no input (no files in dt=2026-03-02) (exit code 75: try again later)"
    )
    broken = solar("nightly", "shop.yaml", "--date", "2026-03-03", "--catch-up", cwd=workplace)
    assert broken.returncode == 75
    # The night that was missed has ended; the third day's may still be mended.
    assert "2026-03-02 no_input: 2026-03-02: no input" in broken.stdout
    assert "rows are invalid (missing user: " in broken.stderr
    assert "above max_rejected_ratio 0.01" in broken.stderr
    events = [(each["event"], each["date"]) for each in told(workplace)]
    assert events[1:] == [("no_input", "2026-03-02"), ("no_input", "2026-03-02"), ("no_input", "2026-03-03")]


def test_late_and_mended_days_come_in_and_the_challenger_trains_on_all_that_is_new(first_night, workplace):
    write_day(workplace / "log", 1)
    write_day(workplace / "log", 2)
    done = solar("nightly", "shop.yaml", "--date", "2026-03-03", cwd=workplace)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2026-03-03" in solar("history", "solar-daily", cwd=workplace).stdout
    journal = workplace / "workspace/nightly/shop/2026-03-03"
    assert json.loads((journal / "prepare.json").read_text())["refused"] == {}
    days = json.loads((journal / "prepare.json").read_text())["days"]
    assert days["2026-03-02"]["accepted"] == events_of(1).height
    assert days["2026-03-03"]["rejected"] == 0
    trained = json.loads((journal / "train.json").read_text())
    assert trained["why_cold"] is None
    assert trained["requests"]["train_from"] == 1_772_380_800_000


def test_promote_rollback_and_history_keep_the_reasons(first_night, workplace):
    registry = client(workplace)
    number = str(registry.create_model_version("solar-daily", source="file:///nowhere").version)
    before = str(registry.get_model_version_by_alias("solar-daily", "champion").version)
    done = solar("promote", "solar-daily", "--version", number, "--why", "a hunch", cwd=workplace)
    assert done.stdout.strip() == f"solar-daily: version {number} is the champion, before it was {before}"
    back = solar("rollback", "solar-daily", "--why", "the hunch was wrong", cwd=workplace)
    assert back.stdout.strip() == f"solar-daily: version {before} is the champion again, instead of {number}"
    shown = solar("history", "solar-daily", cwd=workplace).stdout
    assert "a hunch" in shown
    assert "the hunch was wrong" in shown
    assert "there is no champion yet" in shown
    assert "no_input" in shown


def test_mistakes_are_one_line(first_night, workplace):
    assert "--date 2026-02-01: the night of" in refused("nightly", "shop.yaml", "--date", "2026-02-01", cwd=workplace)
    assert "'yesterday' is not a date: write it like 2026-11-21" in refused(
        "nightly", "shop.yaml", "--date", "yesterday", cwd=workplace
    )
    assert "data.prepare.daily.folder is not set" in refused("nightly", "movielens-100k", cwd=workplace)
    assert "no registered model 'shop': registered are solar-daily" in refused(
        "rollback", "shop", "--why", "x", cwd=workplace
    )
    (workplace / "open").mkdir()
    (workplace / "open").chmod(0o777)
    line = refused("nightly", "shop.yaml", "--date", "2026-03-04", "--workspace", "open", cwd=workplace)
    assert "chmod o-w open" in line
