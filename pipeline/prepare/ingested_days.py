"""What the ingest of each day of a daily log brought: rows read, accepted and rejected, out of the manifests."""

from __future__ import annotations

import datetime
import itertools

from pipeline.log.daily import DailyLog, _day_of_name
from pipeline.shards.manifest import manifest_numbers, read_manifest
from pipeline.storage import Store


def day_counts(path: str, *, daily: DailyLog) -> dict[datetime.date, dict[str, int]]:
    """{day: rows read, accepted, rejected} of the days that were ingested on their own, as far back as the data set's
    states are kept: of each, when most of it came."""
    assert daily.folder is not None
    states = [read_manifest(path, number=number) for number in manifest_numbers(Store(path))]
    found: dict[datetime.date, dict[str, int]] = {}
    for before, after in itertools.pairwise(states):
        known = {entry["name"] for entry in before.inputs}
        days = {_day_of_name(entry["name"], daily.folder) for entry in after.inputs if entry["name"] not in known}
        days.discard(None)
        if len(days) != 1:
            continue
        counts = {name: after.counts[name] - before.counts[name] for name in ("read", "accepted")}
        counts["rejected"] = sum(after.counts["rejected"].values()) - sum(before.counts["rejected"].values())
        day = days.pop()
        assert day is not None
        if counts["read"] > found.get(day, {"read": -1})["read"]:
            found[day] = counts
    return found
