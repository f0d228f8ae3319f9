"""Prepare, its tasks run in this process: merging, refusing, leaving nothing behind. Ray itself: tests/integration."""

import json
import os
import shutil
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import build
from pipeline.events import DataError, EventColumns, Reason
from pipeline.prepare import ingest, log_parts, plan
from pipeline.shards import event_keys, manifest
from pipeline.shards.dataset import Shards, bucket_of
from pipeline.shards.inspection import digest, verify
from pipeline.shards.manifest import current_manifest
from tests.support.serial import without_ray

FULL = EventColumns(action="action", label="label", request_id="request_id")


def names(out):
    return sorted(str(path.relative_to(out)) for path in Path(out).rglob("*") if path.is_file())


def test_every_row_is_accepted_duplicate_or_rejected(prepare, tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\n" + "1,2,3\n1,2,3\n2,2,3\n,2,3\n1,2\n1,2,x\n")
    counts = prepare(path, tmp_path / "out", max_rejected_ratio=0.5).manifest.counts
    rejected = {Reason.MALFORMED_ROW: 1, Reason.MISSING_USER: 1, Reason.INVALID_TIME: 1}
    assert counts == {"read": 6, "accepted": 2, "duplicate": 1, "rejected": rejected}
    (found,) = (tmp_path / "out/rejected").rglob("*.parquet")
    kept = pl.read_parquet(found)
    assert dict(kept["reason"].value_counts().rows()) == rejected
    assert kept["file"].unique().to_list() == [f"{tmp_path.name}/log.csv"]
    assert verify(str(tmp_path / "out")) == []


def test_the_same_inputs_are_reused_and_give_the_same_bytes(prepare, write_log, random_log, tmp_path):
    write_log(random_log(), row_group_size=50)
    first = prepare(tmp_path / "log", tmp_path / "a")
    again = prepare(tmp_path / "log", tmp_path / "a")
    assert (first.reused, again.reused) == (False, True)
    assert again.manifest == first.manifest
    prepare(tmp_path / "log", tmp_path / "b")
    assert names(tmp_path / "a") == names(tmp_path / "b")
    for name in names(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 999), text_ids=st.booleans(), late_days=st.sampled_from([0, 1, 9]),
    max_deltas=st.sampled_from([0, 1, 8]),
)  # fmt: skip
def test_any_split_into_ingests_in_any_order_has_the_same_digest(
    tmp_path_factory, seed, text_ids, late_days, max_deltas
):
    import numpy as np

    rng, root, size = np.random.default_rng(seed), tmp_path_factory.mktemp("split"), 90
    time = rng.integers(0, 6, size) * 86_400 + rng.integers(0, 3, size)
    log = pl.DataFrame(
        {
            "user_id": rng.integers(0, 6, size), "item_id": rng.integers(0, 4, size), "timestamp": time,
            "action": rng.choice(["a", "b", ""], size), "label": rng.integers(0, 3, size),
            "request_id": [[1, 2, None][n] for n in rng.integers(0, 3, size)], "ingest": rng.integers(0, 4, size),
        }
    )  # fmt: skip
    if text_ids:
        log = log.with_columns(pl.col("user_id", "item_id").cast(pl.String))
    config = build.PrepareConfig(
        columns=FULL, buckets=3, max_rejected_ratio=0.9, row_group_events=7, late_days=late_days, max_deltas=max_deltas
    )
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch.setattr)
        # Days so small would all be worth reading: here the days of late_days are read alone.
        patch.setattr(event_keys, "_WORTH_READING", 0)
        (root / "whole").mkdir()
        log.drop("ingest").write_parquet(root / "whole/log.parquet")
        whole, parts = str(root / "a"), str(root / "b")
        build.prepare(str(root / "whole"), whole, config=config)
        rows = {}
        for part in log.partition_by("ingest", include_key=False, maintain_order=True):
            (root / "parts").mkdir(exist_ok=True)
            part.write_parquet(root / f"parts/{part.height}-{rng.integers(1 << 40)}.parquet")
            build.prepare(str(root / "parts"), parts, config=config)
            data = Shards.open(parts)
            now = {raw: row for row, raw in enumerate(data.vocabulary.items.to_pylist())}
            users = {raw: row for row, raw in enumerate(data.user_ids.to_pylist())}
            assert rows.items() <= (now | {("user", u): r for u, r in users.items()}).items()
            rows = now | {("user", u): r for u, r in users.items()}
            assert verify(parts) == []
        assert digest(whole) == digest(parts)
        before = [Shards.open(parts).manifest.counts, digest(parts)]
        build.compact(parts)
    assert max(len(Shards.open(parts).files_of(bucket)) for bucket in Shards.open(parts).buckets) == 1
    assert verify(whole) == verify(parts) == []
    assert digest(parts) == before[1]
    # What compaction finds is a duplicate after all: the counts are those of one ingest.
    assert Shards.open(parts).manifest.counts == Shards.open(whole).manifest.counts
    assert before[0]["accepted"] >= Shards.open(parts).manifest.counts["accepted"]


