"""Reading single users out of row groups, of which the latest stay in memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.sequences import UserCodes, UserEvents, offsets_of
from pipeline.shards import Shards


class UserReader:
    """Reads users by row, keeping the latest `keep` row groups in memory."""

    def __init__(self, data: Shards, *, keep: int) -> None:
        self._data, self._keep = data, keep
        self._groups: dict[int, UserEvents] = {}

    def read(self, users: np.ndarray) -> UserEvents:
        """The sequences of these users, in this order."""
        group, row = self._data.index.group[users], self._data.index.row[users]
        distinct = np.unique(group)
        parts = [self._group(int(g)).take(row[group == g]) for g in distinct]
        joined = _concatenate(parts) if parts else _no_users(self._data)
        back = np.empty(len(users), np.int64)
        back[np.argsort(group, kind="stable")] = np.arange(len(users))
        return joined.take(back)

    def _group(self, group: int) -> UserEvents:
        events = self._groups.pop(group, None) or self._data.read(group)
        while len(self._groups) >= self._keep:
            self._groups.pop(next(iter(self._groups)))
        self._groups[group] = events
        return events


def _concatenate(parts: list[UserEvents]) -> UserEvents:
    if len(parts) == 1:
        return parts[0]

    def join(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else np.concatenate(values)

    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    names = ("item", "time", "before", "action", "label", "request")
    codes = [part.codes for part in parts if part.codes is not None]
    joined = None
    if codes:
        joined = UserCodes(
            lengths=np.concatenate([part.lengths for part in codes]),
            values=np.concatenate([part.values for part in codes]),
        )
    return UserEvents(offsets=offsets_of(lengths), codes=joined, **{name: join(name) for name in names})


def _no_users(data: Shards) -> UserEvents:
    columns, empty = data.manifest.schema["columns"], np.zeros(0, np.int64)
    names = data.user_features
    return UserEvents(
        offsets=np.zeros(1, np.int64), item=empty, time=empty, before=empty, action=empty,
        label=np.zeros(0, np.float32) if "label" in columns else None,
        request=empty if "request_id" in columns else None,
        codes=UserCodes(lengths=np.zeros((0, len(names)), np.int64), values=empty) if names else None,
    )  # fmt: skip
