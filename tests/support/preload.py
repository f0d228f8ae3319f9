"""What a fork finds imported: all that takes seconds. Only the process that is forked imports it (see forks.py)."""

from __future__ import annotations

import importlib

from jobs.cluster.session import quiet_environment
from jobs.cluster.worker import quiet_libraries

# Libraries read these settings when they are imported.
quiet_environment()
quiet_libraries()

for name in (
    "torch",
    "torch.distributed.optim",
    "torchrec",
    "deepspeed",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "ray.data",
    "ray.train.torch",
    "jobs.commands.training",
    "jobs.doctor",
    "jobs.nightly.night",
    "jobs.run",
    "jobs.runs.plots",
    "jobs.runs.leaderboard",
    "jobs.serving.build_states",
    "jobs.serving.score",
    "jobs.training.loop",
):
    importlib.import_module(name)
