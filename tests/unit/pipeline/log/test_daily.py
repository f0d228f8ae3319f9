"""Logs with one folder per day: a day comes in once it is whole, by its marker or by the clock."""

import dataclasses
import datetime

import pytest

from pipeline.events import DataError
from pipeline.log import daily as daily_module
from pipeline.log.daily import DailyLog, days_told
from pipeline.log.inputs import FileFormat
from pipeline.prepare.ingested_days import DayCounts, day_counts
from pipeline.prepare.plan import pending_days

DAYS = [datetime.date(2026, 3, day) for day in (27, 28, 29, 30)]
SPARK = DailyLog(folder="dt=%Y-%m-%d", marker="_SUCCESS")


@pytest.fixture
def ingest(prepare, tmp_path):
    return lambda daily, **settings: prepare(tmp_path / "log", tmp_path / "out", buckets=2, daily=daily, **settings)


@pytest.fixture
def write_days(write_log, tmp_path):
    """Three events a day, one of them of the day before, in files of the folder."""

    def write(folder="dt=%Y-%m-%d", *, days=DAYS, below="part-0.parquet"):
        for day in days:
            start = int(datetime.datetime.combine(day, datetime.time(), datetime.UTC).timestamp())
            times = [start - 60, start + 60, start + 86_000]
            write_log({"user_id": [1, 2, 3], "item_id": [4, 5, 6], "timestamp": times}, f"log/{day:{folder}}/{below}")

    return write


@pytest.fixture
def at(monkeypatch):
    """Set the clock."""

    def set_clock(text):
        monkeypatch.setattr(daily_module, "_now", lambda: datetime.datetime.fromisoformat(text))

    return set_clock


def mark(tmp_path, *days):
    for day in days:
        (tmp_path / "log" / f"dt={day}" / "_SUCCESS").touch()


def test_a_day_comes_with_its_marker_and_is_named_while_it_has_none(ingest, write_days, tmp_path):
    write_days()
    with pytest.raises(DataError, match=r"no day is complete yet \(2026-03-30: no _SUCCESS in dt=2026-03-30\)"):
        ingest(SPARK)
    mark(tmp_path, DAYS[0], DAYS[2])
    first = ingest(SPARK)
    assert first.manifest.counts["read"] == 6
    assert first.left_out == [f"{day}: no _SUCCESS in dt={day}" for day in (DAYS[1], DAYS[3])]
    # The later one of the two came first: the events of the earlier one sort into place.
    mark(tmp_path, DAYS[1])
    second = ingest(SPARK)
    assert (second.manifest.counts["accepted"], second.left_out) == (9, [f"{DAYS[3]}: no _SUCCESS in dt={DAYS[3]}"])
    assert ingest(SPARK).reused


def test_without_a_marker_a_day_is_whole_when_it_is_over_where_the_log_is_kept(ingest, write_days, at):
    write_days("%Y/%m/%d", below="hour=03/part-0.parquet")
    # Clocks in Berlin went from 2:00 to 3:00 on the 29th: that day has 23 hours.
    berlin = DailyLog(folder="%Y/%m/%d", time_zone="Europe/Berlin", cut_off="04:00")
    at("2026-03-30T01:59:59+00:00")
    before = ingest(berlin)
    assert before.manifest.counts["read"] == 6
    assert before.left_out == [
        "2026-03-29: it ends at 2026-03-30 04:00 CEST",
        "2026-03-30: it ends at 2026-03-31 04:00 CEST",
    ]
    at("2026-03-30T02:00:00+00:00")
    assert ingest(berlin).manifest.counts["read"] == 9


def test_day_without_files_is_reported(ingest, write_days, at):
    at("2026-04-02T00:00:00+00:00")
    write_days(days=[DAYS[0], DAYS[2]])
    assert ingest(DailyLog(folder="dt=%Y-%m-%d")).left_out == ["2026-03-28: no files in dt=2026-03-28"]


def test_no_later_day_than_wanted(ingest, write_days, at):
    at("2026-04-02T00:00:00+00:00")
    write_days()
    with pytest.raises(DataError, match="the log begins after 2026-01-01"):
        ingest(DailyLog(folder="dt=%Y-%m-%d", until="2026-01-01"))
    prepared = ingest(DailyLog(folder="dt=%Y-%m-%d", until="2026-03-28"))
    assert (prepared.manifest.counts["read"], prepared.left_out) == (6, [])


def test_what_is_not_whole_yet_or_no_day_at_all(ingest, write_days, write_log, tmp_path):
    write_days()
    mark(tmp_path, *DAYS)
    rows = {"user_id": [9], "item_id": [9], "timestamp": [9]}
    write_log(rows, "log/_temporary/0/part-0.parquet")
    write_log(rows, f"log/dt={DAYS[0]}/_temporary/part-1.parquet")
    assert ingest(SPARK).manifest.counts["read"] == 12
    write_log(rows, "log/dt=2026-3-31/part-0.parquet")
    with pytest.raises(DataError, match=r"log/dt=2026-3-31/part-0.parquet: is in no folder named like 'dt=%Y-%m-%d'"):
        ingest(SPARK)


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("folder", "dt=%Y-%m", "must give year, month and day"),
        ("marker", "a/_SUCCESS", "must be a file name"),
        ("time_zone", "Berlin", "IANA name"),
        ("cut_off", "4 am", "must be written like 04:00"),
        ("until", "yesterday", "must be written like 2026-11-21"),
    ],
)
def test_wrong_settings_are_named(setting, value, says):
    with pytest.raises(ValueError, match=f"{setting} is '{value}'.*{says}"):
        DailyLog(**{"folder": "%Y-%m-%d", setting: value})


