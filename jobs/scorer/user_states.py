"""User states: a user's history in the form that a registered model stores; it gives the scores of the whole history.

    a state: the latest events; of a long history also interests, Gram matrix and sum at its last checkpoint
    (models/interest_checkpoints.py), how often, how recently and with which labels each older item occurred, and how
    many older events have labels

packed_states.py turns a state into bytes and back. A state carries the digest of its model, because it uses the model's
rows and vectors. This file becomes a part of the exported `scorer.py` (see jobs/scorer/scorer.py), so it imports only
numpy and torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from jobs.scorer.histories import NO_TIME, Histories, RequestError, UserFeature, flat_offsets, flat_ranges
from jobs.scorer.packed_states import EVENTS, OLDER, STORED, TOTALS, StateShape, packed_state, unpacked_state
from models.interface import DECAY_EVENTS, HistorySums, StoredHistories


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StoredStates:
    """The states of S of the B requests, which replace older events that are not given one by one. R interests of width
    D, P entries of the upper triangle of a Gram matrix, E older items in all."""

    request: np.ndarray
    """[S] int64, ascending: the request of each state."""
    length: np.ndarray
    """[S] int64: number of the user's events when the state was built."""
    kept: np.ndarray
    """[S] int64: how many of these are given one by one, as the first of the request's events."""
    interest: np.ndarray
    """[S, R, D] float32."""
    gram: np.ndarray
    """[S, P] float32: the upper triangle."""
    sum: np.ndarray
    """[S, D] float32."""
    older_offsets: np.ndarray
    """[S + 1] int64: state s has the older items older_offsets[s] : older_offsets[s + 1]."""
    older_row: np.ndarray
    older_count: np.ndarray
    older_place: np.ndarray
    older_time: np.ndarray
    older_label: np.ndarray
    """[E] int64 each: an item's row, number of occurrences, last position, last time, and number of occurrences with
    label 1."""
    older_decayed: np.ndarray
    """[E] float32: number of occurrences, each weighed by its age (DECAY_EVENTS)."""
    older_labels: np.ndarray
    """[S, 2] int64: number of older events with a known label, and of those with label 1."""

    def take(self, requests: np.ndarray, *, num_requests: int) -> StoredStates | None:
        """The states of these requests, in this order; None if none of them has one."""
        place = np.full(num_requests, -1)
        place[self.request] = np.arange(len(self.request))
        state = place[requests]
        request, chosen = np.flatnonzero(state >= 0), state[state >= 0]
        if not len(request):
            return None
        sizes = np.diff(self.older_offsets)[chosen]
        older = flat_ranges(self.older_offsets[chosen], sizes)
        return StoredStates(
            request=request,
            older_offsets=flat_offsets(sizes),
            **{name: getattr(self, name)[chosen] for name in ("length", "kept", *STORED, *TOTALS)},
            **{name: getattr(self, name)[older] for name in OLDER},
        )

    def tensors(self, place_of_row: Callable[[np.ndarray], np.ndarray]) -> StoredHistories:
        """The states as a tower's input. `place_of_row`: rows of items -> their index among the looked-up rows of the
        batch, -1 for items that are not looked up."""
        width = self.sum.shape[1]
        rows, columns = torch.triu_indices(width, width).unbind(0)
        gram_SP = torch.from_numpy(self.gram)
        gram_SDD = torch.zeros(len(self.request), width, width)
        gram_SDD[:, rows, columns] = gram_SP
        gram_SDD[:, columns, rows] = gram_SP
        item = place_of_row(self.older_row)
        used = item >= 0
        owner = np.repeat(np.arange(len(self.request)), np.diff(self.older_offsets))[used]
        return StoredHistories(
            request_S=torch.from_numpy(self.request),
            length_S=torch.from_numpy(self.length),
            kept_S=torch.from_numpy(self.kept),
            interest_SRD=torch.from_numpy(self.interest),
            gram_SDD=gram_SDD,
            sum_SD=torch.from_numpy(self.sum),
            older_offsets_S1=torch.from_numpy(flat_offsets(np.bincount(owner, minlength=len(self.request)))),
            older_item_E=torch.from_numpy(item[used]),
            older_count_E=torch.from_numpy(self.older_count[used]),
            older_place_E=torch.from_numpy(self.older_place[used]),
            older_time_E=torch.from_numpy(self.older_time[used]),
            older_label_E=torch.from_numpy(self.older_label[used]),
            older_decayed_E=torch.from_numpy(self.older_decayed[used]),
            known_labels_S=torch.from_numpy(self.older_labels[:, 0]),
            positive_labels_S=torch.from_numpy(self.older_labels[:, 1]),
        )


