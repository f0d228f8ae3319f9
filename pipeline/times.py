"""Times in any form -> nanoseconds since 1970 UTC: numbers of a unit, Arrow timestamps and dates, ISO 8601 texts.

    1709164800, 1709164800.25, "1.7091648e9"             a number, also as text: of the unit
    20240229, 2024022901, 202402290130, 20240229013000   in the unit "date": the digits of a date, UTC
    2024-02-29, 2024-02-29 01:30, 2024-02-29T01:30:00.5Z,
    2024-02-29T01:30:00,123456789+02:00, 20240229T013000+02    ISO 8601; UTC unless it has a zone

Each value is read by itself, so forms may be mixed within a column.
"""

from __future__ import annotations

import time
from collections import Counter

import polars as pl

LATEST_TIME = 4_102_444_800_000
"""2100-01-01 in milliseconds: a later time is invalid."""
NANOSECONDS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
"""{unit: nanoseconds}."""
DATE = "date"
UNITS = (*NANOSECONDS, DATE)
"""What a number can be: a count of units since 1970, or the digits of a date, perhaps with hour, minute and second."""

_LATEST = LATEST_TIME * NANOSECONDS["ms"]
_DAY = 86_400 * NANOSECONDS["s"]
_LAST_DAY = LATEST_TIME // 86_400_000
_FRACTION_DIGITS = {"s": 9, "ms": 6, "us": 3, "ns": 0}
_1990 = 631_152_000
_DECIMAL = r"^\+?([0-9]+)(?:\.([0-9]*))?$"
_EXPONENT = r"^[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][+-]?[0-9]+$"
_ZONE = r"Z|z|UTC|GMT|[+-][0-9]{2}(?::?[0-9]{2})?"
_ISO = (
    r"^([0-9]{4}-[0-9]{2}-[0-9]{2})"
    rf"(?:[Tt ]([0-9]{{2}}):([0-9]{{2}})(?::([0-9]{{2}})(?:[.,]([0-9]{{1,9}}))?)? ?({_ZONE})?)?$"
)
_BASIC = (
    rf"^([0-9]{{4}})([0-9]{{2}})([0-9]{{2}})T([0-9]{{2}})([0-9]{{2}})([0-9]{{2}})((?:[.,][0-9]{{1,9}})?(?:{_ZONE})?)$"
)
_EXTENDED = "${1}-${2}-${3}T${4}:${5}:${6}${7}"
_CALENDAR = r"^([0-9]{8}(?:[0-9]{2}){0,3})(?:\.([0-9]*))?$"
_DIGITS = r"^([0-9]{4})([0-9]{2})([0-9]{2})([0-9]{2})([0-9]{2})([0-9]{2})()$"


def can_be_times(dtype: pl.DataType) -> bool:
    """Whether a column of this type can be read as times."""
    is_text = isinstance(dtype, (pl.String, pl.Categorical, pl.Enum, pl.Null))
    return is_text or dtype.is_numeric() or isinstance(dtype, (pl.Datetime, pl.Date))


def nanoseconds(values: pl.Series, *, unit: str) -> pl.Series:
    """[n] int64 nanoseconds since 1970 UTC; null where there is no time from 1970 until 2099. `unit`: of numbers.

    Integers and decimal texts are exact (what is below a nanosecond is left out); floats and texts with an exponent are
    rounded to microseconds, because a float64 of seconds is no more precise.
    """
    dtype = values.dtype
    if isinstance(dtype, pl.Datetime):
        return _of_integers(values.to_physical(), NANOSECONDS[dtype.time_unit])
    if isinstance(dtype, pl.Date):
        return _of_integers(values.to_physical(), _DAY)
    if unit == DATE and dtype.is_numeric():
        return _of_calendar_numbers(values)
    if dtype.is_integer():
        return _of_integers(values, NANOSECONDS[unit])
    if dtype.is_float():
        return _of_floats(values, unit)
    return _of_texts(values.cast(pl.String).str.strip_chars(), unit)


def units_that_fit(values: pl.Series, *, unit: str) -> Counter[str]:
    """{unit: how many of the numbers lie between 1990 and tomorrow if they are of that unit}; "" counts those that lie
    there in no unit. Values that are no numbers do not count. No number fits two units, because 2^63 is too small, and
    the digits of no date from 1990 on are a count since 1970 of a time before 2033."""
    if not (values.dtype.is_numeric() or isinstance(values.dtype, (pl.String, pl.Categorical, pl.Enum))):
        return Counter()
    numbers = _numbers(values).drop_nulls()
    counts, left = Counter[str](), len(numbers)
    for each in (unit, *(other for other in UNITS if other != unit)):
        if left:
            counts[each] = int(_fits(numbers, each).sum())
            left -= counts[each]
    counts[""] = left
    return counts


def first_that_fits(values: pl.Series, *, unit: str) -> str:
    """The first of the numbers that `units_that_fit` counts for this unit, of which there is one, as text."""
    place = _fits(_numbers(values), unit).index_of(True)
    assert place is not None
    return str(values[place]).strip()


def _numbers(values: pl.Series) -> pl.Series:
    """[n] float64: the numbers, also those that are texts; null for everything else."""
    texts = values.cast(pl.String) if isinstance(values.dtype, (pl.Categorical, pl.Enum)) else values
    if isinstance(texts.dtype, pl.String):
        texts = texts.str.strip_chars()
    numbers = texts.cast(pl.Float64, strict=False)
    return pl.select(pl.when(numbers.is_finite()).then(numbers)).to_series()


