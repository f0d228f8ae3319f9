"""Finds the results of a run in its directory, and the shards that it was trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jobs.config.open_settings import left_open, suited
from jobs.config.run_config import RunConfig
from jobs.host.errors import UserError
from jobs.runs.record import previous_run, read_record, record_of
from jobs.training.checkpoint import CheckpointError, latest_checkpoint, read_state, read_train_state
from jobs.training.warm_start import best_of, find_checkpoint
from pipeline.events import DataError
from pipeline.shards.dataset import Shards
from pipeline.shards.manifest import current_manifest, why_removed
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
    config = settled(config)
    previous = previous_run(config, run_shards(config))
    if previous is None or previous.mlflow_run_id is None:
        raise UserError(f"{config.run_dir}: no run there: run `solar train` first")
    return Trained(config.run_dir, best_checkpoint(config.run_dir), previous.mlflow_run_id, reused=True)


def require_finished(run_dir: Path) -> None:
    """UserError if the run has not trained all its epochs."""
    latest = latest_checkpoint(run_dir)
    if latest is None or not read_train_state(latest).finished:
        raise UserError(f"{run_dir}: the run is not finished: continue it with `solar train ... --resume` first")


def settled(config: RunConfig, *, tell: Callable[[str], None] = lambda line: None) -> RunConfig:
    """The config with the settings of the model that it leaves open: as in its run if there is one, else as in the
    checkpoint that it begins from, else what suits data and task; `tell` gets a line for each that is switched off. A
    run or checkpoint that was stored before a setting existed has it off. The data set must exist."""
    model = dict(config.model)
    if not (names := left_open(model)):
        return config
    known, manifest, requests = _settled_before(config), run_shards(config).manifest, config.data.requests
    for name in names:
        if known:
            model[name] = known.get(name, False)
            continue
        model[name], reason = suited(
            name, task=requests.task, split=requests.split, loss=config.training.loss,
            has_time=manifest.has_time, has_labels=manifest.has_labels,
        )  # fmt: skip
        if not model[name]:
            tell(f"{'train':<12} model.{name}=false: {reason}")
    return dataclasses.replace(config, model=model)


def _settled_before(config: RunConfig) -> Mapping[str, Any]:
    """The model's settings in the record of the run, or in the checkpoint that a new run begins from; {} without
    either."""
    record, begins_from = read_record(config.run_dir), config.training.warm_start
    if record is None and begins_from is not None:
        try:
            record = record_of(find_checkpoint(begins_from))
        except CheckpointError as error:
            raise CheckpointError(f"training.warm_start={begins_from}: {error}") from error
    return record.config["model"] if record else {}


def run_shards(config: RunConfig) -> Shards:
    """The data set of the config's run: at the manifest that the run began with; the current one if there is no run."""
    record = read_record(config.run_dir)
    try:
        return open_shards(config, number=record.manifest if record else None)
    except DataError as error:
        if record is None or why_removed(absolute(config.shards_dir), number=record.manifest) is None:
            raise
        raise UserError(f"{error} with --name NEW, or remove {config.run_dir}") from error


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
