"""Finds the results of a run in its directory, and the shards that it was trained on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jobs.config.run_config import RunConfig
from jobs.host.errors import UserError
from jobs.runs.record import previous_run, read_record
from jobs.training.checkpoint import (
    latest_checkpoint,
    read_state,
    read_train_state,
)
from jobs.training.warm_start import best_of
from pipeline.shards.dataset import Shards
from pipeline.shards.manifest import current_manifest
from pipeline.storage import absolute


@dataclasses.dataclass(frozen=True)
class Trained:
    """The results of a training run."""

    run_dir: Path
    checkpoint: Path
    """The best checkpoint by the validation metric."""
    mlflow_run_id: str
    reused: bool


def trained_run(config: RunConfig) -> Trained:
    """The results of the run of this config, finished or not."""
    previous = previous_run(config, run_shards(config))
    if previous is None or previous.mlflow_run_id is None:
        raise UserError(f"{config.run_dir}: no run there: run `solar train` first")
    return Trained(config.run_dir, best_checkpoint(config.run_dir), previous.mlflow_run_id, reused=True)


def require_finished(run_dir: Path) -> None:
    """UserError if the run has not trained all its epochs."""
    latest = latest_checkpoint(run_dir)
    if latest is None or not read_train_state(latest).finished:
        raise UserError(f"{run_dir}: the run is not finished: continue it with `solar train ... --resume` first")


def run_shards(config: RunConfig) -> Shards:
    """The data set of the config's run: at the manifest that the run began with; the current one if there is no run."""
    record = read_record(config.run_dir)
    return open_shards(config, number=record.manifest if record else None)


def open_shards(config: RunConfig, *, number: int | None = None) -> Shards:
    """The data set of a config at manifest `number`; None = the current one."""
    path = absolute(config.shards_dir)
    if current_manifest(path) is None:
        raise UserError(f"{config.shards_dir}: no shards there: run `solar prepare` or `solar run` first")
    return Shards.open(path, number=number)


def best_checkpoint(run_dir: Path) -> Path:
    """The checkpoint with the best validation metric so far; its checksums are verified."""
    if latest_checkpoint(run_dir) is None:
        raise UserError(f"{run_dir}: no checkpoint there: run `solar train` first")
    chosen = best_of(run_dir)
    read_state(chosen, checksums=True)
    return chosen
