"""How a command ends: one line and 2 for what the system refuses, one line and 75 for what may succeed later."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from ray.exceptions import OutOfMemoryError

from jobs import cli
from jobs.cluster.failures import Interrupted, WorkerFailure
from jobs.commands.arguments import Command, capture, plain
from jobs.commands.system import doctor_parser
from jobs.host.errors import UserError
from jobs.host.locks import RunInUse
from jobs.tracking import registry
from pipeline.events import DataError, NotNow
from tests.support.commands import SOLAR
from tests.support.serial import command_without_ray
from tests.support.tiny import prepare_tiny, write_tiny_log


@pytest.fixture
def ended_by(monkeypatch, capfd):
    """A function: (exit code, lines on stderr) of a command that raises this error, with its log in `workspace`."""

    def run(error: BaseException, *, workspace: Path | None = None) -> tuple[int, list[str]]:
        def fail(arguments, console, *, verbose):
            if workspace:
                capture(console, str(workspace), "fail", verbose=verbose)
            raise error

        command = Command(run=fail, parsers=plain(doctor_parser), usage="", does="fails")
        monkeypatch.setattr(cli, "COMMANDS", {"fail": command})
        code = cli.run(["fail"])
        return code, capfd.readouterr().err.splitlines()

    return run


IMPORTS = """
import contextlib, io, json, sys
from jobs import cli
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = cli.run(command.split())
        except SystemExit as ended:
            code = ended.code
    found = {"torch", "mlflow", "ray", "deepspeed", "torchrec", "pandas"} & set(sys.modules)
    assert code in (0, 2) and not found, (command, code, found)
