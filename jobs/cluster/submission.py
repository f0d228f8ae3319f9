"""solar submit -- COMMAND: any `solar` command as a job of a Ray cluster.

The code is uploaded with each job: the three packages, pyproject.toml and the YAML files that the command names are
copied to a temporary directory, which Ray unpacks on the cluster and puts first on the Python path of the driver and of
every worker. Data is not uploaded: each place among the command's arguments becomes absolute here, because a job runs
in a temporary directory. jobs/cluster/job_client.py communicates with the cluster.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jobs.cluster.job_client import STOP_GRACE_VARIABLE, Cluster
from jobs.cluster.session import DEFAULT_ENVIRONMENT, FIXED_ENVIRONMENT, WORKER_ENVIRONMENT
from jobs.host.code_version import GIT_COMMIT_VARIABLE, git_commit
from jobs.host.console import one_line
from jobs.host.errors import UserError
from jobs.host.notify import URL_VARIABLE
from jobs.host.places import Kind, Subject, YamlFile, place_keys, rewritten, takes_option
from jobs.host.secrets import redacted
from jobs.host.yaml_text import parse_yaml

PACKAGES = ("jobs", "models", "pipeline")
CODE_SUFFIXES = (".py", ".yaml", ".html")
"""Files of the packages that are uploaded; other files in them are not code."""
UPLOAD_LIMIT_BYTES = 100 << 20
"""Ray's dashboard refuses larger requests (DASHBOARD_CLIENT_MAX_SIZE)."""
YAML = (".yaml", ".yml")
SQLITE = "sqlite:///"


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobCommand:
    """A command as the job runs it."""

    arguments: tuple[str, ...]
    """The command's name and its arguments; every path is absolute or inside the upload."""
    files: Mapping[str, Path]
    """YAML files to upload: path inside the upload -> path on this machine."""

    def __str__(self) -> str:
        return redacted(shlex.join(["solar", *self.arguments]))


def submit(
    arguments: Sequence[str],
    cluster: Cluster,
    *,
    parsers: Sequence[argparse.ArgumentParser],
    chosen_by: int = 0,
    workspace: str | None = None,
    submission_id: str | None = None,
    python: str | None = None,
    driver_cpus: float = 0,
    stop_grace_seconds: int = 60,
    tags: Mapping[str, str] | None = None,
) -> tuple[str, JobCommand]:
    """Submit a command to the cluster; returns the job's id and the command as the job runs it.

    `parsers`: the parsers of its arguments after its name and the `chosen_by` arguments that choose the parsers.
    """
    # Rewrite the paths and collect the job's environment, then upload.
    here = cluster.on_this_machine()
    command = job_command(
        arguments, parsers=parsers, chosen_by=chosen_by, directory=Path.cwd(), workspace=workspace, same_machine=here
    )
    python = python or (sys.executable if here else "python")
    environment = {
        **FIXED_ENVIRONMENT,
        **{key: os.environ.get(key, value) for key, value in (DEFAULT_ENVIRONMENT | WORKER_ENVIRONMENT).items()},
        GIT_COMMIT_VARIABLE: git_commit(),
        STOP_GRACE_VARIABLE: str(stop_grace_seconds),
    }
    with tempfile.TemporaryDirectory(prefix="solar-submit-") as directory:
        stage(Path(directory), command.files)
        job_id = cluster.submit(
            entrypoint=entrypoint(python, command.arguments),
            runtime_env={"working_dir": directory, "env_vars": environment},
            submission_id=submission_id,
            command=str(command),
            driver_cpus=driver_cpus,
            tags=tags or {},
        )
    return job_id, command


def entrypoint(python: str, arguments: Sequence[str]) -> str:
    """The shell line of a job. With exec the driver itself gets the signals, and the job ends with its exit code."""
    return f"exec {shlex.quote(python)} -m jobs.cli {shlex.join(arguments)}"


def job_command(
    arguments: Sequence[str],
    *,
    parsers: Sequence[argparse.ArgumentParser],
    chosen_by: int = 0,
    directory: Path,
    workspace: str | None,
    same_machine: bool,
) -> JobCommand:
    """The command with its places rewritten for a job.

    Relative paths are relative to `directory`. They become absolute if all nodes of the cluster are this machine
    (`same_machine`); otherwise they are refused, because other nodes may not have them. YAML files are uploaded in both
    cases.
    """
    _refuse_secrets(arguments)
    files = _Uploads(directory)

    def rewrite(kind: Kind, value: str, named: str) -> str:
        if kind in (YamlFile, Subject) and (value.endswith(YAML) or named == "--config"):
            return files.place_of(value)
        if kind is YamlFile or (kind is Subject and not (directory / value).is_dir()):
            return value  # the name of a recipe or board in the package, or a model's URI
        if not _is_relative(value):
            return value
        shown = named if named.startswith("--") else arguments[0]
        return _absolute(value, directory, shown, same_machine=same_machine)

    # Rewrite the arguments; then add the workspace and the places in YAML files that must become absolute.
    first = 1 + chosen_by
    found = [*arguments[:first], *rewritten(arguments[first:], parsers, rewrite)]
    layers = [_read_yaml(path) for path in files.found.values()]
    if takes_option(parsers, "--workspace"):
        in_files = any("workspace" in layer for layer in layers)
        found += _workspace(found, workspace, directory, in_files=in_files, same_machine=same_machine)
    elif workspace:
        raise UserError(f"submit: --workspace {workspace}: `solar {arguments[0]}` has no workspace: omit it")
    for key, value in _places_in_files(layers, place_keys(parsers)):
        if not _given(found, key) and _is_relative(value):
            found += [f"--{key}", _absolute(value, directory, f"{key} (in YAML)", same_machine=same_machine)]
    return JobCommand(arguments=tuple(found), files=files.found)


