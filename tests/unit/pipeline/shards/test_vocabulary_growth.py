"""Whether a vocabulary is the beginning of another, from what was noted of it."""

from __future__ import annotations

import json

import polars as pl
import pytest

from pipeline.shards.vocabulary import Vocabulary
from pipeline.shards.vocabulary_growth import beginnings_of, first_difference


def vocabulary(items: list, actions: list[str], genres: list[str], tastes: list[str]) -> Vocabulary:
    """Each kind of entry in the order given."""
    found = Vocabulary.empty("int64" if isinstance(items[0], int) else "string")
    for item in items:
        found = found.grow([item])
    for action in actions:
        found = found.grow([], [action])
    for genre in genres:
        found = found.with_features(pl.DataFrame({"item_id": [items[0]], "genre": [[genre]]}))
    for taste in tastes:
        found = found.with_user_values({"taste": [taste]})
    return found


YESTERDAY = vocabulary([30, 10], ["view"], ["war", "art"], ["old"])


def test_what_only_grew_begins_as_it_was():
    today = vocabulary([30, 10, 20], ["view", "click"], ["war", "art", "zen"], ["old", "new"])
    noted = json.loads(json.dumps(beginnings_of(YESTERDAY)))
    assert first_difference(noted, YESTERDAY) is None
    assert first_difference(noted, today) is None
    # An item's values may change; the rows of values may not.
    changed = today.with_features(pl.DataFrame({"item_id": [10], "genre": [["zen"]]}))
    assert first_difference(noted, changed) is None


@pytest.mark.parametrize(
    ("today", "told"),
    [
        (vocabulary([30], ["view"], ["war", "art"], ["old"]), "there are now 1 items, before there were 2"),
        (vocabulary([10, 30, 20], ["view"], ["war", "art"], ["old"]), "the first 2 items have changed"),
        (vocabulary([30, 10], ["click", "view"], ["war", "art"], ["old"]), "the first 2 actions have changed"),
        (vocabulary([30, 10], ["view"], ["art", "war"], ["old"]), "the first 2 values of genre have changed"),
        (vocabulary([30, 10], ["view"], ["war", "art"], ["new"]), "the first 1 values of taste of users have changed"),
        (vocabulary([30, 10], ["view"], [], ["old"]), "values of genre no longer exist"),
    ],
)
def test_what_did_not_only_grow_is_named(today, told):
    assert first_difference(beginnings_of(YESTERDAY), today) == told


def test_entries_are_told_apart_however_they_are_joined():
    one, other = vocabulary(["a", "b,c"], [], [], []), vocabulary(["a,b", "c"], [], [], [])
    assert first_difference(beginnings_of(one), other) == "the first 2 items have changed"


def test_beginnings_are_right_at_any_length(monkeypatch):
    monkeypatch.setattr("pipeline.shards.vocabulary_growth._ENTRIES_AT_ONCE", 3)
    whole = vocabulary([9, 7, 8, 1, 5, 4, 2], [], [], [])
    for number in range(1, 8):
        assert first_difference(beginnings_of(vocabulary([9, 7, 8, 1, 5, 4, 2][:number], [], [], [])), whole) is None
    assert first_difference(beginnings_of(vocabulary([9, 7, 8, 1, 6], [], [], [])), whole) is not None
