"""Users who must be forgotten: out of every file, and not back with any later log."""

import json
import os
import socket
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from pipeline import build
from pipeline.events import DataError, EventColumns, NotNow, Reason
from pipeline.prepare import garbage
from pipeline.prepare.forgetting import clean_output, clean_rejected
from pipeline.prepare.garbage import collect
from pipeline.prepare.traces import traces
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
    ids = pl.Series(before.user_ids).cast(pl.String)
    gone = int(before.index.events[ids.is_in(users).to_numpy()].sum())
    found = traces(path, users)
    assert found[0].startswith("index/")
    assert {line.partition("/")[0].partition(":")[0] for line in found} == {"index", "shards", "rejected", "tombstones"}
    after = build.forget(path, users)
    assert traces(path, users) == verify(path) == []
    counts = after.counts
    assert counts["accepted"] == before.manifest.counts["accepted"] - gone
    # Their events with both labels were a second row each.
    conflicting = before.manifest.conflicting - after.conflicting
    assert counts["rejected"][Reason.FORGOTTEN_USER] == gone + conflicting
    left = pl.Series(Shards.open(path).user_ids).cast(pl.String).to_list()
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
    indexes = [line for line in traces(path, [f"{prefix}5"]) if line.startswith("index/")]
    assert sorted(line.partition("(")[2] for line in indexes) == ["manifest 3)", "manifest 4)"]
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
    group = int(running.index.group[pl.Series(running.user_ids).cast(pl.String).to_list().index(f"{prefix}3")])
    running.read(group)
    build.forget(path, [f"{prefix}3"])
    reads = (lambda: running.read(group), lambda: later.index, lambda: Shards.open(path, number=2))
    for read in reads:
        reason = r"`solar forget` on .* at .* UTC; it held users who were forgotten with manifest 3; start a new run"
        with pytest.raises(DataError, match=reason):
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


def test_users_whom_nobody_knows_are_remembered_as_forgotten_and_end_no_run(grown):
    path, _ = grown
    before = Shards.open(path).manifest
    after = build.forget(path, ["someone", "77"])
    assert (after.counts, after.oldest) == (before.counts, before.oldest)
    assert traces(path, ["someone", "77"]) == []
    assert manifest_numbers(Store(path)) == [1, 2, 3]
    # Once more: nothing changes.
    assert build.forget(path, ["someone"]) == after


def test_the_key_of_the_tombstones_is_never_readable_by_others(tmp_path, monkeypatch):
    modes = []
    monkeypatch.setattr(os, "link", lambda source, target: modes.append(os.stat(source).st_mode & 0o777))
    Store(str(tmp_path)).create("tombstones/key", b"k", private=True)
    assert modes == [0o600]


@pytest.mark.parametrize("command", ["compact", "gc", "prepare", "forget"])
def test_a_killed_forget_is_completed_by_the_next_command(grown, prepare, tmp_path, monkeypatch, command):
    path, prefix = grown
    users = [f"{prefix}3"]
    # As if killed right after the commit; beside it, unfinished files of killed runs.
    with monkeypatch.context() as patch:
        patch.setattr(garbage, "remove_forgotten_states", lambda path: None)
        patch.setattr(garbage, "collect", lambda path, keep: None)
        build.forget(path, users)
    for kind in ("staging-", ".scratch-"):
        Path(path, f"{kind}{socket.gethostname()}-999999999-abc").mkdir()
    left = traces(path, users)
    assert any("(manifest 2)" in line for line in left)
    assert sum("unfinished files" in line for line in left) == 2
    if command == "prepare":
        assert prepare(tmp_path / "log", path, columns=FULL, buckets=3, row_group_events=60).reused
    else:
        commands = {"compact": build.compact, "gc": lambda path: collect(path, keep=9)}
        commands.get(command, lambda path: build.forget(path, users))(path)
    assert traces(path, users) == verify(path) == []
    assert manifest_numbers(Store(path))[0] == 3


def test_what_a_killed_ingest_wrote_of_them_is_found_and_removed(grown):
    path, prefix = grown
    unnamed = Path(path, "shards/bucket-00000-unnamed.parquet")
    for user in (f"{prefix}3", "new"):
        pl.DataFrame({"user_id": [user]}).write_parquet(unnamed)
        assert any("a killed run left it" in line for line in traces(path, [user]))
        build.forget(path, [user])
        assert not unnamed.exists()
        assert traces(path, [user]) == []


def test_nobody_is_forgotten_while_another_run_may_write(grown):
    path, prefix = grown
    Path(path, "staging-elsewhere-1-b").mkdir()
    with pytest.raises(NotNow, match="staging-elsewhere-1-b belongs to a run that may still write"):
        build.forget(path, [f"{prefix}3"])
    assert manifest_numbers(Store(path)) == [1, 2]


def test_rows_in_the_quarantine_are_found_however_they_are_written(tmp_path):
    folder = tmp_path / "rejected" / "ingest"
    folder.mkdir(parents=True)
    lines = ['7,"a ""b"" c",x', '{"user_id": "d\\u2028e", ', "9,other", "70,other", "7"]
    rows = [{"reason": "malformed row", "record": line} for line in lines]
    rows += [{"reason": "invalid label", "record": json.dumps({"user_id": user})} for user in ("007", 7, None, "None")]
    pl.DataFrame(rows).write_parquet(folder / "part-000000.parquet")
    assert clean_rejected(str(tmp_path), ["7"], integers=True) == 4
    assert clean_rejected(str(tmp_path), ['a "b" c', "d\u2028e", "None"], integers=False) == 2
    left = pl.read_parquet(folder / "part-000000.parquet")["record"].to_list()
    assert left == ["9,other", "70,other", '{"user_id": null}']


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


def test_files_that_another_command_removes_during_the_search_hold_nothing(grown, monkeypatch):
    path, prefix = grown
    everyone = [f"{prefix}{number}" for number in range(20)]
    listed, names = traces(path, everyone), Store.names
    gone = next(file for file in sorted(Path(path).glob("rejected/*/*")))
    extra = ["shards/bucket-00000-gone.parquet", "index/gone.parquet", str(gone.relative_to(path))]

    def with_removed(self, folder=""):
        return [*names(self, folder), *(name.rpartition("/")[2] for name in extra[:2] if name.startswith(folder + "/"))]

    monkeypatch.setattr(Store, "names", with_removed)
    assert traces(path, everyone) == listed
    read = Store.read
    monkeypatch.setattr(Store, "read", lambda self, name: read(self, "gone" if name == extra[2] else name))
    assert traces(path, everyone) == [line for line in listed if not line.startswith(extra[2])]
