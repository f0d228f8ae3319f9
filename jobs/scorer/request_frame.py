"""A frame of requests, with cells of any kind -> the columns that a scorer reads, after everything was bounded.

A frame comes from a client, so that a cell may hold anything. Sizes are compared with `Limits` before anything is
allocated. This file becomes a part of the exported `scorer.py`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from jobs.scorer.histories import LABEL_RULE, RequestError, cast_values, category_values

LABEL_COLUMNS = ("history_label", "latest_label")
LIST_COLUMNS = (
    *("history", "history_time", "history_action", "history_label"),
    *("latest", "latest_time", "latest_action", "latest_label", "candidates"),
)
REQUEST_COLUMNS = (*LIST_COLUMNS, "state", "time")
"""The columns that a scorer reads, besides the user features of its model."""
LIMIT_VARIABLE = "SOLAR_MAX_"
"""Prefix of the environment variables that change the limits: SOLAR_MAX_CANDIDATES and so on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest requests that `predict` accepts; an environment variable SOLAR_MAX_NAME changes each."""

    requests: int = 10_000
    """Rows of one frame, which is one call over HTTP."""
    history: int = 100_000
    """Events of a history, or of `latest`; a longer history than the model's max_history is cut to the latest ones."""
    candidates: int = 100_000
    """Candidates of a request."""
    values: int = 1_000
    """Values of a user feature."""
    entries: int = 2_000_000
    """Events, candidates and values of all requests together: about 20 MB as JSON."""
    state_bytes: int = 4_194_304
    """Bytes of a state; as base64 a third more."""
    characters: int = 67_108_864
    """Characters of all texts, and bytes of all states, together."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Limits:
        """The limits with those that the environment changes. ValueError: a value is not a number of at least 1."""
        found = {}
        for field in dataclasses.fields(cls):
            name = f"{LIMIT_VARIABLE}{field.name.upper()}"
            text = environment.get(name)
            if text is not None and not (text.isascii() and text.isdigit() and int(text) >= 1):
                raise ValueError(f"{name}={text}: must be a whole number of at least 1")
            if text is not None:
                found[field.name] = int(text)
        return cls(**found)

    def refuse_above(self, name: str, given: int, where: str) -> None:
        """RequestError if more than the limit is given."""
        most = getattr(self, name)
        if given > most:
            what = "events" if name == "history" else name.replace("_", " ")
            raise RequestError(
                f"{where}{given:,} {what} are more than the limit of {most:,}: send fewer, or raise "
                f"{LIMIT_VARIABLE}{name.upper()} where the model is loaded"
            )


def request_batch(frame: Any, *, item_type: str, user_features: Sequence[str], limits: Limits) -> pa.RecordBatch:
    """The columns of a frame that a scorer reads. RequestError: the frame is too large, or a cell has another type.

    A cell without a value is a null: None, NaN, NA or NaT (pandas puts NaN where a JSON record lacks a key).
    """
    if not isinstance(frame, pd.DataFrame):
        raise RequestError(f"the requests are {type(frame).__name__}: give a pandas.DataFrame with one row per request")
    limits.refuse_above("requests", len(frame), "")
    if "user_id" in frame.columns and not {"history", "state"} & set(frame.columns):
        raise RequestError(
            "column 'history' is missing: this model has no users' histories, so user_id is not enough: give the "
            "history, or the user's state (`solar score` finds both by user_id)"
        )
    # Bound everything before any of it is converted.
    cells: dict[str, list[Any]] = {}
    for name in (name for name in (*REQUEST_COLUMNS, *user_features) if name in frame.columns):
        column = frame[name]
        if not isinstance(column, pd.Series):
            raise RequestError(f"column {name!r} is there more than once: give it once")
        cells[name] = _cells(column) if name in REQUEST_COLUMNS else [_values(cell) for cell in _cells(column)]
    if not cells:
        raise RequestError(f"column 'history' is missing: the frame has {list(frame.columns)[:20]}")
    _refuse_too_much(cells, limits)
    # Convert.
    for name in (name for name in LABEL_COLUMNS if name in cells):
        cells[name] = [None if cell is None else _labels(cell, name, row=b) for b, cell in enumerate(cells[name])]
    wanted = dict.fromkeys(("history", "latest", "candidates"), item_type) | dict.fromkeys(user_features, "category")
    wanted |= dict.fromkeys(("history_action", "latest_action"), "string") | {"state": "state"}
    wanted |= dict.fromkeys(LABEL_COLUMNS, "label")
    columns = {name: _converted(column, name, wanted.get(name, "time")) for name, column in cells.items()}
    return pa.RecordBatch.from_pydict(columns)


def _is_missing(cell: Any) -> bool:
    return cell is None or cell is pd.NA or cell is pd.NaT or (isinstance(cell, float) and cell != cell)


def _cells(column: pd.Series) -> list[Any]:
    """The cells of a column. pandas stores integers beside missing values as floats: they are integers again."""
    cells = [None if _is_missing(cell) else cell for cell in column.tolist()]
    if getattr(column.dtype, "kind", "O") != "f":
        return cells
    return [int(cell) if cell is not None and float(cell).is_integer() else cell for cell in cells]


def _is_list(cell: Any) -> bool:
    return isinstance(cell, (list, tuple)) or (isinstance(cell, np.ndarray) and cell.ndim == 1)


def _values(cell: Any) -> Any:
    """The values of a user feature, which may be given as a single one."""
    return cell if _is_list(cell) else [] if cell is None else [cell]


def _refuse_too_much(cells: Mapping[str, list[Any]], limits: Limits) -> None:
    """RequestError naming the first limit that is exceeded, or the first cell of a wrong kind."""
    entries = characters = 0
    for name, column in cells.items():
        for b, cell in enumerate(column):
            if cell is None:
                continue
            if name == "state":
                size = _state_size(cell, row=b)
                limits.refuse_above("state_bytes", size, f"row {b}: column {name!r}: ")
                characters += size
            elif name == "time":
                _refuse_no_time(cell, row=b)
            elif not _is_list(cell):
                raise RequestError(f"row {b}: column {name!r} is {type(cell).__name__}: it must hold a list")
            else:
                limit = "candidates" if name == "candidates" else "history" if name in LIST_COLUMNS else "values"
                limits.refuse_above(limit, len(cell), f"row {b}: column {name!r}: ")
                entries += len(cell)
                characters += _characters(cell, name, row=b)
            limits.refuse_above("entries", entries, "")
            limits.refuse_above("characters", characters, "")


def _state_size(state: Any, *, row: int) -> int:
    if isinstance(state, str):
        return 3 * len(state) // 4
    if isinstance(state, bytes):
        return len(state)
    raise RequestError(
        f"row {row}: column 'state' holds {type(state).__name__}: it must hold the bytes of states, base64 of them, or "
        "nulls"
    )


def _refuse_no_time(cell: Any, *, row: int) -> None:
    if isinstance(cell, (str, bytes, list, tuple, dict, np.ndarray)):
        raise RequestError(
            f"row {row}: column 'time' holds {type(cell).__name__}: it must hold timestamps, or integers that are "
            "milliseconds since 1970 UTC"
        )


def _characters(values: Any, name: str, *, row: int) -> int:
    """Characters of a list of texts. RequestError: the list has lists in it, or truth values in an array."""
    if isinstance(values, np.ndarray) and values.dtype != object:
        if values.dtype.kind == "b" and name not in LABEL_COLUMNS:
            raise RequestError(f"row {row}: column {name!r} holds bool in its list: give numbers or texts")
        return values.nbytes if values.dtype.kind in "US" else 0
    first = next((value for value in values if value is not None), None)
    if isinstance(first, (list, tuple, dict, np.ndarray)):
        raise RequestError(
            f"row {row}: column {name!r} holds {type(first).__name__} in its list: give numbers or texts"
        )
    if not isinstance(first, (str, bytes)):
        return 0
    return sum(len(value) for value in values if isinstance(value, (str, bytes)))


def _labels(values: Any, name: str, *, row: int) -> list[int | None]:
    """The labels of a list, None where none is known. pandas makes floats of integers beside missing values.

    RequestError: another value than 0, 1, true or false.
    """
    labels: list[int | None] = []
    for value in values.tolist() if isinstance(values, np.ndarray) else values:
        is_number = isinstance(value, (bool, int, float, np.bool_, np.integer, np.floating))
        if not _is_missing(value) and not (is_number and value in (0, 1)):
            raise RequestError(f"row {row}: column {name!r} has {_shown(value)}: {LABEL_RULE}")
        labels.append(None if _is_missing(value) else int(value))
    return labels


def _shown(value: Any) -> str:
    """A value of a request for a message: a short number itself, else its type."""
    short = isinstance(value, float) or (isinstance(value, (int, np.number)) and abs(value) < 1 << 64)
    return repr(value) if short else type(value).__name__


def _converted(cells: list[Any], name: str, wanted: str) -> pa.Array:
    """The column, whose values (in lists, or single ones) are `wanted`. RequestError names the first row that does not
    fit, by itself or to the rows before it."""
    try:
        return _array(cells, name, wanted)
    except RequestError as error:
        reason = str(error)
    for b, cell in enumerate(cells):
        if alone := _misfit([cell], name, wanted):
            raise RequestError(f"row {b}: {alone}")
    # Every row fits by itself: find the first one that does not fit to those before it.
    fits, fails = 1, len(cells)
    while fits + 1 < fails:
        middle = (fits + fails) // 2
        if together := _misfit(cells[:middle], name, wanted):
            fails, reason = middle, together
        else:
            fits = middle
    raise RequestError(f"row {fails - 1}: {reason}")


def _misfit(cells: list[Any], name: str, wanted: str) -> str | None:
    try:
        _array(cells, name, wanted)
    except RequestError as error:
        return str(error)
    return None


def _array(cells: list[Any], name: str, wanted: str) -> pa.Array:
    try:
        array: Any = pa.array(cells, from_pandas=True)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        kinds = {type(value).__name__ for cell in cells for value in _values(cell) if value is not None}
        # What pyarrow says of it quotes the value.
        raise RequestError(
            f"column {name!r} mixes types, or does not fit into int64 or UTF-8: it holds {', '.join(sorted(kinds))}"
        ) from None
    is_list = pa.types.is_list(array.type) or pa.types.is_large_list(array.type)
    values = pc.list_flatten(array) if is_list else array  # type: ignore[attr-defined]
    if wanted == "category":
        category_values(values, name)
    elif wanted != "state":
        cast_values(values, name, wanted)
    # Beside a timestamp pyarrow takes an integer for a count of that timestamp's unit.
    if pa.types.is_timestamp(values.type) and any(_has_number(cell) for cell in cells):
        raise RequestError(f"column {name!r} mixes types: give timestamps alone, or integers alone")
    return array


def _has_number(cell: Any) -> bool:
    return any(isinstance(value, (int, np.integer)) for value in (cell if _is_list(cell) else [cell]))
