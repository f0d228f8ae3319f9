"""The main job in other forms: ranked impressions, and its commands one by one; each in a workspace of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.commands import refused, solar
from tests.tiny import write_tiny_log, write_tiny_recipe


@pytest.fixture
def recipe(tmp_path) -> Path:
    log = write_tiny_log(tmp_path / "raw")
    return write_tiny_recipe(tmp_path / "tiny.yaml", workspace=tmp_path / "workspace", events=log)


def test_impressions_task_reports_probabilities(recipe, tmp_path):
    changed = yaml.safe_load(recipe.read_text())
    changed["compare"] = []
    changed["data"]["requests"] = {
        "task": "impressions", "split": "temporal", "min_history": 2,
        "valid_from": 1_000_000_000 + 5_000_000 * 10, "test_from": 1_000_000_000 + 5_000_000 * 15,
    }  # fmt: skip
    file = tmp_path / "impressions.yaml"
    file.write_text(yaml.safe_dump(changed))
    done = solar("run", file, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "workspace/runs/impressions/evaluation/summary.json").read_text())["metrics"]
    assert 0 <= metrics["solar"]["auc"] <= 1
    assert metrics["solar"]["logloss"] > 0
    assert metrics["solar"]["requests_skipped"] >= 0
    assert "requests with at least 2 earlier events" in done.stdout


def test_train_evaluate_register_one_by_one_also_without_the_comparison(recipe, tmp_path):
    workspace = ["--workspace", tmp_path / "workspace"]
    config = yaml.safe_load(recipe.read_text())
    for command in ("import", "prepare"):
        source, out = config["source"], tmp_path / "workspace"
        arguments = {
            "import": ["files", source["path"], "--out", out / "events/tiny"],
            "prepare": ["--events", out / "events/tiny", "--out", out / "shards/tiny", "--buckets", "3"],
        }[command]
        assert solar(command, *arguments, *workspace, cwd=tmp_path).returncode == 0
    assert "run `solar train` first" in refused("evaluate", recipe, *workspace, cwd=tmp_path)
    trained = solar("train", recipe, *workspace, "--training.epochs", "1", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    registered = solar("register", recipe, *workspace, "--training.epochs", "1", cwd=tmp_path)
    assert registered.returncode == 0, registered.stderr
    assert "without mean_pooling: not trained" in registered.stdout
    assert "models:/solar-tiny@champion (champion)" in registered.stdout
