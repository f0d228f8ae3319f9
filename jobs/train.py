"""solar train RECIPE: shards -> checkpoints and an MLflow run.

The driver: checks everything that can be checked before a worker starts, starts Ray Train, follows it with a progress
bar, writes MLflow. The work itself is jobs/training/loop.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from jobs.cluster import ray_session
from jobs.config import ConfigError, RunConfig, redacted
from jobs.console import Console, Stage
from jobs.tracking import TrackedRun, git_commit, open_run, system_facts
from jobs.training.checkpoint import committed_checkpoints, latest_checkpoint, read_state
from jobs.training.loop import TrainJob
from jobs.training.results import primary_metric
from jobs.workers import Interrupted, run_workers
from pipeline.build import index_requests
from pipeline.manifest import current_manifest
from pipeline.request_index import RequestCounts
from pipeline.shards import Shards


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a training run left behind."""

    run_dir: Path
    checkpoint: Path
    """The best checkpoint by the validation metric."""
    mlflow_run_id: str
    reused: bool


def train(config: RunConfig, console: Console, *, resume: bool, verbose: bool = False) -> Trained:
    """Train to the end. A finished run of the same configuration is reused; an unfinished one needs `resume`."""
    run_dir = config.run_dir
    shards = open_shards(config)
    _check_model(config, shards)
    facts = {
        "config": config.as_dict(),
        "fingerprint": config.fingerprint(),
        "manifest": shards.manifest.number,
        "manifest_fingerprint": shards.manifest.fingerprint,
        "git_commit": git_commit(),
    }
    previous = _previous_run(config, shards)
    latest = latest_checkpoint(run_dir)
    if latest is not None:
        document = read_state(latest, checksums=True)
        if document["train_state"]["finished"]:
            return Trained(run_dir, best_checkpoint(run_dir), previous["mlflow_run_id"], reused=True)
        if not resume:
            raise ConfigError(f"{run_dir}: holds an unfinished run ({latest.name}): add --resume, or --name NEW")

    with ray_session(config.cluster, num_cpus=config.parallel.num_cpus, verbose=verbose):
        _check_parts(config, index_requests(shards, config=config.data.requests))
        run = _open_run(config, facts, previous)
        status = "FAILED"
        try:
            with console.stage("train") as stage:
                primary = primary_metric(config.data.requests)
                follow = _Follower(run, stage, run_dir / "telemetry.jsonl", primary=primary)
                arguments = {"job": train_job(config, shards, facts=facts)}
                run_workers(_train_worker, arguments, config=config, name="train", on_rows=follow, stoppable=True)
            status = "FINISHED"
        except Interrupted:
            status = "KILLED"
            raise
        finally:
            run.close(status=status)
    return Trained(run_dir, best_checkpoint(run_dir), run.run_id, reused=False)


def trained_run(config: RunConfig) -> Trained:
    """What a run of this config left behind, finished or not."""
    previous = _previous_run(config, open_shards(config))
    if not previous:
        raise ConfigError(f"{config.run_dir}: no run there: run `solar train` first")
    return Trained(config.run_dir, best_checkpoint(config.run_dir), previous["mlflow_run_id"], reused=True)


def require_finished(run_dir: Path) -> None:
    """Refuse a run that still has epochs to go."""
    latest = latest_checkpoint(run_dir)
    if latest is None or not read_state(latest)["train_state"]["finished"]:
        raise ConfigError(f"{run_dir}: the run is not finished: continue it with `solar train ... --resume` first")


def open_shards(config: RunConfig, *, number: int | None = None) -> Shards:
    """The current data set of a config, or it as manifest `number` describes it."""
    path = config.shards_dir if "://" in config.shards_dir else os.path.abspath(config.shards_dir)
    if current_manifest(path) is None:
        raise ConfigError(f"{config.shards_dir}: no shards there: run `solar prepare` or `solar run` first")
    return Shards.open(path, number=number)


def train_job(config: RunConfig, shards: Shards, *, facts: dict[str, Any] | None = None) -> TrainJob:
    """What the workers get to know of a config."""
    return TrainJob(
        run_dir=str(config.run_dir.absolute()),
        shards=shards.path,
        manifest=shards.manifest.number,
        seed=config.seed,
        model=config.model,
        training=config.training,
        requests=config.data.requests,
        loader=config.data.loader,
        optimizer=config.optimizer,
        parallel=config.parallel,
        checkpoint=config.checkpoint,
        facts=facts or {},
    )


def best_checkpoint(run_dir: Path) -> Path:
    """The checkpoint with the best validation metric so far, with all its checksums right."""
    latest = latest_checkpoint(run_dir)
    if latest is None:
        raise ConfigError(f"{run_dir}: no checkpoint there: run `solar train` first")
    best = run_dir / f"step-{read_state(latest)['train_state']['best_step']:08d}"
    chosen = best if best in committed_checkpoints(run_dir) else latest
    read_state(chosen, checksums=True)
    return chosen


def _train_worker(arguments: dict[str, Any]) -> None:
    from jobs.training.loop import train as train_loop

    train_loop(arguments["job"], reporter=arguments["reporter"])


