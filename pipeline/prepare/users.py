"""The users table of an event log: one row per user, with categorical features.

    users table --stage_users, one task per row group--> rows by bucket, distinct values --> vocabulary
    rows of a bucket --values_of--> one list of values per user and feature, stored as codes in the user's row

The vocabulary has only the values. Which user has which values is stored in the user's own row of its shard, so that no
file and no process ever holds all users.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import polars as pl

from pipeline.events import DataError, quoted, refuse_bad_feature, table_ids
from pipeline.log import readers
from pipeline.log.inputs import FileFormat, Input
from pipeline.log.readers import Part
from pipeline.prepare.staging import Fragment, read_fragments, read_table, write_fragments, write_table
from pipeline.storage import Store


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagedUsers:
    """The staged files of one part of a users table."""

    number: int
    """The number of the part."""
    fragments: list[Fragment]
    """The part's rows by bucket: user_id, and a list of values for each feature."""
    values: str
    """Name of the staged file of distinct values."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckedUsers:
    """Counts over the users table's rows of one bucket."""

    twice: int
    """Users that have more than one row."""
    matched: int
    """Rows whose user occurs in the log."""


def feature_names(file: Input) -> list[str]:
    """The features of a users table, sorted. DataError: no user_id, no feature, or one with a wrong type or name."""
    schema = readers.read_schema(file, options=FileFormat(format="parquet"))
    if "user_id" not in schema:
        raise DataError(f"{file.name}: no column 'user_id'; it has {quoted(schema)}; rename the id column")
    for name, dtype in schema.items():
        if name != "user_id":
            refuse_bad_feature(name, dtype, file=file.name)
    if len(schema) == 1:
        raise DataError(f"{file.name}: no column besides user_id; add a feature, or remove the file")
    return sorted(set(schema) - {"user_id"})


def stage_users(part: Part, *, id_type: str, buckets: int, staging: str) -> StagedUsers:
    """Write the rows of one part of the users table by bucket, and the distinct values in them.

    A row whose id does not have the type of the log's user ids is left out: no event can have that id.
    """
    file, store, number = part.input, Store(staging), part.number
    names = [name for name in readers.read_schema(file, options=FileFormat(format="parquet")) if name != "user_id"]
    mapping = {name: name for name in ("user_id", *names)}
    fragments: list[Fragment] = []
    listed = [pl.DataFrame(schema={"value": pl.String, "feature": pl.String})]
    blocks = readers.read_blocks(file, mapping=mapping, options=FileFormat(), row_group=part.row_group)
    for count, block in enumerate(blocks):
        table = block.table.select(
            table_ids(block.table["user_id"], id_type=id_type, file=file.name),
            *(as_values(block.table[name]).alias(name) for name in names),
        ).filter(pl.col("user_id").is_not_null())
        for name in names:
            values = table[name].explode().drop_nulls().unique().alias("value")
            listed.append(values.to_frame().with_columns(pl.lit(name).alias("feature")))
        if table.height:
            fragments += write_fragments(store, f"users-{number:06d}-{count:04d}.arrow", table, buckets=buckets)
    values_file = f"user-values-{number:06d}.parquet"
    write_table(store, values_file, pl.concat(listed).unique(maintain_order=True))
    return StagedUsers(number=number, fragments=fragments, values=values_file)


def staged_values(staged: Iterable[StagedUsers], names: Iterable[str], *, staging: str) -> dict[str, list[str]]:
    """{feature: its distinct values}, over all parts."""
    values = pl.concat([read_table(Store(staging), result.values) for result in staged]).unique()
    return {name: values.filter(pl.col("feature") == name)["value"].to_list() for name in names}


def check_users(
    table: Iterable[Fragment], events: Iterable[Fragment], *, known: pl.Series, staging: str
) -> CheckedUsers:
    """Count the users of a bucket. `table`: its rows of the users table; `events`: its new events; `known`: its users
    in the data set so far."""
    store = Store(staging)
    users = pl.concat([rows["user_id"] for rows in read_fragments(store, table)])
    twice = int((users.value_counts()["count"] > 1).sum())
    active = [rows["user_id"] for rows in read_fragments(store, events)]
    matched = int(users.is_in(pl.concat([known.cast(users.dtype), *active]).unique().implode()).sum())
    return CheckedUsers(twice=twice, matched=matched)


def refuse_bad_users(checked: Sequence[CheckedUsers], *, file: str) -> None:
    """DataError: users have more than one row in the table, or none of them is in the log. Ids are private, so the
    message names none."""
    if twice := sum(result.twice for result in checked):
        raise DataError(f"{file}: {twice} user ids are in more than one row; keep one row per user")
    if not sum(result.matched for result in checked):
        raise DataError(f"{file}: none of its user ids is in the log; check that both name users the same way")


def values_of(
    users: pl.Series, *, is_new: np.ndarray, table: pl.DataFrame | None, names: Iterable[str]
) -> pl.DataFrame:
    """user_id, and for each feature the list of values in the users table; one row for each of `users`, in their order.

    Where the table has no values, the list is empty for new users, and null (the stored values stay) for other users.
    """
    wanted = pl.DataFrame({"user_id": users, "is_new": is_new})
    columns = []
    for name in names:
        rows = pl.DataFrame(schema={"user_id": users.dtype, name: pl.List(pl.String)})
        if table is not None and name in table.columns:
            rows = table.select("user_id", name)
        found = wanted.join(rows, on="user_id", how="left", maintain_order="left")
        otherwise = pl.when("is_new").then(pl.lit([], pl.List(pl.String)))
        columns.append(found.select(pl.coalesce(name, otherwise).alias(name)).to_series())
    return wanted.select("user_id").with_columns(columns)


def as_values(raw: pl.Series) -> pl.Series:
    """One list of strings per row, without nulls and empty strings; a single value a becomes [a]."""
    lists = (
        raw if isinstance(raw.dtype, pl.List) else raw.cast(pl.String).to_frame("v").select(pl.concat_list("v"))["v"]
    )
    kept = lists.cast(pl.List(pl.String)).fill_null([])
    return kept.list.eval(pl.element().filter(pl.element().is_not_null() & (pl.element() != "")))
