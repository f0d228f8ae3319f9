"""From a model's URI in the MLflow registry to its weights: finds the version of an alias and fetches its files.

    fetch_model("models:/solar-shop@champion", ...)  ->  RegisteredModel: version, tags, directory, scorer()

Reads the files that jobs/runs/export.py wrote. Files in a local store are used in place; others are fetched once to
WORKSPACE/models/NAME.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from jobs.host.console import one_line
from jobs.host.errors import UserError
from jobs.host.secrets import redacted
from jobs.scorer.checksums import DamagedModel, export_digest, file_digests
from jobs.scorer.scorer import Scorer
from jobs.tracking.export_settings import read_object, read_settings
from jobs.tracking.mlflow_runs import TrackingConfig, mlflow_client, tracking_uri
from jobs.tracking.unsent import is_locked

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient


class StoreAway(UserError):
    """MLflow does not answer; the request itself is not at fault."""


class NoStore(UserError):
    """The workspace has no MLflow store yet, and no other store was named."""


EXPORT = "model"
"""Name of an export's directory, and of the artifact that holds its files in a version."""
EXPORTED = ("scorer.json", "config.json", "items.parquet", "table-item.safetensors", "model.safetensors")
"""Files of every export. Additional ones: table-NAME.safetensors for each item feature, table-user-NAME.safetensors for
each user feature, and user-values.parquet."""
_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[\w.-]+)|/(?P<version>\d+))")
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""Environment for MLflow's client while a user waits: with its own defaults it takes minutes until it reports that no
server answers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegisteredModel:
    """A version in the registry, with its files on this machine."""

    name: str
    version: str
    alias: str | None
    """The alias in the requested URI; None if the URI names a version."""
    directory: Path
    """Directory with the files that jobs/runs/export.py wrote."""
    tags: Mapping[str, str]
    """Tags of the version: solar.checkpoint, solar.manifest, solar.run_key, ..."""

    @property
    def uri(self) -> str:
        """The URI of this version, which stays valid when the alias moves to another version."""
        return f"models:/{self.name}/{self.version}"

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """scorer.json: the tower's settings, features, actions, max_history. UserError: it is damaged."""
        return read_settings(self.directory, uri=self.uri)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """config.json: the resolved configuration of the training run. UserError: it is damaged."""
        return read_object(self.directory / "config.json", uri=self.uri)

    @functools.cached_property
    def digest(self) -> str:
        """Digest of all exported files but the counters of the data. Reads every byte."""
        return export_digest(file_digests(self.directory))

    def scorer(self) -> Scorer:
        """The model, loaded into memory and ready to score. UserError: a file is damaged."""
        scorer = Scorer()
        try:
            scorer.load(self.directory)
        except DamagedModel as error:
            raise UserError(f"{self.uri}: {error}") from error
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            reason = one_line(error)[:200]
            raise UserError(
                f"{self.uri}: {self.directory} cannot be read ({type(error).__name__}: {reason}); register it again"
            ) from error
        return scorer


def fetch_model(uri: str, *, tracking: TrackingConfig, workspace: str) -> RegisteredModel:
    """Resolve models:/NAME@ALIAS or models:/NAME/VERSION and fetch its files to this machine.

    UserError: another form of URI, no such model, alias or version, a store that does not answer, a missing artifact.
    """
    asked = _URI.fullmatch(uri)
    if asked is None:
        raise UserError(f"{uri}: must have the form models:/NAME@ALIAS or models:/NAME/VERSION")
    store = store_uri(tracking, workspace)
    with _explained(store):
        client = mlflow_client(store)
        version = _resolve(client, asked, uri=uri, store=store)
        source = client.get_model_version_download_uri(version.name, version.version)
    return RegisteredModel(
        name=version.name,
        version=str(version.version),
        alias=asked["alias"],
        directory=_exported_files(f"{source}/artifacts/{EXPORT}", version, uri=uri, store=store, workspace=workspace),
        tags=dict(version.tags),
    )


def store_uri(tracking: TrackingConfig, workspace: str) -> str:
    """The URI of the registry. NoStore: it would be the workspace's own store, which does not exist."""
    if tracking.uri is None and not (Path(workspace) / "mlflow" / "mlflow.db").exists():
        raise NoStore(f"{workspace}/mlflow: no MLflow store there; give --workspace DIR of a run or --tracking.uri URI")
    return tracking_uri(tracking, workspace)


