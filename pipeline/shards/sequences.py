"""Events -> one sequence per user, in total order. Pure functions of polars and numpy.

user_id  timestamp  item_id                    user_id  events  timestamp  item_id
b        5          x                          a        1       [7]        [x]
a        7          x             ->           b        2       [4, 5]     [y, x]
b        4          y
b        4          y   (counted as a duplicate)
"""

from __future__ import annotations

import dataclasses

import numpy as np
import polars as pl

from pipeline.events import identity, in_total_order, total_order

_LARGEST = 2**63
_PLACE = "place"
"""Not the name of any event column."""
LABELS = "labels"
"""A column of `sequences_with_labels`: which labels the rows of the event had; 1 = 0, 2 = 1, 3 = both."""
BOTH = 3


def build_sequences(events: pl.DataFrame) -> pl.DataFrame:
    """The distinct events by user and, within a user, in total order; of equal events the row with the largest label is
    kept, and of equal labels the one with the smallest remaining columns."""
    return sequences_with_labels(events).drop(LABELS, strict=False)


def sequences_with_labels(events: pl.DataFrame) -> pl.DataFrame:
    """`build_sequences`, in a log with labels with the further column LABELS (uint8)."""
    if "label" in events.columns:
        events = events.with_columns(_labels_of_row())
    key = _user_and_time(events)
    if key is None:
        return _sorted_distinct(events)
    # Sorting one number per row is several times as fast as sorting by all columns, which only settle equal times.
    order = np.argsort(key)
    key = key[order]
    is_equal = key[1:] == key[:-1]
    is_tied = np.append(is_equal, False) | np.append(False, is_equal)
    if is_tied.any():
        tied = events[order[is_tied]].with_columns(pl.Series(_PLACE, order[is_tied]))
        settled = _sorted_distinct(tied)
        places = settled[_PLACE].to_numpy()
        order = _put_back(order, places, key=key, is_tied=is_tied)
        if LABELS in events.columns:
            events = events.with_columns(events[LABELS].scatter(places, settled[LABELS]))
    return events[order]


def _sorted_distinct(events: pl.DataFrame) -> pl.DataFrame:
    columns = [name for name in events.columns if name not in (_PLACE, LABELS)]
    ordered = in_total_order(events, by="user_id", columns=columns)
    distinct = ordered.unique(identity(columns), keep="first", maintain_order=True)
    if LABELS in events.columns and distinct.height < ordered.height:
        # The rows of an event stand together, the largest label first and the smallest last.
        last = ordered.unique(identity(columns), keep="last", maintain_order=True)
        distinct = distinct.with_columns(pl.col(LABELS) | last[LABELS])
    return distinct


def _labels_of_row() -> pl.Expr:
    return pl.when(pl.col("label") > 0).then(2).otherwise(1).cast(pl.UInt8).alias(LABELS)


def _user_and_time(events: pl.DataFrame) -> np.ndarray | None:
    """[n] int64 that sorts like (user, first column of the total order); None if 64 bits do not suffice."""
    user, first = events["user_id"], events[total_order(events.columns)[0]]
    if events.is_empty() or not first.dtype.is_integer() or first.null_count():
        return None
    time, (earliest, num_times) = first.to_numpy(), _span(first.to_numpy())
    number, (lowest, num_users) = time, (0, _LARGEST)
    if user.dtype.is_integer():
        number, (lowest, num_users) = user.to_numpy(), _span(user.to_numpy())
    if num_users * num_times >= _LARGEST:
        distinct = user.unique().sort()
        lowest, num_users = 0, len(distinct)
        number = user.replace_strict(distinct, np.arange(num_users), return_dtype=pl.Int64).to_numpy()
    if num_users * num_times >= _LARGEST:
        return None
    return (number - lowest) * num_times + (time - earliest)


def _span(numbers: np.ndarray) -> tuple[int, int]:
    """The smallest number, and how many whole numbers there are from it to the largest."""
    least = int(numbers.min())
    return least, int(numbers.max()) - least + 1


