"""Whether a cluster is this machine, asked of dashboards that have only just started."""

from __future__ import annotations

import json
import socket

import pytest
import requests

from jobs.cluster import job_client
from jobs.cluster.job_client import Cluster


def answer(*sockets: str, state: str = "ALIVE", code: int = 200) -> requests.Response:
    """What a dashboard tells of nodes whose raylets have these sockets."""
    response = requests.Response()
    response.status_code = code
    nodes = [{"raylet": {"state": state, "rayletSocketName": each}} for each in sockets]
    response._content = json.dumps({"data": {"summary": nodes}}).encode()
    return response


class Dashboard:
    """Gives these answers, the last one again and again."""

    def __init__(self, *answers: requests.Response) -> None:
        self.answers = list(answers)

    def _do_request(self, method: str, endpoint: str) -> requests.Response:
        assert (method, endpoint) == ("GET", "/nodes?view=summary")
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture
def raylet(tmp_path) -> str:
    """The path of a socket on this machine."""
    path = str(tmp_path / "raylet")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path)
    return path


@pytest.fixture
def on_this_machine(monkeypatch):
    """Cluster.on_this_machine with these answers of the dashboard."""
    monkeypatch.setattr(job_client, "POLL_SECONDS", 0.0)

    def ask(*answers: requests.Response) -> bool:
        cluster = Cluster.__new__(Cluster)
        cluster._client = Dashboard(*answers)  # type: ignore[assignment]
        return cluster.on_this_machine()

    return ask


def test_a_dashboard_that_knows_no_node_yet_is_asked_again(on_this_machine, raylet):
    early = (answer(), answer(code=500), answer(raylet, state="DEAD"))
    assert on_this_machine(*early, answer(raylet))
    assert not on_this_machine(*early, answer("/elsewhere/raylet"))


def test_every_node_that_is_alive_must_be_here(on_this_machine, raylet):
    assert on_this_machine(answer(raylet, raylet))
    assert not on_this_machine(answer(raylet, "/elsewhere/raylet"))
    assert not on_this_machine(answer(""))


def test_a_dashboard_that_never_tells_of_a_node_is_not_waited_for_without_end(on_this_machine, monkeypatch):
    monkeypatch.setattr(job_client, "NODES_SECONDS", 0.0)
    assert not on_this_machine(answer(code=500))
