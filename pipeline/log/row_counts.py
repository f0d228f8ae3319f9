"""Counts over the rows of a log as they are read, and what is said of them: which were rejected, with an example of
each kind, and whether the times fit another unit than the one they are read in."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable

from pipeline.events import Reason, Validated
from pipeline.log.readers import Block
from pipeline.times import DATE

_LONGEST_EXAMPLE = 60
_COLUMNS = {
    "user": "user_id", "item": "item_id", "time": "timestamp", "order": "order", "action": "action", "label": "label",
    "request": "request_id",
}  # fmt: skip
"""{last word of a reason: the column that it is about}."""
_NAMES = {DATE: "dates (YYYYMMDD)"}
"""{unit: how it is called}, where a message needs another word than the setting."""


@dataclasses.dataclass(kw_only=True)
class RowCounts:
    """Counts over some rows of a log."""

    read: int = 0
    """All rows."""
    rejected: Counter[str] = dataclasses.field(default_factory=Counter)
    """Rejected rows by reason."""
    examples: dict[str, str] = dataclasses.field(default_factory=dict)
    """The first rejected row of each reason: its value, place and file."""
    units: Counter[str] = dataclasses.field(default_factory=Counter)
    """{unit: how many numeric times fit it}, as from times.units_that_fit."""
    unit_examples: dict[str, str] = dataclasses.field(default_factory=dict)
    """{unit: the first time that fits it}, for other units than that in which times are read."""

    def add(self, checked: Validated, *, num_rows: int, file: str, block: Block | None) -> None:
        """Count the validated rows of a block. `block`: the rows as they are in the file; None if they were reshaped,
        so that they have no number in it."""
        self.read += num_rows
        counts = dict(checked.rejected["reason"].value_counts().iter_rows())
        self.rejected.update(counts)
        self.units += checked.units
        self.unit_examples = {**checked.unit_examples, **self.unit_examples}
        # Malformed rows come first, then the others in the order of the block.
        for reason in counts.keys() - self.examples.keys():
            place = checked.rejected["reason"].index_of(reason)
            assert place is not None
            where = f"row {_row_number(block, checked, place)} of {file}" if block else file
            self.examples[reason] = f"{_value(reason, checked.rejected['record'][place])} ({reason}, {where})"

    @classmethod
    def total(cls, parts: Iterable[RowCounts]) -> RowCounts:
        """The counts over all parts; the examples are those of the first parts."""
        total = cls()
        for part in parts:
            total.read += part.read
            total.rejected += part.rejected
            total.units += part.units
            total.unit_examples = part.unit_examples | total.unit_examples
            total.examples = part.examples | total.examples
        return total

    def reasons(self) -> str:
        """The reasons with their counts, in the order of Reason."""
        return ", ".join(f"{reason}: {self.rejected[reason]}" for reason in Reason if self.rejected[reason])

    def first_of_each(self) -> str:
        """The examples, in the order of Reason."""
        return "for example " + ", ".join(self.examples[reason] for reason in Reason if reason in self.examples)

    def other_unit(self, unit: str) -> str | None:
        """The unit in which most numeric times lie between 1990 and tomorrow, if in `unit` most do not."""
        best, count = max(self.units.items(), key=lambda found: found[1], default=("", 0))
        return best if best not in ("", unit) and 2 * count > self.units.total() else None

    def in_unit(self, right: str, unit: str, *, column: str | None) -> str:
        """How many times fit the unit `right` and not `unit`. `column`: the times' name in the file."""
        there, here, example = _named(right), _named(unit), _short_text(self.unit_examples[right])
        return (
            f"{self.units[right]} of {self.units.total()} times in column {column!r}, such as {example}, lie between "
            f"1990 and tomorrow as {there}, not as {here}"
        )

    def note_on_times(self, unit: str) -> str | None:
        """What is said of times if most are before 1990 or after tomorrow in `unit`, or some are not so in another."""
        outside = self.units.total() - self.units[unit]
        if 2 * outside > self.units.total():
            note = f"{outside:,} of {self.units.total():,} times lie before 1990 or after tomorrow"
            if right := self.other_unit(unit):
                note += f"; {_short_text(self.unit_examples[right])} would not as {_named(right)}"
            return note
        others = [other for other in sorted(self.units) if self.units[other] and other not in ("", unit)]
        if not others:
            return None
        found = (
            f"{self.units[other]:,} as {_named(other)} (such as {_short_text(self.unit_examples[other])})"
            for other in others
        )
        return (
            f"of {self.units.total():,} times {', '.join(found)} would lie between 1990 and tomorrow: all are read as "
            f"{_named(unit)}"
        )


def _named(unit: str) -> str:
    return _NAMES.get(unit, unit)


def _value(reason: str, record: str) -> str:
    if reason == Reason.MALFORMED_ROW:
        return _short(record)
    return _short(json.loads(record).get(_COLUMNS[reason.rpartition(" ")[2]]))


def _short(value: object) -> str:
    return _short_text(repr(value))


def _short_text(text: str) -> str:
    return text if len(text) <= _LONGEST_EXAMPLE else f"{text[: _LONGEST_EXAMPLE - 3]}..."


def _row_number(block: Block, checked: Validated, place: int) -> int:
    if place < len(block.malformed):
        return block.before + block.malformed_at[place] + 1
    return block.row_number(int(checked.rejected_rows[place - len(block.malformed)]))
