"""The registered model's reading of requests: order, cut, unknown ids, and what it refuses."""

from __future__ import annotations

import ast
import json
import sys
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from mlflow.models.utils import _enforce_schema

from jobs.runs.export import scorer_source, signature
from jobs.scorer import scorer as scorer_module
from jobs.scorer.histories import NO_TIME, RequestError
from jobs.scorer.request_frame import Limits, request_batch
from jobs.scorer.scorer import UNKNOWN_SCORE
from pipeline.events import EventColumns
from pipeline.shards.dataset import Shards
from pipeline.shards.sequences import build_sequences

ACTIONS = [None, "click", "view"]


@pytest.fixture
def scorer(data, export):
    return export(data).scorer()


def random_requests(num=30, *, seed=0, string_ids=False):
    """Histories in no order with many equal times, and unknown items and actions among them."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num):
        events = int(rng.integers(0, 25))
        ids = rng.integers(98, 132, events), rng.integers(98, 132, 5)
        history, candidates = ([f"i{i}" for i in part] if string_ids else part.tolist() for part in ids)
        rows.append(
            {
                "history": history,
                "history_time": (1000 * rng.integers(0, 9, events)).tolist(),
                "history_action": [[*ACTIONS, "other"][k] for k in rng.integers(0, 4, events)],
                "candidates": candidates,
            }
        )
    return pd.DataFrame(rows)


def histories(scorer, frame):
    batch = pa.RecordBatch.from_pandas(frame, preserve_index=False)
    return scorer.histories(batch)


def of_request(found, b):
    return slice(int(found.offsets[b]), int(found.offsets[b + 1]))


@pytest.mark.parametrize("string_ids", [False, True])
def test_events_stand_in_the_order_that_the_log_gives_them(
    string_ids, prepare, write_log, random_log, tmp_path, export
):
    log = random_log()
    if string_ids:
        log = log.with_columns(pl.format("i{}", "item_id").alias("item_id"))
    write_log(log)
    prepare(tmp_path / "log", tmp_path / "out", columns=EventColumns(action="action"), buckets=1)
    scorer = export(Shards.open(str(tmp_path / "out"))).scorer()
    frame = random_requests(string_ids=string_ids)
    found, compared = histories(scorer, frame), 0
    for b, request in enumerate(frame.to_dict("records")):
        events = pl.DataFrame(
            {
                "user_id": [0] * len(request["history"]), "item_id": request["history"],
                "timestamp": request["history_time"], "action": request["history_action"],
            },
            schema_overrides={"action": pl.String, "item_id": pl.String if string_ids else pl.Int64},
        )  # fmt: skip
        # Rows that are the same event are one event of a log; a scorer takes what it is given.
        log_order = build_sequences(events.with_columns(label=pl.int_range(pl.len())))
        kept = pl.DataFrame(
            {
                "item": found.row[of_request(found, b)],
                "time": found.time[of_request(found, b)],
                "action": found.action[of_request(found, b)],
            }
        )
        item = scorer.rows(log_order["item_id"].to_arrow(compat_level=pl.CompatLevel.oldest()))
        action = scorer.codes(log_order["action"].to_arrow(compat_level=pl.CompatLevel.oldest()))
        if log_order.height == len(request["history"]):
            expected = pl.DataFrame({"item": item, "time": log_order["timestamp"], "action": action})
            assert kept.equals(expected)
            compared += 1
    assert compared > 20


def test_where_the_log_orders_ties_itself_they_stay_as_given(prepare, write_log, random_log, tmp_path, export):
    log = random_log()
    write_log(log.with_columns(order=pl.int_range(pl.len())))
    prepare(tmp_path / "log", tmp_path / "out", columns=EventColumns(order="order"), buckets=1)
    scorer = export(Shards.open(str(tmp_path / "out"))).scorer()
    frame = pd.DataFrame({"history": [[105, 103, 104]], "history_time": [[2000, 2000, 1000]], "candidates": [[103]]})
    assert histories(scorer, frame).row.tolist() == scorer.rows(pa.array([104, 105, 103])).tolist()


def test_history_is_what_is_strictly_before_the_request_and_of_that_the_latest(scorer):
    frame = pd.DataFrame(
        {
            "history": [list(range(100, 112))] * 3,
            "history_time": [[1000 * (k // 2) for k in range(12)]] * 3,
            "candidates": [[100]] * 3,
        }
    )
    shown, asked = scorer.shown(histories(scorer, frame), np.array([4000, NO_TIME, 0]))
    assert shown.lengths.tolist() == [7, 7, 0]
    rows = scorer.rows(pa.array(list(range(100, 112))))
    assert shown.row[of_request(shown, 0)].tolist() == rows[1:8].tolist()
    assert shown.row[of_request(shown, 1)].tolist() == rows[5:].tolist()
    # Without a time a request is of the time of its last event, but counters of items are read as they are now.
    inputs = scorer._inputs(shown, asked, np.zeros(4, np.int64), np.zeros(0, np.int64))
    assert inputs.request_time_B.tolist() == [4000, 5000, 0]
    assert inputs.counted_until_B.tolist() == [4000, NO_TIME, 0]


LABELS: dict[str, Any] = {
    "integers": [[0, 1, None], None],
    "truth values": [[False, True, None], None],
    "both": [[0, True, None], [None]],
    "floats beside nulls": [np.array([0.0, 1.0, np.nan]), np.array([np.nan])],
    "objects": [np.array([False, 1, None], object), None],
}


@pytest.mark.parametrize("given", LABELS)
def test_labels_are_sorted_with_their_events_and_may_be_unknown(data, export, given):
    scorer = export(data, history_labels=True).scorer()
    frame = pd.DataFrame({"history": [[101, 102, 103], [104]], "history_time": [[3000, 1000, 2000], [1000]],
                          "history_label": LABELS[given]})  # fmt: skip
    batch = request_batch(frame, item_type="int64", user_features=[], limits=Limits())
    found = scorer.histories(batch)
    assert found.label.tolist() == [2, 0, 1, 0]
    assert found.row.tolist() == scorer.rows(pa.array([102, 103, 101, 104])).tolist()
    later = pd.DataFrame({"history": [[101]], "history_time": [[1000]], "latest": [[102, 103]],
                          "latest_time": [[3000, 2000]], "latest_label": [np.array([True, False])]})  # fmt: skip
    batch = request_batch(later, item_type="int64", user_features=[], limits=Limits())
    assert scorer.histories(batch).label.tolist() == [0, 1, 2]


def test_labels_change_scores_only_where_the_model_reads_them(data, export):
    request = {"history": [[100, 101]], "history_time": [[600_000, 1_200_000]], "candidates": [[102, 103]]}

    def scores(scorer, **labels):
        return scorer.predict(None, pd.DataFrame(request | labels))["scores"][0]

    reads, plain = export(data, history_labels=True, name="reads").scorer(), export(data).scorer()
    liked, skipped, unknown = {"history_label": [[1, 1]]}, {"history_label": [[0, 0]]}, {"history_label": [[None] * 2]}
    assert scores(plain, **liked) == scores(plain, **skipped) == scores(plain)
    assert scores(reads, **unknown) == scores(reads)
    different = np.array([scores(reads, **liked), scores(reads, **skipped), scores(reads)])
    assert np.abs(np.diff(different, axis=0)).max(1).min() > 1e-2


def test_wrong_labels_of_a_file_are_refused_by_row(scorer):
    def labels(values):
        columns = {"history": [[100], [101, 102]], "history_time": [[1], [1, 2]], "history_label": values}
        return scorer.histories(pa.RecordBatch.from_pydict(columns), first_row=10).label.tolist()

    assert labels(pa.array([[True], [None, False]])) == labels([[1], [None, 0]]) == [2, 0, 1]
    with pytest.raises(RequestError, match=r"row 11: column 'history_label' has 3: give 0 or 1 \(false or true\)"):
        labels([[1], [0, 3]])
    with pytest.raises(RequestError, match=r"column 'history_label' holds double: it must hold labels: give 0 or 1"):
        labels([[0.5], [1.0, 0.0]])


def test_unknown_items_have_row_1_and_unknown_actions_are_none(scorer):
    assert scorer.rows(pa.array([100, 99999, None, 100])).tolist() == [2, 1, 1, 2]
    assert scorer.codes(pa.array(["view", "other", None, ""])).tolist() == [2, 0, 0, 0]


@pytest.mark.parametrize("set_attention", [False, True])
def test_unknown_candidates_come_last_and_change_no_other_score(data, export, set_attention):
    scorer = export(data, set_attention=set_attention).scorer()
    request = {"history": [[100, 101]], "history_time": [[600_000, 1_200_000]]}
    [known] = scorer.predict(None, pd.DataFrame(request | {"candidates": [[102, 103]]}))["scores"]
    [mixed] = scorer.predict(None, pd.DataFrame(request | {"candidates": [[99999, 102, 77777, 103]]}))["scores"]
    assert (mixed[0], mixed[2]) == (UNKNOWN_SCORE, UNKNOWN_SCORE)
    assert min(known) > UNKNOWN_SCORE
    # float32 sums of another length in matrix products.
    np.testing.assert_allclose([mixed[1], mixed[3]], known, atol=2e-5)
    assert json.loads(json.dumps(mixed)) == mixed


@pytest.mark.parametrize("set_attention", [False, True])
def test_scores_do_not_depend_on_how_requests_are_grouped(data, export, monkeypatch, set_attention):
    scorer = export(data, set_attention=set_attention).scorer()
    frame = random_requests()
    together = scorer.predict(None, frame)["scores"]
    assert [len(scores) for scores in together] == [5] * len(frame)
    monkeypatch.setattr(scorer_module, "FORWARD_ENTRIES", 2)
    alone = scorer.predict(None, frame)["scores"]
    # float32 sums of another length in matrix products.
    np.testing.assert_allclose(np.stack(list(together)), np.stack(list(alone)), atol=2e-5)


def test_empty_frames_histories_and_candidates_are_scored(scorer):
    frame = pd.DataFrame(
        {"history": [None, []], "history_time": [None, []], "candidates": [[100, 100], []], "time": [5000, None]}
    )
    first, second = scorer.predict(None, frame)["scores"]
    assert len(first) == 2
    assert first[0] == pytest.approx(first[1], abs=1e-6)
    assert second == []
    assert len(scorer.predict(None, frame[:0])) == 0


def test_a_users_category_may_be_a_value_a_list_or_a_number_beside_none(scorer):
    frame = pd.DataFrame({"history": [[100]] * 3, "history_time": [[1000]] * 3, "candidates": [[101, 102]] * 3})

    def scores(gender):
        return np.stack(list(scorer.predict(None, frame.assign(gender=gender))["scores"]))

    as_values, as_lists = scores(["f", None, "m"]), scores([["f"], [], ["m", None, ""]])
    np.testing.assert_array_equal(as_values, as_lists)
    np.testing.assert_array_equal(as_values[1], np.stack(list(scorer.predict(None, frame)["scores"]))[1])
    assert np.abs(np.diff(as_values, axis=0)).min(1).max() > 1e-3
    # pandas makes 3.0 of the integer; both stand for the unknown category "3".
    np.testing.assert_array_equal(scores([3, None, 3]), scores(["3", None, "3"]))
    with pytest.raises(RequestError, match="column 'gender' holds double: a user feature is a category"):
        scores([1.5, 2.5, 3.5])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"history": None}, "column 'history' is missing"),
        ({"history": None, "user_id": [1, 2]}, "column 'history' is missing: this model has no users' histories"),
        ({"history_time": None}, "column 'history_time' is missing: give a list of times, milliseconds since 1970"),
        ({"candidates": None}, "column 'candidates' is missing"),
        ({"history": [["a", "b"], ["c"]]}, "column 'history' holds string: it must hold integers"),
        ({"history": [1, 2]}, "row 0: column 'history' is int: it must hold a list"),
        ({"history": [[1, None], [3]]}, "row 0: column 'history' holds a null"),
        ({"history_time": [[1, 2], [3, 4]]}, "row 1: history_time and history differ in length (2 and 1)"),
        ({"history_time": [[1.5, 2.0], [3.0]]}, "column 'history_time' holds double"),
        ({"history_action": [["view"], ["view"]]}, "row 0: history_action and history differ in length (1 and 2)"),
        ({"history_label": [[0, 1], [2]]}, "row 1: column 'history_label' has 2: give 0 or 1 (false or true), or null"),
        ({"history_label": [[0, 1], ["yes"]]}, "row 1: column 'history_label' has str: give 0 or 1 (false or true)"),
        ({"history_label": [[0.5, None], [1]]}, "row 0: column 'history_label' has 0.5: give 0 or 1 (false or true)"),
        ({"history_label": [[0, 1], [[1]]]}, "row 1: column 'history_label' holds list in its list"),
        ({"history_label": [[0], [1]]}, "row 0: history_label and history differ in length (1 and 2): give one entry"),
        ({"latest": [[], [1]], "latest_time": [[], [9]], "latest_label": [None, [-1]]}, "column 'latest_label' has -1"),
        ({"candidates": [[1], None]}, "row 1: column 'candidates' is null"),
        ({"time": ["today", "now"]}, "column 'time' holds"),
        ({"history": [["a", 1], [2]]}, "column 'history' mixes types"),
    ],
)
def test_mistakes_name_the_column_and_the_row(scorer, change, words):
    columns = {"history": [[100, 101], [102]], "history_time": [[1, 2], [3]], "candidates": [[100], [101]]}
    columns = {name: value for name, value in (columns | change).items() if value is not None}
    with pytest.raises(RequestError) as error:
        scorer.predict(None, pd.DataFrame(columns))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_time_without_event_times_is_refused(data, export):
    scorer = export(data, time_features=False).scorer()
    frame = pd.DataFrame({"history": [[100]], "candidates": [[101]], "time": [1000]})
    with pytest.raises(RequestError, match="column 'time' needs 'history_time'"):
        scorer.predict(None, frame)


def test_strings_beside_nulls_reach_the_scorer_as_they_are(prepare, write_log, random_log, tmp_path, export):
    write_log(random_log().with_columns(pl.format("item {}", "item_id").alias("item_id")))
    prepare(tmp_path / "log", tmp_path / "out", columns=EventColumns(action="action"), buckets=1)
    data = Shards.open(str(tmp_path / "out"))
    scorer, asked = export(data).scorer(), signature({"name": "solar"}, data.vocabulary).inputs
    rows = [
        {"history": ["item 100", "item 101"], "history_time": [1, 2], "history_action": ["click", None]},
        {"history": None, "history_time": None, "history_action": None},
    ]
    frame = pd.DataFrame(rows).assign(candidates=[["item 102"]] * 2)
    passed = _enforce_schema(frame, asked)
    assert scorer.predict(None, passed).equals(scorer.predict(None, frame))
    frame["candidates"] = [["item 102", None], []]
    with pytest.raises(RequestError, match="row 0: column 'candidates' holds a null in its list"):
        scorer.predict(None, _enforce_schema(frame, asked))


@pytest.mark.parametrize("model", ["solar", "mean_pooling"])
def test_exported_source_imports_few_packages_and_repeats_no_name(model):
    tree = ast.parse(scorer_source(model))
    names = [node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    assert len(names) == len(set(names))
    roots = {
        (alias.name if isinstance(node, ast.Import) else node.module or "").split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert roots - sys.stdlib_module_names == {"mlflow", "numpy", "pandas", "pyarrow", "safetensors", "torch"}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"feature_width": {"genre": 8, "gender": 4}},
        {"prior": True},
        {"prior": True, "history_labels": True, "task": "impressions"},
    ],
)
def test_exported_source_scores_the_same(data, export, settings):
    registered = export(data, **settings)
    module = type(sys)("exported_scorer")
    sys.modules["exported_scorer"] = module
    try:
        exec(compile(scorer_source("solar"), "exported_scorer", "exec"), module.__dict__)
        alone = module.__dict__["Scorer"]()
        alone.load(registered.directory)
        frame = random_requests().assign(gender=["f", None, "m"] * 10, hobbies=[["h2", "h1"], [], None] * 10)
        assert alone.predict(None, frame).equals(registered.scorer().predict(None, frame))
    finally:
        del sys.modules["exported_scorer"]
