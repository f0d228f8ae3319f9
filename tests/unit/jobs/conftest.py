"""Data sets without Ray, and registered models without training: random weights in the real export format."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.register import write_export
from jobs.registry import RegisteredModel
from jobs.training.model import build_tower, model_settings, table_specs
from models.solar import SolarConfig
from pipeline.events import EventColumns
from pipeline.requests import RequestConfig
from pipeline.shards import Shards
from tests.unit.models.model_inputs import randomise
from tests.unit.pipeline.conftest import prepare, random_log, write_log

__all__ = ["prepare", "random_log", "write_log"]

WIDTH = 16
SOLAR = SolarConfig(width=WIDTH, rank=4, recent_window=6, checkpoint_every=3, set_attention=False)


@pytest.fixture
def data(prepare, write_log, random_log, tmp_path):
    """20 users with tied times, actions, labels and requests, and a genre for most items."""
    write_log(random_log())
    genres = {"item_id": list(range(100, 128)), "genre": [f"g{item % 5}" for item in range(28)]}
    items = write_log(genres, "items.parquet")
    columns = EventColumns(action="action", label="label", request_id="request_id")
    prepare(tmp_path / "log", tmp_path / "shards", items=str(items), columns=columns, buckets=3, row_group_events=60)
    return Shards.open(str(tmp_path / "shards"))


@pytest.fixture
def export(tmp_path):
    """Export a tower with random weights over a data set's vocabulary: a RegisteredModel, whose tags are empty."""

    def make(data: Shards, *, max_history: int = 7, name: str = "export", **model: Any) -> RegisteredModel:
        torch.manual_seed(3)
        whole = {"name": "solar", **dataclasses.asdict(SOLAR), **model}
        tower = randomise(
            build_tower(model_settings(whole, data.vocabulary), num_features=len(data.vocabulary.features))
        )
        sizes = {spec.name: spec.capacity for spec in table_specs(data.vocabulary, width=WIDTH)}
        tables = {table: torch.randn(size, WIDTH) for table, size in sizes.items()}
        directory = Path(tmp_path) / name
        write_export(
            directory, shards=data, config={}, model=whole, requests=RequestConfig(max_history=max_history),
            table=tables.__getitem__, tower=tower.state_dict(),
        )  # fmt: skip
        return RegisteredModel(name="tiny", version="1", alias=None, directory=directory, tags={})

    return make
