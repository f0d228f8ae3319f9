"""Requests to a registered model as flat arrays: histories in total order, candidates, times.

    history [[a, b], [], [c]]    ->    offsets [0, 2, 2, 3]    row [row of a, of b, of c]

This file becomes a part of the exported `scorer.py` (see jobs/scorer/scorer.py), so it imports only numpy and pyarrow.
"""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

LATEST_TIME = 4_102_444_800_000
"""Times must lie before the year 2100, as in the log (pipeline/events.py)."""
MODERN_TIME = 631_152_000_000
"""1990: in seconds, later times are milliseconds of January and February 1970, which no log of today has."""
LABEL_RULE = "give 0 or 1 (false or true), or null where no label is known"
NO_TIME = np.iinfo(np.int64).max
"""The time of a request without a time: later than every event, so that all events are its history."""


class RequestError(ValueError):
    """A mistake in the requests; the message is one line that names the column or row, the rule and the fix."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class UserFeature:
    """One user feature of B requests: any number of values for each."""

    lengths: np.ndarray
    """[B] int64: number of values of each request's user."""
    row: np.ndarray
    """[lengths.sum()] int64 rows of the feature's table, by request."""

    def take(self, requests: np.ndarray) -> UserFeature:
        """The values of these requests, in this order."""
        lengths = self.lengths[requests]
        return UserFeature(
            lengths=lengths, row=self.row[flat_ranges(flat_offsets(self.lengths)[:-1][requests], lengths)]
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Histories:
    """The histories of B requests with N events in all, each history in the log's total order."""

    offsets: np.ndarray
    """[B + 1] int64: request b has events offsets[b] : offsets[b + 1]."""
    row: np.ndarray
    """[N] int64 rows of the model's item table."""
    time: np.ndarray
    """[N] int64 milliseconds since 1970 UTC, zeros if there are no times."""
    action: np.ndarray
    """[N] int64 action codes of the model."""
    label: np.ndarray
    """[N] int64 codes of labels: 0 = none known, 1 = label 0, 2 = label above 0."""
    users: tuple[UserFeature, ...] = ()
    """The features of the requests' users, one for each user feature of the model."""
    stored: Any = None
    """StoredStates (user_states.py) of the requests whose older events are not given; None = all events are given."""

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def owner(self) -> np.ndarray:
        """[N] the request of each event."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.lengths)

    def events(self, places: np.ndarray, lengths: np.ndarray) -> Histories:
        """The events at these places (or under this mask); request b has `lengths[b]` of them."""
        return Histories(
            offsets=flat_offsets(lengths),
            row=self.row[places],
            time=self.time[places],
            action=self.action[places],
            label=self.label[places],
            users=self.users,
            stored=self.stored,
        )

    def take(self, requests: np.ndarray) -> Histories:
        """The histories of these requests, in this order."""
        lengths = self.lengths[requests]
        taken = self.events(flat_ranges(self.offsets[requests], lengths), lengths)
        return dataclasses.replace(
            taken,
            users=tuple(feature.take(requests) for feature in self.users),
            stored=self.stored and self.stored.take(requests, num_requests=len(self.lengths)),
        )

    def before(self, time: np.ndarray) -> Histories:
        """The events strictly before each request's time [B]; all of them if that is NO_TIME."""
        earlier = self.time < time[self.owner]
        return self.events(earlier, np.bincount(self.owner[earlier], minlength=len(time)))

    def latest(self, most: int) -> Histories:
        """The latest `most` events of each request; all given events if the request has a stored state."""
        lengths = np.minimum(self.lengths, most)
        if self.stored is not None:
            lengths[self.stored.request] = self.lengths[self.stored.request]
        return self.events(flat_ranges(self.offsets[1:] - lengths, lengths), lengths)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Lists:
    """A column of lists, as flat arrays."""

    offsets: np.ndarray
    """[B + 1] int64; a null list counts as empty."""
    values: pa.Array
    """[N] values; without nulls unless they are allowed."""
    is_null: np.ndarray
    """[B] bool: whether the list itself is null."""


def list_column(batch: pa.RecordBatch, name: str, *, values: str, first_row: int = 0, nulls: bool = False) -> Lists:
    """A column of lists of "int64", "string", "label" (0, 1, true or false) or "time" (milliseconds since 1970 UTC, or
    timestamps).

    RequestError: the column is absent, has no lists, has other values, or has a null although `nulls` is false.
    """
    column = required_column(batch, name)
    kind = column.type
    if pa.types.is_null(kind):
        column = pa.nulls(len(column), pa.large_list(pa.null()))
    elif not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise RequestError(f"column {name!r} is {kind}: it must hold a list for each request")
    lengths = np.asarray(pc.fill_null(pc.list_value_length(column), 0)).astype(np.int64)  # type: ignore[attr-defined]
    offsets = flat_offsets(lengths)
    flat = pc.list_flatten(column)  # type: ignore[attr-defined]
    if flat.null_count and not nulls:
        place = int(np.flatnonzero(np.asarray(flat.is_null()))[0])
        row = first_row + int(np.searchsorted(offsets, place, side="right")) - 1
        raise RequestError(f"row {row}: column {name!r} holds a null in its list: omit the entry, or give a value")
    return Lists(offsets=offsets, values=cast_values(flat, name, values), is_null=np.asarray(column.is_null()))


def category_column(batch: pa.RecordBatch, name: str) -> tuple[np.ndarray, pa.Array]:
    """([B] number of values of each request, all values as strings) of a column of categories or of lists of them.

    Nulls and empty strings are not values, as in a users table. RequestError: numbers with a fraction, or other types.
    """
    column = required_column(batch, name)
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        column = pa.LargeListArray.from_arrays(pa.array(np.arange(len(column) + 1)), column)
    lengths = np.asarray(pc.fill_null(pc.list_value_length(column), 0)).astype(np.int64)  # type: ignore[attr-defined]
    flat = category_values(pc.list_flatten(column), name)  # type: ignore[attr-defined]
    kept = np.asarray(pc.fill_null(pc.not_equal(flat, ""), False))  # type: ignore[attr-defined]
    owner = np.repeat(np.arange(len(lengths)), lengths)
    return np.bincount(owner[kept], minlength=len(lengths)), flat.filter(pa.array(kept))


def category_values(flat: Any, name: str) -> Any:
    """Categories as strings. RequestError: they are numbers with a fraction, or of other types."""
    if pa.types.is_dictionary(flat.type):
        flat = flat.cast(flat.type.value_type)
    kind = flat.type
    if not (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)
    ):  # fmt: skip
        raise RequestError(f"column {name!r} holds {kind}: a user feature is a category: cast it to strings")
    return flat.cast(pa.large_string())


