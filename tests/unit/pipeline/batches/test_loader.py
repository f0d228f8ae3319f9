import dataclasses
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.batches import loader as loader_module
from pipeline.batches.loader import EvaluationLoader, TrainLoader, training_item_counts
from pipeline.batches.loader_config import LoaderConfig
from pipeline.batches.request_index import request_counts
from pipeline.batches.requests import RequestConfig
from pipeline.events import DataError, EventColumns
from pipeline.shards.dataset import Shards
from pipeline.shards.user_reader import UserReader

# Every event is read: what labels mean to next_item is in test_labels.py.
REQUESTS = RequestConfig(max_history=12, max_requests=5, num_negatives=3, min_label=0)
LOADER = LoaderConfig(batch_events=90, window_row_groups=2)
FULL = EventColumns(action="action", label="label", request_id="request_id")


@pytest.fixture
def data(prepare, write_log, random_log, tmp_path):
    """20 users in 4 buckets with several row groups each."""
    write_log(random_log())
    prepare(tmp_path / "log", tmp_path / "out", columns=FULL, buckets=4, row_group_events=40)
    return Shards.open(str(tmp_path / "out"))


def train(data, *, requests=REQUESTS, loader=LOADER, seed=7, **ranks):
    return TrainLoader(data, requests=requests, loader=loader, seed=seed, **ranks)


def equal(first, second):
    return all(
        torch.equal(a, b) if isinstance(a := getattr(first, f.name), torch.Tensor) else a == getattr(second, f.name)
        for f in dataclasses.fields(first)
        if (b := getattr(second, f.name)) is not None
    )


def by_user(batch):
    """{user: everything the batch holds of it}"""
    found = {}
    for place, user in enumerate(batch.user.tolist()):
        start, end = batch.event_offsets[place : place + 2].tolist()
        mine = torch.nonzero(batch.request_user == place).flatten().tolist()
        asked = [
            (
                int(batch.request_position[b]), int(batch.request_time[b]),
                batch.candidate_item[slice(*batch.candidate_offsets[b : b + 2].tolist())].tolist(),
                batch.candidate_label[slice(*batch.candidate_offsets[b : b + 2].tolist())].tolist(),
            )
            for b in mine
        ]  # fmt: skip
        events = [getattr(batch, f"event_{name}")[start:end].tolist() for name in ("item", "time", "action")]
        found[user] = (events, asked)
    return found


def test_batches_are_well_formed_and_within_the_limit(data):
    batches = list(train(data).epoch(0))
    assert len(batches) == train(data).num_batches(0) > 5
    assert sum(b.num_requests for b in batches) == train(data).num_requests(0)
    for batch in batches:
        assert batch.num_requests == batch.num_global_requests
        assert batch.num_events + batch.num_candidates <= LOADER.batch_events or batch.num_users == 1
        lengths = torch.diff(batch.event_offsets)
        assert (batch.request_position <= lengths[batch.request_user]).all()
        assert (lengths <= REQUESTS.max_history).all()
        assert (torch.diff(batch.request_user) >= 0).all()
        assert torch.bincount(batch.request_user).max() <= REQUESTS.max_requests
        assert batch.candidate_item.min() >= 2
        assert torch.diff(batch.candidate_offsets).unique().tolist() == [4]


def test_requests_equal_those_read_off_the_raw_log(data, random_log):
    from pipeline.shards.sequences import build_sequences

    sequences = build_sequences(random_log())
    raw = {str(k[0]): v for k, v in sequences.partition_by("user_id", as_dict=True).items()}
    asked = 0
    for batch in train(data, requests=RequestConfig(num_negatives=0, min_label=0)).epoch(0):
        for user, (events, requests) in by_user(batch).items():
            history = raw[str(data.user_ids[user])]
            for position, time, (positive,), _ in requests:
                asked += 1
                assert data.vocabulary.raw(np.array([positive])).to_pylist() == [history["item_id"][position]]
                assert time == 1000 * history["timestamp"][position]
                rows = data.vocabulary.rows(history["item_id"][:position])
                assert events[0][:position] == rows.tolist()
                assert events[2][:position] == [data.vocabulary.actions.index(a) for a in history["action"][:position]]
    assert asked == sum(len(h) - 2 if len(h) >= 3 else len(h) for h in raw.values())


