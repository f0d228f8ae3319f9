"""A registered model behind `mlflow models serve`: HTTP scores are those of `solar score`, mistakes are answered."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.host.console import Console
from jobs.serving.ranking import ScoreConfig
from jobs.serving.score import score
from jobs.serving.user_histories import UserHistories
from jobs.tracking.registry import RegisteredModel
from pipeline.shards.dataset import Shards
from tests.support.commands import free_ports
from tests.support.registered import prepared_users, registered

START_SECONDS = 180
WITHOUT_REPOSITORY = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jobs", "models", "pipeline"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
"""
"""sitecustomize.py of the server: the editable install of this repository is out of its reach."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="module")
def data(place) -> Shards:
    return prepared_users(place)


@pytest.fixture(scope="module")
def model(place, data) -> RegisteredModel:
    return registered(place, data)


@pytest.fixture(scope="module")
def server(place, model):
    """The URL of a running server; it must still answer when all tests are over."""
    [port] = free_ports(1)
    (place / "site").mkdir()
    (place / "site" / "sitecustomize.py").write_text(WITHOUT_REPOSITORY)
    (place / "elsewhere").mkdir()
    binaries = Path(sys.executable).parent
    environment = os.environ | {
        "PYTHONPATH": str(place / "site"),
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{place}/mlflow.db",
    }
    command = [
        binaries / "mlflow",
        "models",
        "serve",
        "-m",
        "models:/tiny/1",
        "--env-manager",
        "local",
        "-p",
        str(port),
    ]
    with (place / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=place / "elsewhere", env=environment, stdout=log, stderr=log, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not alive(url):
            assert process.poll() is None, (place / "server.log").read_text()[-3000:]
            assert time.monotonic() < deadline, (place / "server.log").read_text()[-3000:]
            time.sleep(0.5)
        yield url
        assert alive(url)
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


def alive(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ping", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def post(url: str, body: bytes, kind: str = "application/json") -> tuple[int, Any]:
    request = urllib.request.Request(f"{url}/invocations", data=body, headers={"Content-Type": kind}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def records(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps({"dataframe_records": rows}).encode()


def raw_histories(data: Shards) -> dict[int, dict[str, list]]:
    events = data.raw_events(range(data.num_groups))
    columns = {"history": "item_id", "history_time": "timestamp", "history_action": "action"}
    return {
        user[0]: {name: part[column].to_list() for name, column in columns.items()}
        for user, part in events.group_by("user_id")
    }


def in_order(model, rows, place) -> list[list[float]]:
    """The scores of `solar score`, in the order of each request's candidates."""
    pq.write_table(pa.Table.from_pylist(rows), place / "requests.parquet")
    config = ScoreConfig(requests=str(place / "requests.parquet"), out=str(place / "scores.parquet"), overwrite=True)
    score(model, config, Console())
    found = pq.read_table(place / "scores.parquet").to_pylist()
    by_item = [dict(zip(row["candidates"], row["scores"], strict=True)) for row in found]
    return [[scores[item] for item in row["candidates"]] for scores, row in zip(by_item, rows, strict=True)]


def test_scores_over_http_are_those_of_solar_score(server, model, data, place):
    histories = raw_histories(data)
    last = {user: history["history_time"][-1] for user, history in histories.items()}
    nobody = {"history": [], "history_time": [], "history_action": []}
    rows = [
        {**histories[1], "candidates": list(range(95, 165)), "time": last[1] + 60_000, "plan": "a"},
        {**histories[2], "candidates": [100, 101], "time": last[2] - 60_000 * 100, "plan": "b"},
        {**histories[3], "candidates": [159], "time": None, "plan": None},
        # A user, items and a category that nobody knows; a request without candidates.
        {**nobody, "candidates": [100, 777], "time": None, "plan": "new"},
        {
            **nobody,
            "history": [888],
            "history_time": [last[3]],
            "history_action": [None],
            "candidates": [],
            "time": last[3] + 1,
            "plan": "",
        },
    ]
    status, answer = post(server, records(rows))
    assert status == 200, answer
    expected = in_order(model, rows, place)
    found = [row["scores"] for row in answer["predictions"]]
    assert [len(row) for row in found] == [70, 2, 1, 2, 0]
    differences = np.abs(np.concatenate(found) - np.concatenate(expected))
    assert np.quantile(differences, 0.99) <= 1e-4
    split = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}
    status, same = post(server, json.dumps({"dataframe_split": split}).encode())
    assert (status, same) == (200, answer)


def test_states_with_the_latest_events_are_served_too(server, model, data, place):
    scorer = model.scorer()
    whole = UserHistories(data, scorer).read(np.arange(3))
    users = data.user_ids.to_pylist()
    states = dict(zip(users, scorer.build_states(whole), strict=True))
    histories = raw_histories(data)
    rows, same = [], []
    for user in (1, 3):
        last = histories[user]["history_time"][-1]
        latest = {"latest": [101, 102], "latest_time": [last + 60_000, last + 70_000], "latest_action": ["view", None]}
        known = {"candidates": list(range(100, 130)), "plan": "a" if user == 1 else None}
        rows.append({"state": base64.b64encode(states[user]).decode(), **latest, "candidates": known["candidates"]})
        extended = {
            name: values + latest[name.replace("history", "latest")] for name, values in histories[user].items()
        }
        same.append({**extended, **known})
    # A user without a state beside them.
    rows.append({"state": None, "latest": [], "latest_time": [], "latest_action": [], "candidates": [100]})
    same.append({"history": [], "history_time": [], "history_action": [], "candidates": [100], "plan": None})
    status, answer = post(server, records(rows))
    assert status == 200, answer
    found = np.concatenate([row["scores"] for row in answer["predictions"]])
    assert np.quantile(np.abs(found - np.concatenate(in_order(model, same, place))), 0.99) <= 1e-3


