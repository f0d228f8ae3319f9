"""DIR/summary.json, the last file of an evaluation: the metrics of every system, with intervals over users."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.host.documents import as_json, from_json, stored_with
from jobs.host.json_files import read_json, write_json
from models.metrics import FEWEST_USERS, Interval

SUMMARY = "summary.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationKey:
    """What was evaluated, and on what. Evaluations with equal keys have equal results."""

    part: str = ""
    """Which part of the split: train, valid or test."""
    systems_evaluated: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The content key of each system's weights, by the system's name."""
    manifest_fingerprint: str = ""
    """Fingerprint of the manifest of the shards."""
    requests_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The RequestConfig as stored."""
    asked: str | None = stored_with("asked")
    """How many of the part's requests (EvaluationConfig.asked); None = all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Floor:
    """The best baseline on some requests."""

    baseline: str
    difference: Interval
    """The primary metric of the main system minus that of the baseline, with its 95 % interval over users."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """A part of the targets or candidates."""

    name: str
    users: int
    """Users that have any in this part."""
    weight: float
    """Requests (next_item) or candidates (impressions) in this part."""
    systems: Mapping[str, Interval]
    """The primary metric of each system."""
    floor: Floor | None = stored_with("floor")
    """None: no baselines were evaluated."""

    @property
    def is_below_floor(self) -> bool:
        """Whether the main system is below the best baseline, by an interval of enough users."""
        return self.floor is not None and self.users >= FEWEST_USERS and self.floor.difference.high < 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary(EvaluationKey):
    """What an evaluation measured."""

    task: str
    split: str
    primary: str
    """Name of the metric that decides."""
    systems: list[str]
    """Names of the systems, the main one first."""
    metrics: Mapping[str, Mapping[str, float]]
    """{system: {metric: value}}."""
    slices: list[Slice]
    """All targets first, then by kind of target and history length."""
    intervals: Mapping[str, Interval]
    """The primary metric of each system; empty if no user was evaluated."""
    ratios: Mapping[str, Interval]
    """The primary metric of the main system divided by that of each other system."""
    drawn_from: int | None = stored_with("drawn_from")
    """Requests of the whole part, where only those of drawn users were evaluated; None = all were."""

    @property
    def main(self) -> str:
        """The name of the main system."""
        return self.systems[0]

    def is_of(self, key: EvaluationKey) -> bool:
        """Whether this is the summary of the evaluation with that key."""
        same = all(getattr(self, name) == value for name, value in vars(key).items() if name != "asked")
        # An evaluation of all requests serves, whatever the bound.
        return same and (self.asked == key.asked or self.drawn_from is None)

    def write(self, directory: Path) -> None:
        write_json(directory / SUMMARY, as_json(self))


def read_summary(directory: Path) -> Summary:
    """The summary of the evaluation in a directory."""
    return from_json(Summary, read_json(directory / SUMMARY))
