"""Negatives of next_item requests: the distributions from which they are drawn, and the draw. Pure numpy.

A proposal arranges the items on a line; each item covers a stretch as long as its weight. A draw is a point on the line
from which the stretches of the request's positives are cut out: it is mapped back to the whole line by stepping over
these stretches, and the item at that point is the negative.

    items           2    3  4     5            positives {3, 5}: a draw is x in 0 .. 5 (six units remain)
    line          |aaa|bb|ccc|ddddd|           x = 4 -> past b -> 6 -> item 4

So no draw is rejected, a positive is never drawn, and the other items keep their proportions. Draws are with
replacement and depend only on (seed, epoch, user, request) and the proposal, not on the rank that makes them.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from pipeline.batches.sampling import draws_below
from pipeline.hashing import hash64
from pipeline.shards.sequences import offsets_of
from pipeline.shards.vocabulary import NUM_RESERVED

_LENGTH = 1 << 31
"""Length of a line whose weights are not counts: an item's share is rounded to 2^-32 of the whole."""


class Proposal(Protocol):
    """A distribution over items, as weights that are whole numbers; their total is below 2^32."""

    total: int

    def stretch(self, item: np.ndarray, /) -> tuple[np.ndarray, np.ndarray]:
        """(start, weight) of the items' stretches; weight 0 for an item that is never drawn."""
        ...

    def item_at(self, point: np.ndarray, /) -> np.ndarray:
        """The items at these points of the line."""
        ...


