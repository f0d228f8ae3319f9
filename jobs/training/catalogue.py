"""The items that a model can rank, seen from a data set that may have another vocabulary.

A model knows the items of the data it was trained on. Evaluated on that data its rows are the data's rows; on another
data set raw ids say which row is which: what the model does not know is its unknown row, and can never be found.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.batch import Batch
from pipeline.loader import training_item_counts
from pipeline.requests import RequestConfig
from pipeline.shards import Shards
from pipeline.vocabulary import NUM_RESERVED, UNKNOWN, Vocabulary

ALWAYS = -(1 << 62)
"""First time of an item that the log at hand does not date."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Catalogue:
    """The model's rows and what the evaluation must know about them."""

    num_items: int
    """I, rows of the model's vocabulary in use, the reserved ones included."""
    row_of_item: Tensor | None
    """[the data's capacity] int64: the data's row -> the model's row; None where both are the same."""
    code_of_action: Tensor | None
    """[the data's actions] int64: the same for action codes."""
    training_count: np.ndarray
    """[I] int64: positives of the model's training requests, before any cap."""
    first_time: Tensor | None
    """[I] int64: time of the item's first event; an item is not ranked before it. None = all are always known."""

    def translate(self, batch: Batch) -> Batch:
        """The batch in the model's rows."""
        if self.row_of_item is not None:
            batch = dataclasses.replace(
                batch,
                event_item=self.row_of_item[batch.event_item],
                candidate_item=self.row_of_item[batch.candidate_item],
            )
        if self.code_of_action is not None:
            batch = dataclasses.replace(batch, event_action=self.code_of_action[batch.event_action])
        return batch


def catalogue_of(
    data: Shards, *, requests: RequestConfig, training_count: np.ndarray, vocabulary: Vocabulary | None = None
) -> Catalogue:
    """The catalogue of a model to be evaluated on `data`; `vocabulary` is the model's where it is another one.

    All ranks join.
    """
    ours, theirs = data.vocabulary, vocabulary or data.vocabulary
    row_of_item = code_of_action = None
    if theirs.fingerprint != ours.fingerprint:
        rows = np.full(ours.capacity, UNKNOWN, np.int64)
        rows[0] = 0
        rows[NUM_RESERVED : ours.size] = theirs.rows(ours.items)
        row_of_item = torch.from_numpy(rows)
        codes = {name: code for code, name in enumerate(theirs.actions)}
        code_of_action = torch.tensor([codes.get(name, 0) for name in ours.actions])
    return Catalogue(
        num_items=theirs.size,
        row_of_item=row_of_item,
        code_of_action=code_of_action,
        training_count=training_count[: theirs.size],
        first_time=_first_times(data, row_of_item, theirs.size) if requests.split == "temporal" else None,
    )


def training_counts(shards: Shards, *, requests: RequestConfig) -> np.ndarray:
    """[capacity] int64: how often each row is a positive of a training request, before any cap. All ranks join."""
    counts = torch.from_numpy(training_item_counts(shards, requests=requests, groups=_my_groups(shards)))
    dist.all_reduce(counts)
    return counts.numpy()


def _first_times(shards: Shards, row_of_item: Tensor | None, num_items: int) -> Tensor:
    latest = torch.iinfo(torch.int64).max
    first_I = torch.full((num_items,), latest)
    for group in _my_groups(shards):
        events = shards.read(group)
        item = torch.from_numpy(events.item)
        rows = item if row_of_item is None else row_of_item[item]
        first_I.scatter_reduce_(0, rows, torch.from_numpy(events.time), "amin")
    dist.all_reduce(first_I, op=dist.ReduceOp.MIN)
    return torch.where(first_I == latest, ALWAYS, first_I)


def _my_groups(shards: Shards) -> range:
    return range(dist.get_rank(), shards.num_groups, dist.get_world_size())
