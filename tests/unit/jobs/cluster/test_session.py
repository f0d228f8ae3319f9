"""Starting Ray: signals wait for its end, and only its workers inherit what is meant for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import ray

from jobs.cluster.session import TRIES_VARIABLE, WORKER_ENVIRONMENT, ClusterConfig, ray_session

TWICE = """
import os, signal, sys, time
import ray
from jobs.cluster.session import ClusterConfig, ray_session

def init(**named):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)

ray.init = init
with ray_session(ClusterConfig()):
    pass
"""


@pytest.fixture
def starting(monkeypatch):
    """What happens instead of ray.init; the session must not find the suite's own Ray."""

    def replace(init):
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", init)
        monkeypatch.setattr(ray, "shutdown", lambda: None)

    return replace


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_ray_starts_is_obeyed_once_it_has_started(starting, number):
    started = []

    def init(**named):
        os.kill(os.getpid(), number)
        started.append(named)

    starting(init)
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), ray_session(ClusterConfig()):
        raise AssertionError("entered")
    assert len(started) == 1
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_signal_ends_the_process_at_once():
    ended = subprocess.run([sys.executable, "-c", TWICE], timeout=50, check=False)
    assert ended.returncode == 130


def test_settings_of_workers_are_not_left_in_the_process_that_starts_them(starting, monkeypatch):
    seen = []
    starting(lambda **named: seen.append({name: os.environ.get(name) for name in WORKER_ENVIRONMENT}))
    monkeypatch.delenv("POLARS_MAX_THREADS", raising=False)
    with ray_session(ClusterConfig()):
        assert "POLARS_MAX_THREADS" not in os.environ
    monkeypatch.setenv("POLARS_MAX_THREADS", "3")
    with ray_session(ClusterConfig()):
        assert os.environ["POLARS_MAX_THREADS"] == "3"
    assert seen == [{"POLARS_MAX_THREADS": "1"}, {"POLARS_MAX_THREADS": "3"}]


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        ("RPC error: InvalidAuthToken: ...", "set RAY_AUTH_MODE=token"),
        ("RPC error: deadline", "no Ray cluster answers"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_told_after_one_try(starting, cause, told):
    tries = []

    def init(**named):
        tries.append(os.environ[TRIES_VARIABLE])
        raise ConnectionError(f"Failed to connect to Ray cluster at {named['address']}") from RuntimeError(cause)

    starting(init)
    with pytest.raises(ConnectionError, match=f"^cluster.address=10.0.0.1:6379: .*{told}"):
        with ray_session(ClusterConfig(address="10.0.0.1:6379")):
            raise AssertionError("entered")
    assert tries == ["1"]
