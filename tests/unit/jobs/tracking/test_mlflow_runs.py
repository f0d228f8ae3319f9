"""Metrics reach MLflow once each, whatever happens on the way: an outage, an answer that is lost, a killed command."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

from jobs.tracking import mlflow_runs as tracking
from jobs.tracking.mlflow_runs import TrackedRun, mlflow_client


class Unreliable:
    """A client whose next requests fail, before or after the store did what they ask."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.fails: list[tuple[str, Exception]] = []

    def log_batch(self, run_id: str, **named: Any) -> None:
        when, error = self.fails.pop(0) if self.fails else ("", None)
        if when != "before":
            self._client.log_batch(run_id, **named)
        if error:
            raise error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


AWAY = MlflowException("API request to http://mlflow failed: connection refused")


@pytest.fixture
def client(tmp_path) -> Any:
    return Unreliable(mlflow_client(f"sqlite:///{tmp_path}/mlflow.db"))


@pytest.fixture
def run_id(client, tmp_path) -> str:
    experiment = client.create_experiment("test", artifact_location=tmp_path.as_uri())
    return client.create_run(experiment).info.run_id


@pytest.fixture
def clock(monkeypatch) -> Any:
    """time.monotonic of the tracker; sleeping moves it."""

    class Clock:
        now = 1000.0

        def monotonic(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            self.now += seconds

        def time(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(tracking, "time", clock)
    return clock


def told(client: Any, run_id: str) -> list[tuple[int, float, int]]:
    return [(point.step, point.value, point.timestamp) for point in client.get_metric_history(run_id, "train/loss")]


def push(run: TrackedRun, steps: range) -> None:
    for step in steps:
        run.metrics({"train/loss": 1 / step}, step=step, time_seconds=step + 0.5)


EVERY = [(step, 1 / step, 1000 * step + 500) for step in range(1, 10)]


def test_points_of_an_outage_arrive_later_once_and_with_their_own_time(client, run_id, clock, tmp_path):
    spool = tmp_path / "mlflow-unsent.jsonl"
    run = TrackedRun(client, run_id, spool=spool)
    push(run, range(1, 4))
    assert run.flush()
    # The second answer is lost after the store took the points.
    client.fails = [("before", AWAY), ("after", AWAY)]
    push(run, range(4, 7))
    assert not run.flush()
    clock.now += tracking.AWAY_SECONDS
    assert not run.flush()
    assert spool.read_text().count("train/loss") == 3
    push(run, range(7, 10))
    clock.now += tracking.AWAY_SECONDS
    assert run.close()
    assert sorted(told(client, run_id)) == EVERY
    assert not spool.exists()
    assert client.get_run(run_id).info.status == "FINISHED"


def test_what_a_killed_command_had_not_sent_is_sent_by_the_next(client, run_id, tmp_path):
    spool = tmp_path / "mlflow-unsent.jsonl"
    push(TrackedRun(client, run_id, spool=spool), range(1, 6))
    assert told(client, run_id) == []
    with spool.open("a") as stream:
        stream.write("\n" + json.dumps({"key": "train/loss"})[:9])
    push(TrackedRun(client, run_id, spool=spool), range(6, 10))
    assert TrackedRun(client, run_id, spool=spool).close()
    assert sorted(told(client, run_id)) == EVERY


def test_an_end_without_mlflow_leaves_the_points_and_says_so(client, run_id, clock, tmp_path):
    run = TrackedRun(client, run_id, spool=tmp_path / "spool")
    push(run, range(1, 10))
    client.fails = [("before", AWAY)] * 100
    assert not run.close()
    assert client.get_run(run_id).info.status == "RUNNING"
    client.fails = []
    assert TrackedRun(client, run_id, spool=tmp_path / "spool").close()
    assert sorted(told(client, run_id)) == EVERY


def test_what_mlflow_refuses_is_an_error_and_without_a_spool_its_absence_too(client, run_id, tmp_path):
    refused = MlflowException("no such run", error_code=RESOURCE_DOES_NOT_EXIST)
    for spool, error in ((tmp_path / "spool", refused), (None, AWAY)):
        client.fails = [("before", error)]
        run = TrackedRun(client, run_id, spool=spool)
        push(run, range(1, 3))
        with pytest.raises(MlflowException, match=str(error)):
            run.flush()


def test_a_spool_does_not_touch_other_settings(client, run_id, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    assert TrackedRun(client, run_id, spool=Path(tmp_path / "spool")).flush()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_client_keeps_to_its_store_whatever_registry_the_process_was_given(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{tmp_path}/another.db")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow_client(store).create_registered_model("shop")
    assert [model.name for model in mlflow_client(store).search_registered_models()] == ["shop"]
    assert not (tmp_path / "another.db").exists()
