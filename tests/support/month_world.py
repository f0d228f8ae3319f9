"""The world of a simulated month: a drifting log that is delivered day by day, with what goes wrong in real ones.

`World.deliver(n)` writes what arrives in the evening of day n, and says it in sentences. What the log holds in the end
is what a single `prepare` of all of it reads.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import polars as pl

from tests.support.daily_log import day_of, events_of, write_day

Trouble = Literal[
    "bad day", "missing day", "late day", "redelivered", "worse by design", "killed at once", "killed later",
    "MLflow away", "disk full", "forgotten user",
]  # fmt: skip
FIRST_NIGHT = 2
"""Days 0 to 2 are there before the first night."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What happens when."""

    last: int
    """Number of the last day."""
    troubles: Mapping[int, Trouble]
    """{day: what goes wrong}."""
    repaired_after: int
    """Evenings until the bad day comes again, whole."""
    killed_in: tuple[str, ...] = ("prepare", "champion", "train", "evaluate", "decision", "register", "states")
    """Steps of a night in each of which a command is killed."""
    late_by: int = 2
    """Evenings until the late day comes."""

    def days(self, trouble: Trouble) -> list[int]:
        return [number for number, name in self.troubles.items() if name == trouble]


def plan_of(nights: int) -> Plan:
    """A month from 28 nights on, else the short plan and quiet nights after it; no trouble that would end later."""
    last = FIRST_NIGHT + nights - 1
    if nights < 28:
        troubles: dict[int, Trouble] = {2: "killed at once", 3: "bad day", 4: "worse by design", 5: "MLflow away"}
        repaired_after = 1 if nights < 4 else 2
        kept = _ending(troubles, repaired_after=repaired_after, last=last)
        return Plan(last=last, troubles=kept, repaired_after=repaired_after, killed_in=("train", "register"))
    troubles = {
        5: "bad day", 9: "missing day", 11: "late day", 14: "redelivered", 16: "worse by design", 18: "killed at once",
        20: "killed later", 22: "MLflow away", 24: "disk full", 26: "forgotten user",
    }  # fmt: skip
    return Plan(last=last, troubles=_ending(troubles, repaired_after=3, last=last), repaired_after=3)


def _ending(troubles: Mapping[int, Trouble], *, repaired_after: int, last: int) -> dict[int, Trouble]:
    """Those whose end comes by the last day: a day comes again, or the night after a refusal trains on both days."""
    nights = {"bad day": repaired_after, "late day": Plan.late_by, "worse by design": 1}
    return {day: trouble for day, trouble in troubles.items() if day + nights.get(trouble, 0) <= last}


class World:
    """The log as it grows."""

    def __init__(self, log: Path, plan: Plan) -> None:
        self.log, self.plan = log, plan

    def deliver(self, number: int) -> list[str]:
        """What comes in the evening of a day, in sentences."""
        said = []
        for day in self.plan.days("bad day"):
            if number == day + self.plan.repaired_after:
                shutil.rmtree(self.log / f"dt={day_of(day)}")
                write_day(self.log, day)
                said.append(f"{day_of(day)} comes again, repaired")
        for day in self.plan.days("late day"):
            if number == day + self.plan.late_by:
                write_day(self.log, day)
                said.append(f"{day_of(day)} comes {self.plan.late_by} days late")
        for day in range(FIRST_NIGHT) if number == FIRST_NIGHT else ():
            write_day(self.log, day)
        match self.plan.troubles.get(number):
            case "missing day":
                said.append("nothing comes, ever")
            case "late day":
                said.append("nothing comes yet")
            case "bad day":
                write_day(self.log, number, events=_half_broken(events_of(number)))
                said.append("half of its rows have no user")
            case "redelivered":
                write_day(self.log, number)
                said += self._redeliver(number)
            case _:
                write_day(self.log, number)
        return said

    def _redeliver(self, number: int) -> list[str]:
        """The day before once more, under another name; the one before that as the same events in other bytes."""
        same = self.log / f"dt={day_of(number - 1)}"
        shutil.copyfile(same / "part-0.parquet", same / "part-1.parquet")
        write_day(
            self.log, number - 2, events=events_of(number - 2).sample(fraction=1, shuffle=True, seed=1), name="again"
        )
        return [f"{day_of(number - 1)} and {day_of(number - 2)} come again, as other files"]


def _half_broken(events: pl.DataFrame) -> pl.DataFrame:
    row = pl.int_range(pl.len())
    return events.with_columns(user_id=pl.when(row % 2 == 0).then(pl.col("user_id")))
