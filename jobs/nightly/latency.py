"""Scoring times of challenger and champion, compared in pairs: both score the same request one right after the other.

    challenger champion | champion challenger | challenger champion | ...          one pair between two bars

A machine that is busy slows both halves of a pair, and a load that grows or fades favours each model in turn. What is
compared is the median ratio of the pairs, with bounds that need no assumption on how times are distributed.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jobs.nightly.gate import ERROR
from jobs.scorer.histories import NO_TIME, Histories
from jobs.scorer.scorer import Scorer
from jobs.serving.user_histories import UserHistories
from models.metrics import Interval
from pipeline.shards.dataset import Shards

REQUESTS = 8
ROUNDS = 7
"""Pairs per request: 56 pairs in all bound the ratio to about 15 % where the times of equal models differ by half."""
CANDIDATES = 4_000

Score = Callable[[int], object]
"""Scores the request at a place."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latency:
    """Scoring times of two models on the same requests."""

    seconds: tuple[float, float]
    """Median of one request, (challenger's, champion's)."""
    ratio: Interval
    """Median of the pairs' ratios, challenger's time over champion's, with its one-sided 95 % bounds."""


def model_latency(challenger: Path, champion: Path, *, shards: Shards, users: np.ndarray) -> Latency:
    """The times of two exported models to score a request with its raw history. `users`: rows of the shards' index
    whose histories are scored."""
    users, models = users[:REQUESTS], []
    for directory in (challenger, champion):
        scorer = Scorer()
        scorer.load(directory)
        models.append((scorer, UserHistories(shards, scorer).read(users)))
    candidates = min(CANDIDATES, *(len(scorer.item_ids) for scorer, _ in models))

    def scores(scorer: Scorer, histories: Histories) -> Score:
        first = scorer.settings["first_item_row"]
        rows = np.arange(first, first + candidates)

        def score(place: int) -> None:
            shown, times = scorer.shown(histories.take(np.array([place])), np.array([NO_TIME]))
            scorer.logits(shown, times, np.array([0, candidates]), rows)

        return score

    return paired_latency(*(scores(*each) for each in models), requests=len(users))


def paired_latency(
    challenger: Score, champion: Score, *, requests: int, clock: Callable[[], float] = time.perf_counter
) -> Latency:
    """Score every request ROUNDS times with both models, which take turns in being first. The first round is not timed:
    it allocates memory."""
    models = (challenger, champion)
    taken = np.zeros((2, ROUNDS, requests))
    for each in range(1 + ROUNDS):
        for place in range(requests):
            for model in (0, 1) if (each + place) % 2 else (1, 0):
                started = clock()
                models[model](place)
                if each:
                    taken[model, each - 1, place] = clock() - started
    medians = np.median(taken, axis=(1, 2))
    return Latency(seconds=(float(medians[0]), float(medians[1])), ratio=median_interval((taken[0] / taken[1]).ravel()))


def median_interval(values: Sequence[float] | np.ndarray, *, error: float = ERROR) -> Interval:
    """The median of independent values with one-sided bounds, each of which is wrong with probability `error` at most.

    The bounds are the k-th smallest and the k-th largest value, with the largest k for which
    P(Binomial(n, 1/2) < k) <= error, as in the sign test. With too few values for any k (four at 5 %) they are
    infinite.
    """
    ordered = np.sort(np.asarray(values, float))
    count, k, tail = len(ordered), 0, 0.0
    while k < count and (tail := tail + math.comb(count, k) * 0.5**count) <= error:
        k += 1
    low, high = (float(ordered[k - 1]), float(ordered[count - k])) if k else (-math.inf, math.inf)
    return Interval(value=float(np.median(ordered)), low=low, high=high)