def test_only_new_inputs_are_read_and_only_what_came_is_written(prepare, write_log, random_log, tmp_path, monkeypatch):
    write_log(random_log(), "log/1.parquet")
    first = prepare(tmp_path / "log", tmp_path / "out", buckets=8).manifest
    write_log({"user_id": [0], "item_id": [100], "timestamp": [99_999], "action": ["view"], "label": [1],
               "request_id": [1]}, "log/2.parquet")  # fmt: skip
    read = []
    original = log_parts.stage_part
    monkeypatch.setattr(
        log_parts, "stage_part", lambda part, **named: read.append(part.input.name) or original(part, **named)
    )
    second = prepare(tmp_path / "log", tmp_path / "out", buckets=8).manifest
    assert read == ["log/2.parquet"]
    assert (second.number, second.parent) == (2, first.fingerprint)
    assert second.counts["accepted"] == first.counts["accepted"] + 1
    (added,) = [file for file in second.files if file not in first.files]
    assert [file for file in second.files if file != added] == first.files
    assert (added["bucket"], added["rows"], added["events"]) == (bucket_of(pl.Series([0]), buckets=8)[0], 1, 1)
    assert Shards.open(str(tmp_path / "out"), number=1).manifest == first


def test_items_give_features_and_newer_items_replace_them(prepare, write_log, tmp_path):
    write_log({"user_id": [1, 1], "item_id": [5, 6], "timestamp": [1, 2]})
    write_log({"item_id": [5, 9], "genre": [["b", "a"], ["z"]], "year": [1999, 2000]}, "log/items.parquet")
    prepare(tmp_path / "log", tmp_path / "out")
    features = Shards.open(str(tmp_path / "out")).vocabulary.features
    assert (features["genre"].names, features["genre"].values.tolist()) == (("a", "b"), [3, 2])
    assert features["year"].names == ("1999",)
    write_log({"item_id": [6], "genre": [["c"]], "year": [1999]}, "new/items.parquet")
    grown = prepare(tmp_path / "log", tmp_path / "out", items=str(tmp_path / "new/items.parquet"))
    assert (grown.reused, grown.manifest.number) == (False, 2)
    assert Shards.open(str(tmp_path / "out")).vocabulary.features["genre"].offsets.tolist() == [0, 0, 0, 2, 3]
    assert verify(str(tmp_path / "out")) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"buckets": 5}, r"prepared with buckets = 16, this run has 5; use the same"),
        ({"columns": EventColumns(timestamp_unit="ms")}, r"columns.timestamp_unit = 's', this run has 'ms'"),
    ],
)
def test_another_config_is_refused_by_key_and_values(prepare, write_log, tmp_path, change, words):
    write_log({"user_id": [1], "item_id": [5], "timestamp": [1]})
    prepare(tmp_path / "log", tmp_path / "out")
    with pytest.raises(DataError, match=words):
        prepare(tmp_path / "log", tmp_path / "out", **change)


