"""Users and their events as shards store them: items and actions as codes, and one list per user for each column.

user_id  item        timestamp            UserRows: user_id [a, b]   lengths [1, 2]
a        [5]         [7]                            columns {item: [5, 9, 5], timestamp: [7, 4, 5]}
b        [9, 5]      [4, 5]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.shards.sequences import offsets_of, ranges
from pipeline.shards.user_columns import PREFIX
from pipeline.shards.vocabulary import Vocabulary

ROW = "row"
"""A column of the later files of a bucket: the user's row in its group."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class UserRows:
    """U users with E events."""

    user_id: pl.Series
    """[U] raw ids."""
    lengths: np.ndarray
    """[U] int64: number of events of each user."""
    columns: dict[str, pa.Array]
    """{stored name: [E]} for item (table rows), timestamp, order, label, request_id, action (codes)."""
    values: dict[str, pa.Array]
    """{"user:<feature>": [U] large lists of value rows}; a null list = keep the user's earlier values."""

    @property
    def num_events(self) -> int:
        return int(self.lengths.sum())

    @classmethod
    def encode(cls, events: pl.DataFrame, vocabulary: Vocabulary) -> UserRows:
        """Encode events with raw ids, which are sorted by user."""
        users = events.group_by("user_id", maintain_order=True).agg(pl.len().cast(pl.Int64).alias("events"))
        columns: dict[str, pa.Array] = {"item": pa.array(vocabulary.rows(events["item_id"]), pa.int64())}
        for name in ("timestamp", "order", "label", "request_id"):
            if name in events.columns:
                columns[name] = to_arrow(events[name])
        if "action" in events.columns:
            codes = {name: code for code, name in enumerate(vocabulary.actions)}
            columns["action"] = to_arrow(events["action"].fill_null("").replace_strict(codes, return_dtype=pl.Int32))
        return cls(user_id=users["user_id"], lengths=users["events"].to_numpy(), columns=columns, values={})

    @classmethod
    def from_table(cls, table: pa.Table) -> UserRows:
        """The inverse of `to_table`."""
        return cls(
            user_id=pl.Series("user_id", table["user_id"].combine_chunks()),
            lengths=event_lengths(table),
            columns={name: table[name].combine_chunks().flatten() for name in event_columns(table)},
            values={name: table[name].combine_chunks() for name in table.column_names if name.startswith(PREFIX)},
        )

    def to_table(self) -> pa.Table:
        """One row per user."""
        offsets = pa.array(offsets_of(self.lengths), pa.int64())
        lists = {name: pa.LargeListArray.from_arrays(offsets, values) for name, values in self.columns.items()}
        return pa.table({"user_id": to_arrow(self.user_id), **lists, **self.values})

    def filter_events(self, mask: np.ndarray) -> UserRows:
        """Keep the events where mask [E] is true; users without remaining events are kept."""
        kept = offsets_of(mask)[offsets_of(self.lengths)]
        lengths = np.diff(kept)
        columns = {name: values.filter(pa.array(mask)) for name, values in self.columns.items()}
        return dataclasses.replace(self, lengths=lengths, columns=columns)

    def take(self, users: np.ndarray) -> UserRows:
        """The users at these places, in this order."""
        places = pa.array(ranges(offsets_of(self.lengths)[:-1][users], self.lengths[users]))
        return UserRows(
            user_id=self.user_id.gather(users),
            lengths=self.lengths[users],
            columns={name: values.take(places) for name, values in self.columns.items()},
            values={name: values.take(pa.array(users)) for name, values in self.values.items()},
        )

    def with_users(self, wanted: pl.Series) -> UserRows:
        """Exactly these users, in this order; a user that is not in these rows has no events. Drops `values`."""
        known = pl.DataFrame({"user_id": self.user_id, "place": np.arange(len(self.user_id))})
        joined = pl.DataFrame({"user_id": wanted}).join(known, on="user_id", how="left", maintain_order="left")
        # Place -1 is the last entry of the arrays below, which stands for a user that is not in these rows.
        found = joined["place"].fill_null(-1).to_numpy()
        lengths = np.append(self.lengths, 0)[found]
        starts = np.append(offsets_of(self.lengths)[:-1], 0)[found]
        taken = pa.array(ranges(starts, lengths))
        columns = {name: values.take(taken) for name, values in self.columns.items()}
        return UserRows(user_id=wanted, lengths=lengths, columns=columns, values={})

    def with_values(self, names: Sequence[str]) -> UserRows:
        """With values for exactly these stored names; a missing one is an empty list for every user."""
        none = pa.array([[]] * len(self.user_id), pa.large_list(pa.int64()))
        return dataclasses.replace(self, values={name: self.values.get(name, none) for name in names})

    def slice(self, first: int, last: int) -> UserRows:
        """The users from first to last (exclusive)."""
        offsets = offsets_of(self.lengths)
        part = slice(int(offsets[first]), int(offsets[last]))
        return UserRows(
            user_id=self.user_id.slice(first, last - first),
            lengths=self.lengths[first:last],
            columns={name: values[part] for name, values in self.columns.items()},
            values={name: values[first:last] for name, values in self.values.items()},
        )

    @classmethod
    def concat(cls, parts: Sequence[UserRows]) -> UserRows:
        """All users of the parts, which have the same columns."""
        first = parts[0]
        return cls(
            user_id=pl.concat([part.user_id for part in parts]),
            lengths=np.concatenate([part.lengths for part in parts]),
            columns={name: pa.concat_arrays([part.columns[name] for part in parts]) for name in first.columns},
            values={name: pa.concat_arrays([part.values[name] for part in parts]) for name in first.values},
        )


def event_columns(table: pa.Table) -> list[str]:
    """The columns that have one entry per event."""
    return [name for name in table.column_names if name not in ("user_id", ROW) and not name.startswith(PREFIX)]


def event_lengths(table: pa.Table) -> np.ndarray:
    """[U] int64: number of events of each user."""
    return np.asarray(pc.list_value_length(table["item"].combine_chunks())).astype(np.int64)  # type: ignore[attr-defined]


def to_arrow(values: pl.Series) -> pa.Array:
    """To Arrow, strings as large_string: not every reader supports the newer string views."""
    return values.to_arrow(compat_level=pl.CompatLevel.oldest())


def runs(lengths: np.ndarray, limit: int) -> np.ndarray:
    """First user of each run, and the end. Runs are as long as `limit` events allow and have at least one user."""
    ends = np.cumsum(lengths)
    starts = [0]
    while starts[-1] < len(lengths):
        done = ends[starts[-1] - 1] if starts[-1] else 0
        starts.append(max(starts[-1] + 1, int(np.searchsorted(ends, done + limit, side="right"))))
    return np.array(starts, np.int64)
