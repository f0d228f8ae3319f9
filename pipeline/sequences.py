"""Events -> one sequence a user, in total order. Pure: polars and numpy.

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

from pipeline.events import identity, total_order


def build_sequences(events: pl.DataFrame) -> pl.DataFrame:
    """The distinct events by user and, within a user, in total order; of equal ones the first in that order stays."""
    columns = events.columns
    # Nulls (no action, no request) stand first; both keys together make the result independent of the row order.
    ordered = events.sort("user_id", *total_order(columns), nulls_last=False)
    return ordered.unique(identity(columns), keep="first", maintain_order=True)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class UserCodes:
    """The feature values of U users as rows of the features' vocabularies: G features, any number of values in each.

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
    """The sequences of some users as flat arrays: U users, N events of all of them.

    user 0: a b c   user 1: d        offsets [0, 3, 4]    item [a, b, c, d]
    """

    offsets: np.ndarray
    """[U + 1] int64: user u owns events offsets[u] : offsets[u + 1], in total order."""
    item: np.ndarray
    """[N] int64 vocabulary rows."""
    time: np.ndarray
    """[N] int64 milliseconds since 1970 UTC; zeros where the log has an order only."""
    before: np.ndarray
    """[N] int64: what "before" compares; the time, or the order where there is no time."""
    action: np.ndarray
    """[N] int64 action codes, 0 = none."""
    label: np.ndarray | None
    """[N] float32, None where the log has none."""
    request: np.ndarray | None
    """[N] int64: equal for events of one request_id (of a user); -1 = of no request; None where the log has none."""
    codes: UserCodes | None = None
    """What is known of the users themselves; None where the data set has no user features."""

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

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


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """[n] lengths -> [n + 1] int64 offsets: [2, 0, 1] -> [0, 2, 2, 3]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (lengths[0] of them), then starts[1], ...: [5, 0], [2, 3] -> [5, 6, 0, 1, 2]."""
    offsets = offsets_of(lengths)
    return np.arange(offsets[-1], dtype=np.int64) + np.repeat(np.asarray(starts, np.int64) - offsets[:-1], lengths)
