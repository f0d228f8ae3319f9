"""solar submit -- COMMAND: any `solar` command as a job of a Ray cluster.

What a job needs travels with it: the three packages, pyproject.toml and the YAML files that the command names are
copied into a directory of their own, which Ray unpacks on the cluster and puts first on the path of the driver and of
every worker. Data stays where it is: each path of the command becomes absolute here, because the directory in which
a job runs is temporary. Talking to the cluster is jobs/cluster/job_client.py.
"""

from __future__ import annotations

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
from jobs.host.secrets import redacted
from jobs.recipes import recipe_names

PACKAGES = ("jobs", "models", "pipeline")
CODE_SUFFIXES = (".py", ".yaml", ".html")
"""What the packages consist of; anything else that lies in them is not code."""
UPLOAD_LIMIT_BYTES = 100 << 20
"""Ray's dashboard refuses a larger request (DASHBOARD_CLIENT_MAX_SIZE)."""
NOT_JOBS = ("submit", "jobs", "schedule")
"""Commands that speak to a cluster from outside."""
WITHOUT_WORKSPACE = ("doctor", "inspect")
PATH_OPTIONS = (
    "workspace",
    "events",
    "out",
    "items_path",
    "users_path",
    "from",
    "requests",
    "source.path",
    "source.items_path",
    "source.users_path",
    "data.events",
    "data.shards",
    "tracking.uri",
)
"""Options, and the same keys of a YAML file, whose value is a path or a URI."""
FIRST_PATH = {"import": 1, "inspect": 0}
"""The positional arguments of these commands are paths from this one on."""
FLAGS = (
    "--verify",
    "--digest",
    "--json",
    "--resume",
    "--catch-up",
    "--dry-run",
    "--overwrite",
    "--keep_seen",
    "--print_config",
    "-v",
    "--verbose",
    "-h",
    "--help",
)
"""Options without a value."""
SQLITE = "sqlite:///"


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobCommand:
    """A command as it runs in the job."""

    arguments: tuple[str, ...]
    """The command's name and its arguments, every path absolute or inside the upload."""
    files: Mapping[str, Path]
    """YAML files to upload: path inside the upload -> path here."""

    def __str__(self) -> str:
        return redacted(shlex.join(["solar", *self.arguments]))


def submit(
    arguments: Sequence[str],
    cluster: Cluster,
    *,
    workspace: str | None = None,
    submission_id: str | None = None,
    python: str | None = None,
    driver_cpus: float = 0,
    stop_grace_seconds: int = 60,
    tags: Mapping[str, str] | None = None,
) -> tuple[str, JobCommand]:
    """Hand a command to the cluster; returns the job's id and the command as it runs there."""
    here = cluster.on_this_machine()
    command = job_command(arguments, directory=Path.cwd(), workspace=workspace, same_machine=here)
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
    """The shell line of a job. exec: the driver itself gets the signals, and its exit code is the job's."""
    return f"exec {shlex.quote(python)} -m jobs.cli {shlex.join(arguments)}"


def job_command(arguments: Sequence[str], *, directory: Path, workspace: str | None, same_machine: bool) -> JobCommand:
    """The command with its paths made right for a job.

    Relative paths are meant from `directory`. They become absolute where the whole cluster is `same_machine`;
    elsewhere nobody can know where they lead, and they are refused. YAML files are uploaded from wherever they are.
    """
    arguments = list(arguments)
    if arguments[:1] == ["solar"]:
        arguments.pop(0)
    name = _checked_name(arguments)
    if any(redacted(argument) != argument for argument in arguments):
        raise UserError(
            f"submit: {redacted(shlex.join(arguments))}: a cluster shows its jobs' commands, so a password must not be "
            "in them: put the setting into a YAML file, or set it in the environment of the cluster's nodes"
        )
    if _given(arguments, "notify.url"):
        raise UserError(
            "submit: --notify.url: a cluster shows its jobs' commands, and a webhook's token must not be there: put it "
            f"into a YAML file, or set {URL_VARIABLE} in the environment of the cluster's nodes"
        )
    arguments, files = _with_uploaded_files(arguments, directory)
    arguments = _with_absolute_paths(name, arguments, directory, same_machine=same_machine)
    layers = [_read_yaml(path) for path in files.values()]
    in_files = any("workspace" in layer for layer in layers)
    arguments += _workspace(name, arguments, workspace, directory, in_files=in_files, same_machine=same_machine)
    for key, value in _paths_in_files(layers):
        if not _given(arguments, key) and _is_relative(value):
            arguments += [f"--{key}", _absolute(value, directory, f"{key} (in YAML)", same_machine=same_machine)]
    return JobCommand(arguments=tuple(arguments), files=files)


