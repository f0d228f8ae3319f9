"""solar register RECIPE: the best checkpoint of a run -> a version in the MLflow registry.

A version holds weights as safetensors, the vocabulary, one self-contained scorer.py that needs only torch, metrics and
lineage. It has no pickle, and can be loaded without this repository. The first version becomes `champion`; a later one
`challenger`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jobs.config.run_config import RunConfig
from jobs.host.console import Console
from jobs.host.errors import UserError
from jobs.host.locks import in_turn
from jobs.runs.evaluate import Evaluated
from jobs.runs.export import export_model, log_export, training_shards
from jobs.runs.floor import below_floor
from jobs.runs.record import read_record
from jobs.runs.run_dir import Trained
from jobs.runs.summary import SUMMARY
from jobs.tracking.champions import CHALLENGER, CHAMPION, ChampionChanged, champion, or_none, promote
from jobs.tracking.mlflow_runs import metric_name, mlflow_client, tracking_uri
from jobs.tracking.registry import EXPORT, registry_lock
from jobs.training.checkpoint import checkpoint_key


@dataclasses.dataclass(frozen=True)
class Registered:
    """A version in the registry."""

    model: str
    version: str
    alias: str
    uri: str
    reused: bool


def register(
    config: RunConfig,
    trained: Trained,
    evaluated: Evaluated,
    console: Console,
    *,
    set_alias: Callable[[Any, str, str], str] | None = None,
    tags: Mapping[str, str] = MappingProxyType({}),
    exported: Path | None = None,
) -> Registered:
    """Register the run's best checkpoint; a checkpoint that is registered already keeps its version. UserError: its
    evaluation has no value of the metric that decides.

    `exported`: the export of the checkpoint (`export_model`), in a directory named `model`; None = write it now.
    `set_alias(client, name, version)` sets the version's alias and returns it; by default the first version becomes the
    champion, a later one the challenger. `tags` are set on the version in addition to its lineage.
    """
    _refuse_unknown_metric(evaluated)
    # One command after the other: the second one finds the version that the first one made.
    lock = registry_lock(config.workspace)
    with in_turn(lock, tell=console.teller("register")):
        return _register(config, trained, evaluated, console, set_alias or _first_is_champion, tags, exported)


def _register(
    config: RunConfig, trained: Trained, evaluated: Evaluated, console: Console,
    set_alias: Callable[[Any, str, str], str], tags: Mapping[str, str], exported: Path | None,
) -> Registered:  # fmt: skip
    import mlflow

    # Reuse the version that this checkpoint has already.
    uri, name = tracking_uri(config.tracking, config.workspace), config.registered_model
    client = mlflow_client(uri)
    key = checkpoint_key(trained.checkpoint)
    found = _find_version(client, name, key)
    if found is not None:
        # An earlier command may have died between creating the version and setting its alias.
        alias = ", ".join(sorted(found.aliases)) or set_alias(client, name, str(found.version))
        return Registered(name, found.version, alias, f"models:/{name}/{found.version}", True)

    with console.stage("register") as stage, tempfile.TemporaryDirectory() as scratch:
        if exported is None:
            exported = Path(scratch) / EXPORT
            export_model(config, trained.checkpoint, exported, tell=console.teller("register"))
        vocabulary = training_shards(config, trained.checkpoint).vocabulary
        stage.update(1, 3, "log")
        # Sets where MLflow's functions log to, for the rest of this process and for the processes that it starts.
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        with mlflow.start_run(run_id=trained.mlflow_run_id):
            info = log_export(exported, model=config.model, vocabulary=vocabulary)
            # After the model: logging it asks the store for the history of every metric that the run has by then.
            _log_evaluation(config, trained, evaluated, model_id=info.model_id)
        stage.update(2, 3, "version")
        created = _create_version(client, name, info, trained, {**tags, "solar.run_key": key})
        version = _only_version(client, name, key, created)
        alias = set_alias(client, name, str(version.version))
        stage.result = f"{name} version {version.version}, alias {alias}"
    return Registered(name, version.version, alias, f"models:/{name}@{alias}", version.version != created.version)


def _refuse_unknown_metric(evaluated: Evaluated) -> None:
    """UserError if the metric that decides could not be computed: no model could be compared with this one."""
    summary = evaluated.summary
    if math.isnan(summary.metrics[summary.main][summary.primary]):
        fix = "add more events"
        if summary.primary == "ndcg@10":
            fix += ", or set data.requests.seen_items to kept if people come back to items"
        raise UserError(
            f"{evaluated.directory}: {summary.primary} of {summary.main} is nan, no {summary.part} request counts for "
            f"it: not registered; {fix}"
        )


def _log_evaluation(config: RunConfig, trained: Trained, evaluated: Evaluated, *, model_id: str) -> None:
    """The metrics of the test part, of the run and of its logged model, and the plots."""
    import mlflow

    from jobs.runs.plots import write_plots

    logged = {}
    for system, metrics in evaluated.summary.metrics.items():
        prefix = "test" if system == config.model["name"] else f"test/{system.replace(', ', '/')}"
        logged |= {f"{prefix}/{metric_name(key)}": value for key, value in metrics.items() if value == value}
    if any(part.floor for part in evaluated.summary.slices):
        logged["floor.below"] = len(below_floor(evaluated.summary))
    mlflow.log_metrics(logged, model_id=model_id)
    mlflow.log_artifact(str(evaluated.directory / SUMMARY), "evaluation")
    for plot in write_plots(trained.run_dir, model=config.model["name"]):
        mlflow.log_artifact(str(plot), "plots")


def _create_version(client: Any, name: str, logged: Any, trained: Trained, tags: Mapping[str, str]) -> Any:
    if or_none(lambda: client.get_registered_model(name)) is None:
        client.create_registered_model(name)
    record = read_record(trained.run_dir)
    assert record is not None, "training wrote it"
    lineage = {
        "solar.checkpoint": str(trained.checkpoint.absolute()),
        "solar.manifest": str(record.manifest),
        "solar.manifest_fingerprint": record.manifest_fingerprint,
        "solar.git_commit": record.git_commit,
    }
    before = champion(client, name)
    if before is not None:
        lineage["solar.parent_version"] = str(before.version)
    # A tracking server refuses a source of this kind without the id of its model; a database store does not check.
    return client.create_model_version(
        name, source=logged.model_uri, run_id=trained.mlflow_run_id, model_id=logged.model_id, tags={**lineage, **tags}
    )


def _first_is_champion(client: Any, name: str, version: str) -> str:
    if champion(client, name) is None:
        # Where another machine has just made its version the champion, this one is a later version.
        with contextlib.suppress(ChampionChanged):
            promote(client, name, version, expected=None, why="the first version")
            return CHAMPION
    client.set_registered_model_alias(name, CHALLENGER, version)
    return CHALLENGER


def _only_version(client: Any, name: str, key: str, created: Any) -> Any:
    """The version of the checkpoint with this key. If another machine has created one at the same time, the one with
    the smaller number stays, and the other machine comes to the same result."""
    first = _find_version(client, name, key)
    assert first is not None, "it was created"
    if first.version != created.version:
        client.delete_model_version(name, created.version)
    return first


def _find_version(client: Any, name: str, key: str) -> Any | None:
    """The first version of the checkpoint with this key; None if it is not registered."""
    found = client.search_model_versions(f"name = '{name}'")
    numbers = [int(version.version) for version in found if version.tags.get("solar.run_key") == key]
    return client.get_model_version(name, str(min(numbers))) if numbers else None
