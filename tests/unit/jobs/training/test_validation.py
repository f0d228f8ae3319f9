"""How many requests a validation has, if nobody says; and which checkpoint is the best one."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from jobs.training import validation
from jobs.training.checkpoint import TrainState
from jobs.training.results import ScoredImpressions
from jobs.training.validation import LEAST_REQUESTS, MOST_REQUESTS, SHARE, TRAINED_PER_RANKED, Validation
from pipeline.batches.requests import RequestConfig


def chosen(*, scored: int, num_items: int, asked: int | None = None, task: str = "next_item") -> int:
    job = SimpleNamespace(training=SimpleNamespace(valid_requests=asked), requests=SimpleNamespace(task=task))
    validation = Validation(cast(Any, job), cast(Any, None), cast(Any, SimpleNamespace(num_items=num_items)))
    return validation._requests(TrainState(scored=scored))


def test_a_validation_costs_about_a_tenth_of_the_training_before_it():
    requests = chosen(scored=20_000_000, num_items=10_000)
    assert requests == 800
    assert requests * 10_000 == pytest.approx(SHARE * TRAINED_PER_RANKED * 20_000_000)


def test_it_has_neither_too_few_requests_to_choose_by_nor_more_than_are_needed():
    assert chosen(scored=1_000_000, num_items=1_000_000) == LEAST_REQUESTS
    assert chosen(scored=0, num_items=10) == LEAST_REQUESTS
    assert chosen(scored=10**12, num_items=1_000) == MOST_REQUESTS


def test_what_is_asked_for_is_done():
    assert chosen(scored=10, num_items=10**6, asked=0) == 0
    assert chosen(scored=10, num_items=10**6, asked=7_000) == 7_000


def test_impressions_are_not_ranked_among_all_items():
    assert chosen(scored=10, num_items=10**6, task="impressions") == MOST_REQUESTS


USERS, CANDIDATES = 60, 10


def scored(logit_of_positive: np.ndarray) -> ScoredImpressions:
    """Each user has one positive, with this logit [U]; the other candidates have 1, 2, ..."""
    logit = np.tile(np.arange(CANDIDATES, dtype=float), (len(logit_of_positive), 1))
    logit[:, 0] = logit_of_positive
    user = np.repeat(np.arange(len(logit_of_positive)), CANDIDATES)
    label = (np.arange(logit.size) % CANDIDATES == 0).astype(float)
    return ScoredImpressions(user, user, logit.ravel(), label, 0, len(logit_of_positive), 1, CANDIDATES)


def best_steps(monkeypatch, results: list[ScoredImpressions], *, warm_start: str | None = None) -> list[int]:
    """The best step after each validation, at steps 0, 1, ...; the state is stored and read again in between."""
    job = SimpleNamespace(requests=RequestConfig(task="impressions"), warm_start=warm_start)
    reporter, state, found = (
        SimpleNamespace(row=lambda *_, **__: None, should_stop=lambda: False),
        TrainState(valid_requests=0),
        [],
    )
    monkeypatch.setattr(validation, "evaluation_loader", lambda *_, **__: None)
    monkeypatch.setattr(validation, "_peak_gib", lambda: 0.0)
    for step, result in enumerate(results):
        monkeypatch.setattr(validation, "evaluate", lambda *_, result=result, **__: result)
        state = TrainState(**json.loads(json.dumps(dataclasses.asdict(state))))
        state.step = step
        Validation(cast(Any, job), *cast(Any, (None, None))).run(state, *cast(Any, (None, None, reporter)))
        found.append(state.best_step)
    return found


NOISE = np.random.default_rng(0).normal(0, 2, USERS)
BY_CHANCE = 5.5 + NOISE - NOISE.mean() + 0.1
CLEARLY = np.full(USERS, 6.5)


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        # Better on the whole, for half of the users: chance.
        ([BY_CHANCE], [0, 0]),
        ([CLEARLY], [0, 1]),
        ([BY_CHANCE, CLEARLY, BY_CHANCE], [0, 0, 2, 2]),
        # The later ones are compared with each other by the metric alone.
        ([CLEARLY, CLEARLY + (np.arange(USERS) == 0)], [0, 1, 2]),
    ],
)
def test_what_was_learned_takes_the_place_of_the_prior_only_if_the_difference_is_clear(monkeypatch, later, expected):
    results = [scored(value) for value in (np.full(USERS, 5.5), *later)]
    assert results[1].metrics()["gauc"] > results[0].metrics()["gauc"]
    assert best_steps(monkeypatch, results) == expected


def test_with_few_users_or_from_a_checkpoint_the_metric_alone_decides(monkeypatch):
    results = [scored(np.full(USERS, 5.5)), scored(BY_CHANCE)]
    assert best_steps(monkeypatch, results, warm_start="step-00000008") == [0, 1]
    few = [scored(np.full(9, 5.5)), scored(np.r_[np.full(5, 9.5), np.full(4, 2.5)])]
    assert few[1].metrics()["gauc"] > few[0].metrics()["gauc"]
    assert best_steps(monkeypatch, few) == [0, 1]
