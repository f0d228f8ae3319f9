"""The event log's contract: which columns it has, which rows are accepted, and how events are ordered.

A validated event has user_id and item_id (int64 or string), `timestamp` (int64 milliseconds since 1970 UTC) and / or
`order` (int64), and optionally action (string), label (0 or 1) and request_id. Each row that a reader
(log/readers.py) finds becomes either such an event or a rejected row with a Reason; no row is dropped silently.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl

from pipeline.times import NANOSECONDS, UNITS, can_be_times, first_that_fits, nanoseconds, units_that_fit

LONGEST_ID = 4_096
"""Bytes; a longer id is invalid."""
LONGEST_ACTION = 128
"""Characters in the name of an action; a longer one is free text, not a category."""

_KEPT_CHARACTERS = 200
_NAMED, _LONGEST_NAME = 30, 60
ID_COLUMNS = ("user_id", "item_id", "request_id")


class DataError(ValueError):
    """A mistake in the user's data. The message is one line that names the file, column or value, and the fix."""


class NotNow(DataError):
    """The data is fine and a later retry may succeed: the disk is full, or another writer was faster."""


class Reason(enum.StrEnum):
    """Why a row was rejected; where several reasons apply, the first in this list is reported."""

    MALFORMED_ROW = "malformed row"
    MISSING_USER = "missing user"
    INVALID_USER = "invalid user"
    MISSING_ITEM = "missing item"
    INVALID_ITEM = "invalid item"
    MISSING_TIME = "missing time"
    INVALID_TIME = "invalid time"
    MISSING_ORDER = "missing order"
    INVALID_ORDER = "invalid order"
    INVALID_ACTION = "invalid action"
    MISSING_LABEL = "missing label"
    INVALID_LABEL = "invalid label"
    INVALID_REQUEST = "invalid request"
    FORGOTTEN_USER = "forgotten user"
    """The user was forgotten (shards/tombstones.py): the row is counted, but not kept in the quarantine."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EventColumns:
    """Which column of the file has which role; None = the log has no such column."""

    user_id: str = "user_id"
    """The user who acted: integer or string."""
    item_id: str = "item_id"
    """The item acted on: integer or string."""
    timestamp: str | None = "timestamp"
    """Time of the event: an Arrow timestamp or date, a text in ISO 8601 (both UTC unless they have a zone), or a number
    in `timestamp_unit`, also as text. Stored in milliseconds."""
    order: str | None = None
    """Integer that orders a user's events where times are absent or equal. If it is absent, a new data set takes what
    its times have below a millisecond, in nanoseconds."""
    action: str | None = None
    """Category of the event; an empty value means none."""
    label: str | None = None
    """1 for a positive, 0 for an item that was shown and got no response."""
    request_id: str | None = None
    """Events with the same value were shown together; an empty value means that the event belongs to no request."""
    timestamp_unit: str = "s"
    """s, ms, us or ns: the unit of numeric timestamps since 1970. date: they are the digits of a date in UTC, such as
    20240229, perhaps with hour, minute and second (20240229013000)."""
    integer_ids: bool = False
    """Text files only: ids are whole numbers. Otherwise they are strings, so 007 and 7 are different ids."""

    def __post_init__(self) -> None:
        if self.timestamp is None and self.order is None:
            raise ValueError("columns.timestamp and columns.order are both absent: name at least one of them")
        if self.timestamp_unit not in UNITS:
            raise ValueError(f"columns.timestamp_unit is {self.timestamp_unit!r}: it must be s, ms, us, ns or date")
        names = list(self.mapping().values())
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"column {twice[0]!r} is mapped twice: map each column to one of user_id, item_id, ...")

    def mapping(self) -> dict[str, str]:
        """{canonical name: column in the file} for the columns that the log has."""
        canonical = ("user_id", "item_id", "timestamp", "order", "action", "label", "request_id")
        return {name: column for name in canonical if (column := getattr(self, name)) is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validated:
    """The rows of a block; each is in exactly one of two tables."""

    events: pl.DataFrame
    """Canonical columns; rows in the order of the file. Where no order is mapped and a time has a part below the
    millisecond, `order` has these parts in nanoseconds."""
    rejected: pl.DataFrame
    """reason, record (the row as JSON, or the unparsed line): malformed rows, then the others in the file's order."""
    rejected_rows: pl.Series
    """The places of the rejected rows in the block, without the malformed ones."""
    units: Counter[str]
    """{unit: how many numeric times fit it}, as from times.units_that_fit."""
    unit_examples: Mapping[str, str]
    """{unit: the first time that fits it}, for other units than that of the columns."""


