"""Evaluation against a brute-force reading of the raw log: who is ranked, among what, with which items removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn

from jobs.training.evaluation import RankedTargets, evaluate, evaluate_counts
from jobs.training.model import item_features, table_specs
from jobs.training.optimizers import OptimizerConfig
from jobs.training.parallel import ShardedTables
from models.interface import ModelInput
from pipeline.batch import Batch
from pipeline.build import PrepareConfig, index_requests, prepare
from pipeline.loader import training_item_counts
from pipeline.requests import RequestConfig
from pipeline.shards import Shards
from tests.distributed.ranks import run_ranks
from tests.tiny import write_tiny_log

REQUESTS = RequestConfig()


class LengthTimesItem(nn.Module):
    """A score that depends on the item and on how much history is shown, and can be computed by hand."""

    def forward(self, inputs: ModelInput) -> Tensor:
        size_B = inputs.candidate_offsets_B1.diff()
        length_M = torch.repeat_interleave(inputs.request_position_B, size_B)
        return score(inputs.candidate_item_M, length_M)


def score(item: Any, length: Any) -> Any:
    return ((item * 37 + length * 11) % 61) * 1.0


def evaluate_here(shards_dir: str) -> dict[str, RankedTargets]:
    shards = Shards.open(shards_dir)
    tables = ShardedTables(
        table_specs(shards.vocabulary, width=4),
        item_features(shards.vocabulary),
        optimizer=OptimizerConfig(),
        device="cpu",
    )
    counts = training_item_counts(shards, requests=REQUESTS)
    arguments: dict[str, Any] = {"requests": REQUESTS, "part": "test"}
    results = {
        "model": evaluate(LengthTimesItem(), tables, shards, **arguments),
        "emptied": evaluate(LengthTimesItem(), tables, shards, transform=Batch.without_history, **arguments),
        "popularity": evaluate_counts(shards, counts, **arguments),
    }
    return {name: result for name, result in results.items() if isinstance(result, RankedTargets)}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, local_ray) -> tuple[Path, Shards, list[dict[str, RankedTargets]]]:
    directory = tmp_path_factory.mktemp("evaluation")
    log = write_tiny_log(directory / "log")
    prepare(str(log), str(directory / "shards"), config=PrepareConfig(buckets=3, row_group_events=200))
    shards = Shards.open(str(directory / "shards"))
    index_requests(shards, config=REQUESTS)
    return log, shards, run_ranks(evaluate_here, 2, str(directory / "shards"))


def histories(log: Path) -> dict[int, list[int]]:
    events = pl.read_parquet(log / "events-00000.parquet").sort("user_id", "timestamp", "item_id")
    return {user: items["item_id"].to_list() for (user,), items in events.group_by("user_id", maintain_order=True)}  # type: ignore[misc]


def rank_by_hand(scores: dict[int, float], target: int, removed: set[int]) -> float:
    others = [value for item, value in scores.items() if item != target and item not in removed]
    better = sum(value > scores[target] for value in others)
    equal = sum(value == scores[target] for value in others)
    return 1 + better + equal / 2


@pytest.mark.parametrize("system", ["model", "emptied", "popularity"])
def test_ranks_equal_brute_force_on_every_rank(evaluated, system):
    log, shards, per_rank = evaluated
    catalogue = shards.vocabulary.raw(np.arange(2, shards.vocabulary.size)).to_pylist()
    row = {item: place for place, item in enumerate(catalogue, start=2)}
    by_user = histories(log)
    popularity = {item: 0 for item in catalogue}
    for items in by_user.values():
        for item in items[:-2]:
            popularity[item] += 1
    user_ids = shards.index.user_id.to_pylist()
    for results in per_rank:
        result = results[system]
        assert sorted(user_ids[user] for user in result.user) == sorted(by_user)
        for place, user in enumerate(result.user):
            *history, target = by_user[user_ids[user]]
            shown = {"model": len(history), "emptied": 0, "popularity": 0}[system]
            scores = {item: score(row[item], shown) for item in catalogue}
            if system == "popularity":
                scores = {item: float(count) for item, count in popularity.items()}
            assert result.history_length[place] == len(history)
            assert result.rank_kept[place] == rank_by_hand(scores, target, set())
            assert result.rank_removed[place] == rank_by_hand(scores, target, set(history))
            assert not result.tied[place]
