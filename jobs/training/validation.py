"""Validation: the same requests after every epoch, as many as training leaves time for.

The best checkpoint is that with the best primary metric. A model that starts at a prior is of use before its first step
already, so a later checkpoint takes its place only where the validation part tells the difference from chance.
"""

from __future__ import annotations

import math
import resource
import time

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from jobs.cluster.telemetry import Reporter
from jobs.training.catalogue import Catalogue
from jobs.training.checkpoint import TrainState
from jobs.training.evaluation import evaluate, evaluation_loader
from jobs.training.job import TrainJob
from jobs.training.results import primary_metric, primary_per_user
from jobs.training.tables import ShardedTables
from models.metrics import FEWEST_USERS, bootstrap_ratio_interval
from pipeline.batches.loader import EvaluationLoader
from pipeline.shards.dataset import Shards

MOST_REQUESTS, LEAST_REQUESTS = 2_000, 200
"""Bounds of the number of requests that is chosen; fewer would choose a checkpoint by chance."""
MOST_USERS = 10_000
"""Of more users the first ones are compared: checkpoints hold them."""
SHARE = 0.1
"""Share of the training between two validations that one validation may cost."""
TRAINED_PER_RANKED = 4
"""A candidate costs so much more in a training step (forward, backward, update) than an item of the catalogue in a
validation: 3 to 6 times with SOLAR on MovieLens-100K. A constant, not a clock: two runs choose the same requests."""


class _Stopped(Exception):
    """The run is asked to stop; all ranks are told so after the same requests."""


class Validation:
    """The validation of one training run. Methods are collectives."""

    def __init__(self, job: TrainJob, shards: Shards, catalogue: Catalogue, *, planned_scores: int = 0) -> None:
        """`planned_scores`: how many candidates are to be scored until the second validation, where the first one comes
        before the first step."""
        self._job, self._shards, self._catalogue, self._planned = job, shards, catalogue, planned_scores
        self._loader: EvaluationLoader | None = None

    def run(self, state: TrainState, tables: ShardedTables, model: nn.Module, reporter: Reporter) -> bool:
        """Evaluate the validation part; update the best step in `state`. All ranks get the same metrics. False, with
        the best step unchanged, if the run is asked to stop before its end."""
        started = time.perf_counter()
        if state.valid_requests is None:
            state.valid_requests = self._requests(state)
        if self._loader is None:
            limit = state.valid_requests or None
            self._loader = evaluation_loader(self._shards, requests=self._job.requests, part="valid", limit=limit)

        def progress(done: int, total: int) -> None:
            reporter.row("progress", stage="validation", done=done, total=total)
            if reporter.should_stop():
                raise _Stopped

        try:
            result = evaluate(model, tables, self._loader, catalogue=self._catalogue, progress=progress)
        except _Stopped:
            return False
        metrics = result.metrics()
        primary = metrics[primary_metric(self._job.requests)]
        value_U, weight_U = primary_per_user(result, requests=self._job.requests)
        if state.step == 0 and self._job.warm_start is None:
            state.users_at_start = value_U[:MOST_USERS].tolist()
        state.peak_gib = _peak_gib()
        state.validations_since_best += 1
        is_best = not math.isnan(primary) and (state.best_metric is None or primary > state.best_metric)
        if is_best and (state.step == 0 or is_clear(value_U, weight_U, start_U=state.users_at_start)):
            state.best_metric, state.best_step, state.validations_since_best = primary, state.step, 0
        best = math.nan if state.best_metric is None else state.best_metric
        reporter.row("valid", step=state.step, seconds=time.perf_counter() - started, best=best, **metrics)
        return True

    def _requests(self, state: TrainState) -> int:
        """Requests of each validation, 0 = all, by what was trained until the first one."""
        asked = self._job.training.valid_requests
        if asked is not None:
            return asked
        if self._job.requests.task != "next_item":
            return MOST_REQUESTS
        scored = state.scored or self._planned
        affordable = SHARE * TRAINED_PER_RANKED * scored / self._catalogue.num_items
        return round(min(max(affordable, LEAST_REQUESTS), MOST_REQUESTS))


def is_clear(value_U: np.ndarray, weight_U: np.ndarray, *, start_U: list[float] | None) -> bool:
    """Whether users have more than at the start, by the one-sided 95 % bound of the paired difference. True without a
    start, and where users are too few to tell."""
    if start_U is None or len(value_U) < FEWEST_USERS:
        return True
    more_U = value_U[:MOST_USERS] - np.array(start_U)
    return bootstrap_ratio_interval(more_U, weight_U[:MOST_USERS], seed=0, level=0.9).low > 0


def _peak_gib() -> float:
    """The sum over ranks of their peak resident memory, in GiB. A collective."""
    peak = torch.tensor([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20])
    dist.all_reduce(peak)
    return float(peak)
