"""How many requests are measured: a bound, or what fits the time; the trial that decides it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jobs.training import trial
from jobs.training.extent import EvaluationConfig, Extent, fitting
from pipeline.batches.requests import RequestConfig

REQUESTS = RequestConfig()


@pytest.mark.parametrize(
    ("each", "expected"), [(0.001, 20_000), (0.006, 20_000), (0.02, 5_000), (0.1, 1_000), (0.6, 200), (60.0, 200)]
)
def test_unset_bound_is_the_largest_step_that_fits(each, expected):
    assert fitting(120.0, each) == expected


def test_words_of_a_bound():
    assert EvaluationConfig().asked == "2 minutes"
    assert EvaluationConfig(requests=0).asked is None
    assert EvaluationConfig(requests=7, minutes=9).asked == "7 requests"


@pytest.mark.parametrize("wrong", [{"requests": -1}, {"minutes": 0}])
def test_bounds_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))}: it must be"):
        EvaluationConfig(**wrong)


def test_what_is_drawn_is_told_with_its_time_and_the_intervals_that_it_gives():
    drawn = Extent(limit=2_000, requests=8_600_000, seconds=110.0)
    assert drawn.told(REQUESTS) == (
        "2,000 of 8,600,000 requests, about 2 min for the first model; users are drawn, the same ones for every model "
        "(evaluation.requests, 0 = all); intervals of NDCG@10 will be about +-0.011"
    )
    assert Extent(limit=None, requests=943, seconds=None).told(REQUESTS) == "943 requests"
    assert (
        Extent(limit=None, requests=5_000_000, seconds=18_000.0)
        .told(REQUESTS)
        .endswith("about 5 h for the first model")
    )


@pytest.fixture
def extent(monkeypatch):
    """extent(requests of the part, seconds of a request, config): the trial runs on a clock of its own."""

    def run(whole: int, each: float, config: EvaluationConfig, enough: int | None = None) -> Extent:
        clock = [0.0]

        def evaluate(_model: Any, _tables: Any, loader: Any, **_: Any) -> None:
            clock[0] += loader.num_requests * each

        def evaluation_loader(*_: Any, limit: int, **__: Any) -> Any:
            return SimpleNamespace(num_requests=limit)

        monkeypatch.setattr(trial, "evaluate", evaluate)
        monkeypatch.setattr(trial, "evaluation_loader", evaluation_loader)
        # Of two users.
        counts = SimpleNamespace(requests=np.array([whole - 1, 1]))
        monkeypatch.setattr(trial, "part_counts", lambda *_: counts)
        monkeypatch.setattr(trial, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
        monkeypatch.setattr(trial.dist, "broadcast", lambda *_, **__: None)
        unused: Any = None
        return trial.extent_of(
            unused, unused, unused, config=config, catalogue=unused, requests=REQUESTS, part="test", enough=enough
        )

    return run


def test_a_small_part_is_measured_whole_and_without_a_trial(extent):
    assert extent(1_000, 99.0, EvaluationConfig()) == Extent(limit=None, requests=1_000, seconds=None)
    assert extent(900, 99.0, EvaluationConfig(requests=40)).limit == 40


def test_a_large_part_is_bounded_by_time_or_by_what_the_user_asks(extent):
    drawn = extent(10**7, 0.1, EvaluationConfig())
    assert (drawn.limit, drawn.requests) == (1_000, 10**7)
    assert drawn.seconds == pytest.approx(100.0)
    assert extent(10**7, 0.1, EvaluationConfig(minutes=20)).limit == 10_000
    assert extent(10**7, 0.1, EvaluationConfig(requests=300)).limit == 300
    whole = extent(10**7, 0.1, EvaluationConfig(requests=0))
    assert whole.limit is None
    assert whole.seconds == pytest.approx(10**6)
    # What fits is more than the part has.
    assert extent(6_040, 0.001, EvaluationConfig()).limit is None


def test_no_more_is_measured_than_the_decision_needs_and_no_more_than_fits(extent):
    assert extent(10**7, 0.1, EvaluationConfig(), 700).limit == 700
    assert extent(10**7, 0.1, EvaluationConfig(), 70_000).limit == 1_000
    assert extent(10**7, 0.1, EvaluationConfig(requests=300), 70).limit == 300
