"""User states: a user's history in the form that a registered model stores; it gives the scores of the whole history.

    a state: the latest events; of a long history also interests, Gram matrix and sum at its last checkpoint
    (models/interest_checkpoints.py) and, if the model counts repeats, how often and how recently each older item
    occurred

A state is the bytes of a safetensors file. It carries the digest of its model, because it uses the model's rows and
vectors. This file becomes a part of the exported `scorer.py` (see jobs/scorer/scorer.py), so it imports only numpy,
pyarrow, torch and safetensors.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from jobs.scorer.histories import NO_TIME, Histories, RequestError, UserFeature, flat_offsets, flat_ranges
from models.interface import HistorySums, StoredHistories

STATE_FORMAT = "1"
WHOLE_EVENTS = 512
"""A history of at most so many events is stored event by event: 6.5 KiB, less than a Gram matrix, and exact."""
_KEPT = {"item": np.int32, "time": np.int64, "action": np.int16, "user_lengths": np.int32, "user_row": np.int32}
_STORED = {"interest": np.float32, "gram": np.float32, "sum": np.float32}
_OLDER = {"older_row": np.int32, "older_count": np.int32, "older_place": np.int32, "older_time": np.int64}


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
    """[E] int64 each: an item's row, number of occurrences, last position and last time."""

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
            **{name: getattr(self, name)[chosen] for name in ("length", "kept", *_STORED)},
            **{name: getattr(self, name)[older] for name in _OLDER},
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
        )


def export_digest(directory: Path) -> str:
    """Digest of all exported files: models that score differently have different digests. Reads every byte."""
    whole = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        with file.open("rb") as stream:
            whole.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()[:32]


def pack_states(
    histories: Histories,
    *,
    kept: int,
    sums: Callable[[Histories], HistorySums],
    digest: str,
    repeats: bool,
    first_item_row: int,
) -> list[bytes]:
    """A state for each of these histories. A history longer than WHOLE_EVENTS is stored as its latest `kept` events and
    the result of `sums`."""
    # Compute the sums of all long histories together.
    lengths = histories.lengths
    is_long = lengths > max(kept, WHOLE_EVENTS)
    long = np.flatnonzero(is_long)
    found = sums(histories.take(long)) if len(long) else None
    place = np.cumsum(is_long) - 1
    # Pack each state: latest events, the user's features and, for a long history, its sums and older items.
    packed = []
    for b, (start, end) in enumerate(zip(histories.offsets[:-1].tolist(), histories.offsets[1:].tolist(), strict=True)):
        first = end - kept if is_long[b] else start
        values = [feature.take(np.array([b])) for feature in histories.users]
        arrays = {name: getattr(histories, "row" if name == "item" else name)[first:end] for name in list(_KEPT)[:3]}
        arrays["user_lengths"] = np.concatenate([np.zeros(0, np.int64), *(value.lengths for value in values)])
        arrays["user_row"] = np.concatenate([np.zeros(0, np.int64), *(value.row for value in values)])
        if found is not None and is_long[b]:
            triangle = np.triu_indices(found.sum_BD.shape[1])
            arrays["interest"] = found.interest_BRD[place[b]].numpy()
            arrays["gram"] = found.gram_BDD[place[b]].numpy()[triangle]
            arrays["sum"] = found.sum_BD[place[b]].numpy()
            if repeats:
                arrays |= _older(histories.row[start:first], histories.time[start:first], first_item_row)
        kinds = _KEPT | _STORED | _OLDER
        typed = {name: np.ascontiguousarray(array.astype(kinds[name])) for name, array in arrays.items()}
        facts = {"format": STATE_FORMAT, "digest": digest, "length": end - start}
        # A single metadata entry, because safetensors writes several in any order, and bytes must be reproducible.
        packed.append(save_arrays(typed, metadata={"solar": json.dumps(facts)}))
    return packed


def state_bytes(column: pa.Array, *, first_row: int = 0) -> list[bytes | None]:
    """The states of a column of bytes or of base64 text. RequestError: it has other values."""
    kind, values = column.type, column.to_pylist()
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        for b, text in enumerate(values):
            try:
                values[b] = None if text is None else base64.b64decode(text, validate=True)
            except ValueError as error:
                raise RequestError(f"row {first_row + b}: column 'state' is not valid base64: {error}") from error
    elif not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_null(kind)):
        raise RequestError(f"column 'state' holds {kind}: it must hold the bytes of states, base64 of them, or nulls")
    return values


