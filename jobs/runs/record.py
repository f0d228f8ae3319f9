"""RUN/run.json: what ties a run's directory to its configuration, its data and its MLflow run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.config.run import RunConfig
from jobs.host.code_version import git_commit
from jobs.host.errors import UserError
from jobs.host.files import read_json, write_json
from jobs.host.locks import LOCK_FILES
from jobs.host.secrets import redacted
from jobs.tracking.runs import TrackedRun, open_run, system_facts
from jobs.tracking.unsent import NAME as SPOOL
from jobs.training.checkpoint import checkpoint_key, latest_checkpoint, read_state
from jobs.training.placement import PLAN_FILE
from jobs.training.warm_start import find_checkpoint
from pipeline.shards.dataset import Shards

RECORD = "run.json"


FACTS = ("config", "fingerprint", "manifest", "manifest_fingerprint", "git_commit", "warm_start")


def run_facts(config: RunConfig, shards: Shards, *, warm_start: str | None = None) -> dict[str, Any]:
    """What run.json and every checkpoint say about how the run came about; `warm_start` is the key of the checkpoint
    that it began from."""
    return {
        "config": config.as_dict(),
        "fingerprint": config.fingerprint(),
        "manifest": shards.manifest.number,
        "manifest_fingerprint": shards.manifest.fingerprint,
        "git_commit": git_commit(),
        "warm_start": warm_start,
    }


def previous_run(config: RunConfig, shards: Shards) -> dict[str, Any]:
    """The directory's record, {} where there is none; one of another configuration or of other data is refused."""
    previous = read_record(config.run_dir)
    if not previous:
        return {}
    if previous["fingerprint"] != config.fingerprint():
        key, there, here = _first_difference(previous["config"], config.as_dict(), config.identity())
        raise UserError(
            f"{config.run_dir}: belongs to another configuration ({key} is {there} there, {here} here): "
            "choose another --name, or remove the directory"
        )
    _refuse_other_beginning(config, previous)
    manifest = shards.manifest
    if previous["manifest_fingerprint"] != manifest.fingerprint:
        raise UserError(
            f"{config.run_dir}: was trained on manifest {previous['manifest']} ({previous['manifest_fingerprint']}), "
            f"the shards are now at manifest {manifest.number} ({manifest.fingerprint}): choose another --name"
        )
    return previous


def read_record(run_dir: Path) -> dict[str, Any]:
    """What the directory says of its run, {} where there is none."""
    file = run_dir / RECORD
    if file.exists():
        try:
            return read_json(file)
        except ValueError as error:
            fix = f"remove {run_dir}, there is no checkpoint in it"
            if latest_checkpoint(run_dir) is not None:
                fix = "remove it; the checkpoints say the same, only the MLflow run will be a new one"
            raise UserError(f"{file}: not valid JSON (damaged or cut): {fix}") from error
    latest = latest_checkpoint(run_dir)
    if latest is not None:
        document = read_state(latest)
        return {key: document.get(key) for key in FACTS}
    ours = {*LOCK_FILES, Path(RECORD).with_suffix(".tmp").name}
    if run_dir.exists() and any(path.name not in ours for path in run_dir.iterdir()):
        raise UserError(f"{run_dir}: not empty and not a run: choose another --name or --workspace")
    return {}


def open_tracked_run(config: RunConfig, facts: dict[str, Any], previous: dict[str, Any]) -> TrackedRun:
    """The MLflow run, new or continued, and the record that names it."""
    from mlflow.exceptions import MlflowException

    try:
        run = open_run(
            config.tracking,
            config.workspace,
            name=config.name,
            run_id=previous.get("mlflow_run_id"),
            spool=config.run_dir / SPOOL,
        )
    except MlflowException as error:
        raise UserError(f"tracking.uri={redacted(config.tracking.uri)}: {redacted(str(error))}") from error
    config.run_dir.mkdir(parents=True, exist_ok=True)
    write_json(config.run_dir / RECORD, {**facts, "mlflow_run_id": run.run_id, "mlflow_status": "RUNNING"})
    if run.run_id != previous.get("mlflow_run_id"):
        run.params(facts["config"])
        told = {key: value for key, value in facts.items() if key != "config" and value is not None}
        run.tags({**system_facts(), **{f"solar.{key}": value for key, value in told.items()}})
    return run


def close_tracked_run(config: RunConfig, run: TrackedRun, *, status: str) -> bool:
    """End the MLflow run (FINISHED, FAILED, KILLED) and note it, so that a command that died before is made good.

    False where MLflow is away: the next command that opens the run makes it good.
    """
    plan = config.run_dir / PLAN_FILE
    if not run.close(status=status, files=[plan] if plan.exists() else []):
        return False
    write_json(config.run_dir / RECORD, {**read_json(config.run_dir / RECORD), "mlflow_status": status})
    return True


def _refuse_other_beginning(config: RunConfig, previous: dict[str, Any]) -> None:
    """The run began from a certain checkpoint, or from the seed. One that is gone by now is not needed any more."""
    begun, asked = previous.get("warm_start"), config.training.warm_start
    if begun and asked and not Path(asked).exists():
        return
    here = checkpoint_key(find_checkpoint(asked)) if asked else None
    if begun != here:
        there = previous["config"]["training"].get("warm_start")
        raise UserError(
            f"{config.run_dir}: belongs to another configuration (training.warm_start is {_beginning(there, begun)} "
            f"there, {_beginning(asked, here)} here): choose another --name, or remove the directory"
        )


def _beginning(path: str | None, key: str | None) -> str:
    return f"{path} with content {key}" if key else "null"


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
