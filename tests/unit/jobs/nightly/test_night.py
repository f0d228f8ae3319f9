"""The last steps of a night, where the registry is not as it was when the night began."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from jobs.config.reader import load_config
from jobs.host.console import Console
from jobs.nightly.context import NightContext
from jobs.nightly.gate import Comparison
from jobs.nightly.judge import _reference
from jobs.nightly.night import _register
from jobs.nightly.steps import ChampionBefore, EvaluatedChallenger, Judgement, TrainedChallenger
from jobs.tracking.champions import champion, nights, note_night, promote

TOGETHER = Comparison(users=300, relative=0.1, low=0.05, high=0.2, power=0.5, users_needed=None)
PROMOTED = Judgement(
    verdict="promoted", reasons=("better",), primary="gauc", metrics={"solar": {"gauc": 0.7}},
    comparisons={"together": TOGETHER},
)  # fmt: skip
BEFORE = ChampionBefore(version="1")
UNREAD = EvaluatedChallenger(directory=Path("unread"), reference=None, latencies=None)


@pytest.fixture
def night(tmp_path) -> NightContext:
    """A registry with versions 1 and 2, 1 is the champion."""
    config = load_config("nightly", "movielens-100k", ["--workspace", str(tmp_path)])
    config = dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, registered_model="shop"))
    night = NightContext.of(config, datetime.date(2026, 3, 2), Console(), verbose=False)
    night.client.create_registered_model("shop")
    for number in (1, 2):
        night.client.create_model_version("shop", source=f"file:///m-{number}")
    promote(night.client, "shop", "1", expected=None, why="first")
    return night


def serving(client: MlflowClient) -> str:
    found = champion(client, "shop")
    assert found is not None
    return str(found.version)


def trained(night: NightContext) -> TrainedChallenger:
    run = night.client.create_run(night.client.create_experiment("nights"))
    return TrainedChallenger(
        run_dir=Path("unread"), checkpoint=Path("unread"), key="k", mlflow_run_id=run.info.run_id, why_cold=None,
        requests=night.config.data.requests, training=night.config.training, steps=1, events=1, train_seconds=1.0,
    )  # fmt: skip


def test_a_champion_that_somebody_else_made_meanwhile_stays_and_the_night_is_undecided(night):
    promote(night.client, "shop", "2", expected="1", why="by hand")
    run = trained(night)
    ended = _register(night, BEFORE, run, UNREAD, PROMOTED)
    assert ended.verdict == "undecided"
    assert "the champion is version 2 by now, the decision was made against version 1" in ended.reasons[0]
    assert serving(night.client) == "2"
    noted = nights(night.client, "shop")["2026-03-02"]
    assert (noted["verdict"], noted["challenger"]) == ("undecided", 0.7)
    assert night.client.get_run(run.mlflow_run_id).data.tags["solar.night.verdict"] == "undecided"


def test_a_refused_challenger_is_no_version_and_its_figures_stay_with_the_model_and_its_run(night):
    run = trained(night)
    refused = dataclasses.replace(PROMOTED, verdict="refused", reasons=("worse " * 400,))
    ended = _register(night, BEFORE, run, UNREAD, refused)
    assert ended.champion == serving(night.client) == "1"
    assert len(night.client.search_model_versions("name = 'shop'")) == 2
    noted = nights(night.client, "shop")["2026-03-02"]
    assert (noted["relative"], noted["low"], noted["users"]) == (0.1, 0.05, 300)
    assert len(noted["reasons"][0]) == 500
    assert night.client.get_run(run.mlflow_run_id).data.tags["solar.night.low"] == "0.05"


def test_the_reference_is_the_champion_of_thirty_days_ago_on_every_seventh_night(night):
    note_night(night.client, "shop", "2026-01-20", {"verdict": "promoted", "champion": "1"})
    note_night(night.client, "shop", "2026-02-20", {"verdict": "promoted", "champion": "2"})
    days = [night.date + datetime.timedelta(days=n) for n in range(14)]
    asked = [_reference(dataclasses.replace(night, date=day), "2") for day in days]
    assert [day.toordinal() % 7 == 0 for day in days] == [found == "1" for found in asked]
    assert asked.count("1") == 2
    # It is the champion itself, or nobody was it then.
    assert {_reference(dataclasses.replace(night, date=day), "1") for day in days} == {None}
    early = [datetime.date(2026, 2, 10) + datetime.timedelta(days=n) for n in range(7)]
    assert {_reference(dataclasses.replace(night, date=day), "2") for day in early} == {None}