def validate(
    block: pl.DataFrame, *, columns: EventColumns, id_types: dict[str, str], malformed: list[str]
) -> Validated:
    """Split raw rows into events and rejected rows.

    `block` has canonical column names and the file's own types (all strings for text files); `id_types` says "int64"
    or "string" for each id column. Raises DataError when a column's type does not fit its role.
    """
    checks: list[tuple[Reason, pl.Expr]] = []
    values: list[pl.Expr] = []
    for name in columns.mapping():
        value, found = _READ[name](block, name, columns, id_types)
        values.append(value.alias(name))
        checks.extend(found)
    units, examples = Counter[str](), {}
    if columns.timestamp is not None:
        units = units_that_fit(block["timestamp"], unit=columns.timestamp_unit)
        others = [unit for unit, count in units.items() if count and unit not in ("", columns.timestamp_unit)]
        examples = {unit: first_that_fits(block["timestamp"], unit=unit) for unit in others}
    checks.sort(key=lambda check: list(Reason).index(check[0]))
    reason = pl.coalesce(
        *(pl.when(failed).then(pl.lit(reason.value)) for reason, failed in checks),
        pl.lit(None, dtype=pl.String),
    )
    checked = block.select(*values, reason.alias("reason"))
    is_rejected = checked["reason"].is_not_null()
    records = _shortened(block.filter(is_rejected)).select(record=pl.struct(pl.all()).struct.json_encode())
    rejected = checked.filter(is_rejected).select("reason").hstack(records)
    lines = pl.DataFrame(
        {"reason": [Reason.MALFORMED_ROW.value] * len(malformed), "record": malformed},
        schema={"reason": pl.String, "record": pl.String},
    )
    events = checked.filter(~is_rejected).drop("reason")
    if columns.timestamp is not None:
        events = _in_milliseconds(events)
    rejected = pl.concat([lines, rejected])
    return Validated(
        events=events, rejected=rejected, rejected_rows=is_rejected.arg_true(), units=units, unit_examples=examples
    )


def total_order(columns: list[str]) -> list[str]:
    """The sort keys of a user's events, out of `columns`: time, order, item, action, then the other columns.

    The other columns tell apart only rows of the same event, of which one stays (`in_total_order`).
    """
    leading = ["timestamp", "order", "item_id", "action"]
    return [c for c in leading if c in columns] + sorted(c for c in columns if c not in leading and c != "user_id")


def identity(columns: list[str]) -> list[str]:
    """The columns, out of `columns`, that identify an event: rows equal in all of them are the same event."""
    return [c for c in ("user_id", "item_id", "timestamp", "order", "action") if c in columns]


def in_total_order(events: pl.DataFrame, *, by: str, columns: list[str]) -> pl.DataFrame:
    """The rows sorted by the column `by` and then by the total order of `columns`; nulls (no action, no request) first.

    Rows of one event stand together, and the first of them is the row that stays: it has the largest label and, of
    equal labels, the smallest remaining columns. So a click is never lost to an impression, whatever came first.
    """
    keys = [by, *total_order(columns)]
    return events.sort(keys, descending=[key == "label" for key in keys], nulls_last=False)


def id_type(dtype: pl.DataType, *, integer_ids: bool, is_text: bool) -> str | None:
    """ "int64" or "string" for a column of ids; None when the type cannot hold ids."""
    if is_text:
        return "int64" if integer_ids else "string"
    if dtype.is_integer():
        return "int64"
    return "string" if isinstance(dtype, (pl.String, pl.Categorical, pl.Enum)) else None


_Column = tuple[pl.Expr, list[tuple[Reason, pl.Expr]]]