def test_marker_needs_a_folder():
    with pytest.raises(ValueError, match="folder is not set: marker needs it"):
        DailyLog(marker="_SUCCESS")


def test_days_come_in_alone_and_one_that_is_refused_holds_up_no_other(prepare, write_log, write_days, tmp_path):
    write_days()
    mark(tmp_path, *DAYS)
    log, out = str(tmp_path / "log"), str(tmp_path / "out")
    broken = {"user_id": [1, None], "item_id": [4, None], "timestamp": [1_700_000_000, 1_700_000_000]}
    write_log(broken, f"log/dt={DAYS[1]}/part-0.parquet")

    def take_in(day):
        return prepare(log, out, buckets=2, daily=dataclasses.replace(SPARK, days=(str(day),)))

    def pending():
        return pending_days(log, out, files=FileFormat(), daily=dataclasses.replace(SPARK, until=str(DAYS[2])))

    assert pending() == (DAYS[:3], {})
    take_in(DAYS[0])
    with pytest.raises(DataError, match="above max_rejected_ratio"):
        take_in(DAYS[1])
    assert take_in(DAYS[2]).manifest.counts["accepted"] == 6
    assert pending() == ([DAYS[1]], {})
    write_days(days=[DAYS[1]])
    assert take_in(DAYS[1]).manifest.counts["accepted"] == 9
    assert pending() == ([], {})
    assert day_counts(out, daily=SPARK) == {
        day: DayCounts(read=3, accepted=3, rejected=0) for day in (DAYS[2], DAYS[1])
    }


def test_a_file_that_changed_after_its_ingest_is_pending_and_named_when_its_day_is_tried(ingest, write_days, tmp_path):
    write_days(days=DAYS[:2])
    mark(tmp_path, *DAYS[:2])
    ingest(SPARK)
    (tmp_path / "log" / f"dt={DAYS[0]}" / "part-0.parquet").write_bytes(b"PAR1 cut")
    log, out = str(tmp_path / "log"), str(tmp_path / "out")
    assert pending_days(log, out, files=FileFormat(), daily=SPARK) == ([DAYS[0]], {})
    with pytest.raises(DataError, match="shrank from"):
        ingest(dataclasses.replace(SPARK, days=(str(DAYS[0]),)))
    assert ingest(dataclasses.replace(SPARK, days=(str(DAYS[1]),))).reused


def test_the_latest_day_that_is_over_follows_zone_and_cut_off(at):
    daily = DailyLog(folder="%Y-%m-%d", time_zone="Europe/Berlin", cut_off="04:00")
    at("2026-03-29T01:59:00+00:00")
    assert daily.latest_over() == datetime.date(2026, 3, 27)
    at("2026-03-29T02:01:00+00:00")
    assert daily.latest_over() == datetime.date(2026, 3, 28)


def test_days_in_a_row_without_files_share_a_line():
    days = [datetime.date(2026, 2, 27) + datetime.timedelta(days=n) for n in range(6)]
    left_out = {day: f"no files in dt={day}" for day in days[:4]}
    left_out |= {days[4]: f"no _SUCCESS in dt={days[4]}", days[5]: f"no files in dt={days[5]}"}
    assert days_told(left_out) == [
        "2026-02-27 to 2026-03-02: no files",
        "2026-03-03: no _SUCCESS in dt=2026-03-03",
        "2026-03-04: no files in dt=2026-03-04",
    ]
    assert days_told({}) == []


def test_what_is_not_read_counts_on_the_days_that_are_taken_alone(ingest, write_days, tmp_path):
    write_days(days=DAYS[:2])
    mark(tmp_path, DAYS[0])
    for day in DAYS[:2]:
        (tmp_path / "log" / f"dt={day}" / "part-1.inprogress").write_text("x")
    with pytest.raises(DataError, match=rf"1 file is not read: log/dt={DAYS[0]}/part-1.inprogress \("):
        ingest(SPARK)
    (tmp_path / "log" / f"dt={DAYS[0]}" / "part-1.inprogress").unlink()
    assert ingest(SPARK).left_out == [f"{DAYS[1]}: no _SUCCESS in dt={DAYS[1]}"]
    mark(tmp_path, DAYS[1])
    with pytest.raises(DataError, match=rf"log/dt={DAYS[1]}/part-1.inprogress"):
        ingest(SPARK)
    taken = ingest(SPARK, files=FileFormat(ignore="*.inprogress"))
    assert (taken.manifest.counts["read"], taken.left_out) == (
        6, [f"1 file named by files.ignore: log/dt={DAYS[1]}/part-1.inprogress"]
    )  # fmt: skip
