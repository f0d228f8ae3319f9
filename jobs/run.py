"""solar run RECIPE: import, prepare, train, evaluate and register in one command; existing results are reused.

`make demo` is `solar run movielens-100k`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from jobs.cluster.session import ray_session
from jobs.config.run_config import RunConfig
from jobs.data.prepare import import_missing, prepare_shards
from jobs.host.console import Console
from jobs.host.secrets import redacted
from jobs.runs.evaluate import Evaluated, evaluate_run
from jobs.runs.register import Registered, register
from jobs.runs.result_tables import print_results
from jobs.runs.run_dir import Trained, settled, trained_run
from jobs.runs.train import train
from jobs.tracking.mlflow_runs import tracking_uri


def run(config: RunConfig, console: Console, *, verbose: bool = False) -> Registered:
    """The whole flow. Each step returns what it made, or the existing result."""
    started = time.monotonic()
    import_missing(config, console)
    with ray_session(config.cluster, num_cpus=config.parallel.num_cpus, verbose=verbose):
        prepare_shards(config.events_dir, config.shards_dir, config.data.prepare, console)
        config = settled(config, tell=console.line)
        for part in systems(config):
            _train(part, console, verbose=verbose)
        trained, evaluated = evaluate_runs(config, console, verbose=verbose)
    registered = register(config, trained, evaluated, console)
    print_results(config, console, evaluated)
    _print_places(config, console, trained, registered)
    console.line(f"done in {time.monotonic() - started:.0f} s")
    return registered


def systems(config: RunConfig) -> list[RunConfig]:
    """The run itself, and one run for each model of `compare`."""
    return [config, *(config.with_model(name) for name in config.compare)]


def evaluate_runs(
    config: RunConfig, console: Console, *, part: str = "test", verbose: bool = False
) -> tuple[Trained, Evaluated]:
    """Evaluate the run of a recipe together with those of its comparisons that were trained."""
    main, *comparisons = systems(config)
    trained = {main.model["name"]: trained_run(main)}
    for other in comparisons:
        if (other.run_dir / "run.json").exists():
            trained[other.model["name"]] = trained_run(other)
        else:
            console.line(f"{'evaluate':<12} without {other.model['name']}: not trained (`solar run` trains it, too)")
    return trained[config.model["name"]], evaluate_run(config, trained, console, part=part, verbose=verbose)


def _train(config: RunConfig, console: Console, *, verbose: bool) -> Trained:
    console.line(f"{'train':<12} {config.model['name']} on {config.parallel.workers_text} -> {config.run_dir}")
    trained = train(config, console, resume=True, verbose=verbose)
    if trained.reused:
        console.line(f"{'train':<12} already there: {trained.checkpoint}")
    return trained


def _print_places(config: RunConfig, console: Console, trained: Trained, registered: Registered) -> None:
    uri = tracking_uri(config.tracking, config.workspace)
    again = "already there: " if registered.reused else ""
    console.line(f"shards       {config.shards_dir}")
    console.line(f"checkpoint   {trained.checkpoint}")
    console.line(f"plots        {trained.run_dir / 'plots'}")
    console.line(f"MLflow run   {trained.mlflow_run_id} in {redacted(uri)}")
    console.line(f"registered   {again}{registered.model} version {registered.version} ({registered.alias})")
    console.line()
    console.line("try next:")
    for command in next_commands(config):
        console.line(f"  {command}")


def next_commands(config: RunConfig) -> list[str]:
    """What a user may want to run next, quoted for a shell."""
    solar, uri = _command("solar"), tracking_uri(config.tracking, config.workspace)
    there = [] if config.workspace == "workspace" else ["--workspace", config.workspace]
    seed = ["--name", f"{config.name}-seed-2", "--seed", "2"]
    browse = [[_command("mlflow"), "ui", "--backend-store-uri", uri]] if config.tracking.uri is None else []
    commands = [
        [solar, "inspect", config.shards_dir, "--verify"],
        *browse,
        [solar, "run", config.recipe, *there, *seed],
    ]
    return [shlex.join(command) for command in commands]


def _command(name: str) -> str:
    """The path that calls a program of this Python environment from the current directory."""
    return name if shutil.which(name) else os.path.relpath(Path(sys.executable).parent / name)
