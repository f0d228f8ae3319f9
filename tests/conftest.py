"""Fixtures that more than one kind of test needs."""

from __future__ import annotations

import logging
import os

import pytest


@pytest.fixture(scope="session")
def local_ray():
    """One small local Ray for the whole session."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()
