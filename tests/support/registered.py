"""A registered model without training: random weights over a small log, in an MLflow store of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from jobs.host.places import Place
from jobs.runs.export import log_export
from jobs.tracking.mlflow_runs import TrackingConfig, mlflow_client
from jobs.tracking.registry import RegisteredModel, fetch_model
from pipeline import build
from pipeline.events import EventColumns
from pipeline.shards.dataset import Shards
from tests.support.serial import without_ray
from tests.unit.jobs.conftest import random_export, solar_settings

SIZES = {1: 900, 2: 700, 3: 20}
"""Events of each user."""


def prepared_users(place: Path) -> Shards:
    """Users with SIZES events some minutes apart, two of whom have a plan."""
    rng, sizes = np.random.default_rng(4), list(SIZES.values())
    log = {
        "user_id": np.repeat(list(SIZES), sizes),
        "item_id": rng.integers(100, 160, sum(sizes)),
        "timestamp": 1_700_000_000 + np.concatenate([60 * rng.integers(1, 4, n).cumsum() for n in sizes]),
        "action": rng.choice(["click", "view"], sum(sizes)),
    }
    (place / "log").mkdir()
    pl.DataFrame(log).write_parquet(place / "log" / "events.parquet")
    pl.DataFrame({"user_id": [1, 2], "plan": ["a", "b"]}).write_parquet(place / "log" / "users.parquet")
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch.setattr)
        config = build.PrepareConfig(columns=EventColumns(action="action"), buckets=2)
        build.prepare(str(place / "log"), str(place / "shards"), config=config)
    return Shards.open(str(place / "shards"))


def store(place: Path) -> str:
    """The tracking URI of `registered`."""
    return f"sqlite:///{place}/mlflow.db"


def registered(place: Path, data: Shards) -> RegisteredModel:
    """SOLAR as models:/tiny/1."""
    import mlflow

    settings: dict[str, Any] = {"repeats": False}
    random_export(data, place / "model", max_history=2000, **settings)
    mlflow.set_tracking_uri(store(place))
    experiment = mlflow.create_experiment("tiny", artifact_location=(place / "artifacts").as_uri())
    with mlflow.start_run(experiment_id=experiment):
        info = log_export(place / "model", model=solar_settings(**settings), vocabulary=data.vocabulary)
    client = mlflow_client(store(place))
    client.create_registered_model("tiny")
    client.create_model_version("tiny", source=info.model_uri)
    return fetch_model("models:/tiny/1", tracking=TrackingConfig(uri=Place(store(place))), workspace=str(place))
