"""`solar score` against evaluation, and what it does with files: nothing half-written, every mistake in one line."""

from __future__ import annotations

import dataclasses
import errno
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.host.console import Console
from jobs.host.errors import UserError
from jobs.scorer.checksums import write_checksums
from jobs.scorer.scorer import UNKNOWN_SCORE
from jobs.serving import request_files as score_input
from jobs.serving import score as scoring
from jobs.serving.ranking import ScoreConfig, best_first
from jobs.serving.score import score
from jobs.training.item_counting import count_items
from jobs.training.model import item_features, model_tables, training_input, user_tables
from models.embeddings import EmbeddingCollections, look_up_ids, pool_features, pool_user_features
from models.prior import PRIOR_PREFIX, Prior, PriorModel
from models.zoo import build_tower
from pipeline.batches.loader import EvaluationLoader
from pipeline.batches.requests import RequestConfig
from pipeline.events import DataError, EventColumns, NotNow
from pipeline.prepare.garbage import collect
from tests.support.serial import command_without_ray

MAX_HISTORY = 7


class TrainingTables:
    """The tables as training looks them up (TorchRec), on one process and unsharded."""

    def __init__(self, model, vocabulary):
        settings = model.settings["model"]
        self.user_tables = user_tables(settings, vocabulary)
        self.features = item_features(vocabulary)
        self.module = EmbeddingCollections(model_tables(settings, vocabulary), device="cpu")
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                weight = load_file(model.directory / f"table-{name.split('.')[-2]}.safetensors")["weight"]
                parameter[: len(weight)] = weight

    def look_up_with_users(self, rows, users):
        ids = look_up_ids(rows, self.features, user_tables=self.user_tables, users=users)
        found = {table: rows for collection, part in self.module.parts(ids) for table, rows in collection(part).items()}
        return (*pool_features(found, self.features), pool_user_features(found, self.user_tables))


def weighted(model, data):
    """The tower with its weights; of a model with a prior the PriorModel, with counters from the shards."""
    settings, weights = model.settings, load_file(model.directory / "model.safetensors")
    of_prior = {name: weights.pop(name) for name in [*weights] if name.startswith(PRIOR_PREFIX)}
    tower = build_tower(settings["model"], num_features=len(settings["features"]))
    tower.load_state_dict(weights)
    if not settings["model"]["prior"]:
        return tower
    prior = Prior(settings["task"])
    prior.load_state_dict({name.removeprefix(PRIOR_PREFIX): value for name, value in of_prior.items()})
    training = load_file(model.directory / "item-counts.safetensors")["training_events"].numpy()
    return PriorModel(tower, prior, count_items(data, min_label=settings["min_label"], evidence=training))


def evaluated(model, data, requests, *, catalogue=False):
    """{user id: (request time, tied with its last event, {item: logit of evaluation})} on the test part."""
    tables: Any = TrainingTables(model, data.vocabulary)
    tower = weighted(model, data).eval()
    found = {}
    for batch in EvaluationLoader(data, requests=requests, part="test", batch_events=150):
        if catalogue:
            items = torch.arange(2, data.vocabulary.size)
            batch = dataclasses.replace(
                batch, candidate_item=items.repeat(batch.num_requests),
                candidate_offsets=torch.arange(batch.num_requests + 1) * len(items),
            )  # fmt: skip
        with torch.no_grad():
            logits = tower(training_input(batch, tables)).numpy()
        raw = data.vocabulary.raw(batch.candidate_item.numpy()).to_pylist()
        for b, user in enumerate(batch.user[batch.request_user].tolist()):
            part = slice(*batch.candidate_offsets[b : b + 2].tolist())
            time, position = int(batch.request_time[b]), int(batch.request_position[b])
            last = int(batch.event_offsets[batch.request_user[b]]) + position - 1
            tied = position > 0 and int(batch.event_time[last]) == time
            scores = dict(zip(raw[part], logits[part].tolist(), strict=True))
            found[data.user_ids[user].as_py()] = (time, tied, scores)
    return found


