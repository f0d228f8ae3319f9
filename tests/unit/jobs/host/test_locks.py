"""Two commands on one run, and a command that begins while workers of a dead one still write."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading

import pytest

from jobs.host import locks
from jobs.host.locks import RunInUse, sole_command, wait_for_workers

HOLD = """
import fcntl, os, sys, time
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(descriptor, fcntl.LOCK_SH)
os.pwrite(descriptor, b"process 7 on elsewhere", 0)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "runs" / "mine"


@pytest.fixture
def worker(run_dir):
    """Another process that holds the workers' lock."""
    run_dir.mkdir(parents=True)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir / "workers.lock")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_second_command_on_a_run_is_told_which_process_holds_it(run_dir):
    with sole_command(run_dir):
        with pytest.raises(RunInUse, match=rf"runs/mine: process {os.getpid()} on \S+ .* choose another --name"):
            with sole_command(run_dir):
                pass
        assert (run_dir / "lock").exists()
    with sole_command(run_dir):
        pass


@pytest.mark.parametrize("text", [b"", b"\xff\xfe\x00", b"process 7\x1b[2J\nand more", b"x" * 1_000_000])
def test_a_lock_file_with_another_text_names_nobody(run_dir, text):
    with sole_command(run_dir):
        (run_dir / "lock").write_bytes(text)
        with pytest.raises(RunInUse, match=r"runs/mine: another process is working there: wait for it"):
            with sole_command(run_dir):
                pass


def test_directory_in_which_nothing_was_written_is_removed_again(run_dir):
    with sole_command(run_dir):
        pass
    assert not run_dir.exists()
    with sole_command(run_dir):
        (run_dir / "run.json").touch()
    assert [path.name for path in run_dir.iterdir()] == ["run.json"]


def test_command_waits_for_workers_of_a_killed_one_and_says_so(run_dir, worker):
    told = []
    threading.Timer(0.5, worker.kill).start()
    wait_for_workers(run_dir, tell=told.append, wait_seconds=60)
    assert told == ["waiting for workers of an earlier command to end (process 7 on elsewhere)"]


def test_workers_that_never_end_are_named(run_dir, worker):
    with pytest.raises(RunInUse, match="still write there \\(process 7 on elsewhere\\)"):
        wait_for_workers(run_dir, tell=lambda text: None, wait_seconds=0)


def test_nothing_to_wait_for_where_no_worker_ever_was(run_dir):
    wait_for_workers(run_dir, tell=pytest.fail)
    assert not run_dir.exists()


def test_commands_take_turns_and_the_waiting_one_names_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.001)
    path, told, done = tmp_path / "registry.lock", queue.SimpleQueue(), []

    def second() -> None:
        with locks.in_turn(path, tell=told.put):
            done.append("second")

    waiting = threading.Thread(target=second)
    with locks.in_turn(path, tell=pytest.fail):
        waiting.start()
        assert told.get(timeout=60).startswith(f"waiting for process {os.getpid()} on")
        done.append("first")
    waiting.join(60)
    assert done == ["first", "second"]
    assert not path.exists()
