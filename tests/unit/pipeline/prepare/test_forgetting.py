"""Users who must be forgotten: out of every file, and not back with any later log."""

import json
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from pipeline import build
from pipeline.events import DataError, EventColumns, Reason
from pipeline.prepare.forgetting import clean_output, read_users, traces
from pipeline.shards.dataset import Shards
from pipeline.shards.inspection import verify
from pipeline.shards.manifest import manifest_numbers
from pipeline.shards.tombstones import Tombstones
from pipeline.storage import Store

FULL = EventColumns(action="action", label="label", request_id="request_id")


@pytest.fixture(params=["integer", "string"])
def grown(request, prepare, write_log, random_log, tmp_path):
    """A data set of two ingests with a quarantine, of users 0 to 19 or "u0" to "u19"; its path and the ids' prefix."""
    prefix = "u" if request.param == "string" else ""
    for day in range(2):
        log = random_log(seed=day, events=30)
        broken = log[:5].with_columns(label=pl.lit(7, pl.Int64), user_id=pl.Series([3, 4, 3, 9, 4]))
        log = pl.concat([log, broken])
        if prefix:
            log = log.with_columns(user_id="u" + pl.col("user_id").cast(pl.String))
        write_log(log, f"log/{day}.parquet")
        prepare(
            tmp_path / "log", tmp_path / "out", columns=FULL, buckets=3, row_group_events=60, max_rejected_ratio=0.5
        )
    return str(tmp_path / "out"), prefix


def everything(path):
    """The bytes of every file below a directory, and every string cell and list of the Parquet files among them."""
    text = ""
    for found in Path(path).rglob("*"):
        if found.suffix == ".parquet":
            table = pq.read_table(found)
            text += json.dumps([table.column_names, table.to_pydict()], default=str)
        elif found.is_file():
            text += found.read_bytes().decode("latin-1")
    return text


def test_nothing_is_left_of_forgotten_users(grown):
    path, prefix = grown
    users = [f"{prefix}3", f"{prefix}4"]
    before = Shards.open(path)
    ids = pl.Series(before.index.user_id).cast(pl.String)
    gone = int(before.index.events[ids.is_in(users).to_numpy()].sum())
    assert traces(path, users)[0].endswith("2 of them")
    after = build.forget(path, users)
    assert traces(path, users) == verify(path) == []
    counts = after.counts
    assert counts["accepted"] == before.manifest.counts["accepted"] - gone
    # Their events with both labels were a second row each.
    conflicting = before.manifest.conflicting - after.conflicting
    assert counts["rejected"][Reason.FORGOTTEN_USER] == gone + conflicting
    left = pl.Series(Shards.open(path).index.user_id).cast(pl.String).to_list()
    assert left == [user for user in ids.to_list() if user not in users]
    assert manifest_numbers(Store(path)) == [3]
    if prefix:
        assert '"u3"' not in everything(path)
        assert '"u9"' in everything(path)
    # The quarantine keeps the others' rows.
    kept = pl.concat([pl.read_parquet(found) for found in Path(path, "rejected").rglob("*.parquet")])
    assert [json.loads(record)["user_id"] for record in kept["record"]] == [f"{prefix}9" if prefix else 9] * 2


