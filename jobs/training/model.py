"""From settings and a vocabulary to the specifications of tables and tower; from a batch to a tower's input."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from models.embeddings import ITEM_TABLE, USER_TABLE, ItemFeature, TableSpec, UserCodes
from models.interface import ModelInput, known_candidates, refuse_bad_rows
from models.zoo import MODELS
from pipeline.batches.batch import Batch
from pipeline.shards.vocabulary import NUM_RESERVED, Vocabulary, capacity_for


class ItemRows(Protocol):
    """The look-up of table rows: in sharded tables (tables.py), or in a registered model (exported.py)."""

    def look_up(self, item_rows_I: Tensor, /) -> tuple[Tensor, Tensor]:
        """(item_IC, features_IFC) of distinct items."""
        ...

    def look_up_with_users(self, item_rows_I: Tensor, users: UserCodes, /) -> tuple[Tensor, Tensor, Tensor]:
        """(item_IC, features_IFC, user_features_UGC) of distinct items and of users."""
        ...


def model_settings(settings: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """The settings, completed with the numbers that depend on the data: of action codes and of user features."""
    config_class, _ = MODELS[settings["name"]]
    names = {field.name for field in dataclasses.fields(config_class)}
    found = {"num_actions": vocabulary.num_actions, "num_user_features": len(user_features(settings, vocabulary))}
    return {**settings, **{name: value for name, value in found.items() if name in names}}


def user_features(settings: Mapping[str, Any], vocabulary: Vocabulary) -> list[str]:
    """The user features that the model reads, in the order of users' codes: all that the data have, or none."""
    return list(vocabulary.user_features) if settings.get("user_features") else []


def user_tables(settings: Mapping[str, Any], vocabulary: Vocabulary) -> list[str]:
    """The names of the tables of `user_features`."""
    return [f"{USER_TABLE}{name}" for name in user_features(settings, vocabulary)]


def model_tables(settings: Mapping[str, Any], vocabulary: Vocabulary) -> list[TableSpec]:
    """The tables that a model trains, by its settings."""
    return table_specs(
        vocabulary,
        width=settings["width"],
        user_features=user_features(settings, vocabulary),
        feature_width=settings.get("feature_width"),
    )


def table_specs(
    vocabulary: Vocabulary,
    *,
    width: int,
    user_features: Sequence[str] = (),
    feature_width: int | Mapping[str, int] | None = None,
) -> list[TableSpec]:
    """One table for items, one per item feature and one for each of these user features, each with its capacity.

    `feature_width`: width of the features' tables, one number or by name; None or a missing name = `width`.
    """

    def width_of(feature: str) -> int:
        wanted = feature_width.get(feature) if isinstance(feature_width, Mapping) else feature_width
        return width if wanted is None else wanted

    specs = [TableSpec(name=ITEM_TABLE, capacity=vocabulary.capacity, width=width)]
    for name, feature in vocabulary.features.items():
        specs.append(TableSpec(name=name, capacity=feature.capacity, width=width_of(name)))
    for name in user_features:
        capacity = capacity_for(len(vocabulary.user_features[name]) + NUM_RESERVED)
        specs.append(TableSpec(name=f"{USER_TABLE}{name}", capacity=capacity, width=width_of(name)))
    return specs


def item_features(vocabulary: Vocabulary) -> list[ItemFeature]:
    """The item features as rows of their tables."""
    return [
        ItemFeature(name=name, offsets=torch.from_numpy(feature.offsets), values=torch.from_numpy(feature.values))
        for name, feature in vocabulary.features.items()
    ]


@dataclasses.dataclass(frozen=True)
class WantedItems:
    """The distinct items of a batch, whose rows a step looks up."""

    rows_I: Tensor
    """Their rows in the table, ascending."""
    event_item_N: Tensor
    """Index in `rows_I` of each event's item."""
    candidate_item_M: Tensor
    """Index in `rows_I` of each candidate."""

    @classmethod
    def of(cls, batch: Batch) -> WantedItems:
        """The distinct items of a batch. ValueError: a request has no candidates."""
        empty = torch.nonzero(batch.candidate_offsets.diff() == 0)
        if empty.numel():
            raise ValueError(
                f"request {int(empty[0])} of the batch has no candidates: there is nothing to rank; omit it"
            )
        rows, index = torch.unique(torch.cat([batch.event_item, batch.candidate_item]), return_inverse=True)
        return cls(rows, index[: batch.num_events], index[batch.num_events :])


def training_input(batch: Batch, tables: ItemRows) -> ModelInput:
    """The tower's input: looks up every distinct item of the batch once, and its users. A collective: all ranks take
    part, also with an empty batch.

    ValueError: a request has no candidates, or models/interface.py refuses the input.
    """
    wanted = WantedItems.of(batch)
    return wanted_input(batch, wanted, *tables.look_up_with_users(wanted.rows_I, user_codes(batch)))


