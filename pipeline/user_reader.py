"""Reading single users out of row groups, of which the latest stay in memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.sequences import UserCodes, UserEvents, offsets_of, ranges
from pipeline.shards import Shards


class UserReader:
    """Reads users by row, keeping the latest `keep` row groups in memory."""

    def __init__(self, data: Shards, *, keep: int) -> None:
        self._data, self._keep = data, keep
        self._groups: dict[int, UserEvents] = {}

    def read(self, users: np.ndarray) -> UserEvents:
        """The sequences of these users, in this order."""
        group, row = self._data.index.group[users], self._data.index.row[users]
        found = [(np.flatnonzero(group == g), self._group(int(g))) for g in np.unique(group)]
        if not found:
            return _no_users(self._data)
        if len(found) == 1:
            return found[0][1].take(row)
        lengths, parts = np.empty(len(users), np.int64), []
        for places, events in found:
            first = events.offsets[row[places]]
            lengths[places] = events.offsets[row[places] + 1] - first
            parts.append((first, places, events))
        offsets = offsets_of(lengths)
        # (source, from there, to here): every event is copied once.
        copies = [
            (events, ranges(first, lengths[places]), ranges(offsets[places], lengths[places]))
            for first, places, events in parts
        ]

        def joined(name: str) -> Any:
            sources = [getattr(events, name) for events, _, _ in copies]
            if sources[0] is None:
                return None
            values = np.empty(offsets[-1], sources[0].dtype)
            for source, (_, here, there) in zip(sources, copies, strict=True):
                values[there] = source[here]
            return values

        columns, nothing = self._data.manifest.schema["columns"], np.zeros(offsets[-1], np.int64)
        time = joined("time") if "timestamp" in columns else nothing
        return UserEvents(
            offsets=offsets,
            item=joined("item"),
            time=time,
            before=time if "timestamp" in columns else joined("before"),
            action=joined("action") if "action" in columns else nothing,
            label=joined("label"),
            request=joined("request"),
            codes=_joined_codes([(places, events.codes, row[places]) for places, events in found]),
        )

    def _group(self, group: int) -> UserEvents:
        events = self._groups.pop(group, None) or self._data.read(group)
        while len(self._groups) >= self._keep:
            self._groups.pop(next(iter(self._groups)))
        self._groups[group] = events
        return events


def _joined_codes(found: list[tuple[np.ndarray, UserCodes | None, np.ndarray]]) -> UserCodes | None:
    """(places in the result, codes of a group, rows of the group) of each group."""
    parts = [codes.take(rows) for _, codes, rows in found if codes is not None]
    if not parts:
        return None
    together = UserCodes(
        lengths=np.concatenate([part.lengths for part in parts]), values=np.concatenate([part.values for part in parts])
    )
    return together.take(np.argsort(np.concatenate([places for places, _, _ in found])))


def _no_users(data: Shards) -> UserEvents:
    columns, empty = data.manifest.schema["columns"], np.zeros(0, np.int64)
    names = data.user_features
    return UserEvents(
        offsets=np.zeros(1, np.int64), item=empty, time=empty, before=empty, action=empty,
        label=np.zeros(0, np.float32) if "label" in columns else None,
        request=empty if "request_id" in columns else None,
        codes=UserCodes(lengths=np.zeros((0, len(names)), np.int64), values=empty) if names else None,
    )  # fmt: skip
