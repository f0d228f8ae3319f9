"""The page of a night, DATE/report.html: what was decided, and why. One file, without scripts.

It is made from the journals of this night and the earlier ones, and from the results of the night's evaluation; it
names no user. Where results were removed or never measured, a sentence says so: a report never makes a night fail.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from jobs.config.run_config import RunConfig
from jobs.host.json_files import read_json
from jobs.nightly.context import CHAMPION, REFERENCE
from jobs.nightly.journal import Journal, past_nights
from jobs.nightly.report_plots import (
    challenger_of,
    plot_calibration,
    plot_cost,
    plot_history_length,
    plot_nights,
    png_of,
)
from jobs.nightly.steps import ChampionBefore, EvaluatedChallenger, Judgement, Outcome, Prepared, TrainedChallenger
from jobs.runs.evaluate import EMPTIED, read_result
from jobs.runs.plots import plot_loss, plot_spectrum
from jobs.runs.result_tables import METRIC_NAMES
from jobs.runs.summary import read_summary
from jobs.training.baselines import BASELINES
from jobs.training.results import ScoredImpressions, primary_metric

LATEST_DAYS = 14
"""Most days of the log that are listed; of refused and incomplete days, twice as many."""
Metrics = Mapping[str, Mapping[str, float]]
"""{system: {metric: value}}."""
_METRICS = {
    "next_item": (
        "ndcg@10_seen_kept",
        "ndcg@10",
        "hr@10_seen_kept",
        "hr@10",
        "mrr@10",
        "logloss",
        "coverage",
        "requests",
    ),
    "impressions": ("gauc", "auc", "logloss", "calibration", "coverage", "requests"),
}
_COMPARISONS = {
    "tonight": "against the champion, tonight's users",
    "together": "against the champion, with the undecided nights before",
    "reference": "against the reference, an earlier champion",
}


def write_report(config: RunConfig, root: Path, journal: Journal, outcome: Outcome) -> Path:
    """Write the page into the night's journal; `root` holds all nights. The same journals give the same page."""
    page = _environment().get_template("report.html").render(report_context(config, root, journal, outcome))
    path = journal.directory / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def report_context(config: RunConfig, root: Path, journal: Journal, outcome: Outcome) -> dict[str, Any]:
    """Everything that the template shows."""
    nights = [*(night for night in past_nights(root) if night.date < journal.date), journal]
    before, trained, decision = journal.read(ChampionBefore), journal.read(TrainedChallenger), journal.read(Judgement)
    metrics, primary = decision.metrics if decision else {}, primary_metric(config.data.requests)
    return {
        "title": f"{config.registered_model}, night of {journal.date}",
        "headline": headline(outcome),
        "outcome": outcome,
        "verdict": outcome.verdict,
        "attempt": journal.attempt,
        "margin": config.nightly.gate.margin,
        "comparisons": [
            (shown, decision.comparisons[name])
            for name, shown in _COMPARISONS.items()
            if decision and name in decision.comparisons
        ],
        "guards": decision.guards if decision else [],
        "below_floor": (decision.below_floor if decision else None) or (),
        **log_of_the_day(journal, nights),
        **_measured(config, metrics, before, primary),
        "training": trained,
        "pictures": _plots(config, nights, trained, metrics, primary),
    }


def headline(outcome: Outcome) -> str:
    """The decision in one sentence."""
    serves, before = outcome.champion, outcome.champion_before
    unchanged = f"version {serves} continues to serve" if serves else "there is no champion yet"
    if outcome.verdict == "promoted":
        return f"Promoted: version {serves} serves from now on" + (f" instead of version {before}." if before else ".")
    if outcome.verdict == "refused":
        return f"Refused: {unchanged}." + (" The next night begins from it again." if serves else "")
    return f"Undecided: {unchanged}. Tonight's users count together with those of the next undecided night."


def log_of_the_day(journal: Journal, nights: Sequence[Journal]) -> dict[str, Any]:
    """The days of the log with their row counts, and which came late, were refused or are incomplete."""
    prepared, earlier = journal.read(Prepared), {}
    for past in (night.read(Prepared) for night in nights[:-1]):
        earlier |= past.days if past else {}
    tonight, refused, left_out = (prepared.days, prepared.refused, prepared.left_out) if prepared else ({}, {}, {})
    days, today = {**earlier, **tonight}, journal.date.isoformat()
    new = [day for day in sorted(tonight) if earlier.get(day) != tonight[day]]
    rows = [
        {"day": day, "new": day in new, "late": day in new and day < today, **vars(days[day])}
        for day in sorted(days)[-LATEST_DAYS:]
    ]
    absent = sorted({**left_out, **refused}.items())
    shown = absent[-2 * LATEST_DAYS :]
    return {
        "days": rows,
        "events": prepared.events if prepared else None,
        "refused_days": [each for each in shown if each[0] in refused],
        "left_out_days": [each for each in shown if each[0] not in refused],
        "absent_before": len(absent) - len(shown),
    }


