"""`solar run` as a user types it, on a tiny log: from raw events to a registered model that scores elsewhere."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from jobs.config.reader import load_config
from jobs.host.console import Console
from jobs.runs.run_dir import settled
from jobs.runs.train import train
from jobs.tracking.mlflow_runs import mlflow_client
from tests.support.commands import refused, solar
from tests.support.interruptions import differences, learned
from tests.support.listening import run_and_look
from tests.support.serial import command_without_ray
from tests.support.tiny import write_tiny_log, write_tiny_recipe


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("main-job")


@pytest.fixture(scope="module")
def recipe(workplace) -> Path:
    log = write_tiny_log(workplace / "raw")
    return write_tiny_recipe(workplace / "tiny.yaml", workspace=workplace / "workspace", events=log)


@pytest.fixture(scope="module")
def watched_run(recipe, workplace) -> tuple[subprocess.CompletedProcess[str], set[tuple[str, str]]]:
    """As a user starts it, and where its processes listened; what follows on it starts no Ray."""
    return run_and_look("run", recipe, cwd=workplace)


@pytest.fixture(scope="module")
def first_run(watched_run) -> subprocess.CompletedProcess[str]:
    return watched_run[0]


def test_first_run_ends_with_metrics_places_and_a_champion(first_run, workplace):
    assert first_run.returncode == 0, first_run.stderr
    out = first_run.stdout
    for system in ("solar", "solar, history emptied", "mean_pooling", "popularity"):
        assert system in out
    assert "solar-tiny version 1 (champion)" in out
    assert "try next:" in out
    plots = workplace / "workspace" / "runs" / "tiny" / "plots"
    assert {path.name for path in plots.iterdir()} >= {"loss.png", "spectrum.png"}
    summary = json.loads((workplace / "workspace/runs/tiny/evaluation/summary.json").read_text())
    assert {metrics["requests"] for metrics in summary["metrics"].values()} == {40.0}
    assert summary["ratios"]["popularity"]["low"] <= summary["ratios"]["popularity"]["value"]


def test_a_local_ray_listens_on_loopback_alone(watched_run):
    """Beside it only rank 0's store of torch, in a worker that executes a job (infra/README.md)."""
    listened = watched_run[1]
    assert {"gcs_server", "raylet"} <= {name for name, _ in listened}
    elsewhere = {name for name, address in listened if address != "127.0.0.1"}
    assert [name for name in elsewhere if not re.search(r"TrainWorker|^ray::execute\.", name)] == []


def test_one_group_of_workers_did_every_job_of_the_command(first_run, workplace):
    # Two trainings and an evaluation; Ray Train makes a directory for each group that it starts.
    assert first_run.returncode == 0, first_run.stderr
    runs = workplace / "workspace" / "runs"
    assert len(list(runs.glob("*/ray/workers-*"))) == 1
    assert {path.name for path in runs.iterdir()} == {"tiny", "tiny-mean_pooling"}


def test_a_job_leaves_nothing_to_the_next_one_in_its_group(first_run, recipe, workplace, monkeypatch):
    assert first_run.returncode == 0, first_run.stderr
    # The second training of the command, and the same in a process of its own.
    second = settled(load_config("train", str(recipe), [])).with_model("mean_pooling")
    command_without_ray(monkeypatch.setattr)
    alone = train(dataclasses.replace(second, name="alone"), Console(), resume=False)
    assert differences(learned(alone.run_dir), learned(second.run_dir)) == []


def test_libraries_stay_silent(first_run):
    noise = ("WARNING", "Warning", "deepspeed", "raylet", "INFO")
    assert [
        line for line in (first_run.stdout + first_run.stderr).splitlines() if any(word in line for word in noise)
    ] == []


def test_second_run_reuses_everything(first_run, recipe, workplace):
    again = solar("run", recipe, cwd=workplace)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("already there") >= 6
    assert "step " not in again.stdout
    assert "already there: solar-tiny version 1 (champion)" in again.stdout


def test_mlflow_run_holds_config_metrics_plots_and_lineage(first_run, workplace):
    client = mlflow_client(f"sqlite:///{workplace}/workspace/mlflow/mlflow.db")
    version = client.get_model_version_by_alias("solar-tiny", "champion")
    assert version.run_id
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["model.rank"] == "4"
    assert run.data.metrics["test/ndcg_at_10"] >= 0
    assert "test/solar/history emptied/ndcg_at_10" in run.data.metrics
    steps = client.get_metric_history(version.run_id, "train/loss")
    assert [point.step for point in steps] == list(range(1, len(steps) + 1))
    assert {"solar.git_commit", "solar.manifest_fingerprint", "system.torch"} <= run.data.tags.keys()
    assert version.tags["solar.manifest"] == "1"
    assert {artifact.path for artifact in client.list_artifacts(version.run_id)} >= {"plots", "evaluation"}


