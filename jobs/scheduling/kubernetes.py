"""solar schedule RECIPE --emit cronjob|kuberay: Kubernetes manifests that run the nights; complete, without secrets.

    access.yaml       ServiceAccount, Role and RoleBinding of the pods, without any rights at the API server
    recipe.yaml       ConfigMap with the YAML files that the command names, if it names any
    cronjob.yaml      CronJob that submits each night to a permanent Ray cluster (jobs/scheduling/cronjob.py)
    rayjob.yaml, raycronjob.yaml      a separate Ray cluster for each night (jobs/scheduling/kuberay.py)

Manifests refer to secrets by name: `solar-ray-token` has the cluster's token, `solar-credentials` the environment
variables of the driver and its workers.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jobs.cluster.job_client import STOP_GRACE_VARIABLE
from jobs.cluster.parallel import ParallelConfig
from jobs.cluster.session import DEFAULT_ENVIRONMENT, FIXED_ENVIRONMENT
from jobs.cluster.submission import job_command
from jobs.config.run_config import RunConfig
from jobs.host.errors import UserError
from jobs.host.notify import URL_VARIABLE
from jobs.host.secrets import redacted
from jobs.scheduling.cron import Cron

TOKEN_SECRET, TOKEN_KEY = "solar-ray-token", "auth_token"
"""KubeRay requires this key."""
CREDENTIALS_SECRET = "solar-credentials"
CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
WORKSPACE = "/workspace"
"""Mount path of the claim, unless the recipe has an absolute workspace."""
RECIPES = "/etc/solar"
"""Mount path of the YAML files."""
USER = 1000
"""The user of infra/docker/Dockerfile."""
STOP_GRACE_SECONDS = 120
"""Time between SIGTERM and SIGKILL for a driver: enough for a checkpoint."""
DEADLINE_SECONDS = 20 * 3600
"""A night that takes longer is stopped, before the next one starts."""
MAX_NAME = 30
"""KubeRay appends to names, and its longest names may have 47 characters."""
LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """The cluster in which nights run."""

    image: str
    """Container image with Solar and its dependencies, by tag (not latest) or digest."""
    namespace: str = "default"
    """Namespace of all manifests."""
    claim: str = "solar-workspace"
    """PersistentVolumeClaim of the workspace; must be ReadWriteMany if there are several workers."""
    head: str | None = None
    """cronjob: dashboard of the permanent Ray cluster, http://HOST:8265."""
    gpu: bool = False
    """Whether each worker has a GPU."""
    retries: int
    """Number of further tries of a failed night."""
    retry_minutes: float
    """cronjob: minutes before the first further try, doubled before each later one."""

    def __post_init__(self) -> None:
        tagged = re.fullmatch(r"[^\s@]+@sha256:[0-9a-f]{64}|[^\s@]+:([\w.-]+)", self.image)
        if not tagged or tagged[1] == "latest" or "/" in (tagged[1] or ""):
            raise ValueError(f"--image {self.image}: name a tag other than latest, or a digest")
        for option in ("namespace", "claim"):
            if not re.fullmatch(LABEL, getattr(self, option)):
                raise ValueError(f"--{option} {getattr(self, option)}: must be lower-case letters, digits and '-'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Night:
    """The command that runs, and when."""

    name: str
    """Name of all manifests."""
    arguments: tuple[str, ...]
    """`nightly RECIPE --catch-up ...`, with paths as in the cluster."""
    files: Mapping[str, str]
    """YAML files that the command names: path below RECIPES -> text."""
    cron: Cron
    """When nights start."""
    workspace: str
    """Absolute directory that all pods mount."""
    parallel: ParallelConfig
    """Number of workers and their resources."""


def night_of(
    recipe: str, overrides: Sequence[str], config: RunConfig, cron: Cron, *, parsers: Sequence[argparse.ArgumentParser]
) -> Night:
    """The night of a resolved config; UserError if it cannot run in a cluster, or a manifest would contain a secret.

    `parsers`: the parsers of the arguments of `solar nightly`.
    """
    if config.notify.url is not None:
        raise UserError(
            f"notify.url: a manifest must not contain tokens: omit it, and set {URL_VARIABLE} in {CREDENTIALS_SECRET}"
        )
    arguments = ["nightly", recipe, "--catch-up", *overrides]
    workspace = config.workspace
    if workspace == "workspace":
        workspace = WORKSPACE
        arguments += ["--workspace", workspace]
    elif not Path(workspace).is_absolute():
        raise UserError(f"workspace={workspace}: must be absolute in a cluster, or unset for {WORKSPACE}")
    command = job_command(arguments, parsers=parsers, directory=Path.cwd(), workspace=None, same_machine=False)
    files = {name: path.read_text() for name, path in command.files.items()}
    for name, text in files.items():
        if redacted(text) != text:
            raise UserError(f"{command.files[name]}: has a password: set it in {CREDENTIALS_SECRET}, not in a recipe")
    name = f"solar-{re.sub(r'[^a-z0-9]+', '-', config.name.lower()).strip('-')}"
    return Night(
        name=name[:MAX_NAME].strip("-"),
        arguments=tuple(_in_cluster(argument, files) for argument in command.arguments),
        files=files,
        cron=cron,
        workspace=workspace,
        parallel=config.parallel,
    )


def _in_cluster(argument: str, files: Mapping[str, str]) -> str:
    """The argument, with the path of an uploaded file replaced by its path in the pods."""
    option, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{RECIPES}/{value}" if value in files else argument


def write_manifests(directory: Path, documents: Mapping[str, Sequence[Any]], *, overwrite: bool) -> list[Path]:
    """Write {file name: [head comment, manifest, ...]}; UserError if the directory is not empty.

    With `overwrite`, manifests written there earlier are removed first; other files stay.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--out {directory}: is a file: name a directory")
    if directory.is_dir() and any(directory.iterdir()):
        if not overwrite:
            raise UserError(f"--out {directory}: is not empty: name another directory, or give --overwrite")
        for name in ("access.yaml", "recipe.yaml", "cronjob.yaml", "rayjob.yaml", "raycronjob.yaml"):
            (directory / name).unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (comment, *manifests) in documents.items():
        head = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
        body = yaml.dump_all(manifests, Dumper=_Plain, sort_keys=False, width=120)
        (directory / name).write_text(head + body)
        written.append(directory / name)
    return written


class _Plain(yaml.SafeDumper):
    """Writes no anchors, and writes texts of several lines as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Plain.add_representer(str, _text)


def metadata(night: Night, target: TargetConfig) -> dict[str, Any]:
    labels = {"app.kubernetes.io/name": "solar", "app.kubernetes.io/instance": night.name}
    return {"name": night.name, "namespace": target.namespace, "labels": labels}


def shared_documents(night: Night, target: TargetConfig) -> dict[str, list[Any]]:
    """access.yaml, and recipe.yaml if the night names files."""
    meta = metadata(night, target)
    subject = {"kind": "ServiceAccount", "name": night.name, "namespace": target.namespace}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": night.name}
    rbac = "rbac.authorization.k8s.io/v1"
    documents: dict[str, list[Any]] = {
        "access.yaml": [
            "The account of the pods. They do not use the API server: the role is empty and no token is mounted.",
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta, "automountServiceAccountToken": False},
            {"apiVersion": rbac, "kind": "Role", "metadata": meta, "rules": []},
            {"apiVersion": rbac, "kind": "RoleBinding", "metadata": meta, "roleRef": reference, "subjects": [subject]},
        ]
    }
    if night.files:
        data = {_key(index): text for index, text in enumerate(night.files.values())}
        documents["recipe.yaml"] = [
            "The YAML files that the night names. After changing one: solar schedule ... --emit ... --overwrite",
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data},
        ]
    return documents


