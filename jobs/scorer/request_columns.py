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

from jobs.scorer.histories import (
    NO_TIME,
    Histories,
    RequestError,
    UserFeature,
    category_column,
    list_column,
    refuse_other_lengths,
    required_column,
    time_column,
    total_order,
)
from jobs.scorer.user_states import appended, export_digest, read_states, state_bytes, with_latest

UNKNOWN_ROW = 1
REQUEST_COLUMNS = (
    *("history", "history_time", "history_action", "state", "latest", "latest_time", "latest_action"),
    *("candidates", "time"),
)
"""The columns that a scorer reads, besides the user features of its model."""


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
    _index: pd.Index
    _code_of_action: dict[str, int]
    _ties_by_id: bool
    _row_of_value: dict[str, dict[str, int]]

    def histories(self, batch: pa.RecordBatch, *, first_row: int = 0) -> Histories:
        """The histories and users from the columns history, state and latest, with their times and actions, and from
        the columns of user features. A RequestError counts rows from `first_row`."""
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
        return with_latest(histories, latest, timed="latest_time" in batch.schema.names)

    def events(self, batch: pa.RecordBatch, name: str, *, first_row: int = 0) -> Histories:
        """The events of the columns NAME, NAME_time and NAME_action, in total order."""
        items = list_column(batch, name, values=self.item_type, first_row=first_row)
        offsets, names = items.offsets, batch.schema.names
        owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        row, time, action = self.rows(items.values), np.zeros(len(owner), np.int64), np.zeros(len(owner), np.int64)
        actions = None
        if f"{name}_action" in names:
            actions = list_column(batch, f"{name}_action", values="string", first_row=first_row, nulls=True)
            refuse_other_lengths(f"{name}_action", actions, offsets=offsets, of=name, first_row=first_row)
            actions = actions.values
            action = self.codes(actions)
        if self.uses_time:
            required_column(batch, f"{name}_time")
        if f"{name}_time" in names:
            times = list_column(batch, f"{name}_time", values="time", first_row=first_row)
            refuse_other_lengths(f"{name}_time", times, offsets=offsets, of=name, first_row=first_row)
            time = np.asarray(times.values)
            order = total_order(owner, time, items.values, actions, ties_by_id=self._ties_by_id)
            if order is not None:
                row, time, action = row[order], time[order], action[order]
        return Histories(offsets=offsets, row=row, time=time, action=action)

    @functools.cached_property
    def digest(self) -> str:
        """Digest of all files of the model; a state carries the digest of its model."""
        return export_digest(self.directory)

    def states(self, column: pa.Array, *, first_row: int = 0) -> Histories:
        """The histories of a column of states. RequestError: a value is not a state, or belongs to another model."""
        return read_states(
            state_bytes(column, first_row=first_row),
            digest=self.digest,
            num_rows=self.num_rows,
            num_features=len(self.user_features),
            first_row=first_row,
        )

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

    def request_times(self, batch: pa.RecordBatch) -> np.ndarray:
        """[B] int64 from the column time, NO_TIME if it is null or absent. RequestError: history_time is absent."""
        if "time" not in batch.schema.names:
            return np.full(batch.num_rows, NO_TIME)
        time, names = time_column(batch, "time"), batch.schema.names
        for name in (name for name in ("history", "latest") if name in names and f"{name}_time" not in names):
            if (time < NO_TIME).any():
                raise RequestError(f"column 'time' needs '{name}_time', to find the earlier events: give it, too")
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


def _decoded(value_of_code: np.ndarray, encoded: Any, of_null: int) -> np.ndarray:
    """[N] the values for a dictionary array: `value_of_code` by its indices, `of_null` for nulls."""
    codes = np.asarray(encoded.indices.fill_null(len(value_of_code)))
    return np.append(value_of_code, np.int64(of_null))[codes]
