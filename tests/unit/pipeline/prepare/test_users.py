"""The users table: what becomes of it in the shards, over several ingests, and what is refused."""

import polars as pl
import pytest

from pipeline.batches.loader import EvaluationLoader, TrainLoader
from pipeline.batches.loader_config import LoaderConfig
from pipeline.batches.requests import RequestConfig
from pipeline.events import DataError
from pipeline.prepare import ingest
from pipeline.shards.dataset import Shards
from pipeline.shards.inspection import digest, verify


@pytest.fixture
def log(write_log, tmp_path):
    """Users 1, 2 and 3 with two events each."""
    write_log({"user_id": [1, 1, 2, 2, 3, 3], "item_id": [5, 6, 5, 7, 6, 7], "timestamp": range(6)}, "log/a.parquet")
    return tmp_path / "log"


@pytest.fixture
def known(prepare, tmp_path):
    """Prepare `tmp_path/log`, with another users table where one is named: {user: values of each feature}."""

    def run(log, users=None):
        prepare(log, tmp_path / "out", buckets=3, users=users)
        assert verify(str(tmp_path / "out")) == []
        data = Shards.open(str(tmp_path / "out"))
        rows = data.raw_user_values(range(data.num_groups)).sort("user_id").rows()
        return data.user_features, {user: values for user, *values in rows}

    return run


def test_every_user_has_the_values_of_its_row_or_none(log, write_log, known):
    table = {
        "user_id": [3, 1, 99],
        "sex": ["f", None, "m"],
        "likes": [["b", "a"], [None, "", "c"], []],
        "age": [7, 8, 9],
    }
    write_log(table, "log/users.parquet")
    names, values = known(log)
    assert names == ["age", "likes", "sex"]
    assert values == {1: [["8"], ["c"], []], 2: [[], [], []], 3: [["7"], ["b", "a"], ["f"]]}


def test_what_has_no_row_in_the_tables_is_counted(log, write_log, prepare, tmp_path):
    def notes(**tables):
        return [note for note in prepare(log, tmp_path / "out", **tables).notes if "times lie" not in note]

    write_log({"user_id": [3, 1, 99], "sex": ["f", None, "m"]}, "log/users.parquet")
    write_log({"item_id": [5, 6, 98], "tag": ["x", None, "y"]}, "log/items.parquet")
    items = "2 of 3 items have no features: the items table has no value for them"
    assert notes() == [items, "1 of 3 users have no features: the users table has no row for them"]
    write_log({"user_id": [1, 7, 8, 99], "item_id": [5] * 4, "timestamp": [60] * 4}, "log/b.parquet")
    assert notes() == [items, "2 of 3 new users have no features: the users table has no row for them"]
    # A newer table of few users says nothing of those who have their features already.
    users = str(write_log({"user_id": [7], "sex": ["m"]}, "more.parquet"))
    every = str(write_log({"item_id": [5, 6, 7], "tag": ["x"] * 3}, "every.parquet"))
    assert notes(items=every, users=users) == []
    (tmp_path / "log/items.parquet").unlink()
    (tmp_path / "log/users.parquet").unlink()
    write_log({"user_id": [9], "item_id": [9], "timestamp": [70]}, "log/c.parquet")
    assert notes() == [
        "1 of 4 items have no features: no items table was given",
        "1 of 1 new users have no features: no users table was given",
    ]


def test_a_table_of_users_that_was_first_given_later_leaves_all_others_without_features(
    log, write_log, prepare, tmp_path
):
    prepare(log, tmp_path / "out")
    users = write_log({"user_id": [2, 99], "sex": ["m", "f"]}, "late.parquet")
    told = prepare(log, tmp_path / "out", users=str(users)).notes
    assert told == ["2 of 3 users have no features: the users table has no row for them"]


def test_a_table_that_is_given_again_after_another_one_counts_again(log, write_log, known, prepare, tmp_path):
    first = str(write_log({"user_id": [1, 2], "sex": ["m", "f"]}, "first.parquet"))
    second = str(write_log({"user_id": [1], "sex": ["x"]}, "second.parquet"))
    for users, sex in ((first, "m"), (second, "x"), (first, "m"), (first, "m")):
        assert known(log, users=users)[1][1] == [[sex]]
    items = [str(write_log({"item_id": [5], "tag": [tag]}, f"{tag}.parquet")) for tag in ("a", "b")]
    for number in (0, 1, 0):
        prepare(log, tmp_path / "out", buckets=3, items=items[number])
        feature = Shards.open(str(tmp_path / "out")).vocabulary.features["tag"]
        assert [feature.names[code - 2] for code in feature.values] == ["ab"[number]]
    assert prepare(log, tmp_path / "out", buckets=3, items=items[0]).reused


def test_a_table_of_the_log_that_is_changed_and_changed_back_counts_each_time(log, write_log, known, prepare, tmp_path):
    for sex in ("m", "x", "m"):
        write_log({"user_id": [1, 2], "sex": [sex, "f"]}, "log/users.parquet")
        assert known(log)[1][1] == [[sex]]
    assert prepare(log, tmp_path / "out", buckets=3).reused


