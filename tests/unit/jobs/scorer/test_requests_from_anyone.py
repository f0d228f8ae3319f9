"""Requests and states that hold anything: the answer is right, or one line that says what is wrong, and soon."""

from __future__ import annotations

import base64
import json
import logging
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from safetensors.numpy import load, save

from jobs.scorer import histories as scorer_histories
from jobs.scorer import packed_states
from jobs.scorer.request_frame import Limits
from jobs.scorer.scorer import LONGEST_MESSAGE, InvalidRequest
from pipeline import times
from pipeline.times import LATEST_TIME

NOW = 20_000_000
"""A time within the data's times, in milliseconds."""
GOOD: dict[str, Any] = {
    "history": [100, 101, 102],
    "history_time": [NOW, NOW + 1, NOW + 2],
    "history_action": ["click", None, "view"],
    "history_label": [1, None, 0],
    "candidates": [103, 104, 9999],
    "time": NOW + 3,
    "gender": "f",
    "hobbies": ["h1", "h2"],
}
ODD = [
    *(None, float("nan"), float("inf"), -1, 0, 1, 1.5, True, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, 1j),
    *("", "x", "101", b"\x00", "\ud800", "a\nb", "\x00", "2023-11-15T00:21:48Z", object(), pd.NA, pd.NaT, {1, 2}),
    *([], {}, [[]], {"a": 1}, [1, "a"], [None], [float("nan")], [True], [1.0], (1,), [2**63], [10**30], [["\ud800"]]),
    *(pd.Timestamp("2020-01-01"), pd.Timestamp.max, np.int8(1), np.bool_(True), NOW // 1000, NOW * 1000, LATEST_TIME),
    *(np.array([1.0]), np.array([True]), np.array(5), np.array(["x"]), np.array(["2020"], "datetime64[ms]")),
    *(np.zeros((2, 2)), ["x" * 50]),
]
"""Values that no column, or only some column, may have."""


@pytest.fixture
def scorer(data, export):
    return export(data, max_history=30, set_attention=True).scorer()


def answer(scorer, rows) -> list[list[float]] | str:
    """The scores, or the line of the refusal."""
    try:
        scores = scorer.predict(None, rows if isinstance(rows, pd.DataFrame) else frame_of(rows))["scores"].tolist()
    except InvalidRequest as error:
        return checked_line(error)
    assert all(np.isfinite(row).all() for row in scores)
    return scores


def frame_of(rows) -> pd.DataFrame:
    try:
        return pd.DataFrame(rows)
    except UnicodeEncodeError:
        # pandas itself has no strings with lone surrogates.
        return pd.DataFrame(rows, dtype=object)


def checked_line(error: InvalidRequest) -> str:
    """The line of a refusal, which is also what MLflow's server answers."""
    line = str(error)
    assert 0 < len(line) <= LONGEST_MESSAGE
    assert line.isprintable()
    error.message = f"Failed to predict data '...'. \nError: {error.message}"
    assert json.loads(error.serialize_as_json())["message"] == line
    return line


def mutated(rng, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with one to three changes at random places."""
    rows = [dict(row) for row in rows]
    for _ in range(rng.integers(1, 4)):
        row = rows[rng.integers(len(rows))]
        name = str(rng.choice([*GOOD, "state", "latest", "latest_time", "latest_action", "latest_label"]))
        odd, kind = ODD[rng.integers(len(ODD))], rng.integers(4)
        if kind == 0:
            row.pop(name, None)
        elif kind == 1 and isinstance(row.get(name), list) and row[name]:
            row[name] = list(row[name])
            row[name][rng.integers(len(row[name]))] = odd
        elif kind == 2 and isinstance(row.get(name), list):
            row[name] = [*row[name], odd][rng.integers(2) :]
        else:
            row[name] = odd
    return rows


def test_mutated_requests_are_refused_in_one_line_or_scored_as_if_alone(scorer, caplog):
    rng, scored, refused = np.random.default_rng(1), 0, 0
    plain = {"history": [105], "history_time": [NOW], "candidates": [106, 107]}
    expected = answer(scorer, [plain])[0]
    with caplog.at_level(logging.ERROR, "solar"):
        for _ in range(600):
            rows = [plain, *mutated(rng, [GOOD, GOOD])]
            found = answer(scorer, rows)
            if isinstance(found, str):
                refused += 1
                continue
            # What is beside a request does not change its scores, and a request alone is scored as among others.
            scored += 1
            assert found[0] == pytest.approx(expected, abs=1e-4)
            for row, scores in zip(rows[1:], found[1:], strict=True):
                alone = answer(scorer, [row])
                if not isinstance(alone, str):
                    assert alone[0] == pytest.approx(scores, abs=1e-4), str(row)
    # Nothing was refused because something unforeseen was raised.
    assert not caplog.records
    assert scored > 50
    assert refused > 200


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"history": [100, float("nan"), 102]}, "row 1: column 'history' holds "),
    ({"history": [True, False, True]}, "row 1: column 'history' holds bool"),
    ({"history": [100.0, 101.0, 102.0]}, "row 1: column 'history' holds double"),
    ({"history": [100, [101], 102]}, "row 1: column 'history' mixes types"),
    ({"candidates": [[1], [2]]}, "row 1: column 'candidates' holds list in its list"),
    ({"candidates": 5}, "row 1: column 'candidates' is int: it must hold a list"),
    ({"candidates": {"a": 1}}, "row 1: column 'candidates' is dict: it must hold a list"),
    ({"candidates": [2**63]}, "row 1: column 'candidates' mixes types, or does not fit into int64"),
    ({"candidates": None}, "row 1: column 'candidates' is null"),
    ({"history_time": [NOW, NOW + 1, -5]}, "row 1: column 'history_time' has -5: it must be milliseconds"),
    ({"history_time": [NOW, NOW, 2**63 - 1]}, "row 1: column 'history_time' has 9223372036854775807"),
    ({"history_time": [1_700_000_000_000_000] * 3}, "row 1: column 'history_time' has 1700000000000000"),
    ({"history_time": [1.0, 2.0, 3.5]}, "row 1: column 'history_time' holds double"),
    ({"history_time": None}, "row 1: column 'history_time' is null: give the time of each event"),
    ({"history_time": ["2020-01-01"] * 3}, "row 1: column 'history_time' holds string"),
    ({"history_action": ["click"]}, "row 1: history_action and history differ in length (1 and 3)"),
    ({"history_action": [1, 2, 3]}, "row 1: column 'history_action' holds int64"),
    ({"time": 2**63 - 1}, "row 1: column 'time' has 9223372036854775807"),
    ({"time": 2**70}, "row 1: column 'time' mixes types, or does not fit into int64"),
    ({"time": "2023-11-16T00:00:00Z"}, "row 1: column 'time' holds str: it must hold timestamps, or integers"),
    ({"time": [NOW]}, "row 1: column 'time' holds list"),
    ({"time": True}, "row 1: column 'time' holds bool"),
    ({"gender": 1.5}, "row 1: column 'gender' holds double: a user feature is a category"),
    ({"gender": {"a": 1}}, "row 1: column 'gender' holds dict in its list"),
    ({"gender": "\ud800"}, "row 1: column 'gender' mixes types, or does not fit into int64 or UTF-8"),
    ({"state": 5}, "row 1: column 'state' holds int: it must hold the bytes of states"),
    ({"state": "!"}, "row 1: column 'state' is not valid base64"),
    ({"state": b"\xff" * 20}, "row 1: column 'state' is not a complete state"),
]


def test_a_mistake_is_named_with_its_row_and_column(scorer):
    for change, line in MISTAKES:
        found = str(answer(scorer, [GOOD, GOOD | change]))
        assert found.startswith(line), (change, found)
    # pyarrow takes an integer beside a timestamp for microseconds.
    mixed = [GOOD | {"time": pd.Timestamp("2020-01-01")}, GOOD]
    assert answer(scorer, mixed) == "row 1: column 'time' mixes types: give timestamps alone, or integers alone"
    assert str(answer(scorer, mixed[::-1])).startswith("row 1: column 'time' mixes types")


@pytest.mark.parametrize("wrong", [0, 1, 2, 6])
def test_values_that_fit_alone_but_not_together_are_named_with_their_row_and_without_their_text(scorer, wrong):
    rows = [GOOD | {"gender": "a"} for _ in range(7)]
    rows[wrong] = GOOD | {"gender": 3}
    line = "column 'gender' mixes types, or does not fit into int64 or UTF-8: it holds int, str"
    assert answer(scorer, rows) == f"row {max(wrong, 1)}: {line}"
    secret = [GOOD | {"candidates": [101, "my secret"]}, GOOD | {"history_label": ["my secret"]}]
    for row in secret:
        found = str(answer(scorer, [GOOD, row]))
        assert found.startswith("row 1: column ")
        assert "secret" not in found


def test_seconds_are_refused_as_solar_score_does(data, export):
    scorer = export(data).scorer()
    scorer.settings["time_range"] = [1_690_000_000_000, 1_710_000_000_000]
    good = {"history": [100], "history_time": [1_700_000_000_000], "time": 1_700_000_100_000, "candidates": [101]}
    assert not isinstance(answer(scorer, [good]), str)
    for name, value in (("history_time", [1_700_000_000]), ("time", 1_700_000_100)):
        line = answer(scorer, [good, good | {name: value}])
        assert str(line).startswith(f"row 1: column {name!r} has 1700000")
        assert "2023-11-14 in seconds" in str(line)
    # Hours.
    line = answer(scorer, [good, good | {"history_time": [1_700_000_000 // 3600]}])
    assert str(line).startswith("row 1: column 'history_time' ends 1970-01-01, before the model's first event")


@pytest.mark.parametrize("first", [0, 1_690_000_000_000])
@pytest.mark.parametrize("times", [[1_700_000_000], [1_700_000_000, 1_700_000_000_000], [1_700_000_000_000, 1_700_000]])
def test_one_time_in_seconds_is_refused_whatever_the_first_event_of_the_log(data, export, times, first):
    """A log may have one event of 1970, and a row one time of the right unit."""
    scorer = export(data).scorer()
    scorer.settings["time_range"] = [first, 1_710_000_000_000]
    row = {"history": [100] * len(times), "history_time": times, "candidates": [101]}
    line = answer(scorer, [row])
    if 1_700_000 in times:
        # 28 minutes after the beginning of 1970 may be a time.
        assert not isinstance(line, str)
    else:
        assert str(line).startswith("row 0: column 'history_time' has 1700000000, 1970-01-20 in milliseconds")
    # A log of that time, as tests and simulations have.
    scorer.settings["time_range"] = [0, 2_000_000_000]
    assert not isinstance(answer(scorer, [row | {"history_time": [1_700_000_000] * len(times)}]), str)


def test_latest_time_is_the_logs():
    assert scorer_histories.LATEST_TIME == LATEST_TIME
    assert 1_000 * times._1990 == scorer_histories.MODERN_TIME


def test_records_may_lack_optional_columns(data, export):
    scorer = export(data, time_features=False).scorer()
    short = {"history": [101, 100, 102], "candidates": [103, 104]}
    rows = [GOOD, short, short | {"history_time": [3, 2, 1]}, short | {"latest": [107]}, {"candidates": [103, 104]}]
    found = scorer.predict(None, pd.DataFrame(rows))["scores"]
    for row, scores in zip(rows, found, strict=True):
        alone = row if "history" in row else row | {"history": []}
        assert answer(scorer, [alone])[0] == pytest.approx(scores, abs=1e-5)
    # Without times the given order is the order of events.
    assert found[1] != pytest.approx(found[2], abs=1e-3)
    assert "row 1: column 'time' needs 'history_time'" in str(answer(scorer, [GOOD, short | {"time": NOW}]))


def test_requests_above_a_limit_are_refused_with_the_limit(data, export):
    scorer = export(data).scorer()
    scorer.limits = Limits(requests=3, history=4, candidates=5, values=2, entries=40, state_bytes=90, characters=40)
    assert not isinstance(answer(scorer, [GOOD]), str)
    for rows, line in (
        ([GOOD] * 4, "4 requests are more than the limit of 3: send fewer, or raise SOLAR_MAX_REQUESTS where"),
        ([GOOD | {"history": range_list(5)}], "row 0: column 'history': 5 events are more than the limit of 4"),
        ([GOOD | {"latest": range_list(5)}], "row 0: column 'latest': 5 events are more than the limit of 4"),
        ([GOOD, GOOD | {"candidates": range_list(6)}], "row 1: column 'candidates': 6 candidates are more than the li"),
        ([GOOD | {"hobbies": ["a"] * 3}], "row 0: column 'hobbies': 3 values are more than the limit of 2"),
        ([GOOD] * 3, "entries are more than the limit of 40"),
        ([GOOD | {"state": "A" * 200}], "row 0: column 'state': 150 state bytes are more than the limit of 90"),
        ([GOOD | {"history_action": ["x" * 50] * 3}], "characters are more than the limit of 40"),
    ):
        assert line in str(answer(scorer, rows))
    shared = ["x" * 1_000_000] * 100_000
    scorer.limits = Limits()
    assert "100,000,000,000 characters are more than the limit" in str(
        answer(scorer, [GOOD | {"history_action": shared}])
    )


def range_list(num):
    return list(range(100, 100 + num))


def test_the_environment_sets_the_limits():
    assert Limits.from_environment({"SOLAR_MAX_HISTORY": "5", "SOLAR_MAX_OTHER": "x"}) == Limits(history=5)
    for text in ("0", "-1", "many", "1.5", "", "\u0665"):
        with pytest.raises(ValueError, match=r"SOLAR_MAX_STATE_BYTES=.*: must be a whole number of at least 1"):
            Limits.from_environment({"SOLAR_MAX_STATE_BYTES": text})


def test_what_is_no_frame_is_refused(scorer):
    for asked in (None, 5, "x", [GOOD], {"history": [[1]]}, np.zeros(3), pd.Series([1])):
        with pytest.raises(InvalidRequest, match=r"give a pandas\.DataFrame with one row per request"):
            scorer.predict(None, asked)


def test_a_column_that_is_there_twice_is_refused(scorer):
    frame = pd.DataFrame([GOOD]).drop(columns="gender")
    twice = pd.concat([frame, frame[["history"]]], axis=1)
    assert "column 'history' is there more than once" in str(answer(scorer, twice))


def test_what_nobody_foresaw_is_logged_and_told_without_its_text(scorer, caplog, monkeypatch):
    def fails(*_: Any, **__: Any) -> None:
        raise KeyError("/secret/path")

    monkeypatch.setattr(scorer, "logits", fails)
    line = answer(scorer, [GOOD])
    assert line == "the requests cannot be scored (KeyError): see the log"
    assert "/secret/path" in caplog.text


# States.


@pytest.fixture
def stateful(data, export, monkeypatch):
    """(scorer, a state with every event, a state with a summary), of users of the data."""
    monkeypatch.setattr(packed_states, "WHOLE_EVENTS", 10)
    scorer = export(data, max_history=2000, repeats=True).scorer()
    monkeypatch.setattr(type(scorer.tower), "kept_events", property(lambda tower: 7))
    events = pd.DataFrame(
        {
            "history": [list(range(100, 105)), [100 + k % 25 for k in range(40)]],
            "history_time": [[NOW + k for k in range(5)], [NOW + k for k in range(40)]],
            "history_label": [[0, 1, None, 1, 0], [[0, 1, None][k % 3] for k in range(40)]],
            "gender": ["f", "m"],
            "hobbies": [["h1"], []],
        }
    )
    histories = scorer.histories(pa.RecordBatch.from_pandas(events, preserve_index=False))
    short, long = scorer.build_states(histories)
    return scorer, short, long


def repacked(state: bytes, *, facts: Any = None, **changes: Any) -> bytes:
    """The state with other facts and arrays; an array of None is left out."""
    size = int.from_bytes(state[:8], "little")
    known = json.loads(json.loads(state[8 : 8 + size])["__metadata__"]["solar"])
    arrays = {name: value for name, value in (load(state) | changes).items() if value is not None}
    facts = known | facts if isinstance(facts, dict) else known if facts is None else facts
    return save(arrays, metadata={"solar": json.dumps(facts)})


def ask_state(scorer, state, **others):
    return answer(scorer, [{"state": base64.b64encode(state).decode(), "candidates": [103, 120], **others}])


def test_states_are_scored(stateful):
    scorer, short, long = stateful
    for state in (short, long, repacked(short), repacked(long)):
        assert not isinstance(ask_state(scorer, state), str)


OTHER_FACTS: list[tuple[Any, str]] = [
    ([1], "is not a complete state"),
    ("x", "is not a complete state"),
    (3, "is not a complete state"),
    ({"digest": "x"}, "is a state of another model"),
    ({"digest": None}, "is a state of another model"),
    ({"format": "1"}, "is of format 1, this model reads 2: build it with `solar score --build-states`"),
    ({"format": "3"}, "is of another format, this model reads 2: build it with `solar score --build-states`"),
    ({"format": ["1"]}, "is of another format"),
    ({"length": None}, "claims a history of other than 0 to 2000 events"),
    ({"length": "5"}, "claims a history of other than 0 to 2000 events"),
    ({"length": -5}, "claims a history of other than 0 to 2000 events"),
    ({"length": 10**30}, "claims a history of other than 0 to 2000 events"),
    ({"length": float("nan")}, "claims a history of other than 0 to 2000 events"),
    ({"length": float("inf")}, "claims a history of other than 0 to 2000 events"),
    ({"length": True}, "claims a history of other than 0 to 2000 events"),
    ({"length": 2001}, "claims a history of other than 0 to 2000 events"),
    ({"length": 0}, "does not fit this model"),
    ({"length": 9}, "does not fit this model"),
]


def test_a_state_with_other_facts_is_refused(stateful):
    scorer, *states = stateful
    for facts, words in OTHER_FACTS:
        for state in states:
            line = str(ask_state(scorer, repacked(state, facts=facts)))
            assert line.startswith(f"row 0: column 'state' {words}"), (facts, line)
            assert scorer.digest not in line


def test_a_state_with_other_arrays_is_refused(stateful):
    scorer, short, long = stateful
    whole, summed = load(short), load(long)
    changes: list[tuple[bytes, dict[str, Any]]] = []
    for state, arrays in ((short, whole), (long, summed)):
        for name, array in arrays.items():
            changes += [(state, {name: None}), (state, {name: array[:-1]}), (state, {name: array[None]})]
            changes += [(state, {name: array.reshape(-1)[:0]}), (state, {name: array.astype(np.float64)})]
            changes.append((state, {name: np.concatenate([array, array[:1]])}))
            if array.dtype.kind == "f":
                changes += [(state, {name: np.full_like(array, value)}) for value in (np.nan, np.inf, -np.inf)]
            elif len(array):
                least, most = np.iinfo(array.dtype).min, np.iinfo(array.dtype).max
                changes += [(state, {name: np.full_like(array, value)}) for value in (-1, least, most)]
    changes += [(short, {"interest": summed["interest"]}), (short, {"extra": whole["item"]})]
    changes += [(short, {"time": whole["time"][::-1].copy()}), (long, {"older_row": summed["older_row"][::-1].copy()})]
    # More labels than events, or more events than the history has.
    count, decayed, known = summed["older_count"], summed["older_decayed"], int(summed["older_labels"][0])
    changes += [(long, {"older_label": count + 1}), (long, {"older_label": count}), (long, {"older_label": -count})]
    changes += [(long, {"older_decayed": decayed + count}), (long, {"older_decayed": -decayed})]
    wrong_totals = ([known, 0], [known, known + 1], [34, 1], [-1, -1])
    changes += [(long, {"older_labels": np.array(totals)}) for totals in wrong_totals]
    same = {"user_lengths", "user_row"}
    for state, change in changes:
        (name,), (value,) = change.keys(), change.values()
        # An empty array of no values is no change.
        if value is not None and name in same and np.array_equal(value, load(state)[name]):
            continue
        line = ask_state(scorer, repacked(state, **change))
        assert isinstance(line, str), (change.keys(), value)
        assert line.startswith("row 0: column 'state' "), line
    huge = {"gram": np.full_like(summed["gram"], 3e38), "sum": np.full_like(summed["sum"], 3e38)}
    answer_to_huge = ask_state(scorer, repacked(long, **huge))
    assert isinstance(answer_to_huge, str) or np.isfinite(answer_to_huge).all()


def test_cut_and_flipped_states_are_refused_or_scored(stateful, caplog):
    scorer, *states = stateful
    rng = np.random.default_rng(2)
    with caplog.at_level(logging.ERROR, "solar"):
        for state in states:
            for _ in range(150):
                damaged = bytearray(state[: rng.integers(len(state))] if rng.random() < 0.2 else state)
                for place in rng.integers(0, max(1, len(damaged)), rng.integers(1, 4)):
                    if place < len(damaged):
                        damaged[place] ^= 1 << int(rng.integers(8))
                ask_state(scorer, bytes(damaged))
    assert not caplog.records
    header = json.dumps({"__metadata__": {"solar": "[" * 50_000}}).encode()
    for head in (
        header,
        b"[" * 100_000,
        b"[]",
        b"5",
        b"{}",
        b'{"__metadata__": []}',
        b'{"__metadata__": {"solar": 5}}',
    ):
        assert "is not a complete state" in str(ask_state(scorer, len(head).to_bytes(8, "little") + head))
    assert "is not a complete state" in str(ask_state(scorer, (2**62).to_bytes(8, "little") + b"{}"))


def test_a_model_without_states_says_so(data, export):
    scorer = export(data).scorer()
    frame = pd.DataFrame({"history": [[100]], "history_time": [[NOW]]})
    [state] = scorer.build_states(scorer.histories(pa.RecordBatch.from_pandas(frame, preserve_index=False)))
    plain = export(data, name="plain", interests=False).scorer()
    assert "which has no states: give the history instead" in str(ask_state(plain, state))