def pod(
    night: Night, containers: Sequence[Mapping[str, Any]], *, volumes: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A pod's spec: an account without rights, not root."""
    return {
        "serviceAccountName": night.name,
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": STOP_GRACE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            # Otherwise every start changes the group of all files in the workspace, one by one.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": list(containers),
        **({"volumes": list(volumes)} if volumes else {}),
    }


def container(name: str, target: TargetConfig, **fields: Any) -> dict[str, Any]:
    """A container that cannot gain privileges."""
    safe = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    return {"name": name, "image": target.image, "imagePullPolicy": "IfNotPresent", "securityContext": safe, **fields}


def token_environment() -> list[dict[str, Any]]:
    """Environment with the token, for clients of a permanent cluster; KubeRay adds the same to its own pods."""
    reference = {"secretKeyRef": {"name": TOKEN_SECRET, "key": TOKEN_KEY}}
    return [{"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "valueFrom": reference}]


def node_environment() -> list[dict[str, str]]:
    """Environment that every node of a cluster needs before Ray starts."""
    values = {**FIXED_ENVIRONMENT, **DEFAULT_ENVIRONMENT, STOP_GRACE_VARIABLE: str(STOP_GRACE_SECONDS)}
    return [{"name": name, "value": value} for name, value in values.items()]


def recipe_volume(night: Night) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(volumes, mounts) of the night's YAML files."""
    if not night.files:
        return [], []
    items = [{"key": _key(index), "path": path} for index, path in enumerate(night.files)]
    volume = {"name": "recipe", "configMap": {"name": night.name, "items": items}}
    return [volume], [{"name": "recipe", "mountPath": RECIPES, "readOnly": True}]


def _key(index: int) -> str:
    return f"file-{index}.yaml"