def given_histories(data, *, drop_last=0, seed=0):
    """One row a user with its events in no order, and with its features."""
    events = data.raw_events(range(data.num_groups)).with_columns(place=pl.int_range(pl.len()).over("user_id"))
    events = events.filter(pl.col("place") < pl.len().over("user_id") - drop_last)
    shuffled = events.sample(fraction=1, shuffle=True, seed=seed)
    histories = shuffled.group_by("user_id").agg(history="item_id", history_time="timestamp", history_action="action")
    users = data.raw_user_values(range(data.num_groups)).with_columns(pl.col("gender").list.first())
    return histories.join(users, on="user_id", how="left")


def run(model, tmp_path, requests, **config):
    """(rows of the result, counts)"""
    file = tmp_path / "requests.parquet"
    pq.write_table(requests, file, row_group_size=8)
    config = {"out": str(tmp_path / "out.parquet"), "overwrite": True} | config
    counts = score(model, ScoreConfig(requests=str(file), **config), Console())
    return pq.read_table(config["out"]).to_pylist(), counts


def differences(rows, expected):
    """|score - logit of evaluation| of every candidate of every request."""
    assert [row["user_id"] for row in rows] == list(expected)
    found = []
    for row in rows:
        scores = expected[row["user_id"]][2]
        assert sorted(row["candidates"]) == sorted(scores)
        found += [abs(s - scores[item]) for item, s in zip(row["candidates"], row["scores"], strict=True)]
    return np.array(found)


def test_actions_that_the_model_does_not_know_are_counted_and_read_as_none(data, export, tmp_path, capsys):
    model, asked = export(data), pl.col("history_action")
    given = given_histories(data).with_columns(candidates=pl.lit([100, 101]))
    _, counts = run(model, tmp_path, given.to_arrow())
    assert counts.unknown_actions == 0
    none, _ = run(model, tmp_path, given.drop("history_action").to_arrow())
    other = given.with_columns(asked.list.eval(pl.concat_str(pl.element(), pl.lit("!"))))
    rows, counts = run(model, tmp_path, other.to_arrow())
    assert [row["scores"] for row in rows] == [row["scores"] for row in none]
    assert counts.unknown_actions == given["history_action"].explode().drop_nulls().len() > 0
    scoring.print_counts(counts, Console())
    assert "of events in the requests are unknown to the model: read as none" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings",
    [
        {"set_attention": False},
        {"set_attention": True},
        {"feature_width": 8},
        {"feature_width": {"genre": 4, "hobbies": 8}},
    ],
)
def test_scores_equal_those_of_evaluation_from_shards_and_from_given_histories(data, export, tmp_path, settings):
    model = export(data, max_history=MAX_HISTORY, **settings)
    requests = RequestConfig(task="impressions", max_history=MAX_HISTORY, min_history=0)
    expected = evaluated(model, data, requests)
    users = list(expected)
    asked = pl.DataFrame(
        {
            "user_id": users,
            "time": [expected[user][0] for user in users],
            "candidates": [list(expected[user][2]) for user in users],
        }
    )
    from_shards, counts = run(model, tmp_path, asked.to_arrow(), shards=data.path)
    given = asked.join(given_histories(data), on="user_id", how="left", maintain_order="left")
    from_given, same = run(model, tmp_path, given.to_arrow())
    assert counts == same
    assert counts.truncated > 5
    assert counts.user_values > 15
    assert counts.requests == len(users) > 15
    for rows in (from_shards, from_given):
        assert len(differences(rows, expected)) > 25
        # Measured: 0.0, the same float32 arithmetic; another machine may sum batches of another shape otherwise.
        assert np.quantile(differences(rows, expected), 0.99) <= 1e-4
    without, _ = run(model, tmp_path, given.drop("gender", "hobbies").to_arrow())
    assert differences(without, expected).max() > 1e-2
    other = export(data, max_history=MAX_HISTORY + 1, **settings, name="longer")
    longer, _ = run(other, tmp_path, asked.to_arrow(), shards=data.path)
    assert differences(longer, expected).max() > 1e-2


