"""What an evaluation measured, one entry a target or candidate, and the metrics over any part of it. Pure numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from models.metrics import auc, calibration, gauc, hit_rate, log_loss, ndcg, reciprocal_rank
from pipeline.batches.requests import RequestConfig

CUTOFFS = (5, 10, 20)
LENGTH_BUCKETS = (0, 1, 10, 100, 1_000, 10_000)
"""Lower bounds of the history lengths that are reported apart."""


def primary_metric(requests: RequestConfig) -> str:
    """What decides which step, and later which model, is better."""
    if requests.task == "impressions":
        return "gauc"
    return "ndcg@10" if requests.seen_items == "removed" else "ndcg@10_seen_kept"


@dataclasses.dataclass(frozen=True)
class RankedTargets:
    """Results of `next_item`, one entry a target, in the order of users and requests."""

    user: np.ndarray
    """[T] the user's row in the shard index."""
    request: np.ndarray
    """[T] tells the requests of a user apart."""
    history_length: np.ndarray
    """[T] events before the request."""
    rank_kept: np.ndarray
    """[T] 1 = best; seen items stay in the ranking, other targets of the same request do not. Infinite where the model
    does not know the item."""
    rank_removed: np.ndarray
    """[T] the same without seen items (other than the target)."""
    tied: np.ndarray
    """[T] the target shares its time stamp with the event before it: only the log's tie-break says which came first."""
    repeat: np.ndarray
    """[T] the target stands in the history: recommending it is recommending something seen."""
    training_count: np.ndarray
    """[T] how often the target is a positive of the model's training requests; -1 where the model does not know it."""
    log_loss: np.ndarray
    """[T] -log of the target's probability: its share in the softmax over the model's catalogue, a hundredth of which
    is spread evenly over all items of the data; nan where scores are no logits."""
    recommended_items: int
    """Distinct items among the ten best of all requests."""
    catalogue_items: int
    """Items that could be."""

    @property
    def weight(self) -> np.ndarray:
        """[T] 1 / targets of the request: every request counts once."""
        _, place, counts = np.unique(
            np.stack([self.user, self.request]), axis=1, return_inverse=True, return_counts=True
        )
        return 1.0 / counts[place.reshape(-1)]

    def metrics(self) -> dict[str, float]:
        """Means over requests; of a request with several targets, the mean over them.

        Without a suffix: seen items removed, over targets new to their user. `_seen_kept`: over all targets.
        """
        weight, new = self.weight, ~self.repeat
        values = {"requests": _total(weight), "targets": float(len(self.user))}
        for suffix, ranks, chosen in (
            ("", self.rank_removed, new),
            ("_seen_kept", self.rank_kept, np.ones(len(new), bool)),
        ):
            for cutoff in CUTOFFS:
                for name, metric in (("hr", hit_rate), ("ndcg", ndcg), ("mrr", reciprocal_rank)):
                    values[f"{name}@{cutoff}{suffix}"] = _mean(metric(ranks, k=cutoff), weight, chosen)
        untied = ~self.tied
        values["requests_untied"] = _total(weight[untied])
        values["ndcg@10_untied"] = _mean(ndcg(self.rank_removed, k=10), weight, new & untied)
        values["share_repeats"] = _mean(self.repeat, weight)
        values["share_untrained"] = _mean(self.training_count == 0, weight)
        values["share_unknown"] = _mean(self.training_count < 0, weight)
        values["logloss"] = _mean(self.log_loss, weight)
        values["coverage"] = _share(self.recommended_items, self.catalogue_items)
        return values

    def slices(self) -> Mapping[str, np.ndarray]:
        """{name: [T] mask} of what is reported apart."""
        return {
            "all targets": np.ones(len(self.user), bool),
            "new to the user": ~self.repeat,
            "repeats": self.repeat,
            "in training": self.training_count > 0,
            "not in training": self.training_count == 0,
            "unknown to the model": self.training_count < 0,
        } | {name: mask for name, mask in length_buckets(self.history_length).items()}

    def per_user(self, mask: np.ndarray, *, seen_items: str, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
        """(sum of weighted NDCG@k, sum of weights) of every user that has a target in `mask`."""
        ranks = self.rank_removed if seen_items == "removed" else self.rank_kept
        mask = mask & ~self.repeat if seen_items == "removed" else mask
        _, place = np.unique(self.user[mask], return_inverse=True)
        weight = self.weight[mask]
        return np.bincount(place, weights=weight * ndcg(ranks[mask], k=k)), np.bincount(place, weights=weight)


@dataclasses.dataclass(frozen=True)
class ScoredImpressions:
    """Results of `impressions`, one entry a candidate."""

    user: np.ndarray
    history_length: np.ndarray
    logit: np.ndarray
    label: np.ndarray
    skipped_requests: int
    """Requests left out because their history was shorter than `min_history`."""
    requests: int
    recommended_items: int
    """Distinct items that come first in a request."""
    catalogue_items: int
    """Distinct items that were shown."""

    def metrics(self) -> dict[str, float]:
        by_user = gauc(self.logit, self.label, self.user)
        return {
            "requests": float(self.requests),
            "requests_skipped": float(self.skipped_requests),
            "candidates": float(len(self.label)),
            "auc": auc(self.logit, self.label),
            "gauc": by_user.value,
            "gauc_users": float(by_user.num_users),
            "gauc_users_skipped": float(by_user.num_users_skipped),
            "logloss": log_loss(self.logit, self.label),
            "calibration": calibration(self.logit, self.label),
            "coverage": _share(self.recommended_items, self.catalogue_items),
        }

    def slices(self) -> Mapping[str, np.ndarray]:
        """{name: [M] mask} of what is reported apart."""
        everything = {"all candidates": np.ones(len(self.user), bool)}
        return everything | {name: mask for name, mask in length_buckets(self.history_length).items()}

    def per_user(self, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(AUC x candidates, candidates) of every user that has both labels in `mask`: sums give the GAUC."""
        order = np.flatnonzero(mask)[np.argsort(self.user[mask], kind="stable")]
        edges = np.flatnonzero(np.diff(self.user[order])) + 1
        values = [(auc(self.logit[rows], self.label[rows]), len(rows)) for rows in np.split(order, edges) if len(rows)]
        known = np.array([(value * count, count) for value, count in values if value == value]).reshape(-1, 2)
        return known[:, 0], known[:, 1]


def length_buckets(history_length: np.ndarray) -> dict[str, np.ndarray]:
    """{"10-99 events": [n] mask} for every bucket that is not empty."""
    bucket = np.searchsorted(LENGTH_BUCKETS, history_length, side="right") - 1
    names = {0: "no history", len(LENGTH_BUCKETS) - 1: f"{LENGTH_BUCKETS[-1]:,} events or more"}
    for number in range(1, len(LENGTH_BUCKETS) - 1):
        names[number] = f"{LENGTH_BUCKETS[number]:,}-{LENGTH_BUCKETS[number + 1] - 1:,} events"
    return {names[number]: bucket == number for number in sorted(names) if (bucket == number).any()}


def _mean(values: np.ndarray, weight: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Weighted mean over `mask`; nan where there is nothing."""
    if mask is not None:
        values, weight = values[mask], weight[mask]
    total = weight.sum()
    return float((values * weight).sum() / total) if total > 0 else float("nan")


def _share(count: int, total: int) -> float:
    return count / total if total else float("nan")


def _total(weight: np.ndarray) -> float:
    return float(round(weight.sum(), 6))
