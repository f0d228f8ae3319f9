import datetime
import math

import polars as pl
import pytest

from pipeline.events import DataError, EventColumns, Reason, table_ids, total_order, validate
from pipeline.times import LATEST_TIME

ALL = EventColumns(order="order", action="action", label="label", request_id="request_id", integer_ids=True)
INTEGERS = {"user_id": "int64", "item_id": "int64", "request_id": "int64"}
GOOD = {
    "user_id": "1", "item_id": "2", "timestamp": "3", "order": "4", "action": "click", "label": "1", "request_id": "6",
}  # fmt: skip


def check(rows, *, columns=ALL, id_types=INTEGERS, malformed=()):
    block = pl.DataFrame(rows)
    return validate(block, columns=columns, id_types=id_types, malformed=list(malformed))


def test_a_good_row_becomes_a_typed_event():
    result = check([GOOD])
    assert result.rejected.height == 0
    assert result.events.row(0) == (1, 2, 3000, 4, "click", 1, 6)


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        (Reason.MISSING_USER, {"user_id": ""}),
        (Reason.MISSING_USER, {"user_id": None}),
        (Reason.INVALID_USER, {"user_id": "x"}),
        (Reason.MISSING_ITEM, {"item_id": None}),
        (Reason.INVALID_ITEM, {"item_id": "1.5"}),
        (Reason.MISSING_TIME, {"timestamp": " "}),
        (Reason.INVALID_TIME, {"timestamp": "yesterday"}),
        (Reason.INVALID_TIME, {"timestamp": "-1"}),
        (Reason.INVALID_TIME, {"timestamp": str(LATEST_TIME)}),
        (Reason.INVALID_TIME, {"timestamp": "nan"}),
        (Reason.INVALID_TIME, {"timestamp": "1e300"}),
        (Reason.MISSING_ORDER, {"order": ""}),
        (Reason.INVALID_ORDER, {"order": "first"}),
        (Reason.INVALID_ACTION, {"action": "x" * 129}),
        (Reason.MISSING_LABEL, {"label": None}),
        (Reason.INVALID_LABEL, {"label": "0.5"}),
        (Reason.INVALID_REQUEST, {"request_id": "abc"}),
    ],
)
def test_a_bad_value_is_rejected_for_its_reason(reason, change):
    result = check([GOOD, GOOD | change])
    assert result.events.height == 1
    assert result.rejected["reason"].to_list() == [reason.value]
    assert all(str(value) in result.rejected["record"][0] for value in change.values() if value)


def test_a_malformed_line_is_rejected_as_it_stood():
    result = check([GOOD], malformed=['1,"2'])
    assert result.rejected.rows() == [(Reason.MALFORMED_ROW.value, '1,"2')]


def test_every_reason_has_a_case_above():
    tested = {mark.args[1][n][0] for mark in [test_a_bad_value_is_rejected_for_its_reason.pytestmark[0]]
              for n in range(len(mark.args[1]))}  # fmt: skip
    # Lines that are no row are found before, and who is forgotten stands in no row (test_forgetting.py).
    assert tested | {Reason.MALFORMED_ROW, Reason.FORGOTTEN_USER} == set(Reason)


def test_of_several_reasons_the_first_is_reported():
    assert check([GOOD | {"label": "x", "user_id": ""}]).rejected["reason"].to_list() == [Reason.MISSING_USER.value]


def test_no_action_and_no_request_are_legal():
    event = check([GOOD | {"action": "", "request_id": None}]).events.row(0, named=True)
    assert event["action"] is None
    assert event["request_id"] is None


@pytest.mark.parametrize("text", ["true", "1", "1.0", "True "])
def test_labels_may_be_written_as_truth_values(text):
    assert check([GOOD | {"label": text}]).events["label"].to_list() == [1]


@pytest.mark.parametrize(("unit", "number"), [("s", 1.5), ("ms", 1500), ("us", 1_500_000), ("ns", 1_500_000_000)])
def test_numeric_times_become_milliseconds(unit, number):
    columns = EventColumns(timestamp_unit=unit)
    block = pl.DataFrame({"user_id": [1], "item_id": [1], "timestamp": [number]})
    assert validate(block, columns=columns, id_types=INTEGERS, malformed=[]).events["timestamp"].to_list() == [1500]


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_arrow_timestamps_become_milliseconds_of_utc(unit):
    noon = pl.Series(["2024-01-01 12:00:00.001"]).str.to_datetime(time_unit=unit)
    for times in (noon, noon.dt.replace_time_zone("Asia/Tokyo").dt.convert_time_zone("UTC")):
        block = pl.DataFrame({"user_id": [1], "item_id": [1], "timestamp": times})
        found = validate(block, columns=EventColumns(), id_types=INTEGERS, malformed=[]).events["timestamp"][0]
        assert found == int(times.dt.epoch("ms")[0])


def test_fractions_of_a_second_are_exact():
    times = [f"{1_600_000_000 + n}.{n % 1000:03d}" for n in range(1000)]
    events = check([GOOD | {"timestamp": time} for time in times]).events
    assert events["timestamp"].to_list() == [int(time.replace(".", "")) for time in times]


def test_an_id_too_large_for_int64_is_rejected():
    block = pl.DataFrame({"user_id": pl.Series([2**63], dtype=pl.UInt64), "item_id": [1], "timestamp": [1]})
    result = validate(block, columns=EventColumns(), id_types=INTEGERS, malformed=[])
    assert result.rejected["reason"].to_list() == [Reason.INVALID_USER.value]


