"""The first step of a night: the new days of the log -> sequence shards, one ingest per day."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path

from jobs.config.run_config import RunConfig
from jobs.data.prepare import prepare_shards
from jobs.nightly.context import NightContext
from jobs.nightly.journal import NoInput, past_nights
from jobs.nightly.steps import Prepared
from jobs.runs.run_dir import open_shards
from pipeline.events import DataError, NotNow
from pipeline.prepare.ingested_days import day_counts
from pipeline.prepare.plan import latest_day, pending_days
from pipeline.shards.manifest import current_manifest


def require_input(night: NightContext) -> None:
    """NoInput if the night's day is not complete; lists the log, and reads none of it."""
    config = night.config
    daily = dataclasses.replace(config.data.prepare.daily, days=(night.date.isoformat(),), until=None)
    _, left_out = pending_days(config.events_dir, config.shards_dir, files=config.data.prepare.files, daily=daily)
    if left_out:
        raise _no_input(night, left_out[night.date])


def _no_input(night: NightContext, why: str) -> NoInput:
    return NoInput(f"{night.date}: {no_input(night.config, night.date, why, root=night.root)}")


def no_input(config: RunConfig, date: datetime.date, why: str, *, root: Path) -> str:
    """That a night has no input, and why; with the latest day of the log if that is earlier and no night has been
    there: a log that ended long ago does not come later. `root`: the directory of the journals of all nights."""
    daily = dataclasses.replace(config.data.prepare.daily, until=None, days=None)
    past, latest = past_nights(root), latest_day(config.events_dir, files=config.data.prepare.files, daily=daily)
    if latest is None or latest >= date or (past and latest <= past[-1].date):
        return f"no input ({why})"
    return f"no input ({why}); the latest complete day of the log is {latest}: --date {latest} runs its night"


def take_in(night: NightContext) -> Prepared:
    """Ingest all new complete days up to the night's. A refused day does not block the others, and the next nights try
    it again.

    NoInput: the night's own day is not complete, or is refused. DataError: there is no data set yet, and its first
    ingest is refused.
    """
    config, date = night.config, night.date.isoformat()
    options, daily = config.data.prepare, config.data.prepare.daily
    until = dataclasses.replace(daily, until=date)
    pending, left_out = pending_days(config.events_dir, config.shards_dir, files=options.files, daily=until)
    refused: dict[str, str] = {}
    if current_manifest(config.shards_dir) is None:
        # The first ingest may be years of log: it takes all days together. An error is raised to whoever sets this up.
        prepare_shards(config.events_dir, config.shards_dir, dataclasses.replace(options, daily=until), night.console)
        pending = []
    for day in map(str, pending):
        alone = dataclasses.replace(options, daily=dataclasses.replace(daily, days=(day,)))
        try:
            prepare_shards(config.events_dir, config.shards_dir, alone, night.console)
        except NotNow:
            raise
        except DataError as error:
            refused[day] = str(error)
            night.tell(f"{day} was refused and is left out: {error}")
    reasons = {str(day): why for day, why in left_out.items()}
    if why := (reasons | refused).get(date):
        raise _no_input(night, why)
    manifest = open_shards(config).manifest
    return Prepared(
        manifest=manifest.number,
        fingerprint=manifest.fingerprint,
        events=manifest.counts["accepted"],
        days={str(day): counts for day, counts in day_counts(config.shards_dir, daily=daily).items()},
        refused=refused,
        left_out=reasons,
    )
