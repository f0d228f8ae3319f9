"""The documents that the steps of a night store in its journal: one dataclass per step, stored as STEP.json.

Later steps and later nights read them. Their keys never change, so these classes also read journals that earlier
versions wrote.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from jobs.host.documents import stored_with
from jobs.nightly.gate import Comparison, Guard
from jobs.nightly.latency import Latency
from jobs.training.job import TrainingConfig
from models.metrics import Interval
from pipeline.batches.requests import RequestConfig
from pipeline.prepare.ingested_days import DayCounts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """A file of a night's journal."""

    STEP: ClassVar[str]
    """The file's name without .json."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Document):
    """The document of a step, with the time that the step took."""

    seconds: float | None = stored_with("seconds")
    """None until the step has ended."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared(Step):
    """The data set after the ingest of all complete days of the log."""

    STEP = "prepare"
    manifest: int
    """Number of its manifest."""
    fingerprint: str = ""
    """Fingerprint of its manifest."""
    events: int
    """Events in the data set."""
    days: Mapping[str, DayCounts]
    """Row counts of the days that were ingested one at a time, by date."""
    refused: Mapping[str, str]
    """Days whose ingest was refused, and why."""
    left_out: Mapping[str, str]
    """Days that are not complete yet, and why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChampionBefore(Step):
    """The champion at the start of the night, measured on the whole day before anything is trained on that day."""

    STEP = "champion"
    version: str | None
    """None = there is no champion; the other fields are not set."""
    checkpoint: str | None = stored_with("version")
    """Path of the checkpoint that was registered as this version; None if the version's tags do not name it."""
    trained_until: int | None = stored_with("version")
    """Milliseconds since 1970: it was trained only on requests before this time."""
    events_then: int = stored_with("version", int)
    """Events in the data set that it was trained on."""
    metrics: Mapping[str, float] | None = stored_with("version")
    """None = the day has no requests."""
    primary: str | None = stored_with("metrics")
    """Name of the metric that decides."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedChallenger(Step):
    """The run that trained the challenger."""

    STEP = "train"
    run_dir: Path
    checkpoint: Path
    """Its best checkpoint."""
    key: str
    """Content key of the checkpoint."""
    mlflow_run_id: str
    why_cold: str | None
    """Why training began from scratch; None = it began from the champion's weights."""
    requests: RequestConfig
    """The requests that it was trained on."""
    training: TrainingConfig
    steps: int
    """Optimizer steps."""
    events: int
    """Events of the histories read in these steps."""
    train_seconds: float
    """Time spent in optimizer steps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluatedChallenger(Step):
    """The evaluation of the challenger and the champion on the held-out requests."""

    STEP = "evaluate"
    directory: Path
    """Where its results are."""
    reference: str | None
    """Version of an earlier champion that was evaluated too; None = none was, this night."""
    latencies: tuple[float, float] | None
    """Seconds for one request, (challenger's, champion's); None without a champion."""
    latency_ratio: Interval | None = stored_with("latency_ratio")
    """Challenger's time over champion's, from pairs; None without a champion, and in journals of earlier versions."""

    @property
    def latency(self) -> Latency | None:
        """Both, if there are both."""
        if self.latencies is None or self.latency_ratio is None:
            return None
        return Latency(seconds=self.latencies, ratio=self.latency_ratio)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement(Step):
    """The decision of the gate, and the figures behind it."""

    STEP = "decision"
    verdict: str
    """promoted, refused or undecided."""
    reasons: tuple[str, ...]
    """Each is a sentence."""
    comparisons: Mapping[str, Comparison] = dataclasses.field(default_factory=dict)
    """Those that were made, of: tonight, together (with the undecided nights before) and reference."""
    guards: tuple[Guard, ...] = ()
    metrics: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    """{system: {metric: value}}; empty if nothing was evaluated."""
    primary: str | None = stored_with("primary")
    """Name of the metric that decides; None if nothing was evaluated."""
    below_floor: tuple[str, ...] | None = stored_with("below_floor")
    """A sentence for each slice of the held-out requests in which the challenger is below the best baseline; None if
    there is none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Registered(Step):
    """How the decision was carried out in the registry."""

    STEP = "register"
    champion: str | None
    """The version that serves from now on."""
    verdict: str
    """Differs from the decision's if somebody changed the champion in the meantime."""
    reasons: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuiltStates(Step):
    """The states of the champion's users, for serving without raw histories."""

    STEP = "states"
    built: Path | None
    """Directory of the states; None = there are none."""
    why: str | None = stored_with("why")
    """Why there are none: the reason why the model cannot have them."""
    users: int | None = stored_with("built")
    bytes: int | None = stored_with("built")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome(Document):
    """How the night ended; the last document of a night."""

    STEP = "night"
    date: datetime.date
    verdict: str
    """promoted, refused or undecided; no_input or failed if the night was given up."""
    reasons: tuple[str, ...]
    champion: str | None
    """The version that serves afterwards."""
    champion_before: str | None = stored_with("report")
    run_dir: Path | None = stored_with("report")
    """Directory of the challenger's run; None if nothing was trained."""
    refused_days: Mapping[str, str] = stored_with("report", dict)
    """Days of the log whose ingest was refused, and why."""
    left_out_days: Mapping[str, str] = stored_with("report", dict)
    """Days of the log that were not complete yet, and why."""
    report: Path | None = stored_with("report")
    """The night's report; None if the night was given up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Notified(Document):
    """The notification about the outcome was handed over; it is not sent again."""

    STEP = "notified"


STEPS: tuple[type[Step], ...] = (
    Prepared, ChampionBefore, TrainedChallenger, EvaluatedChallenger, Judgement, Registered, BuiltStates,
)  # fmt: skip
"""In the order of a night."""
