"""solar schedule RECIPE --cron ...: runs nights in the foreground, until SIGINT or SIGTERM."""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from jobs.config.run_config import RunConfig
from jobs.host.console import Console
from jobs.host.errors import INTERRUPTED
from jobs.host.locks import sole_command
from jobs.host.notify import notify
from jobs.host.process import noted_signals
from jobs.host.secrets import refuse_open_directory
from jobs.scheduling.cron import Cron
from jobs.scheduling.night_process import run_night
from jobs.scheduling.scheduler import Scheduler, Surroundings

SOLAR = (sys.executable, "-P", "-m", "jobs.cli")
"""The command line of `solar`; -P keeps a package `jobs` in the working directory from being used instead."""
ROOT = Path(__file__).resolve().parents[2]
"""The directory of the packages; nights run the same code."""
SLICE_SECONDS = 0.5
"""Between nights, a signal is noticed within this time."""


def run_nights(
    config: RunConfig,
    cron: Cron,
    night: Sequence[str],
    console: Console,
    *,
    retries: int,
    retry_minutes: float,
) -> int:
    """Run `solar nightly` with the arguments `night` (the recipe first) whenever the expression fires; returns the exit
    code after a signal."""
    # Check the directory, and build the command of a night.
    directory = Path(config.workspace).absolute() / "schedules" / config.name
    for each in (directory.parents[1], directory.parent, directory):
        refuse_open_directory(each)
    errors = directory / "errors.log"
    recipe, *rest = night
    command = [*SOLAR, "nightly", recipe, "--catch-up", *rest]
    here = _path_of_checkout()
    otherwise = "stop the other one: one scheduler per recipe and workspace is enough"
    # Run nights while holding the lock, so that there is one scheduler per recipe and workspace.
    with sole_command(directory, otherwise=otherwise), noted_signals() as stopped:
        around = Surroundings(
            clock=lambda: datetime.datetime.now(datetime.UTC),
            sleep=lambda seconds: _sleep(seconds, stopped),
            stopped=stopped,
            night=lambda: run_night(command, errors=errors, environment=here, stopped=stopped, echo=_echo),
            failed=lambda outcome: _notify_failed(config, outcome.reason, errors, console),
            tell=console.teller("schedule"),
        )
        scheduler = Scheduler(
            cron,
            around,
            state=directory / "state.json",
            retries=retries,
            retry_seconds=60 * retry_minutes,
        )
        scheduler.run()
    console.error("solar: interrupted; the same command continues, and makes up for missed nights")
    return INTERRUPTED


def _path_of_checkout() -> dict[str, str]:
    """Environment variables with which a night finds a checkout that is not installed."""
    if not (ROOT / "pyproject.toml").is_file():
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def _sleep(seconds: float, stopped: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not stopped() and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, SLICE_SECONDS))


def _echo(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _notify_failed(config: RunConfig, reason: str, errors: Path, console: Console) -> None:
    event = {
        "event": "failed",
        "model": config.registered_model,
        "date": config.data.prepare.daily.latest_over().isoformat(),
        "version": None,
        "reason": reason,
        "report": str(errors),
    }
    notify(config.notify, event, lambda text: console.error(f"solar: {text}"))
