"""States of users: built from shards, scored with what came since, refused where they do not belong."""

from __future__ import annotations

import errno
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cluster.session import ClusterConfig
from jobs.host.console import Console
from jobs.host.errors import UserError
from jobs.scorer import packed_states, user_states
from jobs.scorer.histories import NO_TIME, flat_ranges
from jobs.serving.build_states import build_states
from jobs.serving.ranking import ScoreConfig
from jobs.serving.score import score
from jobs.serving.stored_states import find_states
from jobs.serving.user_histories import UserHistories
from pipeline import storage
from pipeline.events import DataError, EventColumns, NotNow
from pipeline.shards.dataset import Shards
from pipeline.storage import Store
from tests.support.serial import command_without_ray


@pytest.fixture
def long_log(prepare, write_log, tmp_path):
    """Three users with 2,000, 700 and 20 events, some minutes apart."""
    rng = np.random.default_rng(4)
    sizes = [2000, 700, 20]
    users = np.repeat([1, 2, 3], sizes)
    write_log(
        {
            "user_id": users,
            "item_id": rng.integers(100, 160, len(users)),
            "timestamp": 1_700_000_000 + np.concatenate([60 * (1 + rng.integers(0, 3, n)).cumsum() for n in sizes]),
            "action": rng.choice(["click", "view"], len(users)),
        }
    )
    prepare(tmp_path / "log", tmp_path / "shards", columns=EventColumns(action="action"), buckets=2)
    return Shards.open(str(tmp_path / "shards"))


def raw_history(scorer, data, users):
    return UserHistories(data, scorer).read(np.array(users))


def first_events(histories, lengths):
    return histories.events(flat_ranges(histories.offsets[:-1], lengths), lengths)


def candidates(scorer, num=30):
    return np.arange(0, 3 * num + 1, num), np.tile(np.arange(2, 2 + num), 3)


@pytest.mark.parametrize("since", [0, 2, 50, 400])
@pytest.mark.parametrize("repeats", [True, False])
def test_a_state_with_what_came_since_scores_as_the_history(long_log, export, since, repeats, monkeypatch):
    monkeypatch.setattr(packed_states, "WHOLE_EVENTS", 200)
    scorer = export(long_log, max_history=10_000, repeats=repeats).scorer()
    users = [scorer_users(long_log, user) for user in (1, 2, 3)]
    whole = raw_history(scorer, long_log, users)
    before = whole.lengths - np.minimum(since, whole.lengths - 10)
    states = scorer.build_states(first_events(whole, before))
    stored = scorer.states(pa.array(states, pa.large_binary()))
    assert stored.stored is not None
    assert stored.stored.length.tolist() == before[: 1 if repeats else 2].tolist()
    later = whole.events(
        flat_ranges(whole.offsets[:-1] + before, whole.lengths - before),
        whole.lengths - before,
    )
    stored = user_states.with_latest(stored, later, timed=np.ones(3, bool))
    time, (offsets, row) = np.full(3, NO_TIME), candidates(scorer)
    expected = scorer.logits(*scorer.shown(whole, time), offsets, row)
    found = scorer.logits(*scorer.shown(stored, time), offsets, row)
    assert np.abs(expected).max() > 0.5
    # Measured: 2e-5 (the Gram is kept in float32).
    assert np.quantile(np.abs(found - expected), 0.99) <= 1e-3
    order = np.array([2, 0, 0, 1])
    some = scorer.logits(scorer.shown(stored, time)[0].take(order), time[:1].repeat(4) * 0, np.arange(5), row[:4])
    assert np.isfinite(some).all()


def scorer_users(data, user):
    return data.user_ids.to_pylist().index(user)


@pytest.fixture
def serial(monkeypatch):
    """States are built in this process; test_score_parts.py has Ray's actors."""
    command_without_ray(monkeypatch.setattr)


def built(model, data, out, **options):
    return build_states(
        model, shards=data.path, manifest=None, out=out, console=Console(), cluster=ClusterConfig(), **options
    )


def ask(model, tmp_path, columns, **config):
    file, out = tmp_path / "requests.parquet", tmp_path / "scores.parquet"
    pq.write_table(pa.table(columns), file)
    counts = score(model, ScoreConfig(requests=str(file), out=str(out), overwrite=True, **config), Console())
    return pq.read_table(out).to_pylist(), counts