def test_the_whole_catalogue_is_ranked_as_evaluation_ranks_it_with_tied_last_events(data, export, tmp_path):
    model = export(data, max_history=MAX_HISTORY)
    expected = evaluated(model, data, RequestConfig(max_history=MAX_HISTORY, min_label=0), catalogue=True)
    users = [user for user in expected]
    # A target that shares its time with the event before it has that event as history: no time, so nothing is cut.
    times = [None if tied else time for time, tied, _ in expected.values()]
    assert 0 < times.count(None) < len(times)
    asked = pl.DataFrame({"user_id": users, "time": times})
    given = asked.join(given_histories(data, drop_last=1), on="user_id", how="left", maintain_order="left")
    every, _ = run(model, tmp_path, given.to_arrow(), top_k=1000, keep_seen=True)
    assert np.quantile(differences(every, expected), 0.99) <= 1e-4
    ranked, counts = run(model, tmp_path, given.to_arrow(), top_k=4)
    assert counts.candidates < len(users) * len(data.vocabulary.items)
    for row, whole, seen in zip(ranked, every, given["history"].to_list(), strict=True):
        kept = [item for item in whole["candidates"] if item not in set(seen or [])]
        assert row["candidates"] == kept[:4]
        assert row["scores"] == sorted(row["scores"], reverse=True)


def test_what_requests_say_of_their_users_comes_before_what_shards_know_and_unknown_values_are_counted(
    data, export, tmp_path
):
    model, some = export(data), {"candidates": [[100, 101, 102]] * 3}
    plain, _ = run(model, tmp_path, pa.table({"user_id": [2, 2, 2], **some}), shards=data.path)
    known = data.raw_user_values(range(data.num_groups)).filter(pl.col("user_id") == 2)
    assert known.row(0, named=True) == {"user_id": 2, "gender": [], "hobbies": ["h0", "h1"]}
    said = pa.table({"user_id": [2, 2, 2], "hobbies": [["h0", "h1", None], ["h0", "h1", "chess"], []], **some})
    rows, counts = run(model, tmp_path, said, shards=data.path)
    assert rows[0]["scores"] == pytest.approx(plain[0]["scores"], abs=1e-5)
    assert max(abs(a - b) for a, b in zip(rows[1]["scores"], plain[1]["scores"], strict=True)) > 1e-2
    assert max(abs(a - b) for a, b in zip(rows[2]["scores"], plain[2]["scores"], strict=True)) > 1e-2
    assert (counts.user_values, counts.unknown_user_values) == (5, 1)
    assert rows[1]["hobbies"] == ["h0", "h1", "chess"]
    with pytest.raises(UserError, match="column 'gender' holds double: a user feature is a category"):
        run(model, tmp_path, pa.table({"user_id": [2], "gender": [1.5], "candidates": [[100]]}), shards=data.path)


def test_a_data_set_with_other_user_features_is_matched_by_name_and_value(
    data, export, prepare, write_log, random_log, tmp_path
):
    model = export(data)
    write_log(random_log(), "other/events.parquet")
    write_log({"user_id": [1, 2, 3], "city": ["x", "y", "z"], "hobbies": ["zz", "h1", "h0"]}, "other/users.parquet")
    columns = EventColumns(action="action", label="label", request_id="request_id")
    prepare(tmp_path / "other", tmp_path / "others", columns=columns, buckets=2)
    asked = {"user_id": [1, 2, 3, 4], "candidates": [[100, 101]] * 4}
    rows, counts = run(model, tmp_path, pa.table(asked), shards=str(tmp_path / "others"))
    same = pa.table(asked | {"gender": [None] * 4, "hobbies": ["new", "h1", "h0", None]})
    expected, _ = run(model, tmp_path, same, shards=data.path)
    assert [row["scores"] for row in rows] == [pytest.approx(row["scores"], abs=1e-5) for row in expected]
    assert (counts.user_values, counts.unknown_user_values) == (3, 1)