print("none")
"""


def test_help_mistakes_and_inspection_import_no_engine(tmp_path):
    shards = prepare_tiny(write_tiny_log(tmp_path / "log"), tmp_path / "shards").path
    mistakes = ["run movielens-100k --model.rnk 8", "nightly ml-1m --model.rank 1000", "prepare --events", "inspect /"]
    helps = [f"{name} --help" for name in cli.COMMANDS]
    commands = ["run movielens-100k --print_config", f"inspect {shards}", *mistakes, *helps]
    ended = subprocess.run([sys.executable, "-c", IMPORTS, json.dumps(commands)], capture_output=True, text=True)
    assert ended.stdout == "none\n", ended.stderr


def test_a_full_disk_is_one_line_and_worth_another_try(ended_by):
    error = OSError(errno.ENOSPC, "No space left on device", "/w/runs/x")
    line = "solar: /w/runs/x: No space left on device: free some disk; what was committed is still there"
    assert ended_by(error) == (75, [line])


def test_what_another_command_was_faster_with_is_worth_another_try_and_a_mistake_is_not(ended_by):
    assert ended_by(NotNow("log: another import finished first")) == (75, ["solar: log: another import finished first"])
    assert ended_by(RunInUse("runs/x: process 7 is working there")) == (
        75,
        ["solar: runs/x: process 7 is working there"],
    )
    assert ended_by(DataError("log: no column 'user_id'")) == (2, ["solar: log: no column 'user_id'"])


def test_a_place_that_cannot_be_written_is_one_line_also_inside_of_another_error(ended_by):
    error = RuntimeError("outer")
    error.__cause__ = OSError(errno.EROFS, "x", "/media/cd/out")
    line = "solar: /media/cd/out: Read-only file system: name a place that can be written"
    assert ended_by(error) == (2, [line])


def test_a_task_without_memory_is_one_line_with_the_report_of_ray_in_the_log(ended_by, tmp_path):
    error = RuntimeError("of Ray Data")
    error.__cause__ = OutOfMemoryError("Task was killed\nmany\nlines")
    code, (line,) = ended_by(error, workspace=tmp_path)
    assert code == 1
    assert line.startswith(
        "solar: a worker failed: a task was ended by Ray because its machine's memory is full: end other"
    )
    assert "many\nlines" in next((tmp_path / "logs").iterdir()).read_text()


def test_a_locked_database_is_one_line_and_worth_another_try(ended_by):
    error = RuntimeError("(sqlite3.OperationalError) database is locked\n[SQL: ...]")
    code, lines = ended_by(error)
    assert (code, len(lines)) == (75, 1)
    assert "locked by another program" in lines[0]


@pytest.fixture
def kept_streams():
    """A log takes the place of file descriptors 1 and 2: they come back after the test."""
    kept = {number: os.dup(number) for number in (1, 2)}
    yield
    for number, copy in kept.items():
        os.dup2(copy, number)
        os.close(copy)


@pytest.mark.usefixtures("kept_streams")
def test_the_log_that_a_failed_worker_names_has_the_report_of_its_cause(ended_by, tmp_path):
    error = WorkerFailure("rank 0 of 1 died")
    error.__cause__ = RuntimeError("the long\nreport of Ray")
    code, lines = ended_by(error, workspace=tmp_path)
    [log] = (tmp_path / "logs").iterdir()
    assert (code, lines) == (1, [f"solar: a worker failed: rank 0 of 1 died (details: {log})"])
    assert "RuntimeError: the long\nreport of Ray" in log.read_text()


def test_no_log_is_named_where_there_is_none(ended_by):
    assert ended_by(WorkerFailure("rank 0 died")) == (1, ["solar: a worker failed: rank 0 died"])


@pytest.mark.usefixtures("kept_streams")
def test_an_empty_log_does_not_stay(ended_by, tmp_path):
    assert ended_by(UserError("x=1: set x=2"), workspace=tmp_path) == (2, ["solar: x=1: set x=2"])
    assert list((tmp_path / "logs").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (Interrupted("run", has_checkpoint=True), "the same command continues from the last checkpoint"),
        (Interrupted("run", has_checkpoint=False), "the training had no checkpoint yet: the same command begins it"),
        (Interrupted("evaluate"), "what was committed is still there"),
        (KeyboardInterrupt(), "what was committed is still there"),
    ],
)
def test_an_interruption_says_whether_there_is_a_checkpoint(ended_by, error, says):
    code, lines = ended_by(error)
    assert (code, len(lines)) == (130, 1)
    assert lines[0].startswith(f"solar: interrupted; {says}")


def test_a_defect_keeps_its_traceback(ended_by):
    code, lines = ended_by(FileNotFoundError(errno.ENOENT, "No such file or directory", "/w/x"))
    assert code == 1
    assert any(line.startswith("Traceback") for line in lines)


@pytest.mark.parametrize(
    "arguments",
    [
        ["import", "files", "LOG/events-00000.parquet", "--out", "FILE/log"],
        ["import", "synthetic", "--users", "3", "--events_per_user", "5", "--out", "FILE/below/log"],
        ["schedule", "RECIPE", "--cron", "0 3 * * *", "--emit", "cronjob", "--out", "FILE/manifests", "--image", "i:1",
         "--head", "http://h:8265"],
    ],
)  # fmt: skip
def test_out_below_a_file_is_one_line_and_leaves_nothing(arguments, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log, file = write_tiny_log(tmp_path / "log"), tmp_path / "file"
    file.write_text("mine")
    (tmp_path / "r.yaml").write_text("data: {name: shop, events: /logs, prepare: {daily: {folder: dt=%Y-%m-%d}}}\n")
    values = {"LOG": str(log), "FILE": str(file), "RECIPE": "r.yaml"}
    words = ["/".join(str(values.get(part, part)) for part in word.split("/")) for word in arguments]
    before = sorted(tmp_path.rglob("*"))
    code = cli.run([*words, "--workspace", "/w" if words[0] == "schedule" else str(tmp_path / "ws"), "-v"])
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("solar:")]
    assert (code, len(lines)) == (2, 1), lines
    assert str(file) in lines[0]
    assert file.read_text() == "mine"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["rollback", "shop"], "rollback: --why TEXT is missing: the reason, stored with the model"),
        (["promote", "shop", "--why", "x"], "promote: --version N is missing: number of the version"),
        (["history"], "history: MODEL is missing: the registered model's name, such as solar-shop"),
        (["prepare"], "prepare: --events EVENTS, --out OUT are missing"),
    ],
)
def test_a_missing_argument_is_named_as_it_is_written(capfd, arguments, says):
    code = cli.run(arguments)
    [line] = capfd.readouterr().err.splitlines()
    assert code == 2
    assert line.startswith(f"solar: {says}"), line


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
@pytest.mark.parametrize("arguments", [["import", "files", "LOG/events-00000.parquet"], ["prepare", "--events", "LOG"]])
@pytest.mark.parametrize("out", ["/proc/x", "/proc/x/below"])
def test_out_where_nothing_can_be_created_is_one_line(arguments, out, tmp_path, capfd, monkeypatch):
    command_without_ray(monkeypatch.setattr)
    log = str(write_tiny_log(tmp_path / "log"))
    words = [word.replace("LOG", log) for word in arguments]
    code = cli.run([*words, "--out", out, "--workspace", str(tmp_path / "ws")])
    lines = [line for line in capfd.readouterr().err.splitlines() if line]
    assert (code, len(lines)) == (2, 1), lines
    assert "/proc/" in lines[0]
    assert lines[0].endswith("name another place") or lines[0].endswith("change its permissions")


def test_a_registry_that_another_program_has_locked_is_said(tmp_path, capfd, monkeypatch):
    def locked(uri: str) -> None:
        raise MlflowException("(sqlite3.OperationalError) database is locked\n[SQL: SELECT 1]")

    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "mlflow.db").touch()
    monkeypatch.setattr(registry, "mlflow_client", locked)
    code = cli.run(["history", "shop", "--workspace", str(tmp_path)])
    lines = capfd.readouterr().err.splitlines()
    assert (code, len(lines)) == (75, 1), lines
    assert "locked by another program" in lines[0]


@pytest.mark.parametrize(
    ("command", "environment", "code", "told"),
    [
        ("inspect --help >&-", {}, 0, ""),
        ("inspect nowhere >&- <&-", {}, 2, "nowhere: neither"),
        ("inspect nowhere 2>&-", {}, 2, ""),
        (
            "inspect nowhere",
            {"LC_ALL": "C", "PYTHONUTF8": "0"},
            2,
            "names of files are ascii in this environment: set PY",
        ),
    ],
)
def test_closed_streams_and_other_names_of_files_end_no_command_in_a_traceback(command, environment, code, told):
    environment = {**os.environ, **environment}
    ended = subprocess.run(f"{SOLAR} {command}", shell=True, env=environment, capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    lines = ended.stderr.splitlines()
    assert len(lines) == bool(told), ended.stderr
    assert not told or told in lines[0]
