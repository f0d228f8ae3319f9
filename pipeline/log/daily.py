"""Logs with a folder a day: which days are whole, so that a day that is still being written is left for later."""

from __future__ import annotations

import dataclasses
import datetime
import zoneinfo
from concurrent.futures import ThreadPoolExecutor

from pipeline.events import DataError
from pipeline.log.readers import Input
from pipeline.storage import Store

_REQUESTS = 16


_NO_FILES = "no files"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DailyLog:
    """Where a log keeps its days, and when one of them is whole."""

    folder: str | None = None
    """Folder of a day below the log as strftime writes it: dt=%Y-%m-%d, %Y/%m/%d; None = the log is not by day."""
    marker: str | None = None
    """File that stands in a day's folder once it is whole, as _SUCCESS; None = a day is whole when it is over."""
    time_zone: str = "UTC"
    """Zone of the days, by its IANA name."""
    cut_off: str = "00:00"
    """Local time at which a day ends and the next begins: with 04:00, day D goes from 04:00 to 04:00 of D + 1."""
    until: str | None = None
    """The last day to take, as 2026-11-21; None = the latest that is whole."""
    days: tuple[str, ...] | None = None
    """These days alone, as [2026-11-20, 2026-11-21]; None = all up to `until`."""

    def __post_init__(self) -> None:
        day = datetime.date(2026, 11, 22)
        needs_folder = [name for name in ("marker", "until", "days") if getattr(self, name) is not None]
        if self.folder is None and needs_folder:
            raise ValueError(f"daily.folder is not set: {needs_folder[0]} needs it, as dt=%Y-%m-%d")
        if self.folder is not None and _parsed(day.strftime(self.folder), self.folder) != day:
            raise ValueError(f"daily.folder is {self.folder!r}: it must give year, month and day, as dt=%Y-%m-%d")
        if self.marker is not None and (not self.marker or "/" in self.marker):
            raise ValueError(f"daily.marker is {self.marker!r}: it must be the name of a file, as _SUCCESS")
        try:
            zoneinfo.ZoneInfo(self.time_zone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(
                f"daily.time_zone is {self.time_zone!r}: it must be an IANA name, as Europe/Berlin"
            ) from None
        for name, example, parse, value in (
            ("cut_off", "04:00", datetime.time.fromisoformat, self.cut_off),
            ("until", "2026-11-21", datetime.date.fromisoformat, self.until),
            *(("days", "[2026-11-21]", datetime.date.fromisoformat, day) for day in self.days or ()),
        ):  # fmt: skip
            try:
                _ = value is None or parse(value)
            except ValueError:
                raise ValueError(f"daily.{name} is {value!r}: it must be as {example}") from None

    def latest_over(self) -> datetime.date:
        """The last day that is over by the clock."""
        day = (_now().astimezone(zoneinfo.ZoneInfo(self.time_zone)) + datetime.timedelta(days=1)).date()
        while self.end_of(day) > _now():
            day -= datetime.timedelta(days=1)
        return day

    def end_of(self, day: datetime.date) -> datetime.datetime:
        """When the day ends and the next begins."""
        time, zone = datetime.time.fromisoformat(self.cut_off), zoneinfo.ZoneInfo(self.time_zone)
        return datetime.datetime.combine(day + datetime.timedelta(days=1), time, zone)

    def folder_of(self, day: datetime.date) -> str:
        assert self.folder is not None
        return day.strftime(self.folder)


def whole_days(found: list[Input], *, events: str, daily: DailyLog) -> tuple[list[Input], list[str]]:
    """The files of whole days, and a line for each day that is left out, with the reason.

    `events` is the log's directory, under which `found` lie. DataError: a file lies in no day's folder.
    """
    if daily.folder is None:
        return found, []
    if not found:
        return [], []
    log = log_days(found, events=events, daily=daily)
    return [file for day in sorted(log.files) for file in log.files[day]], days_told(log.left_out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogDays:
    """A daily log as it stands."""

    files: dict[datetime.date, list[Input]]
    """Of the days that are whole."""
    left_out: dict[datetime.date, str]
    """Why other days are not: not over, no marker, or no files at all."""


def log_days(found: list[Input], *, events: str, daily: DailyLog) -> LogDays:
    """The days that `daily` asks for, from the first that the log has; `found` are its files, at least one.

    DataError: a file lies in no day's folder.
    """
    assert daily.folder is not None
    by_day: dict[datetime.date, list[Input]] = {}
    for file in found:
        by_day.setdefault(_day_of(file, daily.folder, events=events), []).append(file)
    if daily.days is not None:
        every = sorted(map(datetime.date.fromisoformat, daily.days))
    else:
        first, until = min(by_day), datetime.date.fromisoformat(daily.until) if daily.until else max(by_day)
        every = [first + datetime.timedelta(days=n) for n in range((until - first).days + 1)]
    there = [day for day in every if day in by_day]
    with ThreadPoolExecutor(_REQUESTS) as pool:
        reasons = dict(zip(there, pool.map(lambda day: _why_unfinished(day, events, daily), there), strict=True))
    left_out = {}
    for day in every:
        if why := reasons.get(day) if day in by_day else f"{_NO_FILES} in {daily.folder_of(day)}":
            left_out[day] = why
    return LogDays(files={day: by_day[day] for day in every if day not in left_out}, left_out=left_out)


def days_told(left_out: dict[datetime.date, str]) -> list[str]:
    """A line for each day that is left out; days in a row without files share one."""
    runs: list[tuple[datetime.date, datetime.date, str]] = []
    for day, why in sorted(left_out.items()):
        what = _NO_FILES if why.startswith(_NO_FILES) else why
        follows = runs and runs[-1][2] == what == _NO_FILES and day - runs[-1][1] == datetime.timedelta(days=1)
        runs = [*runs[:-1], (runs[-1][0], day, what)] if follows else [*runs, (day, day, what)]
    return [
        f"{first} to {last}: {why}" if first != last else f"{first}: {left_out[first]}" for first, last, why in runs
    ]


def _why_unfinished(day: datetime.date, events: str, daily: DailyLog) -> str | None:
    if daily.marker is not None:
        there = Store(events).exists(f"{daily.folder_of(day)}/{daily.marker}")
        return None if there else f"no {daily.marker} in {daily.folder_of(day)}"
    end = daily.end_of(day)
    return None if end <= _now() else f"it ends at {end:%Y-%m-%d %H:%M %Z}"


def _day_of(file: Input, folder: str, *, events: str) -> datetime.date:
    day = _day_of_name(file.name, folder)
    if day is None:
        raise DataError(
            f"{file.name}: lies in no folder {folder!r} of {events}; move it away, or set daily.folder to what days "
            "are called"
        )
    return day


def _day_of_name(name: str, folder: str) -> datetime.date | None:
    # A name starts with the log's own directory.
    parts = name.split("/")[1:-1]
    return _parsed("/".join(parts[: folder.count("/") + 1]), folder)


def _parsed(name: str, folder: str) -> datetime.date | None:
    try:
        day = datetime.datetime.strptime(name, folder).date()
    except ValueError:
        return None
    return day if day.strftime(folder) == name else None


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
