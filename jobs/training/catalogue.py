"""The items that a model can rank, and the mapping from the vocabulary of a data set to the model's vocabulary.

A model knows the items of the data on which it was trained. Evaluated on that data, its rows are the data's rows. On
another data set, rows are matched by raw id: an item that the model does not know becomes its unknown row, which is
never recommended.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from models.embeddings import UserCodes
from pipeline.batches.batch import Batch
from pipeline.batches.loader import training_item_counts
from pipeline.batches.requests import RequestConfig
from pipeline.shards.dataset import Shards
from pipeline.shards.vocabulary import NUM_RESERVED, UNKNOWN, Vocabulary

ALWAYS = -(1 << 62)
"""First time of an item without events in the data: the item is always ranked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Catalogue:
    """The model's rows and the facts about them that an evaluation needs."""

    num_items: int
    """I: rows of the model's vocabulary in use, including the reserved ones."""
    num_data_items: int
    """Items of the data, including those that the model does not know."""
    row_of_item: Tensor | None
    """[the data's capacity] int64: the data's row -> the model's row; None where both are the same."""
    code_of_action: Tensor | None
    """[the data's actions] int64: the data's action code -> the model's code; None where both are the same."""
    user_values: UserValues | None
    """The same mapping for user features; None where both are the same."""
    training_count: np.ndarray
    """[I] int64: how often each item is a positive of the model's training requests, before any cap."""
    first_time: Tensor | None
    """[I] int64: time of the item's first event, also one at which it was only shown; before that time the item is not
    ranked. None = all items are always ranked."""

    def ranked(self, request_time_B: Tensor, *, all_times: bool = False) -> Tensor:
        """[B, I] bool: the items that are ranked for requests of these times: not the reserved rows and, unless
        `all_times`, no item that appears later."""
        item_I = torch.arange(self.num_items) >= NUM_RESERVED
        if self.first_time is None or all_times:
            return item_I.expand(len(request_time_B), -1)
        return item_I & (self.first_time <= request_time_B[:, None])

    def translate(self, batch: Batch) -> Batch:
        """The batch with the model's rows and codes instead of the data's."""
        if self.row_of_item is not None:
            batch = dataclasses.replace(
                batch,
                event_item=self.row_of_item[batch.event_item],
                candidate_item=self.row_of_item[batch.candidate_item],
            )
        if self.code_of_action is not None:
            batch = dataclasses.replace(batch, event_action=self.code_of_action[batch.event_action])
        return batch if self.user_values is None else self.user_values.translate(batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserValues:
    """The mapping from a data set's user features to those of a model; features and values are matched by name."""

    feature: Tensor
    """[model's features] int64: index of the data's feature; -1 = the data lack it, and no user has a value."""
    row: tuple[Tensor, ...]
    """For each feature of the model, [rows of the data's feature] int64: the model's row, UNKNOWN if it has none."""

    @classmethod
    def between(cls, data: Vocabulary, model: Vocabulary) -> UserValues:
        """The mapping from the rows of the data's vocabulary to those of the model's."""
        names = list(data.user_features)
        rows = []
        for name, values in model.user_features.items():
            row_of = {value: row for row, value in enumerate(values, start=NUM_RESERVED)}
            known = [row_of.get(value, UNKNOWN) for value in data.user_features.get(name, ())]
            rows.append(torch.tensor([0, UNKNOWN, *known]))
        feature = [names.index(name) if name in names else -1 for name in model.user_features]
        return cls(feature=torch.tensor(feature, dtype=torch.int64), row=tuple(rows))

    def translate(self, batch: Batch) -> Batch:
        """The batch with the model's features and rows."""
        theirs = UserCodes(lengths_UG=batch.user_feature_lengths, values=batch.user_feature_values)
        num_users, num_features = batch.num_users, len(self.row)
        lengths_UG = torch.zeros(num_users, num_features, dtype=torch.int64)
        cells, values = [torch.zeros(0, dtype=torch.int64)] * 2
        for place, (feature, row) in enumerate(zip(self.feature.tolist(), self.row, strict=True)):
            if feature >= 0:
                found, lengths_UG[:, place] = theirs.of(feature)
                owner = torch.arange(num_users) * num_features + place
                cells = torch.cat([cells, torch.repeat_interleave(owner, lengths_UG[:, place])])
                values = torch.cat([values, row[found]])
        # Values were collected feature by feature; a batch has them user by user.
        by_user = torch.argsort(cells, stable=True)
        return dataclasses.replace(batch, user_feature_lengths=lengths_UG, user_feature_values=values[by_user])


def catalogue_of(
    data: Shards, *, requests: RequestConfig, training_count: np.ndarray, vocabulary: Vocabulary | None = None
) -> Catalogue:
    """The catalogue of a model that is evaluated on `data`; `vocabulary`: the model's, None = that of `data`.

    A collective: all ranks take part.
    """
    ours, theirs = data.vocabulary, vocabulary or data.vocabulary
    row_of_item = code_of_action = user_values = None
    if theirs.fingerprint != ours.fingerprint:
        rows = np.full(ours.capacity, UNKNOWN, np.int64)
        rows[0] = 0
        rows[NUM_RESERVED : ours.size] = theirs.rows(ours.items)
        row_of_item = torch.from_numpy(rows)
        codes = {name: code for code, name in enumerate(theirs.actions)}
        code_of_action = torch.tensor([codes.get(name, 0) for name in ours.actions])
        user_values = UserValues.between(ours, theirs)
    return Catalogue(
        num_items=theirs.size,
        num_data_items=ours.size - NUM_RESERVED,
        row_of_item=row_of_item,
        code_of_action=code_of_action,
        user_values=user_values,
        training_count=training_count[: theirs.size],
        first_time=_first_times(data, row_of_item, theirs.size) if requests.split == "temporal" else None,
    )


def training_counts(shards: Shards, *, requests: RequestConfig) -> np.ndarray:
    """[capacity] int64: how often each row is a positive of a training request, before any cap. A collective; without a
    process group one process counts everything."""
    counts = torch.from_numpy(training_item_counts(shards, requests=requests, groups=my_groups(shards)))
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts.numpy()


def evidence_counts(shards: Shards, *, requests: RequestConfig, training_count: np.ndarray) -> np.ndarray:
    """[capacity] int64: how often each row is a positive of any training request, also of those before `train_from`,
    on which earlier runs trained the weights. `training_count`: those of this run. A collective, like
    `training_counts`."""
    if requests.train_from is None:
        return training_count
    return training_counts(shards, requests=requests.of_all_times)


def _first_times(shards: Shards, row_of_item: Tensor | None, num_items: int) -> Tensor:
    """[I] time of each item's first event, ALWAYS if it has none. A collective: each rank reads its row groups."""
    latest = torch.iinfo(torch.int64).max
    first_I = torch.full((num_items,), latest)
    for group in my_groups(shards):
        events = shards.read(group)
        # Copies: the arrays are Arrow's, which nobody may write to and PyTorch cannot mark as such.
        item, time = torch.tensor(events.item), torch.tensor(events.time)
        rows = item if row_of_item is None else row_of_item[item]
        first_I.scatter_reduce_(0, rows, time, "amin")
    dist.all_reduce(first_I, op=dist.ReduceOp.MIN)
    return torch.where(first_I == latest, ALWAYS, first_I)


def my_groups(shards: Shards) -> range:
    """The row groups that this rank reads; without a process group all."""
    first, step = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return range(first, shards.num_groups, step)
