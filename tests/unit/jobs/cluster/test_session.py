"""Starting Ray: signals wait for its end, and only its workers inherit what is meant for them."""

from __future__ import annotations

import ctypes
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray._private import ray_constants, services, worker

from jobs.cluster.session import CLUSTERS_VARIABLE, TRIES_VARIABLE, WORKER_ENVIRONMENT, ClusterConfig, ray_session

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


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path) -> Path:
    """A home of its own: starting Ray makes a token there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


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


def test_sigterm_after_ray_has_ended_interrupts_the_command(starting, monkeypatch):
    """Ray's shutdown sets the system's handler to its default, without Python's knowledge."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    starting(lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: ctypes.CDLL(None).signal(int(signal.SIGTERM), None))
    try:
        with ray_session(ClusterConfig()):
            pass
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


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


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_token_of_a_local_ray_is_born_private(starting, home):
    token, modes = home / ".ray" / "auth_token", []
    starting(lambda **named: modes.append((mode(token), mode(token.parent))))
    before = os.umask(0)
    try:
        with ray_session(ClusterConfig()):
            pass
    finally:
        os.umask(before)
    assert modes == [(0o600, 0o700)]
    assert len(token.read_text()) == 64
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]


def test_a_token_that_everybody_could_read_is_kept_and_closed(starting, home):
    token = home / ".ray" / "auth_token"
    token.parent.mkdir(mode=0o755)
    token.write_text("of a cluster")
    token.chmod(0o644)
    starting(lambda **named: None)
    with ray_session(ClusterConfig()):
        pass
    assert (token.read_text(), mode(token), mode(token.parent)) == ("of a cluster", 0o600, 0o700)


@pytest.mark.parametrize(
    ("name", "value"), [("RAY_AUTH_TOKEN", "x"), ("RAY_AUTH_TOKEN_PATH", "/x"), ("RAY_AUTH_MODE", "disabled")]
)
def test_no_token_is_made_where_another_one_counts_or_none(starting, home, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    starting(lambda **named: None)
    with ray_session(ClusterConfig()):
        pass
    assert not (home / ".ray").exists()


def test_a_local_ray_has_the_address_of_loopback_and_a_cluster_the_machines(starting, monkeypatch):
    monkeypatch.setattr(worker, "_global_node", None)
    monkeypatch.delenv(CLUSTERS_VARIABLE, raising=False)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    seen = []

    def init(**named):
        names = (CLUSTERS_VARIABLE, "GLOO_SOCKET_IFNAME")
        seen.append((services.get_node_ip_address(), *(os.environ.get(name) for name in names)))

    starting(init)
    with ray_session(ClusterConfig()):
        pass
    with ray_session(ClusterConfig(address="10.0.0.1:6379")):
        pass
    assert ray_constants.ENABLE_RAY_CLUSTER
    local, cluster = seen
    assert local == ("127.0.0.1", "0", "lo")
    assert cluster[1:] == (None, None)
