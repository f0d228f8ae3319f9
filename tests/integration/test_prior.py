"""A model with a prior as a user trains, evaluates and registers it, and where it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from models.prior import BARRED
from tests.support.commands import refused, succeeded
from tests.support.tiny import write_tiny_log, write_tiny_recipe

# Every event of a user's first fifteen trains, the next five validate.
TEMPORAL = [
    *("--data.requests.split", "temporal", "--data.requests.seen_items", "kept", "--compare", "[]"),
    *("--data.requests.valid_from", "1075000000", "--data.requests.test_from", "1100000000", "--model.prior", "true"),
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("prior")
    log = write_tiny_log(directory / "raw")
    write_tiny_recipe(directory / "tiny.yaml", workspace=directory / "workspace", events=log)
    return directory


@pytest.fixture(scope="module")
def output(workplace) -> str:
    return succeeded("run", "tiny.yaml", *TEMPORAL, cwd=workplace)


def summary_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text())


def test_the_prior_alone_is_a_system_of_the_evaluation_and_may_be_its_floor(output, workplace):
    summary = summary_of(workplace / "workspace/runs/tiny/evaluation")
    assert summary["systems"] == [
        "solar", "solar, history emptied", "prior", "own items", "latest items", "popularity",
    ]  # fmt: skip
    assert {metrics["requests"] for metrics in summary["metrics"].values()} == {summary["metrics"]["solar"]["requests"]}
    assert "prior" in summary["ratios"]
    assert "prior " in output
    # The floor is the best of the baselines, of which it is one.
    whole, best = summary["slices"][0], {}
    for name in ("prior", "own items", "latest items", "popularity"):
        best[name] = whole["systems"][name]["value"]
    assert best[whole["floor"]["baseline"]] == max(best.values())


def test_its_run_has_a_setting_that_was_settled_and_a_checkpoint_of_before_the_first_step(output, workplace):
    run = workplace / "workspace/runs/tiny"
    assert json.loads((run / "run.json").read_text())["config"]["model"]["prior"] is True
    assert "model.prior" not in output
    steps = sorted(path.name for path in run.glob("step-*"))
    state = json.loads((run / steps[-1] / "state.json").read_text())["train_state"]
    assert f"step-{state['best_step']:08d}" in steps


@pytest.mark.usefixtures("output")
def test_the_registered_model_is_evaluated_as_its_checkpoint_and_scores_elsewhere_with_its_counters(workplace):
    asked = ["models:/solar-tiny@champion", "--workspace", "workspace"]
    succeeded("evaluate", *asked, "--out", "registered", cwd=workplace)
    theirs, ours = summary_of(workplace / "workspace/runs/tiny/evaluation"), summary_of(workplace / "registered")
    assert ours["systems"] == theirs["systems"]
    for name in ("solar", "prior"):
        assert ours["metrics"][name] == pytest.approx(theirs["metrics"][name], abs=1e-6, nan_ok=True)
    requests = pl.DataFrame(
        {
            "history": [[], []],
            "history_time": [[], []],
            "time": [1_000_000_000, 1_100_000_000],
            "candidates": [[100 + item for item in range(60)]] * 2,
        },
        schema_overrides={"history": pl.List(pl.Int64), "history_time": pl.List(pl.Int64)},
    )
    requests.write_parquet(workplace / "requests.parquet")
    succeeded("score", *asked, "--requests", "requests.parquet", "--out", "scores.parquet", cwd=workplace)
    before, after = pl.read_parquet(workplace / "scores.parquet")["scores"].to_list()
    # Before the first day nothing is known: every candidate is barred.
    assert max(before) < BARRED / 2 < max(after)


def test_a_prior_is_refused_where_nothing_says_what_was_known_when_and_for_a_loss_of_vectors(output, workplace):
    assert output
    shards = ["--data.shards", "workspace/shards/tiny", "--model.prior", "true"]
    line = refused("train", "tiny.yaml", *shards, "--name", "last", cwd=workplace)
    assert "model.prior=true: data.requests.split is leave_one_out" in line
    vectors = ["--model.name", "sasrec", "--training.loss", "catalogue", "--data.requests.num_negatives", "0"]
    line = refused("train", "tiny.yaml", *TEMPORAL[:-2], *vectors, *shards, "--name", "vectors", cwd=workplace)
    assert "model.prior=true: training.loss=catalogue compares vectors alone" in line
