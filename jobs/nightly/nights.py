"""solar nightly RECIPE --date D: run the night of day D; with --catch-up, first the missed nights before it.

Only one night runs at a time: a process needs the lock, and every step's file is created exclusively, so that a process
that was paused and has lost the lock cannot do a step a second time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from jobs.cluster.failures import WorkerFailure
from jobs.config.run_config import RunConfig
from jobs.host.console import Console, one_line
from jobs.host.documents import as_json
from jobs.host.errors import UserError
from jobs.host.locks import RunInUse, sole_command
from jobs.host.notify import notify
from jobs.host.process import environment
from jobs.host.secrets import refuse_open_directory
from jobs.nightly.context import NightContext, nights_directory
from jobs.nightly.ingest_day import no_input
from jobs.nightly.journal import Journal, NoInput, TryLater, past_nights
from jobs.nightly.night import REASON_LENGTH, run_night
from jobs.nightly.steps import Notified, Outcome
from jobs.scheduling.night_process import SCHEDULED_VARIABLE
from jobs.tracking.champions import ChampionChanged, champion, note_night
from jobs.tracking.registry import PATIENCE, NoStore, StoreAway, open_registry
from jobs.tracking.unsent import is_away
from jobs.training.checkpoint import CheckpointNotWritten
from pipeline.events import DataError, NotNow
from pipeline.log.daily import days_told
from pipeline.prepare.plan import pending_days
from pipeline.sources.files import ImportConfig
from pipeline.storage import absolute

_TEMPORARY = (RunInUse, NotNow, StoreAway, ChampionChanged, CheckpointNotWritten)
"""Errors that are not a mistake of the user and may be gone in an hour."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NightlyOptions:
    """Which nights to run."""

    date: datetime.date | None
    """The day of the log; None = the latest day that has ended."""
    catch_up: bool
    """First run the nights that were missed since the last one, in order."""


def nightly(config: RunConfig, options: NightlyOptions, console: Console, *, verbose: bool = False) -> list[Outcome]:
    """Run the night, and with `catch_up` the missed ones before it; returns the outcome of each.

    TryLater: the day has no input yet, MLflow does not answer, the disk is full, or another night is running.
    UserError: the recipe has no daily log, or the date is before the last night.
    """
    date, root = night_of(config, options), nights_directory(config)
    for directory in (Path(config.workspace), root):
        refuse_open_directory(directory)
    try:
        with _as_try_later(root), environment(_patience()), sole_command(root, otherwise="run it later"):
            return [
                _report_outcome(
                    config, _run_or_give_up(config, each, console, is_last=each == date, verbose=verbose), console
                )
                for each in dates(root, date, catch_up=options.catch_up)
            ]
    except Exception as error:
        # A scheduler retries first, and sends the notification when it gives up.
        if SCHEDULED_VARIABLE not in os.environ:
            _notify_failure(config, date, error, console)
        raise


def _run_or_give_up(
    config: RunConfig, date: datetime.date, console: Console, *, is_last: bool, verbose: bool
) -> Outcome:
    """Run one night; returns its outcome. If it fails and is not the last one, it is given up: a later night ingests
    its day once the log is there, and trains on its requests."""
    night = NightContext.of(config, date, console, verbose=verbose)
    try:
        return run_night(night)
    except NoInput as error:
        if is_last:
            raise
        return _give_up(night, "no_input", error)
    except (UserError, DataError, WorkerFailure) as error:
        if is_last or isinstance(error, _TEMPORARY):
            raise
        return _give_up(night, "failed", error)


def _give_up(night: NightContext, verdict: str, error: Exception) -> Outcome:
    """End the night without a decision, and note that in the registry."""
    found, reason = champion(night.client, night.name), one_line(error)
    serves = str(found.version) if found else None
    outcome = Outcome(date=night.date, verdict=verdict, reasons=(reason,), champion=serves)
    noted = dataclasses.replace(outcome, reasons=(reason[:REASON_LENGTH],))
    note_night(night.client, night.name, night.date.isoformat(), as_json(noted))
    return night.journal.write(outcome)


def _patience() -> dict[str, str]:
    """Environment variables for a short wait for MLflow, except those that are set already: a night that gets no answer
    is retried as a whole, so it need not wait for minutes."""
    return {key: value for key, value in PATIENCE.items() if key not in os.environ}


