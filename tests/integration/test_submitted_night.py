"""A whole night as a submitted job on a cluster of several nodes: the driver on the head, a worker on each of two."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.support.commands import free_ports, only_in_soak, solar
from tests.support.daily_log import write_day, write_nightly_recipe
from tests.support.ray_nodes import Nodes

pytestmark = only_in_soak
HEAD = "127.0.0.1"
START_SECONDS = 180.0


@pytest.fixture(scope="module")
def submitted(tmp_path_factory) -> tuple[Path, CompletedProcess[str], CompletedProcess[str]]:
    """(workplace, the first night's submission, the list of jobs)."""
    directory = tmp_path_factory.mktemp("night")
    write_day(directory / "log", 0)
    write_nightly_recipe(directory / "shop.yaml", workspace=directory / "workspace", log=directory / "log")
    port, dashboard = free_ports(2)
    with Nodes() as nodes:
        nodes.head(HEAD, port, dashboard=dashboard).wait_until_started()
        started = [nodes.node(f"127.0.0.{place}", f"{HEAD}:{port}") for place in (2, 3)]
        for node in started:
            node.wait_until_started()
        address = ["--address", f"http://{HEAD}:{dashboard}"]
        night = ["nightly", "shop.yaml", "--date", "2026-03-01", "--parallel.num_workers", "2"]
        night += ["--training.epochs", "1"]

        def here(*command: str) -> CompletedProcess[str]:
            return solar(*command, cwd=directory, environment=nodes.environment)

        done = when_ready(lambda: here("submit", *address, "--tag", "night=2026-03-01", "--", *night))
        listed = here("jobs", "list", *address)
    return directory, done, listed


def when_ready(submit: Callable[[], CompletedProcess[str]]) -> CompletedProcess[str]:
    """Again until the job server and its agent are up, which come after the node."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        done = submit()
        early = ("does not answer", "No available agent")
        if not any(text in done.stderr for text in early) or time.monotonic() > deadline:
            return done
        time.sleep(0.5)


def test_night_on_several_nodes_has_a_champion_with_states(submitted):
    directory, done, _ = submitted
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2026-03-01 promoted: there is no champion yet" in done.stdout
    journal = directory / "workspace/nightly/shop/2026-03-01"
    trained = json.loads((journal / "train.json").read_text())
    state = json.loads((Path(trained["checkpoint"]) / "state.json").read_text())
    assert state["world_size"] == 2
    assert json.loads((journal / "states.json").read_text())["users"] > 100
    assert (journal / "report.html").exists()


def test_job_is_listed_with_its_tag(submitted):
    listed = submitted[2]
    assert listed.returncode == 0, listed.stderr
    assert "SUCCEEDED" in listed.stdout
    assert "night=2026-03-01" in listed.stdout