def stage(directory: Path, files: Mapping[str, Path]) -> None:
    """Copy the files of a job to `directory`. UserError: they exceed Ray's limit."""
    root = Path(importlib.import_module("jobs").__path__[0]).parent
    for package in PACKAGES:
        source = Path(importlib.import_module(package).__path__[0])
        for path in sorted(source.rglob("*")):
            if path.suffix in CODE_SUFFIXES and path.is_file():
                _copy(path, directory / package / path.relative_to(source))
    if (root / "pyproject.toml").is_file():
        _copy(root / "pyproject.toml", directory / "pyproject.toml")
    for target, path in files.items():
        _copy(path, directory / target)
    check_size(directory, limit=UPLOAD_LIMIT_BYTES)


def check_size(directory: Path, *, limit: int) -> None:
    """UserError with the names of the largest files if the directory has more than `limit` bytes."""
    sizes = {str(path.relative_to(directory)): path.stat().st_size for path in directory.rglob("*") if path.is_file()}
    total = sum(sizes.values())
    if total > limit:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        named = ", ".join(f"{name} ({sizes[name] / 2**20:.1f} MiB)" for name in largest)
        raise UserError(
            f"submit: the upload has {total / 2**20:.1f} MiB, Ray accepts {limit / 2**20:.0f}; the largest: {named}: "
            "keep data out of the packages and of YAML files"
        )


def _refuse_secrets(arguments: Sequence[str]) -> None:
    """UserError if the arguments contain a password or a webhook's URL."""
    if any(redacted(argument) != argument for argument in arguments):
        raise UserError(
            f"submit: {redacted(shlex.join(arguments))}: a cluster shows its jobs' commands, so a password must not be "
            "in them: put the setting into a YAML file, or set it in the environment of the cluster's nodes"
        )
    if _given(arguments, "notify.url"):
        raise UserError(
            "submit: --notify.url: a cluster shows its jobs' commands, so a webhook's token must not be in them: put "
            f"it into a YAML file, or set {URL_VARIABLE} in the environment of the cluster's nodes"
        )


class _Uploads:
    """Collects the YAML files that a command names, in their order."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.found: dict[str, Path] = {}
        """{path inside the upload: path on this machine}."""

    def place_of(self, value: str) -> str:
        """The path inside the upload for a file that the command names."""
        path = self._directory / value
        if not path.is_file():
            raise UserError(f"submit: {value}: no such file here: name a YAML file to upload, or a recipe")
        inside = not Path(value).is_absolute() and ".." not in Path(value).parts
        place = value if inside else f"uploaded/{len(self.found)}/{path.name}"
        self.found[place] = path
        return place


def _places_in_files(layers: Sequence[dict[str, Any]], keys: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(key, last value) of those dotted keys that the YAML files set."""
    for key in keys:
        found = None
        for layer in layers:
            node: Any = layer
            for part in key.split("."):
                node = node.get(part) if isinstance(node, dict) else None
            found = f"[{', '.join(map(str, node))}]" if isinstance(node, list) else node if node else found
        if isinstance(found, str):
            yield key, found


def _workspace(
    arguments: Sequence[str], workspace: str | None, directory: Path, *, in_files: bool, same_machine: bool
) -> list[str]:
    """The arguments with `--workspace` to add to the command; empty if the command or a YAML file has it already."""
    if _given(arguments, "workspace"):
        if workspace:
            raise UserError(f"submit: --workspace {workspace}: the command has a --workspace, too: give one of them")
        return []
    if workspace is None and in_files:
        return []
    if workspace is None and not same_machine:
        raise UserError(
            "submit: --workspace DIR is not given, and the cluster is not this machine: name an absolute directory "
            "that all of its nodes mount"
        )
    workspace = workspace or "workspace"
    if _is_relative(workspace):
        workspace = _absolute(workspace, directory, "--workspace", same_machine=same_machine)
    return ["--workspace", workspace]


def _given(arguments: Sequence[str], key: str) -> bool:
    return any(argument.split("=", 1)[0] == f"--{key}" for argument in arguments)


def _is_relative(value: str) -> bool:
    if value.startswith("["):
        return any(_is_relative(part) for part in _parts(value))
    if value.startswith(SQLITE):
        return not value.startswith(f"{SQLITE}/")
    return value not in ("", "null") and not re.match(r"\w[\w+.-]*:", value) and not Path(value).is_absolute()


def _absolute(value: str, directory: Path, named: str, *, same_machine: bool) -> str:
    if value.startswith("["):
        found = [_absolute(part, directory, named, same_machine=same_machine) for part in _parts(value)]
        return f"[{', '.join(found)}]"
    prefix = SQLITE if value.startswith(SQLITE) else ""
    if not same_machine:
        raise UserError(
            f"submit: {named} {value}: is relative to a directory that the cluster does not see: give an absolute path "
            "that all of its nodes mount, or a URI"
        )
    return prefix + os.path.normpath(directory / value.removeprefix(prefix))


def _parts(value: str) -> list[str]:
    """The paths of a list in the form of a command line: [one, two]."""
    return [part.strip().strip("'\"") for part in value.strip("[]").split(",")]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = parse_yaml(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as YAML: {one_line(error)}") from error
    return values if isinstance(values, dict) else {}


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
