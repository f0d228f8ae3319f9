"""Files of a bucket laid over each other: what came later, merged into what was there. Pure.

    first file   a: x(1) y(4)   b: z(2)              a: x(1) w(3) y(4)
    later file   a: w(3)        (row 0)      ->      b: z(2)

Every file holds users of the same groups: a later one has, for a group, the rows of those users to whom something
came, and says which rows these are. Users who are new stand in new groups, so that nobody ever moves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.events import identity, total_order
from pipeline.shards.rows import ROW, UserRows, event_columns, event_lengths, to_arrow
from pipeline.shards.sequences import offsets_of, ranges
from pipeline.shards.user_columns import PREFIX
from pipeline.shards.vocabulary import Vocabulary

_YOUNGER = ("action", "request_id")
"""Columns that a log may get when it has events already."""


def lay_over(first: pa.Table, later: Sequence[pa.Table], *, vocabulary: Vocabulary, distinct: bool) -> pa.Table:
    """The group's users in the order of the first table, with the events of all tables in total order.

    The tables have the same columns of events (`with_columns`).
    `distinct`: the tables may hold the same event twice; of equal ones the smallest by the total order stays.
    """
    tables = [first, *later]
    rows = [np.arange(first.num_rows), *(np.asarray(table[ROW]) for table in later)]
    touched = np.unique(np.concatenate(rows[1:]))
    lengths = event_lengths(first)
    is_touched = np.zeros(first.num_rows, bool)
    is_touched[touched] = True
    names = event_columns(first)
    frames = [_events(table, row, names) for table, row in zip(tables, rows, strict=True)]
    merged = pl.concat([frames[0].filter(np.repeat(is_touched, lengths)), *frames[1:]])
    merged = _in_total_order(merged, vocabulary, distinct=distinct)

    counts = np.bincount(merged[ROW].to_numpy(), minlength=first.num_rows)
    offsets = offsets_of(lengths)
    starts = offsets[:-1].copy()
    starts[touched] = offsets[-1] + offsets_of(counts[touched])[:-1]
    lengths = np.where(is_touched, counts, lengths)
    places = ranges(starts, lengths)
    both = pl.concat([frames[0].select(names), merged.select(names)])
    values = {name: _latest(name, tables, rows) for name in dict.fromkeys(n for t in tables for n in _features(t))}
    return UserRows(
        user_id=pl.Series("user_id", first["user_id"].combine_chunks()),
        lengths=lengths,
        columns={name: to_arrow(both[name].gather(places)) for name in names},
        values=values,
    ).to_table()


def with_columns(table: pa.Table, schema: Mapping[str, Any]) -> pa.Table:
    """The table with those columns of the log's schema that are younger than its file: no action, no request."""
    missing = [name for name in _YOUNGER if name in schema["columns"] and name not in table.column_names]
    if missing:
        rows = UserRows.from_table(table)
        request = pa.int64() if schema["id_types"].get("request_id") == "int64" else pa.large_string()
        empty = {
            "action": pa.array(np.zeros(rows.num_events, np.int32)),
            "request_id": pa.nulls(rows.num_events, request),
        }
        added = dataclasses.replace(rows, columns=rows.columns | {name: empty[name] for name in missing}).to_table()
        table = added.append_column(ROW, table[ROW]) if ROW in table.column_names else added
    return table


def _events(table: pa.Table, row: np.ndarray, names: Sequence[str]) -> pl.DataFrame:
    columns = {name: table[name].combine_chunks().flatten() for name in names}
    return pl.DataFrame({ROW: np.repeat(row, event_lengths(table)), **columns})


def _in_total_order(events: pl.DataFrame, vocabulary: Vocabulary, *, distinct: bool) -> pl.DataFrame:
    """Sorted by row and the total order, which is one of raw ids and names, not of their codes."""
    ranked = events.with_columns(item_id=pl.Series(vocabulary.item_ranks[events["item"].to_numpy()]))
    if "action" in events.columns:
        ranked = ranked.with_columns(
            code="action", action=pl.Series(vocabulary.action_ranks[events["action"].to_numpy()])
        )
    canonical = [name for name in ranked.columns if name not in (ROW, "item", "code")]
    ranked = ranked.sort(ROW, *total_order(canonical), nulls_last=False)
    if distinct:
        ranked = ranked.unique([ROW, *identity(canonical)], keep="first", maintain_order=True)
    return ranked.with_columns(action="code") if "action" in events.columns else ranked


def _features(table: pa.Table) -> list[str]:
    return [name for name in table.column_names if name.startswith(PREFIX)]


def _latest(name: str, tables: Sequence[pa.Table], rows: Sequence[np.ndarray]) -> pa.Array:
    """[U] large lists: for each user those of the last table that knows any."""
    lists, place = [pa.array([[]], pa.large_list(pa.int64()))], np.zeros(tables[0].num_rows, np.int64)
    size = 1
    for table, row in zip(tables, rows, strict=True):
        if name in table.column_names:
            column = table[name].combine_chunks()
            known = np.asarray(column.is_valid())
            place[row[known]] = size + np.flatnonzero(known)
            lists.append(column)
            size += len(column)
    return pa.concat_arrays(lists).take(pa.array(place))