class _Follower:
    """Turns rank 0's rows into the progress bar, MLflow metrics and RUN/telemetry.jsonl."""

    def __init__(self, run: TrackedRun, stage: Stage, log: Path, *, primary: str) -> None:
        self._run, self._stage, self._log, self._primary = run, stage, log, primary
        self._step, self._num_steps, self._loss, self._best = 0, 0, float("nan"), float("nan")

    def __call__(self, rows: list[dict[str, Any]]) -> None:
        with self._log.open("a") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
        for row in rows:
            kind, stamp = row.pop("kind"), row.pop("time")
            if kind == "start":
                self._step, self._num_steps = row["step"], row["num_steps"]
            elif kind == "step":
                self._step, self._loss = row.pop("step"), row["loss"]
                self._run.metrics(
                    {f"train/{key}": value for key, value in row.items()}, step=self._step, time_seconds=stamp
                )
            elif kind == "valid":
                step = row.pop("step")
                self._best = max(row[self._primary], self._best) if self._best == self._best else row[self._primary]
                self._run.metrics({f"valid/{key}": value for key, value in row.items()}, step=step, time_seconds=stamp)
        note = f"step {self._step}/{self._num_steps}  loss {self._loss:.4f}  best {self._primary} {self._best:.4f}"
        self._stage.result = note
        self._stage.update(self._step, self._num_steps or None, note)


def _check_model(config: RunConfig, shards: Shards) -> None:
    if config.model.get("time_features") and not shards.manifest.has_time:
        raise ConfigError(
            f"model.time_features=true: {config.shards_dir} has an order only, no time stamps: "
            "set --model.time_features false"
        )


def _check_parts(config: RunConfig, counts: RequestCounts) -> None:
    """Every part of the split must have a request, or the run would fail when it gets there."""
    requests = config.data.requests
    for part in ("train", "valid", "test"):
        if not getattr(counts, part).requests.any():
            raise ConfigError(
                f"data.requests: task {requests.task} with split {requests.split} (valid_from {requests.valid_from}, "
                f"test_from {requests.test_from}) leaves no {part} request in {config.shards_dir}: move the bounds, "
                "lower min_history, or bring more events"
            )


def _open_run(config: RunConfig, facts: dict[str, Any], previous: dict[str, Any]) -> TrackedRun:
    """The MLflow run, new or continued, and run.json that ties it to the directory."""
    from mlflow.exceptions import MlflowException

    try:
        run = open_run(config.tracking, config.workspace, name=config.name, run_id=previous.get("mlflow_run_id"))
    except MlflowException as error:
        raise ConfigError(f"tracking.uri={redacted(config.tracking.uri)}: {redacted(str(error))}") from error
    config.run_dir.mkdir(parents=True, exist_ok=True)
    write_json(config.run_dir / "run.json", {**facts, "mlflow_run_id": run.run_id})
    if run.run_id != previous.get("mlflow_run_id"):
        run.params(facts["config"])
        run.tags({**system_facts(), **{f"solar.{key}": value for key, value in facts.items() if key != "config"}})
    return run


def _previous_run(config: RunConfig, shards: Shards) -> dict[str, Any]:
    """The directory's run.json, {} where there is none; one of another configuration or of other data is refused."""
    file = config.run_dir / "run.json"
    if not file.exists():
        if config.run_dir.exists() and any(config.run_dir.iterdir()):
            raise ConfigError(f"{config.run_dir}: not empty and not a run: choose another --name or --workspace")
        return {}
    previous = read_json(file)
    if previous["fingerprint"] != config.fingerprint():
        key, there, here = _first_difference(previous["config"], config.as_dict(), config.identity())
        raise ConfigError(
            f"{config.run_dir}: belongs to another configuration ({key} is {there} there, {here} here): "
            "choose another --name, or remove the directory"
        )
    manifest = shards.manifest
    if previous["manifest_fingerprint"] != manifest.fingerprint:
        raise ConfigError(
            f"{config.run_dir}: was trained on manifest {previous['manifest']} ({previous['manifest_fingerprint']}), "
            f"the shards are now at manifest {manifest.number} ({manifest.fingerprint}): choose another --name"
        )
    return previous


def _first_difference(there: dict[str, Any], here: dict[str, Any], identity: dict[str, Any]) -> tuple[str, Any, Any]:
    """The first dotted key within the identity whose values differ."""

    def walk(keys: Any, left: Any, right: Any, prefix: str) -> tuple[str, Any, Any] | None:
        for key in keys:
            old, new = (side.get(key) if isinstance(side, dict) else None for side in (left, right))
            if isinstance(keys[key], dict) and isinstance(old, dict):
                found = walk(keys[key], old, new, f"{prefix}{key}.")
                if found:
                    return found
            elif old != new:
                return f"{prefix}{key}", old, new
        return None

    keys = {key: value for key, value in identity.items() if key != "precision"}
    return walk(keys, there, here, "") or (
        "parallel.precision",
        there["parallel"]["precision"],
        here["parallel"]["precision"],
    )


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Replace the file as a whole."""
    staged = path.with_suffix(".tmp")
    staged.write_text(json.dumps(document, indent=1, sort_keys=True))
    os.replace(staged, path)
