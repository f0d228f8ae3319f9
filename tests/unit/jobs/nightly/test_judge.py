"""How many held-out requests a night measures: what the latest comparison found to be needed."""

from __future__ import annotations

import dataclasses
import datetime

import pytest

from jobs.config.reader import load_config
from jobs.host.console import Console
from jobs.nightly.context import NightContext
from jobs.nightly.gate import Comparison
from jobs.nightly.judge import _enough_requests
from jobs.nightly.steps import Judgement, Outcome

COMPARED = Comparison(users=4_000, relative=0.0, low=-0.01, high=0.01, power=0.9, users_needed=3_000)


def night_of(directory, day: int) -> NightContext:
    config = load_config("nightly", "movielens-100k", ["--workspace", str(directory)])
    return NightContext.of(config, datetime.date(2026, 3, day), Console(), verbose=False)


def judged(night: NightContext, comparison: Comparison | None) -> None:
    main = night.config.model["name"]
    night.journal.write(
        Judgement(
            verdict="undecided", reasons=("few",), primary="ndcg@10", metrics={main: {"requests": 6_000.0}},
            comparisons={"tonight": comparison} if comparison else {},
        )
    )  # fmt: skip
    night.journal.write(
        Outcome(
            date=night.date, verdict="undecided", reasons=("few",), champion_before="1", champion="1", run_dir=None,
            refused_days={}, left_out_days={},
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("needed", "expected"),
    # Twice the users, 1.5 requests each; at least twice the gate's 200 users; without a known spread nothing.
    [(3_000, 9_000), (10, 600), (None, None)],
)
def test_the_latest_comparison_says_how_many_are_enough(tmp_path, needed, expected):
    judged(night_of(tmp_path, 1), dataclasses.replace(COMPARED, users_needed=50_000))
    judged(night_of(tmp_path, 2), dataclasses.replace(COMPARED, users_needed=needed))
    found = _enough_requests(night_of(tmp_path, 4))
    assert found == (expected or 150_000)


def test_nights_without_a_comparison_and_later_ones_say_nothing(tmp_path):
    judged(night_of(tmp_path, 1), None)
    judged(night_of(tmp_path, 9), COMPARED)
    assert _enough_requests(night_of(tmp_path, 4)) is None
