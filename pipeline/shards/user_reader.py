"""Reads single users from row groups, and keeps the latest row groups in memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.shards.dataset import Shards
from pipeline.shards.sequences import UserCodes, UserEvents, offsets_of, ranges


class UserReader:
    """Reads users by row, keeping the latest `keep` row groups in memory; `min_label` as in `Shards.read`."""

    def __init__(self, data: Shards, *, keep: int, min_label: int) -> None:
        self._data, self._keep, self._min_label = data, keep, min_label
        self._groups: dict[int, UserEvents] = {}

    def read(self, users: np.ndarray) -> UserEvents:
        """The sequences of these users, in this order."""
        group, row = self._data.index.group[users], self._data.index.row[users]
        found = [(self._group(int(g)), np.flatnonzero(group == g)) for g in np.unique(group)]
        if not found:
            return _no_users(self._data)
        if len(found) == 1:
            return found[0][0].take(row)
        return _taken_together(found, row, columns=self._data.manifest.schema["columns"])

    def _group(self, group: int) -> UserEvents:
        events = self._groups.pop(group, None) or self._data.read(group, min_label=self._min_label)
        while len(self._groups) >= self._keep:
            self._groups.pop(next(iter(self._groups)))
        self._groups[group] = events
        return events


def _taken_together(found: list[tuple[UserEvents, np.ndarray]], row: np.ndarray, *, columns: list[str]) -> UserEvents:
    """The users at `row` [U] in the groups `found`, pairs of (a group, which of the U users are in it).

    Each event is copied once. `columns`: the log's columns; an array whose column the log lacks is all zeros.
    """
    lengths = np.empty(len(row), np.int64)
    for events, users in found:
        lengths[users] = np.diff(events.offsets)[row[users]]
    offsets = offsets_of(lengths)
    moves = [
        (events, ranges(events.offsets[row[users]], lengths[users]), ranges(offsets[users], lengths[users]))
        for events, users in found
    ]

    def moved(name: str) -> Any:
        sources = [getattr(events, name) for events, _, _ in moves]
        if sources[0] is None:
            return None
        values = np.empty(offsets[-1], sources[0].dtype)
        for source, (_, here, there) in zip(sources, moves, strict=True):
            values[there] = source[here]
        return values

    zeros = np.zeros(offsets[-1], np.int64)
    time = moved("time") if "timestamp" in columns else zeros
    codes = [(events.codes.take(row[users]), users) for events, users in found if events.codes is not None]
    return UserEvents(
        offsets=offsets,
        item=moved("item"),
        time=time,
        before=time if "timestamp" in columns else moved("before"),
        action=moved("action") if "action" in columns else zeros,
        label=moved("label"),
        request=moved("request"),
        codes=_joined_codes(codes) if codes else None,
    )


def _joined_codes(parts: list[tuple[UserCodes, np.ndarray]]) -> UserCodes:
    """The codes of users from several groups, in the order of the users."""
    joined = UserCodes(
        lengths=np.concatenate([codes.lengths for codes, _ in parts]),
        values=np.concatenate([codes.values for codes, _ in parts]),
    )
    return joined.take(np.argsort(np.concatenate([users for _, users in parts])))


def _no_users(data: Shards) -> UserEvents:
    columns, empty = data.manifest.schema["columns"], np.zeros(0, np.int64)
    names = data.user_features
    return UserEvents(
        offsets=np.zeros(1, np.int64), item=empty, time=empty, before=empty, action=empty,
        label=np.zeros(0, np.float32) if "label" in columns else None,
        request=empty if "request_id" in columns else None,
        codes=UserCodes(lengths=np.zeros((0, len(names)), np.int64), values=empty) if names else None,
    )  # fmt: skip
