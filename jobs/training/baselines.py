"""Baselines of an evaluation: what a query could say without a model. The best of them is the floor of a model's
quality (jobs/runs/floor.py).

    popularity    items by their number of training events
    own items     next_item, where users return to items: the user's own, by how often and how recently
    latest items  the same, by how recently alone
    item rate     impressions: the item's share of positive labels in training
    prior         the counting that a model with a prior begins with (models/prior.py), without what it learned
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from jobs.training.catalogue import Catalogue, my_groups
from pipeline.batches.batch import Batch
from pipeline.batches.loader import training_item_labels
from pipeline.batches.requests import RequestConfig
from pipeline.shards.dataset import Shards

POPULARITY, OWN_ITEMS, LATEST_ITEMS, ITEM_RATE = "popularity", "own items", "latest items", "item rate"
PRIOR = "prior"
BASELINES = (PRIOR, OWN_ITEMS, LATEST_ITEMS, ITEM_RATE, POPULARITY)
"""All of them, in the order of tables."""
OWN_HALF_LIFE = 100.0
"""`own items`: an event that is older by this many events has half the weight."""
RATE_EVENTS = 8.0
"""`item rate`: the mean rate counts as this many events of every item."""


def baselines(requests: RequestConfig) -> list[str]:
    """The baselines that the task has for every model, in the order of tables."""
    if requests.task == "impressions":
        return [ITEM_RATE, POPULARITY]
    return [OWN_ITEMS, LATEST_ITEMS, POPULARITY] if requests.seen_items == "kept" else [POPULARITY]


def ranking_scores(baseline: str, catalogue: Catalogue) -> Callable[[Batch], Tensor]:
    """next_item: the function that gives a batch's scores [B, I] of the catalogue's items, or [1, I] if they are those
    of every request."""
    popularity_I = torch.from_numpy(catalogue.training_count.astype(np.float32))
    if baseline == POPULARITY:
        return lambda batch: popularity_I[None]
    # Items outside the history come after those in it, by popularity.
    else_I = popularity_I / (popularity_I.max() + 1)
    return lambda batch: _by_history(batch, else_I=else_I, often=baseline == OWN_ITEMS)


def _by_history(batch: Batch, *, else_I: Tensor, often: bool) -> Tensor:
    """[B, I] 1 + the sum of 2^(-age / OWN_HALF_LIFE) over the item's events in the history, with the age in events, or
    unless `often` that of its latest event alone; for items outside the history `else_I`, which is below 1."""
    scores_BI = else_I.repeat(batch.num_requests, 1)
    start_B = batch.event_offsets[batch.request_user].tolist()
    for score_I, start, length in zip(scores_BI, start_B, batch.request_position.tolist(), strict=True):
        item_n = batch.event_item[start : start + length]
        recency_n = torch.exp2(-torch.arange(length - 1, -1, -1) / OWN_HALF_LIFE)
        score_I[item_n] = 1.0
        if often:
            score_I.index_add_(0, item_n, recency_n)
        else:
            score_I.scatter_reduce_(0, item_n, 1 + recency_n, "amax")
    return scores_BI


def candidate_scores(
    baseline: str, catalogue: Catalogue, shards: Shards, requests: RequestConfig
) -> Callable[[Batch], Tensor]:
    """impressions: the function that gives the logits [M] of a batch's candidates, which are rows of `shards`. A
    collective: all ranks take part."""
    if baseline == POPULARITY:
        count_I = torch.from_numpy(catalogue.training_count.astype(np.float32))
        return lambda batch: count_I[catalogue.translate(batch).candidate_item]
    counts = torch.from_numpy(np.stack(training_item_labels(shards, requests=requests, groups=my_groups(shards))))
    dist.all_reduce(counts)
    positive_I, shown_I = counts.double()
    mean = float((positive_I.sum() + 1) / (shown_I.sum() + 2))
    logit_I = ((positive_I + RATE_EVENTS * mean) / (shown_I + RATE_EVENTS)).logit().float()
    return lambda batch: logit_I[batch.candidate_item]