def wanted_input(
    batch: Batch, wanted: WantedItems, item_IC: Tensor, features_IFC: Tensor, user_features_UGC: Tensor
) -> ModelInput:
    """The tower's input from a batch and the looked-up rows of its distinct items. ValueError: models/interface.py
    refuses the input."""
    refuse_bad_rows(item_IC, features_IFC)
    return model_input(
        batch,
        item_IC=item_IC,
        features_IFC=features_IFC,
        user_features_UGC=user_features_UGC,
        event_item_N=wanted.event_item_N,
        candidate_item_M=wanted.candidate_item_M,
        item_row_I=wanted.rows_I,
        num_reserved=int((wanted.rows_I < NUM_RESERVED).sum()),
    )


def catalogue_input(
    batch: Batch,
    item_IC: Tensor,
    features_IFC: Tensor,
    user_features_UGC: Tensor,
    *,
    candidates: Tensor | range = range(0),
) -> ModelInput:
    """The tower's input from a batch and the rows of the whole vocabulary, in its order. `candidates`: items that are
    the candidates of every request, or [B, I] bool: those of each."""
    if isinstance(candidates, range):
        size_B = torch.full((batch.num_requests,), len(candidates))
        item_M = torch.arange(candidates.start, candidates.stop).repeat(batch.num_requests)
    else:
        size_B, item_M = candidates.sum(1), torch.nonzero(candidates)[:, 1]
    return model_input(
        dataclasses.replace(batch, candidate_offsets=torch.cat([size_B.new_zeros(1), size_B.cumsum(0)])),
        item_IC=item_IC,
        features_IFC=features_IFC,
        user_features_UGC=user_features_UGC,
        event_item_N=batch.event_item,
        candidate_item_M=item_M,
        item_row_I=torch.arange(len(item_IC)),
        num_reserved=NUM_RESERVED,
    )


def user_codes(batch: Batch) -> UserCodes:
    """The user features of the batch's users."""
    return UserCodes(lengths_UG=batch.user_feature_lengths, values=batch.user_feature_values)


def model_input(
    batch: Batch,
    *,
    item_IC: Tensor,
    features_IFC: Tensor,
    user_features_UGC: Tensor,
    event_item_N: Tensor,
    candidate_item_M: Tensor,
    item_row_I: Tensor,
    num_reserved: int,
) -> ModelInput:
    """The batch with its items replaced by indices into looked-up rows, on the device of the rows, in the same layout.

    Does not check the rows; the caller does (`refuse_bad_rows`).
    """

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(item_IC.device, non_blocking=True)

    return ModelInput(
        item_IC=item_IC,
        features_IFC=features_IFC,
        user_features_UGC=user_features_UGC,
        event_offsets_U1=batch.event_offsets,
        event_item_N=move(event_item_N),
        event_time_N=move(batch.event_time),
        event_action_N=move(batch.event_action),
        event_label_N=move(batch.event_label),
        request_user_B=batch.request_user,
        request_position_B=batch.request_position,
        request_time_B=move(batch.request_time),
        candidate_offsets_B1=batch.candidate_offsets,
        candidate_item_M=move(candidate_item_M),
        item_row_I=move(item_row_I),
        num_reserved=num_reserved,
        known_candidates_B=known_candidates(
            candidate_item_M, candidate_offsets_B1=batch.candidate_offsets, num_reserved=num_reserved
        ),
    ).refuse_bad_layout()


def select_requests(batch: Batch, first: int, last: int) -> Batch:
    """Requests first..last-1 alone, with their users, and of each user only the events in some request's history."""
    request_user, position = batch.request_user[first:last], batch.request_position[first:last]
    users, renumbered = torch.unique_consecutive(request_user, return_inverse=True)
    length = torch.zeros(len(users), dtype=torch.int64).scatter_reduce(0, renumbered, position, "amax")
    offsets = torch.cat([length.new_zeros(1), length.cumsum(0)])
    total = batch.user_feature_lengths.sum(1)
    known = places_of_runs((total.cumsum(0) - total)[users], total[users])
    event = places_of_runs(batch.event_offsets[users], length)
    start, end = int(batch.candidate_offsets[first]), int(batch.candidate_offsets[last])
    return dataclasses.replace(
        batch,
        user=batch.user[users],
        user_feature_lengths=batch.user_feature_lengths[users],
        user_feature_values=batch.user_feature_values[known],
        event_offsets=offsets,
        event_item=batch.event_item[event],
        event_time=batch.event_time[event],
        event_action=batch.event_action[event],
        event_label=batch.event_label[event],
        request_user=renumbered,
        request_position=position,
        request_time=batch.request_time[first:last],
        request_key=batch.request_key[first:last],
        candidate_offsets=batch.candidate_offsets[first : last + 1] - start,
        candidate_item=batch.candidate_item[start:end],
        candidate_label=batch.candidate_label[start:end],
    )


def places_of_runs(start: Tensor, length: Tensor) -> Tensor:
    """start[0], start[0] + 1, ... (length[0] numbers), then start[1], start[1] + 1, ..., and so on."""
    before = length.cumsum(0) - length
    return torch.arange(int(length.sum())) + torch.repeat_interleave(start - before, length)
