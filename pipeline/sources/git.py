"""Histories of git repositories -> event log: who changed which file when. git_log.py runs git itself.

One event per non-merge commit and changed file:

    user_id       hash of the author's e-mail address (of the name where the address is empty) after .mailmap
    item_id       the file's path; REPOSITORY/path where the log comes from several repositories
    timestamp     the author date, in whole seconds
    action        A added, M modified, D deleted, T type changed; a rename is D of the old path and A of the new one
    request_id    the commit: its files were changed together
    commit_files  how many files the commit changed

The author date is the time at which the author acted. The committer date is the time at which somebody applied the
commit: after a patch series or a rebase, dozens of commits, often by many authors, have the same second. Commits of
one author in the same second count as simultaneous: their position in the history is not a column, because it shifts
as the history grows, and an event must remain the same event when a later import is merged. Renames are not detected:
git's detection is a guess that depends on limits, so ids would differ between machines.

Names and addresses are never written. The hash has no secret key: it hides the authors from a reader, but not from
someone who has a list of addresses to try.

Items have `folder`, the chain of folders above the file ([docs, docs/api] for docs/api/index.md), and `extension`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

import polars as pl

from pipeline.events import Reason
from pipeline.sources.event_log import EventLogWriter, Imported, find_event_log, write_event_log
from pipeline.sources.git_log import Commit, Repository, count_commits, find_repositories, read_commits
from pipeline.times import LATEST_TIME

_BLOCK_EVENTS = 100_000
_PROGRESS_COMMITS = 1_000
_EVENTS = {
    "user_id": pl.Int64,
    "item_id": pl.String,
    "timestamp": pl.Int64,
    "action": pl.String,
    "request_id": pl.String,
    "commit_files": pl.Int32,
}
_ITEMS = {"item_id": pl.String, "folder": pl.List(pl.String), "extension": pl.String}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GitConfig:
    """Which commits count."""

    max_commit_files: int = 100
    """A commit of more files (a release, a reformatting) says little about each file: it is left out and counted."""

    def __post_init__(self) -> None:
        if self.max_commit_files < 1:
            raise ValueError(f"max_commit_files={self.max_commit_files}: must be 1 or more")


def import_git(
    paths: Sequence[str],
    out: str,
    *,
    config: GitConfig = GitConfig(),
    progress: Callable[[str, int, int], None] | None = None,
) -> Imported:
    """Write the event log `out` from the histories of these repositories, each a worktree or bare.

    A commit that is in several repositories (forks) counts only for the first of them. DataError, with nothing
    written: a path is not a repository, a repository has no commits or is given twice, two repositories have the same
    name, git is missing or fails, or no event is left.
    """
    repositories = find_repositories(paths)
    source = {
        "source": "git",
        "names": [r.name for r in repositories],
        "repositories": {r.name: {"head": r.head, "mailmap": r.mailmap} for r in repositories},
        "max_commit_files": config.max_commit_files,
    }
    if existing := find_event_log(out, source=source):
        return existing
    report = progress or (lambda stage, done, total: None)

    def fill(writer: EventLogWriter) -> None:
        total = sum(count_commits(r) for r in repositories)
        history = _History(writer, several=len(repositories) > 1)
        done = 0
        for repository in repositories:
            for commit in read_commits(repository, max_files=config.max_commit_files):
                if done % _PROGRESS_COMMITS == 0:
                    report("import", done, total)
                done += 1
                history.add(repository, commit, max_files=config.max_commit_files)
        history.close()
        report("import", total, total)

    return write_event_log(out, source=source, fill=fill)


def hash_author(email: str, name: str) -> int | None:
    """63-bit hash of the author's address in lower case, or of the name if the address is empty; None without both."""
    identity = email.strip().lower() or name.strip()
    if not identity:
        return None
    digest = hashlib.blake2b(identity.encode(errors="surrogateescape"), digest_size=8, person=b"solar-git").digest()
    return int.from_bytes(digest, "big") >> 1


class _History:
    """Turns commits into events; remembers items and, across repositories, commits, so that each is written once."""

    def __init__(self, writer: EventLogWriter, *, several: bool) -> None:
        self.writer, self.several = writer, several
        self.seen_commits: set[bytes] = set()
        self.items: dict[str, None] = {}
        self.dropped = Counter[str]()
        self.events: list[tuple] = []

    def add(self, repository: Repository, commit: Commit, *, max_files: int) -> None:
        if self.several:
            commit_id = bytes.fromhex(commit.id)
            if commit_id in self.seen_commits:
                self.dropped["commits that an earlier repository holds too"] += 1
                return
            self.seen_commits.add(commit_id)
        if commit.id in repository.boundary:
            self.dropped["oldest commits of a shallow clone (git fetch --unshallow brings the rest)"] += 1
            return
        if commit.num_files > max_files:
            self.dropped[f"commits of more than {max_files} files"] += 1
            return
        prefix = f"{repository.name}/" if self.several else ""
        changes = [(status, prefix + path) for status, path in commit.changes]
        user, time = hash_author(commit.email, commit.name), _milliseconds(commit.time)
        if user is None or time is None:
            self._reject(repository, commit, changes, Reason.MISSING_USER if user is None else Reason.INVALID_TIME)
            return
        for status, path in changes:
            self.items[path] = None
            self.events.append((user, path, time, status, commit.id, commit.num_files))
        if len(self.events) >= _BLOCK_EVENTS:
            self._write()

    def close(self) -> None:
        self._write()
        paths = list(self.items)
        for start in range(0, len(paths), _BLOCK_EVENTS):
            rows = [(path, *item_features(path)) for path in paths[start : start + _BLOCK_EVENTS]]
            self.writer.add_items(pl.DataFrame(rows, schema=_ITEMS, orient="row"))
        self.writer.leave_out(self.dropped)

    def _write(self) -> None:
        self.writer.add_events(pl.DataFrame(self.events, schema=_EVENTS, orient="row"))
        self.events = []

    def _reject(self, repository: Repository, commit: Commit, changes: list[tuple[str, str]], reason: Reason) -> None:
        rows = [
            (reason.value, json.dumps({"commit": commit.id, "time": commit.time, "path": path}), repository.name)
            for _, path in changes
        ]
        schema = {"reason": pl.String, "record": pl.String, "file": pl.String}
        self.writer.add_rejected(pl.DataFrame(rows, schema=schema, orient="row"))


def item_features(path: str) -> tuple[list[str], str | None]:
    """The chain of folders above a file, and the file's extension in lower case, if it has one.

    >>> item_features("docs/api/Index.MD")
    (['docs', 'docs/api'], 'md')
    """
    pure = PurePosixPath(path)
    folders = [str(parent) for parent in pure.parents if parent.name]
    return folders[::-1], pure.suffix[1:].lower() or None


def _milliseconds(seconds: str) -> int | None:
    value = int(seconds) * 1_000 if seconds.isascii() and seconds.isdigit() else -1
    return value if 0 <= value < LATEST_TIME else None