def night_of(config: RunConfig, options: NightlyOptions) -> datetime.date:
    """The day of the night. UserError: the log does not have one folder per day, or its columns are named where a night
    does not look."""
    daily = config.data.prepare.daily
    if config.source.files.columns != ImportConfig().columns and config.data.prepare.columns is None:
        raise UserError(
            "source.files.columns: has no effect in a night, which reads the log of data.events without an import: "
            "name the columns of the log in data.prepare.columns"
        )
    if daily.folder is None:
        raise UserError(
            "data.prepare.daily.folder is not set: a night needs a log with one folder per day: set it, for example to "
            "dt=%Y-%m-%d, and data.events to the directory of the log"
        )
    return options.date or daily.latest_over()


def dates(root: Path, date: datetime.date, *, catch_up: bool) -> list[datetime.date]:
    """The nights to run, in order. UserError: the date is before the last night that ended, and has no ended night."""
    past = [night.date for night in past_nights(root)]
    if date in past or not past:
        return [date]
    if date < past[-1]:
        raise UserError(
            f"--date {date}: the night of {past[-1]} is done already; late events are ingested by the next night"
        )
    if not catch_up:
        return [date]
    return [past[-1] + datetime.timedelta(days=n) for n in range(1, (date - past[-1]).days + 1)]


def plan_lines(config: RunConfig, options: NightlyOptions) -> list[str]:
    """What --dry-run prints: the nights, the days to ingest, the champion, the requests."""
    date, root = night_of(config, options), nights_directory(config)
    daily = dataclasses.replace(config.data.prepare.daily, until=date.isoformat())
    pending, left_out = pending_days(
        config.events_dir, absolute(config.shards_dir), files=config.data.prepare.files, daily=daily
    )
    name, found = config.registered_model, None
    with contextlib.suppress(NoStore), _as_try_later(root), open_registry(config.tracking, config.workspace) as client:
        found = champion(client, name)
    end, nightly_config = daily.end_of(date), config.nightly
    gate = end - datetime.timedelta(hours=nightly_config.gate_hours)
    valid = gate - datetime.timedelta(hours=nightly_config.valid_hours)
    journals = [Journal(root, each) for each in dates(root, date, catch_up=options.catch_up)]
    lines = [f"nights       {', '.join(f'{each.date}{_state_text(each)}' for each in journals)}"]
    lines.append(f"log          {config.events_dir} -> {config.shards_dir}")
    lines.append(f"new days     {', '.join(map(str, pending)) or 'none'}")
    lines += [f"left out     {line}" for line in days_told(left_out)]
    if date in left_out:
        lines.append(f"this night   {no_input(config, date, left_out[date], root=root)}")
    lines.append(
        f"champion     {f'{name} version {found.version}' if found else f'{name} has none: training from scratch'}"
    )
    if date not in left_out:
        lines.append(
            f"trained on   requests before {valid:%Y-%m-%d %H:%M %Z}, validated on those from then to {gate:%H:%M}"
        )
        lines.append(f"judged by    requests from {gate:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M %Z}")
    lines.append(f"journal      {root}")
    return lines


def _state_text(journal: Journal) -> str:
    if (ended := journal.ended) is not None:
        return f" (done: {ended.verdict})"
    return " (begun)" if journal.directory.exists() else ""


def _report_outcome(config: RunConfig, outcome: Outcome, console: Console) -> Outcome:
    """Print the outcome, and notify of it unless an earlier command did."""
    reason, report = "; ".join(outcome.reasons), str(outcome.report) if outcome.report else None
    console.line(f"{'night':<12} {outcome.date} {outcome.verdict}: {reason}")
    if report:
        console.line(f"{'report':<12} {report}")
    journal = Journal(nights_directory(config), outcome.date)
    if journal.read(Notified) is None:
        _notify(config, outcome.date, outcome.verdict, reason, console, version=outcome.champion, report=report)
        journal.write(Notified())
    return outcome


def _notify_failure(config: RunConfig, date: datetime.date, error: Exception, console: Console) -> None:
    event = "no_input" if isinstance(error, NoInput) else "failed"
    _notify(config, date, event, f"{type(error).__name__}: {one_line(error)}", console)


def _notify(
    config: RunConfig, date: datetime.date, event: str, reason: str, console: Console, **more: str | None
) -> None:
    facts = {"event": event, "model": config.registered_model, "date": date.isoformat(), "reason": reason, **more}
    notify(config.notify, facts, console.error)


@contextlib.contextmanager
def _as_try_later(root: Path) -> Iterator[None]:
    """Raise temporary errors (`_TEMPORARY`, no answer from MLflow, a full disk) as TryLater."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except _TEMPORARY as error:
        raise TryLater(str(error)) from error
    except MlflowException as error:
        if is_away(error):
            raise TryLater(f"MLflow does not answer: {one_line(error)[:200]}") from error
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TryLater(f"{error.filename or root}: {error.strerror}: free some disk space") from error