def test_rows_keep_their_order_and_columns_and_the_footer_says_what_was_done(data, export, tmp_path, monkeypatch):
    model = export(data)
    monkeypatch.setattr(score_input, "EVENTS_PER_BLOCK", 20)
    asked = pa.table(
        {
            "request_id": ["a", "b", "c", "d"],
            "user_id": [5, 77777, 2, 5],
            "candidates": [[100, 101], [31, 104], [], [100, 101]],
            "weight": [0.5, None, 1.0, 2.0],
        }
    )
    rows, counts = run(model, tmp_path, asked, shards=data.path)
    assert [row["request_id"] for row in rows] == ["a", "b", "c", "d"]
    assert [row["weight"] for row in rows] == [0.5, None, 1.0, 2.0]
    assert list(rows[0]) == ["request_id", "user_id", "weight", "candidates", "scores"]
    assert rows[0]["candidates"] == rows[3]["candidates"]
    assert rows[0]["scores"] == pytest.approx(rows[3]["scores"], abs=1e-5)
    assert (rows[2]["candidates"], rows[2]["scores"]) == ([], [])
    assert (counts.unknown_users, counts.cold, counts.unknown_candidates, counts.candidates) == (1, 1, 1, 6)
    footer = pq.read_metadata(tmp_path / "out.parquet").metadata
    assert footer[b"solar.requests"] == b"4"
    assert footer[b"solar.digest"].decode() == model.digest
    assert pq.read_schema(tmp_path / "out.parquet").field("scores").type.value_type == pa.float32()


def test_unknown_candidates_are_ranked_last_in_the_order_of_the_request(data, export, tmp_path):
    asked = pa.table({"user_id": [5], "candidates": [[31, 100, 7, 101]]})
    [row], counts = run(export(data), tmp_path, asked, shards=data.path)
    assert sorted(row["candidates"][:2]) == [100, 101]
    assert row["candidates"][2:] == [31, 7]
    assert row["scores"][2:] == [UNKNOWN_SCORE] * 2
    assert counts.unknown_candidates == 2


def test_equal_scores_keep_the_order_of_the_request():
    scores, offsets = np.array([1, 3, 3, 2, 5, 5, 5], np.float32), np.array([0, 4, 4, 7])
    places, kept = best_first(scores, offsets, top_k=None)
    assert (places.tolist(), kept.tolist()) == ([1, 2, 3, 0, 4, 5, 6], [0, 4, 4, 7])
    places, kept = best_first(scores, offsets, top_k=2)
    assert (places.tolist(), kept.tolist()) == ([1, 2, 4, 5], [0, 2, 2, 4])


def ask(**columns):
    table = {"history": [[100, 101], [102]], "history_time": [[600_000, 1_200_000], [3]], "candidates": [[1], [2]]}
    return pa.table({name: value for name, value in (table | columns).items() if value is not None})


@pytest.mark.parametrize(
    ("requests", "words"),
    [
        (ask(candidates=None), "column 'candidates' is missing: add it, or rank the whole catalogue with --top_k"),
        (ask(history=None), "column 'history' is missing"),
        (ask(history=None, user_id=[1, 2]), "column 'history' is missing: with user_id, give --shards DIR, or --st"),
        (ask(history_time=None), "column 'history_time' is missing: give a list of times, milliseconds since 1970"),
        (ask(candidates=[["x"], ["y"]]), "column 'candidates' holds string: it must hold integers"),
        (ask(history=[3, 4]), "column 'history' is int64: it must hold a list for each request"),
        (ask(history_time=[[1], [2]]), "row 0: history_time and history differ in length (1 and 2)"),
        (ask(candidates=[[1], None]), "row 1: column 'candidates' is null"),
        (ask(time=[1.5, 2.5]), "column 'time' holds double: it must hold timestamps, or integers"),
        (
            ask(time=[5, 1 << 60]),
            "row 1: column 'time' has 1152921504606846976: it must be milliseconds since 1970 UTC",
        ),
        (ask(scores=[1, 2]), "column 'scores' has the name of the result's column"),
        (ask()[:0], "has no requests"),
    ],
)
def test_a_mistake_in_the_requests_is_one_line_and_leaves_no_result(data, export, tmp_path, requests, words):
    with pytest.raises(UserError) as error:
        run(export(data), tmp_path, requests)
    assert str(error.value).startswith(f"{tmp_path / 'requests.parquet'}: {words}")
    assert "\n" not in str(error.value)
    assert not [path.name for path in tmp_path.iterdir() if "out.parquet" in path.name]


