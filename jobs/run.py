"""solar run RECIPE: import, prepare, train, evaluate, register in one go; what is already there is reused.

`make demo` is `solar run movielens-100k`.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from jobs.cluster import ray_session
from jobs.config import RunConfig, redacted
from jobs.console import Console
from jobs.evaluate import Evaluated, evaluate
from jobs.ingest import import_events, prepare_shards
from jobs.register import Registered, register
from jobs.tracking import tracking_uri
from jobs.train import Trained, train, trained_run


def run(config: RunConfig, console: Console, *, verbose: bool = False) -> Registered:
    """The whole flow. Each part returns what it made or found."""
    started = time.monotonic()
    there = "://" in config.events_dir or Path(config.events_dir).exists()
    if config.source.name == "files" and config.source.path is None and there:
        console.line(f"{'import':<12} already there: {config.events_dir}")
    else:
        import_events(config.source, config.events_dir, console, downloads=Path(config.workspace) / "downloads")
    with ray_session(config.cluster, num_cpus=config.parallel.num_cpus, verbose=verbose):
        prepare_shards(config.events_dir, config.shards_dir, config.data.prepare, console)
        for part in systems(config):
            _train(part, console, verbose=verbose)
        trained, evaluated = evaluate_runs(config, console, verbose=verbose)
    registered = register(config, trained, evaluated, console)
    print_results(config, console, evaluated)
    _print_places(config, console, trained, registered)
    console.line(f"done in {time.monotonic() - started:.0f} s")
    return registered


def systems(config: RunConfig) -> list[RunConfig]:
    """The run itself and its comparisons."""
    return [config, *(config.with_model(name) for name in config.compare)]


def evaluate_runs(config: RunConfig, console: Console, *, verbose: bool = False) -> tuple[Trained, Evaluated]:
    """Evaluate the run of a recipe beside those of its comparisons that were trained."""
    main, *comparisons = systems(config)
    trained = {main.model["name"]: trained_run(main)}
    for part in comparisons:
        if (part.run_dir / "run.json").exists():
            trained[part.model["name"]] = trained_run(part)
        else:
            console.line(f"{'evaluate':<12} without {part.model['name']}: not trained (`solar run` trains it beside)")
    return trained[config.model["name"]], evaluate(config, trained, console, verbose=verbose)


def _train(config: RunConfig, console: Console, *, verbose: bool) -> Trained:
    console.line(f"{'train':<12} {config.model['name']} on {config.parallel.num_workers} workers -> {config.run_dir}")
    trained = train(config, console, resume=True, verbose=verbose)
    if trained.reused:
        console.line(f"{'train':<12} already there: {trained.checkpoint}")
    return trained


def print_results(config: RunConfig, console: Console, evaluated: Evaluated) -> None:
    summary = evaluated.summary
    if evaluated.reused:
        console.line(f"{'evaluate':<12} already there: {evaluated.directory}")
    console.line()
    title = f"{summary['part']} part, {summary['task']}, {summary['split']}"
    if summary["task"] == "impressions":
        skipped = summary["metrics"][config.model["name"]]["requests_skipped"]
        counted = summary["metrics"][config.model["name"]]["requests"]
        rows = [_impression_row(system, summary["metrics"][system]) for system in summary["systems"]]
        console.table(
            f"{title}: {counted:,.0f} requests with at least {config.data.requests.min_history} earlier events, "
            f"{counted / max(1, counted + skipped):.0%} of all",
            ("model", "AUC", "GAUC", "LogLoss", "calibration"),
            rows,
        )
        return
    main = config.model["name"]
    rows = []
    for system in summary["systems"]:
        metrics = summary["metrics"][system]
        interval, ratio = summary["intervals"][system], summary["ratios"].get(system)
        rows.append(
            (
                system,
                f"{metrics['hr@10']:.4f}",
                f"{interval['value']:.4f} ({interval['low']:.4f}-{interval['high']:.4f})",
                f"{metrics['mrr@10']:.4f}",
                f"{metrics['hr@10_seen_kept']:.4f}",
                f"{metrics['ndcg@10_seen_kept']:.4f}",
                f"{metrics['ndcg@10_untied']:.4f}",
                f"{ratio['value']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else "",
            )
        )
    count, untied = (summary["metrics"][main][key] for key in ("requests", "requests_untied"))
    console.table(
        f"{title}: {count:,.0f} requests, each ranked among the whole catalogue (seen items removed; in brackets 95 % "
        f"bootstrap intervals over users)\nno ties: the {untied:,.0f} requests whose target has a later time stamp "
        "than the event before it",
        (
            "model",
            "HR@10",
            "NDCG@10",
            "MRR@10",
            "HR@10, seen kept",
            "NDCG@10, seen kept",
            "NDCG@10, no ties",
            f"NDCG@10 of {main} / this",
        ),
        rows,
    )


def _impression_row(system: str, metrics: dict[str, float]) -> tuple[str, ...]:
    probabilities = system != "popularity"
    return (
        system,
        f"{metrics['auc']:.4f}",
        f"{metrics['gauc']:.4f}",
        f"{metrics['logloss']:.4f}" if probabilities else "",
        f"{metrics['calibration']:.3f}" if probabilities else "",
    )


def _print_places(config: RunConfig, console: Console, trained: Trained, registered: Registered) -> None:
    uri = tracking_uri(config.tracking, config.workspace)
    again = "already there: " if registered.reused else ""
    console.line(f"shards       {config.shards_dir}")
    console.line(f"checkpoint   {trained.checkpoint}")
    console.line(f"plots        {trained.run_dir / 'plots'}")
    console.line(f"MLflow run   {trained.mlflow_run_id} in {redacted(uri)}")
    console.line(f"registered   {again}{registered.model} version {registered.version} ({registered.alias})")
    console.line()
    workspace = "" if config.workspace == "workspace" else f" --workspace {config.workspace}"
    console.line("try next:")
    console.line(f"  {_command('solar')} inspect {config.shards_dir} --verify")
    if config.tracking.uri is None:
        console.line(f"  {_command('mlflow')} ui --backend-store-uri {uri}")
    console.line(f"  {_command('solar')} run {config.recipe}{workspace} --name {config.name}-seed-2 --seed 2")


def _command(name: str) -> str:
    """How to call a program of this environment from here."""
    return name if shutil.which(name) else os.path.relpath(Path(sys.executable).parent / name)