@pytest.mark.parametrize(
    ("negatives", "history_negatives"), [("uniform", 0), ("uniform", 4), ("popularity", 2), ("in_batch", 0)]
)
def test_any_number_of_ranks_sees_the_same_global_batches_in_order(data, negatives, history_negatives):
    requests = dataclasses.replace(REQUESTS, negatives=negatives, history_negatives=history_negatives)
    alone = [by_user(batch) for batch in train(data, requests=requests).epoch(0)]
    for world in (2, 3):
        ranks = [list(train(data, requests=requests, rank=rank, world_size=world).epoch(0)) for rank in range(world)]
        assert {len(batches) for batches in ranks} == {len(alone)}
        for number, whole in enumerate(alone):
            parts = [ranks[rank][number] for rank in range(world)]
            joined = {user: found for part in parts for user, found in by_user(part).items()}
            assert joined == whole
            assert sum(part.num_users for part in parts) == len(whole)
            assert {part.num_global_requests for part in parts} == {sum(p.num_requests for p in parts)}


def test_resume_in_mid_epoch_equals_an_uninterrupted_run(data):
    total = train(data).num_batches(0)
    iterator = iter(train(data))
    uninterrupted = [next(iterator) for _ in range(2 * total + 3)]
    for stop in (0, 1, total - 1, total, total + 2):
        first = train(data)
        for _, batch in zip(range(stop), first, strict=False):
            assert batch is not None
        second = train(data, loader=dataclasses.replace(LOADER, prefetch=0))
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for expected, batch in zip(uninterrupted[stop : stop + total + 1], second, strict=False):
            assert equal(expected, batch)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3), (3, 8), (8, 5), (5, 4), (4, 2)])
def test_resume_on_another_number_of_ranks_keeps_batch_order_event_by_event(data, before, after):
    whole = [by_user(batch) for batch in train(data).epoch(0)]
    states = []
    for rank in range(before):
        stopped = train(data, rank=rank, world_size=before)
        for _, batch in zip(range(3), stopped, strict=False):
            assert batch is not None
        states.append(stopped.state_dict())
    assert all(state == states[0] for state in states)
    resumed = [train(data, rank=rank, world_size=after) for rank in range(after)]
    for loader in resumed:
        loader.load_state_dict(json.loads(json.dumps(states[0])))
    iterators = [iter(loader) for loader in resumed]
    for expected in whole[3:]:
        parts = [by_user(next(iterator)) for iterator in iterators]
        assert {user: found for part in parts for user, found in part.items()} == expected
        assert sum(map(len, parts)) == len(expected)


def test_evaluation_reads_each_row_group_once_and_training_a_window_of_them(data, monkeypatch):
    read, held = [], []

    def counted(shards, group, original=Shards.read, **least):
        read.append(group)
        return original(shards, group, **least)

    def watched(reader, users, original=UserReader.read):
        events = original(reader, users)
        held.append(len(reader._groups))
        return events

    request_counts(data, REQUESTS)
    monkeypatch.setattr(Shards, "read", counted)
    monkeypatch.setattr(UserReader, "read", watched)
    assert list(EvaluationLoader(data, requests=REQUESTS, part="test", batch_events=90))
    asked = {group for group, events in zip(data.index.group.tolist(), data.index.events, strict=True) if events >= 3}
    assert data.num_groups > 6
    assert sorted(read) == sorted(asked)
    assert max(held) <= 2
    held.clear()
    assert list(train(data).epoch(0))
    assert max(held) <= 2 * LOADER.window_row_groups


def test_what_later_ingests_brought_is_read_in_its_place(data, prepare, write_log, random_log, tmp_path):
    write_log(random_log(num_users=30, seed=5), "log/day2.parquet")
    prepare(tmp_path / "log", tmp_path / "out", columns=FULL, buckets=4, row_group_events=40)
    grown = Shards.open(data.path)
    assert max(len(grown.files_of(bucket)) for bucket in grown.buckets) == 2
    prepare(tmp_path / "log", tmp_path / "at-once", columns=FULL, buckets=4, row_group_events=40)
    raw = [
        {
            shards.user_ids[user].as_py(): shards.vocabulary.raw(np.array(items[0])).to_pylist()
            for batch in train(shards).epoch(0)
            for user, (items, _) in by_user(batch).items()
        }
        for shards in (grown, Shards.open(str(tmp_path / "at-once")))
    ]
    assert raw[0] == raw[1]
    assert len(raw[0]) > 20


