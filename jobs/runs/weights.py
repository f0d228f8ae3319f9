"""Weights to evaluate: those of a run, by its recipe or directory, of a checkpoint, or of a registered model.

A checkpoint and a registered version contain the configuration that they were trained with; further arguments change
what they are evaluated on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from jobs.config.reader import stored_config, values_of
from jobs.config.run_config import RunConfig
from jobs.host.errors import UserError
from jobs.host.places import Place
from jobs.runs.record import record_of
from jobs.runs.run_dir import open_shards
from jobs.runs.train import train_job
from jobs.tracking.mlflow_runs import TrackingConfig
from jobs.tracking.registry import RegisteredModel, fetch_model
from jobs.training.checkpoint import CheckpointError, checkpoint_key
from jobs.training.job import TrainJob
from jobs.training.warm_start import find_checkpoint
from pipeline.events import DataError
from pipeline.shards.dataset import Shards


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
    """A trained model: where its weights are, and what it was trained on."""

    name: str
    key: str
    """Content key: differs between different weights."""
    weights: str
    """A checkpoint, or the export of a registered model."""
    job: TrainJob | None
    """The job of the checkpoint; None = `weights` is an export."""

    @classmethod
    def served(cls, name: str, model: RegisteredModel) -> System:
        """A registered version, evaluated from the files that serve it."""
        return cls(name=name, key=model.digest, weights=str(model.directory.absolute()), job=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A trained model and what to evaluate it on."""

    system: System
    config: RunConfig
    """The stored configuration, with the further arguments applied."""

    def directory(self, part: str) -> Path:
        """Where the results go unless the user says otherwise: one place for each (weights, data, requests, part)."""
        asked = {
            "weights": self.system.key,
            "shards": self.config.shards_dir,
            "requests": dataclasses.asdict(self.config.data.requests),
            "part": part,
        }
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
        name = f"{self.config.name}-{self.config.data.name}-{part}-{digest}"
        return Path(self.config.workspace) / "evaluations" / name


def find_subject(text: str, arguments: Sequence[str]) -> Subject:
    """The subject of `solar evaluate TEXT ARGUMENTS`."""
    if text.startswith("models:/"):
        return _registered(text, arguments)
    return _checkpoint(find_checkpoint(text), arguments)


def _registered(uri: str, arguments: Sequence[str]) -> Subject:
    workspace = (values_of("--workspace", arguments) or ["workspace"])[-1]
    stores = values_of("--tracking.uri", arguments)
    model = fetch_model(uri, tracking=TrackingConfig(uri=Place(stores[-1]) if stores else None), workspace=workspace)
    config = stored_config("evaluate", model.config, model.uri, arguments)
    system = System.served(config.model["name"], model)
    return Subject(system=system, config=dataclasses.replace(config, name=f"{model.name}-{model.version}"))


def _checkpoint(path: Path, arguments: Sequence[str]) -> Subject:
    record = record_of(path, checksums=True)
    stored = stored_config("evaluate", dict(record.config), str(path), [])
    config = stored_config("evaluate", dict(record.config), str(path), arguments)
    if config.model != stored.model:
        raise UserError(f"{path}: --model.* cannot change what was trained; remove it")
    shards = _training_shards(stored, record.manifest, path)
    system = System(
        name=config.model["name"],
        key=checkpoint_key(path),
        weights=str(path.absolute()),
        job=dataclasses.replace(train_job(stored, shards), parallel=config.parallel),
    )
    return Subject(system=system, config=dataclasses.replace(config, name=f"{stored.name}-{path.name}"))


def _training_shards(stored: RunConfig, manifest: int, path: Path) -> Shards:
    """The data set as it was when the checkpoint was written: its vocabulary maps table rows to items."""
    try:
        return open_shards(stored, number=manifest)
    except (DataError, UserError) as error:
        raise CheckpointError(
            f"{path}: was trained on manifest {manifest} of {stored.shards_dir}, which cannot be read ({error}); "
            "restore it, or evaluate the registered model, which contains its items"
        ) from error
