"""The guards of a promotion: limits for the challenger's loss, calibration, coverage and scoring time, and for the row
counts of its day."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from jobs.config.nightly_config import GateConfig
from jobs.nightly.gate import Guard
from jobs.nightly.latency import Latency
from jobs.runs.summary import Summary
from pipeline.prepare.ingested_days import DayCounts

_DAYS = 7
"""Number of earlier days that a day is compared with."""


def model_guards(
    challenger: Mapping[str, float], champion: Mapping[str, float], *, latency: Latency | None, gate: GateConfig
) -> list[Guard]:
    """Guards from the metrics of both models on the same requests, and from their scoring times; None = they were not
    compared."""
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
    if latency is not None:
        guards.append(_scoring_time(latency, most=gate.max_latency))
    return guards


def floor_guards(summary: Summary, *, gate: GateConfig) -> list[Guard]:
    """The challenger must not be below the best baseline on all held-out requests; none if no baseline was evaluated.
    Of fewer users than `gate.min_users` nobody is sure enough to refuse it."""
    held_out = summary.slices[0] if summary.slices else None
    if not gate.floor or held_out is None or held_out.floor is None:
        return []
    difference, value = held_out.floor.difference, held_out.systems[summary.main].value
    below = held_out.is_below_floor and held_out.users >= gate.min_users
    return [
        Guard(
            name="primary metric beside the best baseline",
            value=value,
            limit=f"not below {held_out.floor.baseline}, {value - difference.value:.4g} (difference "
            f"{difference.value:+.4g}, 95 % interval {difference.low:+.4g} to {difference.high:+.4g}, "
            f"{held_out.users:,} users)",
            holds=not below,
            undecided=True if difference.low < 0 and not below else None,
        )
    ]


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


def _scoring_time(latency: Latency, *, most: float) -> Guard:
    """Fails only if the pairs show that the challenger takes more than `most` times as long."""
    ratio, (ours, theirs) = latency.ratio, (1e3 * each for each in latency.seconds)
    return Guard(
        name="scoring time, as a multiple of the champion's",
        value=ratio.value,
        limit=f"at most {most:g} (95 % bounds {ratio.low:.3g} and {ratio.high:.3g}; {ours:.3g} ms and {theirs:.3g} ms)",
        holds=ratio.low <= most,
        undecided=True if ratio.low <= most < ratio.high else None,
    )


def _known(challenger: Mapping[str, float], champion: Mapping[str, float], name: str) -> bool:
    return all(math.isfinite(each.get(name, math.nan)) for each in (challenger, champion))


def _at_most(name: str, value: float, bound: float, factor: float) -> Guard:
    """`bound` is `factor` times the champion's value."""
    limit = f"at most {bound:.4g} ({factor:g} times the champion's)"
    return Guard(name=name, value=value, limit=limit, holds=value <= bound)
