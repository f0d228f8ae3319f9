"""A try of a night as a real process: its end, its errors, its interruption."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.scheduling.night_process import Outcome, run_night


def run(program: str, tmp_path: Path, *, stopped: Callable[[], bool] = lambda: False) -> tuple[Outcome, str]:
    heard: list[str] = []
    outcome = run_night(
        [sys.executable, "-c", program],
        errors=tmp_path / "errors.log",
        environment={"ADDED": "yes"},
        stopped=stopped,
        echo=heard.append,
    )
    return outcome, "".join(heard)


def is_alive(process: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{process}/status").read_text().replace("Z (zombie)", "(zombie)")
    except FileNotFoundError:
        return False


def test_last_line_of_errors_is_the_reason_without_passwords(tmp_path):
    program = "import sys; print('one\\nno https://u:pw@host\\n', file=sys.stderr); sys.exit(75)"
    outcome, heard = run(program, tmp_path)
    assert outcome == Outcome(code=75, reason="no https://u:***@host")
    assert heard == "one\nno https://u:pw@host\n\n"
    assert run("raise SystemExit(1)", tmp_path)[0] == Outcome(code=1, reason="exit code 1")
    assert run("", tmp_path)[0].code == 0


def test_night_knows_that_it_was_scheduled(tmp_path):
    program = "import os, sys; sys.exit(f\"{os.environ['SOLAR_SCHEDULED']} {os.environ['ADDED']} {os.getpgid(0)}\")"
    flag, added, group = run(program, tmp_path)[0].reason.split()
    assert (flag, added) == ("1", "yes")
    assert int(group) != os.getpgid(0)


def test_stop_is_one_sigint_to_the_night_which_may_take_its_time(tmp_path):
    program = """
import signal, sys, time
def handle(*_):
    print("asked", file=sys.stderr)
    time.sleep(1.5)
    sys.exit(130)
signal.signal(signal.SIGINT, handle)
print("ready", file=sys.stderr, flush=True)
time.sleep(60)
"""
    ready = tmp_path / "errors.log"
    outcome, heard = run(program, tmp_path, stopped=lambda: ready.exists() and "ready" in ready.read_text())
    assert outcome == Outcome(code=130, reason="asked")
    assert heard.split() == ["ready", "asked"]


def test_killed_night_s_leftovers_end_before_it_is_tried_again(tmp_path):
    program = f"""
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
os.kill(os.getpid(), signal.SIGKILL)
"""
    outcome, _ = run(program, tmp_path)
    assert outcome == Outcome(code=-9, reason="killed by signal 9 (SIGKILL)")
    deadline = time.monotonic() + 10
    while is_alive(int((tmp_path / "child").read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_second_signal_kills_the_whole_group(tmp_path):
    program = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
time.sleep(60)
"""

    def stopped() -> bool:
        file = tmp_path / "child"
        if file.exists() and file.read_text():
            raise KeyboardInterrupt
        return False

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(program, tmp_path, stopped=stopped)
    deadline = time.monotonic() + 10
    while is_alive(int((tmp_path / "child").read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert signal.getsignal(signal.SIGINT) is before
