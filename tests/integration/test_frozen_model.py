"""A model that an earlier version registered scores as it did: by its own code in MLflow, by ours in `solar score`.

tests/frozen/solar-1 is what `mlflow.pyfunc.save_model` wrote of the export of random weights over a made-up log, and
requests with the scores of that day. It is never written again; another format gets another directory.
"""

from __future__ import annotations

from pathlib import Path

import mlflow
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.tracking.mlflow_runs import mlflow_client
from tests.support.commands import solar

FROZEN = sorted((Path(__file__).parents[1] / "frozen").glob("solar-*"))


@pytest.fixture(params=FROZEN, ids=lambda path: path.name)
def frozen(request) -> Path:
    return request.param


def test_nothing_frozen_is_a_pickle(frozen):
    assert FROZEN
    # Python compiles the frozen code beside it.
    kinds = {path.suffix for path in frozen.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert kinds == {"", ".json", ".parquet", ".safetensors", ".py", ".txt", ".yaml"}


def test_mlflow_runs_the_code_that_was_frozen_with_it(frozen):
    model = mlflow.pyfunc.load_model(str(frozen / "model"))
    rows = pq.read_table(frozen / "requests.parquet").to_pylist()
    # Null times do not pass that version's signature: they are left out.
    for timed in (True, False):
        some = pd.DataFrame([row for row in rows if (row["time"] is not None) == timed])
        asked = some.drop(columns=["expected"] if timed else ["expected", "time"])
        assert len(asked) >= 4
        for found, expected in zip(model.predict(asked)["scores"], some["expected"], strict=True):
            # Another machine may sum in another order.
            assert found == pytest.approx(expected, abs=1e-4)
        if not timed:
            other = model.predict(asked.drop(columns=["gender", "hobbies"]))["scores"]
            assert [list(a) for a in other] != [pytest.approx(b, abs=1e-2) for b in some["expected"]]


def test_solar_score_gives_the_scores_of_that_day(frozen, tmp_path):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow_client(store)
    client.create_registered_model("frozen")
    client.create_model_version("frozen", source=str(frozen / "model"))
    rows = pq.read_table(frozen / "requests.parquet").to_pylist()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "requests.parquet")
    done = solar(
        *("score", "models:/frozen/1", "--tracking.uri", store, "--workspace", tmp_path / "workspace"),
        *("--requests", tmp_path / "requests.parquet", "--out", tmp_path / "scores.parquet"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    scored = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    for row, asked in zip(scored, rows, strict=True):
        ranked = sorted(zip(asked["expected"], asked["candidates"], strict=True), key=lambda pair: -pair[0])
        assert row["candidates"] == [item for _, item in ranked]
        assert row["scores"] == pytest.approx([score for score, _ in ranked], abs=1e-4)
