"""A data set small enough for every test that trains: 40 users, 60 items, items of the same genre follow each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline.batches.requests import RequestConfig
from pipeline.build import PrepareConfig, index_requests, prepare
from pipeline.shards.dataset import Shards
from tests.support.serial import without_ray

NUM_USERS, NUM_ITEMS, NUM_GENRES = 40, 60, 4


def write_tiny_log(directory: Path, *, seed: int = 0) -> Path:
    """An event log (user_id, item_id, timestamp, label, request_id) with tables of items (genres) and users (taste)."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(NUM_USERS):
        item = int(rng.integers(NUM_ITEMS))
        for place in range(int(rng.integers(6, 30))):
            step = NUM_GENRES * int(rng.integers(1, 4))
            item = int(rng.integers(NUM_ITEMS)) if rng.random() < 0.2 else (item + step) % NUM_ITEMS
            rows.append((user, 100 + item, 1_000_000 + 5_000 * place, int(rng.random() < 0.4), place // 3))
    directory.mkdir(parents=True, exist_ok=True)
    names = ["user_id", "item_id", "timestamp", "label", "request_id"]
    events = pl.DataFrame(rows, schema=names, orient="row")
    events = events.with_columns((pl.col("timestamp") * 1000).cast(pl.Datetime("ms", "UTC")))
    events.write_parquet(directory / "events-00000.parquet")
    items = pl.DataFrame(
        {
            "item_id": [100 + item for item in range(NUM_ITEMS)],
            "genres": [[f"g{item % NUM_GENRES}"] + (["rare"] if item % 7 == 0 else []) for item in range(NUM_ITEMS)],
        }
    )
    items.write_parquet(directory / "items.parquet")
    # The last user has no row.
    tastes = {
        "user_id": range(NUM_USERS - 1),
        "taste": [["old", "new", None][user % 3] for user in range(NUM_USERS - 1)],
    }
    pl.DataFrame(tastes).write_parquet(directory / "users.parquet")
    return directory


def prepare_tiny(log: Path, out: Path, *requests: RequestConfig) -> Shards:
    """Shards of the log, with these requests counted; without Ray."""
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch.setattr)
        prepare(str(log), str(out), config=PrepareConfig(buckets=3, row_group_events=200))
        for config in requests:
            index_requests(Shards.open(str(out)), config=config)
    return Shards.open(str(out))


def write_tiny_recipe(path: Path, *, workspace: Path, events: Path) -> Path:
    """A recipe that trains on it within seconds, on one worker."""
    path.write_text(
        f"""
workspace: {workspace}
compare: [mean_pooling]
source: {{name: files, path: {events}/events-00000.parquet, items_path: {events}/items.parquet,
          users_path: {events}/users.parquet,
          files: {{columns: {{label: label, request_id: request_id}}, items: {{list_features: [genres]}},
                   users: {{features: [taste]}}}}}}
data:
  name: tiny
  prepare: {{buckets: 3, row_group_events: 200}}
  requests: {{num_negatives: 8, min_label: 0}}
  loader: {{batch_events: 1500, window_row_groups: 2}}
model: {{name: solar, width: 16, rank: 4, recent_window: 8, checkpoint_every: 4, dropout: 0.1,
        context_features: true, time_features: true, set_attention: true, history_labels: false,
        prior: false}}
optimizer: {{warmup_steps: 5}}
training: {{epochs: 2}}
parallel: {{num_workers: 1}}
"""
    )
    return path
