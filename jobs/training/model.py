"""From a configuration and a shard directory to tables and tower; from a batch to what a tower reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from models.din import Din, DinConfig
from models.embeddings import ITEM_TABLE, ItemFeature, TableSpec
from models.interface import ModelInput, Recommender
from models.light_sans import LightSans, LightSansConfig
from models.linear_attention import LinearAttention, LinearAttentionConfig
from models.mean_pooling import MeanPooling, MeanPoolingConfig
from models.solar import Solar, SolarConfig
from pipeline.batch import Batch
from pipeline.vocabulary import Vocabulary

MODELS: Mapping[str, tuple[type, type[Recommender]]] = {
    "solar": (SolarConfig, Solar),
    "din": (DinConfig, Din),
    "linear_attention": (LinearAttentionConfig, LinearAttention),
    "light_sans": (LightSansConfig, LightSans),
    "mean_pooling": (MeanPoolingConfig, MeanPooling),
}
"""`model.name` -> (its config, its tower)."""


class ItemRows(Protocol):
    """Rows of the item tables: sharded ones (parallel.py), or those of a registered model."""

    def look_up(self, item_rows_I: Tensor, /) -> tuple[Tensor, Tensor]:
        """(item_IC, features_IFC) of distinct items."""
        ...


def model_settings(settings: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """The settings with what the data decide filled in: how many action codes there are."""
    config_class, _ = MODELS[settings["name"]]
    names = {field.name for field in dataclasses.fields(config_class)}
    return {**settings, **({"num_actions": vocabulary.num_actions} if "num_actions" in names else {})}


def build_tower(settings: Mapping[str, Any], *, num_features: int) -> Recommender:
    """A tower with its weights drawn from torch's current random state; `settings` = `name` and the config's fields."""
    config_class, tower_class = MODELS[settings["name"]]
    config = config_class(**{key: value for key, value in settings.items() if key != "name"})
    return tower_class(config, num_features=num_features)


def table_specs(vocabulary: Vocabulary, *, width: int) -> list[TableSpec]:
    """One table for items and one per item feature, each of its capacity."""
    specs = [TableSpec(name=ITEM_TABLE, capacity=vocabulary.capacity, width=width)]
    for name, feature in vocabulary.features.items():
        specs.append(TableSpec(name=name, capacity=feature.capacity, width=width))
    return specs


def item_features(vocabulary: Vocabulary) -> list[ItemFeature]:
    """The item features as rows of their tables."""
    return [
        ItemFeature(name=name, offsets=torch.from_numpy(feature.offsets), values=torch.from_numpy(feature.values))
        for name, feature in vocabulary.features.items()
    ]


def training_input(batch: Batch, tables: ItemRows) -> ModelInput:
    """Look every distinct item of the batch up once. Joined by every rank, also with an empty batch.

    ValueError: a request without candidates, or what models/interface.py refuses.
    """
    if bool((batch.candidate_offsets.diff() == 0).any()):
        empty = int(torch.nonzero(batch.candidate_offsets.diff() == 0)[0])
        raise ValueError(f"request {empty} of the batch has no candidates: there is nothing to rank; leave it out")
    rows, index = torch.unique(torch.cat([batch.event_item, batch.candidate_item]), return_inverse=True)
    item_IC, features_IFC = tables.look_up(rows)
    return model_input(
        batch,
        item_IC=item_IC,
        features_IFC=features_IFC,
        event_item_N=index[: batch.num_events],
        candidate_item_M=index[batch.num_events :],
    )


def model_input(
    batch: Batch, *, item_IC: Tensor, features_IFC: Tensor, event_item_N: Tensor, candidate_item_M: Tensor
) -> ModelInput:
    """The batch with its items replaced by indices into looked-up rows, on the device of the rows; the layout stays."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(item_IC.device, non_blocking=True)

    return ModelInput(
        item_IC=item_IC,
        features_IFC=features_IFC,
        event_offsets_U1=batch.event_offsets,
        event_item_N=move(event_item_N),
        event_time_N=move(batch.event_time),
        event_action_N=move(batch.event_action),
        request_user_B=batch.request_user,
        request_position_B=batch.request_position,
        request_time_B=move(batch.request_time),
        candidate_offsets_B1=batch.candidate_offsets,
        candidate_item_M=move(candidate_item_M),
    ).refuse_mistakes()


def select_requests(batch: Batch, first: int, last: int) -> Batch:
    """Requests first..last-1 alone: their users, and of these the events up to the last one that some request sees."""
    request_user, position = batch.request_user[first:last], batch.request_position[first:last]
    users, renumbered = torch.unique_consecutive(request_user, return_inverse=True)
    length = torch.zeros(len(users), dtype=torch.int64).scatter_reduce(0, renumbered, position, "amax")
    offsets = torch.cat([length.new_zeros(1), length.cumsum(0)])
    event = torch.arange(int(offsets[-1])) + torch.repeat_interleave(batch.event_offsets[users] - offsets[:-1], length)
    start, end = int(batch.candidate_offsets[first]), int(batch.candidate_offsets[last])
    return dataclasses.replace(
        batch,
        user=batch.user[users],
        event_offsets=offsets,
        event_item=batch.event_item[event],
        event_time=batch.event_time[event],
        event_action=batch.event_action[event],
        request_user=renumbered,
        request_position=position,
        request_time=batch.request_time[first:last],
        request_key=batch.request_key[first:last],
        candidate_offsets=batch.candidate_offsets[first : last + 1] - start,
        candidate_item=batch.candidate_item[start:end],
        candidate_label=batch.candidate_label[start:end],
    )
