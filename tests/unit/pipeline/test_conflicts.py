"""Rows of one event with different labels: the same events, labels and counts in whatever order the rows come."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import build
from pipeline.events import EventColumns, Reason
from pipeline.shards import event_keys
from pipeline.shards.dataset import Shards
from pipeline.shards.event_keys import EventKeys, write_keys
from pipeline.shards.inspection import digest, verify
from pipeline.shards.manifest import manifest_name
from tests.support.serial import without_ray

NAMES = ["user_id", "item_id", "timestamp", "action", "label", "request_id"]
FULL = EventColumns(action="action", label="label", request_id="request_id")
DAY = 86_400

rows = st.tuples(
    st.integers(1, 2), st.integers(5, 6), st.sampled_from([0, 40 * DAY]), st.sampled_from(["seen", ""]),
    st.integers(0, 1), st.sampled_from([None, 1, 2]),
)  # fmt: skip
ingests = st.lists(st.lists(rows, min_size=3, max_size=9), min_size=2, max_size=3)


def reference(read):
    """The events of these rows, sorted, and their counts."""
    rows_of = {}
    for user, item, time, action, label, request in read:
        rows_of.setdefault((user, item, time, action), []).append((label, request))
    events = []
    for event, found in rows_of.items():
        largest = max(label for label, _ in found)
        requests = [request for label, request in found if label == largest]
        events.append((*event, largest, None if None in requests else min(requests)))
    both = sum(len({label for label, _ in found}) == 2 for found in rows_of.values())
    counts = {"read": len(read), "accepted": len(events), "conflicting": both, "rejected": {}}
    return sorted(events, key=str), counts | {"duplicate": len(read) - len(events) - both}


class Log:
    """A log that grows by files, and the data set of it."""

    def __init__(self, root: Path, *, columns: EventColumns = FULL, **config: Any) -> None:
        self.log, self.path, self.num_files = root / "log", str(root / "out"), 0
        chosen: dict[str, Any] = {"buckets": 2, "row_group_events": 5} | config
        self.config = build.PrepareConfig(columns=columns, **chosen)
        self.log.mkdir(parents=True)

    def add(self, found) -> None:
        # The number of the file is in its bytes: files that are equal are read once.
        table = pl.DataFrame([(*row, self.num_files) for row in found], schema=[*NAMES, "file"], orient="row",
                             schema_overrides={"request_id": pl.Int64})  # fmt: skip
        table.write_parquet(self.log / f"{self.num_files}.parquet")
        self.num_files += 1
        build.prepare(str(self.log), self.path, config=self.config)

    @property
    def data(self) -> Shards:
        return Shards.open(self.path)

    @property
    def counts(self):
        return self.data.manifest.counts

    def events(self):
        """The events that readers see, with times in seconds, sorted."""
        found = self.data.raw_events(range(self.data.num_groups))
        columns = [name for name in NAMES if name in found.columns]
        shown = found.with_columns(pl.col("timestamp") // 1000, pl.col("action").fill_null(""))
        return sorted(shown.select(columns).rows(), key=str)


@pytest.fixture
def log(tmp_path, monkeypatch):
    without_ray(monkeypatch.setattr)
    return Log(tmp_path, max_deltas=99)


@settings(max_examples=12, deadline=None)
@given(parts=ingests, compacted=st.sets(st.integers(0, 3)), late_days=st.sampled_from([0, 99]), data=st.data())
def test_any_order_of_rows_ingests_and_compactions_gives_the_same(tmp_path_factory, parts, compacted, late_days, data):
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch.setattr)
        # With late_days 0 the repeats of old days are left to the compaction.
        patch.setattr(event_keys, "_WORTH_READING", 0)
        log = Log(tmp_path_factory.mktemp("a"), late_days=late_days, max_deltas=99)
        read = []
        for number, part in enumerate(parts):
            log.add(part)
            read += part
            events, counts = reference(read)
            assert log.events() == events
            if late_days:
                assert log.counts == counts
            if number in compacted:
                before = digest(log.path)
                build.compact(log.path)
                assert digest(log.path) == before
        another = Log(tmp_path_factory.mktemp("b"))
        another.add(data.draw(st.permutations(read)))
        assert verify(log.path) == verify(another.path) == []
        assert digest(log.path) == digest(another.path)
        build.compact(log.path)
        assert log.counts == another.counts == counts
        assert log.events() == another.events() == events


def impression(item, *, request=1, label=0):
    return (1, item, 7, "seen", label, request)


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("labels", [*sorted(set(itertools.permutations([0, 1, 0]))), (0, 0, 1, 1)])
def test_one_row_an_ingest_counts_as_all_in_one(log, labels, compacted):
    for label in labels:
        log.add([impression(5, label=label, request=label)])
        if compacted:
            build.compact(log.path)
    assert log.events() == [impression(5, label=1)]
    assert (log.counts["accepted"], log.counts["conflicting"]) == (1, 1)
    assert log.counts["duplicate"] == len(labels) - 2


def test_a_late_click_raises_an_impression_at_once_in_every_reader(log):
    log.add([impression(5), impression(6)])
    log.add([impression(6, label=1)])
    (group,) = np.unique(log.data.index.group)
    assert log.data.read(int(group)).label.tolist() == [0, 1]
    assert log.data.index.events.tolist() == [2]
    assert log.data.manifest.conflicting == 1


def test_a_late_impression_of_a_click_is_written_once_for_its_label_and_then_no_more(log):
    log.add([impression(5, label=1)])
    events = []
    for request in (2, 3, 4):
        log.add([impression(5, request=request)])
        events.append(sum(file["events"] for file in log.data.manifest.files))
    assert events == [2, 2, 2]
    assert log.events() == [impression(5, label=1)]
    assert (log.counts["conflicting"], log.counts["duplicate"]) == (1, 2)


def test_another_request_alone_is_no_conflict(log):
    for request in (2, 1, 3):
        log.add([impression(5, request=request)])
    assert log.events() == [impression(5, request=1)]
    assert (log.counts["conflicting"], log.counts["duplicate"]) == (0, 2)


def test_conflicts_of_forgotten_users_are_rows_of_forgotten_users(log):
    for user in (1, 2, 3):
        log.add([(user, 5, 7, "", label, None) for label in (0, 1, 1)] + [(user, 6, 7, "", 1, None)])
    assert log.counts == {"read": 12, "accepted": 6, "conflicting": 3, "duplicate": 3, "rejected": {}}
    build.forget(log.path, ["2"])
    rejected = {Reason.FORGOTTEN_USER.value: 3}
    assert log.counts == {"read": 12, "accepted": 4, "conflicting": 2, "duplicate": 3, "rejected": rejected}
    assert verify(log.path) == []


def test_a_log_without_labels_has_neither_counts_nor_key_columns_of_them(log, tmp_path):
    unlabelled = Log(tmp_path / "other", columns=EventColumns(action="action", request_id="request_id"), buckets=1)
    unlabelled.add([impression(5), impression(5, request=2)])
    unlabelled.add([impression(5, request=0)])
    assert unlabelled.counts == {"read": 3, "accepted": 1, "duplicate": 2, "rejected": {}}
    assert "kept_label" not in unlabelled.data.manifest.schema
    for file in unlabelled.data.manifest.files:
        assert "conflicting" not in file
        with unlabelled.data.part_of(file["keys"]) as keys:
            assert keys.schema_arrow.names == ["time", "key", "full"]


def as_an_earlier_version_left_it(path: str) -> None:
    """Remove what earlier versions did not write: labels in key files, keys of events written again, and the counts."""
    data = Shards.open(path)
    files, seen = [], set()
    for file in data.manifest.files:
        with data.part_of(file["keys"]) as parquet:
            table = pl.DataFrame(parquet.read())
        is_new = np.array([key not in seen for key in table["key"]], bool)
        seen |= set(table["key"])
        time, key, full = (table[name].to_numpy() for name in ("time", "key", "full"))
        keys = EventKeys(time=time, key=key, full=full, labels=None, has_time=True).filter(is_new)
        entry = {name: value for name, value in file.items() if name != "conflicting"}
        files.append(entry | {"keys": write_keys([keys], path=path, bucket=file["bucket"])})
    counts = dict(data.manifest.counts)
    counts["duplicate"] += counts.pop("conflicting")
    schema = {name: value for name, value in data.manifest.schema.items() if name != "kept_label"}
    older = dataclasses.replace(data.manifest, files=files, counts=counts, schema=schema)
    Path(path, manifest_name(older.number)).write_bytes(older.to_bytes())


@settings(max_examples=12, deadline=None)
@given(first=st.lists(rows, min_size=1, max_size=6, unique_by=lambda row: row[:4]), parts=ingests,
       older=st.integers(0, 3), compacted=st.sets(st.integers(0, 3)))  # fmt: skip
def test_a_data_set_of_an_earlier_version_goes_on_with_the_labels_of_its_rows(
    tmp_path_factory, first, parts, older, compacted
):
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch.setattr)
        log = Log(tmp_path_factory.mktemp("older"), late_days=99, max_deltas=99)
        log.add(first)
        read = list(first)
        for number, part in enumerate(parts):
            # Within one ingest an earlier version kept one label alone, so each of its ingests has an event once.
            part = list({row[:4]: row for row in part}.values()) if number < older else part
            log.add(part)
            read += part
            if number < older:
                as_an_earlier_version_left_it(log.path)
            assert log.events() == reference(read)[0]
            if number in compacted and number + 1 >= older:
                before = digest(log.path)
                build.compact(log.path)
                assert digest(log.path) == before
        another = Log(tmp_path_factory.mktemp("whole"))
        another.add(read)
        assert verify(log.path) == []
        assert digest(log.path) == digest(another.path)


def test_an_earlier_data_set_tells_how_many_duplicates_may_hide_a_label(log):
    log.add([impression(5), impression(6)])
    as_an_earlier_version_left_it(log.path)
    assert (log.data.manifest.conflicting, log.data.manifest.num_unsettled) == (0, 0)
    log.add([impression(6)])
    assert log.data.manifest.num_unsettled == 1
