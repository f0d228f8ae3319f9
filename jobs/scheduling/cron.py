"""The times at which a cron expression fires, in a time zone with its changes to and from daylight saving time.

APScheduler computes the times; this file converts from the dialect of crontab and Kubernetes to APScheduler's: weekdays
count from Sunday, and if both day of month and weekday are restricted, a day that matches either of them counts.
"""

from __future__ import annotations

import datetime
import re
import zoneinfo

from apscheduler.triggers.cron import CronTrigger

_FIELDS = ("minute", "hour", "day of month", "month", "weekday")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_EXAMPLE = "give five fields (minute, hour, day of month, month, weekday), such as '0 3 * * *' for every day at 03:00"


class Cron:
    """A cron expression in a time zone."""

    def __init__(self, expression: str, time_zone: str) -> None:
        """ValueError names the mistake and the fix."""
        self.expression, self.time_zone = " ".join(expression.split()), time_zone
        try:
            self.zone = zoneinfo.ZoneInfo(time_zone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(f"time_zone {time_zone!r}: give an IANA name, such as Europe/Berlin") from None
        fields = self.expression.lower().split()
        if len(fields) != len(_FIELDS):
            raise ValueError(f"cron {expression!r}: {_EXAMPLE}")
        for field, text in zip(_FIELDS, fields, strict=True):
            names = {"month": _MONTHS, "weekday": _WEEKDAYS}.get(field, ())
            if not re.fullmatch(r"[\d*,/-]+", re.sub("|".join(names), "0", text) if names else text):
                raise ValueError(f"cron {expression!r}: {field} {text!r} is not understood: {_EXAMPLE}")
        try:
            self._triggers = _triggers(*fields, zone=self.zone)
        except ValueError as error:
            raise ValueError(f"cron {expression!r}: {error}: {_EXAMPLE}") from error
        self._every_hour = fields[1].startswith("*")
        self.portable = " ".join([*fields[:4], _weekdays(fields[4])])
        """The same expression for schedulers that do not accept weekday 7 for Sunday."""
        if self.next(datetime.datetime.now(datetime.UTC)) is None:
            raise ValueError(f"cron {expression!r}: no such day exists: {_EXAMPLE}")

    def next(self, after: datetime.datetime) -> datetime.datetime | None:
        """The first time later than `after` (an aware datetime), in the expression's zone; None = never again.

        When the clock goes forward, a skipped time fires an hour later by the clock. When it goes back, a repeated time
        fires once, unless the expression is for every hour.
        """
        found = [time for trigger in self._triggers if (time := self._next(trigger, after))]
        return min(found, default=None)

    def _next(self, trigger: CronTrigger, after: datetime.datetime) -> datetime.datetime | None:
        while True:
            # Add in UTC: sums and differences of local times ignore a change of the clock.
            start = after.astimezone(datetime.UTC) + datetime.timedelta(microseconds=1)
            fire = trigger.get_next_fire_time(None, start)
            if fire is None:
                return None
            after = fire.astimezone(datetime.UTC).astimezone(self.zone)
            if self._every_hour or after.fold == 0:
                return after


def _triggers(
    minute: str, hour: str, day: str, month: str, weekday: str, *, zone: zoneinfo.ZoneInfo
) -> list[CronTrigger]:
    time = {"minute": minute, "hour": hour, "month": month, "second": 0, "timezone": zone}
    days = {"day": day} if not day.startswith("*") else {}
    weekdays = {"day_of_week": _weekdays(weekday)} if not weekday.startswith("*") else {}
    if days and weekdays:
        return [CronTrigger(**time, **days), CronTrigger(**time, **weekdays)]
    return [CronTrigger(**time, day=day, day_of_week=_weekdays(weekday))]


def _weekdays(field: str) -> str:
    """The weekday field as names: 0 and 7 are Sunday."""
    if field == "*":
        return field
    days: set[int] = set()
    for part in field.split(","):
        span, slash, step = part.partition("/")
        first, dash, last = ("0", "-", "6") if span == "*" else span.partition("-")
        begin = _weekday(first)
        end = _weekday(last) if dash else 6 if slash else begin
        if end < begin or (slash and not int(step or 0)):
            raise ValueError(f"weekday {part!r} is not understood")
        days |= {day % 7 for day in range(begin, end + 1, int(step) if slash else 1)}
    return ",".join(_WEEKDAYS[day] for day in sorted(days))


def _weekday(text: str) -> int:
    if text in _WEEKDAYS:
        return _WEEKDAYS.index(text)
    if not text.isdigit() or int(text) > 7:
        raise ValueError(f"weekday {text!r} must be from 0 (Sunday) to 7 (Sunday), or sun ... sat")
    return int(text)
