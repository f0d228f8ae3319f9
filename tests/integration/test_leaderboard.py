"""`solar leaderboard` as a user types it, on a tiny log: a table that grows by rows and seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.tracking.mlflow_runs import mlflow_client
from tests.support.commands import refused, solar
from tests.support.tiny import write_tiny_log

BOARD = """
workspace: {workspace}
source: {{name: files, path: {events}/events-00000.parquet}}
data:
  name: tiny
  prepare: {{buckets: 3, row_group_events: 200}}
  requests: {{num_negatives: 0, min_label: 0}}
  loader: {{batch_events: 1500, window_row_groups: 2}}
training: {{epochs: 2, loss: catalogue}}
parallel: {{num_workers: 1}}
models:
  SASRec, full:
    model: {{name: sasrec, width: 16, max_length: 8, num_layers: 1}}
    optimizer: {{sparse: adam, sparse_lr: 0.01}}
  SOLAR:
    model: {{name: solar, width: 16, rank: 4, recent_window: 8, checkpoint_every: 4, time_features: false}}
    data: {{requests: {{num_negatives: 8}}}}
    training: {{loss: candidates}}
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("leaderboard")


@pytest.fixture(scope="module")
def board(workplace) -> Path:
    log = write_tiny_log(workplace / "raw")
    path = workplace / "board.yaml"
    path.write_text(BOARD.format(workspace=workplace / "workspace", events=log))
    return path


def test_board_grows_by_rows_and_seeds_and_reuses_what_is_there(board, workplace):
    place = workplace / "workspace" / "leaderboards" / "board"
    first = solar("leaderboard", board, "--only", "SASRec, full", "--seeds", "1", "2", cwd=workplace)
    assert first.returncode == 0, first.stderr
    assert [(result["row"], result["seed"]) for result in results(place)] == [
        ("SASRec, full", 1), ("popularity", 1), ("SASRec, full", 2),
    ]  # fmt: skip
    assert "| SASRec, full | 2 |" in (place / "leaderboard.md").read_text()
    assert "+-" in first.stdout

    whole = solar("leaderboard", board, cwd=workplace)
    assert whole.returncode == 0, whole.stderr
    found = results(place)
    assert [result["row"] for result in found] == ["SASRec, full", "popularity", "SOLAR"]
    by_row = {result["row"]: result for result in found}
    sasrec = by_row["SASRec, full"]
    # 60 rows of 16; two epochs of some steps each; both validations on the curve.
    assert sasrec["parameters"] > 60 * 16
    assert (sasrec["epochs"], sasrec["tables"], len(sasrec["curve"])) == (2, "adam", 2)
    assert sasrec["steps"] >= 2
    assert sasrec["peak_gib"] > 0
    assert sasrec["events_per_second"] > 0
    assert by_row["SOLAR"]["tables"] == "rowwise_adagrad"
    assert (place / "leaderboard.md").read_text() in whole.stdout
    assert (place / "leaderboard.png").read_bytes().startswith(b"\x89PNG")

    again = solar("leaderboard", board, cwd=workplace)
    assert again.returncode == 0, again.stderr
    assert "step " not in again.stdout
    assert results(place) == found


def test_runs_are_children_of_one_mlflow_run_that_holds_the_table(board, workplace):
    place = workplace / "workspace" / "leaderboards" / "board"
    client = mlflow_client(f"sqlite:///{workplace}/workspace/mlflow/mlflow.db")
    parent = json.loads((place / "run.json").read_text())["mlflow_run_id"]
    for result in results(place):
        if result["mlflow_run_id"]:
            assert client.get_run(result["mlflow_run_id"]).data.tags["mlflow.parentRunId"] == parent
    assert {file.path for file in client.list_artifacts(parent)} >= {"leaderboard.md", "leaderboard.png"}
    assert client.get_run(parent).info.status == "FINISHED"
    assert "SOLAR/ndcg_at_10" in client.get_run(parent).data.metrics


def test_mistakes_are_told_in_one_line(board, workplace):
    assert "one of beauty, ml-100k, ml-1m" in refused("leaderboard", "nothing", cwd=workplace)
    assert "--only 'BERT': must be one of SASRec, full, SOLAR" in refused(
        "leaderboard", board, "--only", "BERT", cwd=workplace
    )
    assert "--seeds" in refused("leaderboard", board, "--seed", "3", cwd=workplace)
    assert "invalid int value" in refused("leaderboard", board, "--seeds", "one", cwd=workplace)
    text = board.read_text()
    for broken, line in (
        (text.replace("rank: 4", "rank: 40"), "models.SOLAR: model.rank = 40 must not exceed width"),
        (text.replace("{loss: candidates}", "{}"), "model solar does not represent requests as vectors"),
        (text[: text.index("models:")], "models must hold"),
    ):
        (workplace / "broken.yaml").write_text(broken)
        assert line in refused("leaderboard", workplace / "broken.yaml", cwd=workplace)


def results(place: Path) -> list[dict]:
    return json.loads((place / "leaderboard.json").read_text())["results"]