def test_an_input_that_changed_is_refused_by_name(prepare, write_log, tmp_path):
    write_log({"user_id": [1], "item_id": [5], "timestamp": [1]})
    prepare(tmp_path / "log", tmp_path / "out")
    write_log({"user_id": [1], "item_id": [5], "timestamp": [2]})
    with pytest.raises(DataError, match=r"log/events.parquet: its bytes changed after it was ingested"):
        prepare(tmp_path / "log", tmp_path / "out")


def test_a_change_in_the_middle_of_a_large_file_is_seen_by_its_time_and_a_copy_is_none(prepare, tmp_path):
    log, shards = tmp_path / "log", tmp_path / "shards"
    log.mkdir()
    rows = [f"{index % 30},{10 + index % 80},{1_700_000_000 + index}\n" for index in range(9_000)]
    text = "".join(["user_id,item_id,timestamp\n", *rows])
    (log / "a.csv").write_text(text)
    assert (log / "a.csv").stat().st_size > 2 * 64 * 1024
    prepare(log, shards)
    (log / "a.csv").write_text(text)
    assert prepare(log, shards).reused
    (log / "a.csv").write_text(text.replace(rows[4_500], f"7{rows[4_500][1:]}"))
    with pytest.raises(DataError, match=r"log/a.csv: its bytes changed after it was ingested"):
        prepare(log, shards)


def test_a_column_that_only_later_files_have_is_told_as_left_out(prepare, write_log, tmp_path):
    plain = {"user_id": [1], "item_id": [5], "timestamp": [1]}
    write_log(plain, "log/a.parquet")
    write_log(plain | {"timestamp": [2], "label": [0]}, "log/b.parquet")
    [told] = prepare(tmp_path / "log", tmp_path / "out").left_out
    assert told == "column 'label' of log/b.parquet: the data set is read without it"
    for name in ("c", "d"):
        write_log(plain | {"timestamp": [3], "item_id": [ord(name)], "action": ["buy"]}, f"log/{name}.parquet")
    [told] = prepare(tmp_path / "log", tmp_path / "out").left_out
    assert told == "column 'action' of log/c.parquet and 1 more files: the data set is read without it"
    write_log(plain | {"timestamp": [4], "label": [0]}, "log/e.parquet")
    mapped = EventColumns(item_id="item_id")
    assert prepare(tmp_path / "log", tmp_path / "out", columns=mapped).left_out == []


def test_a_moved_log_is_known_by_its_bytes(prepare, write_log, tmp_path):
    write_log({"user_id": [1], "item_id": [5], "timestamp": [1]})
    prepare(tmp_path / "log", tmp_path / "out")
    (tmp_path / "log").rename(tmp_path / "moved")
    assert prepare(tmp_path / "moved", tmp_path / "out").reused


