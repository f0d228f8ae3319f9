"""The plots of a run, as PNG: loss, quality by history length, energy of real histories by rank."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import pyarrow.parquet as pq

from jobs.host.json_files import read_rows
from models.metrics import bootstrap_interval, ndcg

LENGTH_BUCKETS = (0, 20, 50, 100, 200, 500, 1_000, 10_000, 1 << 62)
Target = TypeVar("Target", Path, BinaryIO)
"""Where a PNG is written to."""
MIN_BUCKET_USERS = 20
"""A bucket with fewer requests than this is not shown: its mean would be mostly noise."""


def write_plots(run_dir: Path, *, model: str) -> list[Path]:
    """Write every plot that there are data for into RUN/plots; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    directory = run_dir / "plots"
    directory.mkdir(exist_ok=True)
    written = [plot_loss(run_dir, directory / "loss.png")]
    results = run_dir / "evaluation" / f"{model}.parquet"
    if results.exists() and "rank_removed" in pq.read_schema(results).names:
        written.append(_plot_history_length(results, directory / "history-length.png"))
    spectrum = run_dir / "evaluation" / "spectrum.json"
    if spectrum.exists():
        written.append(plot_spectrum(json.loads(spectrum.read_text()), directory / "spectrum.png"))
    return written


def plot_curves(curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]], path: Path, *, title: str) -> Path:
    """Quality over training time: `curves` has for each row one list of (seconds, NDCG@10) per seed."""
    import matplotlib

    matplotlib.use("Agg")
    figure, axes = new_figure(title, "seconds of training steps", "NDCG@10")
    for number, (row, seeds) in enumerate(curves.items()):
        for place, curve in enumerate(seeds):
            axes.plot(*zip(*curve, strict=True), color=f"C{number % 10}", label=row if not place else None)
    if curves:
        axes.legend(fontsize="small")
    return save_figure(figure, path)


def plot_loss(run_dir: Path, path: Target) -> Target:
    """Training loss and validation metric by step, from RUN/telemetry.jsonl."""
    rows = read_rows(run_dir / "telemetry.jsonl")
    steps = {row["step"]: row["loss"] for row in rows if row["kind"] == "step"}
    valid = {row["step"]: row for row in rows if row["kind"] == "valid"}
    metric = next((key for row in valid.values() for key in ("ndcg@10", "gauc") if key in row), None)
    figure, axes = new_figure("training", "step", "loss")
    axes.plot(list(steps), list(steps.values()), linewidth=0.8, label="training loss")
    if metric:
        right = axes.twinx()
        right.plot(
            list(valid), [row[metric] for row in valid.values()], "o-", color="tab:orange", label=f"valid {metric}"
        )
        right.set_ylabel(f"valid {metric}")
        # Outside the axes: with two scales, no corner inside is certain to be free.
        figure.legend(handles=[*axes.get_lines(), *right.get_lines()], loc="outside lower center", ncols=2)
    else:
        axes.legend()
    return save_figure(figure, path)


def _plot_history_length(results: Path, path: Path) -> Path:
    table = pq.read_table(results, columns=["history_length", "rank_removed"])
    length, values = table["history_length"].to_numpy(), ndcg(table["rank_removed"].to_numpy(), k=10)
    labels, means, low, high = [], [], [], []
    for first, end in itertools.pairwise(LENGTH_BUCKETS):
        inside = (length >= first) & (length < end)
        if inside.sum() < MIN_BUCKET_USERS:
            continue
        interval = bootstrap_interval(values[inside], seed=0)
        labels.append(f"{first}-{min(end - 1, int(length.max()))}\n({inside.sum()})")
        means.append(interval.value)
        low.append(interval.value - interval.low)
        high.append(interval.high - interval.value)
    figure, axes = new_figure("quality by history length", "events in the history (requests)", "NDCG@10, seen removed")
    axes.errorbar(np.arange(len(means)), means, yerr=[low, high], fmt="o", capsize=4)
    axes.set_xticks(np.arange(len(means)), labels)
    axes.set_ylim(bottom=0)
    return save_figure(figure, path)


def plot_spectrum(spectrum: dict[str, Any], path: Target) -> Target:
    """Energy of histories by rank, from RUN/evaluation/spectrum.json."""
    figure, axes = new_figure(
        f"energy of {spectrum['histories']} real histories", "rank", "share of squared singular values"
    )
    for quantile, shares in spectrum["quantiles"].items():
        axes.plot(spectrum["rank"], shares, "o-", markersize=3, label=f"{float(quantile):.0%} of histories below")
    axes.set_ylim(0, 1.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return save_figure(figure, path)


def new_figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    """(figure, axes) in the style that all plots share."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def save_figure(figure: Any, path: Target) -> Target:
    """Write the figure as PNG; the same figure gives the same bytes."""
    figure.savefig(path, dpi=110, format="png")
    return path
