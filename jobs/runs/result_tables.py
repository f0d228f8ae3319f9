"""Prints the tables of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping

from jobs.config.run_config import RunConfig
from jobs.host.console import Console
from jobs.runs.evaluate import Evaluated
from jobs.runs.floor import below_floor
from jobs.runs.summary import Slice, Summary
from jobs.training.baselines import POPULARITY
from models.metrics import Interval

METRIC_NAMES = {"gauc": "GAUC", "ndcg@10": "NDCG@10, seen removed", "ndcg@10_seen_kept": "NDCG@10, seen kept"}


def print_results(config: RunConfig, console: Console, evaluated: Evaluated) -> None:
    """Print one row per system; then the primary metric by kind of target and by history length."""
    summary = evaluated.summary
    if evaluated.reused:
        console.line(f"{'evaluate':<12} already there: {evaluated.directory}")
    console.line()
    if summary.task == "impressions":
        _print_impressions(config, console, summary)
    else:
        _print_ranking(console, summary)
    _print_slices(console, summary)
    for line in [*floor_lines(summary), *unbeaten(summary), *mostly_repeats(summary)]:
        console.line(f"{'note':<12} {line}")


def floor_lines(summary: Summary) -> list[str]:
    """One line for each slice in which the main system is below the floor."""
    metric = METRIC_NAMES[summary.primary]
    return [
        f"{summary.main} is below the floor, {part.name}: its {metric} is {part.systems[summary.main].value:.4f}, "
        f"{part.floor.baseline} has {part.systems[part.floor.baseline].value:.4f}; difference "
        f"{part.floor.difference.value:+.4f}, 95 % interval {part.floor.difference.low:+.4f} to "
        f"{part.floor.difference.high:+.4f} over {part.users:,} users"
        for part in below_floor(summary)
        if part.floor is not None
    ]


def unbeaten(summary: Summary) -> list[str]:
    """One line for each other system that the main one does not beat with 95 % confidence; the best baseline has its
    line already where the main one is below it."""
    everything = summary.slices[0] if summary.slices else None
    told = everything.floor.baseline if everything and everything.floor and everything.is_below_floor else None
    lines = []
    for system, ratio in summary.ratios.items():
        if ratio.low <= 1 and system != told:
            how = "is worse than" if ratio.high < 1 else "is not clearly better than"
            lines.append(
                f"{summary.main} {how} {system}: {ratio.value:.2f} times its {METRIC_NAMES[summary.primary]}, 95 % "
                f"interval {ratio.low:.2f} to {ratio.high:.2f}"
            )
    return lines


def mostly_repeats(summary: Summary) -> list[str]:
    """A line if most targets are left out of the primary metric, because users had seen them before."""
    share = summary.metrics.get(summary.main, {}).get("share_repeats", 0.0)
    if summary.primary != "ndcg@10" or not share > 0.5:
        return []
    return [
        f"{share:.0%} of the targets are items that the user has seen, which {METRIC_NAMES[summary.primary]} leaves "
        "out: where people come back to items, set data.requests.seen_items to kept in a run of another --name"
    ]


def _print_ranking(console: Console, summary: Summary) -> None:
    main = summary.main
    metrics = summary.metrics[main]
    kept = summary.primary.endswith("_seen_kept")
    rows = []
    for system in summary.systems:
        values, ratio = summary.metrics[system], summary.ratios.get(system)
        primary = _interval(summary.intervals.get(system))
        rows.append(
            (
                system,
                f"{values['hr@10']:.4f}",
                f"{values['ndcg@10']:.4f}" if kept else primary,
                f"{values['mrr@10']:.4f}",
                f"{values['hr@10_seen_kept']:.4f}",
                primary if kept else f"{values['ndcg@10_seen_kept']:.4f}",
                f"{values['ndcg@10_untied']:.4f}",
                f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" if ratio else "",
            )
        )
    console.table(
        f"{summary.part} part, next_item, {summary.split}: {metrics['requests']:,.0f} requests{_drawn(summary)}, "
        f"{metrics['targets']:,.0f} targets, each ranked among the whole catalogue (seen items removed unless kept"
        f"{_repeats(metrics)}; in brackets 95 % bootstrap intervals over users)\n"
        f"no ties: the {metrics['requests_untied']:,.0f} requests whose target has a later time stamp than the event "
        "before it",
        (
            "model",
            *(_head(name, metrics, "users_new") for name in ("HR@10", "NDCG@10", "MRR@10")),
            *(_head(name, metrics, "users") for name in ("HR@10, seen kept", "NDCG@10, seen kept")),
            _head("NDCG@10, no ties", metrics, "users_untied"),
            f"{METRIC_NAMES[summary.primary]}: {main} / this",
        ),
        rows,
    )


def _print_impressions(config: RunConfig, console: Console, summary: Summary) -> None:
    metrics = summary.metrics[summary.main]
    counted, skipped = metrics["requests"], metrics["requests_skipped"]
    share = f"{counted / max(1, counted + skipped):.0%} of all"
    console.table(
        f"{summary.part} part, impressions, {summary.split}: {counted:,.0f} requests{_drawn(summary)} with at least "
        f"{config.data.requests.min_history} earlier events, {share} (in brackets 95 % bootstrap intervals over users)",
        (
            "model",
            _head("AUC", metrics, "users"),
            _head("GAUC", metrics, "gauc_users"),
            _head("LogLoss", metrics, "users"),
            _head("calibration", metrics, "users"),
        ),
        [_impression_row(system, summary) for system in summary.systems],
    )


def _impression_row(system: str, summary: Summary) -> tuple[str, ...]:
    metrics, probabilities = summary.metrics[system], system != POPULARITY
    return (
        system,
        f"{metrics['auc']:.4f}",
        _interval(summary.intervals.get(system)),
        f"{metrics['logloss']:.4f}" if probabilities else "",
        f"{metrics['calibration']:.3f}" if probabilities else "",
    )


def _print_slices(console: Console, summary: Summary) -> None:
    """Print the primary metric by slice, unless all targets are in the same slice."""
    slices = summary.slices
    if len(slices) < 3:
        return
    unit = "candidates" if summary.task == "impressions" else "requests"
    console.line()
    console.table(
        f"{METRIC_NAMES[summary.primary]} by kind of target and history length",
        ("", "users", unit, *summary.systems, f"{summary.main} - best baseline"),
        [
            (
                part.name,
                f"{part.users:,}",
                f"{part.weight:,.0f}",
                *(_interval(part.systems[system]) for system in summary.systems),
                _difference(part),
            )
            for part in slices
        ],
    )


def _head(name: str, metrics: Mapping[str, float], users: str) -> str:
    """The head of a column: the metric, and how many users count in it (unknown in evaluations of earlier versions)."""
    return f"{name}\nusers: {metrics[users]:,.0f}" if users in metrics else name


def _repeats(metrics: Mapping[str, float]) -> str:
    """How many requests are left out of the columns without seen items, where there are any."""
    repeats = round(metrics.get("share_repeats", 0.0) * metrics["requests"])
    return f": {repeats:,} repeats of such items count there alone" if repeats else ""


def _drawn(summary: Summary) -> str:
    return f" of {summary.drawn_from:,} (drawn users)" if summary.drawn_from else ""


def _difference(part: Slice) -> str:
    """The difference to the best baseline, marked where the main system is below it."""
    if part.floor is None:
        return ""
    found = part.floor.difference
    mark = "BELOW " if part.is_below_floor else ""
    return f"{mark}{found.value:+.4f} ({found.low:+.4f} to {found.high:+.4f}) {part.floor.baseline}"


def _interval(interval: Interval | None) -> str:
    return f"{interval.value:.4f} ({interval.low:.4f}-{interval.high:.4f})" if interval else ""