BAD_LOGS = {
    "all invalid": ("user_id,item_id,timestamp\n,1,2\n,1,2\n", r"all 2 rows are invalid \(missing user: 2\)"),
    "empty": ("", r"no column|empty"),
    "header only": ("user_id,item_id,timestamp\n", "the log is empty"),
    "above the ratio": (
        "user_id,item_id,timestamp\n1,1,1\n1,1,x\n", r"1 of 2 rows are invalid \(invalid time: 1\), above .*rejected/"
    ),
    "missing column": ("user,item_id,timestamp\n1,1,1\n", "no column 'user_id'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LOGS)
@pytest.mark.parametrize("existing", [False, True])
def test_a_bad_log_fails_in_one_line_and_the_earlier_data_set_stands(prepare, tmp_path, case, existing):
    text, words = BAD_LOGS[case]
    out = tmp_path / "out"
    if existing:
        (tmp_path / "good.csv").write_text("user_id,item_id,timestamp\n1,1,1\n")
        prepare(tmp_path / "good.csv", out)
    before = current_manifest(str(out))
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        prepare(tmp_path / "bad.csv", out)
    assert "\n" not in str(caught.value)
    assert "bad.csv" in str(caught.value)
    assert current_manifest(str(out)) == before
    left = {name.split("/")[0] for name in names(out)} if out.exists() else set()
    assert left <= (
        {"rejected"} if not existing else {"rejected", "shards", "keys", "index", "vocabulary", "manifests"}
    )


def test_a_file_that_breaks_in_a_later_task_leaves_the_earlier_data_set(prepare, write_log, random_log, tmp_path):
    write_log(random_log(), "log/1.parquet")
    first = prepare(tmp_path / "log", tmp_path / "out").manifest
    path = write_log({"user_id": range(5000), "item_id": range(5000), "timestamp": 7, "action": "a", "label": 1,
                      "request_id": 1}, "log/2.parquet", compression="zstd")  # fmt: skip
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"log/2.parquet: damaged Parquet data"):
        prepare(tmp_path / "log", tmp_path / "out")
    assert current_manifest(str(tmp_path / "out")) == first
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith("staging")]


def test_a_crash_before_the_commit_leaves_nothing_to_read(prepare, write_log, tmp_path, monkeypatch):
    write_log({"user_id": [1], "item_id": [5], "timestamp": [1]})

    def crash(*arguments, **named):
        raise RuntimeError("power cut")

    monkeypatch.setattr(manifest, "commit", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        prepare(tmp_path / "log", tmp_path / "out")
    assert current_manifest(str(tmp_path / "out")) is None
    monkeypatch.undo()


def test_the_loser_of_a_race_is_told_and_the_winner_stands(prepare, write_log, tmp_path, monkeypatch):
    write_log({"user_id": [1], "item_id": [5], "timestamp": [1]}, "log/1.parquet")
    prepare(tmp_path / "log", tmp_path / "out")
    write_log({"user_id": [1], "item_id": [5], "timestamp": [2]}, "log/2.parquet")
    original = ingest.finish

    def overtaken(*arguments, **named):
        mine = original(*arguments, **named)
        manifest.commit(str(tmp_path / "out"), mine)
        return mine

    monkeypatch.setattr(ingest, "finish", overtaken)
    with pytest.raises(DataError, match="another prepare committed manifest 2 first"):
        prepare(tmp_path / "log", tmp_path / "out")


def test_a_directory_that_holds_something_else_is_refused(prepare, write_log, tmp_path):
    write_log({"user_id": [1], "item_id": [5], "timestamp": [1]})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("")
    with pytest.raises(DataError, match=r"holds 'thesis.tex'"):
        prepare(tmp_path / "log", tmp_path / "out")


def test_too_little_disk_is_refused_before_any_work(prepare, write_log, tmp_path, monkeypatch):
    write_log({"user_id": [1], "item_id": [5], "timestamp": [1]})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="free some disk"):
        prepare(tmp_path / "log", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_dead_process_staged_is_removed(prepare, write_log, tmp_path):
    import socket

    write_log({"user_id": [1], "item_id": [5], "timestamp": [1]})
    for name in (f"staging-{socket.gethostname()}-999999999-a", "staging-elsewhere-1-b"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "file").write_text("")
    prepare(tmp_path / "log", tmp_path / "out")
    left = [name for name in os.listdir(tmp_path / "out") if name.startswith("staging")]
    assert left == ["staging-elsewhere-1-b"]


def test_an_object_store_works_like_a_directory(prepare, write_log, random_log, tmp_path):
    import uuid

    write_log(random_log())
    out = f"memory://{uuid.uuid4().hex}"
    prepare(tmp_path / "log", tmp_path / "local")
    prepare(tmp_path / "log", out)
    assert digest(out) == digest(str(tmp_path / "local"))
    assert current_manifest(out) == current_manifest(str(tmp_path / "local"))
    assert verify(out) == []


def test_prepare_without_ray_says_so(tmp_path, monkeypatch):
    # Another test of the same session may have started Ray.
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(RuntimeError, match=r"ray.init"):
        build.prepare("x", str(tmp_path), config=build.PrepareConfig())


@pytest.mark.parametrize(
    ("name", "value"),
    [("buckets", 0), ("max_rejected_ratio", 2), ("row_group_events", 0), ("memory_gib", 0), ("late_days", -1),
     ("max_deltas", -1)],
)  # fmt: skip
def test_a_wrong_prepare_config_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}: it must be"):
        build.PrepareConfig(**{name: value})


