"""Tiny repositories with fixed authors and dates, made with git itself."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import polars as pl
import pytest

from pipeline.events import DataError
from pipeline.sources.git import GitConfig, hash_author, import_git, item_features

ANN, BOB = ("Ann", "ann@example.org"), ("Bob", "bob@example.org")
FIRST_DAY = 1_600_000_000


class Repo:
    """A repository in the making; every commit is a day after the one before."""

    def __init__(self, path: Path, *, bare: bool = False) -> None:
        self.path, self.days = path, 0
        path.mkdir(parents=True)
        self.git("init", "--quiet", "--initial-branch=main", *(["--bare"] if bare else []))

    def git(self, *arguments: str, **environment: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(self.path), "-c", "protocol.file.allow=always", *arguments],
            env={**os.environ, **environment}, capture_output=True, check=True,
        )  # fmt: skip
        return os.fsdecode(done.stdout).strip()

    def commit(
        self,
        files: dict[str | bytes, str | None],
        *,
        author: tuple[str, str] = ANN,
        author_date: str | None = None,
    ) -> str:
        """Write the files (None = delete) and commit them; the author date is 1 s before the committer's."""
        for name, text in files.items():
            file = os.path.join(os.fsencode(self.path), os.fsencode(name))
            os.makedirs(os.path.dirname(file), exist_ok=True)
            if text is None:
                os.unlink(file)
            else:
                Path(os.fsdecode(file)).write_text(text)
        self.git("add", "--all")
        self.days += 1
        seconds = FIRST_DAY + 86_400 * self.days
        who = dict(zip(("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL"), author, strict=True))
        self.git(
            "commit", "--quiet", "--allow-empty", "--message", "x",
            **who, GIT_COMMITTER_NAME="C", GIT_COMMITTER_EMAIL="c@example.org",
            GIT_AUTHOR_DATE=author_date or f"@{seconds - 1} +0200", GIT_COMMITTER_DATE=f"@{seconds} +0000",
        )  # fmt: skip
        return self.git("rev-parse", "HEAD")