def _read_id(block: pl.DataFrame, name: str, columns: EventColumns, id_types: dict[str, str]) -> _Column:
    raw, wanted = pl.col(name), id_types[name]
    dtype = block.schema[name]
    if not dtype.is_integer() and not isinstance(dtype, (pl.String, pl.Categorical, pl.Enum, pl.Null)):
        raise _wrong_type(name, columns, dtype, "integers or strings")
    text = raw.cast(pl.String)
    # A number as text is never empty, and the conversion to text would take most of validation's time.
    missing = raw.is_null() if dtype.is_integer() else text.is_null() | (text == "")
    value = raw.cast(pl.Int64, strict=False) if wanted == "int64" else text
    if isinstance(dtype, (pl.Categorical, pl.Enum)) and wanted == "int64":
        value = text.cast(pl.Int64, strict=False)
    invalid = ~missing & value.is_null()
    if wanted == "string":
        invalid = ~missing & (text.str.len_bytes() > LONGEST_ID)
    if name == "request_id":
        return pl.when(~missing).then(value), [(Reason.INVALID_REQUEST, invalid)]
    kind = name.removesuffix("_id").upper()
    return value, [(Reason[f"MISSING_{kind}"], missing), (Reason[f"INVALID_{kind}"], invalid)]


def _read_timestamp(block: pl.DataFrame, name: str, columns: EventColumns, id_types: dict[str, str]) -> _Column:
    raw, dtype = block[name], block.schema[name]
    if not can_be_times(dtype):
        raise _wrong_type(name, columns, dtype, "timestamps, numbers or texts in ISO 8601")
    missing = raw.is_null()
    if isinstance(dtype, pl.String):
        missing = missing | (raw.str.strip_chars() == "").fill_null(False)
    if dtype.is_float():
        missing = missing | ~raw.is_finite().fill_null(False)
    # In nanoseconds at first.
    times = nanoseconds(raw, unit=columns.timestamp_unit)
    invalid = ~missing & times.is_null()
    return pl.lit(times), [(Reason.MISSING_TIME, pl.lit(missing)), (Reason.INVALID_TIME, pl.lit(invalid))]


