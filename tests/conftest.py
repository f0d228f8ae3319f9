"""Fixtures that more than one kind of test needs."""

from __future__ import annotations

import logging
import os

import pytest

# Ray runs its workers at niceness 15: beside the other half of the tests they would get next to no time.
os.environ.setdefault("RAY_worker_niceness", "0")
# Other tests have the other cores: the threads of pyarrow and polars would take a tenth of the time by waiting.
for name in ("OMP_NUM_THREADS", "POLARS_MAX_THREADS"):
    os.environ.setdefault(name, "1")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Other tests have the other cores: with a thread for each core tests/unit/models and tests/numerics took 104 s of
    CPU time instead of 24, mostly waiting. Processes that tests start have their own."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def local_ray():
    """One small local Ray for a file; idle, its processes would go on taking 3 % of a core."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


LONGEST = (
    "test_simulated_month.py",
    "test_interruptions.py",
    "test_submit.py",
    "test_lost_workers.py",
    "test_submitted_night.py",
    "test_main_job.py",
)
"""They start Ray and go on for minutes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: begun late one would go on alone, with the files that wait behind it."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
