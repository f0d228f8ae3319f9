"""One try of a night: a process in its own process group; its error output is shown immediately and kept in a file."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from jobs.host.secrets import redacted

SCHEDULED_VARIABLE = "SOLAR_SCHEDULED"
"""Environment variable of a scheduled night: the scheduler, not the night, notifies of a failure after the last try."""
POLL_SECONDS = 0.2
LEFTOVERS_SECONDS = 30.0
"""After the death of a group's leader: how long its other processes may take to end after SIGTERM."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a try ended."""

    code: int
    """Exit code; -n after signal n."""
    reason: str
    """The last line of its error output, else a text for the exit code."""


def run_night(
    command: Sequence[str],
    *,
    errors: Path,
    environment: Mapping[str, str],
    stopped: Callable[[], bool],
    echo: Callable[[str], None],
) -> Outcome:
    """Run the command to its end. Once `stopped()` is true it gets SIGINT, and may take its time to end.

    `environment` is added to that of this process. A KeyboardInterrupt meanwhile (a second signal) kills the whole
    group. `echo` gets the error output immediately. It passes through the file `errors`: with a pipe, the night would
    fail when the scheduler is killed.
    """
    whole = {**os.environ, **environment, SCHEDULED_VARIABLE: "1", "PYTHONUNBUFFERED": "1"}
    with errors.open("wb") as written, errors.open("rb") as read:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=written, env=whole, start_new_session=True)
        try:
            interrupted = False
            while process.poll() is None:
                _echo(read, echo)
                if stopped() and not interrupted:
                    process.send_signal(signal.SIGINT)
                    interrupted = True
                time.sleep(POLL_SECONDS)
        except BaseException:
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()
            raise
        _echo(read, echo)
    if process.returncode < 0:
        _end_group(process.pid)
    return Outcome(code=process.returncode, reason=_reason(process.returncode, errors))


def _echo(read: IO[bytes], echo: Callable[[str], None]) -> None:
    if text := read.read().decode(errors="replace"):
        echo(text)


def _reason(code: int, errors: Path) -> str:
    how = f"killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
    lines = errors.read_text(errors="replace").strip().splitlines()
    # A killed process could not write the reason: its last line is about something else.
    return redacted(lines[-1].strip())[:500] if lines and code >= 0 else how


def _end_group(group: int) -> None:
    """End the other processes of a dead leader's group, so that they do not disturb the next try."""
    deadline = time.monotonic() + LEFTOVERS_SECONDS
    alive = _signal_group(group, signal.SIGTERM)
    while alive and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        alive = _signal_group(group, 0)
    if alive:
        _signal_group(group, signal.SIGKILL)


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to the group (0 = only check); returns whether it still has processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
        return True
    return False