def pack_states(
    histories: Histories, *, shape: StateShape, sums: Callable[[Histories], HistorySums], first_item_row: int
) -> list[bytes]:
    """A state for each of these histories. A long history is stored as its latest `shape.kept` events and the result of
    `sums`."""
    # Compute the sums of all long histories together.
    kept, lengths = shape.kept, histories.lengths
    assert kept is not None, "the model has states"
    is_long = shape.is_long(lengths)
    long = np.flatnonzero(is_long)
    found = sums(histories.take(long)) if len(long) else None
    place = np.cumsum(is_long) - 1
    # Pack each state: latest events, the user's features and, for a long history, its sums and older items.
    packed = []
    for b, (start, end) in enumerate(zip(histories.offsets[:-1].tolist(), histories.offsets[1:].tolist(), strict=True)):
        first = end - kept if is_long[b] else start
        values = [feature.take(np.array([b])) for feature in histories.users]
        arrays = {name: getattr(histories, "row" if name == "item" else name)[first:end] for name in EVENTS}
        arrays["user_lengths"] = np.concatenate([np.zeros(0, np.int64), *(value.lengths for value in values)])
        arrays["user_row"] = np.concatenate([np.zeros(0, np.int64), *(value.row for value in values)])
        if found is not None and is_long[b]:
            triangle = np.triu_indices(found.sum_BD.shape[1])
            arrays["interest"] = found.interest_BRD[place[b]].numpy()
            arrays["gram"] = found.gram_BDD[place[b]].numpy()[triangle]
            arrays["sum"] = found.sum_BD[place[b]].numpy()
            older = _older(histories, start, first, length=end - start, first_item_row=first_item_row)
            arrays |= {name: array for name, array in older.items() if shape.older or name in TOTALS}
        packed.append(packed_state(arrays, length=end - start, digest=shape.digest))
    return packed


def read_states(states: Sequence[bytes | None], shape: StateShape, *, first_row: int = 0) -> Histories:
    """The histories and users of states [B]; the history of None is empty.

    RequestError: a state is damaged, or of another model.
    """
    num_features = len(shape.user_rows)
    # Decode and check every state.
    known = np.array([state is not None for state in states], bool)
    found = []
    for b, state in enumerate(states):
        if state is None:
            continue
        try:
            found.append(unpacked_state(state, shape))
        except RequestError as error:
            raise RequestError(f"row {first_row + b}: column 'state' {error}") from error
    lengths = np.zeros(len(states), np.int64)
    lengths[known] = [len(state["item"]) for state in found]
    # Collect the values of each user feature over all states.
    users, cells = [], np.zeros((len(states), num_features), np.int64)
    for b, state in zip(np.flatnonzero(known), found, strict=True):
        cells[b] = state["user_lengths"]
    for place in range(num_features):
        ends = [np.cumsum(state["user_lengths"]) for state in found]
        parts = [
            state["user_row"][end[place] - state["user_lengths"][place] : end[place]]
            for state, end in zip(found, ends, strict=True)
        ]
        users.append(UserFeature(lengths=cells[:, place], row=_flat(parts)))
    return Histories(
        offsets=flat_offsets(lengths),
        row=_flat([state["item"] for state in found]),
        time=_flat([state["time"] for state in found]),
        action=_flat([state["action"] for state in found]),
        label=_flat([state["label"] for state in found]),
        users=tuple(users),
        stored=_stored(found, np.flatnonzero(known)),
    )


