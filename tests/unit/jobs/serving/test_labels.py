"""Scores and states of a next_item model on a log with labels: the histories are those of its evaluation."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import polars as pl
import pytest

from jobs.cluster.session import ClusterConfig
from jobs.host.console import Console
from jobs.scorer import packed_states
from jobs.scorer.checksums import write_checksums
from jobs.serving.build_states import build_states
from jobs.serving.user_histories import UserHistories
from pipeline.batches.requests import RequestConfig
from pipeline.events import EventColumns
from pipeline.shards.dataset import Shards
from tests.support.serial import command_without_ray
from tests.support.shown import shown_log
from tests.unit.jobs.serving.test_score import differences, evaluated, run

LONGER = 200
EVERY_EVENT = RequestConfig(max_history=LONGER, min_label=0)
SHOWN = RequestConfig(task="impressions", min_history=0, max_history=LONGER)
IN_EVERY_FORM: dict[str, tuple[RequestConfig, dict[str, Any]]] = {
    "labels": (SHOWN, {"history_labels": True, "repeats": False}),
    "labels and a prior": (SHOWN, {"history_labels": True, "repeats": False, "prior": True}),
    "repeats and a prior": (EVERY_EVENT, {"prior": True}),
    "a prior alone counts repeats": (EVERY_EVENT, {"prior": True, "repeats": False}),
}


def log_of_weeks() -> pl.DataFrame:
    """The log with sixty times longer pauses: an item's counters say something only from its second day on."""
    log = shown_log()
    return log.with_columns(timestamp=log["timestamp"].min() + 60 * (pl.col("timestamp") - log["timestamp"].min()))


@pytest.fixture
def open_log(prepare, write_log, tmp_path):
    def make(log, name, **others):
        write_log(log, f"{name}/events.parquet")
        columns = EventColumns(timestamp_unit="ms", label="label", **others)
        prepare(tmp_path / name, tmp_path / f"{name}-shards", columns=columns, buckets=2, row_group_events=80)
        return Shards.open(str(tmp_path / f"{name}-shards"))

    return make


@pytest.fixture
def data(open_log):
    return open_log(shown_log(), "shown")


def asked_of(expected):
    """One request for each test request of the evaluation, with the same candidates and time."""
    rows = [{"user_id": user, "time": time, "candidates": [*scores]} for user, (time, _, scores) in expected.items()]
    return pl.DataFrame(rows)


def test_scores_from_shards_equal_those_of_evaluation(data, export, tmp_path):
    model = export(data, max_history=LONGER, min_label=1)
    expected = evaluated(model, data, RequestConfig(max_history=LONGER), catalogue=True)
    asked = asked_of(expected)
    rows, counts = run(model, tmp_path, asked.to_arrow(), shards=data.path)
    assert counts.requests > 8
    assert np.quantile(differences(rows, expected), 0.99) <= 1e-4
    chosen = shown_log().filter(pl.col("label") == 1).join(asked, on="user_id")
    assert counts.history_events == chosen.filter(pl.col("timestamp") < pl.col("time")).height
    # A model that was trained on every event keeps reading every event.
    every = export(data, max_history=LONGER, min_label=0, name="every")
    rows, counts = run(every, tmp_path, asked.to_arrow(), shards=data.path)
    assert differences(rows, expected).max() > 1e-2
    of_every = evaluated(every, data, RequestConfig(max_history=LONGER, min_label=0), catalogue=True)
    at_their_time = asked_of(of_every)
    rows, _ = run(every, tmp_path, at_their_time.to_arrow(), shards=data.path)
    assert np.quantile(differences(rows, of_every), 0.99) <= 1e-4


