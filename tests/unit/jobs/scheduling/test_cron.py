"""When a night is due: crontab's dialect, time zones and changes of the clock."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from datetime import UTC, timedelta
from zoneinfo import ZoneInfo

import pytest

from jobs.scheduling.cron import Cron

BERLIN = ZoneInfo("Europe/Berlin")


def fires(expression: str, zone: str, first: str, count: int) -> list[str]:
    cron, after, found = Cron(expression, zone), datetime.datetime.fromisoformat(first).replace(tzinfo=UTC), []
    for _ in range(count):
        fire = cron.next(after)
        assert fire is not None
        found.append(f"{fire:%m-%d %H:%M %Z}")
        after = fire
    return found


def test_night_keeps_its_local_time_across_changes_of_the_clock():
    spring = ["03-28 03:00 CET", "03-29 03:00 CEST", "03-30 03:00 CEST"]
    assert fires("0 3 * * *", "Europe/Berlin", "2026-03-27T12:00", 3) == spring
    autumn = ["10-24 03:00 CEST", "10-25 03:00 CET", "10-26 03:00 CET"]
    assert fires("0 3 * * *", "Europe/Berlin", "2026-10-23T12:00", 3) == autumn


def test_time_that_is_left_out_comes_an_hour_later_and_one_that_comes_twice_once():
    assert fires("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00", 2) == ["03-29 03:30 CEST", "03-30 02:30 CEST"]
    assert fires("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00", 2) == ["10-25 02:30 CEST", "10-26 02:30 CET"]
    hourly = ["10-25 01:00 CEST", "10-25 02:00 CEST", "10-25 02:00 CET", "10-25 03:00 CET"]
    assert fires("0 * * * *", "Europe/Berlin", "2026-10-24T22:30", 4) == hourly


@pytest.mark.parametrize(
    ("expression", "holds"),
    [
        ("*/20 * * * *", lambda at: at.minute % 20 == 0),
        ("0 4 * * 0", lambda at: (at.hour, at.minute) == (4, 0) and at.isoweekday() == 7),
        ("0 4 * * 7", lambda at: (at.hour, at.minute) == (4, 0) and at.isoweekday() == 7),
        ("5 4 * * 1-5", lambda at: (at.hour, at.minute) == (4, 5) and at.isoweekday() <= 5),
        ("5 4 * * Mon-Fri", lambda at: (at.hour, at.minute) == (4, 5) and at.isoweekday() <= 5),
        ("0 0 * * 5-7", lambda at: (at.hour, at.minute) == (0, 0) and at.isoweekday() >= 5),
        ("0 0 * * */3", lambda at: (at.hour, at.minute) == (0, 0) and at.isoweekday() in (7, 3, 6)),
        ("0 0 1,15 * *", lambda at: (at.hour, at.minute) == (0, 0) and at.day in (1, 15)),
        ("0 0 13 * fri", lambda at: (at.hour, at.minute) == (0, 0) and (at.day == 13 or at.isoweekday() == 5)),
        ("10/25 6-8/2 * nov *", lambda at: at.minute in (10, 35) and at.hour in (6, 8) and at.month == 11),
    ],
)
def test_times_are_those_of_crontab(expression: str, holds: Callable[[datetime.datetime], bool]):
    cron, start = Cron(expression, "Europe/Berlin"), datetime.datetime(2026, 11, 1, tzinfo=UTC)
    expected = [
        at for minute in range(1, 21 * 24 * 60) if holds(at := (start + timedelta(minutes=minute)).astimezone(BERLIN))
    ]
    found, after = [], start
    while (after := cron.next(after) or start) <= expected[-1]:
        found.append(after)
    assert found == expected


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("0 3 * *", "give five fields"),
        ("@daily", "give five fields"),
        ("61 3 * * *", r"last value \(61\) is higher than the maximum"),
        ("0 3 * * 8", "weekday '8' must be from 0"),
        ("0 3 * * 5-1", "weekday '5-1' is not understood"),
        ("0 3 last * *", "day of month 'last' is not understood"),
        ("0 3 * foo *", "month 'foo' is not understood"),
        ("0 3 30 2 *", "no such day exists"),
        ("*/0 * * * *", "Increment must be higher than 0"),
        ("0 3 * * 1/0", "weekday '1/0' is not understood"),
        ("x 3 * * *", "minute 'x' is not understood"),
    ],
)
def test_mistake_in_an_expression_names_a_fix(expression, why):
    with pytest.raises(ValueError, match=rf"^cron '.*{why}.* as '0 3 \* \* \*' for every day at 03:00$"):
        Cron(expression, "UTC")


def test_expression_for_kubernetes_names_its_weekdays():
    assert Cron("5  4 * * 5-7", "UTC").portable == "5 4 * * sun,fri,sat"
    assert Cron("0 3 * * *", "UTC").portable == "0 3 * * *"


def test_unknown_time_zone_names_a_fix():
    with pytest.raises(ValueError, match=r"^time_zone 'Berlin': give an IANA name, such as Europe/Berlin$"):
        Cron("0 3 * * *", "Berlin")
