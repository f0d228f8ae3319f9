"""Metrics against scikit-learn and against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from models.metrics import (
    auc,
    bootstrap_interval,
    bootstrap_ratio_interval,
    calibration,
    gauc,
    hit_rate,
    log_loss,
    ndcg,
    rank_of_target,
    reciprocal_rank,
)

SCORES = st.sampled_from([0.0, 0.5, 1.0, -2.0, float("nan"), float("inf"), float("-inf")])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_rank_equals_brute_force(data: st.DataObject) -> None:
    num_items = data.draw(st.integers(1, 8))
    scores = data.draw(st.lists(SCORES, min_size=num_items, max_size=num_items))
    excluded = data.draw(st.lists(st.booleans(), min_size=num_items, max_size=num_items))
    target = data.draw(st.integers(0, num_items - 1))
    found = rank_of_target(torch.tensor([scores]), torch.tensor([target]), excluded_BI=torch.tensor([excluded])).item()
    others = [score for i, score in enumerate(scores) if i != target and not excluded[i]]
    if not math.isfinite(scores[target]):
        assert found == 1 + len(others)
    else:
        finite = [score for score in others if math.isfinite(score)]
        better = sum(score > scores[target] for score in finite)
        assert found == 1 + better + sum(score == scores[target] for score in finite) / 2


def test_target_competes_even_if_it_was_seen_before() -> None:
    logits_BI, excluded_BI = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[True, True, False]])
    assert rank_of_target(logits_BI, torch.tensor([1]), excluded_BI=excluded_BI).tolist() == [1.0]
    assert rank_of_target(logits_BI, torch.tensor([1])).tolist() == [2.0]


def test_constant_scores_rank_in_the_middle() -> None:
    assert rank_of_target(torch.zeros(1, 101), torch.tensor([7])).tolist() == [51.0]


def test_ranking_metrics_equal_scikit_learn_for_one_relevant_item() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BI = torch.randn(40, 30, generator=generator)
    target_B = torch.randint(0, 30, (40,), generator=generator)
    rank_B = rank_of_target(logits_BI, target_B)
    relevance = torch.nn.functional.one_hot(target_B, 30).numpy()
    for k in (1, 5, 10):
        expected = sklearn_metrics.ndcg_score(relevance, logits_BI.numpy(), k=k)
        assert ndcg(rank_B, k=k).mean() == pytest.approx(expected, rel=1e-12)  # The same sum in float64.
        top = sklearn_metrics.top_k_accuracy_score(target_B.numpy(), logits_BI.numpy(), k=k, labels=np.arange(30))
        assert hit_rate(rank_B, k=k).mean() == pytest.approx(top)
    # SciPy 1.18 computes the ranks of float32 in float32.
    expected = sklearn_metrics.label_ranking_average_precision_score(relevance, logits_BI.double().numpy())
    assert reciprocal_rank(rank_B, k=30).mean() == pytest.approx(expected, rel=1e-12)
    assert reciprocal_rank(rank_B, k=3)[rank_B.numpy() > 3].sum() == 0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.25, 3.0]), st.integers(0, 1)), min_size=1, max_size=40),
)
def test_auc_equals_scikit_learn_with_ties(pairs: list[tuple[float, int]]) -> None:
    score, label = np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs])
    if len(set(label.tolist())) < 2:
        assert math.isnan(auc(score, label))
    else:
        assert auc(score, label) == pytest.approx(sklearn_metrics.roc_auc_score(label, score), rel=1e-12)


def test_gauc_weighs_users_by_impressions_and_skips_one_class_users() -> None:
    generator = np.random.default_rng(0)
    user = np.repeat([5, 1, 9, 7], [30, 10, 4, 1])
    order = generator.permutation(user.size)
    user = user[order]
    score, label = generator.normal(size=user.size).round(1), generator.integers(0, 2, user.size)
    label[user == 9] = 1
    counted = [5, 1]
    values = [sklearn_metrics.roc_auc_score(label[user == one], score[user == one]) for one in counted]
    found = gauc(torch.tensor(score), torch.tensor(label), torch.tensor(user))
    assert found.value == pytest.approx(np.average(values, weights=[30, 10]), rel=1e-12)
    assert (found.num_users, found.num_users_skipped, found.num_impressions) == (2, 2, 40)


def test_gauc_without_any_user_is_nan() -> None:
    found = gauc([], [], [])
    assert math.isnan(found.value)
    assert math.isnan(gauc([0.1, 0.2], [1, 1], [0, 0]).value)


def test_log_loss_and_calibration_equal_scikit_learn_and_the_definition() -> None:
    generator = np.random.default_rng(0)
    logit, label = generator.normal(size=200) * 3, generator.integers(0, 2, 200)
    probability = 1 / (1 + np.exp(-logit))
    assert log_loss(logit, label) == pytest.approx(sklearn_metrics.log_loss(label, probability), rel=1e-9)
    assert calibration(logit, label) == pytest.approx(probability.sum() / label.sum(), rel=1e-12)
    assert log_loss([1000.0, -1000.0], [0, 1]) == 1000.0
    assert math.isnan(calibration([0.0], [0]))
    assert math.isnan(log_loss([], []))


def test_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = [
        interval.low <= 1.0 <= interval.high
        for interval in (
            bootstrap_interval(generator.exponential(size=200), seed=i, num_resamples=300, level=0.9)
            for i in range(200)
        )
    ]
    # 200 draws of a share of 0.9: standard deviation 0.021. Three of them, and 0.02 for the bootstrap's own bias.
    assert abs(np.mean(covered) - 0.9) < 0.085


def test_interval_follows_the_seed_alone() -> None:
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_ratio_is_resampled_in_pairs() -> None:
    baseline = np.random.default_rng(0).exponential(size=100)
    interval = bootstrap_ratio_interval(baseline * 1.5, baseline, seed=0)
    # The same users above and below: the ratio never varies.
    assert (interval.value, interval.low, interval.high) == pytest.approx((1.5, 1.5, 1.5))
    assert math.isinf(bootstrap_ratio_interval(baseline, np.zeros(100), seed=0).value)


@pytest.mark.parametrize("seed", range(3))
def test_a_ratio_to_what_is_often_nothing_has_an_end_at_infinity(seed: int) -> None:
    """Few users, of whom one has something below: without that one the ratio is x / 0."""
    interval = bootstrap_ratio_interval(np.ones(6), np.eye(6)[0], seed=seed)
    assert interval.value == 6
    assert 0 < interval.low < 6
    assert interval.high == math.inf


def test_intervals_refuse_what_has_no_users() -> None:
    with pytest.raises(ValueError, match="values is empty"):
        bootstrap_interval([], seed=0)
    with pytest.raises(ValueError, match="one value for each of the same users"):
        bootstrap_ratio_interval([1.0], [1.0, 2.0], seed=0)
