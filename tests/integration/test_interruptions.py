"""Killed and resumed as a user does it: a worker, then the command itself, then a damaged checkpoint; same bits after.

tests/benchmarks/kill_and_resume.py does the same at random moments, many times.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import signal
import subprocess
from pathlib import Path

import polars as pl
import pytest

from jobs.tracking.mlflow_runs import mlflow_client
from jobs.training.checkpoint import latest_checkpoint, read_state
from pipeline import build
from pipeline.shards.dataset import Shards
from pipeline.shards.leases import current_leases
from tests.support.commands import ForkedCommand, refused, solar
from tests.support.held import Holds
from tests.support.interruptions import Command, differences, learned, orphans, telemetry
from tests.support.serial import without_ray
from tests.support.tiny import prepare_tiny, write_tiny_log, write_tiny_recipe


@dataclasses.dataclass(frozen=True)
class Place:
    """Where runs of one recipe are started."""

    directory: Path
    options: list[str]

    def arguments(self, name: str, *more: str) -> list[str]:
        return ["train", "tiny.yaml", "--name", name, *self.options, *more]

    def start(self, name: str, *more: str, holds: Holds) -> Command:
        """As a user starts it, with Ray; it waits at the holds."""
        return Command(*self.arguments(name, *more), cwd=self.directory, holds=holds)

    def train(self, name: str, *more: str) -> subprocess.CompletedProcess[str]:
        """To the end, without Ray: its ranks are forks."""
        return solar(*self.arguments(name, *more), cwd=self.directory)

    def refusal(self, name: str, *more: str, code: int = 2) -> str:
        return refused(*self.arguments(name, *more), cwd=self.directory, code=code)

    def run_dir(self, name: str) -> Path:
        return self.directory / "workspace" / "runs" / name


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    directory = tmp_path_factory.mktemp("interruptions")
    log = write_tiny_log(directory / "raw")
    write_tiny_recipe(directory / "tiny.yaml", workspace=directory / "workspace", events=log)
    prepare_tiny(log, directory / "shards")
    options = ["--data.shards", str(directory / "shards"), "--training.epochs", "12"]
    return Place(directory, [*options, "--checkpoint.every_steps", "5", "--parallel.num_workers", "2"])


def test_run_that_lost_a_worker_then_its_command_then_a_checkpoint_ends_with_the_same_bits(place, tmp_path):
    undisturbed = place.train("undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr
    run_dir = place.run_dir("killed")

    # Ray restarts the group after a worker's death; meanwhile nobody else may touch the run.
    holds = Holds(tmp_path / "holds", 17, 33)
    command = place.start("killed", "--cluster.max_failures", "2", holds=holds)
    holds.wait(17, command)
    assert f"process {command.pid} on " in place.refusal("killed", code=75)
    (held,) = current_leases(str(place.directory / "shards"))
    assert str(held).startswith(f"training of run killed (process {command.pid} on ")
    command.workers()[1].kill()
    holds.wait(33, command)
    assert sum(row["kind"] == "start" for row in telemetry(run_dir)) == 2
    family = command.family()
    command.send(signal.SIGKILL)
    assert command.finish()[0] == -signal.SIGKILL
    assert orphans(family) == []
    assert current_leases(str(place.directory / "shards")) == []

    # A disk that damaged the latest checkpoint: refused, and what the line says helps.
    latest = latest_checkpoint(run_dir)
    assert latest is not None
    (latest / "COMMIT").write_bytes((latest / "COMMIT").read_bytes()[:100])
    assert f"remove {latest} to continue from step-" in place.refusal("killed", "--resume")

    # Another day came meanwhile: the run goes on with the data that it began with.
    day = write_tiny_log(place.directory / "raw-2", seed=1) / "events-00000.parquet"
    day.rename(place.directory / "raw" / "events-00001.parquet")
    prepare_tiny(place.directory / "raw", place.directory / "shards")
    resumed = place.train("killed", "--from-previous")
    assert resumed.returncode == 0, resumed.stderr
    assert f"{latest.name} is now damaged-{latest.name}" in resumed.stdout
    assert "continues on manifest 1; the shards are at 2 now" in resumed.stdout

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


def test_interrupt_leaves_a_checkpoint_from_which_the_same_command_continues(place, tmp_path):
    # Held, training goes on when it is asked to stop.
    holds = Holds(tmp_path / "holds", 3)
    command = place.start("interrupted", holds=holds)
    holds.wait(3, command)
    command.send(signal.SIGINT)
    code, _, errors = command.finish(within=120)
    assert code == 130, errors
    assert "solar: interrupted" in errors
    latest = latest_checkpoint(place.run_dir("interrupted"))
    assert latest is not None
    assert not read_state(latest)["train_state"]["finished"]
    assert "add --resume" in place.refusal("interrupted")


def test_a_run_whose_data_were_removed_ends_with_the_command_that_did_it(place, tmp_path, monkeypatch):
    shards = str(shutil.copytree(place.directory / "shards", tmp_path / "shards"))
    holds = Holds(tmp_path / "holds", 3)
    arguments = place.arguments("forgotten", "--data.shards", shards, "--parallel.num_workers", "1")
    command = ForkedCommand(*arguments, cwd=place.directory, output=tmp_path, holds=holds)
    holds.wait(3, command)
    without_ray(monkeypatch.setattr)
    build.forget(shards, Shards.open(shards).index_table()["user_id"].cast(pl.String).head(1).to_list())
    holds.release(3)
    assert command.finish() == 2, command.errors
    (line,) = command.errors.strip().splitlines()
    assert re.search(
        r"manifest \d was removed: `solar forget` on .* removed it at .* UTC; it held users who were", line
    )


def test_sigterm_while_workers_start_ends_the_command_and_all_it_started(place, tmp_path):
    holds = Holds(tmp_path / "holds", 0)
    command = place.start("early", holds=holds)
    holds.wait(0, command)
    assert command.workers()
    family = command.family()
    command.send(signal.SIGTERM)
    code, _, errors = command.finish(within=120)
    assert code == 130, errors
    assert "solar: interrupted" in errors
    assert orphans(family) == []
    assert latest_checkpoint(place.run_dir("early")) is None