def _fits(numbers: pl.Series, unit: str) -> pl.Series:
    """[n] bool: whether the number is a time between 1990 and tomorrow in this unit."""
    tomorrow = time.time() + 86_400
    if unit == DATE:
        times = _of_calendar_numbers(numbers.floor())
        return times.is_between(_1990 * NANOSECONDS["s"], int(tomorrow) * NANOSECONDS["s"]).fill_null(False)
    per_second = NANOSECONDS["s"] // NANOSECONDS[unit]
    return numbers.is_between(_1990 * per_second, tomorrow * per_second).fill_null(False)


def is_usual(milliseconds: int) -> bool:
    """Whether the time lies between 1990 and tomorrow."""
    return _1990 * 1_000 <= milliseconds <= (time.time() + 86_400) * 1_000


def _of_integers(values: pl.Series, factor: int) -> pl.Series:
    numbers = values.cast(pl.Int64, strict=False)
    is_possible = numbers.is_between(0, _LATEST // factor, closed="left")
    return pl.select(pl.when(is_possible).then(numbers * factor)).to_series()


def _of_floats(values: pl.Series, unit: str) -> pl.Series:
    microseconds = values.cast(pl.Float64) * (NANOSECONDS[unit] / NANOSECONDS["us"])
    is_possible = microseconds.is_finite() & microseconds.is_between(-1, _LATEST // NANOSECONDS["us"])
    rounded = pl.select(pl.when(is_possible).then(microseconds)).to_series().round(0).cast(pl.Int64)
    return _of_integers(rounded, NANOSECONDS["us"])


def _of_calendar_numbers(values: pl.Series) -> pl.Series:
    """Times of numbers such as 20240229; a float with a fraction is none."""
    if values.dtype.is_decimal():
        return _of_calendar(values.cast(pl.String))
    whole = values.cast(pl.Int64, strict=False)
    if values.dtype.is_float():
        whole = pl.select(pl.when(whole.cast(pl.Float64) == values).then(whole)).to_series()
    return _of_calendar(whole.cast(pl.String))


def _of_calendar(texts: pl.Series) -> pl.Series:
    whole, fraction = (texts.str.extract(_CALENDAR, group) for group in (1, 2))
    times = _of_iso(whole.str.pad_end(14, "0").str.replace(_DIGITS, _EXTENDED))
    below = (fraction.fill_null("") + "0" * 9).str.slice(0, 9).cast(pl.Int64)
    # Only a second has a fraction.
    is_possible = (whole.str.len_chars() == 14) | (below == 0)
    return _of_integers(pl.select(pl.when(is_possible).then(times + below)).to_series(), 1)


def _of_texts(texts: pl.Series, unit: str) -> pl.Series:
    if unit == DATE:
        read = pl.DataFrame({"digits": _of_calendar(texts), "iso": _of_iso(texts)})
        return read.select(pl.coalesce(pl.all())).to_series()
    # Nearly all logs have integers, for which the quick conversion suffices.
    integers = texts.cast(pl.Int64, strict=False)
    found = _of_integers(integers, NANOSECONDS[unit])
    others = (integers.is_null() & texts.is_not_null()).arg_true()
    if not len(others):
        return found
    rest = texts.gather(others)
    read = pl.DataFrame(
        {"decimal": _of_decimals(rest, unit), "exponent": _of_exponents(rest, unit), "iso": _of_iso(rest)}
    )
    return found.scatter(others, read.select(pl.coalesce(pl.all())).to_series())


def _of_decimals(texts: pl.Series, unit: str) -> pl.Series:
    whole, fraction = (texts.str.extract(_DECIMAL, group) for group in (1, 2))
    digits = _FRACTION_DIGITS[unit]
    below = (fraction.fill_null("") + "0" * 9).str.slice(0, digits).cast(pl.Int64, strict=False).fill_null(0)
    return _of_integers(whole.cast(pl.Int64, strict=False), NANOSECONDS[unit]) + below


def _of_exponents(texts: pl.Series, unit: str) -> pl.Series:
    numbers = pl.select(pl.when(texts.str.contains(_EXPONENT)).then(texts)).to_series().cast(pl.Float64, strict=False)
    return _of_floats(numbers, unit)


def _of_iso(texts: pl.Series) -> pl.Series:
    texts = texts.str.replace(_BASIC, _EXTENDED)
    date, hour, minute, second, fraction, zone = (texts.str.extract(_ISO, group) for group in range(1, 7))
    days = date.str.to_date("%Y-%m-%d", strict=False).to_physical().cast(pl.Int64)
    hours, minutes, seconds = (part.cast(pl.Int64).fill_null(0) for part in (hour, minute, second))
    below = (fraction.fill_null("") + "0" * 9).str.slice(0, 9).cast(pl.Int64)
    # The offset of a zone; Z and UTC have none.
    offset = zone.str.replace(":", "", literal=True)
    offset_hours = offset.str.slice(1, 2).cast(pl.Int64, strict=False).fill_null(0)
    offset_minutes = offset.str.slice(3, 2).cast(pl.Int64, strict=False).fill_null(0)
    shift = offset_hours * 60 + offset_minutes
    shift = shift * (1 - 2 * offset.str.starts_with("-").fill_null(False).cast(pl.Int64))
    is_possible = (
        days.is_between(-1, _LAST_DAY + 1) & (hours < 24) & (minutes < 60) & (seconds < 60)
        & (offset_hours < 24) & (offset_minutes < 60)
    )  # fmt: skip
    total = (((days * 24 + hours) * 60 + minutes - shift) * 60 + seconds) * NANOSECONDS["s"] + below
    return _of_integers(pl.select(pl.when(is_possible).then(total)).to_series(), 1)
