"""The plots of a night's report, as PNG bytes; None if there is nothing to show.

They show the journals of the latest `LATEST_NIGHTS` nights, and the results of the night's evaluation.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jobs.nightly.context import CHAMPION, REFERENCE
from jobs.nightly.journal import Journal
from jobs.nightly.steps import STEPS, ChampionBefore, Judgement, Registered, Step
from jobs.runs.evaluate import EMPTIED
from jobs.runs.plots import new_figure, save_figure
from jobs.runs.result_tables import METRIC_NAMES
from jobs.runs.summary import Summary
from jobs.training.baselines import BASELINES
from jobs.training.results import ScoredImpressions
from models.metrics import Interval

LATEST_NIGHTS = 60
CALIBRATION_BINS = 10
UNKNOWN = Interval(value=math.nan, low=math.nan, high=math.nan)
_LABELS = 8
"""Number of dates that fit below a plot."""


def challenger_of(metrics: Mapping[str, Any]) -> str | None:
    """The challenger's name among the systems that the night measured; None if there is not exactly one candidate."""
    others = {CHAMPION, REFERENCE, *BASELINES}
    names = [name for name in metrics if name not in others and not name.endswith(f", {EMPTIED}")]
    return names[0] if len(names) == 1 else None


def plot_nights(nights: Sequence[Journal], *, primary: str) -> bytes | None:
    """The primary metric over the nights: the champion's on each whole day, before anything was trained on that day,
    and both systems' on the held-out requests."""
    nights = nights[-LATEST_NIGHTS:]
    before = [_number(known and known.metrics, primary) for known in (night.read(ChampionBefore) for night in nights)]
    held_out = [_held_out(night, primary) for night in nights]
    lines = {
        "champion on the whole day, before training on it": (before, "o-", "tab:blue"),
        "champion on the held-out requests": ([each[1] for each in held_out], "s--", "tab:green"),
        "challenger on the held-out requests": ([each[0] for each in held_out], "^--", "tab:orange"),
    }
    if not any(math.isfinite(value) for values, _, _ in lines.values() for value in values):
        return None
    figure, axes = new_figure(f"{METRIC_NAMES[primary]}, over the nights", "", METRIC_NAMES[primary])
    for name, (values, style, color) in lines.items():
        axes.plot(range(len(nights)), values, style, color=color, label=name, markersize=4, linewidth=1)
    # The registry's verdict, not the decision's: somebody may have changed the champion in between.
    registered = [night.read(Registered) for night in nights]
    promoted = [number for number, found in enumerate(registered) if found and found.verdict == "promoted"]
    for place, number in enumerate(promoted):
        axes.axvline(
            number, color="tab:gray", linewidth=0.8, linestyle=":", label=None if place else "a challenger was promoted"
        )
    _date_axis(axes, nights)
    figure.legend(fontsize="small", loc="outside lower center", ncols=2)
    return _png(figure)


def plot_cost(nights: Sequence[Journal]) -> bytes | None:
    """Seconds per step of every night, stacked."""
    nights = nights[-LATEST_NIGHTS:]
    seconds = {step.STEP: [_seconds(night, step) for night in nights] for step in STEPS}
    if not any(map(sum, seconds.values())):
        return None
    figure, axes = new_figure("cost of the nights", "", "seconds")
    bottom = np.zeros(len(nights))
    for number, (step, values) in enumerate(seconds.items()):
        axes.bar(range(len(nights)), values, bottom=bottom, color=f"C{number}", label=step, width=0.8)
        bottom += values
    axes.set_ylim(0, 1.05 * float(bottom.max()))
    _date_axis(axes, nights)
    # The legend in the order of the stack.
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _png(figure)


def plot_calibration(results: Mapping[str, ScoredImpressions]) -> bytes | None:
    """Share of positives in each decile of the predicted probability, with its 95 % interval."""
    figure, axes = new_figure(
        "calibration", "predicted probability (mean of a tenth of the candidates)", "share of positives"
    )
    drawn, most = 0, 0.0
    for number, (name, result) in enumerate(results.items()):
        if not len(result.label):
            continue
        predicted, observed, half = reliability(result.logit, result.label)
        axes.errorbar(
            predicted,
            observed,
            yerr=half,
            fmt="o-",
            color=f"C{number}",
            label=name,
            capsize=3,
            markersize=4,
            linewidth=1,
        )
        drawn, most = drawn + 1, max(most, float(predicted.max()), float((observed + half).max()))
    if not drawn:
        return None
    axes.plot([0, most], [0, most], color="tab:gray", linewidth=0.8, linestyle=":", label="calibrated")
    axes.legend(fontsize="small")
    return _png(figure)


def reliability(logit: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per tenth of the candidates, ordered by probability: (mean probability, share of positives, half the width of the
    share's 95 % interval), [bins] each."""
    probability = np.exp(-np.logaddexp(0, -logit.astype(np.float64)))
    parts = [part for part in np.array_split(np.argsort(probability, kind="stable"), CALIBRATION_BINS) if len(part)]
    predicted = np.array([probability[part].mean() for part in parts])
    observed = np.array([label[part].mean() for part in parts])
    half = 1.96 * np.sqrt(observed * (1 - observed) / np.array([len(part) for part in parts]))
    return predicted, observed, half


def plot_history_length(summary: Summary, systems: Mapping[str, str]) -> bytes | None:
    """The primary metric by length of the history, with intervals over users; `systems`: {shown name: system}."""
    slices = [part for part in summary.slices if part.name == "no history" or "events" in part.name]
    if not slices:
        return None
    figure, axes = new_figure(
        "quality by history length", "events in the history (users)", METRIC_NAMES[summary.primary]
    )
    for number, (shown, system) in enumerate(systems.items()):
        found = [part.systems.get(system, UNKNOWN) for part in slices]
        value, low, high = np.array([(each.value, each.low, each.high) for each in found]).T
        place = np.arange(len(slices)) + 0.12 * (number - (len(systems) - 1) / 2)
        axes.errorbar(
            place, value, yerr=[value - low, high - value], fmt="o", color=f"C{number}", capsize=4, label=shown
        )
    names = [f"{part.name.removesuffix(' events')}\n({part.users:,})" for part in slices]
    axes.set_xticks(np.arange(len(slices)), names)
    axes.set_xlim(-0.5, len(slices) - 0.5)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    return _png(figure)


def _held_out(night: Journal, primary: str) -> tuple[float, float]:
    """(challenger's, champion's) primary metric on the held-out requests."""
    decision = night.read(Judgement)
    metrics = decision.metrics if decision else {}
    challenger = challenger_of(metrics)
    return _number(metrics.get(challenger or ""), primary), _number(metrics.get(CHAMPION), primary)


def _number(metrics: Mapping[str, float] | None, name: str) -> float:
    """nan if the metric is missing: matplotlib then draws no point."""
    return (metrics or {}).get(name, math.nan)


def _seconds(night: Journal, step: type[Step]) -> float:
    found = night.read(step)
    return found.seconds or 0.0 if found else 0.0


def _date_axis(axes: Any, nights: Sequence[Journal]) -> None:
    every = max(1, math.ceil(len(nights) / _LABELS))
    shown = range(len(nights) - 1, -1, -every)
    axes.set_xticks(list(shown), [f"{nights[number].date:%m-%d}" for number in shown])
    axes.set_xlim(-0.6, len(nights) - 0.4)


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    save_figure(figure, out)
    return out.getvalue()


def png_of(draw: Any, *arguments: Any) -> bytes:
    """The PNG that a function of jobs/runs/plots.py draws."""
    out = io.BytesIO()
    draw(*arguments, out)
    return out.getvalue()
