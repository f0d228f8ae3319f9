"""Reads users' histories by raw id from sequence shards, as rows and codes of a registered model."""

from __future__ import annotations

import functools

import numpy as np
import pandas as pd
import pyarrow as pa

from jobs.host.errors import UserError
from jobs.scorer.histories import (
    Histories,
    RequestError,
    cast_values,
    flat_offsets,
    required_column,
)
from jobs.scorer.scorer import Scorer
from jobs.serving.model_rows import ModelRows
from pipeline.shards.dataset import Shards
from pipeline.shards.sequences import UserEvents
from pipeline.shards.user_reader import UserReader

ROW_GROUPS_KEPT = 4


class UserHistories:
    """Reads users' histories by raw id from sequence shards, in the same way as training."""

    def __init__(self, data: Shards, scorer: Scorer) -> None:
        self._data = data
        # Models that were exported before labels had a meaning for next_item were trained on every event.
        self.min_label: int = scorer.settings.get("min_label", 0)
        if scorer.uses_time and not self._data.manifest.has_time:
            raise UserError(
                f"{data.path}: the events have no times, but this model needs them: prepare a log with timestamps"
            )
        self._reader = UserReader(self._data, keep=ROW_GROUPS_KEPT, min_label=self.min_label)
        self._rows = ModelRows(scorer, self._data.vocabulary)
        self._id_type = data.manifest.schema["id_types"]["user_id"]
        self.has_time = self._data.manifest.has_time

    @functools.cached_property
    def _users(self) -> pd.Index:
        return pd.Index(self._data.user_ids.to_numpy(zero_copy_only=False))

    def users(self, rows: pa.RecordBatch, *, first_row: int) -> np.ndarray:
        """[B] int64 user rows, -1 for users that are not in the shards."""
        raw = user_ids(rows, self._id_type, first_row=first_row)
        return self._users.get_indexer(pd.Index(raw.to_numpy(zero_copy_only=False)))

    def num_events(self, users: np.ndarray) -> np.ndarray:
        """[B] most events that `read` finds of each user, 0 for users that are not in the shards."""
        return np.where(users < 0, 0, self._data.index.events[users])

    def read(self, users: np.ndarray) -> Histories:
        """The events of these users (rows from `users`) that the model's task reads, in total order, as rows and codes
        of the model."""
        known = users >= 0
        return self.of_events(self._reader.read(users[known]), known=known)

    def of_events(self, events: UserEvents, *, known: np.ndarray) -> Histories:
        """Histories of B users, as rows and codes of the model: `events` has the sequences of those in `known` [B], the
        others have empty histories."""
        lengths = np.zeros(len(known), np.int64)
        lengths[known] = np.diff(events.offsets)
        return Histories(
            offsets=flat_offsets(lengths),
            row=self._rows.item[events.item],
            time=events.time,
            action=self._rows.action[events.action],
            label=events.label_code,
            users=self._rows.users(events.codes, known=known),
        )


def user_ids(rows: pa.RecordBatch, id_type: str, *, first_row: int) -> pa.Array:
    """The column user_id as `id_type` (int64 or string). RequestError: it is absent or has a null."""
    raw = cast_values(required_column(rows, "user_id"), "user_id", id_type)
    if raw.null_count:
        missing = first_row + int(np.flatnonzero(np.asarray(raw.is_null()))[0])
        raise RequestError(f"row {missing}: user_id is null: name the user, or omit the request")
    return raw
