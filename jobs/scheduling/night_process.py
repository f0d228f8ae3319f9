"""One try of a night: a process with a group of its own, its errors shown as they come and kept in a file."""

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
"""Tells a night that its scheduler notifies of failures, once it has given up."""
POLL_SECONDS = 0.2
LEFTOVERS_SECONDS = 30.0
"""How long the rest of a group whose leader died may take to end after SIGTERM."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a try ended."""

    code: int
    """Exit code; -n after signal n."""
    reason: str
    """Its last line of errors, else what the code says."""


def run_night(
    command: Sequence[str],
    *,
    errors: Path,
    environment: Mapping[str, str],
    stopped: Callable[[], bool],
    echo: Callable[[str], None],
) -> Outcome:
    """Run the command to its end. When `stopped` says so it gets SIGINT, and may take its time.

    `environment` is added to ours. A KeyboardInterrupt meanwhile (a second signal) kills the whole group. `echo` gets
    the errors as they come; they go through the file `errors`, because a pipe would break the night when the scheduler
    is killed.
    """
    whole = {**os.environ, **environment, SCHEDULED_VARIABLE: "1", "PYTHONUNBUFFERED": "1"}
    with errors.open("wb") as written, errors.open("rb") as read:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=written, env=whole, start_new_session=True)
        try:
            asked = False
            while process.poll() is None:
                _echo(read, echo)
                if stopped() and not asked:
                    process.send_signal(signal.SIGINT)
                    asked = True
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
    # A killed process had no time to say why.
    return redacted(lines[-1].strip())[:500] if lines and code >= 0 else how


def _end_group(group: int) -> None:
    """End what a dead leader left behind, so that the next try finds nobody at work."""
    deadline = time.monotonic() + LEFTOVERS_SECONDS
    alive = _signal_group(group, signal.SIGTERM)
    while alive and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        alive = _signal_group(group, 0)
    if alive:
        _signal_group(group, signal.SIGKILL)


def _signal_group(group: int, number: int) -> bool:
    """Whether there was still somebody in the group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
        return True
    return False
