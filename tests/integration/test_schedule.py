"""`solar schedule` as a user runs it, its nights played by a program that records its calls and ends as it is told."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.commands import refused

NIGHT = """
import json, os, pathlib, sys, time
place = pathlib.Path(sys.argv[1])
codes = json.loads((place / "codes").read_text())
(place / "codes").write_text(json.dumps(codes[1:]))
with (place / "calls").open("a") as calls:
    calls.write(json.dumps([*sys.argv[2:], os.environ["SOLAR_SCHEDULED"]]) + "\\n")
print("solar: night says", codes[0], file=sys.stderr, flush=True)
try:
    time.sleep(60 if codes[0] == "long" else 0)
except KeyboardInterrupt:
    (place / "interrupted").touch()
    time.sleep(0.5)
    sys.exit(130)
if codes[0] == "slow":
    time.sleep(2)
    print("solar: late", file=sys.stderr, flush=True)
    (place / "finished").touch()
    sys.exit(0)
sys.exit(codes[0])
"""
SCHEDULE = """
import sys
from jobs import cli
from jobs.scheduling import foreground
foreground.SOLAR = (sys.executable, sys.argv[1], sys.argv[2])
cli.main(["schedule", *sys.argv[3:]])
"""


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a scheduler that missed its last night, whose nights end with these codes."""
    (tmp_path / "night.py").write_text(NIGHT)
    state = tmp_path / "ws" / "schedules" / "synthetic" / "state.json"
    state.parent.mkdir(parents=True, exist_ok=True)
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str, codes: list[int | str], missed: bool = True) -> subprocess.Popen[str]:
        (tmp_path / "codes").write_text(json.dumps(codes))
        if missed:
            before = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=3)
            state.write_text(json.dumps({"done_until": before.isoformat(), "last": {}}))
        command = [sys.executable, "-c", SCHEDULE, str(tmp_path / "night.py"), str(tmp_path), "synthetic", *arguments]
        options = ["--cron", "0 3 * * *", "--workspace", "ws"]
        process = subprocess.Popen(
            [*command, *options], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def wait_for(line: str, process: subprocess.Popen[str]) -> list[str]:
    """The lines of its output up to one that holds `line`."""
    assert process.stdout is not None
    lines = []
    for text in process.stdout:
        lines.append(text.rstrip())
        if line in text:
            return lines
    raise AssertionError(f"{line!r} never came: {lines}\n{process.stderr.read() if process.stderr else ''}")


def calls(tmp_path: Path) -> list[list[str]]:
    return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


def ended(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> tuple[int, str]:
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    return process.returncode, errors


def test_missed_night_is_tried_until_it_succeeds_and_the_next_time_is_told(start, tmp_path):
    process = start("--retry_minutes", "0.005", "--seed", "7", codes=[75, 1, 0])
    lines = wait_for("next ", process)
    assert lines[0].endswith("was missed: now")
    assert [line.split()[1] for line in lines[1:-2]] == ["begins", "ended", "try", "ended", "try"]
    assert "solar: night says 75; again at" in lines[2]
    assert lines[-1].startswith("schedule     next ")
    assert " 03:00 UTC, in " in lines[-1]
    code, errors = ended(process)
    assert code == 130
    assert errors.startswith("solar: night says 75\nsolar: night says 1\nsolar: night says 0\nsolar: interrupted")
    assert calls(tmp_path) == [["nightly", "synthetic", "--catch-up", "--seed", "7", "--workspace", "ws", "1"]] * 3


def test_night_that_is_given_up_is_notified_once(start, tmp_path):
    told = tmp_path / "told.jsonl"
    command = f"cat >> {told}; echo >> {told}"
    process = start("--retry_minutes", "0.005", "--retries", "1", "--notify.command", command, codes=[1, 75])
    assert wait_for("next ", process)[-2].endswith("given up after 2 tries: solar: night says 75")
    ended(process)
    [event] = [json.loads(line) for line in told.read_text().splitlines()]
    today = datetime.datetime.now(datetime.UTC).date()
    assert event == {
        "event": "failed",
        "model": "solar-synthetic",
        "date": str(today - datetime.timedelta(days=1)),
        "version": None,
        "reason": "solar: night says 75",
        "report": str(tmp_path / "ws" / "schedules" / "synthetic" / "errors.log"),
    }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_ends_the_night_first_and_leaves_it_due(start, tmp_path, number):
    process = start(codes=["long"])
    wait_for("begins", process)
    wait_until((tmp_path / "calls").exists)
    time.sleep(0.3)
    code, errors = ended(process, number)
    assert code == 130
    assert (tmp_path / "interrupted").exists()
    assert errors.splitlines()[-1].startswith("solar: interrupted; the same command continues")
    assert "was missed: now" in wait_for("done", start(codes=[0], missed=False))[0]


def test_night_of_a_killed_scheduler_comes_to_its_end_and_is_asked_for_again(start, tmp_path):
    process = start(codes=["slow"])
    wait_for("begins", process)
    wait_until((tmp_path / "calls").exists)
    process.kill()
    process.wait()
    wait_until((tmp_path / "finished").exists)
    assert "was missed: now" in wait_for("done", start(codes=[0], missed=False))[0]
    assert len(calls(tmp_path)) == 2


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_second_scheduler_of_a_recipe_is_refused_while_the_first_lives(start):
    first = start(codes=[0])
    wait_for("next ", first)
    second = start(codes=[0], missed=False)
    _, errors = second.communicate(timeout=30)
    assert second.returncode == 75
    assert f"process {first.pid} on " in errors
    assert "one scheduler per recipe and workspace is enough" in errors
    assert errors.count("\n") == 1
    first.kill()
    first.wait()
    wait_for("next ", start(codes=[0], missed=False))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["synthetic"], "schedule: --cron is not given: give for example --cron '0 3 * * *'"),
        (["synthetic", "--cron", "0 3 * *"], "schedule: --cron '0 3 * *': give five fields"),
        (["synthetic", "--cron", "0 3 * * *", "--time_zone", "Mars"], "schedule: --time_zone 'Mars': give an IANA"),
        (["synthetic", "--cron", "0 3 * * *", "--retries", "-1"], "schedule: --retries -1: must be from 0 to 100"),
        (["synthetic", "--cron", "0 3 * * *", "--retries", "many"], "argument --retries: invalid int value: 'many'"),
        (["synthetic", "--cron", "0 3 * * *", "--retry_minutes", "0"], "schedule: --retry_minutes 0: must be above 0"),
        (["synthetic", "--cron", "0 3 * * *", "--date", "2026-11-21"], "schedule: --date: is for `solar nightly`"),
        (["synthetic", "--cron", "0 3 * * *", "--seeed", "1"], "command line: unknown key seeed: did you mean seed?"),
        (["nope.yaml", "--cron", "0 3 * * *"], "nope.yaml: no such file"),
        (["--cron", "0 3 * * *"], "schedule: name a recipe first"),
    ],
)
def test_mistake_is_told_at_the_start(tmp_path, arguments, why):
    assert why in refused("schedule", *arguments, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_workspace_that_everybody_may_write_is_refused(tmp_path):
    (tmp_path / "ws").mkdir()
    (tmp_path / "ws").chmod(0o777)
    line = refused("schedule", "synthetic", "--cron", "0 3 * * *", "--workspace", "ws", cwd=tmp_path)
    assert line.endswith(f"chmod o-w {tmp_path}/ws")
    assert os.listdir(tmp_path / "ws") == []