def test_a_manifest_names_neither_the_machine_nor_the_time(prepare, write_log, tmp_path):
    write_log({"user_id": [1], "item_id": [5], "timestamp": [1]})
    text = prepare(tmp_path / "log", tmp_path / "out").manifest.to_bytes().decode()
    assert str(tmp_path) not in text
    assert json.loads(text)["inputs"][0]["name"] == "log/events.parquet"


def test_the_first_ingest_decides_how_many_buckets_there_are(prepare, write_log, random_log, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "_BUCKET_ROWS", 10)
    log = random_log()
    write_log(log, "log/1.parquet")
    made = prepare(tmp_path / "log", tmp_path / "out").manifest.config["buckets"]
    assert made == -(-log.height // 10) > 16
    write_log(random_log(seed=1, events=90), "log/2.parquet")
    assert prepare(tmp_path / "log", tmp_path / "out").manifest.config["buckets"] == made


def test_events_that_do_not_fit_into_memory_are_refused_with_what_helps(prepare, write_log, random_log, tmp_path):
    write_log(random_log())
    with pytest.raises(DataError, match=r"need about .* GiB, memory_gib is 1e-08: raise it, .*more than 16 buckets"):
        prepare(tmp_path / "log", tmp_path / "out", memory_gib=1e-8)
    assert current_manifest(str(tmp_path / "out")) is None


def test_tasks_share_the_memory(monkeypatch, prepare, write_log, random_log, tmp_path):
    write_log(random_log())
    asked, original = [], build._map

    def spy(function, rows, *, stage, report, at_once=None, **named):
        asked.append((stage, at_once))
        return original(function, rows, stage=stage, report=report, at_once=at_once, **named)

    monkeypatch.setattr(build, "_map", spy)
    manifest = prepare(tmp_path / "log", tmp_path / "out", buckets=2, memory_gib=1.0).manifest
    largest = max(entry["events"] for entry in manifest.files)
    assert asked[0] == ("read", None)
    assert 0 < dict(asked)["build"] <= 2**30 // (250 * largest)


def test_times_below_a_millisecond_order_the_events_of_a_new_data_set_alone(prepare, write_log, tmp_path):
    moment = 1_709_164_800.0
    write_log({"user_id": [1] * 3, "item_id": [7, 8, 9], "timestamp": [moment + 0.0002, moment + 0.0001, moment]})
    write_log({"user_id": [1, 2], "item_id": [5, 5], "timestamp": [moment - 1, moment]}, "log/whole.parquet")
    prepare(tmp_path / "log", tmp_path / "fine", buckets=1)
    fine = Shards.open(str(tmp_path / "fine"))
    assert fine.manifest.schema["columns"] == ["user_id", "item_id", "timestamp", "order"]
    rows = fine.read_table(fine.groups_of(0)[0]).to_pylist()
    assert [fine.vocabulary.items.to_pylist()[item - 2] for item in rows[0]["item"]] == [5, 9, 8, 7]
    assert rows[0]["order"] == [0, 0, 100_000, 200_000]
    # It goes on so, also with files of whole milliseconds and with columns that are added.
    write_log({"user_id": [1], "item_id": [6], "timestamp": [int(moment) + 1], "action": ["a"]}, "log/z.parquet")
    columns = EventColumns(action="action")
    grown = prepare(tmp_path / "log", tmp_path / "fine", columns=columns).manifest
    assert grown.schema["columns"] == ["user_id", "item_id", "timestamp", "order", "action"]
    assert verify(str(tmp_path / "fine")) == []

    # A data set that began with whole milliseconds has no order later either, and says so.
    assert prepare(tmp_path / "log/whole.parquet", tmp_path / "whole").notes == []
    later = prepare(tmp_path / "log/events.parquet", tmp_path / "whole")
    assert later.manifest.schema["columns"] == ["user_id", "item_id", "timestamp"]
    assert later.manifest.counts["accepted"] == 5
    [note] = later.notes
    assert note.startswith("what times have below the millisecond is left out, as in the data set so far, so that")


def test_times_in_another_unit_are_refused_unless_the_data_set_has_such_times(prepare, write_log, tmp_path):
    now = 1_709_164_800
    write_log({"user_id": [1, 2], "item_id": [5, 5], "timestamp": [now * 1_000] * 2})
    with pytest.raises(DataError, match=r"2 of 2 times .* as ms, not as s: set columns.timestamp_unit ms"):
        prepare(tmp_path / "log", tmp_path / "out", max_rejected_ratio=1)
    columns = EventColumns(timestamp_unit="ms")
    assert prepare(tmp_path / "log", tmp_path / "out", columns=columns).notes == []
    # Later files in seconds.
    write_log({"user_id": [3], "item_id": [5], "timestamp": [now]}, "log/later.parquet")
    with pytest.raises(DataError, match=r"as s, not as ms: write them as ms, as the data set's, or prepare a new dir"):
        prepare(tmp_path / "log", tmp_path / "out")
    # Later files with dates.
    write_log({"user_id": [3], "item_id": [5], "timestamp": [20240229]}, "dates/a.parquet")
    with pytest.raises(
        DataError, match=r"in column 'timestamp', such as 20240229, lie .* prepare a new directory with"
    ):
        prepare(tmp_path / "dates", tmp_path / "out")
    dated = prepare(tmp_path / "dates", tmp_path / "dated", columns=EventColumns(timestamp_unit="date")).manifest
    assert dated.time_range == [now * 1_000] * 2
    # A data set that counts its milliseconds from the start of the log.
    write_log({"user_id": [3], "item_id": [5], "timestamp": [12]}, "own/first.parquet")
    first = prepare(tmp_path / "own", tmp_path / "counted", columns=columns)
    assert first.notes == ["1 of 1 times lie before 1990 or after tomorrow"]
    write_log({"user_id": [3], "item_id": [5], "timestamp": [now]}, "own/second.parquet")
    assert prepare(tmp_path / "own", tmp_path / "counted").manifest.counts["accepted"] == 2
    # One that an earlier version began with dates that were read as counts goes on as it began, and says so.
    write_log({"user_id": [3], "item_id": [5], "timestamp": [20240229]}, "own/third.parquet")
    third = prepare(tmp_path / "own", tmp_path / "counted")
    assert third.manifest.counts["accepted"] == 3
    told = "1 of 1 times lie before 1990 or after tomorrow; 20240229 would not as dates (YYYYMMDD)"
    assert third.notes == [told]


def test_a_refused_log_shows_a_value_by_its_row_also_beside_forgotten_users(prepare, tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log/a.csv").write_text("user_id,item_id,timestamp\nu1,a,5\nu2,a,5\n")
    prepare(tmp_path / "log", tmp_path / "out")
    build.forget(str(tmp_path / "out"), ["u1"])
    (tmp_path / "log/b.csv").write_text("user_id,item_id,timestamp\nu1,a,x\nu1,a\nu2,a,never\n")
    with pytest.raises(
        DataError, match=r"for example 'u1,a' \(malformed row, row 2 of .*'never' \(.*row 3 of log/b.csv"
    ):
        prepare(tmp_path / "log", tmp_path / "out")
