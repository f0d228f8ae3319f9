"""What else a challenger must hold: loss, calibration, coverage, time to score; and what its day must look like."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jobs.config.nightly import GateConfig
from jobs.nightly.gate import Guard
from jobs.scorer.histories import NO_TIME
from jobs.scorer.scorer import Scorer
from jobs.serving.user_histories import UserHistories
from pipeline.prepare.ingested_days import DayCounts
from pipeline.shards.dataset import Shards

LATENCY_REQUESTS = 8
LATENCY_ROUNDS = 7
"""Of a request the fastest counts: on a machine with five times more to do than cores the median of 15 was once 4 times
the other's, of models of the same size."""
LATENCY_CANDIDATES = 4_000
_DAYS = 7
"""Days before that a day is compared with."""


def model_guards(
    challenger: Mapping[str, float], champion: Mapping[str, float], *, latency: tuple[float, float], gate: GateConfig
) -> list[Guard]:
    """From the metrics of both on the same requests and their (challenger's, champion's) seconds a request."""
    guards = []
    if _known(challenger, champion, "logloss"):
        most = champion["logloss"] * (1 + gate.max_logloss_rise)
        guards.append(
            _at_most("LogLoss", challenger["logloss"], most, "times the champion's", 1 + gate.max_logloss_rise)
        )
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
            "times the champion's",
            gate.max_latency,
        )
    )
    return guards


def day_guards(day: DayCounts, before: Sequence[DayCounts], *, gate: GateConfig) -> list[Guard]:
    """What the day must look like beside those before."""
    before = before[-_DAYS:]
    if not before:
        return []
    low, high = gate.event_range
    median = statistics.median(each.accepted for each in before)
    usual = statistics.median(each.rejected_share for each in before)
    share, most = day.rejected_share, usual + gate.max_rejected_rise
    return [
        Guard(
            name="events of the day",
            value=day.accepted,
            limit=f"from {low * median:,.0f} to {high * median:,.0f} ({low:g} to {high:g} times the days before)",
            holds=low * median <= day.accepted <= high * median,
        ),
        Guard(
            name="rejected share of the day's rows",
            value=share,
            limit=f"at most {most:.4g} (the median of the days before + {gate.max_rejected_rise:g})",
            holds=share <= most,
        ),
    ]


def latencies(challenger: Path, champion: Path, *, shards: Shards, users: np.ndarray) -> tuple[float, float]:
    """(challenger's, champion's) seconds to score one request with its raw history: the fastest of some turns, of which
    the median over requests.

    `users`: rows of the shards' index whose histories are scored; both models read the same ones, in turn.
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
            one = histories.take(np.array([place]))
            first = scorer.settings["first_item_row"]
            started = time.perf_counter()
            shown, asked = scorer.shown(one, np.array([NO_TIME]))
            scorer.logits(shown, asked, np.array([0, candidates]), np.arange(first, first + candidates))
            taken = time.perf_counter() - started
            fastest[model, place] = min(fastest[model, place], taken)
    return float(np.median(fastest[0])), float(np.median(fastest[1]))


def _known(challenger: Mapping[str, float], champion: Mapping[str, float], name: str) -> bool:
    return all(math.isfinite(each.get(name, math.nan)) for each in (challenger, champion))


def _at_most(name: str, value: float, most: float, of: str, factor: float) -> Guard:
    return Guard(name=name, value=value, limit=f"at most {most:.4g} ({factor:g} {of})", holds=value <= most)