SCORE_ELSEWHERE = """
import importlib.util, json, sys
for name in ("models", "pipeline", "jobs"):
    assert importlib.util.find_spec(name) is None, name
import mlflow, pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/solar-tiny@champion")
frame = pd.DataFrame(json.loads(sys.argv[2]))
print(json.dumps([list(map(float, row)) for row in model.predict(frame)["scores"]]))
"""


def test_champion_scores_in_a_process_without_this_repository_as_training_does(first_run, workplace, tmp_path):
    begin, minute = 1_000_000_000, 60_000
    requests = [
        {
            "history": [100, 104, 108, 112],
            "history_time": [begin + minute * k for k in range(4)],
            "candidates": [116, 101, 999],
            "taste": "new",
        },
        {"history": [], "history_time": [], "candidates": [105, 106], "taste": None},
        {"history": [], "history_time": [], "candidates": [105, 106], "taste": "old"},
    ]
    site = tmp_path / "site"
    site.mkdir()
    installed = Path(json.__file__).parent, next(Path(path) for path in sys.path if path.endswith("site-packages"))
    # The editable install of this repository is a .pth file and a finder: link everything else.
    for entry in installed[1].iterdir():
        if "solar_recommender" not in entry.name:
            (site / entry.name).symlink_to(entry)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": str(site)}
    base = Path(sys.executable).resolve()
    uri = f"sqlite:///{workplace}/workspace/mlflow/mlflow.db"
    done = subprocess.run(
        [str(base), "-S", "-c", SCORE_ELSEWHERE, uri, json.dumps(requests)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    elsewhere = json.loads(done.stdout.splitlines()[-1])
    # Same weights, same float32 arithmetic, the same order of operations.
    for row, expected in zip(elsewhere, scores_of_training(workplace, requests), strict=True):
        assert row == pytest.approx(expected, abs=1e-5)
    assert elsewhere[1] != pytest.approx(elsewhere[2], abs=1e-5)


def scores_of_training(workplace: Path, requests: list[dict]) -> list[list[float]]:
    """The same requests through the repository's own scorer class and the checkpoint's weights."""
    from jobs.config.reader import load_config
    from jobs.runs.export import export_model
    from jobs.runs.run_dir import trained_run
    from jobs.scorer.scorer import Scorer

    config = load_config("register", str(workplace / "tiny.yaml"), [])
    directory = workplace / "exported"
    export_model(config, trained_run(config).checkpoint, directory, tell=pytest.fail)
    scorer = Scorer()
    scorer.load(directory)
    return [list(row) for row in scorer.predict(None, pd.DataFrame(requests))["scores"]]


def test_inspect_verifies_shards_and_checkpoint_and_names_damage(first_run, workplace):
    shards = workplace / "workspace" / "shards" / "tiny"
    healthy = solar("inspect", shards, "--verify", "--digest", cwd=workplace)
    assert healthy.returncode == 0, healthy.stderr
    assert "every file has its size and checksum" in healthy.stdout
    checkpoint = max((workplace / "workspace/runs/tiny").glob("step-*"))
    assert solar("inspect", checkpoint, "--verify", cwd=workplace).returncode == 0
    damaged = workplace / "damaged"
    damaged.mkdir()
    for file in checkpoint.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes()[: -1 if file.name == "dense.safetensors" else None])
    found = solar("inspect", damaged, "--verify", cwd=workplace)
    assert found.returncode == 1
    assert "damaged: " in found.stdout
    assert "dense.safetensors" in found.stdout


def test_score_ranks_requests_with_given_histories_and_with_those_of_the_shards(first_run, workplace):
    import polars as pl

    events = pl.read_parquet(workplace / "raw/events-00000.parquet").sort("user_id", "timestamp", "item_id")
    asked = events.group_by("user_id", maintain_order=True).agg(
        time=pl.col("timestamp").last(), history=pl.col("item_id"), history_time=pl.col("timestamp"),
        candidates=pl.lit([101, 999, 116]).first(),
    )  # fmt: skip
    users = pl.read_parquet(workplace / "raw/users.parquet")
    asked.join(users, on="user_id", how="left", maintain_order="left").write_parquet(workplace / "given.parquet")
    asked.select("user_id", "time", "candidates").write_parquet(workplace / "asked.parquet")
    model = "models:/solar-tiny@champion"
    results = []
    for requests, more in (("given", []), ("asked", ["--shards", "workspace/shards/tiny"])):
        arguments = ["score", model, "--requests", f"{requests}.parquet", "--out", f"scores/{requests}.parquet", *more]
        done = solar(*arguments, cwd=workplace)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "solar-tiny version 1 (champion)" in done.stdout
        assert "40 unknown to the model" in done.stdout
        results.append(pl.read_parquet(workplace / f"scores/{requests}.parquet"))
        assert "26  of user features, 0 unknown to the model" in done.stdout
    assert results[0].drop("taste").equals(results[1])
    assert results[0]["user_id"].to_list() == asked["user_id"].to_list()
    assert all(set(row) == {101, 999, 116} for row in results[0]["candidates"].to_list())
    ranking = [
        "score",
        model,
        "--requests",
        "users.parquet",
        "--out",
        "top.parquet",
        "--shards",
        "workspace/shards/tiny",
    ]
    asked.select("user_id").write_parquet(workplace / "users.parquet")
    assert "rank the whole catalogue with --top_k" in refused(*ranking, cwd=workplace)
    assert solar(*ranking, "--top_k", "3", cwd=workplace).returncode == 0
    top = pl.read_parquet(workplace / "top.parquet")
    for history, candidates in zip(asked["history"].to_list(), top["candidates"].to_list(), strict=True):
        assert len(candidates) == 3
        assert not set(history) & set(candidates)
    assert "has no alias 'best'; its aliases: champion" in refused(
        "score", "models:/solar-tiny@best", "--requests", "asked.parquet", "--out", "x.parquet", cwd=workplace
    )


def test_run_directory_of_another_configuration_is_refused(first_run, recipe, workplace):
    line = refused("train", recipe, "--model.rank", "3", cwd=workplace)
    assert "belongs to another configuration (model.rank is 4 there, 3 here)" in line


def test_a_checkpoint_and_its_registered_version_evaluate_alike_on_another_split(first_run, workplace):
    """A checkpoint needs its shards, a registered model does not: two ways to the same figures."""
    asked = [
        "--workspace", "workspace", "--part", "test",
        "--data.requests.split", "temporal", "--data.requests.group", "request",
        "--data.requests.valid_from", "1000030000", "--data.requests.test_from", "1000060000",
        "--data.requests.seen_items", "kept",
    ]  # fmt: skip
    checkpoint = next(path for path in read_lines(first_run.stdout) if path.startswith("checkpoint")).split()[1]
    summaries = []
    for subject in (checkpoint, "models:/solar-tiny@champion"):
        done = solar("evaluate", subject, *asked, "--out", workplace / f"out-{len(summaries)}", cwd=workplace)
        assert done.returncode == 0, done.stderr
        summaries.append(json.loads((workplace / f"out-{len(summaries)}" / "summary.json").read_text()))
    assert "repeats" in done.stdout
    first, second = (summary["metrics"]["solar"] for summary in summaries)
    assert first == pytest.approx(second, abs=1e-6, nan_ok=True)
    assert first["requests"] > 40
    assert 0 < first["share_repeats"] < 1
    # The run's directory names its best checkpoint, which is this one.
    again = solar("evaluate", Path(checkpoint).parent, *asked, "--out", workplace / "out-0", cwd=workplace)
    assert "already there" in again.stdout
    line = refused("evaluate", checkpoint, *asked, "--out", workplace / "raw", cwd=workplace)
    assert "not empty and not an evaluation" in line
    assert "remove it" in refused("evaluate", checkpoint, *asked, "--model.rank", "2", cwd=workplace)


def test_drawn_users_are_the_same_for_every_system_and_the_table_says_so(first_run, workplace):
    checkpoint = next(path for path in read_lines(first_run.stdout) if path.startswith("checkpoint")).split()[1]
    options = ["--workspace", "workspace", "--evaluation.requests", "9", "--out", "drawn"]
    done = solar("evaluate", checkpoint, *options, cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert "9 of 40 requests; users are drawn" in done.stdout
    assert "9 requests of 40 (drawn users)" in " ".join(done.stdout.split())
    users = [pq.read_table(file)["user"].to_pylist() for file in (workplace / "drawn").glob("*.parquet")]
    assert len(users) == 3
    assert len(users[0]) == 9
    assert all(each == users[0] for each in users)


def read_lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines()]


def test_shards_that_changed_under_a_run_are_refused(first_run, recipe, workplace):
    from pipeline.shards.manifest import current_manifest

    shards = workplace / "workspace" / "shards" / "tiny"
    extra = write_tiny_log(workplace / "more", seed=1)
    (workplace / "workspace/events/tiny/events-00001.parquet").write_bytes(
        (extra / "events-00000.parquet").read_bytes()
    )
    merged = solar("prepare", "--events", "workspace/events/tiny", "--out", shards, "--buckets", "3",
                   "--row_group_events", "200", cwd=workplace)  # fmt: skip
    assert merged.returncode == 0, merged.stderr
    manifest = current_manifest(str(shards))
    assert manifest is not None
    assert manifest.number == 2
    line = refused("train", recipe, "--resume", cwd=workplace)
    assert "was trained on manifest 1" in line
