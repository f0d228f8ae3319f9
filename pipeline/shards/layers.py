"""The files of a bucket merged: later files are laid over the first one. Pure functions.

    first file   a: x(1) y(4)   b: z(2)              a: x(1) w(3) y(4)
    later file   a: w(3)        (row 0)      ->      b: z(2)

An event may be in several files. Of its rows the one with the largest label is kept: a later file with the click wins
over the impression in an earlier one, and a later impression changes nothing.

All files of a bucket use the same groups: a later file has, for a group, only the users with new events or values, and
says which rows of the group they are. New users are put into new groups, so no user ever moves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.events import identity, in_total_order
from pipeline.shards.rows import ROW, UserRows, event_columns, event_lengths, to_arrow
from pipeline.shards.sequences import offsets_of, ranges
from pipeline.shards.user_columns import PREFIX
from pipeline.shards.vocabulary import Vocabulary

_YOUNGER = ("action", "request_id")
"""Columns that a log may gain when it already has events."""


def lay_over(first: pa.Table, later: Sequence[pa.Table], *, vocabulary: Vocabulary, distinct: bool) -> pa.Table:
    """The group's users in the order of the first table, with the events of all tables in total order.

    The tables have the same event columns (`with_columns`).
    `distinct`: the tables may hold the same event twice; the row with the largest label is kept (`in_total_order`).
    """
    # Merge the events of those users that a later table has.
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

    # Gather every user's events: from the merged ones, or unchanged from the first table.
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
    """The table with the columns that the log gained after the file was written, filled with no action, no request."""
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
    """Sorted by row and then by the total order, which compares raw ids and action names, not their codes."""
    ranked = events.with_columns(item_id=pl.Series(vocabulary.item_ranks[events["item"].to_numpy()]))
    if "action" in events.columns:
        ranked = ranked.with_columns(
            code="action", action=pl.Series(vocabulary.action_ranks[events["action"].to_numpy()])
        )
    canonical = [name for name in ranked.columns if name not in (ROW, "item", "code")]
    ranked = in_total_order(ranked, by=ROW, columns=canonical)
    if distinct:
        ranked = ranked.unique([ROW, *identity(canonical)], keep="first", maintain_order=True)
    return ranked.with_columns(action="code") if "action" in events.columns else ranked


def _features(table: pa.Table) -> list[str]:
    return [name for name in table.column_names if name.startswith(PREFIX)]


def _latest(name: str, tables: Sequence[pa.Table], rows: Sequence[np.ndarray]) -> pa.Array:
    """[U] large lists: each user's list from the last table that has one, else an empty list."""
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