def _put_back(order: np.ndarray, settled: np.ndarray, *, key: np.ndarray, is_tied: np.ndarray) -> np.ndarray:
    """`order` with its tied rows replaced by the settled ones; a run of equal keys may have fewer settled rows.

    `key` is in the order of `order`; `settled` has the same runs in the same order.
    """
    places = np.flatnonzero(is_tied)
    starts = places[np.append(True, key[places][1:] != key[places][:-1])]
    key_of = np.empty(len(order), np.int64)
    key_of[order] = key
    run_key = key_of[settled]
    run_starts = np.flatnonzero(np.append(True, run_key[1:] != run_key[:-1]))
    lengths = np.diff(np.append(run_starts, len(settled)))
    filled = ranges(starts, lengths)
    order, is_kept = order.copy(), ~is_tied
    order[filled] = settled
    is_kept[filled] = True
    return order[is_kept]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class UserCodes:
    """The feature values of U users as rows of the features' vocabularies: G features with any number of values each.

    user 0: gender [2], hobbies [5, 3]   user 1: gender [3], hobbies []
    lengths [[1, 2], [1, 0]]   values [2, 5, 3, 3]
    """

    lengths: np.ndarray
    """[U, G] int64."""
    values: np.ndarray
    """[lengths.sum()] int64, by user and then by feature."""

    def take(self, users: np.ndarray) -> UserCodes:
        """The users at these places, in this order."""
        totals = self.lengths.sum(1)
        places = ranges(offsets_of(totals)[:-1][users], totals[users])
        return UserCodes(lengths=self.lengths[users], values=self.values[places])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class UserEvents:
    """The sequences of some users as flat arrays: U users, with N events in all.

    user 0: a b c   user 1: d        offsets [0, 3, 4]    item [a, b, c, d]
    """

    offsets: np.ndarray
    """[U + 1] int64: user u owns events offsets[u] : offsets[u + 1], in total order."""
    item: np.ndarray
    """[N] int64 vocabulary rows."""
    time: np.ndarray
    """[N] int64 milliseconds since 1970 UTC; zeros where the log has no times."""
    before: np.ndarray
    """[N] int64: the number that decides which event is before another: the time, or the order in a log without times.
    """
    action: np.ndarray
    """[N] int64 action codes, 0 = none."""
    label: np.ndarray | None
    """[N] float32, None where the log has none."""
    request: np.ndarray | None
    """[N] int64: equal for a user's events of one request_id; -1 = no request; None where the log has no requests."""
    codes: UserCodes | None = None
    """The users' feature values; None where the data set has no user features."""

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    @property
    def label_code(self) -> np.ndarray:
        """[N] int64: 0 = no label known, 1 = label 0, 2 = label above 0."""
        return np.zeros(len(self.item), np.int64) if self.label is None else 1 + (self.label > 0).astype(np.int64)

    def take(self, users: np.ndarray) -> UserEvents:
        """The users at these places, in this order."""
        starts, lengths = self.offsets[users], self.offsets[users + 1] - self.offsets[users]
        places = ranges(starts, lengths)
        return UserEvents(
            offsets=offsets_of(lengths),
            item=self.item[places],
            time=self.time[places],
            before=self.before[places],
            action=self.action[places],
            label=None if self.label is None else self.label[places],
            request=None if self.request is None else self.request[places],
            codes=None if self.codes is None else self.codes.take(users),
        )

    def with_labels_from(self, least: int) -> UserEvents:
        """The same users with only those of their events whose label is at least `least`.

        All events if `least` is 0, or if the log has no labels.
        """
        if self.label is None or not least:
            return self
        wanted = self.label >= least
        if wanted.all():
            return self
        return UserEvents(
            offsets=offsets_of(wanted)[self.offsets],
            item=self.item[wanted],
            time=self.time[wanted],
            before=self.before[wanted],
            action=self.action[wanted],
            label=self.label[wanted],
            request=None if self.request is None else self.request[wanted],
            codes=self.codes,
        )


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """[n] lengths -> [n + 1] int64 offsets: [2, 0, 1] -> [0, 2, 2, 3]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (lengths[0] of them), then starts[1], ...: [5, 0], [2, 3] -> [5, 6, 0, 1, 2]."""
    offsets = offsets_of(lengths)
    return np.arange(offsets[-1], dtype=np.int64) + np.repeat(np.asarray(starts, np.int64) - offsets[:-1], lengths)