@contextlib.contextmanager
def open_registry(tracking: TrackingConfig, workspace: str) -> Iterator[MlflowClient]:
    """A client of the registry, for commands that change it. UserError: the store does not exist or does not answer."""
    store = store_uri(tracking, workspace)
    with _explained(store):
        yield mlflow_client(store)


def registry_lock(workspace: str) -> Path:
    """The lock file of the commands of this workspace that change the registry (`in_turn`)."""
    return Path(workspace) / "registry.lock"


def _resolve(client: MlflowClient, asked: re.Match[str], *, uri: str, store: str) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    name, alias = asked["name"], asked["alias"]
    try:
        if alias:
            # The answer to a query by alias lacks the other aliases and, in some stores, the tags.
            return client.get_model_version(name, client.get_model_version_by_alias(name, alias).version)
        return client.get_model_version(name, asked["version"])
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
    models = {model.name: model for model in client.search_registered_models()}
    if name not in models:
        known = f"it has {', '.join(sorted(models))}" if models else "it has none: run `solar register`"
        raise UserError(f"{uri}: no model {name!r} at {redacted(store)}; {known}")
    if alias:
        known = ", ".join(sorted(models[name].aliases)) or "none"
        raise UserError(f"{uri}: model {name!r} has no alias {alias!r}; its aliases: {known}")
    known = ", ".join(sorted((str(v.version) for v in client.search_model_versions(f"name = '{name}'")), key=int))
    raise UserError(f"{uri}: model {name!r} has no version {asked['version']}; its versions: {known or 'none'}")


def _exported_files(artifact: str, version: ModelVersion, *, uri: str, store: str, workspace: str) -> Path:
    """The local directory of the export, fetched if needed; UserError if a file is missing."""
    local = Path(artifact.removeprefix("file://"))
    if artifact.startswith(("/", "file://")):
        return _complete(local, uri=uri)
    key = hashlib.sha256(artifact.encode()).hexdigest()[:8]
    directory = Path(workspace) / "models" / version.name / f"{version.version}-{key}"
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix="fetching-") as scratch:
            fetched = _download(artifact, scratch, uri=uri, store=store)
            _complete(fetched, uri=uri)
            try:
                fetched.rename(directory)
            except OSError:
                # Another process may have fetched the same files in the meantime.
                if not directory.exists():
                    raise
    return _complete(directory, uri=uri)


def _download(artifact: str, scratch: str, *, uri: str, store: str) -> Path:
    import mlflow.artifacts

    try:
        return Path(
            mlflow.artifacts.download_artifacts(
                artifact_uri=artifact, dst_path=scratch, tracking_uri=store, registry_uri=store
            )
        )
    except Exception as error:
        reason = redacted(one_line(error))[:200]
        raise UserError(f"{uri}: artifact {redacted(artifact)} cannot be fetched: {reason}") from error


def _complete(directory: Path, *, uri: str) -> Path:
    """The directory; UserError if a file of the export is missing."""
    names = list(EXPORTED)
    if (directory / "scorer.json").is_file():
        settings = read_settings(directory, uri=uri)
        names += [f"table-{name}.safetensors" for name in settings["features"]]
        if user_features := settings.get("user_features"):
            names += ["user-values.parquet", *(f"table-user-{name}.safetensors" for name in user_features)]
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise UserError(f"{uri}: artifact {directory / missing[0]} is missing: restore it or register the model again")
    return directory


@contextlib.contextmanager
def _explained(store: str) -> Iterator[None]:
    """In the block, MLflow's client gives up soon, and any error of the store becomes StoreAway with one line."""
    before = {key: os.environ.get(key) for key in PATIENCE}
    os.environ.update({key: value for key, value in PATIENCE.items() if before[key] is None})
    try:
        yield
    except UserError:
        raise
    # Any exception: database, network and missing-driver errors have no common class.
    except Exception as error:
        if is_locked(error):
            raise
        reason = redacted(one_line(error))[:200]
        raise StoreAway(
            f"MLflow at {redacted(store)} does not answer ({type(error).__name__}: {reason}): start it, or set "
            "--tracking.uri"
        ) from error
    finally:
        for key in (key for key, value in before.items() if value is None):
            os.environ.pop(key, None)