def test_items_of_later_ingests_have_their_features_from_the_table_that_is_there(log, write_log, prepare, tmp_path):
    """Item 9 occurs only in the second ingest; the table is unchanged, and items that have features keep them."""
    table = str(write_log({"item_id": [5, 9], "tag": ["a", "i"]}, "log/items.parquet"))
    prepare(log, tmp_path / "out")
    newer = str(write_log({"item_id": [5, 6], "tag": ["b", "c"]}, "newer.parquet"))
    prepare(log, tmp_path / "out", items=newer)
    prepare(log, tmp_path / "out", items=table)
    write_log({"user_id": [1], "item_id": [9], "timestamp": [70]}, "log/b.parquet")
    assert "2 of 4 items" not in str(prepare(log, tmp_path / "out").notes)
    vocabulary = Shards.open(str(tmp_path / "out")).vocabulary
    feature = vocabulary.features["tag"]
    lists = [feature.values[a:b] for a, b in zip(feature.offsets[2:-1], feature.offsets[3:], strict=True)]
    assert verify(str(tmp_path / "out")) == []
    named = {
        item: [feature.names[code - 2] for code in codes]
        for item, codes in zip(vocabulary.items.to_pylist(), lists, strict=True)
    }
    assert named == {5: ["a"], 6: ["c"], 7: [], 9: ["i"]}


def test_the_digest_has_the_features_of_items_however_their_tables_came(log, write_log, prepare, tmp_path):
    write_log({"user_id": [1, 2], "item_id": [9, 8], "timestamp": [70, 71]}, "more.parquet")
    plain = digest(prepare(log, tmp_path / "plain").path)
    digests = []
    for tags in (["a", "b", None], ["a", "c", None], ["b", "a", None]):
        table = str(write_log({"item_id": [5, 9, 6], "tag": tags, "kinds": [["x", "y"], [], None]}, "items.parquet"))
        out = tmp_path / f"out-{len(digests)}"
        early = str(write_log({"item_id": [5, 6], "tag": ["old", None], "kinds": [[], []]}, "early.parquet"))
        prepare(log, out, items=early)
        later = digest(prepare(tmp_path / "more.parquet", out, items=table).path)
        both = write_log(pl.read_parquet([*log.glob("*.parquet"), tmp_path / "more.parquet"]), f"{out.name}.parquet")
        assert digest(prepare(both, tmp_path / f"whole-{len(digests)}", items=table).path) == later
        digests.append(later)
    assert len({plain, *digests}) == 4


def test_codes_reach_the_batches_of_every_loader_user_by_user(log, write_log, known, tmp_path):
    write_log({"user_id": [3, 1], "sex": ["f", None], "likes": [["b", "a"], ["c"]]}, "log/users.parquet")
    _, values = known(log)
    data = Shards.open(str(tmp_path / "out"))
    vocabulary, raw = data.vocabulary.user_features, data.user_ids.to_pylist()
    requests = RequestConfig(min_history=0)
    train = TrainLoader(data, requests=requests, loader=LoaderConfig(), seed=1)
    batches = [*train.epoch(0)]
    write_log({"user_id": [1, 1, 1, 2], "item_id": [5, 6, 7, 5], "timestamp": range(9, 13)}, "log/b.parquet")
    known(log)
    grown = Shards.open(str(tmp_path / "out"))
    batches += [*EvaluationLoader(grown, requests=requests, part="test", batch_events=100)]
    seen = []
    for batch in batches:
        names = ["likes", "sex"]
        start = 0
        for user, lengths in zip(batch.user.tolist(), batch.user_feature_lengths.tolist(), strict=True):
            for name, length, expected in zip(names, lengths, values[raw[user]], strict=True):
                codes = batch.user_feature_values[start : start + length].tolist()
                assert [vocabulary[name][code - 2] for code in codes] == expected
                start += length
            seen.append(raw[user])
        assert start == len(batch.user_feature_values)
    assert sorted(set(seen)) == [1, 2, 3]
    assert len(seen) > 3


def test_a_newer_table_replaces_what_it_names_and_an_older_one_is_for_new_users_alone(log, write_log, known, tmp_path):
    write_log({"user_id": [1, 2, 4], "sex": ["m", "f", "f"], "age": [1, 2, 4]}, "log/users.parquet")
    known(log)
    newer = write_log({"user_id": [2, 3], "age": [None, 33], "zip": ["x", "y"]}, "new.parquet")
    names, values = known(log, users=str(newer))
    assert names == ["age", "sex", "zip"]
    assert values == {1: [["1"], ["m"], []], 2: [[], ["f"], ["x"]], 3: [["33"], [], ["y"]]}
    write_log({"user_id": [2, 4], "item_id": [5, 5], "timestamp": [50, 51]}, "log/b.parquet")
    _, values = known(log)
    assert values == {1: [["1"], ["m"], []], 2: [[], ["f"], ["x"]], 3: [["33"], [], ["y"]], 4: [["4"], ["f"], []]}
    vocabulary = Shards.open(str(tmp_path / "out")).vocabulary
    assert vocabulary.user_features == {"age": ("1", "2", "4", "33"), "sex": ("f", "m"), "zip": ("x", "y")}
    assert Shards.open(str(tmp_path / "out"), number=1).user_features == ["age", "sex"]


