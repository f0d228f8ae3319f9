"""The trial before an evaluation: its first requests are timed, to decide how many are measured and to tell how long
that takes. A part that is small is measured as a whole, without a trial."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import nn

from jobs.training.catalogue import Catalogue
from jobs.training.evaluation import evaluate, evaluation_loader
from jobs.training.extent import EvaluationConfig, Extent, fitting
from jobs.training.model import ItemRows
from pipeline.batches.request_index import part_counts
from pipeline.batches.requests import RequestConfig
from pipeline.shards.dataset import Shards

TRIAL_REQUESTS = 100
"""Requests that are timed."""
SMALL = 1_000
"""A part with no more requests is measured without a trial."""


def extent_of(
    model: nn.Module, tables: ItemRows, shards: Shards, *, config: EvaluationConfig, catalogue: Catalogue,
    requests: RequestConfig, part: str, enough: int | None = None,
) -> Extent:  # fmt: skip
    """Decide how many requests are measured; `model` is the first one. `enough`: as many as the decision needs that is
    taken from them; None = not known. A collective: all ranks take part."""
    whole = int(part_counts(shards, requests, part).requests.sum())
    if whole <= SMALL:
        small = config.requests if config.requests and config.requests < whole else None
        return Extent(limit=small, requests=whole, seconds=None)

    # Time some requests; all ranks use the time of rank 0, so that they decide alike.
    began = time.perf_counter()
    first = evaluation_loader(shards, requests=requests, part=part, limit=TRIAL_REQUESTS)
    evaluate(model, tables, first, catalogue=catalogue)
    elapsed = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
    dist.broadcast(elapsed, src=0)
    each = float(elapsed) / TRIAL_REQUESTS

    limit = config.requests
    if limit is None:
        limit = fitting(config.minutes * 60, each)
        limit = min(limit, enough or limit)
    if not limit or limit >= whole:
        return Extent(limit=None, requests=whole, seconds=whole * each)
    return Extent(limit=limit, requests=whole, seconds=limit * each)
