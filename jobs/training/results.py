"""The results of an evaluation, one entry per target or candidate, and the metrics over any subset. Pure numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from models.metrics import auc, calibration, gauc, hit_rate, log_loss, ndcg, reciprocal_rank
from pipeline.batches.requests import RequestConfig

CUTOFFS = (5, 10, 20)
LENGTH_BUCKETS = (0, 1, 10, 100, 1_000, 10_000)
"""Lower bounds of the groups of history lengths that are reported separately."""


def primary_metric(requests: RequestConfig) -> str:
    """The metric by which checkpoints, and later models, are compared; higher is better."""
    if requests.task == "impressions":
        return "gauc"
    return "ndcg@10" if requests.seen_items == "removed" else "ndcg@10_seen_kept"


@dataclasses.dataclass(frozen=True)
class RankedTargets:
    """Results of `next_item`, one entry per target, in the order of users and requests."""

    user: np.ndarray
    """[T] the user's row in the shard index."""
    request: np.ndarray
    """[T] key of the request, unique among the requests of a user."""
    history_length: np.ndarray
    """[T] events before the request."""
    rank_kept: np.ndarray
    """[T] rank of the target, 1 = best, among all items, including those that the user has seen, without other targets
    of the same request. Infinite if the model does not know the item."""
    rank_removed: np.ndarray
    """[T] the same without the items that the user has seen (other than the target)."""
    tied: np.ndarray
    """[T] whether the event before the target has the same time stamp: only the log's tie-break orders the two."""
    repeat: np.ndarray
    """[T] whether the target is in the history, that is, the user has seen it before."""
    training_count: np.ndarray
    """[T] how often the target is a positive of the model's training requests; -1 = the model does not know it."""
    log_loss: np.ndarray
    """[T] -log of the target's probability, which is 0.99 x its softmax over the model's catalogue + 0.01 / the number
    of items in the data; nan if scores are not logits."""
    recommended_items: int
    """Number of distinct items among the ten best of all requests."""
    catalogue_items: int
    """Number of items that can be recommended."""

    @property
    def weight(self) -> np.ndarray:
        """[T] 1 / number of targets of the request, so that every request has the same weight."""
        _, place, counts = np.unique(
            np.stack([self.user, self.request]), axis=1, return_inverse=True, return_counts=True
        )
        return 1.0 / counts[place.reshape(-1)]

    def metrics(self) -> dict[str, float]:
        """Means over requests; a request with several targets counts with the mean over its targets.

        Without a suffix: seen items are removed, and only targets that are new to their user count. `_seen_kept`: seen
        items stay in the ranking, and all targets count. `users_new`, `users` and `users_untied`: the users that count
        in these two and in `ndcg@10_untied`.
        """
        weight, new = self.weight, ~self.repeat
        values = {"requests": _total(weight), "targets": float(len(self.user))}
        values |= {"users": _users(self.user), "users_new": _users(self.user[new])}
        for suffix, ranks, chosen in (
            ("", self.rank_removed, new),
            ("_seen_kept", self.rank_kept, np.ones(len(new), bool)),
        ):
            for cutoff in CUTOFFS:
                for name, metric in (("hr", hit_rate), ("ndcg", ndcg), ("mrr", reciprocal_rank)):
                    values[f"{name}@{cutoff}{suffix}"] = _mean(metric(ranks, k=cutoff), weight, chosen)
        untied = ~self.tied
        values["requests_untied"] = _total(weight[untied])
        values["users_untied"] = _users(self.user[new & untied])
        values["ndcg@10_untied"] = _mean(ndcg(self.rank_removed, k=10), weight, new & untied)
        values["share_repeats"] = _mean(self.repeat, weight)
        values["share_untrained"] = _mean(self.training_count == 0, weight)
        values["share_unknown"] = _mean(self.training_count < 0, weight)
        values["logloss"] = _mean(self.log_loss, weight)
        values["coverage"] = _share(self.recommended_items, self.catalogue_items)
        return values

    def slices(self) -> Mapping[str, np.ndarray]:
        """{name: [T] mask} of the subsets that are reported separately."""
        return {
            "all targets": np.ones(len(self.user), bool),
            "new to the user": ~self.repeat,
            "repeats": self.repeat,
            "in training": self.training_count > 0,
            "not in training": self.training_count == 0,
            "unknown to the model": self.training_count < 0,
        } | {name: mask for name, mask in length_buckets(self.history_length).items()}

    def per_user(self, mask: np.ndarray, *, seen_items: str, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
        """(sum of weighted NDCG@k, sum of weights) for every user with a target in `mask`."""
        ranks = self.rank_removed if seen_items == "removed" else self.rank_kept
        mask = mask & ~self.repeat if seen_items == "removed" else mask
        _, place = np.unique(self.user[mask], return_inverse=True)
        weight = self.weight[mask]
        return np.bincount(place, weights=weight * ndcg(ranks[mask], k=k)), np.bincount(place, weights=weight)


@dataclasses.dataclass(frozen=True)
class ScoredImpressions:
    """Results of `impressions`, one entry per candidate."""

    user: np.ndarray
    history_length: np.ndarray
    logit: np.ndarray
    label: np.ndarray
    skipped_requests: int
    """Number of requests left out because their history is shorter than `min_history`."""
    requests: int
    recommended_items: int
    """Number of distinct items that rank first in a request."""
    catalogue_items: int
    """Number of distinct items among the candidates."""

    def metrics(self) -> dict[str, float]:
        by_user = gauc(self.logit, self.label, self.user)
        return {
            "requests": float(self.requests),
            "requests_skipped": float(self.skipped_requests),
            "candidates": float(len(self.label)),
            "users": _users(self.user),
            "auc": auc(self.logit, self.label),
            "gauc": by_user.value,
            "gauc_users": float(by_user.num_users),
            "gauc_users_skipped": float(by_user.num_users_skipped),
            "logloss": log_loss(self.logit, self.label),
            "calibration": calibration(self.logit, self.label),
            "coverage": _share(self.recommended_items, self.catalogue_items),
        }

    def slices(self) -> Mapping[str, np.ndarray]:
        """{name: [M] mask} of the subsets that are reported separately."""
        everything = {"all candidates": np.ones(len(self.user), bool)}
        return everything | {name: mask for name, mask in length_buckets(self.history_length).items()}

    def per_user(self, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(AUC x candidates, candidates) for every user with both labels in `mask`; GAUC is the ratio of their sums."""
        order = np.flatnonzero(mask)[np.argsort(self.user[mask], kind="stable")]
        edges = np.flatnonzero(np.diff(self.user[order])) + 1
        values = [(auc(self.logit[rows], self.label[rows]), len(rows)) for rows in np.split(order, edges) if len(rows)]
        known = np.array([(value * count, count) for value, count in values if value == value]).reshape(-1, 2)
        return known[:, 0], known[:, 1]


def primary_per_user(
    result: RankedTargets | ScoredImpressions, *, requests: RequestConfig, mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(sum of the primary metric times weight, sum of weights) for every user that counts in `mask`; None = all."""
    mask = np.ones(len(result.user), bool) if mask is None else mask
    if isinstance(result, RankedTargets):
        return result.per_user(mask, seen_items=requests.seen_items)
    return result.per_user(mask)


def length_buckets(history_length: np.ndarray) -> dict[str, np.ndarray]:
    """{"10-99 events": [n] mask} for every bucket that is not empty."""
    bucket = np.searchsorted(LENGTH_BUCKETS, history_length, side="right") - 1
    names = {0: "no history", len(LENGTH_BUCKETS) - 1: f"{LENGTH_BUCKETS[-1]:,} events or more"}
    for number in range(1, len(LENGTH_BUCKETS) - 1):
        names[number] = f"{LENGTH_BUCKETS[number]:,}-{LENGTH_BUCKETS[number + 1] - 1:,} events"
    return {names[number]: bucket == number for number in sorted(names) if (bucket == number).any()}


def _mean(values: np.ndarray, weight: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Weighted mean over `mask`; nan if it is empty."""
    if mask is not None:
        values, weight = values[mask], weight[mask]
    total = weight.sum()
    return float((values * weight).sum() / total) if total > 0 else float("nan")


def _users(user: np.ndarray) -> float:
    return float(len(np.unique(user)))


def _share(count: int, total: int) -> float:
    return count / total if total else float("nan")


def _total(weight: np.ndarray) -> float:
    return float(round(weight.sum(), 6))