def appended(histories: Histories, later: Histories) -> Histories:
    """`histories` with the events of `later` after those of the same request; users and states are those of
    `histories`."""
    owner = np.concatenate([histories.owner, later.owner])
    order = np.argsort(owner, kind="stable")
    return dataclasses.replace(
        histories,
        offsets=flat_offsets(histories.lengths + later.lengths),
        **{
            name: np.concatenate([getattr(histories, name), getattr(later, name)])[order]
            for name in ("row", "time", "action", "label")
        },
    )


def both_known(histories: Histories, others: Histories) -> Histories:
    """The events and users of both, where each request is empty in at least one of them."""
    users = []
    for one, other in zip(histories.users, others.users, strict=True):
        owners = [np.repeat(np.arange(len(part.lengths)), part.lengths) for part in (one, other)]
        order = np.argsort(np.concatenate(owners), kind="stable")
        users.append(UserFeature(lengths=one.lengths + other.lengths, row=np.concatenate([one.row, other.row])[order]))
    return dataclasses.replace(appended(histories, others), users=tuple(users))


def with_latest(histories: Histories, latest: Histories, *, timed: np.ndarray) -> Histories:
    """Each history, extended by those events of `latest` that are later than its last event; earlier ones are assumed
    to be in it already.

    Where not `timed` [B], all events of `latest` are added, with the time of the last event.
    """
    ends = np.where(histories.lengths > 0, histories.offsets[1:] - 1, len(histories.time))
    last = np.append(histories.time, np.int64(-1))[ends]
    timed_N, last_N = timed[latest.owner], last[latest.owner]
    latest = dataclasses.replace(latest, time=np.where(timed_N, latest.time, np.maximum(last_N, 0)))
    added = ~timed_N | (latest.time > last_N)
    return appended(histories, latest.events(added, np.bincount(latest.owner[added], minlength=len(last))))


def stored_too_late(histories: Histories, time: np.ndarray) -> np.ndarray:
    """[B] bool: whether the state has events at or after the request's time [B], which cannot be removed from it."""
    found, stored = np.zeros(len(time), bool), histories.stored
    if stored is not None:
        last = histories.time[histories.offsets[stored.request] + stored.kept - 1]
        request_time = time[stored.request]
        found[stored.request] = (request_time < NO_TIME) & (last >= request_time)
    return found


def _older(histories: Histories, start: int, first: int, *, length: int, first_item_row: int) -> dict[str, np.ndarray]:
    """The older_* arrays of a state from the events start .. first - 1, the older ones of a history of `length` events:
    one entry per item, and their totals."""
    row, label = histories.row[start:first], histories.label[start:first]
    items, last, item, count = np.unique(row[::-1], return_index=True, return_inverse=True, return_counts=True)
    place, is_item = len(row) - 1 - last, items >= first_item_row
    item, size, age = item[::-1], len(items), length - 1 - np.arange(len(row))
    arrays = {
        "older_row": items,
        "older_count": count,
        "older_place": place,
        "older_time": histories.time[start + place],
        "older_label": np.bincount(item[label == 2], minlength=size),
        "older_decayed": np.bincount(item, np.exp2(-age / DECAY_EVENTS), minlength=size),
    }
    totals = {"older_labels": np.array([(label > 0).sum(), (label == 2).sum()])}
    return {name: array[is_item] for name, array in arrays.items()} | totals


def _stored(found: list[dict[str, Any]], request: np.ndarray) -> StoredStates | None:
    """StoredStates from the states that do not have all events one by one; None if all states have."""
    places = [place for place, state in enumerate(found) if state["is_long"]]
    if not places:
        return None
    none = {name: np.zeros(0, np.float32 if name == "older_decayed" else np.int64) for name in OLDER}
    long = [none | found[place] for place in places]
    return StoredStates(
        request=request[places],
        length=np.array([state["length"] for state in long], np.int64),
        kept=np.array([len(state["item"]) for state in long], np.int64),
        older_offsets=flat_offsets(np.array([len(state["older_row"]) for state in long])),
        **{name: np.stack([state[name] for state in long]) for name in (*STORED, *TOTALS)},
        **{name: np.concatenate([state[name] for state in long]) for name in OLDER},
    )


def _flat(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *parts])
