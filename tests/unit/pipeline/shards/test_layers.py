"""Later files laid over earlier ones give what one file of all events would hold."""

import dataclasses

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.shards.layers import lay_over, with_columns
from pipeline.shards.rows import ROW, UserRows, event_lengths
from pipeline.shards.sequences import build_sequences
from pipeline.shards.vocabulary import Vocabulary

USERS = ("a", "b", "c")
# Not in order of the raw ids: rows of the table and raw order disagree.
VOCABULARY = Vocabulary.empty("string").grow(["x"], ["view"]).grow(["w", "y"], ["click"])
SCHEMA = {"columns": ["user_id", "item_id", "timestamp", "action", "label", "request_id"],
          "id_types": {"user_id": "string", "item_id": "string", "request_id": "int64"}}  # fmt: skip

events = st.lists(
    st.tuples(
        st.sampled_from(USERS), st.sampled_from(["w", "x", "y"]), st.integers(0, 2),
        st.sampled_from(["click", "view", None]), st.integers(0, 1), st.sampled_from([1, 2, None]),
    ),
    max_size=12,
)  # fmt: skip


def frame(rows):
    types = [pl.String, pl.String, pl.Int64, pl.String, pl.Int8, pl.Int64]
    return pl.DataFrame(rows, schema=dict(zip(SCHEMA["columns"], types, strict=True)), orient="row")


def first_table(table):
    return UserRows.encode(build_sequences(table), VOCABULARY).with_users(pl.Series("user_id", USERS)).to_table()


def later_table(table):
    rows = UserRows.encode(build_sequences(table), VOCABULARY)
    places = [USERS.index(user) for user in rows.user_id.to_list()]
    return rows.to_table().append_column(ROW, pa.array(places, pa.int64()))


@settings(max_examples=200, deadline=None)
@given(first=events, later=st.lists(events, min_size=1, max_size=3))
def test_the_result_is_that_of_one_log(first, later):
    found = lay_over(first_table(frame(first)), [later_table(frame(rows)) for rows in later], vocabulary=VOCABULARY,
                     distinct=True)  # fmt: skip
    assert found.equals(first_table(frame([*first, *(row for rows in later for row in rows)])))


def test_without_repeats_nothing_is_compared_and_nothing_lost():
    first, later = (
        frame([("a", "x", 1, None, 1, None)]),
        frame([("c", "w", 0, "view", 0, 2), ("a", "x", 0, None, 1, 7)]),
    )
    found = lay_over(first_table(first), [later_table(later)], vocabulary=VOCABULARY, distinct=False)
    assert event_lengths(found).tolist() == [2, 0, 1]
    assert found["timestamp"].to_pylist() == [[0, 1], [], [0]]


@pytest.mark.parametrize("labels", [(0, 1), (1, 0)])
def test_of_an_impression_and_a_click_in_two_files_the_click_stays(labels):
    first, later = (frame([("a", "x", 1, None, label, request)]) for label, request in zip(labels, (2, 1), strict=True))
    found = lay_over(first_table(first), [later_table(later)], vocabulary=VOCABULARY, distinct=True)
    assert (found["label"].to_pylist()[0], found["request_id"].to_pylist()[0]) == ([1], [2 - labels.index(1)])


def test_the_latest_values_of_a_user_feature_stand():
    def lists(*values):
        return pa.array(values, pa.large_list(pa.int64()))

    first, later = frame([(user, "x", 1, None, 1, None) for user in USERS]), frame([("b", "x", 2, None, 1, None)])
    rows = dataclasses.replace(UserRows.from_table(first_table(first)), values={"user:sex": lists([2], [3], [])})
    newer = UserRows.from_table(later_table(later))
    first_change = dataclasses.replace(newer, values={"user:sex": lists([4, 5]), "user:age": lists([9])})
    second_change = dataclasses.replace(newer, values={"user:sex": lists(None)})
    tables = [rows.to_table().append_column(ROW, pa.array([1])) for rows in (first_change, second_change)]
    found = lay_over(rows.to_table(), tables, vocabulary=VOCABULARY, distinct=True)
    assert found["user:sex"].to_pylist() == [[2], [4, 5], []]
    assert found["user:age"].to_pylist() == [[], [9], []]


@pytest.mark.parametrize("kind", ["int64", "string"])
def test_events_from_before_a_column_have_none_of_it(kind):
    schema = SCHEMA | {"id_types": {"request_id": kind}}
    old = first_table(frame([("a", "x", 1, None, 1, None)]).drop("action", "request_id"))
    found = UserRows.from_table(with_columns(old.append_column(ROW, pa.array(np.arange(3))), schema))
    assert found.columns["action"].to_pylist() == [0]
    assert found.columns["request_id"].to_pylist() == [None]
    assert found.columns["request_id"].type == (pa.int64() if kind == "int64" else pa.large_string())