def test_times_before_the_first_known_event_are_taken_for_seconds(data, export, tmp_path):
    model = export(data)
    scorer_json = model.directory / "scorer.json"
    scorer_json.write_text(
        scorer_json.read_text().replace('"time_range": [\n  0,', '"time_range": [\n  1700000000000,')
    )
    assert "1700000000000" in scorer_json.read_text()
    write_checksums(model.directory)
    now, seconds = 1_700_000_100_000, 1_700_000_001
    with pytest.raises(UserError, match=r"row 0: column 'time' ends 1970-01-20, before the model's first event"):
        run(model, tmp_path, ask(time=[seconds] * 2, history=[[], []], history_time=[[], []]))
    for name in ("history", "latest"):
        # One row in seconds beside one in milliseconds.
        mixed = {
            "history": [[], []],
            "history_time": [[], []],
            name: [[101], [102]],
            f"{name}_time": [[now], [seconds]],
        }
        with pytest.raises(UserError, match=f"row 1: column '{name}_time' ends 1970-01-20, before the model's first"):
            run(model, tmp_path, ask(**mixed))
    # Events that are older than the model's data are history.
    run(model, tmp_path, ask(history_time=[[now, now], [1_300_000_000_000]]))


@pytest.mark.parametrize("rows_per_part", [100, 2])
def test_all_parts_read_the_state_of_the_beginning_which_gc_keeps_meanwhile(
    data, export, tmp_path, monkeypatch, prepare, write_log, random_log, rows_per_part
):
    command_without_ray(monkeypatch.setattr)
    monkeypatch.setattr(scoring, "ROWS_PER_PART", rows_per_part)
    model, original, collected = export(data), scoring.PartScorer.batches, []
    asked = pa.table({"user_id": [1, 2, 3, 4, 5], "candidates": [[100, 101, 102]] * 5})
    expected, _ = run(model, tmp_path, asked, shards=data.path)

    def meanwhile(self, part, counts):
        if not collected:
            write_log(random_log(seed=5), "log/later.parquet")
            columns = EventColumns(action="action", label="label", request_id="request_id")
            prepare(tmp_path / "log", data.path, columns=columns, row_group_events=60, max_deltas=0)
            collected.append(collect(data.path, keep=1))
        return original(self, part, counts)

    monkeypatch.setattr(scoring.PartScorer, "batches", meanwhile)
    rows, _ = run(model, tmp_path, asked, shards=data.path)
    assert rows == expected
    assert [str(held).partition(" (")[0] for held in collected[0].held] == [
        f"scoring of {tmp_path}/requests.parquet with {model.uri}"
    ]
    assert collect(data.path, keep=1).manifests == [1]