def test_epochs_differ_and_seeds_differ(data):
    users = [[b.user.tolist() for b in train(data, seed=s).epoch(e)] for s, e in ((7, 0), (7, 1), (8, 0))]
    assert users[0] != users[1]
    assert users[0] != users[2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 8}, "seed changed"),
        ({"requests": dataclasses.replace(REQUESTS, num_negatives=4)}, "requests config changed"),
        ({"requests": dataclasses.replace(REQUESTS, negatives="popularity")}, "requests config changed"),
        ({"loader": dataclasses.replace(LOADER, batch_events=91)}, "loader config changed"),
    ],
)
def test_another_state_is_refused_by_name(data, change, words):
    with pytest.raises(DataError, match=words):
        train(data, **change).load_state_dict(train(data).state_dict())


def test_a_grown_data_set_is_refused_by_name(data, prepare, write_log, random_log, tmp_path):
    state = train(data).state_dict()
    write_log(random_log(seed=5), "log/day2.parquet")
    prepare(tmp_path / "log", tmp_path / "out", columns=FULL, buckets=4, row_group_events=40)
    with pytest.raises(DataError, match="manifest changed"):
        train(Shards.open(data.path)).load_state_dict(state)
    train(Shards.open(data.path, number=1)).load_state_dict(state)


def test_an_exception_of_the_thread_is_raised_and_the_thread_ends(data, monkeypatch):
    def broken(*arguments, **named):
        raise RuntimeError("no such batch")

    monkeypatch.setattr(loader_module, "sample", broken)
    with pytest.raises(RuntimeError, match="no such batch"):
        next(iter(train(data)))
    monkeypatch.undo()
    iterator = iter(train(data))
    next(iterator)
    iterator.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "solar-prefetch"]


def test_evaluation_gives_each_user_its_last_event_and_every_rank_the_same_number_of_batches(data):
    for world in (1, 2, 30):
        ranks = [
            list(EvaluationLoader(data, requests=REQUESTS, part="test", batch_events=60, rank=r, world_size=world))
            for r in range(world)
        ]
        assert len({len(batches) for batches in ranks}) == 1
        found = {u: f for batches in ranks for batch in batches for u, f in by_user(batch).items()}
        assert sorted(found) == np.flatnonzero(data.index.events >= 3).tolist()
        for user, (events, requests) in found.items():
            assert len(requests) == 1
            assert requests[0][0] == len(events[0]) == min(data.index.events[user] - 1, REQUESTS.max_history)
            assert requests[0][3] == [1.0]


def test_a_limit_chooses_the_same_users_each_time(data):
    chosen = [
        [u for batch in EvaluationLoader(data, requests=REQUESTS, part="valid", batch_events=60, limit=limit)
         for u in batch.user.tolist()]
        for limit in (5, 5, 8)
    ]  # fmt: skip
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 5
    assert set(chosen[0]) < set(chosen[2])


def test_negatives_by_popularity_have_training_events_and_the_log_q_of_their_share(data):
    config = dataclasses.replace(REQUESTS, negatives="popularity", popularity_power=1.0, num_negatives=50)
    counts = training_item_counts(data, requests=config)
    rarely = np.bincount(np.arange(2, data.vocabulary.size, 3), minlength=len(counts)) * counts
    for given in (None, counts, rarely):
        batches = list(TrainLoader(data, requests=config, loader=LOADER, seed=7, item_counts=given).epoch(0))
        label, item = (torch.cat([getattr(b, f"candidate_{name}") for b in batches]) for name in ("label", "item"))
        weight = torch.from_numpy(counts if given is None else given)
        assert (weight[item[label == 0]] > 0).all()
        log_q = torch.cat([b.candidate_log_q for b in batches if b.candidate_log_q is not None]).view(-1, 51)
        weight_BM = weight[item.view(-1, 51)]
        expected = 50 * weight_BM[:, 1:] / (weight.sum() - weight_BM[:, :1])
        torch.testing.assert_close(log_q[:, 1:].exp(), expected, rtol=1e-5, atol=0)


def test_history_negatives_are_drawn_beside_the_others_and_log_q_knows_both_ways(data):
    config = dataclasses.replace(REQUESTS, history_negatives=4)
    added = 0
    share = REQUESTS.num_negatives / (data.vocabulary.size - 2 - 1)
    for batch in train(data, requests=config).epoch(0):
        assert batch.candidate_log_q is not None
        added += batch.num_candidates - batch.num_requests * (1 + REQUESTS.num_negatives)
        # At least what the uniform draws give, and more for what the history holds.
        assert (batch.candidate_log_q > np.log(share) - 1e-5).all()
        assert (batch.candidate_log_q < np.log(share + 1) + 1e-5).all()
    assert added > 0


