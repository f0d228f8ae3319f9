"""RUN/run.json: the record that connects a run's directory with its configuration, its data and its MLflow run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.config.open_settings import LATER
from jobs.config.run_config import RunConfig, counted_training, stored_requests
from jobs.host.code_version import git_commit
from jobs.host.documents import as_json, from_json, stored_with
from jobs.host.errors import UserError
from jobs.host.json_files import read_json, write_json
from jobs.host.locks import LOCK_FILES
from jobs.host.secrets import redacted
from jobs.tracking.mlflow_runs import TrackedRun, open_run, system_facts
from jobs.tracking.unsent import NAME as SPOOL
from jobs.tracking.unsent import is_locked
from jobs.training.checkpoint import checkpoint_key, latest_checkpoint, read_state
from jobs.training.placement import PLAN_FILE
from jobs.training.warm_start import find_checkpoint
from models.zoo import current_settings
from pipeline.batches.request_index import settings_on
from pipeline.shards.dataset import Shards

RECORD = "run.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """How a run came about. It is stored in run.json and, without the MLflow fields, in every checkpoint of the run."""

    config: Mapping[str, Any]
    """The whole configuration."""
    fingerprint: str
    """Fingerprint of the part of the configuration that identifies the run."""
    manifest: int
    """Number of the manifest of the shards."""
    manifest_fingerprint: str
    git_commit: str
    """Commit of this program."""
    warm_start: str | None = None
    """Key of the checkpoint that the run began from; None = from scratch."""
    mlflow_run_id: str | None = stored_with("mlflow_run_id")
    mlflow_status: str | None = stored_with("mlflow_status")
    """RUNNING, FINISHED, FAILED or KILLED: the last status that MLflow got."""


def run_facts(config: RunConfig, shards: Shards, *, warm_start: str | None = None) -> RunRecord:
    """The record of a run without the MLflow fields; `warm_start` is the key of the checkpoint that it began from."""
    return RunRecord(
        config=config.as_dict(),
        fingerprint=config.fingerprint(),
        manifest=shards.manifest.number,
        manifest_fingerprint=shards.manifest.fingerprint,
        git_commit=git_commit(),
        warm_start=warm_start,
    )


def previous_run(config: RunConfig, shards: Shards) -> RunRecord | None:
    """The directory's record; None if there is none. UserError: it is of another configuration or of other data."""
    previous = read_record(config.run_dir)
    if previous is None:
        return None
    if previous.fingerprint != config.fingerprint():
        key, there, here = _first_difference(previous.config, config.as_dict(), config.identity())
        raise UserError(
            f"{config.run_dir}: belongs to another configuration ({key} is {there} there, {here} here): "
            "choose another --name, or remove the directory"
        )
    _refuse_other_events(config, previous, shards)
    _refuse_other_beginning(config, previous)
    manifest = shards.manifest
    if previous.manifest_fingerprint != manifest.fingerprint:
        raise UserError(
            f"{config.run_dir}: was trained on manifest {previous.manifest} ({previous.manifest_fingerprint}), "
            f"the shards are now at manifest {manifest.number} ({manifest.fingerprint}): choose another --name"
        )
    return previous


def read_record(run_dir: Path) -> RunRecord | None:
    """The record of the run in a directory; None if there is no run."""
    file = run_dir / RECORD
    if file.exists():
        try:
            return from_json(RunRecord, read_json(file))
        except ValueError as error:
            fix = f"remove {run_dir}, there is no checkpoint in it"
            if latest_checkpoint(run_dir) is not None:
                fix = "remove it; the checkpoints hold the same record, only the MLflow run will be a new one"
            raise UserError(f"{file}: not valid JSON (damaged or cut off): {fix}") from error
    latest = latest_checkpoint(run_dir)
    if latest is not None:
        return record_of(latest)
    no_content = {*LOCK_FILES, Path(RECORD).with_suffix(".tmp").name}
    if run_dir.exists() and any(path.name not in no_content for path in run_dir.iterdir()):
        raise UserError(f"{run_dir}: not empty and not a run: choose another --name or --workspace")
    return None