def read_states(
    states: Sequence[bytes | None], *, digest: str, num_rows: int, num_features: int, first_row: int = 0
) -> Histories:
    """The histories and users of states [B]; the history of None is empty.

    `num_rows`: rows of the model's item table. RequestError: a state is damaged, or of another model.
    """
    # Decode and check every state.
    known = np.array([state is not None for state in states], bool)
    found = []
    for b in np.flatnonzero(known).tolist():
        try:
            found.append(_checked(states[b], digest=digest, num_rows=num_rows, num_features=num_features))
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
            for name in ("row", "time", "action")
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


def with_latest(histories: Histories, latest: Histories, *, timed: bool) -> Histories:
    """Each history, extended by those events of `latest` that are later than its last event; earlier ones are assumed
    to be in it already.

    Not `timed`: all events of `latest` are added, with the time of the last event.
    """
    ends = np.where(histories.lengths > 0, histories.offsets[1:] - 1, len(histories.time))
    last = np.append(histories.time, np.int64(-1))[ends]
    if not timed:
        return appended(histories, dataclasses.replace(latest, time=np.maximum(last, 0)[latest.owner]))
    after = latest.time > last[latest.owner]
    return appended(histories, latest.events(after, np.bincount(latest.owner[after], minlength=len(last))))


def stored_too_late(histories: Histories, time: np.ndarray) -> np.ndarray:
    """[B] bool: whether the state has events at or after the request's time [B], which cannot be removed from it."""
    found, stored = np.zeros(len(time), bool), histories.stored
    if stored is not None:
        last = histories.time[histories.offsets[stored.request] + stored.kept - 1]
        request_time = time[stored.request]
        found[stored.request] = (request_time < NO_TIME) & (last >= request_time)
    return found


def _older(row: np.ndarray, time: np.ndarray, first_item_row: int) -> dict[str, np.ndarray]:
    """The older_* arrays of a state from the older events of a history: one entry per item."""
    items, last, count = np.unique(row[::-1], return_index=True, return_counts=True)
    place, is_item = len(row) - 1 - last, items >= first_item_row
    arrays = {"older_row": items, "older_count": count, "older_place": place, "older_time": time[place]}
    return {name: array[is_item] for name, array in arrays.items()}


def _checked(state: Any, *, digest: str, num_rows: int, num_features: int) -> dict[str, Any]:
    """The arrays of a state, as int64 and float32, with its length and `is_long`. RequestError: the state is damaged,
    or of another model or format."""
    fix = "build it with `solar score --build-states`"
    try:
        size = int.from_bytes(state[:8], "little")
        facts = json.loads(state[8 : 8 + size])["__metadata__"]["solar"]
        facts = json.loads(facts)
        arrays = load_arrays(state)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"is not a complete state ({type(error).__name__}): {fix}") from error
    if facts.get("digest") != digest:
        raise RequestError(f"is a state of model {facts.get('digest')}, not of {digest}: {fix} for this model")
    if facts.get("format") != STATE_FORMAT:
        raise RequestError(f"has format {facts.get('format')}, this model reads {STATE_FORMAT}: {fix}")
    length = facts["length"]
    is_long = length > len(arrays["item"])
    wanted = _KEPT | (_STORED if is_long else {})
    rows = [arrays[name] for name in ("item", "older_row") if name in arrays]
    if (
        not wanted.keys() <= arrays.keys() <= (_KEPT | _STORED | _OLDER).keys()
        or len(arrays["user_lengths"]) != num_features
        or any(len(part) and not 0 <= part.min() <= part.max() < num_rows for part in rows)
    ):
        raise RequestError(f"does not fit this model: {fix}")
    kinds = {name: np.float32 if name in _STORED else np.int64 for name in arrays}
    return {name: array.astype(kinds[name]) for name, array in arrays.items()} | {"length": length, "is_long": is_long}


def _stored(found: list[dict[str, Any]], request: np.ndarray) -> StoredStates | None:
    """StoredStates from the states that do not have all events one by one; None if all states have."""
    places = [place for place, state in enumerate(found) if state["is_long"]]
    if not places:
        return None
    long = [found[place] for place in places]
    none = np.zeros(0, np.int64)
    older = {name: [state.get(name, none) for state in long] for name in _OLDER}
    return StoredStates(
        request=request[places],
        length=np.array([state["length"] for state in long], np.int64),
        kept=np.array([len(state["item"]) for state in long], np.int64),
        older_offsets=flat_offsets(np.array([len(part) for part in older["older_row"]])),
        **{name: np.stack([state[name] for state in long]) for name in _STORED},
        **{name: np.concatenate(parts) for name, parts in older.items()},
    )


def _flat(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *parts])
