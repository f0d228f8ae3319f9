"""Rows read, accepted and rejected by the ingest of each day of a daily log, derived from the manifests."""

from __future__ import annotations

import dataclasses
import datetime
import itertools

from pipeline.log.daily import DailyLog, _day_of_name
from pipeline.shards.manifest import manifest_numbers, read_manifest
from pipeline.storage import Store


@dataclasses.dataclass(frozen=True, kw_only=True)
class DayCounts:
    """Row counts of one day of the log; a row that is neither accepted nor rejected was in the data set already."""

    read: int
    accepted: int
    rejected: int

    @property
    def rejected_share(self) -> float:
        return self.rejected / max(1, self.read)


def day_counts(path: str, *, daily: DailyLog) -> dict[datetime.date, DayCounts]:
    """The row counts of the days that were ingested one at a time, as far back as the data set's states are kept. Of
    several ingests of a day, the one that read the most rows counts."""
    assert daily.folder is not None
    states = [read_manifest(path, number=number) for number in manifest_numbers(Store(path))]
    found: dict[datetime.date, DayCounts] = {}
    for before, after in itertools.pairwise(states):
        known = {entry["name"] for entry in before.inputs}
        days = {_day_of_name(entry["name"], daily.folder) for entry in after.inputs if entry["name"] not in known}
        days.discard(None)
        if len(days) != 1:
            continue
        rejected = [sum(state.counts["rejected"].values()) for state in (before, after)]
        counts = DayCounts(
            read=after.counts["read"] - before.counts["read"],
            accepted=after.counts["accepted"] - before.counts["accepted"],
            rejected=rejected[1] - rejected[0],
        )
        day = days.pop()
        assert day is not None
        if day not in found or counts.read > found[day].read:
            found[day] = counts
    return found
