"""Which requests train in an epoch, and which are evaluated; negatives.py draws the negatives of a request.

Draws come from a counter-based generator keyed by (seed, epoch, user, request), so they do not depend on which rank
makes them. Pure numpy.
"""

from __future__ import annotations

import numpy as np

from pipeline.batches.requests import RequestConfig, Requests
from pipeline.hashing import GOLDEN, hash64, mix
from pipeline.shards.sequences import offsets_of


def sample(requests: Requests, *, user_rows: np.ndarray, seed: int, epoch: int, config: RequestConfig) -> Requests:
    """At most max_requests training requests per user, drawn by (seed, epoch, user); their order is kept.

    user_rows: [U] int64, the index row of each user.
    """
    draw = hash64(seed, epoch, user_rows[requests.user], requests.key, np.uint64(1))
    return _at_most(requests, config.max_requests, draw)


def evaluated(requests: Requests, *, config: RequestConfig) -> Requests:
    """At most max_eval_requests requests per user, the same ones each time; 0 = all."""
    if not config.max_eval_requests:
        return requests
    return _at_most(requests, config.max_eval_requests, hash64(requests.key, np.uint64(3)))


def draws_below(limit: np.ndarray, *, keys: np.ndarray, count: int) -> np.ndarray:
    """[B, count] int64: whole numbers below limit [B] (at most 2^32), drawn by keys [B] uint64; 0 if the limit is 0."""
    counter = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
    # (high 32 bits x limit) >> 32 is a number below the limit n: no slow modulo, and a bias below 2^-32 n.
    bits = mix(keys[:, None] + counter[None, :]) >> np.uint64(32)
    return ((bits * limit.astype(np.uint64)[:, None]) >> np.uint64(32)).astype(np.int64)


def _at_most(requests: Requests, most: int, draw: np.ndarray) -> Requests:
    """For each user the `most` requests with the smallest draws, in their original order."""
    counts = np.bincount(requests.user)
    if counts.max(initial=0) <= most:
        return requests
    order = np.lexsort((draw, requests.user))
    rank = np.empty(len(requests), np.int64)
    rank[order] = np.arange(len(requests)) - np.repeat(offsets_of(counts)[:-1], counts)
    return requests.take(rank < most)
