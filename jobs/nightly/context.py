"""What the steps of a night share: the configuration, the day, the journal, the registry."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.config.run_config import RunConfig
from jobs.host.console import Console
from jobs.nightly.journal import Journal
from jobs.nightly.steps import TrainedChallenger
from jobs.runs.request_checks import count_requests
from jobs.runs.run_dir import open_shards, settled
from jobs.tracking.mlflow_runs import mlflow_client, tracking_uri
from jobs.tracking.registry import RegisteredModel, fetch_model
from jobs.training.job import TrainingConfig
from pipeline.batches.request_index import RequestCounts
from pipeline.batches.requests import RequestConfig

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

CHAMPION, REFERENCE = "champion", "reference"
"""Names of these systems in a night's evaluations; the challenger has the name of its model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NightContext:
    """What every step needs."""

    config: RunConfig
    date: datetime.date
    root: Path
    """Directory of the journals of all nights."""
    journal: Journal
    client: MlflowClient
    console: Console
    verbose: bool

    @classmethod
    def of(cls, config: RunConfig, date: datetime.date, console: Console, *, verbose: bool) -> NightContext:
        root = nights_directory(config)
        client = mlflow_client(tracking_uri(config.tracking, config.workspace))
        return cls(
            config=config, date=date, root=root, journal=Journal(root, date), client=client, console=console,
            verbose=verbose,
        )  # fmt: skip

    @property
    def name(self) -> str:
        """Name of the registered model."""
        return self.config.registered_model

    @property
    def start(self) -> int:
        """Start of the day, in milliseconds since 1970."""
        return self._end_of(self.date - datetime.timedelta(days=1))

    @property
    def end(self) -> int:
        """End of the day, in milliseconds since 1970."""
        return self._end_of(self.date)

    def tell(self, text: str) -> None:
        self.console.line(f"{'night':<12} {self.date} {text}")

    def requests(self, **bounds: Any) -> RequestConfig:
        """The recipe's request settings with a split by time at these bounds."""
        defaults = {"split": "temporal", "train_from": None, "replay_share": 0.0}
        return dataclasses.replace(self.config.data.requests, **(defaults | bounds))

    def counts(self, requests: RequestConfig) -> RequestCounts:
        return count_requests(open_shards(self.config), requests)

    def config_with(self, requests: RequestConfig, *, name: str) -> RunConfig:
        data = dataclasses.replace(self.config.data, requests=requests)
        return dataclasses.replace(self.config, name=name, data=data, compare=())

    def training_config(self, requests: RequestConfig, training: TrainingConfig) -> RunConfig:
        """The configuration of the night's training run; each attempt of a night has its own run name."""
        attempt = self.journal.attempt
        name = f"{self.config.name}-{self.date}{f'-{attempt}' if attempt > 1 else ''}"
        return dataclasses.replace(self.config_with(requests, name=name), training=training)

    def trained_config(self, trained: TrainedChallenger) -> RunConfig:
        """The same, from the document of the training step; nothing is left open."""
        return settled(self.training_config(trained.requests, trained.training))

    def fetch(self, version: str) -> RegisteredModel:
        uri = f"models:/{self.name}/{version}"
        return fetch_model(uri, tracking=self.config.tracking, workspace=self.config.workspace)

    def _end_of(self, day: datetime.date) -> int:
        return round(self.config.data.prepare.daily.end_of(day).timestamp() * 1000)


def nights_directory(config: RunConfig) -> Path:
    """Directory of the journals of a recipe's nights."""
    return Path(config.workspace) / "nightly" / config.name
