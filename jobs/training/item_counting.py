"""The counters of a data set's items by day (models/item_counters.py), read from its sequence shards.

They are counted from the events themselves whenever a run begins, in one pass that every rank makes over its share of
the row groups: so they are right after late events, conflicts, forgetting and compaction, and nothing has to be kept in
step with the shards.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from jobs.training.catalogue import Catalogue, my_groups
from models.interface import Recommender
from models.item_counters import MS_PER_DAY, ItemCounters
from models.prior import Prior, PriorModel
from pipeline.batches.requests import RequestConfig
from pipeline.shards.dataset import Shards
from pipeline.shards.vocabulary import NUM_RESERVED


def with_prior(
    tower: Recommender, prior: Prior | None, shards: Shards, *, requests: RequestConfig, catalogue: Catalogue,
    evidence: np.ndarray,
) -> Recommender:  # fmt: skip
    """The model that is evaluated on `shards`: the tower and its prior with the counters of these shards, by the rows
    of the model; the tower alone if there is no prior. `evidence`: [R] as for `count_items`. A collective: all ranks
    take part."""
    if prior is None:
        return tower
    counters = count_items(
        shards,
        min_label=requests.least_label,
        evidence=evidence,
        row_of_item=catalogue.row_of_item,
    )
    return PriorModel(tower, prior, counters).to(next(tower.parameters()).device)


def count_items(
    shards: Shards,
    *,
    min_label: int,
    evidence: np.ndarray,
    row_of_item: Tensor | None = None,
    day_ms: int = MS_PER_DAY,
) -> ItemCounters:
    """The counters of all events whose label is at least `min_label`, as the task reads them.

    `evidence`: [R] how often training moved each of the model's rows; `row_of_item`: the data's rows -> the model's,
    None where both are the same. A collective: all ranks take part; without a process group one process reads
    everything.
    """
    local, waiting = np.zeros((4, 0), np.int64), []
    for group in my_groups(shards):
        events = shards.read(group, min_label=min_label)
        row = np.asarray(events.item) if row_of_item is None else row_of_item.numpy()[events.item]
        label = np.zeros(len(row), np.int64) if events.label is None else (events.label > 0).astype(np.int64)
        counted = np.stack([row, np.asarray(events.time) // day_ms, np.ones_like(row), label])
        # What the model does not know is many items in one row: nothing is known of any of them.
        waiting.append(_summed(counted[:, row >= NUM_RESERVED]))
        # Merge when as much waits as there is, so that a pair is sorted a few times, however many row groups there are.
        if sum(part.shape[1] for part in waiting) >= local.shape[1]:
            local, waiting = _summed(np.concatenate([local, *waiting], axis=1)), []
    local = _summed(np.concatenate([local, *waiting], axis=1))
    gathered: list[Any] = [local]
    if dist.is_initialized():
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, local)
    row, day, events, positives = (torch.from_numpy(each) for each in _summed(np.concatenate(gathered, axis=1)))
    return ItemCounters(
        row_K=row, day_K=day, events_K=events, positives_K=positives,
        training_R=torch.from_numpy(evidence), day_ms=day_ms,
    )  # fmt: skip


def _summed(counts_4K: np.ndarray) -> np.ndarray:
    """Rows (item row, day, events, positives) with one column for each pair of row and day, in ascending order."""
    order = np.lexsort((counts_4K[1], counts_4K[0]))
    row, day, events, positives = (np.ascontiguousarray(each[order]) for each in counts_4K)
    first = np.flatnonzero(np.append(True, (np.diff(row) != 0) | (np.diff(day) != 0))[: len(row)])
    if not len(first):
        return counts_4K
    return np.stack([row[first], day[first], np.add.reduceat(events, first), np.add.reduceat(positives, first)])
