"""One state as bytes: a safetensors file, which is written here, and read only after everything in it was checked.

    {"solar": {"format", "digest", "length"}}    metadata
    item time action label                       the latest events; all of them if the history is short
    user_lengths user_row                        values of the user features, feature by feature
    interest gram sum                            only of a long history: what models/interest_checkpoints.py sums up
    older_row _count _place _time _label _decayed
                                                 only of a long history, and of a model that counts the user's own items
                                                 (`repeats`, or a prior of next_item): one entry per older item
    older_labels                                 only of a long history: older events with a known label, with label 1

A state comes back from a client, so that it may hold anything. This file becomes a part of the exported `scorer.py`.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from jobs.scorer.histories import LATEST_TIME, RequestError
from models.interface import NUM_LABEL_CODES

STATE_FORMAT = "2"
WHOLE_EVENTS = 512
"""A history of at most so many events is stored event by event: 7.5 KiB, less than a Gram matrix, and exact."""
EVENTS = {"item": np.int32, "time": np.int64, "action": np.int16, "label": np.int8}
KEPT = EVENTS | {"user_lengths": np.int32, "user_row": np.int32}
STORED = {"interest": np.float32, "gram": np.float32, "sum": np.float32}
OLDER = {"older_row": np.int32, "older_count": np.int32, "older_place": np.int32, "older_time": np.int64}
OLDER |= {"older_label": np.int32, "older_decayed": np.float32}
TOTALS = {"older_labels": np.int64}
_KINDS = KEPT | STORED | OLDER | TOTALS
_CODES = {np.int8: "I8", np.int16: "I16", np.int32: "I32", np.int64: "I64", np.float32: "F32"}
_EARLIER = ("1",)
_FIX = "build it with `solar score --build-states`"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateShape:
    """What the states of one model look like."""

    digest: str
    """The digest of the model, which its states carry."""
    kept: int | None
    """Number of latest events beside a summary; None = the model reads raw histories and has no states."""
    max_history: int
    rank: int
    width: int
    older: bool
    """Whether summaries have the older items."""
    num_rows: int
    """Rows of the item table."""
    num_actions: int
    user_rows: tuple[int, ...]
    """Rows of the table of each user feature."""

    def is_long(self, length: Any) -> Any:
        """Whether a history of so many events is stored as its latest events and a summary."""
        return length > max(self.kept or 0, WHOLE_EVENTS)


def packed_state(arrays: dict[str, np.ndarray], *, length: int, digest: str) -> bytes:
    """The bytes of a state of these arrays, of a history of `length` events."""
    typed = {name: np.ascontiguousarray(array.astype(_KINDS[name])) for name, array in arrays.items()}
    facts = {"format": STATE_FORMAT, "digest": digest, "length": length}
    # A single metadata entry, because safetensors writes several in any order, and bytes must be reproducible.
    return save_arrays(typed, metadata={"solar": json.dumps(facts)})


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


def unpacked_state(state: bytes, shape: StateShape) -> dict[str, Any]:
    """The arrays of a state, as int64 and float32, with its `length` and `is_long`.

    RequestError: the state is damaged, or of another model or format. What the state claims is compared with what the
    model can have before any array is made, and the message says nothing about the model.
    """
    header = _header(state)
    facts = _facts(header, shape)
    length, is_long = facts["length"], bool(shape.is_long(facts["length"]))
    # Compare the claimed types and sizes with those of such a state.
    wanted = KEPT | (STORED | TOTALS | (OLDER if shape.older else {}) if is_long else {})
    kept = shape.kept if is_long else length
    sizes = {
        **{name: [kept] for name in EVENTS},
        "user_lengths": [len(shape.user_rows)],
        "interest": [shape.rank, shape.width],
        "gram": [shape.width * (shape.width + 1) // 2],
        "sum": [shape.width],
        "older_labels": [2],
    }
    _refuse_state(header.keys() != wanted.keys())
    for name, entry in header.items():
        _refuse_state(not isinstance(entry, dict) or entry.get("dtype") != _CODES[wanted[name]])
        claimed = entry.get("shape")
        _refuse_state(claimed != sizes[name] if name in sizes else not isinstance(claimed, list) or len(claimed) != 1)
    # Read the arrays, and compare their values.
    try:
        arrays = load_arrays(state)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"is not a complete state ({type(error).__name__}): {_FIX}") from error
    arrays = {name: array if array.dtype == np.float32 else array.astype(np.int64) for name, array in arrays.items()}
    _refuse_values(arrays, shape, older=length - (kept or 0))
    return arrays | {"length": length, "is_long": is_long}


def _header(state: bytes) -> dict[str, Any]:
    try:
        size = int.from_bytes(state[:8], "little")
        header = json.loads(state[8 : 8 + size])
    except (ValueError, RecursionError) as error:
        raise RequestError(f"is not a complete state ({type(error).__name__}): {_FIX}") from error
    if not isinstance(header, dict):
        raise RequestError(f"is not a complete state (no header): {_FIX}")
    return header


def _facts(header: dict[str, Any], shape: StateShape) -> dict[str, Any]:
    """What the metadata say; they are removed from the header."""
    try:
        facts = json.loads(header.pop("__metadata__")["solar"])
        digest, version, length = facts["digest"], facts["format"], facts["length"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RequestError(f"is not a complete state ({type(error).__name__}): {_FIX}") from error
    if shape.kept is None:
        raise RequestError("cannot be read by this model, which has no states: give the history instead")
    if digest != shape.digest:
        raise RequestError(f"is a state of another model: {_FIX} for this model")
    if version != STATE_FORMAT:
        named = f"format {version}" if version in _EARLIER else "another format"
        raise RequestError(f"is of {named}, this model reads {STATE_FORMAT}: {_FIX}")
    if type(length) is not int or not 0 <= length <= shape.max_history:
        raise RequestError(f"claims a history of other than 0 to {shape.max_history} events: {_FIX}")
    return facts


def _refuse_values(arrays: dict[str, Any], shape: StateShape, *, older: int) -> None:
    """RequestError unless the values are those of a state with so many `older` events."""
    _refuse_outside(arrays["item"], 0, shape.num_rows)
    _refuse_outside(arrays["action"], 0, shape.num_actions)
    _refuse_outside(arrays["label"], 0, NUM_LABEL_CODES)
    _refuse_outside(arrays["time"], 0, LATEST_TIME)
    _refuse_state(bool((np.diff(arrays["time"]) < 0).any()))
    # The values of each user feature are rows of its table.
    lengths, rows = arrays["user_lengths"], arrays["user_row"]
    _refuse_state(bool((lengths < 0).any()) or int(lengths.sum()) != len(rows))
    for part, size in zip(np.split(rows, np.cumsum(lengths)[:-1]), shape.user_rows, strict=False):
        _refuse_outside(part, 0, size)
    # The summary is finite.
    _refuse_state(not all(np.isfinite(arrays[name]).all() for name in STORED if name in arrays))
    if "older_labels" in arrays:
        known, positive = arrays["older_labels"].tolist()
        _refuse_state(not 0 <= positive <= known <= older)
    if "older_row" in arrays:
        _refuse_older(arrays, shape, older=older)


def _refuse_older(arrays: dict[str, Any], shape: StateShape, *, older: int) -> None:
    """RequestError unless the older items are those of so many `older` events, with as many labels as they can have."""
    count, positive, decayed = arrays["older_count"], arrays["older_label"], arrays["older_decayed"]
    _refuse_state(any(len(arrays[name]) != len(count) for name in OLDER))
    _refuse_outside(arrays["older_row"], 0, shape.num_rows)
    _refuse_state(bool((np.diff(arrays["older_row"]) <= 0).any()))
    _refuse_outside(count, 1, older + 1)
    _refuse_state(int(count.sum()) > older)
    _refuse_outside(arrays["older_place"], 0, older)
    _refuse_outside(arrays["older_time"], 0, LATEST_TIME)
    # Not a number fails both comparisons.
    _refuse_state(not ((decayed >= 0) & (decayed <= count)).all())
    _refuse_state(bool(((positive < 0) | (positive > count)).any()))
    _refuse_state(int(positive.sum()) > int(arrays["older_labels"][1]))


def _refuse_outside(values: np.ndarray, low: int, high: int) -> None:
    """RequestError unless low <= values < high."""
    _refuse_state(bool(len(values)) and not low <= values.min() <= values.max() < high)


def _refuse_state(mistake: bool) -> None:
    if mistake:
        raise RequestError(f"does not fit this model: {_FIX}")
