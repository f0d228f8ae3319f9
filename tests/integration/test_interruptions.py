"""Killed and resumed as a user does it: a worker, then the command itself, then a damaged checkpoint; same bits after.

tests/benchmarks/kill_and_resume.py does the same at random moments, many times.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from pathlib import Path

import pytest

from jobs.tracking.runs import mlflow_client
from jobs.training.checkpoint import latest_checkpoint, read_state
from pipeline.build import PrepareConfig, prepare
from tests.support.interruptions import Command, differences, learned, orphans, telemetry
from tests.support.tiny import write_tiny_log, write_tiny_recipe

SHARDS = PrepareConfig(buckets=3, row_group_events=200)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where runs of one recipe are started."""

    directory: Path
    options: list[str]

    def train(self, name: str, *more: str) -> Command:
        return Command("train", "tiny.yaml", "--name", name, *self.options, *more, cwd=self.directory)

    def run_dir(self, name: str) -> Path:
        return self.directory / "workspace" / "runs" / name


@pytest.fixture(scope="module")
def place(tmp_path_factory, local_ray) -> Place:
    directory = tmp_path_factory.mktemp("interruptions")
    log = write_tiny_log(directory / "raw")
    write_tiny_recipe(directory / "tiny.yaml", workspace=directory / "workspace", events=log)
    prepare(str(log), str(directory / "shards"), config=SHARDS)
    options = ["--data.shards", str(directory / "shards"), "--training.epochs", "25"]
    return Place(directory, [*options, "--checkpoint.every_steps", "5", "--parallel.num_workers", "2"])


def wait_until(condition, command: Command) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert not command.ended(), command.finish()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def refused(command: Command) -> str:
    code, _, errors = command.finish()
    assert code == 2, errors
    assert len(errors.strip().splitlines()) == 1, errors
    return errors


def test_run_that_lost_a_worker_then_its_command_then_a_checkpoint_ends_with_the_same_bits(place):
    code, _, errors = place.train("undisturbed").finish()
    assert code == 0, errors
    run_dir = place.run_dir("killed")

    # Ray restarts the group after a worker's death; meanwhile nobody else may touch the run.
    command = place.train("killed", "--cluster.max_failures", "2")
    wait_until((run_dir / "lock").exists, command)
    assert f"process {command.pid} on " in refused(place.train("killed"))
    assert command.wait_for_step(run_dir, 15) < 90
    command.workers()[1].kill()
    wait_until(lambda: sum(row["kind"] == "start" for row in telemetry(run_dir)) == 2, command)
    command.wait_for_step(run_dir, 40)
    family = command.family()
    command.send(signal.SIGKILL)
    assert command.finish()[0] == -signal.SIGKILL
    assert orphans(family, within=30) == []

    # A disk that damaged the latest checkpoint: refused, and what the line says helps.
    latest = latest_checkpoint(run_dir)
    assert latest is not None
    (latest / "COMMIT").write_bytes((latest / "COMMIT").read_bytes()[:100])
    assert f"remove {latest} to continue from step-" in refused(place.train("killed", "--resume"))

    # Another day came meanwhile: the run goes on with the data that it began with.
    day = write_tiny_log(place.directory / "raw-2", seed=1) / "events-00000.parquet"
    day.rename(place.directory / "raw" / "events-00001.parquet")
    prepare(str(place.directory / "raw"), str(place.directory / "shards"), config=SHARDS)
    code, output, errors = place.train("killed", "--from-previous").finish()
    assert code == 0, errors
    assert f"{latest.name} is now damaged-{latest.name}" in output
    assert "continues on manifest 1; the shards are at 2 now" in output

    assert differences(learned(place.run_dir("undisturbed")), learned(run_dir)) == []
    steps = [row["step"] for row in telemetry(run_dir) if row["kind"] == "step"]
    assert steps == sorted(set(steps))
    assert mlflow_statuses(place) == {"undisturbed": ["FINISHED"], "killed": ["FINISHED"]}


def mlflow_statuses(place: Place) -> dict[str, list[str]]:
    client = mlflow_client(f"sqlite:///{place.directory}/workspace/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("solar")
    assert experiment is not None
    statuses: dict[str, list[str]] = {}
    for run in client.search_runs([experiment.experiment_id]):
        statuses.setdefault(run.info.run_name or "", []).append(run.info.status)
    return statuses


def test_interrupt_leaves_a_checkpoint_from_which_the_same_command_continues(place):
    command = place.train("interrupted", "--training.epochs", "400")
    assert command.wait_for_step(place.run_dir("interrupted"), 1) < 1600
    command.send(signal.SIGINT)
    code, _, errors = command.finish(within=120)
    assert code == 130, errors
    assert "solar: interrupted" in errors
    latest = latest_checkpoint(place.run_dir("interrupted"))
    assert latest is not None
    assert not read_state(latest)["train_state"]["finished"]
    assert "add --resume" in refused(place.train("interrupted", "--training.epochs", "400"))


def test_sigterm_while_workers_start_ends_the_command_and_all_it_started(place):
    command = place.train("early")
    wait_until(lambda: command.workers(), command)
    family = command.family()
    command.send(signal.SIGTERM)
    code, _, errors = command.finish(within=120)
    assert code == 130, errors
    assert "solar: interrupted" in errors
    assert orphans(family) == []
    assert latest_checkpoint(place.run_dir("early")) is None