GOOD = {"history": [100], "history_time": [1_700_000_000_000], "candidates": [101]}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "valid JSON"),
        (b"{", "valid JSON"),
        (b"[1, 2]", "must be a JSON dictionary"),
        (b'{"rows": []}', "must be a JSON dictionary"),
        (records([{"history": [100], "history_time": [1_700_000_000_000]}]), "candidates"),
        (records([{"history": [100], "candidates": [1]}]), "column 'history_time' is missing"),
        (records([{"candidates": [1]}]), "column 'history' is missing"),
        (records([GOOD | {"candidates": ["x"]}]), "candidates"),
        (records([GOOD | {"candidates": 7}]), "candidates"),
        (records([GOOD | {"candidates": None}]), "candidates"),
        (records([GOOD | {"candidates": [1, None]}]), "candidates"),
        (records([GOOD | {"history": [None]}]), "history"),
        (records([GOOD | {"candidates": [float("nan")]}]), "candidates"),
        (records([GOOD | {"history_time": [float("nan")]}]), "history_time"),
        (records([GOOD | {"history_time": [1, 2]}]), "row 0: history_time and history differ in length"),
        (records([GOOD | {"time": "noon"}]), "timestamps, or integers that are milliseconds"),
        (records([GOOD | {"time": 1.5}]), "column 'time' holds double"),
        (records([GOOD | {"plan": 1.5}]), "column 'plan' holds double"),
        (records([GOOD | {"history": [], "history_time": [], "state": "no state"}]), "column 'state'"),
        (
            records([GOOD | {"history": [], "history_time": [], "state": "bm8gc3RhdGU="}]),
            "column 'state' is not a complete",
        ),
        (records([GOOD | {"history": [], "history_time": [], "state": 7}]), "column 'state' holds int: it must"),
        (
            records([GOOD, GOOD | {"history_time": [1_700_000_000]}]),
            "row 1: column 'history_time' has 1700000000, 1970-01-20 in milliseconds",
        ),
        (
            records([GOOD | {"history_time": [1_700_000_000_000_000]}]),
            "row 0: column 'history_time' has 1700000000000",
        ),
        (records([GOOD, GOOD | {"candidates": [2**63]}]), "row 1: column 'candidates' mixes types, or does not fit"),
        (records([GOOD | {"candidates": [1.0]}]), "row 0: column 'candidates' holds double"),
        (
            records([GOOD | {"candidates": list(range(100_001))}]),
            "100,001 candidates are more than the limit of",
        ),
        (b'{"inputs": 5}', "column 'history' is missing"),
    ],
)
def test_a_malformed_request_is_answered_with_its_reason_and_the_server_goes_on(server, body, words):
    status, answer = post(server, body)
    assert 400 <= status < 500, answer
    assert words in answer
    document = json.loads(answer)
    assert "stack_trace" not in document
    # What the model refuses is its own line alone; MLflow's parser adds the input.
    if words.startswith(("row", "column")) or "limit" in words:
        assert words in document["message"]
        assert "\n" not in document["message"]
        assert len(document["message"]) <= 400
    status, answer = post(server, records([GOOD]))
    assert status == 200
    assert len(answer["predictions"][0]["scores"]) == 1


def test_records_may_lack_optional_columns(server):
    lone = {"candidates": [101]}
    status, answer = post(server, records([GOOD | {"history_action": ["view"], "plan": "a"}, GOOD, lone]))
    assert status == 200, answer
    alone = [post(server, records([row]))[1]["predictions"][0]["scores"] for row in (GOOD, lone | EMPTY)]
    for found, scores in zip(answer["predictions"][1:], alone, strict=True):
        assert found["scores"] == pytest.approx(scores, abs=1e-5)


DOUBLED = {"dataframe_split": {"columns": ["history", "history"], "data": [[[1], [1]]]}}
UNEQUAL = {"inputs": {"history": [[1], [2]], "candidates": [[1]]}}


def test_what_mlflows_parser_answers_before_the_model_is_asked(server):
    """jobs/serving/README.md tells it."""
    for body, kind, status, trace in (
        (b'{"dataframe_records": [{"candidates": [' + b"9" * 5000 + b"]}]}", "application/json", 500, False),
        (b'{"dataframe_records": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "application/json", 500, False),
        (json.dumps(DOUBLED).encode(), "application/json", 400, False),
        (json.dumps(UNEQUAL).encode(), "application/json", 400, False),
        (b"no parquet", "application/vnd.apache.parquet", 400, True),
        (b'a,b\n"1\n', "text/csv", 400, True),
        (b"\xff", "text/csv", 400, False),
    ):
        found, answer = post(server, body, kind)
        assert (found, "stack_trace" in answer) == (status, trace), answer


EMPTY = {"history": [], "history_time": []}


def test_what_a_model_does_not_read_is_left_alone_and_other_content_is_refused(server):
    status, answer = post(server, records([GOOD | {"session": "x"}]))
    assert status == 200
    assert (status, answer) == post(server, records([GOOD]))
    assert post(server, b"history,candidates\n", "text/html")[0] == 415