def test_requests_that_fail_late_leave_the_earlier_result_as_it_was(data, export, tmp_path, monkeypatch):
    model = export(data)
    monkeypatch.setattr(score_input, "ROWS_PER_BLOCK", 1)
    run(model, tmp_path, ask())
    before = (tmp_path / "out.parquet").read_bytes()
    with pytest.raises(UserError, match="row 1: column 'candidates' is null"):
        run(model, tmp_path, ask(candidates=[[1], None]))
    assert (tmp_path / "out.parquet").read_bytes() == before
    with pytest.raises(UserError, match="exists already"):
        run(model, tmp_path, ask(), overwrite=False)
    with pytest.raises(UserError, match="is the file of the requests"):
        run(model, tmp_path, ask(), out=str(tmp_path / "requests.parquet"))
    assert not list(tmp_path.glob(".*partial"))


def test_what_is_no_whole_parquet_file_and_options_that_contradict_are_refused(data, export, tmp_path):
    model, file = export(data), tmp_path / "requests.parquet"
    with pytest.raises(UserError, match="--keep_seen"):
        run(model, tmp_path, ask(), keep_seen=True)
    whole = file.read_bytes()
    for content in (b"", b"user_id,item_id\n1,2\n", whole[:-20]):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"not a complete Parquet file|must be Parquet, which this file is not"):
            score(model, ScoreConfig(requests=str(file), out=str(tmp_path / "o")), Console())
    file.unlink()
    with pytest.raises(UserError, match="no such file"):
        score(model, ScoreConfig(requests=str(file), out=str(tmp_path / "o")), Console())
    with pytest.raises(DataError, match="no prepared data set there"):
        run(model, tmp_path, ask(), shards=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="column 'history' is given together with --shards"):
        run(model, tmp_path, ask(user_id=[1, 2]), shards=data.path)
    with pytest.raises(UserError, match="column 'user_id' holds string: it must hold integers"):
        run(model, tmp_path, pa.table({"user_id": ["a"], "candidates": [[1]]}), shards=data.path)
    with pytest.raises(UserError, match="row 1: user_id is null"):
        run(model, tmp_path, pa.table({"user_id": [1, None], "candidates": [[1], [1]]}), shards=data.path)
    with pytest.raises(ValueError, match="top_k=0"):
        ScoreConfig(requests="a", out="b", top_k=0)


def test_requests_and_results_of_other_formats_are_refused(data, export, tmp_path):
    (tmp_path / "clicks.csv").write_text("user_id,history\n1,2\n")
    config = ScoreConfig(requests=str(tmp_path / "clicks.csv"), out=str(tmp_path / "out.parquet"))
    with pytest.raises(UserError, match=r"clicks.csv: requests must be Parquet, which this file is not: write the"):
        score(export(data), config, Console())
    config = ScoreConfig(requests=str(tmp_path / "requests.parquet"), out=str(tmp_path / "top.csv"))
    with pytest.raises(UserError, match=r"top.csv: the result is Parquet: name it .*top.parquet$"):
        score(export(data, name="again"), config, Console())


def test_weights_that_are_not_numbers_give_no_result(data, export, tmp_path):
    model = export(data)
    table = load_file(model.directory / "table-item.safetensors")["weight"]
    save_file({"weight": table * float("nan")}, model.directory / "table-item.safetensors")
    write_checksums(model.directory)
    with pytest.raises(UserError, match="computes NaN or infinite scores"):
        run(model, tmp_path, ask(candidates=[[100], [101]]))
    (model.directory / "model.safetensors").write_bytes(b"broken")
    write_checksums(model.directory)
    with pytest.raises(UserError, match="cannot be read"):
        run(model, tmp_path, ask())


def test_a_full_disk_ends_in_one_line_and_leaves_no_part_of_the_result(data, export, tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left on device")

    requests, out = tmp_path / "requests.parquet", tmp_path / "results" / "out.parquet"
    columns = {"history": [[100]], "history_time": [[1_700_000_000_000]], "candidates": [[101, 102]]}
    pq.write_table(pa.table(columns), requests)
    model = export(data)
    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(NotNow) as raised:
        score(model, ScoreConfig(requests=str(requests), out=str(out)), Console())
    assert str(raised.value) == f"{out}: No space left on device: free some disk; what was committed is still there"
    assert list(out.parent.iterdir()) == []
