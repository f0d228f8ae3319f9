"""Data sets without Ray, and registered models without training: random weights in the real export format."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.runs.export import write_export
from jobs.tracking.registry import RegisteredModel
from jobs.training.model import model_settings, model_tables
from models.prior import PRIOR_PREFIX, Prior, Task
from models.solar import SolarConfig
from models.zoo import build_tower
from pipeline.batches.requests import RequestConfig
from pipeline.events import EventColumns
from pipeline.shards.dataset import Shards
from tests.support.model_inputs import randomise
from tests.unit.pipeline.conftest import prepare, random_log, write_log

__all__ = ["prepare", "random_log", "write_log"]

WIDTH = 16
SOLAR = SolarConfig(
    width=WIDTH,
    rank=4,
    recent_window=6,
    checkpoint_every=3,
    set_attention=False,
    context_features=True,
    absolute_time=True,
    repeats=True,
)


@pytest.fixture
def data(prepare, write_log, random_log, tmp_path):
    """20 users with tied times, actions, labels and requests, and a genre for most items; most users have a gender and
    any number of hobbies."""
    write_log(random_log())
    genres = {"item_id": list(range(100, 128)), "genre": [f"g{item % 5}" for item in range(28)]}
    items = write_log(genres, "items.parquet")
    hobbies = [[f"h{k}" for k in range(user % 4)] for user in range(1, 20)]
    write_log({"user_id": list(range(1, 20)), "gender": [["f", "m", None][u % 3] for u in range(1, 20)],
               "hobbies": hobbies}, "log/users.parquet")  # fmt: skip
    columns = EventColumns(action="action", label="label", request_id="request_id")
    prepare(tmp_path / "log", tmp_path / "shards", items=str(items), columns=columns, buckets=3, row_group_events=60)
    return Shards.open(str(tmp_path / "shards"))


@pytest.fixture
def export(tmp_path):
    """Export a tower with random weights over a data set's vocabulary: a RegisteredModel, whose tags are empty."""

    def make(data: Shards, *, name: str = "export", **settings: Any) -> RegisteredModel:
        return random_export(data, Path(tmp_path) / name, **settings)

    return make


def random_export(
    data: Shards, directory: Path, *, max_history: int = 7, min_label: int = 0, task: Task = "next_item", **model: Any
) -> RegisteredModel:
    """SOLAR with random weights, exported to `directory`; `model` changes its settings. It reads every event, unless
    `min_label` is 1."""
    torch.manual_seed(3)
    whole = solar_settings(**model)
    tower = randomise(build_tower(model_settings(whole, data.vocabulary), num_features=len(data.vocabulary.features)))
    specs = model_tables(whole, data.vocabulary)
    tables = {spec.name: torch.randn(spec.capacity, spec.width) for spec in specs}
    weights = tower.state_dict()
    if whole["prior"]:
        prior = randomise(Prior(task))
        weights |= {f"{PRIOR_PREFIX}{name}": parameter.detach() for name, parameter in prior.named_parameters()}
    write_export(
        directory, shards=data, config={}, model=whole,
        requests=RequestConfig(task=task, max_history=max_history, min_label=min_label),
        table=tables.__getitem__, tower=weights,
    )  # fmt: skip
    return RegisteredModel(name="tiny", version="1", alias=None, directory=directory, tags={})


def solar_settings(**model: Any) -> dict[str, Any]:
    return {"name": "solar", **dataclasses.asdict(SOLAR), **model}