def assert_same_scores(found, expected):
    assert [row["user_id"] for row in found] == [row["user_id"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        scores = dict(zip(other["candidates"], other["scores"], strict=True))
        assert [scores[item] for item in one["candidates"]] == pytest.approx(one["scores"], abs=1e-3)


@pytest.mark.usefixtures("serial")
def test_users_are_scored_from_their_states_and_others_from_raw_histories(long_log, export, tmp_path, monkeypatch):
    model, out = export(long_log, max_history=10_000), tmp_path / "states"
    states = built(model, long_log, out, parallel=1)
    assert (states.users, states.manifest, states.reused) == (3, 1, False)
    assert states.bytes / states.users > 5_000
    again = built(model, long_log, out)
    assert (again.reused, again.users, again.bytes) == (True, 3, states.bytes)
    last = {user: max(time) for user, time in times_of(long_log).items()}
    asked = {"user_id": [1, 2, 3, 9, 1], "candidates": [list(range(100, 160))] * 5}
    expected, _ = ask(model, tmp_path, asked, shards=long_log.path)
    found, counts = ask(model, tmp_path, asked, states=str(out))
    assert_same_scores(found, expected)
    assert (counts.from_states, counts.without_state, counts.unknown_users, counts.cold) == (4, 1, 1, 1)
    # Events after the state, of a user without one too; those up to its time are known to it already.
    minute = 60_000
    latest = {
        "latest": [[101, 999], [102], [], [103], [101, 150]],
        "latest_time": [
            [last[1] + minute, last[1] + 9 * minute],
            [last[2]],
            [],
            [last[1] + minute],
            [last[1] + minute, 0],
        ],
        "latest_action": [["click", "view"], [None], [], ["view"], ["click", "click"]],
    }
    expected, _ = ask(model, tmp_path, asked | latest, shards=long_log.path)
    found, counts = ask(model, tmp_path, asked | latest, states=str(out), shards=long_log.path)
    assert_same_scores(found, expected)
    without, _ = ask(model, tmp_path, asked, shards=long_log.path)
    changed = [a["scores"] != pytest.approx(b["scores"], abs=1e-2) for a, b in zip(found, without, strict=True)]
    assert changed == [True, False, False, True, True]
    # A request of an earlier time cannot use a state that has later events.
    early = asked | {"time": [last[1] - minute, last[2] + 1, last[3] + 1, None, last[1] + 1]}
    expected, _ = ask(model, tmp_path, early, shards=long_log.path)
    found, counts = ask(model, tmp_path, early, states=str(out), shards=long_log.path)
    assert_same_scores(found, expected)
    assert (counts.from_states, counts.without_state) == (3, 2)
    with pytest.raises(UserError, match="row 0: the user's state has events at or after column 'time'"):
        ask(model, tmp_path, early, states=str(out))


def times_of(data):
    events = data.raw_events(range(data.num_groups))
    return {user[0]: part["timestamp"].to_list() for user, part in events.group_by("user_id")}


@pytest.mark.usefixtures("serial")
def test_states_of_another_model_are_refused_and_incomplete_ones_do_not_exist(long_log, export, tmp_path, capsys):
    model, other = export(long_log), export(long_log, name="other", rank=3)
    out, asked = tmp_path / "states", {"user_id": [1], "candidates": [[100]]}
    built(model, long_log, out)
    with pytest.raises(UserError, match=r"states of tiny .*, not of models:/tiny/1"):
        ask(other, tmp_path, asked, states=str(out))
    with pytest.raises(UserError, match=r"holds states of tiny version 1 .* name another --out"):
        built(other, long_log, out)
    plain = export(long_log, name="plain", interests=False)
    with pytest.raises(UserError, match="solar needs raw histories, it has no interests to store"):
        built(plain, long_log, tmp_path / "plain")
    # Half-built is not built: the next run takes what is whole.
    commit = out / "00000001" / "COMMIT"
    files = json.loads(commit.read_text())["files"]
    commit.unlink()
    (out / "00000001" / files[0]["name"]).unlink()
    with pytest.raises(UserError, match="has no complete states"):
        ask(model, tmp_path, asked, states=str(out))
    _, counts = ask(model, tmp_path, asked, states=str(out), shards=long_log.path)
    assert (counts.from_states, counts.without_state) == (0, 1)
    assert "raw histories are read" in capsys.readouterr().out
    with pytest.raises(UserError, match="states do not record which items a user has seen"):
        ask(model, tmp_path, {"user_id": [1]}, states=str(out), top_k=3)
    kept = (out / "00000001" / files[1]["name"]).stat()
    assert not built(model, long_log, out).reused
    assert (out / "00000001" / files[1]["name"]).stat().st_mtime_ns == kept.st_mtime_ns
    assert json.loads(commit.read_text())["files"] == files
    assert sorted(path.name for path in out.iterdir()) == ["00000001"]
    damaged = out / "00000001" / files[0]["name"]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="is damaged: build the states again"):
        ask(model, tmp_path, {"user_id": [1, 2, 3], "candidates": [[100]] * 3}, states=str(out))


@pytest.mark.usefixtures("serial")
def test_a_full_disk_leaves_no_states_and_the_next_run_builds_them(long_log, export, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left on device")

    model, out = export(long_log), tmp_path / "states"
    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", full)
        with pytest.raises(NotNow, match=rf"{out}/00000001: No space left on device: free some disk"):
            built(model, long_log, out)
    assert [path for path in out.rglob("*") if path.is_file()] == []
    assert built(model, long_log, out).users == 3


@pytest.mark.usefixtures("serial")
def test_a_disk_that_is_full_at_the_commit_is_told_with_its_place(long_log, export, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    model, out = export(long_log), tmp_path / "states"
    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "link", full)
        with pytest.raises(NotNow, match=rf"{out}/00000001/COMMIT: No space left on device: free some disk"):
            built(model, long_log, out)
        patch.setattr(Store, "create", full)
        with pytest.raises(NotNow, match=rf"{out}/00000001: No space left on device: free some disk"):
            built(model, long_log, out)
    assert built(model, long_log, out).users == 3


def test_a_commit_that_names_files_elsewhere_is_refused(long_log, export, tmp_path):
    model = export(long_log)
    place = tmp_path / "states" / "00000001"
    place.mkdir(parents=True)
    commit = {
        **{"format": 2, "digest": model.digest, "manifest": 1, "manifest_fingerprint": "", "buckets": 2},
        **{"user_id": "int64", "users": 1, "model": "tiny", "version": "1"},
    }
    for name in ("../bucket-00000.parquet", "/etc/passwd", "bucket-00000.parquet/x", None):
        (place / "COMMIT").write_text(json.dumps(commit | {"files": [{"name": name, "bucket": 0}]}))
        with pytest.raises(UserError, match="which is not a file of states"):
            find_states(model, tmp_path / "states")
    for content in ("{", "[]", json.dumps({"format": 2}), json.dumps(commit | {"format": 3})):
        (place / "COMMIT").write_text(content)
        with pytest.raises(UserError, match="remove it and build the states again"):
            find_states(model, tmp_path / "states")
    (place / "COMMIT").unlink()
    assert find_states(model, tmp_path / "states") is None
    assert find_states(model, tmp_path / "nowhere") is None


@pytest.mark.usefixtures("serial")
def test_states_of_an_earlier_format_are_refused_by_name_and_built_again(long_log, export, tmp_path):
    model, out = export(long_log), tmp_path / "states"
    built(model, long_log, out)
    commit = out / "00000001" / "COMMIT"
    commit.write_text(json.dumps(json.loads(commit.read_text()) | {"format": 1}))
    refusal = r"states/00000001: holds states of format 1, this version reads 2: remove the directory and build"
    with pytest.raises(UserError, match=refusal):
        ask(model, tmp_path, {"user_id": [1], "candidates": [[100]]}, states=str(out))
    with pytest.raises(UserError, match=refusal):
        built(model, long_log, out)
    # Beside those of a later manifest they harm nothing.
    (out / "00000001").rename(out / "00000000")
    assert not built(model, long_log, out).reused
    _, counts = ask(model, tmp_path, {"user_id": [1], "candidates": [[100]]}, states=str(out))
    assert counts.from_states == 1
