"""Logs with one folder per day: which days are complete, so that a day still being written is left for later."""

from __future__ import annotations

import dataclasses
import datetime
import zoneinfo
from concurrent.futures import ThreadPoolExecutor

from pipeline.events import DataError
from pipeline.log.inputs import Found, Input
from pipeline.storage import Store

_REQUESTS = 16


_NO_FILES = "no files"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DailyLog:
    """Where a log keeps its days, and when a day is complete."""

    folder: str | None = None
    """strftime pattern of a day's folder inside the log: dt=%Y-%m-%d, %Y/%m/%d; None = the log has no such folders."""
    marker: str | None = None
    """File that is written into a day's folder when the day is complete, such as _SUCCESS; None = a day is complete
    once it has ended."""
    time_zone: str = "UTC"
    """Time zone of the days, as an IANA name."""
    cut_off: str = "00:00"
    """Local time at which a day ends and the next begins: with 04:00, day D lasts from 04:00 to 04:00 of D + 1."""
    until: str | None = None
    """The last day to read, such as 2026-11-21; None = the latest complete one."""
    days: tuple[str, ...] | None = None
    """Read only these days, such as [2026-11-20, 2026-11-21]; None = all up to `until`."""

    def __post_init__(self) -> None:
        day = datetime.date(2026, 11, 22)
        needs_folder = [name for name in ("marker", "until", "days") if getattr(self, name) is not None]
        if self.folder is None and needs_folder:
            raise ValueError(f"daily.folder is not set: {needs_folder[0]} needs it, for example dt=%Y-%m-%d")
        if self.folder is not None and _parsed(day.strftime(self.folder), self.folder) != day:
            raise ValueError(
                f"daily.folder is {self.folder!r}: it must give year, month and day, for example dt=%Y-%m-%d"
            )
        if self.marker is not None and (not self.marker or "/" in self.marker):
            raise ValueError(f"daily.marker is {self.marker!r}: it must be a file name, for example _SUCCESS")
        try:
            zoneinfo.ZoneInfo(self.time_zone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(
                f"daily.time_zone is {self.time_zone!r}: it must be an IANA name, for example Europe/Berlin"
            ) from None
        for name, example, parse, value in (
            ("cut_off", "04:00", datetime.time.fromisoformat, self.cut_off),
            ("until", "2026-11-21", datetime.date.fromisoformat, self.until),
            *(("days", "[2026-11-21]", datetime.date.fromisoformat, day) for day in self.days or ()),
        ):  # fmt: skip
            try:
                _ = value is None or parse(value)
            except ValueError:
                raise ValueError(f"daily.{name} is {value!r}: it must be written like {example}") from None

    def latest_over(self) -> datetime.date:
        """The last day that has ended by now."""
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


def whole_days(found: Found, *, events: str, daily: DailyLog) -> tuple[Found, list[str]]:
    """The files of complete days, and for each day that is left out one line with the reason.

    `events` is the log's directory, which contains the files `found`. DataError: a file is in no day's folder.
    """
    folder = daily.folder
    if folder is None or not found.inputs:
        return found, []
    log = log_days(found.inputs, events=events, daily=daily)

    def of_these_days(names: dict[str, str]) -> dict[str, str]:
        days = {name: _day_of_name(name, folder) for name in names}
        return {name: why for name, why in names.items() if days[name] is None or days[name] in log.files}

    files = [file for day in sorted(log.files) for file in log.files[day]]
    whole = Found(inputs=files, left_out=of_these_days(found.left_out), unread=of_these_days(found.unread))
    return whole, days_told(log.left_out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogDays:
    """The days of a daily log at this moment."""

    files: dict[datetime.date, list[Input]]
    """The files of each complete day."""
    left_out: dict[datetime.date, str]
    """The reason why each other day is incomplete: it has not ended, or there is no marker, or there are no files."""


def log_days(found: list[Input], *, events: str, daily: DailyLog) -> LogDays:
    """The days that `daily` selects, starting with the first day of the log; `found` are its files, at least one.

    DataError: a file is in no day's folder.
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
    present = [day for day in every if day in by_day]
    with ThreadPoolExecutor(_REQUESTS) as pool:
        reasons = dict(zip(present, pool.map(lambda day: _why_unfinished(day, events, daily), present), strict=True))
    left_out = {}
    for day in every:
        if why := reasons.get(day) if day in by_day else f"{_NO_FILES} in {daily.folder_of(day)}":
            left_out[day] = why
    return LogDays(files={day: by_day[day] for day in every if day not in left_out}, left_out=left_out)


def days_told(left_out: dict[datetime.date, str]) -> list[str]:
    """One line for each day that is left out; consecutive days without files share one line."""
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
        has_marker = Store(events).exists(f"{daily.folder_of(day)}/{daily.marker}")
        return None if has_marker else f"no {daily.marker} in {daily.folder_of(day)}"
    end = daily.end_of(day)
    return None if end <= _now() else f"it ends at {end:%Y-%m-%d %H:%M %Z}"


def _day_of(file: Input, folder: str, *, events: str) -> datetime.date:
    day = _day_of_name(file.name, folder)
    if day is None:
        raise DataError(
            f"{file.name}: is in no folder named like {folder!r} in {events}; move it away, or set daily.folder to "
            "the pattern of the days' folders"
        )
    return day


def _day_of_name(name: str, folder: str) -> datetime.date | None:
    # The first part of a name is the log's own directory.
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
