import datetime
import decimal

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.times import (
    DATE,
    LATEST_TIME,
    NANOSECONDS,
    UNITS,
    can_be_times,
    first_that_fits,
    nanoseconds,
    units_that_fit,
)

SECOND = NANOSECONDS["s"]


def read(values, *, unit="s", **named):
    return nanoseconds(pl.Series(values, **named), unit=unit).to_list()


@settings(max_examples=100, deadline=None)
@given(
    moments=st.lists(
        st.tuples(
            st.datetimes(datetime.datetime(1970, 1, 3), datetime.datetime(2099, 12, 29)),
            st.one_of(st.none(), st.integers(-23 * 60, 23 * 60)),
            st.sampled_from(["T", " "]), st.sampled_from(["auto", "seconds", "minutes", "milliseconds"]),
        ),
        max_size=8,
    )
)  # fmt: skip
def test_mixed_iso_texts_are_what_python_reads(moments):
    texts, wanted = [], []
    for moment, zone, mark, precision in moments:
        zoned = moment if zone is None else moment.replace(tzinfo=datetime.timezone(datetime.timedelta(minutes=zone)))
        texts.append(zoned.isoformat(mark, precision))
        again = datetime.datetime.fromisoformat(texts[-1])
        again = again if again.tzinfo else again.replace(tzinfo=datetime.UTC)
        wanted.append(
            (again - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) // datetime.timedelta(microseconds=1)
        )
    assert read(texts, dtype=pl.String) == [1_000 * microseconds for microseconds in wanted]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-02", "86400"), ("2024-02-29", "1709164800"), ("2024-02-29 00:00", "1709164800"),
        ("2024-02-29T00:00:00Z", "1709164800"), ("2024-02-29t00:00:00z", "1709164800"),
        ("2024-02-29 00:00:00 UTC", "1709164800"), ("2024-02-29 02:00:00+02", "1709164800"),
        ("2024-02-29T02:30:00+0230", "1709164800"), ("2024-02-28T22:00:00-02:00", "1709164800"),
        ("2024-02-29T00:00:00.5", "1709164800.5"), ("2024-02-29T00:00:00,123456789Z", "1709164800.123456789"),
        ("20240229T000000", "1709164800"), ("20240229T020000.25+02", "1709164800.25"), (" 2024-02-29 ", "1709164800"),
        ("1969-12-31T23:00:00-02:00", "3600"), ("1709164800", "1709164800"), ("20240229", "20240229"),
        ("1709164800.5", "1709164800.5"), ("1709164800.1234567894", "1709164800.123456789"), ("5.", "5"),
        ("1.5e9", "1500000000"), ("17091648E2", "1709164800"), ("+7", "7"), ("007", "7"), (" 7 ", "7"),
    ],
)  # fmt: skip
def test_each_text_is_read_by_itself(text, seconds):
    found = read(["2024-01-01", text, "12", "x"])
    assert found[1] == int(decimal.Decimal(seconds) * SECOND)
    assert (found[0], found[2:]) == (1_704_067_200 * SECOND, [12 * SECOND, None])


@pytest.mark.parametrize(
    "text",
    [
        "2024-02-30", "2023-02-29", "2024-13-01", "2024-00-01", "0000-01-01", "2024-1-1", "2024-02-29T25:00:00",
        "2024-02-29T24:00:00", "2024-02-29T23:60:00", "2024-06-30T23:59:60", "2024-02-29T", "2024-02-29Z",
        "2024-02-29T01:00:00+24:00", "2024-02-29T01:00:00+01:60", "2024-02-29T01:00:00.1234567890", "29.02.2024",
        "02/29/2024", "2024-02-29T01:00:00 Europe/Rome", "20240230T000000", "9999-12-31", "2100-01-01", "1969-12-31",
        "1970-01-01T00:00:00+01:00", "-1", "-0.5", "1e400", "1e300", "nan", "inf", "", ".", "0x10", "1_000", "٣",
        "9223372036854775808", "99999999999999999999.5", "1.5.5", "yesterday",
    ],
)  # fmt: skip
def test_what_is_no_time_is_null(text):
    assert read([text, "2024-02-29", "5"]) == [None, 1_709_164_800 * SECOND, 5 * SECOND]


