"""What is refused before anything is written, and one version for a checkpoint, also if two commands register it."""

from __future__ import annotations

import fcntl
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.config.reader import load_config
from jobs.host.console import Console
from jobs.host.errors import UserError
from jobs.host.locks import try_lock
from jobs.runs import register as registering
from jobs.runs.evaluate import Evaluated
from jobs.runs.register import register
from jobs.runs.run_dir import Trained
from jobs.runs.summary import Summary
from jobs.tracking.champions import ChampionChanged
from jobs.tracking.mlflow_runs import mlflow_client
from jobs.tracking.registry import registry_lock

NAME = "shop"


def test_a_model_whose_metric_is_nan_is_no_version(tmp_path):
    config = load_config("register", "movielens-100k", ["--workspace", str(tmp_path)])
    summary = Summary(
        part="test", task="next_item", split="leave_one_out", primary="ndcg@10", systems=["solar", "popularity"],
        metrics={"solar": {"ndcg@10": math.nan}, "popularity": {"ndcg@10": math.nan}}, slices=[], intervals={},
        ratios={},
    )  # fmt: skip
    trained = Trained(Path("unread"), Path("unread"), "unread", reused=False)
    evaluated = Evaluated(tmp_path / "evaluation", summary, reused=False)
    with pytest.raises(UserError, match=r"evaluation: ndcg@10 of solar is nan, no test request counts for it: not reg"):
        register(config, trained, evaluated, Console())
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def client(tmp_path) -> Any:
    """Versions 1 to 3: version 1 of one checkpoint, versions 2 and 3 of another."""
    client = mlflow_client(f"sqlite:///{tmp_path}/mlflow.db")
    client.create_registered_model(NAME)
    for key in ("one", "other", "other"):
        client.create_model_version(NAME, source="file:///m", tags={"solar.run_key": key})
    return client


def test_commands_of_a_workspace_register_one_after_the_other(tmp_path, monkeypatch):
    config = load_config("register", "ml-1m", ["--workspace", str(tmp_path)])

    def registered(*_: Any) -> str:
        assert try_lock(registry_lock(str(tmp_path)), fcntl.LOCK_EX) is None
        return "registered"

    monkeypatch.setattr(registering, "_register", registered)
    monkeypatch.setattr(registering, "_refuse_unknown_metric", lambda _: None)
    unused: Any = SimpleNamespace()
    assert registering.register(config, unused, unused, Console()) == "registered"
    assert try_lock(registry_lock(str(tmp_path)), fcntl.LOCK_EX) is not None


def test_of_two_versions_that_two_machines_made_of_one_checkpoint_the_first_stays(client):
    mine, theirs = (client.get_model_version(NAME, number) for number in ("3", "2"))
    assert str(registering._only_version(client, NAME, "other", theirs).version) == "2"
    client.create_model_version(NAME, source="file:///m", tags={"solar.run_key": "other"})
    assert str(registering._only_version(client, NAME, "other", mine).version) == "2"
    assert sorted(str(each.version) for each in client.search_model_versions(f"name = '{NAME}'")) == ["1", "2", "4"]
    found: Any = registering._find_version(client, NAME, "one")
    assert str(found.version) == "1"
    assert registering._find_version(client, NAME, "nobody") is None


def test_a_first_version_that_loses_against_another_one_is_a_challenger(client, monkeypatch):
    def lost(*_: Any, **__: Any) -> None:
        raise ChampionChanged("version 2 was made the champion at the same moment")

    monkeypatch.setattr(registering, "promote", lost)
    assert registering._first_is_champion(client, NAME, "3") == "challenger"
    assert client.get_registered_model(NAME).aliases == {"challenger": 3}