def _measured(config: RunConfig, metrics: Metrics, before: ChampionBefore | None, primary: str) -> dict[str, Any]:
    """The metrics of every system, the challenger's first."""
    names = [name for name in _METRICS[config.data.requests.task] if name != primary]
    challenger = challenger_of(metrics)
    shown = {challenger: f"challenger ({challenger})", f"{challenger}, {EMPTIED}": "challenger without histories"}
    order = [challenger, CHAMPION, REFERENCE, f"{challenger}, {EMPTIED}", *BASELINES]
    return {
        "metric_names": [primary, *names],
        "metric_titles": METRIC_NAMES,
        "systems": [(shown.get(name, name), metrics[name]) for name in order if name in metrics],
        "champion_before": before,
        "prequential": before.metrics.get(primary) if before and before.metrics else None,
        "primary": METRIC_NAMES[primary],
    }


def _plots(
    config: RunConfig, nights: Sequence[Journal], trained: TrainedChallenger | None, metrics: Metrics, primary: str
) -> list[dict[str, str | None]]:
    """Every plot of the page, drawn or with the sentence that says why not."""
    evaluated = nights[-1].read(EvaluatedChallenger)
    run_dir, evaluation = trained and trained.run_dir, evaluated and evaluated.directory
    systems = _shown_systems(metrics)
    no_night, untrained = "No night has measured anything yet.", "Nothing was trained tonight."
    unlabelled = "The task next_item has no labels, so there are no probabilities to be calibrated."
    impressions = config.data.requests.task == "impressions"

    def calibration() -> bytes | None:
        if evaluation is None or not impressions:
            return None
        results = {name: read_result(evaluation, system, task="impressions") for name, system in systems.items()}
        return plot_calibration({name: each for name, each in results.items() if isinstance(each, ScoredImpressions)})

    def by_length() -> bytes | None:
        return plot_history_length(read_summary(evaluation), systems) if evaluation else None

    def loss() -> bytes | None:
        has_telemetry = run_dir is not None and (run_dir / "telemetry.jsonl").exists()
        return png_of(plot_loss, run_dir) if has_telemetry else None

    def spectrum() -> bytes | None:
        file = evaluation / "spectrum.json" if evaluation else None
        return png_of(plot_spectrum, read_json(file)) if file is not None and file.exists() else None

    no_spectrum = untrained if evaluation is None else "The model has no interests, or their spectrum was not measured."
    return [
        _plot("nights", "Quality over the nights", lambda: plot_nights(nights, primary=primary), no_night),
        _plot("calibration", "Calibration", calibration, untrained if impressions else unlabelled),
        _plot("lengths", "Quality by history length", by_length, untrained),
        _plot("loss", "Training", loss, untrained),
        _plot("spectrum", "Energy of the histories", spectrum, no_spectrum),
        _plot("cost", "Cost", lambda: plot_cost(nights), "No step has taken any time yet."),
    ]


def _plot(name: str, title: str, draw: Callable[[], bytes | None], otherwise: str) -> dict[str, str | None]:
    """A plot as a data URI, or the sentence that says why there is none."""
    try:
        png = draw()
    except (OSError, ValueError, KeyError) as error:
        # The run was removed or is damaged: the page says so in place of the plot.
        return {
            "name": name,
            "title": title,
            "uri": None,
            "why": f"Could not be drawn: {type(error).__name__}: {error}",
        }
    uri = f"data:image/png;base64,{base64.b64encode(png).decode()}" if png else None
    return {"name": name, "title": title, "uri": uri, "why": otherwise}


def _shown_systems(metrics: Metrics) -> dict[str, str]:
    """{shown name: system} of the systems that plots compare."""
    challenger = challenger_of(metrics)
    found = {"challenger": challenger, "champion": CHAMPION, "reference": REFERENCE}
    return {shown: system for shown, system in found.items() if system in metrics}


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": _number, "percent": _percent, "count": _count}
    return environment


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:+.2%}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
