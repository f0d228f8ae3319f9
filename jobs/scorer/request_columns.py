"""Reads the columns of requests: histories, states, users, times and candidates, as rows of the model's tables.

This file becomes a part of the exported `scorer.py`. The docstring of `Scorer` in jobs/scorer/scorer.py describes the
columns.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from torch import Tensor

from jobs.scorer.checksums import export_digest, file_digests
from jobs.scorer.histories import (
    NO_TIME,
    Histories,
    RequestError,
    UserFeature,
    category_column,
    label_codes,
    list_column,
    refuse_wrong_unit,
    required_column,
    time_column,
    total_order,
    values_of_events,
)
from jobs.scorer.packed_states import StateShape, state_bytes
from jobs.scorer.user_states import appended, read_states, with_latest
from models.interface import Recommender

UNKNOWN_ROW = 1


class RequestReader:
    """Reads requests to one model; jobs/scorer/scorer.py fills the attributes from the model's files."""

    directory: Path
    settings: dict[str, Any]
    """scorer.json."""
    item_ids: pa.Array
    """Raw ids (int64 or strings); item_ids[i] has row i + first_item_row."""
    item_type: str
    """int64 or string."""
    uses_time: bool
    num_rows: int
    """Rows of the item table."""
    user_features: list[str]
    """Names of the user features; a request gives one in the column of the same name."""
    user_tables: list[Tensor]
    """The table of each user feature."""
    tower: Recommender
    _index: pd.Index
    _code_of_action: dict[str, int]
    _ties_by_id: bool
    _row_of_value: dict[str, dict[str, int]]

    def histories(self, batch: pa.RecordBatch, *, first_row: int = 0) -> Histories:
        """The histories and users from the columns history, state and latest, with their times, actions and labels, and
        from the columns of user features. A RequestError counts rows from `first_row`."""
        names, given, known = batch.schema.names, None, None
        if "history" in names or "state" not in names:
            given = self.events(batch, "history", first_row=first_row)
        if "state" in names:
            stored = self.states(required_column(batch, "state"), first_row=first_row)
            if given is not None and (both := (stored.lengths > 0) & (given.lengths > 0)).any():
                row = first_row + int(np.flatnonzero(both)[0])
                raise RequestError(f"row {row}: has both a state and a history: omit one of them")
            given, known = stored if given is None else appended(stored, given), stored.users
        assert given is not None
        given = dataclasses.replace(given, users=self.users(batch, known=known))
        return self.with_latest(given, batch, first_row=first_row) if "latest" in names else given

    def with_latest(self, histories: Histories, batch: pa.RecordBatch, *, first_row: int = 0) -> Histories:
        """The histories, extended by the events of the column latest."""
        latest = self.events(batch, "latest", first_row=first_row)
        return with_latest(histories, latest, timed=~_is_null(batch, "latest_time"))

    def events(self, batch: pa.RecordBatch, name: str, *, first_row: int = 0) -> Histories:
        """The events of the columns NAME, NAME_time, NAME_action and NAME_label, in total order; without times in the
        given order.

        RequestError: times are missing although the model needs them, or cannot be milliseconds.
        """
        items = list_column(batch, name, values=self.item_type, first_row=first_row)
        offsets, names = items.offsets, batch.schema.names
        owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        row, (time, action, label) = self.rows(items.values), np.zeros((3, len(owner)), np.int64)
        about: dict[str, Any] = {"offsets": offsets, "of": name, "first_row": first_row}
        actions = None
        if f"{name}_action" in names:
            lists = list_column(batch, f"{name}_action", values="string", first_row=first_row, nulls=True)
            actions = values_of_events(f"{name}_action", lists, **about)
            action = self.codes(actions)
        if f"{name}_label" in names:
            lists = list_column(batch, f"{name}_label", values="label", first_row=first_row, nulls=True)
            labels = values_of_events(f"{name}_label", lists, **about)
            label = label_codes(labels, owner, f"{name}_label", first_row=first_row)
        if self.uses_time and f"{name}_time" not in names:
            raise RequestError(
                f"column '{name}_time' is missing: give a list of times, milliseconds since 1970 UTC, one for each "
                f"event of '{name}'"
            )
        if f"{name}_time" in names:
            lists = list_column(batch, f"{name}_time", values="time", first_row=first_row)
            times = values_of_events(f"{name}_time", lists, **about)
            untimed = np.asarray(times.is_null())
            if self.uses_time and untimed.any():
                b = first_row + owner[np.flatnonzero(untimed)[0]]
                raise RequestError(f"row {b}: column '{name}_time' is null: give the time of each event")
            time = np.asarray(times.fill_null(0))
            self._refuse_wrong_unit(time[~untimed], owner[~untimed], f"{name}_time", first_row=first_row)
            # Events without times stay in the given order: while sorting, their place stands for the time.
            place = np.where(untimed, np.arange(len(owner)), time)
            order = total_order(owner, place, items.values, actions, ties_by_id=self._ties_by_id)
            if order is not None:
                row, time, action, label = row[order], time[order], action[order], label[order]
        return Histories(offsets=offsets, row=row, time=time, action=action, label=label)

    def _refuse_wrong_unit(self, time: np.ndarray, owner: np.ndarray, name: str, *, first_row: int) -> None:
        refuse_wrong_unit(time, owner, name, time_range=self.settings["time_range"], first_row=first_row)

    @functools.cached_property
    def digest(self) -> str:
        """Digest of all files of the model; a state carries the digest of its model."""
        return export_digest(file_digests(self.directory))

    @functools.cached_property
    def state_shape(self) -> StateShape:
        """What this model's states look like."""
        model = self.settings["model"]
        return StateShape(
            digest=self.digest,
            kept=self.tower.kept_events,
            max_history=self.settings["max_history"],
            rank=model.get("rank", 0),
            width=model["width"],
            older=bool(model.get("repeats")) or (bool(model.get("prior")) and self.settings["task"] == "next_item"),
            num_rows=self.num_rows,
            num_actions=len(self.settings["actions"]),
            user_rows=tuple(len(table) for table in self.user_tables),
        )

    def states(self, column: pa.Array, *, first_row: int = 0) -> Histories:
        """The histories of a column of states. RequestError: a value is not a state, or belongs to another model."""
        return read_states(state_bytes(column, first_row=first_row), self.state_shape, first_row=first_row)

    def users(self, batch: pa.RecordBatch, *, known: tuple[UserFeature, ...] | None = None) -> tuple[UserFeature, ...]:
        """The values of each user feature: from its column if there is one, else from `known`, else none."""
        found = []
        for place, name in enumerate(self.user_features):
            if name in batch.schema.names:
                lengths, values = category_column(batch, name)
                found.append(UserFeature(lengths=lengths, row=self.value_rows(name, values)))
            elif known is not None:
                found.append(known[place])
            else:
                found.append(UserFeature(lengths=np.zeros(batch.num_rows, np.int64), row=np.zeros(0, np.int64)))
        return tuple(found)

    def value_rows(self, name: str, values: pa.Array) -> np.ndarray:
        """int64 rows of a user feature's values; UNKNOWN_ROW for a value that the model does not know."""
        encoded, row_of = values.dictionary_encode(), self._row_of_value[name]
        row = [row_of.get(value, UNKNOWN_ROW) for value in encoded.dictionary.to_pylist()]
        return _decoded(np.array(row, np.int64), encoded, UNKNOWN_ROW)

    def request_times(self, batch: pa.RecordBatch, *, first_row: int = 0) -> np.ndarray:
        """[B] int64 from the column time, NO_TIME if it is null or absent. RequestError: history_time is absent, or a
        time cannot be milliseconds."""
        if "time" not in batch.schema.names:
            return np.full(batch.num_rows, NO_TIME)
        time, given = time_column(batch, "time"), np.flatnonzero(~_is_null(batch, "time"))
        self._refuse_wrong_unit(time[given], given, "time", first_row=first_row)
        for name in (name for name in ("history", "latest") if name in batch.schema.names):
            untimed = given[(~_is_null(batch, name) & _is_null(batch, f"{name}_time"))[given]]
            if len(untimed):
                raise RequestError(
                    f"row {first_row + untimed[0]}: column 'time' needs '{name}_time', to find the earlier events: "
                    "give it, too"
                )
        return time

    def candidates(self, batch: pa.RecordBatch, *, first_row: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(offsets [B + 1], table rows [M]) of the column candidates. RequestError: a null."""
        lists = list_column(batch, "candidates", values=self.item_type, first_row=first_row)
        if lists.is_null.any():
            row = first_row + int(np.flatnonzero(lists.is_null)[0])
            raise RequestError(f"row {row}: column 'candidates' is null: give a list, which may be empty")
        return lists.offsets, self.rows(lists.values)

    def rows(self, raw_ids: pa.Array) -> np.ndarray:
        """int64 table rows of raw item ids; UNKNOWN_ROW for null and for ids that the model does not know."""
        encoded = raw_ids.dictionary_encode()
        places = self._index.get_indexer(pd.Index(encoded.dictionary.to_numpy(zero_copy_only=False)))
        row = np.where(places < 0, UNKNOWN_ROW, places + self.settings["first_item_row"]).astype(np.int64)
        return _decoded(row, encoded, UNKNOWN_ROW)

    def codes(self, actions: pa.Array) -> np.ndarray:
        """int64 codes of action names; 0 for null and for names that the model does not know."""
        encoded = actions.dictionary_encode()
        code = [self._code_of_action.get(name, 0) for name in encoded.dictionary.to_pylist()]
        return _decoded(np.array(code, np.int64), encoded, 0)


def _is_null(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """[B] bool: whether a column, which may be absent, has no value."""
    if name not in batch.schema.names:
        return np.ones(batch.num_rows, bool)
    return np.asarray(required_column(batch, name).is_null())


def _decoded(value_of_code: np.ndarray, encoded: Any, of_null: int) -> np.ndarray:
    """[N] the values for a dictionary array: `value_of_code` by its indices, `of_null` for nulls."""
    codes = np.asarray(encoded.indices.fill_null(len(value_of_code)))
    return np.append(value_of_code, np.int64(of_null))[codes]