def test_in_batch_leaves_the_negatives_to_who_knows_the_whole_batch(data):
    loader = train(data, requests=dataclasses.replace(REQUESTS, negatives="in_batch"))
    for epoch in (0, 3):
        for batch in loader.epoch(epoch):
            assert batch.epoch == epoch
            assert batch.candidate_log_q is None
            assert batch.candidate_label.tolist() == [1.0] * batch.num_requests
    assert loader.num_batches(0) == train(data).num_batches(0)


def test_a_catalogue_of_positives_leaves_no_negatives(prepare, write_log, random_log, tmp_path):
    import polars as pl

    write_log(random_log().with_columns(pl.col("item_id").first()))
    prepare(tmp_path / "log", tmp_path / "out", columns=FULL)
    data = Shards.open(str(tmp_path / "out"))
    with pytest.raises(DataError, match="all 1 items from which its negatives could be drawn"):
        next(train(data).epoch(0))
    assert next(train(data, requests=RequestConfig(num_negatives=0)).epoch(0)).num_requests > 0


def test_impressions_travel_with_all_their_candidates_and_labels(data):
    config = RequestConfig(task="impressions", min_history=10, max_history=100)
    batches = list(train(data, requests=config).epoch(0))
    assert {0.0, 1.0} == set(torch.cat([b.candidate_label for b in batches]).tolist())
    assert all(b.num_events + b.num_candidates <= LOADER.batch_events or b.num_users == 1 for b in batches)
    loader = EvaluationLoader(data, requests=config, part="test", batch_events=90)
    assert loader.num_skipped > 0
    assert sum(b.num_requests for b in loader) == loader.num_requests


def test_popularity_counts_training_positives_only(data, random_log):
    counts = training_item_counts(data, requests=REQUESTS)
    expected = np.zeros(data.vocabulary.capacity, np.int64)
    for user in range(data.manifest.users):
        events = data.read(int(data.index.group[user])).take(data.index.row[user : user + 1]).item
        np.add.at(expected, events[: len(events) - 2] if len(events) >= 3 else events, 1)
    assert counts.tolist() == expected.tolist()


@pytest.mark.parametrize("task", ["next_item", "impressions"])
def test_a_log_with_an_order_only_loads_and_refuses_what_needs_times(task, prepare, write_log, random_log, tmp_path):
    write_log(random_log().with_row_index("order").drop("timestamp"))
    columns = EventColumns(timestamp=None, order="order", label="label", request_id="request_id")
    prepare(tmp_path / "log", tmp_path / "out", columns=columns)
    data = Shards.open(str(tmp_path / "out"))
    batch = next(train(data, requests=RequestConfig(task=task)).epoch(0))
    assert batch.event_time.eq(0).all()
    assert batch.request_time.eq(0).all()
    temporal = RequestConfig(task=task, split="temporal", valid_from=1, test_from=2)
    with pytest.raises(DataError, match="temporal but the log has no timestamps"):
        train(data, requests=temporal)


def test_sessions_and_impressions_are_refused_where_the_log_lacks_their_columns(
    prepare, write_log, random_log, tmp_path
):
    write_log(random_log().with_row_index("order").drop("timestamp"))
    for columns, words in (
        (EventColumns(timestamp=None, order="order", label="label"), "sessions need timestamps"),
        (EventColumns(timestamp=None, order="order"), "log has no labels"),
    ):
        out = tmp_path / words.replace(" ", "-")
        prepare(tmp_path / "log", out, columns=columns)
        with pytest.raises(DataError, match=words):
            train(Shards.open(str(out)), requests=RequestConfig(task="impressions"))


def test_a_split_that_leaves_nothing_to_train_on_is_refused(data):
    config = RequestConfig(split="temporal", valid_from=0, test_from=1)
    with pytest.raises(DataError, match="no training requests"):
        train(data, requests=config)


def test_a_damaged_shard_is_refused_by_name(data):
    entry = data.manifest.files[0]
    path = Path(data.path, entry["name"])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{entry['name']} is damaged.*restore"):
        list(train(data).epoch(0))