class Uniform:
    """Every real item of the vocabulary, with equal weight."""

    def __init__(self, vocabulary_size: int) -> None:
        self.total = vocabulary_size - NUM_RESERVED

    def stretch(self, item: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return item - NUM_RESERVED, np.ones_like(item)

    def item_at(self, point: np.ndarray) -> np.ndarray:
        return point + NUM_RESERVED


class Weighted:
    """The given items, each in proportion to its weight."""

    def __init__(self, item: np.ndarray, weight: np.ndarray) -> None:
        """item: [K] int64 ascending rows; weight: [K] int64, each at least 1."""
        self._item, self._weight, self._edges = item, weight, offsets_of(weight)
        self.total = int(self._edges[-1])

    @classmethod
    def popularity(cls, counts: np.ndarray, *, power: float) -> Weighted:
        """q ~ count ** power. An item with count 0 is never a negative."""
        (item,) = np.nonzero(counts)
        share = counts[item].astype(np.float64) ** power
        return cls(item, np.maximum(np.rint(share * (_LENGTH / share.sum())), 1).astype(np.int64))

    @classmethod
    def pool(cls, item: np.ndarray) -> Weighted:
        """Each item weighs as often as it occurs in the pool; the order of the pool does not matter."""
        return cls(*np.unique(item, return_counts=True))

    def stretch(self, item: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not len(self._item):
            return np.zeros_like(item), np.zeros_like(item)
        place = np.searchsorted(self._item, item)
        found = np.take(self._item, place, mode="clip") == item
        return self._edges[place], np.where(found, np.take(self._weight, place, mode="clip"), 0)

    def item_at(self, point: np.ndarray) -> np.ndarray:
        return self._item[np.searchsorted(self._edges, point, side="right") - 1]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """Candidates of B requests, flat: for each request its positives, then its negatives."""

    item: np.ndarray
    """[M] int64."""
    label: np.ndarray
    """[M] float32."""
    offsets: np.ndarray
    """[B + 1] int64."""


def draw_keys(*, seed: int, epoch: int, user: np.ndarray, request: np.ndarray) -> np.ndarray:
    """[B] uint64 keys of the draws of each request. user: index rows; request: keys within the user."""
    return hash64(seed, epoch, user, request, np.uint64(2))


def with_negatives(
    positive: np.ndarray, offsets: np.ndarray, *, keys: np.ndarray, proposal: Proposal, num_negatives: int
) -> Candidates:
    """Draw `num_negatives` for each request; none for a request whose positives are all items of the proposal.

    positive: [P] items, distinct within a request; offsets: [B + 1]; keys: [B] of `draw_keys`.
    """
    num_positives = np.diff(offsets)
    if not num_negatives:
        return Candidates(item=positive, label=np.ones(len(positive), np.float32), offsets=offsets)
    remaining = _remaining(positive, offsets, proposal)
    num_drawn = np.where(remaining > 0, num_negatives, 0)
    point = draws_below(remaining, keys=keys, count=num_negatives)
    point = _step_over_positives(point, positive, offsets, proposal)[num_drawn > 0]

    out = offsets_of(num_positives + num_drawn)
    place = np.arange(len(positive)) + np.repeat(out[:-1] - offsets[:-1], num_positives)
    label = np.zeros(out[-1], np.float32)
    label[place] = 1
    item = np.empty(out[-1], np.int64)
    item[place], item[label == 0] = positive, proposal.item_at(point.reshape(-1))
    return Candidates(item=item, label=label, offsets=out)


def log_expected_draws(candidates: Candidates, *, proposal: Proposal, num_negatives: int) -> np.ndarray:
    """[M] float32: log of `expected_draws`; 0 where nothing is drawn."""
    return log_of_draws(expected_draws(candidates, proposal=proposal, num_negatives=num_negatives))


def log_of_draws(expected: np.ndarray) -> np.ndarray:
    """[M] float32: log of the expected numbers of draws; 0 where nothing is drawn."""
    return np.log(np.where(expected > 0, expected, 1.0)).astype(np.float32)


def expected_draws(candidates: Candidates, *, proposal: Proposal, num_negatives: int) -> np.ndarray:
    """[M] float64: how often `num_negatives` draws of the request are expected to take the item, n w / remaining.

    A positive, which is never drawn, gets the value that another item of its weight would have.
    """
    owner = np.repeat(np.arange(len(candidates.offsets) - 1), np.diff(candidates.offsets))
    positive = candidates.label > 0
    offsets = offsets_of(np.bincount(owner[positive], minlength=len(candidates.offsets) - 1))
    remaining = _remaining(candidates.item[positive], offsets, proposal)[owner]
    weight = proposal.stretch(candidates.item)[1]
    drawn = (remaining > 0) & (weight > 0) & (num_negatives > 0)
    return np.divide(num_negatives * weight, remaining, where=drawn, out=np.zeros(len(owner)))


def _remaining(positive: np.ndarray, offsets: np.ndarray, proposal: Proposal) -> np.ndarray:
    """[B] int64: length of the line without the request's positives."""
    return proposal.total - np.diff(offsets_of(proposal.stretch(positive)[1])[offsets])


def _step_over_positives(
    point: np.ndarray, positive: np.ndarray, offsets: np.ndarray, proposal: Proposal
) -> np.ndarray:
    """[B, n] points of the line without the positives -> points of the whole line.

    With the sorted stretches (start, weight) of the positives, (s_0, w_0), (s_1, w_1), ..., x steps over the j-th if
    x >= s_j - (w_0 + ... + w_{j-1}).
    """
    if len(positive) == len(offsets) - 1 == offsets[-1] and (np.diff(offsets) == 1).all():
        # Every request has one positive, for example where every event is a request: no need to sort or search.
        start, weight = proposal.stretch(positive)
        return point + np.where(point >= start[:, None], weight[:, None], 0)
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    start, weight = proposal.stretch(positive[np.lexsort((positive, owner))])
    before = offsets_of(weight)
    threshold = start - (before[:-1] - before[offsets[:-1]][owner])
    # One search for all requests: each request has its own range of keys.
    stride = np.int64(proposal.total + 1)
    key = np.arange(len(offsets) - 1)[:, None] * stride + point
    passed = np.searchsorted(owner * stride + threshold, key, side="right")
    return point + before[passed] - before[offsets[:-1]][:, None]
