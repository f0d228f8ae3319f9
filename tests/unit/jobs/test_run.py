"""What the main job says at its end."""

from __future__ import annotations

import shlex

from jobs.config.reader import load_config
from jobs.run import next_commands


def test_what_to_try_next_survives_a_shell_whatever_the_paths_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my recipes").mkdir()
    recipe = tmp_path / "my recipes" / "o'clock & more.yaml"
    recipe.write_text("data: {name: shop}\n")
    workspace = str(tmp_path / "all runs; $HOME")
    config = load_config("run", str(recipe), ["--workspace", workspace, "--name", "mine"])
    inspect, browse, again = map(shlex.split, next_commands(config))
    assert inspect[1:] == ["inspect", f"{workspace}/shards/shop", "--verify"]
    assert browse[1:] == ["ui", "--backend-store-uri", f"sqlite:///{workspace}/mlflow/mlflow.db"]
    assert again[1:] == ["run", str(recipe), "--workspace", workspace, "--name", "mine-seed-2", "--seed", "2"]
