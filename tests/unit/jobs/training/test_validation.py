"""How many requests a validation has, if nobody says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from jobs.training.checkpoint import TrainState
from jobs.training.validation import LEAST_REQUESTS, MOST_REQUESTS, SHARE, TRAINED_PER_RANKED, Validation


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