@pytest.mark.parametrize("unit", NANOSECONDS)
def test_numbers_of_every_unit_may_have_a_fraction(unit):
    factor = NANOSECONDS[unit]
    number = 1_709_164_800 * SECOND // factor
    whole = number * factor
    assert read([number, 0, -1, None], unit=unit) == [whole, 0, None, None]
    assert read([str(number), f"{number}.0"], unit=unit) == [whole, whole]
    assert read([decimal.Decimal(number), None], unit=unit) == [whole, None]
    microseconds = read([number + 0.5, float("nan"), float("inf"), 1e300, -1e300], unit=unit)
    assert microseconds[1:] == [None] * 4
    assert abs(microseconds[0] - whole - factor / 2) <= 500 + 128
    assert read([f"{number}.5"], unit=unit) == [whole + factor // 2]
    limit = LATEST_TIME * 10**6 // factor
    assert read([limit - 1, limit], unit=unit) == [(limit - 1) * factor, None]


def test_integers_beyond_float_precision_are_exact():
    assert read([1_709_164_800_123_456_789], unit="ns") == [1_709_164_800_123_456_789]
    assert read(["1709164800123456789"], unit="ns") == [1_709_164_800_123_456_789]
    assert read([2**63], dtype=pl.UInt64, unit="ns") == [None]


def test_arrow_timestamps_dates_and_categories():
    moment = datetime.datetime(2024, 2, 29, 1, 30, 0, 123456)
    wanted = 1_709_170_200_123_456_000
    assert read([moment, None], dtype=pl.Datetime("us"), unit="ms") == [wanted, None]
    tokyo = pl.Series([moment]).dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Tokyo")
    assert nanoseconds(tokyo, unit="s").to_list() == [wanted]
    # Nanoseconds of this year do not fit into 64 bits.
    assert read([datetime.datetime(9999, 12, 31)], dtype=pl.Datetime("us")) == [None]
    assert read([moment.date()]) == [1_709_164_800 * SECOND]
    assert read(["2024-02-29", "5"], dtype=pl.Categorical) == [1_709_164_800 * SECOND, 5 * SECOND]
    assert not can_be_times(pl.List(pl.Int64()))
    assert not can_be_times(pl.Boolean())


def test_every_number_fits_the_unit_in_which_it_is_a_time_of_today():
    now = 1_709_164_800
    numbers = [now, now * 1_000, now * 10**6, now * 10**9, 20240229, 5, -now]
    for unit in UNITS:
        wanted = dict.fromkeys(UNITS, 1) | {"": 2}
        assert units_that_fit(pl.Series(numbers), unit=unit) == wanted
        assert units_that_fit(pl.Series([*map(str, numbers), "2024-01-01", None, "nan"]), unit=unit) == wanted
    assert not units_that_fit(pl.Series([datetime.date(2024, 1, 1)]), unit="s")


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (20240229, "2024-02-29"), (20240229.0, "2024-02-29"), ("20240229", "2024-02-29"), (" 20240229 ", "2024-02-29"),
        ("20240229.0", "2024-02-29"), (2024022913, "2024-02-29T13:00"), (202402291305, "2024-02-29T13:05"),
        (20240229130507, "2024-02-29T13:05:07"), (20240229130507.0, "2024-02-29T13:05:07"),
        ("20240229130507.25", "2024-02-29T13:05:07.25"), ("20240229130507.000", "2024-02-29T13:05:07"),
        (decimal.Decimal("20240229130507.250"), "2024-02-29T13:05:07.25"), ("2024-02-29", "2024-02-29"),
        ("20240229T020000+02", "2024-02-29"), (19700102, "1970-01-02"),
    ],
)  # fmt: skip
def test_digits_of_a_date_are_read_in_the_unit_of_dates(value, wanted):
    assert read([value], unit=DATE) == read([wanted]) != [None]


@pytest.mark.parametrize(
    "value",
    [
        20240230, 20241301, 20240001, 2024022924, 202402291360, 20240229235960, 2024, 202402, 202402291, 2024022913050,
        202402291305071, 19691231, 21000101, -20240229, 0, 20240229.5, "20240229.5", "+20240229", "2.0240229e7", "x",
        1709164800, 1709164800000, 1e300, float("inf"), float("nan"), 2**63 - 1,
    ],
)  # fmt: skip
def test_numbers_that_are_no_dates_are_null_in_the_unit_of_dates(value):
    assert read([value], unit=DATE) == [None]


def test_the_first_number_of_a_unit_is_shown_as_it_stands_in_the_file():
    assert first_that_fits(pl.Series(["x", "5", " 20240229 ", "20240301"]), unit=DATE) == "20240229"
    assert first_that_fits(pl.Series([None, 20240230.0, 20240229.0]), unit=DATE) == "20240229.0"
    assert first_that_fits(pl.Series([5, 1_709_164_800_123]), unit="ms") == "1709164800123"


def test_numbers_that_only_look_like_dates_by_chance_are_few():
    # Times that are counted from the start of a log: one in 27 of such numbers is a date.
    counted = pl.Series(range(20_000_000, 20_270_000))
    assert units_that_fit(counted, unit="s")[DATE] < len(counted) / 20