def _in_milliseconds(events: pl.DataFrame) -> pl.DataFrame:
    """The events with times in milliseconds; if a time has a part below that and there is no order, with the parts as
    the order."""
    below = events["timestamp"] % NANOSECONDS["ms"]
    events = events.with_columns(pl.col("timestamp") // NANOSECONDS["ms"])
    if "order" in events.columns or not (below > 0).any():
        return events
    return events.insert_column(events.get_column_index("timestamp") + 1, below.alias("order"))


def _read_order(block: pl.DataFrame, name: str, columns: EventColumns, id_types: dict[str, str]) -> _Column:
    raw, dtype = pl.col(name), block.schema[name]
    if not dtype.is_integer() and not isinstance(dtype, (pl.String, pl.Null)):
        raise _wrong_type(name, columns, dtype, "integers")
    missing = raw.is_null()
    if isinstance(dtype, pl.String):
        missing = missing | (raw.str.strip_chars() == "")
    value = raw.cast(pl.Int64, strict=False)
    return value, [(Reason.MISSING_ORDER, missing), (Reason.INVALID_ORDER, ~missing & value.is_null())]


def _read_action(block: pl.DataFrame, name: str, columns: EventColumns, id_types: dict[str, str]) -> _Column:
    dtype = block.schema[name]
    if dtype.is_nested() or dtype.is_float() or dtype.is_temporal():
        raise _wrong_type(name, columns, dtype, "category names")
    text = pl.col(name).cast(pl.String)
    value = pl.when(text != "").then(text)
    return value, [(Reason.INVALID_ACTION, (value.str.len_chars() > LONGEST_ACTION).fill_null(False))]


def _read_label(block: pl.DataFrame, name: str, columns: EventColumns, id_types: dict[str, str]) -> _Column:
    raw, dtype = pl.col(name), block.schema[name]
    if not dtype.is_numeric() and not isinstance(dtype, (pl.String, pl.Boolean, pl.Null)):
        raise _wrong_type(name, columns, dtype, "0 and 1")
    missing, number = raw.is_null(), raw.cast(pl.Float64, strict=False)
    if dtype.is_float():
        missing = missing | ~raw.is_finite()
    if isinstance(dtype, pl.String):
        text = raw.str.strip_chars().str.to_lowercase()
        missing = missing | (text == "")
        number = text.replace({"true": "1", "false": "0"}).cast(pl.Float64, strict=False)
    allowed = number.is_in([0.0, 1.0]).fill_null(False)
    value = pl.when(allowed).then(number).cast(pl.Int8)
    return value, [(Reason.MISSING_LABEL, missing), (Reason.INVALID_LABEL, ~missing & ~allowed)]


def _shortened(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows with a beginning of those strings that are too long for an id: the quarantine keeps no more of them."""
    strings = [pl.col(name) for name, dtype in rows.schema.items() if dtype == pl.String]
    return rows.with_columns(
        pl.when(text.str.len_bytes() > LONGEST_ID)
        .then(pl.format("{}... ({} bytes)", text.str.head(_KEPT_CHARACTERS), text.str.len_bytes()))
        .otherwise(text)
        .name.keep()
        for text in strings
    )


_READ = dict.fromkeys(ID_COLUMNS, _read_id) | {
    "timestamp": _read_timestamp,
    "order": _read_order,
    "action": _read_action,
    "label": _read_label,
}


def _wrong_type(name: str, columns: EventColumns, dtype: pl.DataType, wanted: str) -> DataError:
    column = columns.mapping()[name]
    return DataError(f"column {column!r} (mapped to {name}) is {dtype}: it must hold {wanted}; map another column")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"columns": {"user_id": "u"}} -> {"columns.user_id": "u"}: keys as a user writes them."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def quoted(names: Iterable[str]) -> str:
    """The names of columns for a message, each in quotes, so that a blank or a character without a shape is seen."""
    found = [repr(name) if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]!r}..." for name in names]
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return ", ".join(found[:_NAMED]) + more if found else "no columns"


RESERVED_NAMES = (
    *("history", "history_time", "history_action", "history_label"),
    *("candidates", "time", "scores", "user_id", "item_id"),
)
"""Not allowed as names of user features: in a request, which has one column per user feature, these have another
meaning."""


def table_ids(ids: pl.Series, *, id_type: str, file: str) -> pl.Series:
    """The ids of a table of items or users as the log has them, "int64" or "string"; null for one that no event can
    have. Whole numbers may be floats, as pandas writes them beside a missing one. DataError: the column's type has no
    ids."""
    kind = ids.dtype
    if isinstance(kind, (pl.Categorical, pl.Enum)):
        ids = ids.cast(pl.String)
    if kind.is_integer() or isinstance(kind, (pl.String, pl.Categorical, pl.Enum, pl.Null)):
        return ids.cast(pl.Int64 if id_type == "int64" else pl.String, strict=False)
    if kind.is_float() and id_type == "int64":
        number = ids.cast(pl.Int64, strict=False)
        return pl.select(pl.when(number.cast(kind) == ids).then(number)).to_series().alias(ids.name)
    raise DataError(f"{file}: column {ids.name!r} is {kind}, the log's ids are {_ID_WORDS[id_type]}: cast it to them")


_ID_WORDS = {"int64": "integers", "string": "strings"}


def refuse_bad_feature(name: str, dtype: pl.DataType, *, file: str) -> None:
    """DataError unless a column of this name and type can be a user feature."""
    inner: Any = dtype.inner if isinstance(dtype, pl.List) else dtype
    if not (inner.is_integer() or isinstance(inner, (pl.String, pl.Categorical, pl.Enum, pl.Boolean, pl.Null))):
        raise DataError(f"{file}: feature {name!r} is {dtype}; features are categories: cast it to strings")
    if name in RESERVED_NAMES:
        raise DataError(f"{file}: feature {name!r} has a name that is reserved in requests; rename it")
    if not re.fullmatch(r"\w[\w -]*", name):
        raise DataError(
            f"{file}: the name of feature {name!r} may have only letters, digits, '_', '-' and spaces; rename it"
        )
