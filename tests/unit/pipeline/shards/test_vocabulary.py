import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.events import DataError
from pipeline.shards.vocabulary import Vocabulary, capacity_for

ids = st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 5), max_size=20)


@settings(max_examples=50, deadline=None)
@given(batches=st.lists(ids, max_size=4))
def test_rows_are_dense_and_never_move(batches):
    vocabulary, seen = Vocabulary.empty("int64"), {}
    for batch in batches:
        vocabulary = vocabulary.grow(batch)
        for raw in sorted(set(batch) - set(seen)):
            seen[raw] = len(seen) + 2
        assert vocabulary.size == len(seen) + 2
        assert dict(zip(seen, vocabulary.rows(list(seen)), strict=True)) == seen
        assert vocabulary.raw(np.array(list(seen.values()), np.int64)).to_pylist() == list(seen)


@pytest.mark.parametrize("item_type", ["int64", "string"])
def test_few_ids_are_found_as_many_are(item_type):
    rng = np.random.default_rng(0)
    numbers = [int(n) for n in rng.permutation(5_000) - 2_500]
    named = numbers if item_type == "int64" else [f"item {n}" for n in numbers]
    vocabulary = Vocabulary.empty(item_type).grow(named[:1_000]).grow(named[1_000:4_000])
    row_of = dict(zip(vocabulary.items.to_pylist(), range(2, 4_002), strict=True))
    # Each a call of its own, as when few are asked for, then all at once.
    few = [vocabulary.rows([*named[first : first + 10], None]).tolist() for first in range(0, 5_000, 10)]
    assert few == [[row_of.get(raw, 1) for raw in named[first : first + 10]] + [1] for first in range(0, 5_000, 10)]
    assert vocabulary.rows(named).tolist() == [row_of.get(raw, 1) for raw in named]


def test_items_of_one_key_are_still_told_apart(monkeypatch):
    vocabulary = Vocabulary.empty("string").grow([f"item {n}" for n in range(100)])
    monkeypatch.setattr("pipeline.shards.vocabulary._keys", lambda ids: np.zeros(len(ids), np.uint64))
    rows = vocabulary.rows(["item 7", "item 70", "item 700"])
    assert vocabulary.raw(rows).to_pylist() == ["item 7", "item 70", None]


def test_padding_unknown_and_unused_rows_stand_for_nothing():
    vocabulary = Vocabulary.empty("string").grow(["b", "a"])
    assert vocabulary.rows(["a", "b", "c", None]).tolist() == [2, 3, 1, 1]
    assert vocabulary.raw(np.array([0, 1, 2, 3, 4])).to_pylist() == [None, None, "a", "b", None]


@pytest.mark.parametrize("kind", ["int64", "string"])
def test_an_integer_and_its_decimal_form_are_one_id(kind):
    vocabulary = Vocabulary.empty(kind).grow([7])
    assert vocabulary.rows([7]).tolist() == vocabulary.rows(["7"]).tolist() == [2]
    assert vocabulary.rows(["07"]).tolist() == [1]


def test_capacity_is_the_next_power_of_two_above_five_quarters():
    assert [capacity_for(n) for n in (2, 3, 4, 6, 7, 1684, 3708)] == [4, 4, 8, 8, 16, 4096, 8192]
    assert all(capacity_for(n) > 1.25 * n - 1 and capacity_for(n) > n for n in range(2, 5000))


def test_features_are_lists_of_value_rows_by_item_row():
    vocabulary = Vocabulary.empty("int64").grow([10, 20, 30])
    table = pl.DataFrame(
        {"item_id": [20, 10, 99], "genre": [["war", "art"], ["art"], ["zen"]], "year": ["1999", None, "2000"]}
    )
    features = vocabulary.with_features(table).features
    assert features["genre"].names == ("art", "war")
    assert features["genre"].offsets.tolist() == [0, 0, 0, 1, 3, 3]
    assert features["genre"].values.tolist() == [2, 3, 2]
    assert (features["year"].names, features["year"].offsets.tolist()) == (("1999",), [0, 0, 0, 0, 1, 1])


def test_values_never_move_and_a_newer_table_replaces_an_items_values():
    first = Vocabulary.empty("int64").grow([10, 20]).with_features(
        pl.DataFrame({"item_id": [10, 20], "g": [["m"], ["z"]]})
    )  # fmt: skip
    second = first.grow([5]).with_features(pl.DataFrame({"item_id": [20, 5], "g": [["a"], ["m", "a"]]}))
    assert second.features["g"].names == ("m", "z", "a")
    assert second.features["g"].offsets.tolist() == [0, 0, 0, 1, 2, 4]
    assert second.features["g"].values.tolist() == [2, 4, 2, 4]


def test_a_file_gives_the_same_vocabulary_back(tmp_path):
    vocabulary = Vocabulary.empty("string").grow(["b", "a"], ["view", "click"]).with_features(
        pl.DataFrame({"item_id": ["a"], "g": [["x", "y"]]})
    )  # fmt: skip
    vocabulary.save(str(tmp_path / "v.parquet"))
    loaded = Vocabulary.load(str(tmp_path / "v.parquet"))
    assert loaded.fingerprint == vocabulary.fingerprint
    assert loaded.actions == ("", "click", "view")
    assert loaded.items.to_pylist() == ["a", "b"]
    assert loaded.features["g"].values.tolist() == [2, 3]
    assert loaded.to_bytes() == vocabulary.to_bytes()


def test_values_of_user_features_never_move_and_come_back_from_a_file(tmp_path):
    first = Vocabulary.empty("int64").grow([1]).with_user_values({"sex": ["m", "f"], "age": []})
    second = first.grow([2]).with_user_values({"sex": ["d", "m"]})
    assert list(second.user_features) == ["age", "sex"]
    assert second.user_features == {"age": (), "sex": ("f", "m", "d")}
    second.save(str(tmp_path / "v.parquet"))
    loaded = Vocabulary.load(str(tmp_path / "v.parquet"))
    assert loaded.user_features == second.user_features
    assert loaded.fingerprint == second.fingerprint != first.grow([2]).fingerprint
    assert loaded.items.to_pylist() == [1, 2]


def test_the_fingerprint_follows_the_content():
    base = Vocabulary.empty("int64").grow([1, 2])
    others = [
        base.grow([3]), base.grow([], ["view"]), Vocabulary.empty("string").grow(["1", "2"]),
        base.with_features(pl.DataFrame({"item_id": [1], "g": ["x"]})),
        base.with_features(pl.DataFrame({"item_id": [2], "g": ["x"]})),
    ]  # fmt: skip
    assert len({v.fingerprint for v in [base, *others]}) == 6
    assert Vocabulary.empty("int64").grow([2, 1, 1]).fingerprint == base.fingerprint


def test_another_file_is_refused_by_name(tmp_path):
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"other.parquet: not a vocabulary"):
        Vocabulary.load(str(tmp_path / "other.parquet"))
