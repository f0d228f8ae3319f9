"""solar schedule RECIPE --cron ...: nights in the foreground, until a signal."""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from jobs.config.run import RunConfig
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
"""How `solar` is called from here: never a package of that name that lies in the working directory."""
ROOT = Path(__file__).resolve().parents[2]
"""Where this package lies, and a night's too."""
SLICE_SECONDS = 0.5
"""A signal is noticed so soon while nothing is due."""


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
    directory = Path(config.workspace).absolute() / "schedules" / config.name
    for each in (directory.parents[1], directory.parent, directory):
        refuse_open_directory(each)
    errors = directory / "errors.log"
    recipe, *rest = night
    command = [*SOLAR, "nightly", recipe, "--catch-up", *rest]
    here = _path_of_checkout()
    otherwise = "stop the other one: one scheduler per recipe and workspace is enough"
    with sole_command(directory, otherwise=otherwise), noted_signals() as stopped:
        around = Surroundings(
            clock=lambda: datetime.datetime.now(datetime.UTC),
            sleep=lambda seconds: _sleep(seconds, stopped),
            stopped=stopped,
            night=lambda: run_night(command, errors=errors, environment=here, stopped=stopped, echo=_echo),
            failed=lambda outcome: _notify_failed(config, outcome.reason, errors, console),
            tell=lambda text: console.line(f"{'schedule':<12} {text}"),
        )
        scheduler = Scheduler(
            cron,
            around,
            state=directory / "state.json",
            retries=retries,
            retry_seconds=60 * retry_minutes,
        )
        scheduler.run()
    console.error("solar: interrupted; the same command goes on, and makes up for what it misses until then")
    return INTERRUPTED


def _path_of_checkout() -> dict[str, str]:
    """What a night needs in its environment to find a checkout that was not installed."""
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
