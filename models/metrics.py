"""Metrics of ranking and of probability: pure functions of scores and labels.

Ranking (next item):  rank of the one relevant candidate among all -> HR@k, NDCG@k, MRR@k, one value per request.
Impressions:          AUC, GAUC, LogLoss, calibration over labelled candidates.
Uncertainty:          percentile bootstrap over users.

B requests, I items of the catalogue, M labelled candidates.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

FEWEST_USERS = 10
"""Fewer users resampled give intervals that are far too narrow; one user gives none at all."""


def rank_of_target(logits_BI: Tensor, target_B: Tensor, *, excluded_BI: Tensor | None = None) -> Tensor:
    """rank_B = 1 + (candidates with a higher score) + (others with the same score) / 2, float64.

    `excluded_BI` marks items that do not compete (seen before, padding); the target always competes. A target whose
    score is not finite is last; other items whose score is not finite never rank above the target.
    """
    target_logit_B1 = logits_BI.gather(1, target_B[:, None])
    competes_BI = torch.isfinite(logits_BI)
    if excluded_BI is not None:
        competes_BI = competes_BI & ~excluded_BI
    other_BI = torch.ones_like(competes_BI).scatter(1, target_B[:, None], False)
    better_B = (competes_BI & other_BI & (logits_BI > target_logit_B1)).sum(1).double()
    equal_B = (competes_BI & other_BI & (logits_BI == target_logit_B1)).sum(1).double()
    allowed_BI = other_BI if excluded_BI is None else other_BI & ~excluded_BI
    last_B = 1.0 + allowed_BI.sum(1).double()
    return torch.where(torch.isfinite(target_logit_B1[:, 0]), 1.0 + better_B + equal_B / 2, last_B)


def hit_rate(rank: ArrayLike | Tensor, *, k: int) -> NDArray[np.float64]:
    """1 where the target is among the first k, else 0."""
    return (_array(rank) <= k).astype(np.float64)


def ndcg(rank: ArrayLike | Tensor, *, k: int) -> NDArray[np.float64]:
    """1 / log2(1 + rank) where the target is among the first k, else 0. With one relevant item the ideal gain is 1."""
    ranks = _array(rank)
    return np.where(ranks <= k, 1 / np.log2(1 + ranks), 0.0)


def reciprocal_rank(rank: ArrayLike | Tensor, *, k: int) -> NDArray[np.float64]:
    """1 / rank where the target is among the first k, else 0."""
    ranks = _array(rank)
    return np.where(ranks <= k, 1 / ranks, 0.0)


def auc(score: ArrayLike | Tensor, label: ArrayLike | Tensor) -> float:
    """Probability that a positive scores above a negative, where ties count half; nan if a class is missing.

    (sum of the positives' mean ranks - P (P + 1) / 2) / (P Q) for P positives and Q negatives (Mann and Whitney).
    """
    scores, positive = _array(score), _array(label) > 0.5
    num_positive = int(positive.sum())
    num_negative = positive.size - num_positive
    if num_positive == 0 or num_negative == 0:
        return float("nan")
    _, group, size = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(size) - (size - 1) / 2
    above = mean_rank[group][positive].sum() - num_positive * (num_positive + 1) / 2
    return float(above / num_positive / num_negative)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gauc:
    """The mean of each user's AUC, weighted by the user's number of impressions."""

    value: float
    """nan if no user has both classes."""
    num_users: int
    """Users that have both classes."""
    num_users_skipped: int
    """Users with only one class, who have no AUC."""
    num_impressions: int
    """Impressions of the users that have both classes."""


def gauc(score: ArrayLike | Tensor, label: ArrayLike | Tensor, user: ArrayLike | Tensor) -> Gauc:
    """GAUC over [M] impressions; `user` holds any integer ids in any order."""
    scores, labels, users = _array(score), _array(label), np.asarray(user)
    if users.size == 0:
        return Gauc(value=float("nan"), num_users=0, num_users_skipped=0, num_impressions=0)
    order = np.argsort(users, kind="stable")
    cuts = np.nonzero(np.diff(users[order]))[0] + 1
    rows_per_user = np.split(order, cuts)
    values = np.array([auc(scores[rows], labels[rows]) for rows in rows_per_user])
    weights = np.array([rows.size for rows in rows_per_user], dtype=np.float64)
    counted = ~np.isnan(values)
    total = weights[counted].sum()
    return Gauc(
        value=float((values[counted] * weights[counted]).sum() / total) if counted.any() else float("nan"),
        num_users=int(counted.sum()),
        num_users_skipped=int((~counted).sum()),
        num_impressions=int(total),
    )


def log_loss(logit: ArrayLike | Tensor, label: ArrayLike | Tensor) -> float:
    """Mean binary cross-entropy of sigmoid(logit), in nats; nan without impressions."""
    logits, labels = _array(logit), _array(label)
    if logits.size == 0:
        return float("nan")
    return float((np.logaddexp(0, logits) - labels * logits).mean())


def calibration(logit: ArrayLike | Tensor, label: ArrayLike | Tensor) -> float:
    """Sum of predicted probabilities divided by the number of positives: 1 is calibrated; nan without positives."""
    logits, labels = _array(logit), _array(label)
    if labels.sum() == 0:
        return float("nan")
    return float(np.exp(-np.logaddexp(0, -logits)).sum() / labels.sum())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """A value and its bootstrap percentile interval over users."""

    value: float
    low: float
    high: float


def bootstrap_interval(values: ArrayLike, *, seed: int, num_resamples: int = 2000, level: float = 0.95) -> Interval:
    """The mean of `values` (one per user), and the interval that contains the share `level` of the resampled means."""
    per_user = _array(values)
    if per_user.size == 0:
        raise ValueError("values is empty: an interval needs at least one user; evaluate on more users")
    means = np.concatenate([per_user[chosen].mean(1) for chosen in _resamples(per_user.size, seed, num_resamples)])
    return _interval(float(per_user.mean()), means, level=level)


def bootstrap_ratio_interval(
    values: ArrayLike, baseline: ArrayLike, *, seed: int, num_resamples: int = 2000, level: float = 0.95
) -> Interval:
    """mean(values) / mean(baseline) over the same users, resampled together.

    The ratio is infinite if only the mean of `baseline` is 0, and nan if both means are 0.
    """
    above, below = _array(values), _array(baseline)
    if above.shape != below.shape or above.size == 0:
        raise ValueError(
            f"values {above.shape} and baseline {below.shape} must hold one value for each of the same users, "
            "at least one; evaluate both on the same requests"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.concatenate(
            [above[chosen].mean(1) / below[chosen].mean(1) for chosen in _resamples(above.size, seed, num_resamples)]
        )
        return _interval(float(above.mean() / np.float64(below.mean())), ratios, level=level)


def _resamples(num_users: int, seed: int, num_resamples: int):
    """Index arrays [n, num_users] of users drawn with replacement; an array has at most about 10 M entries."""
    generator = np.random.default_rng(seed)
    piece = max(1, min(num_resamples, 10_000_000 // num_users))
    for start in range(0, num_resamples, piece):
        yield generator.integers(0, num_users, size=(min(piece, num_resamples - start), num_users))


def _interval(value: float, resampled: NDArray[np.float64], *, level: float) -> Interval:
    """The interval from the quantiles of the resampled values; nan (from 0 / 0) is ignored."""
    known = resampled[~np.isnan(resampled)]
    if known.size == 0:
        return Interval(value=value, low=float("nan"), high=float("nan"))
    # Between a number and infinity (from x / 0) linear interpolation gives nan.
    method = "linear" if np.isfinite(known).all() else "nearest"
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2], method=method)
    return Interval(value=value, low=float(low), high=float(high))


def _array(value: ArrayLike | Tensor) -> NDArray[np.float64]:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    return np.asarray(value, dtype=np.float64)
