"""RecBole's atomic files: the header line tells the type of each column.

token = an id or a category, token_seq = a list of categories, float and float_seq = numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from pipeline.events import DataError, EventColumns, quoted
from pipeline.log import readers
from pipeline.log.inputs import FileFormat, Input
from pipeline.sources.files import ImportConfig, ItemColumns, UserColumns

_UNTYPED = FileFormat(format="csv", separator="\t", quoted=False)
"""The files with their header line as it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecBoleConfig:
    """Which columns of RecBole's files have which role."""

    columns: EventColumns = dataclasses.field(default_factory=EventColumns)
    """Which column has which role, by its name without the type. A column `label` is the label without being named."""
    rating: str = "rating"
    """Column with ratings, which become the label by `min_label` if there is no label."""
    min_label: float = 4.0
    """Ratings of at least this count as label 1, lower ones as 0."""


def atomic_config(
    config: ImportConfig, events: Input, items: Sequence[Input], users: Sequence[Input], wanted: RecBoleConfig
) -> ImportConfig:
    """How to import these files. DataError names the columns that are missing, and the options that name others."""
    kinds = _kinds(events)
    columns = wanted.columns
    _refuse_missing(events, kinds, columns)
    if columns.label is None and "label" in kinds:
        columns = dataclasses.replace(columns, label="label")
    min_label = None
    if columns.label is None and wanted.rating in kinds and wanted.rating not in columns.mapping().values():
        columns, min_label = dataclasses.replace(columns, label=wanted.rating), wanted.min_label
    elif wanted.rating not in kinds and wanted.rating != "rating":
        raise DataError(f"{events.name}: no column {wanted.rating!r} (rating); it has {quoted(kinds)}; see --rating")
    return dataclasses.replace(
        config, columns=columns, min_label=min_label,
        items=_table(config, items, ItemColumns, id_column=columns.item_id),
        users=_table(config, users, UserColumns, id_column=columns.user_id),
    )  # fmt: skip


def _table(config: ImportConfig, files: Sequence[Input], kind: Any, *, id_column: str) -> Any:
    """The features of a table; none where there is no table."""
    kinds = _kinds(files[0]) if files else {}
    if files and id_column not in kinds:
        raise DataError(
            f"{files[0].name}: no column {id_column!r}, as the events have it; it has {quoted(kinds)}; rename its "
            "column of ids, or move the file away"
        )
    kinds.pop(id_column, None)
    id_name = "item_id" if kind is ItemColumns else "user_id"
    return kind(
        features=tuple(name for name, found in kinds.items() if found == "token"),
        list_features=tuple(name for name, found in kinds.items() if found == "token_seq"),
        list_separator=" ", files=config.files, **{id_name: id_column},
    )  # fmt: skip


def _refuse_missing(events: Input, kinds: dict[str, str], columns: EventColumns) -> None:
    """DataError that names all missing columns at once, with the options to name those that the file has."""
    mapping = columns.mapping()
    missing = {role: column for role, column in mapping.items() if column not in kinds}
    if not missing:
        return
    free = [name for name in kinds if name not in mapping.values()]
    options = []
    for role in missing:
        likely = _likely(role, free, kinds)
        free = [name for name in free if name != likely]
        options.append(f"--columns.{role} {likely or 'COLUMN'}")
    orders = ""
    if "--columns.timestamp COLUMN" in options:
        orders = " (without times: --columns.timestamp null, and --columns.order COLUMN for integers that order events)"
    raise DataError(
        f"{events.name}: no column {', '.join(map(repr, missing.values()))}; it has {quoted(kinds)}; name the right "
        f"ones with {' '.join(options)}{orders}"
    )


def _likely(role: str, free: Sequence[str], kinds: dict[str, str]) -> str | None:
    """The column, of those without a role, that probably has this one."""
    if role == "timestamp":
        return next((name for name in free if "time" in name and kinds[name] != "token"), None)
    ids = [name for name in free if kinds[name] == "token" and role in ("user_id", "item_id")]
    hints = ("session", "user") if role == "user_id" else ("_id",)
    return next((name for name in ids if any(hint in name for hint in hints)), ids[0] if ids else None)


def _kinds(file: Input) -> dict[str, str]:
    """{column: token, token_seq, float or float_seq} of an atomic file."""
    pairs = [name.partition(":") for name in readers.read_schema(file, options=_UNTYPED)]
    if bad := [name for name, colon, _ in pairs if not colon]:
        raise DataError(f"{file.name}: column {bad[0]!r} has no type; RecBole writes name:type")
    return {name: kind for name, _, kind in pairs}
