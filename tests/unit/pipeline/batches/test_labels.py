"""next_item on a log with labels, against a pandas computation on the raw log; impressions read all of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.batches.loader import EvaluationLoader, TrainLoader, training_item_counts
from pipeline.batches.loader_config import LoaderConfig
from pipeline.batches.request_index import LabelCounts, load, request_counts
from pipeline.batches.requests import RequestConfig
from pipeline.events import DataError, EventColumns
from pipeline.shards.dataset import Shards
from pipeline.shards.vocabulary import NUM_RESERVED
from tests.support.shown import SECOND, shown_log

LAST = RequestConfig(num_negatives=0, max_history=500, max_requests=500)
BY_TIME = dataclasses.replace(
    LAST, split="temporal", valid_from=1_700_004_000 * SECOND, test_from=1_700_008_000 * SECOND
)
LOADER = LoaderConfig(batch_events=200, window_row_groups=2, prefetch=0)


@pytest.fixture
def open_log(prepare, write_log, tmp_path):
    """Shards of a log with the columns that it has, in several buckets and groups."""

    def make(log: pl.DataFrame, name: str = "shown") -> Shards:
        write_log(log, f"{name}/events.parquet")
        label, request_id = (name if name in log.columns else None for name in ("label", "request_id"))
        columns = EventColumns(timestamp_unit="ms", label=label, request_id=request_id)
        prepare(tmp_path / name, tmp_path / f"{name}-shards", columns=columns, buckets=3, row_group_events=60)
        return Shards.open(str(tmp_path / f"{name}-shards"))

    return make


def labels_of(data: Shards, config: RequestConfig) -> LabelCounts:
    labels = request_counts(data, config).labels
    assert labels is not None
    return labels


def requests_of(data: Shards, config: RequestConfig, part: str) -> list[tuple]:
    """(user, history, candidates with their labels, time) of each request, with raw ids."""
    if part == "train":
        batches = list(TrainLoader(data, requests=config, loader=LOADER, seed=1).epoch(0))
    else:
        batches = list(EvaluationLoader(data, requests=config, part=part, batch_events=200))
    found, items = [], [None, None, *data.vocabulary.items.to_pylist()]
    for batch in batches:
        for b, place in enumerate(batch.request_user.tolist()):
            start = int(batch.event_offsets[place])
            history = batch.event_item[start : start + int(batch.request_position[b])].tolist()
            part_of = slice(*batch.candidate_offsets[b : b + 2].tolist())
            shown = zip(batch.candidate_item[part_of].tolist(), batch.candidate_label[part_of].tolist(), strict=True)
            user = data.user_ids[int(batch.user[place])].as_py()
            candidates = {items[item]: label for item, label in shown}
            found.append((user, [items[item] for item in history], candidates, int(batch.request_time[b])))
    return sorted(found, key=lambda request: (request[0], request[3]))


def expected_of(log: pl.DataFrame, config: RequestConfig, part: str) -> list[tuple]:
    """The same by pandas: the chosen rows alone, one request for each."""
    found = []
    for user, chosen in log.to_pandas().query("label == 1").sort_values("timestamp").groupby("user_id"):
        items, times, size = chosen.item_id.tolist(), chosen.timestamp.tolist(), len(chosen)
        for place, time in enumerate(times):
            if config.split == "temporal":
                valid_from, test_from = config.bounds
                belongs = "train" if time < valid_from else "valid" if time < test_from else "test"
            else:
                last = {size - 1: "test", size - 2: "valid"} if size >= 3 else {}
                belongs = last.get(place, "train")
            if belongs == part:
                found.append((user, items[:place], {items[place]: 1.0}, time))
    return sorted(found, key=lambda request: (request[0], request[3]))


@pytest.mark.parametrize("config", [LAST, BY_TIME], ids=["leave_one_out", "temporal"])
@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_targets_and_histories_are_what_was_chosen(open_log, config, part):
    log = shown_log()
    found = requests_of(open_log(log), config, part)
    assert len(found) >= 8
    assert found == expected_of(log, config, part)
    assert not any(item.startswith("a") for _, history, targets, _ in found for item in [*history, *targets])


@pytest.mark.parametrize("config", [LAST, BY_TIME], ids=["leave_one_out", "temporal"])
def test_popularity_counts_what_was_chosen_in_training(open_log, config):
    log = shown_log()
    data = open_log(log)
    counts = training_item_counts(data, requests=config)
    found = dict(zip(data.vocabulary.items.to_pylist(), counts[NUM_RESERVED:].tolist(), strict=False))
    expected: dict[str, int] = dict.fromkeys(log["item_id"].unique().to_list(), 0)
    for _, _, targets, _ in expected_of(log, config, "train"):
        for item in targets:
            expected[item] += 1
    assert found == expected
    assert 0 in expected.values()


@pytest.mark.parametrize("config", [LAST, BY_TIME, dataclasses.replace(LAST, group="request")])
def test_requests_are_those_of_the_log_without_what_was_only_shown(open_log, config):
    log = shown_log()
    chosen = open_log(log.filter(pl.col("label") == 1).drop("label"), "chosen")
    shown = open_log(log)
    for part in ("train", "valid", "test"):
        assert requests_of(shown, config, part) == requests_of(chosen, config, part)
    ours, theirs = request_counts(shown, config), request_counts(chosen, config)
    assert ours.test.requests.sum() == theirs.test.requests.sum() > 0
    assert ours.train.events.sum() == theirs.train.events.sum()


def test_each_users_events_are_counted_by_label(open_log):
    log = shown_log()
    data = open_log(log)
    first, again = labels_of(data, LAST), labels_of(data, LAST)
    assert load(data, LAST) is not None
    by_user = log.to_pandas().groupby("user_id").label.agg(["sum", "count"])
    for counts in (first, again):
        found = {user: int(count) for user, count in zip(data.user_ids.to_pylist(), counts.positives, strict=True)}
        assert found == by_user["sum"].to_dict()
        assert (counts.positives + counts.only_shown).sum() == len(log)
    assert first.positives.min() == 0
    of_impressions = labels_of(data, dataclasses.replace(LAST, task="impressions"))
    assert of_impressions.positives.tolist() == first.positives.tolist()
    assert request_counts(data, dataclasses.replace(LAST, min_label=0)).labels is None


def test_min_label_0_reads_every_event(open_log):
    log = shown_log()
    data, plain = open_log(log), open_log(log.drop("label"), "plain")
    everything = dataclasses.replace(LAST, min_label=0)
    for part in ("train", "test"):
        assert requests_of(data, everything, part) == requests_of(plain, LAST, part)
    assert training_item_counts(data, requests=everything).sum() > training_item_counts(data, requests=LAST).sum()


def test_impressions_have_what_was_shown_as_candidates_and_in_histories(open_log):
    log = shown_log()
    config = dataclasses.replace(LAST, task="impressions", min_history=0)
    found = requests_of(open_log(log), config, "test")
    expected = []
    for user, events in log.to_pandas().sort_values("timestamp").groupby("user_id"):
        last = events[events.request_id == events.request_id.iloc[-1]]
        labels = last.groupby("item_id").label.max().to_dict()
        before = events[events.timestamp < last.timestamp.iloc[0]].item_id.tolist()
        expected.append((user, before, labels, int(last.timestamp.iloc[0])))
    assert found == sorted(expected, key=lambda request: (request[0], request[3]))


@pytest.mark.parametrize("task", ["next_item", "impressions"])
def test_events_say_what_their_labels_were(open_log, task):
    log = shown_log()
    data, config = open_log(log), dataclasses.replace(LAST, task=task, min_label=0)
    known = {(user, time): label for user, time, label in log.select("user_id", "timestamp", "label").iter_rows()}
    loader = TrainLoader(data, requests=config, loader=LOADER, seed=1)
    batches = [*loader.epoch(0), *EvaluationLoader(data, requests=config, part="test", batch_events=200)]
    found: set[int] = set()
    for batch in batches:
        user = torch.repeat_interleave(batch.user, batch.event_offsets.diff()).tolist()
        events = zip(data.user_ids.take(user).to_pylist(), batch.event_time.tolist(), strict=True)
        expected = [1 + known[event] for event in events]
        assert batch.event_label.tolist() == expected
        assert batch.event_label.dtype == torch.int64
        found |= {*expected}
    assert found == {1, 2}


def test_events_of_a_log_without_labels_have_none(open_log):
    data = open_log(shown_log().drop("label"))
    (batch,) = EvaluationLoader(data, requests=LAST, part="test", batch_events=10**6)
    assert batch.event_label.shape == batch.event_item.shape
    assert batch.event_label.eq(0).all()


def test_counts_of_an_earlier_version_are_used_only_where_they_mean_the_same(open_log):
    log = shown_log()
    labelled, plain = open_log(log), open_log(log.drop("label", "request_id"), "plain")

    def earlier(data: Shards, config: RequestConfig) -> Path:
        """The name that versions without min_label gave to the counts of these requests."""
        fields = {"task": config.task, "split": config.split, "max_history": config.max_history}
        fields |= {"max_eval_requests": config.max_eval_requests}
        if config.task == "impressions":
            fields |= {"session_gap_seconds": config.session_gap_seconds, "min_history": config.min_history}
        else:
            fields |= {"group": config.group}
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
        return Path(data.path) / "requests" / f"{data.manifest.fingerprint[:16]}-{digest}.parquet"

    # The same meaning: the stored file is read.
    for data, config in ((plain, LAST), (labelled, dataclasses.replace(LAST, min_label=0))):
        request_counts(data, config)
        file = earlier(data, config)
        assert "positives" not in pq.read_schema(file).names
        table = pq.read_table(file)
        marked = table.set_column(table.column_names.index("test_requests"), "test_requests", [[7] * len(table)])
        pq.write_table(marked, file)
        assert set(request_counts(data, config).test.requests.tolist()) == {7}
    # Another meaning: it is not.
    assert request_counts(labelled, LAST).test.requests.max() == 1
    # Impressions without counts of labels are counted again.
    config = dataclasses.replace(LAST, task="impressions")
    counted = labels_of(labelled, config)
    table = pq.read_table(earlier(labelled, config))
    pq.write_table(table.drop_columns(["positives", "only_shown"]), earlier(labelled, config))
    assert load(labelled, config) is None
    assert labels_of(labelled, config).positives.tolist() == counted.positives.tolist()
    assert pq.read_table(earlier(labelled, config)).equals(table)


def test_a_loader_of_other_events_cannot_go_on(open_log):
    log = shown_log()
    labelled, plain = open_log(log), open_log(log.drop("label", "request_id"), "plain")

    def state(data: Shards, config: RequestConfig) -> dict:
        return TrainLoader(data, requests=config, loader=LOADER, seed=1).state_dict()

    settings = dataclasses.asdict(LAST)
    del settings["min_label"]
    before = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    every = dataclasses.replace(LAST, min_label=0)
    assert state(plain, LAST)["fingerprint"]["requests config"] == before
    assert state(labelled, every)["fingerprint"]["requests config"] == before
    with pytest.raises(DataError, match="cannot resume, requests config changed"):
        TrainLoader(labelled, requests=LAST, loader=LOADER, seed=1).load_state_dict(state(labelled, every))


def test_a_user_who_chose_nothing_is_in_no_batch_and_has_an_empty_history(open_log):
    data = open_log(shown_log())
    user = data.user_ids.to_pylist().index("u4")
    group = int(data.index.group[user])
    events = data.read(group, min_label=1)
    assert events.num_users == data.read(group).num_users
    row = int(data.index.row[user])
    assert events.offsets[row] == events.offsets[row + 1]
    assert "u4" not in {request[0] for request in requests_of(data, LAST, "train")}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_label": 2}, "requests.min_label is 2: it must be 1 or 0"),
        ({"min_label": 1, "task": "impressions"}, "task impressions reads all events, remove it"),
    ],
)
def test_least_labels_that_select_nothing_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        RequestConfig(**settings)
