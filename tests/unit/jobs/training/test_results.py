"""Metrics over any part of the targets, counted by request and bootstrapped over users."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.training.results import RankedTargets, ScoredImpressions, length_buckets, primary_metric
from models.metrics import gauc, ndcg
from pipeline.batches.requests import RequestConfig


def ranked(**columns) -> RankedTargets:
    """Three users; user 0 has a request with two targets, user 2 a target that the model does not know."""
    values = {
        "user": [0, 0, 0, 1, 2],
        "request": [3, 3, 7, 0, 4],
        "history_length": [3, 3, 7, 0, 12_000],
        "rank_kept": [1.0, 4.0, 2.0, 30.0, np.inf],
        "rank_removed": [1.0, 2.0, 1.0, 20.0, np.inf],
        "tied": [False, False, True, False, False],
        "repeat": [False, True, False, False, False],
        "training_count": [5, 1, 0, 9, -1],
        "log_loss": [1.0, 3.0, 2.0, 4.0, 9.0],
    }
    arrays = {name: np.array(value) for name, value in (values | columns).items()}
    return RankedTargets(**arrays, recommended_items=12, catalogue_items=48)


def test_every_request_counts_once_however_many_targets_it_has():
    result = ranked()
    assert result.weight.tolist() == [0.5, 0.5, 1, 1, 1]
    metrics = result.metrics()
    assert (metrics["requests"], metrics["targets"]) == (4, 5)
    assert metrics["hr@10_seen_kept"] == (0.5 + 0.5 + 1) / 4
    assert metrics["ndcg@10_seen_kept"] == pytest.approx((0.5 * 1 + 0.5 / np.log2(5) + 1 / np.log2(3)) / 4)


def test_loss_counts_requests_once_and_coverage_is_of_the_catalogue():
    metrics = ranked().metrics()
    assert metrics["logloss"] == pytest.approx((0.5 * 1 + 0.5 * 3 + 2 + 4 + 9) / 4)
    assert metrics["coverage"] == 0.25


def test_with_seen_items_removed_repeated_targets_are_left_out():
    metrics = ranked().metrics()
    assert metrics["mrr@10"] == pytest.approx((0.5 * 1 + 1) / 3.5)
    assert metrics["ndcg@10_untied"] == pytest.approx(0.5 / 2.5)


def test_shares_of_repeats_untrained_and_unknown_targets():
    metrics = ranked().metrics()
    assert (metrics["share_repeats"], metrics["share_untrained"], metrics["share_unknown"]) == (0.125, 0.25, 0.25)


def test_slices_cover_what_is_reported_apart():
    slices = {name: np.flatnonzero(mask).tolist() for name, mask in ranked().slices().items()}
    assert slices["repeats"] == [1]
    assert slices["not in training"] == [2]
    assert slices["unknown to the model"] == [4]
    assert slices["1-9 events"] == [0, 1, 2]
    assert slices["no history"] == [3]
    assert slices["10,000 events or more"] == [4]
    assert "10-99 events" not in slices


def test_sums_per_user_give_the_mean_over_requests():
    result = ranked()
    for seen_items, ranks, chosen in (
        ("kept", result.rank_kept, np.ones(5, bool)),
        ("removed", result.rank_removed, ~result.repeat),
    ):
        values, weights = result.per_user(np.ones(5, bool), seen_items=seen_items)
        expected = (result.weight * ndcg(ranks, k=10))[chosen].sum() / result.weight[chosen].sum()
        assert values.sum() / weights.sum() == pytest.approx(expected)
        assert len(values) == 3


def test_buckets_are_by_powers_of_ten():
    lengths = np.array([0, 1, 9, 10, 99, 100, 999, 1_000, 9_999, 10_000, 1_000_000])
    found = {name: lengths[mask].tolist() for name, mask in length_buckets(lengths).items()}
    assert list(found.values()) == [[0], [1, 9], [10, 99], [100, 999], [1_000, 9_999], [10_000, 1_000_000]]


def test_sums_per_user_of_impressions_give_the_gauc():
    rng = np.random.default_rng(0)
    user, label = rng.integers(0, 20, 300), (rng.random(300) < 0.2).astype(np.float32)
    result = ScoredImpressions(
        user, user * 10, rng.random(300), label, skipped_requests=0, requests=30, recommended_items=3, catalogue_items=4
    )
    mask = user % 2 == 0
    values, weights = result.per_user(mask)
    assert values.sum() / weights.sum() == pytest.approx(gauc(result.logit[mask], label[mask], user[mask]).value)
    assert result.per_user(np.zeros(300, bool))[1].tolist() == []


@pytest.mark.parametrize(
    ("config", "metric"),
    [({}, "ndcg@10"), ({"seen_items": "kept"}, "ndcg@10_seen_kept"), ({"task": "impressions"}, "gauc")],
)
def test_the_primary_metric_follows_the_task(config, metric):
    assert primary_metric(RequestConfig(**config)) == metric
