"""Care of a data set that grew: compaction, removal of old states, migration from the previous format."""

import os
import socket

import polars as pl
import pytest

from pipeline import build
from pipeline.events import DataError, EventColumns
from pipeline.prepare.garbage import collect
from pipeline.shards.dataset import Shards
from pipeline.shards.inspection import digest, verify
from pipeline.shards.manifest import manifest_numbers, read_manifest
from pipeline.storage import Store

FULL = EventColumns(action="action", label="label", request_id="request_id")


@pytest.fixture
def grown(prepare, write_log, random_log, tmp_path):
    """A data set of three ingests; its path."""
    for day in range(3):
        log = random_log(seed=day, events=30).with_columns(timestamp=pl.col("timestamp") + day * 86_400)
        write_log(log, f"log/{day}.parquet")
        prepare(tmp_path / "log", tmp_path / "out", columns=FULL, buckets=3, row_group_events=60)
    return str(tmp_path / "out")


def files(path):
    return sorted(str(found.relative_to(path)) for found in path.rglob("*") if found.is_file())


def test_compaction_leaves_one_file_a_bucket_and_the_same_content(grown):
    before = Shards.open(grown)
    groups = [before.num_groups, [e["groups"] for e in before.manifest.files]]
    assert max(len(before.files_of(bucket)) for bucket in before.buckets) == 3, groups
    ids, content = before.user_ids, digest(grown)
    build.compact(grown)
    after = Shards.open(grown)
    assert [len(after.files_of(bucket)) for bucket in after.buckets] == [1, 1, 1]
    assert after.manifest.parent == before.manifest.fingerprint
    assert after.user_ids == ids
    assert (digest(grown), verify(grown)) == (content, [])
    sizes = [after.read(group) for group in range(after.num_groups)]
    assert all(len(events.item) <= 60 or events.num_users == 1 for events in sizes)
    assert build.compact(grown) == after.manifest


def test_a_bucket_with_too_many_files_is_compacted_by_the_ingest(prepare, write_log, tmp_path):
    for day in range(4):
        write_log({"user_id": [1], "item_id": [5], "timestamp": [day]}, f"log/{day}.parquet")
        manifest = prepare(tmp_path / "log", tmp_path / "out", buckets=1, max_deltas=2).manifest
        assert len(manifest.files) == [1, 2, 3, 1][day]
    # The ingest and the compaction are two states.
    assert manifest.number == 5
    assert read_manifest(str(tmp_path / "out"), number=4).inputs == manifest.inputs


def test_old_events_that_come_again_are_duplicates_after_compaction(prepare, write_log, tmp_path):
    old = {"user_id": [1] * 300, "item_id": [5] * 300, "timestamp": list(range(300))}
    write_log(old, "log/0.parquet")
    write_log({"user_id": [1], "item_id": [5], "timestamp": [99 * 86_400]}, "log/1.parquet")
    prepare(tmp_path / "log", tmp_path / "out")
    again = {"user_id": [1, 1], "item_id": [5, 5], "timestamp": [7, 100 * 86_400]}
    write_log(again, "log/2.parquet")
    manifest = prepare(tmp_path / "log", tmp_path / "out").manifest
    assert (manifest.counts["accepted"], manifest.counts["duplicate"]) == (303, 0)
    assert sum(file["unchecked"] for file in manifest.files) == 1
    data = Shards.open(str(tmp_path / "out"))
    # A reader never sees it twice.
    assert len(data.read(0).item) == 302
    assert verify(str(tmp_path / "out")) == []
    counts = build.compact(str(tmp_path / "out")).counts
    assert (counts["read"], counts["accepted"], counts["duplicate"]) == (303, 302, 1)
    assert Shards.open(str(tmp_path / "out")).index.events.tolist() == [302]


def test_a_column_that_came_later_is_empty_before(prepare, write_log, tmp_path):
    write_log({"user_id": [1, 2], "item_id": [5, 5], "timestamp": [1, 1]}, "log/0.parquet")
    prepare(tmp_path / "log", tmp_path / "out", buckets=1)
    write_log({"user_id": [1], "item_id": [6], "timestamp": [2], "how": ["buy"]}, "log/1.parquet")
    prepare(tmp_path / "log", tmp_path / "out", buckets=1, columns=EventColumns(action="how"))
    write_log({"user_id": [2], "item_id": [6], "timestamp": [0]}, "log/2.parquet")
    prepare(tmp_path / "log", tmp_path / "out", buckets=1)
    for _ in range(2):
        events = Shards.open(str(tmp_path / "out")).raw_events(range(1))
        assert events["action"].to_list() == [None, "buy", None, None]
        assert events["timestamp"].to_list() == [1000, 2000, 0, 1000]
        assert verify(str(tmp_path / "out")) == []
        build.compact(str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"columns.label = None, this run has 'liked'"):
        prepare(tmp_path / "log", tmp_path / "out", buckets=1, columns=EventColumns(label="liked", action="how"))


def test_old_states_stay_readable_until_they_are_collected(grown, tmp_path):
    build.compact(grown)
    for number in (1, 2, 3, 4):
        assert verify(grown, number=number) == []
    (tmp_path / "out/.scratch-left").mkdir()
    (tmp_path / "out/shards/.scratch-elsewhere-7-x").write_text("x")
    (tmp_path / "out/shards/bucket-00000-of-a-killed-run.parquet").write_text("x")
    removed = collect(grown, keep=2)
    assert removed.manifests == [1, 2]
    assert removed.files > 1 < removed.bytes
    assert manifest_numbers(Store(grown)) == [3, 4]
    assert verify(grown, number=3) == verify(grown, number=4) == []
    collect(grown, keep=1)
    named = {entry["name"] for entry in Shards.open(grown).manifest.entries()}
    removals = {"removals/00000002.json", "removals/00000003.json"}
    assert set(files(tmp_path / "out")) == named | {"manifests/00000004.json"} | removals
    with pytest.raises(DataError, match=r"no manifests/00000009.json; there are \[4\]"):
        Shards.open(grown, number=9)


def test_a_file_that_is_finished_while_gc_lists_is_no_error(grown, tmp_path, monkeypatch):
    size = Store.size

    def sized(store, name):
        (tmp_path / "out/requests/.scratch-elsewhere-7-x").unlink(missing_ok=True)
        return size(store, name)

    (tmp_path / "out/requests").mkdir(exist_ok=True)
    (tmp_path / "out/requests/.scratch-elsewhere-7-x").write_text("x")
    monkeypatch.setattr(Store, "size", sized)
    assert collect(grown, keep=1).manifests == [1, 2]


def test_nothing_is_collected_while_another_run_may_write(grown, tmp_path):
    for name in (f"staging-{socket.gethostname()}-{os.getpid()}-a", "staging-elsewhere-1-b"):
        (tmp_path / "out" / name).mkdir()
        with pytest.raises(DataError, match=f"{name} belongs to a run that may still write"):
            collect(grown, keep=1)
        (tmp_path / "out" / name).rmdir()
    assert len(manifest_numbers(Store(grown))) == 3
