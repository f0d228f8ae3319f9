"""Everything of a request that is drawn: which requests train in an epoch, which evaluate, and the negatives.

Draws come from a counter-based generator keyed by (seed, epoch, user, request), so they are the same however the work
is dealt. Pure numpy.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from pipeline.events import DataError
from pipeline.requests import RequestConfig, Requests
from pipeline.sequences import offsets_of
from pipeline.vocabulary import NUM_RESERVED


def sample(requests: Requests, *, user_rows: np.ndarray, seed: int, epoch: int, config: RequestConfig) -> Requests:
    """At most max_requests training requests a user, drawn by (seed, epoch, user); their order is kept.

    user_rows: [U] int64, the index row of each user.
    """
    draw = hash64(seed, epoch, user_rows[requests.user], requests.key, np.uint64(1))
    return _at_most(requests, config.max_requests, draw)


def evaluated(requests: Requests, *, config: RequestConfig) -> Requests:
    """At most max_eval_requests requests a user, the same ones each time; all where that is 0."""
    if not config.max_eval_requests:
        return requests
    return _at_most(requests, config.max_eval_requests, hash64(requests.key, np.uint64(3)))


def with_negatives(
    requests: Requests, *, user_rows: np.ndarray, seed: int, epoch: int, num_negatives: int, vocabulary_size: int
) -> Requests:
    """next_item: after the positives, negatives drawn uniformly from the real items that are none of them.

    DataError where a request's positives are the whole catalogue.
    """
    num_items = vocabulary_size - NUM_RESERVED
    num_positives = np.diff(requests.offsets)
    if num_negatives == 0:
        return requests
    if num_items <= num_positives.max(initial=1):
        raise DataError(
            f"the data set has {num_items} items, a request {num_positives.max(initial=1)} positives: negatives need "
            "more items than that; set requests.num_negatives to 0"
        )
    draw = hash64(seed, epoch, user_rows[requests.user], requests.key, np.uint64(2))
    counter = np.arange(1, num_negatives + 1, dtype=np.uint64) * _GOLDEN
    # The high 32 bits times the range, shifted back, is a number below the range: no slow modulo, bias below 2^-32 n.
    bits = _mix(draw[:, None] + counter[None, :]) >> np.uint64(32)
    place = ((bits * (num_items - num_positives).astype(np.uint64)[:, None]) >> np.uint64(32)).astype(np.int64)
    negative = NUM_RESERVED + _skip_positives(place, requests)
    offsets = offsets_of(num_positives + num_negatives)
    candidate = np.empty(offsets[-1], np.int64)
    label = np.zeros(offsets[-1], np.float32)
    positive_place = (
        np.arange(len(requests.candidate)) + np.repeat(np.arange(len(requests)), num_positives) * num_negatives
    )
    is_negative = np.ones(len(candidate), bool)
    is_negative[positive_place] = False
    candidate[positive_place], label[positive_place] = requests.candidate, 1
    candidate[is_negative] = negative.reshape(-1)
    return dataclasses.replace(requests, candidate=candidate, label=label, offsets=offsets)


def _skip_positives(place: np.ndarray, requests: Requests) -> np.ndarray:
    """[B, n] places among the items that are no positive of their request -> places among all items.

    With the positives' places sorted as p_0 < p_1 < ..., the place x moves past the j-th where x >= p_j - j.
    """
    num_positives = np.diff(requests.offsets)
    owner = np.repeat(np.arange(len(requests)), num_positives)
    order = np.lexsort((requests.candidate, owner))
    rank = np.arange(len(owner)) - requests.offsets[:-1][owner]
    threshold = requests.candidate[order] - NUM_RESERVED - rank
    # One search for all requests: each has a range of keys of its own.
    stride = np.int64(place.max(initial=0)) + np.int64(threshold.max(initial=0)) + 2
    keys = owner * stride + threshold
    asked = np.arange(len(requests))[:, None] * stride + place
    return place + np.searchsorted(keys, asked, side="right") - requests.offsets[:-1][:, None]


def hash64(*keys: int | np.ndarray | np.uint64) -> np.ndarray:
    """uint64 hash of the keys, element by element: splitmix64 (Steele et al., 2014) chained over them."""
    state = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            state = _mix(state + np.asarray(key).astype(np.uint64) * _GOLDEN + _GOLDEN)
    return state


def _at_most(requests: Requests, most: int, draw: np.ndarray) -> Requests:
    """The `most` requests of each user with the smallest draws, in their order."""
    order = np.lexsort((draw, requests.user))
    counts = np.bincount(requests.user)
    rank = np.empty(len(requests), np.int64)
    rank[order] = np.arange(len(requests)) - np.repeat(offsets_of(counts)[:-1], counts)
    return requests.take(rank < most)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