def test_new_events_leave_buckets_of_other_users_alone(log, write_log, prepare, tmp_path):
    write_log({"user_id": list(range(20)), "sex": ["m", "f"] * 10}, "log/users.parquet")
    first = prepare(log, tmp_path / "out", buckets=16).manifest
    assert prepare(log, tmp_path / "out", buckets=16).reused
    write_log({"user_id": [1], "item_id": [9], "timestamp": [50]}, "log/b.parquet")
    second = prepare(log, tmp_path / "out", buckets=16).manifest
    assert len([file for file in second.files if file not in first.files]) == 1
    assert [entry["kind"] for entry in second.inputs] == ["events", "users", "events"]


def test_a_data_set_without_a_users_table_has_the_bytes_it_always_had(log, prepare, tmp_path):
    prepare(log, tmp_path / "out")
    data = Shards.open(str(tmp_path / "out"))
    assert "user_features" not in data.manifest.schema
    assert data.read(0).codes is None
    assert data.read_table(0).column_names == ["user_id", "item", "timestamp"]
    assert data.user_features == []


def test_the_digest_follows_the_values_and_not_how_they_came(log, write_log, prepare, tmp_path):
    users = {"user_id": [1, 2], "sex": ["m", "f"]}
    table = write_log(users, "u.parquet")
    prepare(log, tmp_path / "a", users=str(table))
    prepare(log, tmp_path / "b")
    without = digest(str(tmp_path / "b"))
    prepare(log, tmp_path / "b", users=str(table))
    prepare(log, tmp_path / "c", users=str(write_log(users | {"sex": ["m", "m"]}, "v.parquet")))
    whole = digest(str(tmp_path / "a"))
    assert digest(str(tmp_path / "b")) == whole
    assert len({whole, without, digest(str(tmp_path / "c"))}) == 3


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"id": [1], "sex": ["m"]}, r"users.parquet: no column 'user_id'; it has 'id', 'sex'"),
        ({"user_id": [1]}, r"users.parquet: no column besides user_id"),
        ({"user_id": [1], "age": [1.5]}, r"feature 'age' is Float64; features are categories: cast it to strings"),
        ({"user_id": [1], "scores": [[0.5]]}, r"feature 'scores' is List\(Float64\)"),
        ({"user_id": [1], "time": ["m"]}, r"feature 'time' has a name that is reserved in requests"),
        ({"user_id": [1], "a/b": ["m"]}, r"the name of feature 'a/b' may have only letters"),
        ({"user_id": [77, 88], "sex": ["m", "f"]}, r"users.parquet: none of its user ids is in the log"),
        ({"user_id": ["x"], "sex": ["m"]}, r"users.parquet: none of its user ids is in the log"),
        ({"user_id": [1, 2, 1, 2, 3], "sex": ["m"] * 5}, r"users.parquet: 2 user ids are in more than one row"),
    ],
)
def test_a_bad_table_is_refused_in_one_line_and_nothing_is_written(log, write_log, prepare, tmp_path, table, words):
    write_log(table, "log/users.parquet")
    with pytest.raises(DataError, match=words) as error:
        prepare(log, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_table_without_a_row_is_refused(log, write_log, prepare, tmp_path):
    write_log({"user_id": pl.Series([], dtype=pl.Int64), "sex": pl.Series([], dtype=pl.String)}, "log/users.parquet")
    with pytest.raises(DataError, match="none of its user ids is in the log"):
        prepare(log, tmp_path / "out")


def test_features_of_items_and_users_may_share_a_name_but_not_a_table(log, write_log, prepare, tmp_path):
    write_log({"user_id": [1], "age": [3]}, "log/users.parquet")
    items = write_log({"item_id": [5], "age": ["new"], "user-age": ["x"]}, "items.parquet")
    with pytest.raises(DataError, match="item feature 'user-age' and user feature 'age' would share a table"):
        prepare(log, tmp_path / "out", items=str(items))
    items = write_log({"item_id": [5], "age": ["new"]}, "items.parquet")
    prepare(log, tmp_path / "out", items=str(items))
    vocabulary = Shards.open(str(tmp_path / "out")).vocabulary
    assert (vocabulary.features["age"].names, vocabulary.user_features["age"]) == (("new",), ("3",))


def test_a_table_of_several_row_groups_is_staged_group_by_group(log, write_log, prepare, tmp_path, monkeypatch):
    read = []
    original = ingest.stage_users
    monkeypatch.setattr(
        ingest, "stage_users", lambda part, **named: read.append(part.row_group) or original(part, **named)
    )
    write_log({"user_id": ["1", "2", "3"], "sex": ["m", "f", "x"]}, "log/users.parquet", row_group_size=1)
    prepare(log, tmp_path / "out")
    assert read == [0, 1, 2]
    data = Shards.open(str(tmp_path / "out"))
    assert data.raw_user_values(range(data.num_groups)).sort("user_id")["sex"].to_list() == [["m"], ["f"], ["x"]]
