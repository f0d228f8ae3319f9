"""A scheduler under a clock of our own: when nights begin, are tried again, missed and given up."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from datetime import UTC, timedelta
from pathlib import Path

import pytest

from jobs.scheduling.cron import Cron
from jobs.scheduling.night_process import Outcome
from jobs.scheduling.scheduler import Scheduler, Surroundings


def at(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text).replace(tzinfo=UTC)


class World:
    """Time passes only in sleeps and nights; nights end as `codes` say, the last of them again and again."""

    def __init__(self, state: Path, now: str, codes: tuple[int, ...] = (0,), *, lasts: float = 60) -> None:
        self.state, self.now, self.codes, self.lasts = state, at(now), list(codes), timedelta(seconds=lasts)
        self.end = self.now
        self.begun: list[str] = []
        self.told: list[str] = []
        self.given_up: list[Outcome] = []
        self.sleeps: list[float] = []
        self.on_sleep: Callable[[], None] = lambda: None
        self.interrupted = False

    def run(self, cron: str = "0 3 * * *", *, until: str, zone: str = "UTC", retries: int = 5) -> World:
        self.end = at(until)
        around = Surroundings(
            clock=lambda: self.now, sleep=self._sleep, stopped=lambda: self.interrupted or self.now >= self.end,
            night=self._night, failed=self.given_up.append, tell=self.told.append,
        )  # fmt: skip
        Scheduler(Cron(cron, zone), around, state=self.state, retries=retries, retry_seconds=300).run()
        return self

    def _sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += timedelta(seconds=seconds)
        self.on_sleep()

    def _night(self) -> Outcome:
        self.begun.append(f"{self.now:%d %H:%M}")
        self.now += self.lasts
        code = self.codes.pop(0) if len(self.codes) > 1 else self.codes[0]
        return Outcome(code=code, reason=f"exit code {code}")


@pytest.fixture
def state(tmp_path) -> Path:
    return tmp_path / "state.json"


def test_every_night_runs_once_at_its_time(state):
    world = World(state, "2026-11-22T12:00").run(until="2026-11-25T12:00")
    assert world.begun == ["23 03:00", "24 03:00", "25 03:00"]
    assert world.told[:3] == ["next 2026-11-23 03:00 UTC, in 15:00:00", "begins", "done after 0:01:00"]
    assert max(world.sleeps) == 30
    assert json.loads(state.read_text())["last"] == {
        "started": "2026-11-25T03:00:00+00:00",
        "exit_code": 0,
        "tries": 1,
    }


def test_first_start_waits_for_the_next_time(state):
    assert World(state, "2026-11-22T03:00").run(until="2026-11-23T02:59").begun == []


def test_nights_missed_while_it_was_down_are_one_night_at_once(state):
    World(state, "2026-11-20T12:00").run(until="2026-11-20T12:05")
    world = World(state, "2026-11-23T09:30").run(until="2026-11-24T12:00")
    assert world.told[0] == "2026-11-21 03:00 UTC was missed: now"
    assert world.begun == ["23 09:30", "24 03:00"]


def test_restart_after_a_night_that_was_done_does_not_repeat_it(state):
    World(state, "2026-11-22T12:00").run(until="2026-11-23T04:00")
    assert World(state, "2026-11-23T04:01").run(until="2026-11-23T20:00").begun == []


def test_what_is_due_while_a_night_runs_is_one_night_after_it(state):
    world = World(state, "2026-11-22T12:30", lasts=2.5 * 3600).run("0 * * * *", until="2026-11-22T20:00")
    assert world.begun == ["22 13:00", "22 15:30", "22 18:00"]


@pytest.mark.parametrize("code", [75, 1, -9])
def test_failure_that_may_pass_is_tried_again_after_twice_as_long_each_time(state, code):
    world = World(state, "2026-11-22T12:00", (code, code, code, 0), lasts=0).run(until="2026-11-23T12:00")
    assert world.begun == ["23 03:00", "23 03:05", "23 03:15", "23 03:35"]
    assert world.told[2] == f"ended after 0:00:00: exit code {code}; again at 2026-11-23 03:05 UTC"
    assert world.given_up == []
    assert json.loads(state.read_text())["last"]["tries"] == 4


def test_wait_before_a_try_is_an_hour_at_most(state):
    world = World(state, "2026-11-22T12:00", (75,), lasts=0).run(until="2026-11-23T12:00", retries=6)
    assert world.begun == ["23 03:00", "23 03:05", "23 03:15", "23 03:35", "23 04:15", "23 05:15", "23 06:15"]


def test_night_that_fails_to_the_last_try_is_told_once_and_the_next_one_begins_anew(state):
    world = World(state, "2026-11-22T12:00", (1, 75, 75, 0), lasts=0).run(until="2026-11-24T12:00", retries=2)
    assert world.given_up == [Outcome(code=75, reason="exit code 75")]
    assert world.begun == ["23 03:00", "23 03:05", "23 03:15", "24 03:00"]
    assert "given up after 3 tries: exit code 75" in world.told


def test_user_s_mistake_is_told_at_once_and_not_tried_again(state):
    world = World(state, "2026-11-22T12:00", (2, 0)).run(until="2026-11-24T12:00")
    assert [outcome.code for outcome in world.given_up] == [2]
    assert world.begun == ["23 03:00", "24 03:00"]


def test_night_that_cannot_even_start_is_a_failed_try(state):
    world = World(state, "2026-11-22T12:00")

    def cannot() -> Outcome:
        raise OSError(12, "Cannot allocate memory")

    world._night = cannot
    world.run(until="2026-11-23T04:00", retries=0)
    assert [outcome.reason for outcome in world.given_up] == ["the night: Cannot allocate memory"]


def test_interrupted_night_is_due_at_the_next_start(state):
    world = World(state, "2026-11-22T12:00", (130,))
    world.lasts = timedelta(hours=10)
    assert world.run(until="2026-11-23T05:00").begun == ["23 03:00"]
    assert world.given_up == []
    assert World(state, "2026-11-23T06:00").run(until="2026-11-23T07:00").begun == ["23 06:00"]


def test_machine_that_slept_through_the_time_is_noticed_when_it_wakes(state):
    world = World(state, "2026-11-22T12:00")

    def suspend() -> None:
        if world.now.hour == 14:
            world.now += timedelta(hours=20)

    world.on_sleep = suspend
    assert world.run(until="2026-11-23T15:00").begun == ["23 10:00"]


def test_clock_that_is_set_back_while_it_waits_does_not_hold_nights_up(state):
    world = World(state, "2036-11-22T12:00")

    def correct() -> None:
        if world.now.year == 2036:
            world.now = at("2026-11-22T12:00")
        world.interrupted = world.now >= at("2026-11-23T12:00")

    world.on_sleep = correct
    world.run(until="2040-01-01T00:00")
    assert world.begun == ["23 03:00"]
    assert any(line.startswith("the clock went back, from 2036-11-22") for line in world.told)


def test_clock_that_steps_back_a_little_does_not_repeat_a_night(state):
    World(state, "2026-11-23T02:00", lasts=0).run(until="2026-11-23T03:00:01")
    state.write_text(json.dumps({"done_until": "2026-11-23T03:00:01+00:00", "last": {}}))
    assert World(state, "2026-11-23T02:59").run(until="2026-11-23T12:00").begun == []


@pytest.mark.parametrize("content", ["", "[]", '{"done_until": "soon"}', '{"done_until": "2126-01-01T00:00:00+00:00"}'])
def test_state_that_cannot_be_right_is_told_and_begun_anew(state, content):
    state.write_text(content)
    world = World(state, "2026-11-22T12:00").run(until="2026-11-23T12:00")
    assert str(state) in world.told[0]
    assert world.begun == ["23 03:00"]


def test_times_are_told_in_the_zone_of_the_expression(state):
    world = World(state, "2026-10-24T12:00", (75, 0), lasts=0).run(until="2026-10-25T12:00", zone="Europe/Berlin")
    assert world.told[0] == "next 2026-10-25 03:00 CET, in 14:00:00"
    assert world.told[2].endswith("again at 2026-10-25 03:05 CET")


def test_state_that_cannot_be_written_is_told_and_nights_go_on(tmp_path):
    world = World(tmp_path / "gone" / "state.json", "2026-11-22T12:00").run(until="2026-11-24T12:00")
    assert world.begun == ["23 03:00", "24 03:00"]
    assert "after a restart this night will be run again" in world.told[0]
