"""What the steps of a night leave in its journal and hand to each other: a dataclass a step, stored as STEP.json.

Keys of these documents do not change: journals of earlier versions are read with the same classes.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from jobs.host.documents import stored_with
from jobs.nightly.gate import Comparison, Guard
from jobs.training.job import TrainingConfig
from pipeline.batches.requests import RequestConfig
from pipeline.prepare.ingested_days import DayCounts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """A file of a night's journal."""

    STEP: ClassVar[str]
    """The file's name without .json."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Document):
    """What a step leaves, with the time that it took."""

    seconds: float | None = stored_with("seconds")
    """None as long as the step has not ended."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared(Step):
    """The data set with the days of the log that are whole."""

    STEP = "prepare"
    manifest: int
    """Number of its manifest."""
    fingerprint: str = ""
    """Of its manifest."""
    events: int
    """Events that it holds."""
    days: Mapping[str, DayCounts]
    """Rows of the days that were ingested on their own, by date."""
    refused: Mapping[str, str]
    """Days that were refused, and why."""
    left_out: Mapping[str, str]
    """Days that are not whole yet, and why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChampionBefore(Step):
    """The champion that the night began with, measured on the whole day before anything is trained on it."""

    STEP = "champion"
    version: str | None
    """None = there is no champion, and nothing else is known."""
    checkpoint: str | None = stored_with("version")
    """Path of the checkpoint that the version is from; None where its tags do not say."""
    trained_until: int | None = stored_with("version")
    """First time, in milliseconds since 1970, whose requests it was not trained on."""
    events_then: int = stored_with("version", int)
    """Events of the data that it was trained on."""
    metrics: Mapping[str, float] | None = stored_with("version")
    """None = the day has no request."""
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
    """What it was trained on."""
    training: TrainingConfig
    steps: int
    """Optimizer steps."""
    events: int
    """Events of the histories read in these steps."""
    train_seconds: float
    """Time spent in steps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluatedChallenger(Step):
    """The evaluation of the challenger and the champion on the held-out requests."""

    STEP = "evaluate"
    directory: Path
    """Where its results are."""
    reference: str | None
    """Version of an earlier champion that was evaluated too; None = not tonight."""
    latencies: tuple[float, float] | None
    """Seconds for one request, (challenger's, champion's); None without a champion."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement(Step):
    """The decision of the gate with its figures."""

    STEP = "decision"
    verdict: str
    """promoted, refused or undecided."""
    reasons: tuple[str, ...]
    """Each a sentence."""
    comparisons: Mapping[str, Comparison] = dataclasses.field(default_factory=dict)
    """tonight, together (with the undecided nights before) and reference, where they were made."""
    guards: tuple[Guard, ...] = ()
    metrics: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    """Every metric by its name, of each system; empty where nothing was evaluated."""
    primary: str | None = stored_with("primary")
    """Name of the metric that decides; None where nothing was evaluated."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Registered(Step):
    """What became of the decision in the registry."""

    STEP = "register"
    champion: str | None
    """The version that serves now."""
    verdict: str
    """Not the decision's where somebody changed the champion meanwhile."""
    reasons: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuiltStates(Step):
    """The states of the champion's users, for serving without raw histories."""

    STEP = "states"
    built: Path | None
    """Directory of the states; None = there are none."""
    why: str | None = stored_with("why")
    """Why there are none, where a model cannot have them."""
    users: int | None = stored_with("built")
    bytes: int | None = stored_with("built")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome(Document):
    """How the night ended; the last document of a night."""

    STEP = "night"
    date: datetime.date
    verdict: str
    """promoted, refused or undecided; no_input or failed where the night was given up."""
    reasons: tuple[str, ...]
    champion: str | None
    """The version that serves afterwards."""
    champion_before: str | None = stored_with("report")
    run_dir: Path | None = stored_with("report")
    """Directory of the challenger's run; None where nothing was trained."""
    refused_days: Mapping[str, str] = stored_with("report", dict)
    """Days of the log that were refused, and why."""
    left_out_days: Mapping[str, str] = stored_with("report", dict)
    """Days of the log that were not whole yet, and why."""
    report: Path | None = stored_with("report")
    """The night's page; None where the night was given up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Notified(Document):
    """People were told of the outcome."""

    STEP = "notified"


STEPS: tuple[type[Step], ...] = (
    Prepared, ChampionBefore, TrainedChallenger, EvaluatedChallenger, Judgement, Registered, BuiltStates,
)  # fmt: skip
"""In the order in which a night takes them."""