def test_scores_from_states_equal_those_of_evaluation(data, open_log, export, tmp_path, monkeypatch):
    command_without_ray(monkeypatch.setattr)
    model = export(data, max_history=LONGER, min_label=1)
    expected = evaluated(model, data, RequestConfig(max_history=LONGER), catalogue=True)
    asked = asked_of(expected)
    # The log as it was before each user's test request: what was shown since the last choice is in it.
    log = shown_log().join(asked.select("user_id", "time"), on="user_id", how="left")
    before = open_log(log.filter(pl.col("time").is_null() | (pl.col("timestamp") < pl.col("time"))), "before")
    out = tmp_path / "states"
    built = build_states(
        model, shards=before.path, manifest=None, out=out, console=Console(), cluster=ClusterConfig(), parallel=1
    )
    assert built.users == before.manifest.users
    rows, counts = run(model, tmp_path, asked.to_arrow(), states=str(out))
    assert counts.from_states == counts.requests == len(expected)
    # The tolerance of states: their Gram matrices are float32.
    assert np.quantile(differences(rows, expected), 0.99) <= 1e-3
    # A user who chose nothing has the state of an empty history.
    silent = pl.DataFrame({"user_id": ["u4"], "candidates": [["b1", "b2"]]})
    rows, counts = run(model, tmp_path, silent.to_arrow(), states=str(out))
    assert (counts.from_states, counts.cold) == (1, 1)
    raw, _ = run(model, tmp_path, silent.to_arrow(), shards=before.path)
    assert rows[0]["scores"] == pytest.approx(raw[0]["scores"], abs=1e-3)


@pytest.mark.parametrize("kind", IN_EVERY_FORM)
def test_a_history_has_one_score_in_every_form(open_log, export, tmp_path, monkeypatch, kind):
    """In evaluation, from shards, in the request, as a state, and as an earlier state with the latest events."""
    command_without_ray(monkeypatch.setattr)
    monkeypatch.setattr(packed_states, "WHOLE_EVENTS", 10)
    requests, settings = IN_EVERY_FORM[kind]
    whole, reads_labels = log_of_weeks(), "history_labels" in settings
    data = open_log(whole, "labelled", request_id="request_id")
    model = export(data, max_history=LONGER, task=requests.task, **settings)
    expected = evaluated(model, data, requests, catalogue=True)
    asked = asked_of(expected)
    log = whole.join(asked.select("user_id", "time"), on="user_id")
    log = log.filter(pl.col("timestamp") < pl.col("time"))

    def columns(events, name):
        lists = {name: "item_id", f"{name}_time": "timestamp", f"{name}_label": "label"}
        found = events.sample(fraction=1, shuffle=True, seed=1).group_by("user_id").agg(**lists)
        return asked.join(found, on="user_id", how="left", maintain_order="left")

    rows, _ = run(model, tmp_path, asked.to_arrow(), shards=data.path)
    assert np.quantile(differences(rows, expected), 0.99) <= 1e-4
    given = columns(log, "history")
    rows, _ = run(model, tmp_path, given.to_arrow())
    assert np.quantile(differences(rows, expected), 0.99) <= 1e-4
    rows, _ = run(model, tmp_path, given.drop("history_label").to_arrow())
    assert (differences(rows, expected).max() > 1e-2) == reads_labels
    place, size = pl.int_range(pl.len()).over("user_id"), pl.len().over("user_id")
    for since in (0, 3):
        known = log.filter(place < size - since)
        before = open_log(known.drop("time"), f"before-{since}", request_id="request_id")
        assert before.manifest.users == len(expected)
        out = tmp_path / f"states-{since}"
        build_states(
            model, shards=before.path, manifest=None, out=out, console=Console(), cluster=ClusterConfig(), parallel=1
        )
        latest = columns(log.filter(place >= size - since), "latest") if since else asked
        rows, counts = run(model, tmp_path, latest.to_arrow(), states=str(out))
        assert counts.from_states == len(expected)
        assert np.quantile(differences(rows, expected), 0.99) <= 1e-3
    rows, _ = run(model, tmp_path, latest.drop("latest_label").to_arrow(), states=str(out))
    assert (differences(rows, expected).max() > 1e-2) == reads_labels


def test_a_model_exported_before_labels_mattered_reads_every_event(data, export):
    model = export(data, min_label=1)
    assert UserHistories(data, model.scorer()).min_label == 1
    file = model.directory / "scorer.json"
    settings = json.loads(file.read_text())
    del settings["min_label"]
    file.write_text(json.dumps(settings))
    write_checksums(model.directory)
    histories = UserHistories(data, model.scorer())
    users = np.arange(data.manifest.users)
    assert histories.min_label == 0
    assert histories.read(users).lengths.tolist() == data.index.events.tolist()
