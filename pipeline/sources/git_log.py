"""Runs git: finds repositories, and streams their commits from `git log` through a pipe."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from pipeline.events import DataError

_HEADER = b"\x01"
_FORMAT = "--format=tformat:%x01%H%n%at%n%aE%n%aN"
# Options that a user's git configuration could otherwise change are set explicitly.
_LOG = (
    "log", "--no-merges", "-z", "--name-status", "--no-renames", "--no-relative",
    "--ignore-submodules=none", "--no-show-signature", "--no-color", "--no-ext-diff", "--encoding=UTF-8", _FORMAT,
)  # fmt: skip
_CONFIG = ("-c", "log.showRoot=true", "-c", "mailmap.file=")
# Git hooks set these; they would make git read another repository than the given one.
_OVERRIDES = (
    "GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_NAMESPACE",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_SHALLOW_FILE", "GIT_GRAFT_FILE", "GIT_PREFIX", 
)  # fmt: skip
_READ_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repository:
    """A repository at this moment."""

    path: str
    name: str
    """The last part of its path, without .git."""
    common_dir: Path
    """The git directory that all worktrees of the repository share."""
    head: str
    mailmap: str | None
    """Hash of the worktree's .mailmap."""
    boundary: frozenset[str]
    """Oldest commits of a shallow clone: their parents are missing, so they would seem to add every file."""


@dataclasses.dataclass(kw_only=True)
class Commit:
    """One commit of `git log`."""

    id: str
    time: str
    """Author date in seconds since 1970, as git prints it."""
    email: str
    name: str
    num_files: int = 0
    changes: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    """(status, path) of the first files, at most max_files + 1 of them."""


def find_repositories(paths: Sequence[str]) -> list[Repository]:
    """The repositories at these paths, in this order."""
    if not paths:
        raise DataError("no repository is given: give the path of one or more")
    found = [_find_repository(path) for path in paths]
    for number, repository in enumerate(found):
        for other in found[:number]:
            if other.common_dir == repository.common_dir:
                raise DataError(f"{other.path} and {repository.path} are the same repository: name it once")
            if other.name == repository.name:
                raise DataError(
                    f"{other.path} and {repository.path} are both named {repository.name!r}, and item ids start with "
                    "the name: give one of them through a symbolic link with another name"
                )
    return found


def count_commits(repository: Repository) -> int:
    """How many commits read_commits will find."""
    return int(_answer(repository.path, "rev-list", "--count", "--no-merges", repository.head))


def read_commits(repository: Repository, *, max_files: int) -> Iterator[Commit]:
    """HEAD and its ancestors, without merges. Memory holds only one block of git's output and one commit."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            _command(repository.path, *_LOG, repository.head, "--"),
            stdout=subprocess.PIPE, stderr=errors, env=_environment(),
        )  # fmt: skip
        try:
            assert process.stdout is not None
            yield from _parse(_tokens(process.stdout), max_files=max_files)
            if process.wait():
                errors.seek(0)
                raise DataError(f"{repository.path}: git log failed: {_fatal_line(errors.read())}")
        finally:
            process.kill()
            process.wait()


def _find_repository(path: str) -> Repository:
    if not Path(path).is_dir():
        raise DataError(f"{path}: no such directory; name a git repository")
    git_dir, common_dir, bare, inside_git_dir = _answer(
        path, "rev-parse", "--absolute-git-dir", "--git-common-dir", "--is-bare-repository", "--is-inside-git-dir"
    ).splitlines()
    within = inside_git_dir == "true" or bare == "true"
    top = Path(git_dir if within else _answer(path, "rev-parse", "--show-toplevel")).resolve()
    if top != Path(path).resolve():
        raise DataError(f"{path}: a directory inside the repository {top}, not a repository: name {top}")
    code, head, _ = _run(path, "rev-parse", "--verify", "--quiet", "HEAD^{commit}")
    if code:
        raise DataError(f"{path}: HEAD names no commit: the repository is empty, or its branch does not exist")
    shallow = Path(path) / _answer(path, "rev-parse", "--git-path", "shallow")
    mailmap = top / ".mailmap"
    return Repository(
        path=path,
        name=_name(path),
        common_dir=(Path(path) / common_dir).resolve(),
        head=head.strip(),
        mailmap=hashlib.sha256(mailmap.read_bytes()).hexdigest() if not within and mailmap.is_file() else None,
        boundary=frozenset(shallow.read_text().split()) if shallow.is_file() else frozenset(),
    )


def _name(path: str) -> str:
    whole = Path(os.path.abspath(path))
    return (whole.parent if whole.name == ".git" else whole).name.removesuffix(".git") or "repository"


def _tokens(stream: IO[bytes]) -> Iterator[bytes]:
    rest = b""
    while block := stream.read(_READ_BYTES):
        *whole, rest = (rest + block).split(b"\0")
        yield from whole
    if rest:
        yield rest


def _parse(tokens: Iterator[bytes], *, max_files: int) -> Iterator[Commit]:
    """Parse `\\x01HEADER NUL`, then `STATUS NUL PATH NUL` per file; line feeds and empty tokens separate commits."""
    commit: Commit | None = None
    for token in tokens:
        token = token.lstrip(b"\n")
        if token.startswith(_HEADER):
            if commit is not None:
                yield commit
            commit_id, time, email, name = token[1:].decode(errors="surrogateescape").split("\n", 3)
            commit = Commit(id=commit_id, time=time, email=email, name=name)
        elif token and (path := next(tokens, None)) is not None:
            assert commit is not None, "git log begins with a commit"
            commit.num_files += 1
            if commit.num_files <= max_files + 1:
                commit.changes.append((token[:1].decode(), _text(path)))
    if commit is not None:
        yield commit


def _text(path: bytes) -> str:
    """A path as text: bytes that are not UTF-8 become escapes like \\xff, so that different paths stay different."""
    return path.decode(errors="backslashreplace")


def _answer(path: str, *arguments: str) -> str:
    code, out, error = _run(path, *arguments)
    if code and "not a git repository" in error:
        raise DataError(f"{path}: not a git repository")
    if code:
        raise DataError(f"{path}: git {arguments[0]} failed: {error}")
    return out.strip("\n")


def _run(path: str, *arguments: str) -> tuple[int, str, str]:
    try:
        done = subprocess.run(_command(path, *arguments), capture_output=True, env=_environment(), check=False)
    except FileNotFoundError:
        raise DataError("git is not installed, or not on PATH: install it (apt install git)") from None
    return done.returncode, os.fsdecode(done.stdout), _fatal_line(done.stderr)


def _command(path: str, *arguments: str) -> list[str]:
    return ["git", "--no-pager", *_CONFIG, "-C", path, *arguments]


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _OVERRIDES}
    return kept | {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0"}


def _fatal_line(output: bytes) -> str:
    lines = output.decode(errors="backslashreplace").strip().splitlines() or ["git gave no reason"]
    return next((line for line in lines if line.startswith("fatal: ")), lines[-1]).removeprefix("fatal: ")
