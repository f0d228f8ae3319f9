import numpy as np
import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.shards.sequences import (
    LABELS,
    UserEvents,
    build_sequences,
    offsets_of,
    ranges,
    sequences_with_labels,
)

SCHEMA = {
    "user_id": pl.Int64, "item_id": pl.String, "timestamp": pl.Int64, "action": pl.String, "label": pl.Int8
}  # fmt: skip
rows = st.tuples(
    st.integers(0, 2), st.sampled_from("ab"), st.integers(0, 2), st.sampled_from([None, "x", "y"]), st.integers(0, 1)
)
tables = st.lists(rows, max_size=25)


def frame(found):
    return pl.DataFrame(found, schema=SCHEMA, orient="row")


def naive(found):
    """Sort by user, time, item, action (none first), larger label first; keep the first of equal events."""
    key = lambda r: (r[0], r[2], r[1], r[3] is not None, r[3] or "", -r[4])  # noqa: E731
    kept = {}
    for row in sorted(found, key=key):
        kept.setdefault(row[:4], row)
    return sorted(kept.values(), key=key)


FAR = 2**62
"""From one such id or time to another, no 64-bit number tells users and times apart."""


@settings(max_examples=200, deadline=None)
@given(found=tables, user_type=st.sampled_from(["small", "far", "text"]), far_times=st.booleans())
def test_sequences_are_sorted_and_distinct(found, user_type, far_times):
    user_of = {"small": lambda n: n, "far": lambda n: (n - 1) * FAR, "text": lambda n: f"user {n}"}[user_type]
    found = [(user_of(user), item, FAR * time // 2 if far_times else time, *rest) for user, item, time, *rest in found]
    events = frame(found) if user_type != "text" else pl.DataFrame(found, SCHEMA | {"user_id": pl.String}, orient="row")
    assert build_sequences(events).rows() == naive(found)
    labels_of = {}
    for *event, label in found:
        labels_of[tuple(event)] = labels_of.get(tuple(event), 0) | 1 << label
    expected = [labels_of[row[:4]] for row in naive(found)]
    assert sequences_with_labels(events)[LABELS].to_list() == expected


def test_of_equal_labels_the_smallest_request_stays():
    rows = [("a", 1, 0, None), ("a", 1, 1, 9), ("a", 1, 1, 4), ("b", 1, 0, 3), ("b", 1, 0, None)]
    table = pl.DataFrame(rows, ["item_id", "timestamp", "label", "request_id"], orient="row")
    kept = build_sequences(table.with_columns(user_id=pl.lit(7)))
    assert kept.select("item_id", "label", "request_id").rows() == [("a", 1, 4), ("b", 0, None)]


def test_ranges_and_offsets():
    assert offsets_of(np.array([2, 0, 1])).tolist() == [0, 2, 2, 3]
    assert ranges(np.array([5, 9, 0]), np.array([2, 0, 3])).tolist() == [5, 6, 0, 1, 2]


def test_taking_users_keeps_their_events_in_the_order_asked_for():
    events = UserEvents(
        offsets=np.array([0, 2, 2, 3]), item=np.array([7, 8, 9]), time=np.arange(3), before=np.arange(3),
        action=np.zeros(3, np.int64), label=None, request=None,
    )  # fmt: skip
    taken = events.take(np.array([2, 1, 0]))
    assert taken.offsets.tolist() == [0, 1, 1, 3]
    assert taken.item.tolist() == [9, 7, 8]
