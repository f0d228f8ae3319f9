"""Data sets without Ray: prepare's own code, its tasks run one after the other."""

from __future__ import annotations

import polars as pl
import pytest

from pipeline import build
from tests.support.serial import without_ray


@pytest.fixture
def prepare(monkeypatch):
    """build.prepare with every task in this process; results still pass through JSON, as with Ray."""

    without_ray(monkeypatch.setattr)

    def run(events, out, *, items=None, users=None, **config):
        return build.prepare(str(events), str(out), config=build.PrepareConfig(**config), items=items, users=users)

    return run


@pytest.fixture
def write_log(tmp_path):
    """Write a table as one Parquet file of an event log; the file's path."""

    def write(columns, name="log/events.parquet", **options):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pl.DataFrame(columns).write_parquet(path, **options)
        return path

    return write


@pytest.fixture
def random_log():
    """users x events with ties, repeated items and actions; deterministic by seed."""

    def make(num_users=20, num_items=30, events=15, seed=0, **extra):
        import numpy as np

        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, 2 * events, num_users)
        user = np.repeat(np.arange(num_users), lengths)
        return pl.DataFrame(
            {
                "user_id": user,
                "item_id": rng.integers(100, 100 + num_items, len(user)),
                "timestamp": rng.integers(0, 50, len(user)) * 600,
                "action": rng.choice(["click", "view"], len(user)),
                "label": rng.integers(0, 2, len(user)),
                "request_id": rng.integers(0, 6, len(user)),
                **extra,
            }
        )

    return make
