"""MLflow: one MLflow run per training run, written by the driver in batches.

The default store is SQLite in the workspace; `tracking.uri` names another one. Workers never connect to MLflow.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from jobs.host.places import Place
from jobs.host.process import environment
from jobs.tracking.unsent import IMPATIENT, Point, Spool, is_away
from pipeline.events import flatten

METRICS_PER_REQUEST = 1000
"""MLflow's limit on the metrics of one log_batch call."""
PARAM_LENGTH = 6000
"""MLflow's limit on the characters of a parameter's value."""
FLUSH_SECONDS = 5.0
"""Queued metrics are sent after this time."""
AWAY_SECONDS = 30.0
"""Wait before the next try after MLflow did not answer."""
CLOSE_SECONDS = 60.0
"""How long the end of a run waits for MLflow to answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where runs and models are recorded."""

    uri: Place | None = None
    """MLflow tracking URI; unset = SQLite at WORKSPACE/mlflow/mlflow.db."""
    experiment: str = "solar"
    """Name of the MLflow experiment."""
    registered_model: str | None = None
    """Name of the model in the registry; unset = solar-DATA_NAME."""

    def __post_init__(self) -> None:
        name = self.registered_model or "solar"
        if {"/", ":"} & set(name) or name in (".", ".."):
            raise ValueError(f"registered_model={name!r}: must not hold '/' or ':', nor be '.' or '..'")


def tracking_uri(config: TrackingConfig, workspace: str) -> str:
    """The tracking URI in use; creates the directory of the default store."""
    if config.uri:
        return config.uri
    directory = Path(workspace).absolute() / "mlflow"
    directory.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{directory / 'mlflow.db'}"


def mlflow_client(uri: str) -> Any:
    """An MlflowClient for the runs and the registry at `uri`, whatever registry the process is configured for."""
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri, registry_uri=uri)


class TrackedRun:
    """One MLflow run: opened by `open_run`, filled step by step, closed with a status."""

    def __init__(self, client: Any, run_id: str, *, spool: Path | None = None) -> None:
        """`spool`: file for metrics not yet accepted by MLflow, so that none are lost if MLflow does not answer or the
        command is killed; None = it is an error if MLflow does not answer."""
        self.run_id = run_id
        self._client = client
        self._spool = Spool(spool) if spool else None
        self._waiting = self._spool.read() if self._spool else []
        self._flushed = time.monotonic()
        self._ask_again = 0.0

    def metrics(self, values: Mapping[str, float], *, step: int, time_seconds: float | None = None) -> None:
        """Queue metrics; sent in batches. MLflow has no `@` in names: `ndcg@10` is recorded as `ndcg_at_10`."""
        stamp = int((time_seconds or time.time()) * 1000)
        points = [Point(metric_name(key), value, stamp, step) for key, value in values.items() if not math.isnan(value)]
        self._waiting += points
        if self._spool:
            self._spool.append(points)
        if len(self._waiting) >= METRICS_PER_REQUEST or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> bool:
        """Send the queued metrics. False if MLflow does not answer: they stay queued."""
        if time.monotonic() < self._ask_again:
            return False
        try:
            with environment(IMPATIENT if self._spool else {}):
                self._send(self._waiting)
        except Exception as error:
            if self._spool is None or not is_away(error):
                raise
            self._ask_again = time.monotonic() + AWAY_SECONDS
            return False
        self._waiting, self._flushed = [], time.monotonic()
        if self._spool:
            self._spool.clear()
        return True

    def _send(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        for first in range(0, len(points), METRICS_PER_REQUEST):
            some = points[first : first + METRICS_PER_REQUEST]
            metrics = [Metric(point.key, point.value, point.timestamp, point.step) for point in some]
            self._client.log_batch(self.run_id, metrics=metrics)

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters; nested keys are joined with dots."""
        from mlflow.entities import Param

        flat = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in flatten(values).items()]
        for first in range(0, len(flat), 100):
            self._client.log_batch(self.run_id, params=flat[first : first + 100])

    def tags(self, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            self._client.set_tag(self.run_id, key, str(value))

    def adopt(self, run_id: str) -> None:
        """Make another run a child of this one."""
        self._client.set_tag(run_id, "mlflow.parentRunId", self.run_id)

    def artifact(self, file: Path) -> None:
        """Store a file with the run."""
        self._client.log_artifact(self.run_id, str(file))

    def close(self, *, status: str = "FINISHED", files: Sequence[Path] = ()) -> bool:
        """Flush, store these files and end the run: FINISHED, FAILED or KILLED (interrupted; a resumed job reopens it).

        False if MLflow did not answer for CLOSE_SECONDS: the spool keeps the missing metrics, and the run stays open.
        """
        deadline = time.monotonic() + CLOSE_SECONDS
        while True:
            self._ask_again = 0.0
            if self.flush():
                break
            if time.monotonic() > deadline:
                return False
            time.sleep(CLOSE_SECONDS / 10)
        for file in files:
            self.artifact(file)
        self._client.set_terminated(self.run_id, status)
        return True


def open_run(
    config: TrackingConfig, workspace: str, *, name: str, run_id: str | None = None, spool: Path | None = None
) -> TrackedRun:
    """A new run, or the existing run `run_id` if the store still has it. `spool`: see TrackedRun."""
    client = mlflow_client(tracking_uri(config, workspace))
    if run_id and _has_run(client, run_id):
        client.update_run(run_id, status="RUNNING")
        return TrackedRun(client, run_id, spool=spool)
    experiment = client.get_experiment_by_name(config.experiment)
    if experiment is None:
        artifacts = None if config.uri else (Path(workspace).absolute() / "mlflow" / "artifacts").as_uri()
        experiment_id = client.create_experiment(config.experiment, artifact_location=artifacts)
    else:
        experiment_id = experiment.experiment_id
    run = client.create_run(experiment_id, run_name=name)
    if run_id:
        client.set_tag(run.info.run_id, "solar.replaces_run", run_id)
    return TrackedRun(client, run.info.run_id, spool=spool)


def metric_name(key: str) -> str:
    """The metric's name in MLflow, which allows no `@`."""
    return key.replace("@", "_at_")


def system_facts() -> dict[str, Any]:
    """The machine, and the versions of Python and of the main libraries."""
    return {
        "system.python": platform.python_version(),
        "system.platform": platform.platform(),
        "system.cpus": os.cpu_count(),
        "system.memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        **{f"system.{name}": version(name) for name in ("torch", "torchrec", "deepspeed", "ray")},
    }


def _has_run(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.get_run(run_id)
    except MlflowException:
        return False
    return True
