"""The main job in another form: its commands one by one, for ranked impressions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.support.commands import refused, succeeded
from tests.support.tiny import write_tiny_log, write_tiny_recipe


@pytest.fixture
def recipe(tmp_path) -> Path:
    """A recipe whose events are ranked as they were shown; a comparison is asked for and never trained."""
    log = write_tiny_log(tmp_path / "raw")
    path = write_tiny_recipe(tmp_path / "tiny.yaml", workspace=tmp_path / "workspace", events=log)
    changed = yaml.safe_load(path.read_text())
    changed["training"]["epochs"] = 1
    changed["data"]["requests"] = {
        "task": "impressions", "split": "temporal", "min_history": 2,
        "valid_from": 1_000_000_000 + 5_000_000 * 10, "test_from": 1_000_000_000 + 5_000_000 * 15,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(changed))
    return path


def test_import_prepare_train_and_register_one_by_one_report_probabilities_of_impressions(recipe, tmp_path):
    workspace = ["--workspace", tmp_path / "workspace"]
    source, out = yaml.safe_load(recipe.read_text())["source"], tmp_path / "workspace"
    columns = ["--columns.label", "label", "--columns.request_id", "request_id"]
    succeeded("import", "files", source["path"], "--out", out / "events/tiny", *columns, *workspace, cwd=tmp_path)
    succeeded(
        "prepare", "--events", out / "events/tiny", "--out", out / "shards/tiny", "--buckets", "3", *columns,
        cwd=tmp_path,
    )  # fmt: skip
    assert "run `solar train` first" in refused("evaluate", recipe, *workspace, cwd=tmp_path)
    succeeded("train", recipe, *workspace, cwd=tmp_path)
    registered = succeeded("register", recipe, *workspace, cwd=tmp_path)
    assert "without mean_pooling: not trained" in registered
    assert "models:/solar-tiny@champion (champion)" in registered
    evaluated = succeeded("evaluate", recipe, *workspace, cwd=tmp_path)
    assert "requests with at least 2 earlier events" in evaluated
    metrics = json.loads((out / "runs/tiny/evaluation/summary.json").read_text())["metrics"]["solar"]
    assert 0 <= metrics["auc"] <= 1
    assert metrics["logloss"] > 0
    assert metrics["requests_skipped"] >= 0