def stage(directory: Path, files: Mapping[str, Path]) -> None:
    """Copy what a job needs to `directory`; refuse more than Ray takes."""
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
    """UserError with the largest files where the directory holds more than `limit` bytes."""
    sizes = {str(path.relative_to(directory)): path.stat().st_size for path in directory.rglob("*") if path.is_file()}
    total = sum(sizes.values())
    if total > limit:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        named = ", ".join(f"{name} ({sizes[name] / 2**20:.1f} MiB)" for name in largest)
        raise UserError(
            f"submit: the upload has {total / 2**20:.1f} MiB, Ray takes {limit / 2**20:.0f}; the largest: {named}: "
            "keep data outside of the packages and of YAML files"
        )


def _checked_name(arguments: Sequence[str]) -> str:
    from jobs.cli import COMMANDS

    jobs = [command for command in COMMANDS if command not in NOT_JOBS]
    if not arguments:
        raise UserError("submit: no command given: put it after --, such as solar submit -- run movielens-100k")
    if arguments[0] not in jobs:
        raise UserError(f"submit: {arguments[0]!r} cannot be a job: one of {', '.join(jobs)}")
    return arguments[0]


def _with_uploaded_files(arguments: Sequence[str], directory: Path) -> tuple[list[str], dict[str, Path]]:
    """Arguments that name YAML files by their place in the upload, and these files in the order of the command."""
    rewritten, files = [], {}
    for argument in arguments:
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if value.endswith((".yaml", ".yml")):
            path = directory / value
            if not path.is_file():
                raise UserError(f"submit: {value}: no such file here: name a YAML file to upload, or a recipe")
            inside = not Path(value).is_absolute() and ".." not in Path(value).parts
            target = value if inside else f"uploaded/{len(files)}/{path.name}"
            files[target] = path
            argument = f"{option}{equals}{target}"
        rewritten.append(argument)
    return rewritten, files


def _with_absolute_paths(name: str, arguments: list[str], directory: Path, *, same_machine: bool) -> list[str]:
    rewritten, option, position = [arguments[0]], "", -1
    for argument in arguments[1:]:
        if option:
            key, value, prefix = option, argument, ""
            option = ""
        elif argument.startswith("-"):
            flag, equals, value = argument.partition("=")
            key, prefix = flag.removeprefix("--"), f"{flag}{equals}"
            if not equals:
                option = "" if argument in FLAGS else key
                rewritten.append(argument)
                continue
        else:
            position += 1
            key, value, prefix = "", argument, ""
        is_path = key in PATH_OPTIONS if key else _is_path(name, position, value, directory)
        if is_path and _is_relative(value):
            value = _absolute(value, directory, f"--{key}" if key else name, same_machine=same_machine)
        rewritten.append(prefix + value)
    return rewritten


def _is_path(name: str, position: int, value: str, directory: Path) -> bool:
    """Whether a positional argument is a path: `evaluate` takes a recipe or the directory of a checkpoint."""
    if name == "evaluate":
        return position == 0 and value not in recipe_names() and (directory / value).is_dir()
    return name in FIRST_PATH and position >= FIRST_PATH[name]


def _paths_in_files(layers: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """The dotted path keys of the YAML files with their last value."""
    for key in PATH_OPTIONS:
        found = None
        for layer in layers:
            node: Any = layer
            for part in key.split("."):
                node = node.get(part) if isinstance(node, dict) else None
            found = f"[{', '.join(map(str, node))}]" if isinstance(node, list) else node if node else found
        if isinstance(found, str):
            yield key, found


def _workspace(
    name: str, arguments: Sequence[str], workspace: str | None, directory: Path, *, in_files: bool, same_machine: bool
) -> list[str]:
    """The `--workspace` to add to the command."""
    if name in WITHOUT_WORKSPACE:
        if workspace:
            raise UserError(f"submit: --workspace {workspace}: `solar {name}` writes nothing: leave it away")
        return []
    if _given(arguments, "workspace"):
        if workspace:
            raise UserError(f"submit: --workspace {workspace} is given beside the command's own: give one of them")
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
            f"submit: {named} {value}: relative to a directory that the cluster does not see: give an absolute path "
            "that all of its nodes mount, or a URI"
        )
    return prefix + os.path.normpath(directory / value.removeprefix(prefix))


def _parts(value: str) -> list[str]:
    """The paths of a list as it stands on a command line: [one, two]."""
    return [part.strip().strip("'\"") for part in value.strip("[]").split(",")]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as YAML: {one_line(error)}") from error
    return values if isinstance(values, dict) else {}


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
