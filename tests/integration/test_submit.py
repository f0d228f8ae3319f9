"""`solar submit` and `solar jobs` against a real Ray cluster with token authentication, on a tiny log.

The cluster's processes find broken packages named jobs, models and pipeline on their path, before any installed ones:
whatever runs there runs the uploaded code.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs import cli
from jobs.cluster import job_client
from jobs.training.checkpoint import latest_checkpoint, read_state
from pipeline.shards.dataset import Shards
from tests.support.commands import free_ports
from tests.support.ray_nodes import ADDRESS_VARIABLES, RAY
from tests.support.tiny import NUM_USERS, write_tiny_log, write_tiny_recipe


@pytest.fixture(scope="module")
def token() -> str:
    return secrets.token_hex(32)


@pytest.fixture(scope="module")
def cluster(token) -> Iterator[str]:
    """The dashboard's address of a cluster of its own."""
    # Ray's sockets lie below this directory, and the path of a socket has 107 bytes at most.
    home = Path(tempfile.mkdtemp(prefix="sr", dir="/tmp"))
    for package in ("jobs", "models", "pipeline"):
        (home / "broken" / package).mkdir(parents=True)
        (home / "broken" / package / "__init__.py").write_text("raise ImportError('not the uploaded code')")
    gcs, dashboard, agent, client = free_ports(4)
    command = [
        *(RAY, "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2", f"--port={gcs}"),
        *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--ray-client-server-port={client}", "--object-store-memory=200000000", f"--temp-dir={home}/t"),
    ]
    environment = {key: value for key, value in os.environ.items() if key not in ADDRESS_VARIABLES}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_TMPDIR": f"{home}/t"}
    environment |= {"PYTHONPATH": str(home / "broken")}
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=home, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in (home / "log").read_text():
            assert process.poll() is None, (home / "log").read_text()
            assert time.monotonic() < deadline, (home / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("submit")
    write_tiny_log(path / "raw")
    write_tiny_recipe(path / "tiny.yaml", workspace=Path("ws"), events=Path("raw"))
    return path


@pytest.fixture
def solar(workplace, cluster, token, monkeypatch, capsys) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Runs a command in this process, in the workplace; returns its exit code, output and errors."""
    kept = dict(os.environ)
    monkeypatch.chdir(workplace)
    for name in ADDRESS_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", cluster)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.run(list(arguments))
        return (code, *capsys.readouterr())

    yield run
    os.environ.clear()
    os.environ.update(kept)


def test_run_registers_a_model_in_the_workspace_beside_the_command(solar, workplace):
    code, out, err = solar("submit", "--", "solar", "run", "tiny.yaml", "--compare", "[]", "--parallel.num_workers=1")
    assert code == 0, out + err
    assert "solar-tiny version 1 (champion)" in out
    assert out.splitlines()[0].endswith(f"--source.users_path {workplace}/raw/users.parquet")
    assert out.splitlines()[-1].endswith("succeeded after " + out.split()[-1])
    assert "Running entrypoint" not in out
    assert [line for line in (out + err).splitlines() if re.search("WARNING|INFO|raylet|deepspeed", line)] == []
    assert (workplace / "ws" / "mlflow" / "mlflow.db").exists()
    assert '"git_commit": "unknown"' not in (workplace / "ws" / "runs" / "tiny" / "run.json").read_text()


def test_commands_find_the_places_that_were_named_beside_them(solar, workplace):
    """Commands whose relative places a job would look for in a temporary directory, all at once."""
    for copy in ("compacted", "collected", "forgotten"):
        shutil.copytree(workplace / "ws" / "shards" / "tiny", workplace / copy)
    (workplace / "left.txt").write_text("1\n")
    commands = {
        "compact": ("compact", "compacted"),
        "gc": ("gc", "collected", "--keep", "1"),
        "forget": ("forget", "forgotten", "--users", "left.txt"),
        "grow": ("grow", "ws/runs/tiny", "--shards", "ws/shards/tiny", "--out", "grown"),
        "inspect": ("inspect", "--verify", "ws/shards/tiny"),
    }
    for name, command in commands.items():
        code, out, err = solar("submit", "--detach", "--submission-id", name, "--", *command)
        assert code == 0, out + err
    for name in commands:
        code, out, err = solar("jobs", "logs", name, "--follow")
        assert code == 0, out + err
    assert (workplace / "grown" / "COMMIT").exists()
    assert Shards.open(str(workplace / "forgotten")).manifest.users == NUM_USERS - 1


def test_detached_job_is_listed_followed_and_stopped_with_a_checkpoint(solar, workplace):
    code, out, _ = solar(
        *("submit", "--detach", "--submission-id", "long", "--tag", "team=shop"),
        *("--", "run", "tiny.yaml", "--name", "long"),
        *("--compare", "[]", "--parallel.num_workers", "1", "--training.epochs", "100000"),
    )
    assert code == 0
    assert "solar jobs logs long --follow" in out
    run_dir, deadline = workplace / "ws" / "runs" / "long", time.monotonic() + 240
    while not list(run_dir.glob("step-*/COMMIT")):
        assert time.monotonic() < deadline, solar("jobs", "logs", "long")[1]
        time.sleep(0.5)

    code, out, _ = solar("jobs", "list")
    assert re.search(r"long +\S +RUNNING .* team=shop \S solar run tiny.yaml --name long", out), out
    code, out, err = solar("submit", "--submission-id", "long", "--", "doctor")
    assert (code, err.count("\n")) == (2, 1)
    assert "the cluster has a job with this id" in err

    code, out, _ = solar("jobs", "stop", "long")
    assert code == 0
    assert out.splitlines()[-2].startswith("solar: interrupted; the same command continues from the last checkpoint")
    assert out.splitlines()[-1] == "job long has ended: stopped"
    rows = [json.loads(line) for line in (run_dir / "telemetry.jsonl").read_text().splitlines()]
    latest = latest_checkpoint(run_dir)
    assert latest is not None
    assert read_state(latest, checksums=True)["train_state"]["finished"] is False
    assert latest.name == f"step-{max(row['step'] for row in rows if row['kind'] == 'step'):08d}"
    assert "has already ended: stopped" in solar("jobs", "stop", "long")[1]
    code, out, err = solar("jobs", "logs", "long", "--follow")
    assert code == 130
    assert "train        ..." in out.splitlines()
    assert "was stopped after" in err


def test_mistake_inside_a_job_is_its_line_and_exit_code_2(solar):
    code, out, err = solar("submit", "--", "inspect", "nothere")
    assert code == 2
    assert re.search(r"^solar: \S+/nothere: neither sequence shards nor a checkpoint", out, re.MULTILINE)
    assert "ended with exit code 2" in err


def test_failed_job_is_submitted_again_but_not_a_mistake(solar, workplace):
    shards = workplace / "damaged"
    assert solar("submit", "--", "prepare", "--events", "raw", "--out", str(shards))[0] == 0
    largest = max((file for file in shards.rglob("*.parquet")), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"x")
    again = ["submit", "--retries", "1", "--retry-minutes", "0.01", "--tag", "try=again", "--submission-id"]
    code, out, err = solar(*again, "damaged", "--", "inspect", str(shards), "--verify")
    assert code == 1, out + err
    assert "solar: try 1 of 2 failed (exit code 1); a new job in 0.6 s" in err.splitlines()
    assert solar(*again, "mistake", "--", "inspect", "nothere")[0] == 2
    listed = solar("jobs", "list")[1]
    assert [name for name in ("damaged", "damaged-2", "mistake", "mistake-2") if f"{name} " in listed] == [
        *("damaged", "damaged-2", "mistake"),
    ]
    assert listed.count("try=again") == 3


def refused(result: tuple[int, str, str], text: str) -> None:
    code, out, err = result
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert text in err


def test_cluster_that_cannot_be_used_is_one_line(solar, cluster, monkeypatch, tmp_path):
    refused(solar("jobs", "stop", "nothere"), f"job nothere: {cluster} has no job with this id")
    refused(solar("jobs", "logs", "nothere", "--follow"), f"job nothere: {cluster} has no job with this id")
    [port] = free_ports(1)
    closed = f"http://127.0.0.1:{port}"
    refused(solar("jobs", "list", "--address", closed), f"{closed}: does not answer")
    monkeypatch.setattr("ray.__version__", "2.0.0")
    refused(solar("submit", "--", "doctor"), "runs Ray 2.60.0, but this environment has Ray 2.0.0")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    refused(solar("submit", "--", "doctor"), "refuses this token")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    refused(solar("submit", "--", "doctor"), "requires a token, and there is none here")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    monkeypatch.setattr(job_client, "LOCAL_DASHBOARD", closed)
    refused(solar("submit", "--", "doctor"), "no --address given, and no Ray dashboard on this machine")
