"""solar schedule RECIPE --cron "0 3 * * *": nights in the foreground, one at a time, tried again where that may help.

    WORKSPACE/schedules/NAME/state.json   up to when nothing is due any more, and how the last night ended
    WORKSPACE/schedules/NAME/errors.log   what the last try wrote to its error stream
    WORKSPACE/schedules/NAME/lock         held while a scheduler works

The loop asks the wall clock every half minute, so that a machine that slept or whose clock was set is noticed. Nights
missed while it was down or busy are one night: `solar nightly --catch-up` takes all days that are missing.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.host.errors import MISTAKE, wait_seconds
from jobs.host.files import read_json, write_json
from jobs.scheduling.cron import Cron
from jobs.scheduling.night_process import Outcome

LONGEST_SLEEP_SECONDS = 30.0
BACKWARDS_SECONDS = 3600.0
"""A time further ahead than this was written, or waited for, while the clock was wrong."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a scheduler has to do with: replaced in tests."""

    clock: Callable[[], datetime.datetime]
    """The time, in UTC."""
    sleep: Callable[[float], None]
    """Waits so many seconds, less when it is asked to stop."""
    stopped: Callable[[], bool]
    """Whether a signal asked to stop."""
    night: Callable[[], Outcome]
    """Tries a night once."""
    failed: Callable[[Outcome], None]
    """Hears of a night that was given up."""
    tell: Callable[[str], None]
    """A line for people."""


class Scheduler:
    """Nights at the times of a cron expression."""

    def __init__(
        self, cron: Cron, around: Surroundings, *, state: Path, retries: int = 5, retry_seconds: float = 300.0
    ) -> None:
        """`retries`: further tries of a night, the first of them after `retry_seconds`; `state`: its memory."""
        self._cron, self._around, self._state = cron, around, state
        self._retries, self._retry_seconds = retries, retry_seconds
        self._done_until = around.clock()
        """Nothing is due up to this moment."""

    def run(self) -> None:
        """Until it is asked to stop."""
        around, self._done_until = self._around, self._read()
        self._write({})
        while not around.stopped():
            if self._is_ahead(self._done_until):
                self._done_until = around.clock()
            due = self._cron.next(self._done_until)
            assert due is not None, self._cron.expression
            if due <= around.clock():
                around.tell(f"{_text(due)} was missed: now")
            else:
                around.tell(f"next {_text(due)}, in {_duration(due - around.clock())}")
            if self._wait_until(due):
                self._night()

    def _night(self) -> None:
        """One night with its further tries; interrupted it stays due."""
        around = self._around
        for attempt in range(1, self._retries + 2):
            started = around.clock()
            around.tell(f"try {attempt} of {self._retries + 1}" if attempt > 1 else "begins")
            try:
                outcome = around.night()
            except OSError as error:
                outcome = Outcome(code=1, reason=f"{error.filename or 'the night'}: {error.strerror}")
            if around.stopped():
                return
            took = _duration(around.clock() - started)
            last = outcome.code in (0, MISTAKE) or attempt > self._retries
            if last:
                break
            wait = wait_seconds(attempt, first=self._retry_seconds)
            again = around.clock() + datetime.timedelta(seconds=wait)
            around.tell(f"ended after {took}: {outcome.reason}; again at {_text(again.astimezone(self._cron.zone))}")
            self._wait_until(again)
            if around.stopped():
                return
        # What became due while the last try ran is one more night.
        self._done_until = started
        self._write({"started": started.isoformat(), "exit_code": outcome.code, "tries": attempt})
        if outcome.code == 0:
            around.tell(f"done after {took}")
        else:
            around.tell(f"given up after {attempt} {'try' if attempt == 1 else 'tries'}: {outcome.reason}")
            around.failed(outcome)

    def _wait_until(self, moment: datetime.datetime) -> bool:
        """Whether the moment came; False where it was asked to stop, or the clock was set back by much."""
        around, seen = self._around, self._around.clock()
        while not around.stopped():
            now = around.clock()
            if (seen - now).total_seconds() > BACKWARDS_SECONDS:
                around.tell(f"the clock went back, from {_text(seen)} to {_text(now)}")
                return False
            left, seen = (moment - now).total_seconds(), now
            if left <= 0:
                return True
            around.sleep(min(left, LONGEST_SLEEP_SECONDS))
        return False

    def _read(self) -> datetime.datetime:
        """Up to when nothing is due; now where nothing is remembered, or where it cannot be right."""
        now = self._around.clock()
        try:
            until = datetime.datetime.fromisoformat(read_json(self._state)["done_until"])
            ahead = self._is_ahead(until)
        except FileNotFoundError:
            return now
        except (ValueError, KeyError, TypeError):
            self._around.tell(f"{self._state}: not readable, begins anew")
            return now
        if ahead:
            self._around.tell(f"{self._state}: its time {_text(until)} is still to come, begins anew")
        return now if ahead else until

    def _is_ahead(self, moment: datetime.datetime) -> bool:
        return (moment - self._around.clock()).total_seconds() > BACKWARDS_SECONDS

    def _write(self, last: dict[str, Any]) -> None:
        """Remember; what cannot be written is told, since the next night may still succeed."""
        try:
            kept = read_json(self._state).get("last", {})
        except (OSError, ValueError, AttributeError):
            kept = {}
        try:
            write_json(self._state, {"done_until": self._done_until.isoformat(), "last": last or kept})
        except OSError as error:
            self._around.tell(f"{self._state}: {error.strerror}: a restart would not know of this night")


def _text(moment: datetime.datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M %Z}"


def _duration(span: datetime.timedelta) -> str:
    minutes, seconds = divmod(max(0, round(span.total_seconds())), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
