"""solar schedule RECIPE --cron "0 3 * * *": runs nights in the foreground, one at a time, and retries failed ones.

    WORKSPACE/schedules/NAME/state.json   the time up to which all nights are done, and how the last night ended
    WORKSPACE/schedules/NAME/errors.log   error output of the last try
    WORKSPACE/schedules/NAME/lock         held while a scheduler runs

The loop reads the wall clock every half minute, so that it notices when the machine slept or its clock was set. All
nights missed while the scheduler was down or busy become one night: `solar nightly --catch-up` does all missing days.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.host.errors import MISTAKE, wait_seconds
from jobs.host.json_files import read_json, write_json
from jobs.scheduling.cron import Cron
from jobs.scheduling.night_process import Outcome

LONGEST_SLEEP_SECONDS = 30.0
BACKWARDS_SECONDS = 3600.0
"""A stored time further in the future than this, or a clock that goes back by more, means that the clock was wrong."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surroundings:
    """The functions through which a scheduler acts; tests replace them."""

    clock: Callable[[], datetime.datetime]
    """The time, in UTC."""
    sleep: Callable[[float], None]
    """Waits so many seconds, or less after a signal."""
    stopped: Callable[[], bool]
    """Whether a signal has arrived that stops the scheduler."""
    night: Callable[[], Outcome]
    """Tries a night once."""
    failed: Callable[[Outcome], None]
    """Called when the last try of a night has failed."""
    tell: Callable[[str], None]
    """Prints a line."""


class Scheduler:
    """Runs nights at the times of a cron expression."""

    def __init__(self, cron: Cron, around: Surroundings, *, state: Path, retries: int, retry_seconds: float) -> None:
        """`retries`: number of further tries of a night, the first one after `retry_seconds`; `state`: state.json."""
        self._cron, self._around, self._state = cron, around, state
        self._retries, self._retry_seconds = retries, retry_seconds
        self._done_until = around.clock()
        """Nothing is due up to this moment."""

    def run(self) -> None:
        """Run nights until a signal arrives."""
        around, self._done_until = self._around, self._read()
        self._write({})
        while not around.stopped():
            # The clock was set back: forget times in the future.
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
        """One night with its further tries; if a signal stops it, it stays due."""
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
        # Count from the start of the last try: times that came while it ran are due as one more night.
        self._done_until = started
        self._write({"started": started.isoformat(), "exit_code": outcome.code, "tries": attempt})
        if outcome.code == 0:
            around.tell(f"done after {took}")
        else:
            around.tell(f"given up after {attempt} {'try' if attempt == 1 else 'tries'}: {outcome.reason}")
            around.failed(outcome)

    def _wait_until(self, moment: datetime.datetime) -> bool:
        """Wait; returns False if a signal arrived, or if the clock went back by more than BACKWARDS_SECONDS."""
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
        """The stored time up to which all nights are done; the current time if there is none, or it cannot be right."""
        now = self._around.clock()
        try:
            until = datetime.datetime.fromisoformat(read_json(self._state)["done_until"])
            ahead = self._is_ahead(until)
        except FileNotFoundError:
            return now
        except (ValueError, KeyError, TypeError):
            self._around.tell(f"{self._state}: not readable, starting from now")
            return now
        if ahead:
            self._around.tell(f"{self._state}: its time {_text(until)} is in the future, starting from now")
        return now if ahead else until

    def _is_ahead(self, moment: datetime.datetime) -> bool:
        return (moment - self._around.clock()).total_seconds() > BACKWARDS_SECONDS

    def _write(self, last: dict[str, Any]) -> None:
        """Write state.json. A failure is only reported, because the next night may still succeed."""
        try:
            kept = read_json(self._state).get("last", {})
        except (OSError, ValueError, AttributeError):
            kept = {}
        try:
            write_json(self._state, {"done_until": self._done_until.isoformat(), "last": last or kept})
        except OSError as error:
            self._around.tell(f"{self._state}: {error.strerror}: after a restart this night will be run again")


def _text(moment: datetime.datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M %Z}"


def _duration(span: datetime.timedelta) -> str:
    minutes, seconds = divmod(max(0, round(span.total_seconds())), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
