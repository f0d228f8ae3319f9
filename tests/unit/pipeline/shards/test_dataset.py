import numpy as np
import polars as pl
import pytest
import xxhash

from pipeline.events import DataError, EventColumns
from pipeline.shards.dataset import Shards, bucket_of

FULL = EventColumns(action="action", label="label", request_id="request_id")


def test_buckets_follow_the_bytes_of_the_id_whatever_its_type():
    ids = [7, -3, 10**18]
    expected = [xxhash.xxh64_intdigest(str(n).encode(), seed=0) % 16 for n in ids]
    assert bucket_of(pl.Series(ids), buckets=16).to_list() == expected
    assert bucket_of(pl.Series([str(n) for n in ids]), buckets=16).to_list() == expected


@pytest.fixture
def data(prepare, write_log, random_log, tmp_path):
    log = random_log(num_users=12)
    write_log(log.with_columns(request_id=pl.when(pl.col("request_id") > 0).then("request_id")))
    prepare(tmp_path / "log", tmp_path / "out", columns=FULL, buckets=3, row_group_events=40)
    return Shards.open(str(tmp_path / "out"))


def test_row_groups_hold_whole_users_within_the_limit(data):
    sizes = [data.read(group) for group in range(data.num_groups)]
    assert data.num_groups > 3
    assert all(len(s.item) <= 40 or s.num_users == 1 for s in sizes)
    assert sum(len(s.item) for s in sizes) == data.manifest.counts["accepted"]
    stored = np.zeros(data.num_groups, np.int64)
    np.add.at(stored, data.index.group, data.index.events)
    assert stored.tolist() == [len(s.item) for s in sizes]


def test_what_is_read_is_what_was_logged(data, random_log):
    from pipeline.shards.sequences import build_sequences

    log = random_log(num_users=12).with_columns(
        pl.col("timestamp") * 1000, pl.col("label").cast(pl.Int8),
        request_id=pl.when(pl.col("request_id") > 0).then("request_id"),
    )  # fmt: skip
    read = data.raw_events(range(data.num_groups)).sort("user_id", maintain_order=True)
    assert read.equals(build_sequences(log))


def test_flat_events_agree_with_the_table(data):
    for group in range(data.num_groups):
        events, table = data.read(group), data.raw_events(range(group, group + 1))
        assert data.vocabulary.raw(events.item).to_pylist() == table["item_id"].to_list()
        assert events.time.tolist() == events.before.tolist() == table["timestamp"].to_list()
        assert [data.vocabulary.actions[a] for a in events.action] == table["action"].to_list()
        assert events.label.tolist() == table["label"].to_list()
        assert ((events.request < 0) == table["request_id"].is_null().to_numpy()).all()
        pairs = set(zip(events.request.tolist(), table["request_id"].to_list(), strict=True))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def test_index_rows_find_their_users(data):
    for user, raw in enumerate(data.user_ids.to_pylist()):
        table = data.read_table(int(data.index.group[user]))
        assert table["user_id"][int(data.index.row[user])].as_py() == raw


@pytest.mark.parametrize("harm", ["remove", "cut", "flip"])
@pytest.mark.parametrize("part", ["vocabulary", "index"])
def test_damaged_files_are_refused_by_name(data, tmp_path, harm, part):
    name = getattr(data.manifest, part)["name"]
    path = tmp_path / "out" / name
    content = bytearray(path.read_bytes())
    path.unlink()
    if harm != "remove":
        content[9] ^= 1
        path.write_bytes(content if harm == "flip" else content[:-1])
    # A fresh Shards, and a path that this process has not checked yet.
    with pytest.raises(DataError, match=f"{name} (is missing|has|is damaged)"):
        getattr(Shards.open(str(tmp_path / "out")), part)


def test_nothing_prepared_is_refused_with_the_command(tmp_path):
    with pytest.raises(DataError, match=r"no prepared data set there; run `solar prepare"):
        Shards.open(str(tmp_path))


def test_shards_travel_to_other_processes_as_path_and_manifest(data):
    import pickle

    assert data.vocabulary.size > 2
    copy = pickle.loads(pickle.dumps(data))
    assert (copy.path, copy.manifest) == (data.path, data.manifest)
