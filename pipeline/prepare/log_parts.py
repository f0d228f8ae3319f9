"""Staging a log: each part of an event file is read and validated, and its events are written by user bucket."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import polars as pl

from pipeline.events import DataError, Reason, Validated, validate
from pipeline.log import readers
from pipeline.log.readers import Block, Part
from pipeline.log.row_counts import RowCounts
from pipeline.prepare.plan import Plan, mapping_of
from pipeline.prepare.staging import Fragment, write_fragments, write_table
from pipeline.shards.tombstones import Tombstones
from pipeline.storage import Store
from pipeline.times import is_usual


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagedPart:
    """The counts and staged files of one part of an event file."""

    number: int
    """The number of the part."""
    rows: RowCounts
    """Counts of its rows, including those of forgotten users; read = valid + the sum of rejected."""
    valid: int
    time_range: list[int] | None
    """Times of the first and last valid event, milliseconds since 1970 UTC; None without valid events or times."""
    actions: list[str]
    """Distinct actions."""
    items: str | None
    """Name of the staged file of distinct items; None without a valid event."""
    fragments: list[Fragment]
    """The valid events by bucket."""
    has_fine_times: bool
    """Whether a time has a part below the millisecond, and no order is mapped. Where the plan keeps it
    (`Plan.keeps_fine_times`), the events have an order."""


def stage_part(part: Part, *, plan: Plan, staging: str) -> StagedPart:
    """Read and validate one part; write its events by bucket, its distinct items and its rejected rows."""
    # The columns of the file, with nulls for columns that only other files have.
    file, store, number = part.input, Store(staging), part.number
    mapping = mapping_of(file, columns=plan.columns, files=plan.files, schema=plan.schema)
    absent = [pl.lit(None).alias(name) for name in plan.columns.mapping() if name not in mapping]

    # Each block: drop forgotten users, validate, and write the events as fragments.
    stones = Tombstones.of(plan.out, plan.parent)
    rows, valid = RowCounts(), 0
    fragments: list[Fragment] = []
    items: list[pl.Series] = []
    actions: set[str] = set()
    bounds: list[int] = []
    has_fine_times = False
    try:
        blocks = readers.read_blocks(file, mapping=mapping, options=plan.files, row_group=part.row_group)
        for count, block in enumerate(blocks):
            block = dataclasses.replace(block, table=block.table.with_columns(absent))
            checked, forgotten = _validate(block, plan=plan, stones=stones)
            rows.add(checked, num_rows=block.table.height + len(block.malformed), file=file.name, block=block)
            if forgotten:
                rows.rejected[Reason.FORGOTTEN_USER.value] += forgotten
            valid += checked.events.height
            if checked.rejected.height:
                # Into the quarantine of the data set.
                named = checked.rejected.with_columns(pl.lit(file.name).alias("file"))
                write_table(Store(plan.out), f"rejected/{plan.ingest}/part-{number:06d}-{count:04d}.parquet", named)
            if not checked.events.height:
                continue
            events = checked.events
            if "order" in events.columns and plan.columns.order is None:
                has_fine_times = True
                events = events if plan.keeps_fine_times else events.drop("order")
            items.append(checked.events["item_id"].unique())
            if "action" in mapping:
                actions |= set(checked.events["action"].drop_nulls().unique())
            if "timestamp" in mapping:
                times = checked.events["timestamp"].to_numpy()
                bounds += [int(times.min()), int(times.max())]
            name = f"events-{number:06d}-{count:04d}.arrow"
            fragments += write_fragments(store, name, events, buckets=plan.config["buckets"])
    except DataError as error:
        text = str(error)
        raise DataError(text if text.startswith(file.name) else f"{file.name}: {text}") from None

    # The distinct items, for the vocabulary.
    items_file = f"items-{number:06d}.parquet" if items else None
    if items_file:
        write_table(store, items_file, pl.concat(items).unique().to_frame())
    return StagedPart(
        number=number, rows=rows, valid=valid, actions=sorted(actions), items=items_file,
        time_range=[min(bounds), max(bounds)] if bounds else None, fragments=fragments, has_fine_times=has_fine_times,
    )  # fmt: skip


def _validate(block: Block, *, plan: Plan, stones: Tombstones | None) -> tuple[Validated, int]:
    """The validated rows without those of forgotten users, and how many of these there are."""
    table, kept = block.table, None
    if stones is not None:
        is_forgotten = stones.among(table["user_id"])
        table, kept = table.filter(~is_forgotten), (~is_forgotten).arg_true()
    checked = validate(table, columns=plan.columns, id_types=plan.schema["id_types"], malformed=block.malformed)
    if kept is not None:
        checked = dataclasses.replace(checked, rejected_rows=kept.gather(checked.rejected_rows))
    return checked, block.table.height - table.height


def refuse_bad_log(
    staged: Sequence[StagedPart], *, plan: Plan, max_rejected_ratio: float
) -> tuple[dict[str, Any], list[str]]:
    """Counts over all parts (read, valid, rejected), and notes on the rows. DataError: no row is valid, too many were
    rejected, or the times fit another unit."""
    rows, valid = RowCounts.total(part.rows for part in staged), sum(part.valid for part in staged)
    read, reasons = rows.read, rows.reasons()
    rejected = {reason.value: rows.rejected[reason] for reason in Reason if rows.rejected[reason]}
    assert read == valid + sum(rejected.values())
    names = ", ".join(new.file.name for new in plan.inputs[:3]) + (", ..." if len(plan.inputs) > 3 else "")
    where = f"{plan.out}/rejected/{plan.ingest}"
    if not read:
        raise DataError(f"{names}: the log is empty; nothing was prepared")
    _refuse_other_unit(rows, plan, names=names)
    # Rows of forgotten users are not mistakes in the log.
    of_log = read - rejected.get(Reason.FORGOTTEN_USER, 0)
    if of_log and not valid:
        hint = readers.first_row_hint(plan.inputs[0].file, mapping=plan.columns.mapping(), options=plan.files)
        raise DataError(
            f"{names}: all {of_log} rows are invalid ({reasons}); {rows.first_of_each()}{hint}; see {where}; check "
            "columns and files; nothing was prepared"
        )
    if of_log - valid > max_rejected_ratio * of_log:
        raise DataError(
            f"{names}: {of_log - valid} of {of_log} rows are invalid ({reasons}), above max_rejected_ratio "
            f"{max_rejected_ratio}; {rows.first_of_each()}; see {where}; fix the log, columns or files, or raise the "
            "ratio"
        )
    note = rows.note_on_times(plan.columns.timestamp_unit)
    return {"read": read, "valid": valid, "rejected": rejected}, [note] if note else []


def _refuse_other_unit(rows: RowCounts, plan: Plan, *, names: str) -> None:
    """DataError: most times lie between 1990 and tomorrow, but in another unit than the one they are read in."""
    unit, before = plan.columns.timestamp_unit, plan.parent.time_range if plan.parent else None
    if (right := rows.other_unit(unit)) is None or (before and not is_usual(before[1])):
        # A data set whose times were unusual before goes on as it began.
        return
    way = f"write them as {unit}, as the data set's, or prepare a new directory with" if before else "set"
    told = rows.in_unit(right, unit, column=plan.columns.timestamp)
    raise DataError(f"{names}: {told}: {way} columns.timestamp_unit {right}")
