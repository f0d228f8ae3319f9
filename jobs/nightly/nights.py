"""solar nightly RECIPE --date D: the night of a day, and with --catch-up of the days that were missed before it.

One night at a time: a lock says who works, and every step's file is created exclusively, so that a paused holder of the
lock cannot do a step twice.
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
from jobs.config.run import RunConfig
from jobs.host.console import Console, one_line
from jobs.host.documents import as_json
from jobs.host.errors import UserError
from jobs.host.locks import RunInUse, sole_command
from jobs.host.notify import notify
from jobs.host.process import environment
from jobs.host.secrets import refuse_open_directory
from jobs.nightly.context import NightContext, nights_directory
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
from pipeline.storage import absolute

_LATER = (RunInUse, NotNow, StoreAway, ChampionChanged, CheckpointNotWritten)
"""What may be otherwise in an hour: no mistake of the user's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NightlyOptions:
    """Which night."""

    date: datetime.date | None
    """The day of the log; None = the latest that is over."""
    catch_up: bool
    """Do the nights since the last one first, in order."""


def nightly(config: RunConfig, options: NightlyOptions, console: Console, *, verbose: bool = False) -> list[Outcome]:
    """Run the night, and with `catch_up` those before it; the outcome of each.

    TryLater: the day has no input yet, MLflow is away, the disk is full, another night is at work. UserError: the
    recipe has no daily log, or the date is before the last night.
    """
    date, root = night_of(config, options), nights_directory(config)
    for directory in (Path(config.workspace), root):
        refuse_open_directory(directory)
    try:
        with _later(root), environment(_patience()), sole_command(root, otherwise="run it later"):
            return [
                _told(config, _outcome(config, each, console, is_last=each == date, verbose=verbose), console)
                for each in dates(root, date, catch_up=options.catch_up)
            ]
    except Exception as error:
        # A scheduler tries again first, and tells when it gives up.
        if SCHEDULED_VARIABLE not in os.environ:
            _notify_failure(config, date, error, console)
        raise


def _outcome(config: RunConfig, date: datetime.date, console: Console, *, is_last: bool, verbose: bool) -> Outcome:
    """The outcome of a night. One that is not the last is given up where it cannot be done: the next one takes in its
    log when that comes, and trains on its requests."""
    night = NightContext.of(config, date, console, verbose=verbose)
    try:
        return run_night(night)
    except NoInput as error:
        if is_last:
            raise
        return _given_up(night, "no_input", error)
    except (UserError, DataError, WorkerFailure) as error:
        if is_last or isinstance(error, _LATER):
            raise
        return _given_up(night, "failed", error)


def _given_up(night: NightContext, verdict: str, error: Exception) -> Outcome:
    found, reason = champion(night.client, night.name), one_line(error)
    serves = str(found.version) if found else None
    outcome = Outcome(date=night.date, verdict=verdict, reasons=(reason,), champion=serves)
    told = dataclasses.replace(outcome, reasons=(reason[:REASON_LENGTH],))
    note_night(night.client, night.name, night.date.isoformat(), as_json(told))
    return night.journal.write(outcome)


def _patience() -> dict[str, str]:
    """A night that MLflow does not answer is tried again: it need not wait for minutes, unless somebody says so."""
    return {key: value for key, value in PATIENCE.items() if key not in os.environ}


def night_of(config: RunConfig, options: NightlyOptions) -> datetime.date:
    """The day that is meant. UserError where the log is not by day."""
    daily = config.data.prepare.daily
    if daily.folder is None:
        raise UserError(
            "data.prepare.daily.folder is not set: a night needs a log with a folder a day, as dt=%Y-%m-%d, and its "
            "place in data.events"
        )
    return options.date or daily.latest_over()


def dates(root: Path, date: datetime.date, *, catch_up: bool) -> list[datetime.date]:
    """The nights to do, in order. UserError: the date is before the last one that ended, and was not done."""
    past = [night.date for night in past_nights(root)]
    if date in past or not past:
        return [date]
    if date < past[-1]:
        raise UserError(
            f"--date {date}: the night of {past[-1]} is done already: what comes late enters with the next one"
        )
    if not catch_up:
        return [date]
    return [past[-1] + datetime.timedelta(days=n) for n in range(1, (date - past[-1]).days + 1)]


def plan_lines(config: RunConfig, options: NightlyOptions) -> list[str]:
    """What --dry-run tells: the nights, the days that would come in, the champion, the requests."""
    date, root = night_of(config, options), nights_directory(config)
    daily = dataclasses.replace(config.data.prepare.daily, until=date.isoformat())
    pending, left_out = pending_days(
        config.events_dir, absolute(config.shards_dir), files=config.data.prepare.files, daily=daily
    )
    name, found = config.registered_model, None
    with contextlib.suppress(NoStore), _later(root), open_registry(config.tracking, config.workspace) as client:
        found = champion(client, name)
    end, nightly_config = daily.end_of(date), config.nightly
    gate = end - datetime.timedelta(hours=nightly_config.gate_hours)
    valid = gate - datetime.timedelta(hours=nightly_config.valid_hours)
    journals = [Journal(root, each) for each in dates(root, date, catch_up=options.catch_up)]
    lines = [f"nights       {', '.join(f'{each.date}{_done(each)}' for each in journals)}"]
    lines.append(f"log          {config.events_dir} -> {config.shards_dir}")
    lines.append(f"new days     {', '.join(map(str, pending)) or 'none'}")
    lines += [f"left out     {line}" for line in days_told(left_out)]
    lines.append(f"champion     {f'{name} version {found.version}' if found else f'{name} has none: from the seed'}")
    lines.append(f"trained      requests before {valid:%Y-%m-%d %H:%M %Z}, chosen by those before {gate:%H:%M}")
    lines.append(f"judged by    requests from {gate:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M %Z}")
    lines.append(f"journal      {root}")
    return lines


def _done(journal: Journal) -> str:
    if (ended := journal.ended) is not None:
        return f" (done: {ended.verdict})"
    return " (begun)" if journal.directory.exists() else ""


def _told(config: RunConfig, outcome: Outcome, console: Console) -> Outcome:
    """Say it here, and once to whoever is to be notified."""
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
def _later(root: Path) -> Iterator[None]:
    """What may be otherwise in an hour, as TryLater."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except _LATER as error:
        raise TryLater(str(error)) from error
    except MlflowException as error:
        if is_away(error):
            raise TryLater(f"MLflow does not answer: {one_line(error)[:200]}") from error
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TryLater(f"{error.filename or root}: {error.strerror}: free some disk") from error