def test_rows_that_come_again_are_dropped_and_kept_nowhere(grown, prepare, write_log, random_log, tmp_path):
    path, prefix = grown
    before = build.forget(path, [f"{prefix}3"]).counts
    log = random_log(seed=7)
    log = pl.concat([log, log.filter(pl.col("user_id") == 3).with_columns(label=pl.lit(9, pl.Int64))])
    if prefix:
        log = log.with_columns(user_id="u" + pl.col("user_id").cast(pl.String))
    write_log(log, "log/2.parquet")
    again = int((log["user_id"].cast(pl.String) == f"{prefix}3").sum())
    counts = prepare(tmp_path / "log", path, columns=FULL, buckets=3, row_group_events=60).manifest.counts
    assert counts["rejected"][Reason.FORGOTTEN_USER] == before["rejected"][Reason.FORGOTTEN_USER] + again
    known = counts["accepted"] + counts["duplicate"] + counts["conflicting"]
    assert counts["read"] == known + sum(counts["rejected"].values())
    # The state from before the ingest is there and knows nothing of them.
    assert len(manifest_numbers(Store(path))) == 2
    assert traces(path, [f"{prefix}3"]) == []
    assert traces(path, [f"{prefix}5"])[-1] == "manifest 3: an older state with 1 of them is still there"
    # Nobody else's turn yet: the first stays forgotten when another follows.
    build.forget(path, [f"{prefix}5"])
    assert traces(path, [f"{prefix}3", f"{prefix}5"]) == []
    write_log(log.filter(pl.col("user_id").cast(pl.String) == f"{prefix}3"), "log/3.parquet")
    last = prepare(tmp_path / "log", path, columns=FULL, buckets=3, row_group_events=60).manifest
    assert last.counts["accepted"] < counts["accepted"]
    assert verify(path) == []


def test_a_run_that_reads_an_older_state_ends_with_the_reason(grown):
    path, prefix = grown
    running, later = Shards.open(path), Shards.open(path)
    group = int(running.index.group[pl.Series(running.index.user_id).cast(pl.String).to_list().index(f"{prefix}3")])
    running.read(group)
    build.forget(path, [f"{prefix}3"])
    reads = (lambda: running.read(group), lambda: later.index, lambda: Shards.open(path, number=2))
    for read in reads:
        with pytest.raises(DataError, match="it held users who were forgotten with manifest 3; start a new run"):
            read()


def test_tombstones_name_nobody_and_need_their_key(grown):
    path, prefix = grown
    manifest = build.forget(path, [f"{prefix}3"])
    stones = Tombstones.of(path, manifest)
    assert stones is not None
    assert stones.among(pl.Series([f"{prefix}3", f"{prefix}30", None])).to_list() == [True, False, False]
    key = Path(path, "tombstones/key")
    assert key.stat().st_mode & 0o777 == 0o600
    key.rename(key.with_suffix(".lost"))
    with pytest.raises(DataError, match="forgotten users cannot be recognised; restore it"):
        Tombstones.of(path, manifest)


def test_users_whom_nobody_knows_are_remembered_as_forgotten(grown):
    path, _ = grown
    before = Shards.open(path).manifest
    assert build.forget(path, ["someone", "77"]).counts == before.counts
    assert traces(path, ["someone", "77"]) == []


def test_a_data_set_is_not_emptied(grown):
    path, prefix = grown
    with pytest.raises(DataError, match="all users of the data set; delete the directory instead"):
        build.forget(path, [f"{prefix}{n}" for n in range(20)])


def test_results_are_cleaned_too(tmp_path):
    path = str(tmp_path / "scores.parquet")
    pl.DataFrame({"user_id": [1, 2, 1], "scores": [[0.1], [0.2], [0.3]]}).write_parquet(path)
    assert clean_output(path, ["1"]) == 2
    assert pl.read_parquet(path)["user_id"].to_list() == [2]
    (tmp_path / "other.parquet").write_text("x")
    with pytest.raises(DataError, match="not a Parquet file with a column user_id"):
        clean_output(str(tmp_path / "other.parquet"), ["1"])


def test_users_are_read_from_text_and_tables(tmp_path):
    (tmp_path / "users.txt").write_text("7\n a b \n\n7\n")
    assert read_users(str(tmp_path / "users.txt")) == ["7", "a b"]
    pl.DataFrame({"user_id": [3, None, 1]}).write_parquet(tmp_path / "users.parquet")
    assert read_users(str(tmp_path / "users.parquet")) == ["1", "3"]
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "odd.parquet").write_text("x")
    for name, words in (("empty.txt", "names no user"), ("none.txt", "no such file"), ("odd.parquet", "neither text")):
        with pytest.raises(DataError, match=words):
            read_users(str(tmp_path / name))