def record_of(checkpoint: Path, *, checksums: bool = False) -> RunRecord:
    """The record of a checkpoint's run; the checkpoint is verified as by `read_state`."""
    return from_json(RunRecord, read_state(checkpoint, checksums=checksums))


def open_tracked_run(config: RunConfig, facts: RunRecord, previous: RunRecord | None) -> TrackedRun:
    """Open the run in MLflow, new or continued, and store the record that names it."""
    from mlflow.exceptions import MlflowException

    known = previous.mlflow_run_id if previous else None
    try:
        run = open_run(
            config.tracking,
            config.workspace,
            name=config.name,
            run_id=known,
            spool=config.run_dir / SPOOL,
        )
    except MlflowException as error:
        if is_locked(error):
            raise
        raise UserError(f"tracking.uri={redacted(config.tracking.uri)}: {redacted(str(error))}") from error
    config.run_dir.mkdir(parents=True, exist_ok=True)
    _write_record(config.run_dir, dataclasses.replace(facts, mlflow_run_id=run.run_id, mlflow_status="RUNNING"))
    if run.run_id != known:
        run.params(dict(facts.config))
        tags = {key: value for key, value in as_json(facts).items() if key != "config" and value is not None}
        run.tags({**system_facts(), **{f"solar.{key}": value for key, value in tags.items()}})
    return run


def close_tracked_run(config: RunConfig, run: TrackedRun, *, status: str) -> bool:
    """End the MLflow run (FINISHED, FAILED, KILLED), and record that it ended: if a command dies before, a later one
    ends the run.

    False if MLflow does not answer: the next command that opens the run sends what is missing.
    """
    plan = config.run_dir / PLAN_FILE
    if not run.close(status=status, files=[plan] if plan.exists() else []):
        return False
    record = read_record(config.run_dir)
    assert record is not None, "opening the run wrote it"
    _write_record(config.run_dir, dataclasses.replace(record, mlflow_status=status))
    return True


def _write_record(run_dir: Path, record: RunRecord) -> None:
    write_json(run_dir / RECORD, as_json(record))


def _refuse_other_events(config: RunConfig, previous: RunRecord, shards: Shards) -> None:
    """UserError if the run read other events of a log with labels than the configuration asks for."""
    requests = config.data.requests
    there = dataclasses.replace(requests, min_label=stored_requests(previous.config)["min_label"])
    if settings_on(shards, there) != settings_on(shards, requests):
        raise UserError(
            f"{config.run_dir}: belongs to another configuration (data.requests.min_label is {there.least_label} "
            f"there, {requests.least_label} here): choose another --name, or remove the directory"
        )


def _refuse_other_beginning(config: RunConfig, previous: RunRecord) -> None:
    """UserError if the run began from another checkpoint than the configuration names, or from scratch. A checkpoint
    that was removed since is not compared: the run no longer needs it."""
    begun, asked = previous.warm_start, config.training.warm_start
    if begun and asked and not Path(asked).exists():
        return
    here = checkpoint_key(find_checkpoint(asked)) if asked else None
    if begun != here:
        there = previous.config["training"].get("warm_start")
        raise UserError(
            f"{config.run_dir}: belongs to another configuration (training.warm_start is {_beginning(there, begun)} "
            f"there, {_beginning(asked, here)} here): choose another --name, or remove the directory"
        )


def _beginning(path: str | None, key: str | None) -> str:
    return f"{path} with content {key}" if key else "null"


def _first_difference(there: Mapping[str, Any], here: dict[str, Any], identity: dict[str, Any]) -> tuple[str, Any, Any]:
    """The first dotted key of the identity whose values differ, with both values."""

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

    there, here = (
        {
            **side,
            "training": counted_training(side["training"]),
            "model": {**LATER, **current_settings(side["model"])},
        }
        for side in (there, here)
    )
    # The model by today's names.
    keys = {key: value for key, value in identity.items() if key != "precision"} | {"model": here["model"]}
    return walk(keys, there, here, "") or (
        "parallel.precision",
        there["parallel"]["precision"],
        here["parallel"]["precision"],
    )