def time_column(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """[B] int64 milliseconds since 1970 UTC, from a column of such integers or of timestamps; NO_TIME for null."""
    times = cast_values(required_column(batch, name), name, "time")
    return np.asarray(pc.fill_null(times, NO_TIME)).astype(np.int64)  # type: ignore[attr-defined]


def required_column(batch: pa.RecordBatch, name: str) -> pa.Array:
    """The column of this name. RequestError: it is missing."""
    if name not in batch.schema.names:
        raise RequestError(
            f"column {name!r} is missing: the columns are {', '.join(map(repr, batch.schema.names)) or 'none'}"
        )
    return batch.column(batch.schema.get_field_index(name))


def values_of_events(name: str, lists: Lists, *, offsets: np.ndarray, of: str, first_row: int) -> pa.Array:
    """[N] the entry of each event of the column `of`, whose lists have these `offsets`; null where the list is null.

    RequestError: a list has another number of entries.
    """
    given, events = np.diff(lists.offsets), np.diff(offsets)
    wrong = np.flatnonzero((given != events) & ~lists.is_null)
    if len(wrong):
        raise RequestError(
            f"row {first_row + wrong[0]}: {name} and {of} differ in length ({given[wrong[0]]} and {events[wrong[0]]}): "
            "give one entry per event"
        )
    if len(lists.values) == offsets[-1]:
        return lists.values
    is_given = np.repeat(~lists.is_null, events)
    place = np.cumsum(is_given) - 1
    return lists.values.take(pa.array(place, mask=~is_given))


def label_codes(labels: pa.Array, owner: np.ndarray, name: str, *, first_row: int) -> np.ndarray:
    """[N] int64 codes of labels [N] of rows `owner` [N], as in Histories.label. RequestError: one is not 0 or 1."""
    label = np.asarray(labels.fill_null(-1)).astype(np.int64)
    wrong = np.flatnonzero((label > 1) | (label < 0) & ~np.asarray(labels.is_null()))
    if len(wrong):
        row = first_row + owner[wrong[0]]
        raise RequestError(f"row {row}: column {name!r} has {label[wrong[0]]}: {LABEL_RULE}")
    return label + 1


def refuse_wrong_unit(
    time: np.ndarray, owner: np.ndarray, name: str, *, time_range: list[int] | None, first_row: int
) -> None:
    """RequestError if times [n] of rows `owner` [n], ascending, cannot be milliseconds: one is outside 1970 to 2100, is
    a second between 1990 and 2100 while the model's log has later events than 1990, or a row ends before the model's
    first event although its times may be seconds (or minutes, or days).

    `time_range`: times of the model's first and last event. The first one may be any row's mistake.
    """
    if not len(time) or time_range is None:
        return
    outside = np.flatnonzero((time < 0) | (time >= LATEST_TIME))
    if len(outside):
        raise RequestError(
            f"row {first_row + owner[outside[0]]}: column {name!r} has {time[outside[0]]}: it must be milliseconds "
            "since 1970 UTC, before 2100"
        )
    seconds = np.flatnonzero((1000 * time >= MODERN_TIME) & (1000 * time < LATEST_TIME))
    if len(seconds) and time_range[1] >= MODERN_TIME:
        row, at = first_row + owner[seconds[0]], int(time[seconds[0]])
        raise RequestError(
            f"row {row}: column {name!r} has {at}, {_date(at)} in milliseconds and {_date(1000 * at)} in seconds: "
            "integers must be milliseconds since 1970 UTC"
        )
    start = np.flatnonzero(np.diff(owner, prepend=-1))
    latest = np.maximum.reduceat(time, start)
    wrong = np.flatnonzero((latest < time_range[0]) & (1000 * latest < LATEST_TIME))
    if len(wrong):
        row, last = first_row + owner[start[wrong[0]]], _date(int(latest[wrong[0]]))
        raise RequestError(
            f"row {row}: column {name!r} ends {last}, before the model's first event, {_date(time_range[0])}: integers "
            "must be milliseconds since 1970 UTC"
        )


def total_order(
    owner: np.ndarray, time: np.ndarray, item: pa.Array, action: pa.Array | None, *, ties_by_id: bool
) -> np.ndarray | None:
    """The order that sorts N events by request, time and, with `ties_by_id`, raw item id and action; None = they are
    sorted already.

    Ids are compared as in the log: integers by value, strings by their UTF-8 bytes; no action comes first. Without
    `ties_by_id` (the log has a column `order` for ties) events of the same time keep their given order.
    """
    follows = owner[1:] == owner[:-1]
    step = np.diff(time)
    if not np.any(follows & ((step <= 0) if ties_by_id else (step < 0))):
        return None
    keys = [time, owner]
    if ties_by_id:
        keys.insert(0, _ranks(item))
    if ties_by_id and action is not None:
        keys.insert(0, _ranks(pc.fill_null(action, "")))  # type: ignore[attr-defined]
    return np.lexsort(keys)


def cast_values(values: pa.Array, name: str, wanted: str) -> pa.Array:
    """A column's values as "int64", "string", "label" (int64) or "time" (int64 milliseconds). RequestError: they are
    something else."""
    kind: Any = values.type
    if pa.types.is_dictionary(kind):
        values, kind = values.cast(kind.value_type), kind.value_type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    try:
        if wanted == "string" and (text or pa.types.is_null(kind)):
            return values.cast(pa.large_string())
        if wanted == "label" and pa.types.is_boolean(kind):
            return values.cast(pa.int64())
        if wanted in ("int64", "label", "time") and (pa.types.is_integer(kind) or pa.types.is_null(kind)):
            return values.cast(pa.int64())
        if wanted == "time" and pa.types.is_timestamp(kind):
            return values.cast(pa.timestamp("ms", kind.tz), safe=False).cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise RequestError(f"column {name!r} does not fit into int64: {error}") from error
    rule = {
        "int64": "integers, like the ids that the model knows: cast it",
        "string": "strings, like the values that the model knows: cast it",
        "label": f"labels: {LABEL_RULE}",
        "time": "timestamps, or integers that are milliseconds since 1970 UTC",
    }[wanted]
    raise RequestError(f"column {name!r} holds {kind}: it must hold {rule}")


def flat_offsets(lengths: np.ndarray) -> np.ndarray:
    """[n] lengths -> [n + 1] int64 offsets."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def flat_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (lengths[0] numbers), then starts[1], starts[1] + 1, ..., and so on."""
    offsets = flat_offsets(lengths)
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)


def _date(milliseconds: int) -> str:
    return datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC).date().isoformat()


def _ranks(values: pa.Array) -> np.ndarray:
    """[N] int64 that sort as the values do."""
    if pa.types.is_integer(values.type):
        return np.asarray(values)
    encoded = values.dictionary_encode()
    rank = np.empty(len(encoded.dictionary), np.int64)
    rank[np.asarray(pc.array_sort_indices(encoded.dictionary))] = np.arange(len(rank))  # type: ignore[attr-defined]
    return rank[np.asarray(encoded.indices)]