@pytest.mark.parametrize(
    ("ids", "integers", "strings"),
    [
        ([7, None], [7, None], ["7", None]),
        (["7", "x", ""], [7, None, None], ["7", "x", ""]),
        (pl.Series(["7", "x"], dtype=pl.Categorical), [7, None], ["7", "x"]),
        (pl.Series([2**63], dtype=pl.UInt64), [None], [str(2**63)]),
        ([7.0, 7.5, None, math.nan, 1e300], [7, None, None, None, None], "is Float64, the log's ids are strings"),
        ([True], "is Boolean, the log's ids are integers: cast it to them", "is Boolean"),
        ([datetime.date(2020, 1, 1)], "is Date", "is Date, the log's ids are strings"),
    ],
)
def test_ids_of_tables_are_those_of_the_log_or_none(ids, integers, strings):
    for id_type, expected in (("int64", integers), ("string", strings)):
        if isinstance(expected, str):
            with pytest.raises(DataError, match=f"users.parquet: column 'u' {expected}"):
                table_ids(pl.Series("u", ids), id_type=id_type, file="users.parquet")
        else:
            assert table_ids(pl.Series("u", ids), id_type=id_type, file="users.parquet").to_list() == expected


def test_integer_ids_keep_their_decimal_form_as_strings():
    block = pl.DataFrame({"user_id": [7], "item_id": ["a"], "timestamp": [1]})
    types = {"user_id": "string", "item_id": "string"}
    assert validate(block, columns=EventColumns(), id_types=types, malformed=[]).events.row(0) == ("7", "a", 1000)


@pytest.mark.parametrize(
    ("column", "values"), [("user_id", [1.5]), ("timestamp", [[1]]), ("order", [1.5]), ("action", [2.5])]
)
def test_a_column_of_the_wrong_type_is_refused_by_name(column, values):
    rows = {name: [1] for name in GOOD} | {column: values}
    with pytest.raises(DataError, match=f"column '{column}'.*map another column"):
        check(rows)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"timestamp": None}, "both absent"),
        ({"timestamp_unit": "h"}, "must be s, ms, us, ns or date"),
        ({"user_id": "x", "item_id": "x"}, "'x' is mapped twice"),
    ],
)
def test_a_wrong_mapping_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        EventColumns(**change)


def test_total_order_names_time_order_item_action_then_the_rest():
    columns = ["request_id", "label", "user_id", "action", "item_id", "order", "timestamp"]
    assert total_order(columns) == ["timestamp", "order", "item_id", "action", "label", "request_id"]


def test_what_times_have_below_a_millisecond_becomes_the_order_where_none_is_mapped():
    times = ["2024-02-29T00:00:00.0015Z", "1709164800.002", "1709164800.000000007", "x"]
    block = pl.DataFrame({"user_id": 1, "item_id": [1, 2, 3, 4], "timestamp": times, "order": 9})
    found = validate(block.drop("order"), columns=EventColumns(), id_types=INTEGERS, malformed=[]).events
    assert found.columns == ["user_id", "item_id", "timestamp", "order"]
    assert found["timestamp"].to_list() == [1_709_164_800_001, 1_709_164_800_002, 1_709_164_800_000]
    assert found["order"].to_list() == [500_000, 0, 7]
    found = validate(block, columns=EventColumns(order="order"), id_types=INTEGERS, malformed=[]).events
    assert found["order"].to_list() == [9, 9, 9]
    whole = block.drop("order").filter(pl.col("item_id") == 2)
    assert "order" not in validate(whole, columns=EventColumns(), id_types=INTEGERS, malformed=[]).events.columns


@pytest.mark.parametrize("column", ["timestamp", "label"])
def test_nan_and_infinity_are_missing_in_a_column_of_floats(column):
    rows = {"user_id": [1] * 4, "item_id": [1] * 4, "timestamp": [1.5] * 4, "label": [1.0] * 4}
    block = pl.DataFrame(rows | {column: [1.0, float("nan"), float("-inf"), None]})
    found = validate(block, columns=EventColumns(label="label"), id_types=INTEGERS, malformed=[])
    reason = Reason.MISSING_TIME if column == "timestamp" else Reason.MISSING_LABEL
    assert found.rejected["reason"].to_list() == [reason.value] * 3


@pytest.mark.parametrize("name", ["user_id", "item_id", "request_id"])
def test_an_id_of_more_than_4096_bytes_is_invalid_and_only_its_beginning_is_kept(name):
    columns = EventColumns(request_id="request_id")
    rows = pl.DataFrame([{"user_id": "u", "item_id": "i", "request_id": "r", "timestamp": 5}] * 3)
    long = rows.with_columns(pl.Series(name, ["x" * 4_096, "é" * 2_049, "y" * 1_000_000]))
    found = validate(long, columns=columns, id_types=dict.fromkeys(INTEGERS, "string"), malformed=[])
    assert found.events[name].to_list() == ["x" * 4_096]
    assert found.rejected["reason"].to_list() == [f"invalid {name.removesuffix('_id')}"] * 2
    assert max(found.rejected["record"].str.len_bytes()) < 600
    assert "(1000000 bytes)" in found.rejected["record"][1]
