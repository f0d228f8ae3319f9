"""The guards of a promotion: limits for the challenger's loss, calibration, coverage and scoring time, and for the row
counts of its day."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jobs.config.nightly_config import GateConfig
from jobs.nightly.gate import Guard
from jobs.scorer.histories import NO_TIME
from jobs.scorer.scorer import Scorer
from jobs.serving.user_histories import UserHistories
from pipeline.prepare.ingested_days import DayCounts
from pipeline.shards.dataset import Shards

LATENCY_REQUESTS = 8
LATENCY_ROUNDS = 7
"""Of each request the fastest round counts: on a machine with five times more work than cores, the median of 15 rounds
was once 4 times the other model's, although both models had the same size."""
LATENCY_CANDIDATES = 4_000
_DAYS = 7
"""Number of earlier days that a day is compared with."""


def model_guards(
    challenger: Mapping[str, float], champion: Mapping[str, float], *, latency: tuple[float, float], gate: GateConfig
) -> list[Guard]:
    """Guards from the metrics of both models on the same requests, and from `latency`: (challenger's, champion's)
    seconds per request."""
    guards = []
    if _known(challenger, champion, "logloss"):
        factor = 1 + gate.max_logloss_rise
        guards.append(_at_most("LogLoss", challenger["logloss"], factor * champion["logloss"], factor))
    if _known(challenger, champion, "calibration"):
        errors = [abs(math.log(max(each["calibration"], 1e-9))) for each in (challenger, champion)]
        guards.append(
            Guard(
                name="calibration error |ln(sum p / sum y)|",
                value=errors[0],
                limit=f"at most the champion's {errors[1]:.4g} + {gate.max_calibration_error:g}",
                holds=errors[0] <= errors[1] + gate.max_calibration_error,
            )
        )
    if _known(challenger, champion, "coverage"):
        least = champion["coverage"] * gate.min_coverage
        guards.append(
            Guard(
                name="coverage of the catalogue",
                value=challenger["coverage"],
                limit=f"at least {least:.4g} ({gate.min_coverage:g} times the champion's)",
                holds=challenger["coverage"] >= least,
            )
        )
    guards.append(
        _at_most(
            "scoring time in ms",
            1e3 * latency[0],
            1e3 * latency[1] * gate.max_latency,
            gate.max_latency,
        )
    )
    return guards


def day_guards(day: DayCounts, before: Sequence[DayCounts], *, gate: GateConfig) -> list[Guard]:
    """Guards that compare the day's row counts with those of the days before; none if there are no such days."""
    before = before[-_DAYS:]
    if not before:
        return []
    lowest, highest = gate.event_range
    median = statistics.median(each.accepted for each in before)
    low, high = lowest * median, highest * median
    usual = statistics.median(each.rejected_share for each in before)
    share, bound = day.rejected_share, usual + gate.max_rejected_rise
    return [
        Guard(
            name="events of the day",
            value=day.accepted,
            limit=f"from {low:,.0f} to {high:,.0f} ({lowest:g} to {highest:g} times the median of the days before)",
            holds=low <= day.accepted <= high,
        ),
        Guard(
            name="rejected share of the day's rows",
            value=share,
            limit=f"at most {bound:.4g} (the median of the days before + {gate.max_rejected_rise:g})",
            holds=share <= bound,
        ),
    ]


def latencies(challenger: Path, champion: Path, *, shards: Shards, users: np.ndarray) -> tuple[float, float]:
    """(challenger's, champion's) seconds to score one request with its raw history: each request's fastest round, then
    the median over requests.

    `users`: rows of the shards' index whose histories are scored, the same ones by both models in alternation.
    """
    users, models = users[:LATENCY_REQUESTS], []
    for directory in (challenger, champion):
        scorer = Scorer()
        scorer.load(directory)
        models.append((scorer, UserHistories(shards, scorer).read(users)))
    candidates = min(LATENCY_CANDIDATES, *(len(scorer.item_ids) for scorer, _ in models))
    fastest = np.full((len(models), len(users)), np.inf)
    for _ in range(LATENCY_ROUNDS):
        for place, (model, (scorer, histories)) in itertools.product(range(len(users)), enumerate(models)):
            history = histories.take(np.array([place]))
            first = scorer.settings["first_item_row"]
            started = time.perf_counter()
            shown, times = scorer.shown(history, np.array([NO_TIME]))
            scorer.logits(shown, times, np.array([0, candidates]), np.arange(first, first + candidates))
            taken = time.perf_counter() - started
            fastest[model, place] = min(fastest[model, place], taken)
    return float(np.median(fastest[0])), float(np.median(fastest[1]))


def _known(challenger: Mapping[str, float], champion: Mapping[str, float], name: str) -> bool:
    return all(math.isfinite(each.get(name, math.nan)) for each in (challenger, champion))


def _at_most(name: str, value: float, bound: float, factor: float) -> Guard:
    """`bound` is `factor` times the champion's value."""
    limit = f"at most {bound:.4g} ({factor:g} times the champion's)"
    return Guard(name=name, value=value, limit=limit, holds=value <= bound)
