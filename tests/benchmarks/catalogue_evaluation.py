"""python tests/benchmarks/catalogue_evaluation.py [--items N] [--requests N] [--history N]: ranking a whole catalogue.

Synthetic users whose last event is ranked among all items, by untrained towers on one process with one thread, as an
evaluation does it: items encoded once, histories read once, candidates scored in blocks; and beside it with the whole
catalogue in one forward. Both alternate; each line is the median of three. The last column is the largest difference of
the two log losses.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.distributed as dist

# A script's own directory is on the path, the repository's root is not.
sys.path.insert(0, str(Path(__file__).parents[2]))

from jobs.cluster.worker import quiet_libraries
from jobs.training.catalogue import catalogue_of, training_counts
from jobs.training.catalogue_scorer import CatalogueScorer
from jobs.training.evaluation import evaluate, evaluation_loader
from jobs.training.model import item_features, table_specs
from jobs.training.optimizers import OptimizerConfig
from jobs.training.results import RankedTargets
from jobs.training.tables import ShardedTables
from models.zoo import MODELS, tower_class
from pipeline.batches.requests import RequestConfig
from pipeline.shards.dataset import Shards
from tests.support.tiny import prepare_tiny

TOWERS: dict[str, dict[str, Any]] = {"solar": {"set_attention": False}, "din": {}, "light_sans": {}}
WIDTH, ROUNDS = 64, 3
LAST = RequestConfig(min_label=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=24_000)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--history", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as place:
        dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=0, world_size=1)
        shards = synthetic_shards(Path(place), options.items, options.requests, options.history)
        print(f"{options.requests} requests, {shards.vocabulary.size:,} rows, histories of {options.history} events\n")
        print(f"{'model':<12} {'in blocks':>14} {'one forward':>14} {'ratio':>6}  {'difference':>10}")
        for name, settings in TOWERS.items():
            show(name, settings, shards)
        dist.destroy_process_group()


def synthetic_shards(place: Path, items: int, users: int, history: int) -> Shards:
    """Every user has `history` events of random items and one more; every item occurs."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(users), history + 1)
    item = rng.integers(0, items, len(user))
    # Every item occurs: further users have two events each, too few for a request.
    user, item = np.concatenate([user, users + np.arange(items) // 2]), np.concatenate([item, np.arange(items)])
    log = pl.DataFrame({"user_id": user, "item_id": item, "timestamp": 1_600_000_000 + np.arange(len(user))})
    (place / "log").mkdir()
    log.write_parquet(place / "log" / "events-00000.parquet")
    return prepare_tiny(place / "log", place / "shards", LAST)


def show(name: str, settings: dict[str, Any], shards: Shards) -> None:
    config_class, tower_of = MODELS[name][0], tower_class(name)
    tables = ShardedTables(
        table_specs(shards.vocabulary, width=WIDTH), item_features(shards.vocabulary), optimizer=OptimizerConfig(),
        device="cpu",
    )  # fmt: skip
    tables.initialize(seed=1, std=1.0)
    tower = tower_of(config_class(width=WIDTH, **settings), num_features=len(shards.vocabulary.features))
    counts = training_counts(shards, requests=LAST)
    catalogue = catalogue_of(shards, requests=LAST, training_count=counts)
    loader = evaluation_loader(shards, requests=LAST, part="test")
    ways = {"blocks": CatalogueScorer._by_blocks, "forward": CatalogueScorer._at_once}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    losses = {}
    for _ in range(ROUNDS):
        for way, function in ways.items():
            CatalogueScorer._by_blocks = function
            began = time.perf_counter()
            result = evaluate(tower, tables, loader, catalogue=catalogue)
            seconds[way].append(time.perf_counter() - began)
            assert isinstance(result, RankedTargets)
            losses[way] = result.log_loss
    CatalogueScorer._by_blocks = ways["blocks"]
    blocks, forward = (1000 * statistics.median(seconds[way]) / loader.num_requests for way in ways)
    difference = float(np.abs(losses["blocks"] - losses["forward"]).max())
    print(f"{name:<12} {blocks:>11.1f} ms {forward:>11.1f} ms {forward / blocks:>6.2f}  {difference:>10.1e}")


if __name__ == "__main__":
    main()
