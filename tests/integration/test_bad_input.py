"""A user's mistake: one line on stderr that names the file or key, exit code 2, nothing written, nothing lost."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import polars as pl
import pytest

from jobs import cli
from tests.support.serial import command_without_ray
from tests.support.tiny import write_tiny_log


@pytest.fixture(autouse=True)
def serial(monkeypatch):
    """Tasks in this process; test_prepare.py has the errors of Ray's."""
    command_without_ray(monkeypatch.setattr)


@pytest.fixture
def log(tmp_path) -> Path:
    return write_tiny_log(tmp_path / "log")


@pytest.fixture
def refuses(capfd, tmp_path):
    def run(*arguments: str | Path) -> str:
        before = tree(tmp_path)
        # -v keeps the test's own streams; the messages are the same.
        code = cli.run([*map(str, arguments), "--workspace", str(tmp_path / "workspace"), "-v"])
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("solar: ")]
        assert code == 2
        assert len(lines) == 1, lines
        assert tree(tmp_path) == before
        return lines[0]

    return run


def tree(directory: Path) -> dict[str, bytes]:
    """Every file but the quarantine, which exists so that a refused log can be looked into."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and "rejected" not in path.parts]
    return {str(path): path.read_bytes() for path in files}


def import_files(path: Path, out: Path, *more: str) -> list[str]:
    return ["import", "files", str(path), "--out", str(out), *more]


def prepare(path: Path, out: Path, *more: str) -> list[str]:
    return ["prepare", "--events", str(path), "--out", str(out), *more]


@pytest.mark.parametrize("command", [import_files, prepare])
def test_missing_file_is_named(command, refuses, tmp_path):
    assert "nowhere.parquet" in refuses(*command(tmp_path / "nowhere.parquet", tmp_path / "out"))


@pytest.mark.parametrize("command", [import_files, prepare])
def test_wrong_column_is_named_with_those_that_exist(command, refuses, log, tmp_path):
    line = refuses(*command(log / "events-00000.parquet", tmp_path / "out", "--columns.user_id", "customer"))
    assert "customer" in line
    assert "user_id" in line


@pytest.mark.parametrize("command", [import_files, prepare])
def test_empty_log_is_named(command, refuses, log, tmp_path):
    empty = tmp_path / "empty.parquet"
    pl.read_parquet(log / "events-00000.parquet").clear().write_parquet(empty)
    assert "empty.parquet" in refuses(*command(empty, tmp_path / "out"))


@pytest.mark.parametrize("command", [import_files, prepare])
def test_log_of_invalid_rows_counts_them_by_reason(command, refuses, log, tmp_path):
    invalid = tmp_path / "invalid.parquet"
    events = pl.read_parquet(log / "events-00000.parquet").with_columns(pl.lit(None, pl.Int64).alias("user_id"))
    events.write_parquet(invalid)
    line = refuses(*command(invalid, tmp_path / "out"))
    assert str(events.height) in line.replace(",", "")
    assert "user" in line


def test_users_table_that_cannot_be_used_is_named_without_its_users(refuses, log, tmp_path):
    table, out = tmp_path / "people.parquet", tmp_path / "out"
    events = log / "events-00000.parquet"
    pl.DataFrame({"user_id": [31, 32, 31], "age": [1, 2, 3]}).write_parquet(table)
    line = refuses(*prepare(events, out, "--users_path", str(table)))
    assert line.endswith("people.parquet: 1 user ids are in more than one row; keep one row per user")
    pl.DataFrame({"user_id": ["someone"], "age": [1]}).write_parquet(table)
    line = refuses(*prepare(events, out, "--users_path", str(table)))
    assert line.endswith("none of its user ids is in the log; check that both name users the same way")
    pl.DataFrame({"user_id": [1], "age": [1.5]}).write_parquet(table)
    for command in (import_files, prepare):
        features = ["--users.features", "[age]"] if command is import_files else []
        line = refuses(*command(events, out, "--users_path", str(table), *features))
        assert line.endswith("feature 'age' is Float64; features are categories: cast it to strings")
    line = refuses(*import_files(events, out, "--users_path", str(table), "--users.features", "[height]"))
    assert "no column 'height'" in line


@pytest.mark.parametrize("command", [import_files, prepare])
def test_parquet_file_cut_in_half_is_named(command, refuses, log, tmp_path):
    cut = tmp_path / "cut.parquet"
    raw = (log / "events-00000.parquet").read_bytes()
    cut.write_bytes(raw[: len(raw) // 2])
    assert "cut.parquet" in refuses(*command(cut, tmp_path / "out"))


def test_event_log_directory_of_another_source_is_refused(refuses, log, tmp_path, capfd):
    workspace = ["--workspace", str(tmp_path / "workspace")]
    assert cli.run([*import_files(log / "events-00000.parquet", tmp_path / "out"), *workspace, "-v"]) == 0
    capfd.readouterr()
    other = write_tiny_log(tmp_path / "other", seed=5)
    assert str(tmp_path / "out") in refuses(*import_files(other / "events-00000.parquet", tmp_path / "out"))


def test_shards_of_another_configuration_are_refused(refuses, log, tmp_path, capfd):
    workspace = ["--workspace", str(tmp_path / "workspace")]
    assert cli.run([*prepare(log, tmp_path / "out", "--buckets", "2"), *workspace, "-v"]) == 0
    capfd.readouterr()
    line = refuses(*prepare(log, tmp_path / "out", "--buckets", "3"))
    assert "buckets" in line
    assert "2" in line
    assert "3" in line


def test_import_without_a_source_names_the_sources(refuses):
    assert "movielens-100k, files, git, synthetic" in refuses("import", "netflix")


def test_repositories_that_hold_no_history_are_named(refuses, tmp_path):
    out = ("--out", tmp_path / "out")
    assert f"{tmp_path}: not a git repository" in refuses("import", "git", tmp_path, *out)
    subprocess.run(["git", "init", "--quiet", tmp_path / "empty"], check=True)
    assert "empty: HEAD names no commit" in refuses("import", "git", tmp_path / "empty", *out)
    assert "empty: HEAD names no commit" in refuses("run", "git", "--source.path", tmp_path / "empty")
    assert "--source.path DIRECTORY" in refuses("run", "git")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["import", "git", ".", "--out", "x", "--max_commit_files", "0"], "max_commit_files=0: must be 1 or more"),
        (["import", "git", "."], "--out DIR is not given"),
        (["import", "synthetic", "--topics", "0"], "import synthetic: topics=0: must be 1 or more"),
        (["import", "files", "x.csv", "--out", "x", "--max_rejected_ratio", "2"], "max_rejected_ratio is 2.0"),
        (["prepare", "--events", "x", "--out", "x", "--buckets", "0"], "buckets is 0"),
        (["run", "synthetic", "--source.path", "x"], "source.path=x: must be unset"),
        (["run", "ml-1m", "--source.path", "[x, y]"], "must be one path"),
        (["run", "synthetic", "--source.synthetic.drift", "2"], "source.synthetic.drift=2.0: must be from 0 to 1"),
    ],
)
def test_options_out_of_range_are_named(refuses, arguments, words):
    assert words in refuses(*arguments)


def test_inspect_of_something_else_is_refused(capfd, tmp_path):
    assert cli.run(["inspect", str(tmp_path), "-v"]) == 2
    assert f"{tmp_path}: neither sequence shards nor a checkpoint" in capfd.readouterr().err


def test_unknown_command_names_the_commands(capfd):
    assert cli.run(["trian"]) == 2
    assert "unknown command 'trian': one of run, leaderboard, doctor" in capfd.readouterr().err


def test_training_without_shards_says_what_to_run_first(refuses):
    assert "run `solar prepare` or `solar run` first" in refuses("train", "ml-1m")


def test_run_without_events_says_how_to_bring_them_in(refuses):
    assert "--source.path FILE" in refuses("run", "ml-1m")


def test_time_features_without_time_stamps_are_refused_by_name(refuses, tmp_path, capfd):
    ordered = tmp_path / "ordered.parquet"
    frame = pl.DataFrame({"user_id": [1, 1, 1, 1, 2], "item_id": [1, 2, 3, 4, 1], "order": [1, 2, 3, 4, 1]})
    frame.write_parquet(ordered)
    shards = tmp_path / "shards"
    workspace = ["--workspace", str(tmp_path / "workspace")]
    columns = ["--columns.order", "order", "--columns.timestamp", "null"]
    assert cli.run([*prepare(ordered, shards, *columns), *workspace, "-v"]) == 0
    capfd.readouterr()
    line = refuses("train", "ml-1m", "--data.shards", str(shards), "--model.time_features", "true")
    assert "model.time_features" in line
    assert "has only an order, no time stamps" in line


def test_disk_too_small_for_the_checkpoints_is_refused_before_a_worker_starts(
    refuses, log, tmp_path, capfd, monkeypatch
):
    shards = tmp_path / "shards"
    assert cli.run([*prepare(log, shards), "--workspace", str(tmp_path / "workspace"), "-v"]) == 0
    capfd.readouterr()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("jobs.runs.train.shutil.disk_usage", lambda path: usage._replace(free=1 << 20))
    line = refuses("train", "ml-1m", "--data.shards", str(shards), "--model.time_features", "false")
    assert f"{tmp_path}/workspace/runs/ml-1m: 1 MiB free, its checkpoints need" in line
    assert "lower checkpoint.keep" in line