@pytest.fixture(autouse=True)
def plain_git(monkeypatch):
    """No configuration of the machine; the committer of a merge."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "M")
        monkeypatch.setenv(f"{name}_EMAIL", "m@example.org")


@pytest.fixture
def repo(tmp_path) -> Repo:
    return Repo(tmp_path / "project")


def events(out: Path) -> pl.DataFrame:
    return pl.read_parquet(out / "events-*.parquet")


def changes(out: Path) -> set[tuple[str, str, str]]:
    """{(commit, action, path)}"""
    return set(events(out).select("request_id", "action", "item_id").iter_rows())


def load(out: Path, *repositories: Repo | Path, **options: int):
    paths = [str(repo.path if isinstance(repo, Repo) else repo) for repo in repositories]
    return import_git(paths, str(out), config=GitConfig(**options))


def test_each_changed_file_is_an_event_of_its_author_at_the_author_date(repo, tmp_path):
    first = repo.commit({"README.md": "a", "src/a.py": "1\n2\n3\n"})
    second = repo.commit({"src/a.py": None, "src/b.py": "1\n2\n3\n", "README.md": "b"}, author=BOB)
    repo.git("config", "diff.renames", "copies")
    repo.git("config", "log.showRoot", "false")
    result = load(tmp_path / "log", repo)
    assert (result.events, result.items, result.rejected, result.left_out) == (5, 3, 0, {})
    assert changes(tmp_path / "log") == {
        (first, "A", "README.md"),
        (first, "A", "src/a.py"),
        (second, "M", "README.md"),
        (second, "D", "src/a.py"),
        (second, "A", "src/b.py"),
    }
    of_commit = {row["request_id"]: row for row in events(tmp_path / "log").iter_rows(named=True)}
    assert of_commit[first]["user_id"] == hash_author("ANN@example.org ", "somebody")
    assert of_commit[second]["user_id"] == hash_author("bob@example.org", "")
    assert [of_commit[commit]["timestamp"].timestamp() for commit in (first, second)] == [
        FIRST_DAY + 86_400 * day - 1 for day in (1, 2)
    ]
    assert of_commit[second]["commit_files"] == 3


def test_nothing_written_names_an_author(repo, tmp_path):
    repo.commit({"a": "a"})
    repo.commit({"a": "b"}, author_date="@4200000000 +0000")
    assert load(tmp_path / "log", repo).rejected == 1
    for file in (tmp_path / "log").iterdir():
        text = str(pl.read_parquet(file).to_dicts()) if file.suffix == ".parquet" else file.read_text()
        assert "ann" not in text.lower().replace("annot", "")


def test_merges_are_no_events_and_their_branches_are(repo, tmp_path):
    first = repo.commit({"a": "a"})
    repo.git("checkout", "--quiet", "-b", "side")
    side = repo.commit({"b": "b"}, author=BOB)
    repo.git("checkout", "--quiet", "main")
    main = repo.commit({"c": "c"})
    repo.git("merge", "--quiet", "--no-ff", "--message", "m", "side")
    load(tmp_path / "log", repo)
    assert changes(tmp_path / "log") == {(first, "A", "a"), (side, "A", "b"), (main, "A", "c")}


def test_mailmap_joins_the_addresses_of_one_person(repo, tmp_path):
    repo.commit({"a": "a"}, author=("Annie", "annie@old.example.org"))
    repo.commit({".mailmap": "Ann <ann@example.org> <annie@old.example.org>\n"})
    load(tmp_path / "log", repo)
    assert events(tmp_path / "log")["user_id"].unique().to_list() == [hash_author("ann@example.org", "Ann")]
    (repo.path / ".mailmap").write_text("")
    with pytest.raises(DataError, match=r"imported with repositories.project.mailmap"):
        load(tmp_path / "log", repo)


def test_commits_of_many_files_are_left_out_and_counted(repo, tmp_path):
    repo.commit({f"file{i}": "x" for i in range(5)})
    small = repo.commit({f"file{i}": "y" for i in range(4)})
    repo.commit({})
    result = load(tmp_path / "log", repo, max_commit_files=4)
    assert {commit for commit, _, _ in changes(tmp_path / "log")} == {small}
    assert result.left_out == {"commits of more than 4 files": 1}
    assert load(tmp_path / "log", repo, max_commit_files=4) == type(result)(**{**vars(result), "reused": True})


def test_odd_names_stay_different_items(repo, tmp_path):
    names = [
        b"plain",
        "gr\u00fc\u00dfe".encode(),
        b"not-utf8-\xff",
        b"not-utf8-\xfe",
        b"line\nfeed",
        b"\x01start",
        b" M",
    ]
    repo.commit(dict.fromkeys(names, "x"))
    assert load(tmp_path / "log", repo).items == len(names)
    found = set(events(tmp_path / "log")["item_id"])
    assert found == {"plain", "gr\u00fc\u00dfe", "not-utf8-\\xff", "not-utf8-\\xfe", "line\nfeed", "\x01start", " M"}


def test_items_carry_their_folders_and_extension(repo, tmp_path):
    repo.commit({"pkg/foo/foo.tar.GZ": "x", "Makefile": "x"})
    load(tmp_path / "log", repo)
    items = pl.read_parquet(tmp_path / "log/items.parquet").sort("item_id")
    assert items.rows() == [("Makefile", [], None), ("pkg/foo/foo.tar.GZ", ["pkg", "pkg/foo"], "gz")]
    assert item_features("a/.hidden") == (["a"], None)


def test_several_repositories_are_one_log_and_shared_commits_stand_once(repo, tmp_path):
    shared = repo.commit({"a": "a"})
    fork = Repo(tmp_path / "fork")
    fork.git("pull", "--quiet", str(repo.path), "main")
    own = fork.commit({"a": "b"}, author=BOB)
    other = Repo(tmp_path / "other")
    apart = other.commit({"a": "a"}, author=BOB)
    result = load(tmp_path / "log", repo, fork, other)
    assert changes(tmp_path / "log") == {(shared, "A", "project/a"), (own, "M", "fork/a"), (apart, "A", "other/a")}
    assert result.left_out == {"commits that an earlier repository holds too": 1}


def test_bare_repositories_and_worktrees_read_the_same(repo, tmp_path, monkeypatch):
    repo.commit({"a": "a"})
    repo.git("clone", "--quiet", "--bare", str(repo.path), str(tmp_path / "project.git"))
    repo.git("worktree", "add", "--quiet", "--detach", str(tmp_path / "tree"))
    load(tmp_path / "log", repo)
    # As inside a hook of another repository.
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    for place, path in enumerate((tmp_path / "project.git", tmp_path / "tree", repo.path / ".git")):
        load(tmp_path / f"log{place}", path)
        assert events(tmp_path / f"log{place}").equals(events(tmp_path / "log"))


def test_a_shallow_clone_says_what_it_lacks(repo, tmp_path):
    repo.commit({"a": "a", "b": "b"})
    repo.commit({"a": "b"})
    last = repo.commit({"b": "a"})
    shallow = tmp_path / "shallow"
    repo.git("clone", "--quiet", "--depth", "2", f"file://{repo.path}", str(shallow))
    result = load(tmp_path / "log", shallow)
    assert changes(tmp_path / "log") == {(last, "M", "b")}
    assert result.left_out == {"oldest commits of a shallow clone (git fetch --unshallow brings the rest)": 1}


def test_a_history_that_grew_is_refused_in_the_same_directory(repo, tmp_path):
    repo.commit({"a": "a"})
    load(tmp_path / "log", repo)
    assert load(tmp_path / "log", repo).reused
    repo.commit({"a": "b"})
    with pytest.raises(DataError, match=r"imported with repositories.project.head=.*; name a new directory"):
        load(tmp_path / "log", repo)


def test_what_is_no_repository_is_refused_in_one_line(repo, tmp_path, monkeypatch):
    def complaint(*paths: Path) -> str:
        with pytest.raises(DataError) as error:
            load(tmp_path / "log", *paths)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "log").exists()
        return str(error.value)

    assert "no repository is given" in complaint()
    assert complaint(tmp_path / "nowhere").endswith("nowhere: no such directory; name a git repository")
    assert complaint(tmp_path).endswith(f"{tmp_path}: not a git repository")
    assert "project: HEAD names no commit: the repository is empty" in complaint(repo.path)
    repo.commit({"src/a": "a"})
    assert f"inside the repository {repo.path}, not a repository" in complaint(repo.path / "src")
    assert "are the same repository: name it once" in complaint(repo.path, repo.path / ".git")
    twin = Repo(tmp_path / "elsewhere/project")
    twin.commit({"a": "a"})
    assert "are both named 'project'" in complaint(repo.path, twin.path)
    tree = repo.git("rev-parse", "HEAD^{tree}")
    (repo.path / f".git/objects/{tree[:2]}/{tree[2:]}").unlink()
    assert "project: git log failed: " in complaint(repo.path)
    monkeypatch.setenv("PATH", "")
    assert complaint(repo.path).startswith("git is not installed")
