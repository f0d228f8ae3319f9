"""What an evaluation holds while it reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from jobs.config.reader import load_config
from jobs.host.console import Console
from jobs.runs import evaluate as evaluating
from jobs.runs.weights import System
from pipeline.events import EventColumns
from pipeline.prepare.garbage import collect
from pipeline.shards.dataset import Shards


def test_gc_keeps_the_evaluated_state_and_those_on_which_the_systems_were_trained(
    data, prepare, write_log, random_log, tmp_path
):
    columns = EventColumns(action="action", label="label", request_id="request_id")
    for seed in range(1, 4):
        write_log(random_log(seed=seed), f"log/{seed}.parquet")
        prepare(tmp_path / "log", data.path, columns=columns, row_group_events=60)
    job: Any = SimpleNamespace(shards=data.path, manifest=1)
    systems = [
        System(name="solar", key="a", weights="unread", job=job),
        System(name="again", key="b", weights="unread", job=job),
        System(name="served", key="c", weights="unread", job=None),
    ]
    config = load_config("evaluate", "movielens-100k", [])
    with evaluating._leases(config, systems, Shards.open(data.path, number=3), Console()):
        collected = collect(data.path, keep=1)
    assert collected.manifests == [2]
    assert [held.manifest for held in collected.held] == [1, 3]
    assert {held.command for held in collected.held} == {"evaluation of movielens-100k"}
