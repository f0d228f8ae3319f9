"""What a job is made of, and what a user is told: everything about submission that needs no cluster."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError

from jobs import cli
from jobs.cli import COMMANDS
from jobs.cluster import job_client
from jobs.cluster.job_client import Pending, auth_headers, choose_address, explained
from jobs.cluster.job_text import exit_code, outcome, shown_command, shown_tags
from jobs.cluster.submission import JobCommand, check_size, job_command, stage
from jobs.config.run_config import SOURCES
from jobs.host.console import Console
from jobs.host.errors import UserError
from jobs.host.places import Kind, Place, StatesPlace, Subject, YamlFile, kind_of, place_keys
from jobs.recipes import RECIPES


@functools.cache
def parsers_of(name: str, *chosen: str) -> Sequence[argparse.ArgumentParser]:
    """Made once: those of recipes have hundreds of settings."""
    return COMMANDS[name].parsers(chosen)


def made_of(arguments: Sequence[str], directory: Path, *, workspace: str | None, same_machine: bool) -> JobCommand:
    known = COMMANDS[arguments[0]]
    return job_command(
        arguments,
        parsers=parsers_of(arguments[0], *arguments[1 : 1 + known.chosen_by]),
        chosen_by=known.chosen_by,
        directory=directory,
        workspace=workspace,
        same_machine=same_machine,
    )


def command(directory: Path, *arguments: str, workspace: str | None = None, same_machine: bool = True) -> list[str]:
    return list(made_of(arguments, directory, workspace=workspace, same_machine=same_machine).arguments)


def details(**fields: Any) -> JobDetails:
    return JobDetails(**{"type": "SUBMISSION", "status": "FAILED", "entrypoint": "x", "submission_id": "a", **fields})


def test_relative_paths_become_absolute_where_the_cluster_is_this_machine(tmp_path):
    made = command(tmp_path, "prepare", "--events", "raw/*.csv", "--out=shards", "--buckets", "3")
    assert made == [
        *("prepare", "--events", f"{tmp_path}/raw/*.csv", f"--out={tmp_path}/shards", "--buckets", "3"),
        *("--workspace", f"{tmp_path}/workspace"),
    ]
    made = command(tmp_path, "import", "files", "--out", "s3://bucket/log", "../clicks.csv", workspace="w")
    assert made[2:] == ["--out", "s3://bucket/log", f"{tmp_path.parent}/clicks.csv", "--workspace", f"{tmp_path}/w"]
    assert command(tmp_path, "inspect", "--verify", "shards") == ["inspect", "--verify", f"{tmp_path}/shards"]


def test_every_repository_of_a_list_and_a_checkpoint_become_absolute(tmp_path):
    (tmp_path / "runs" / "step-00000004").mkdir(parents=True)
    made = command(tmp_path, "run", "git", "--source.path", "[one, /mnt/two]", "--workspace", "/w")
    assert made[3] == f"[{tmp_path}/one, /mnt/two]"
    assert command(tmp_path, "import", "git", "one", "two", "--workspace", "/w")[2:4] == [
        f"{tmp_path}/one",
        f"{tmp_path}/two",
    ]
    assert command(tmp_path, "evaluate", "runs/step-00000004")[1] == f"{tmp_path}/runs/step-00000004"
    assert command(tmp_path, "evaluate", "ml-1m", "--workspace", "/w")[1] == "ml-1m"
    assert command(tmp_path, "evaluate", "models:/a@champion", "--workspace", "/w")[1] == "models:/a@champion"
    (tmp_path / "git.yaml").write_text("source: {name: git, path: [one]}")
    assert command(tmp_path, "run", "git.yaml", "--workspace", "/w")[-2:] == ["--source.path", f"[{tmp_path}/one]"]


def test_values_that_are_no_paths_stay(tmp_path):
    (tmp_path / "ml-1m").mkdir()
    made = command(tmp_path, "train", "ml-1m", "--name", "workspace", "--source.path", "null", "--resume")
    assert made[:-2] == ["train", "ml-1m", "--name", "workspace", "--source.path", "null", "--resume"]


def test_sqlite_store_becomes_absolute(tmp_path):
    made = command(tmp_path, "train", "ml-1m", "--tracking.uri", "sqlite:///mlflow.db")
    assert made[3] == f"sqlite:///{tmp_path}/mlflow.db"
    assert command(tmp_path, "train", "ml-1m", "--tracking.uri", "sqlite:////m.db")[3] == "sqlite:////m.db"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["prepare", "--events", "raw", "--out", "/out"], "--events raw"),
        (["inspect", "shards"], "inspect shards"),
        (["train", "ml-1m", "--workspace", "w"], "--workspace w"),
        (["train", "ml-1m"], "--workspace DIR is not given"),
    ],
)
def test_relative_paths_are_refused_for_a_cluster_elsewhere(tmp_path, arguments, named):
    with pytest.raises(UserError, match=named):
        command(tmp_path, *arguments, same_machine=False)


def test_paths_inside_yaml_files_become_overrides(tmp_path):
    (tmp_path / "a.yaml").write_text("workspace: ws\nsource: {path: raw.csv}\ndata: {shards: /mnt/shards}")
    (tmp_path / "b.yaml").write_text("source: {path: other.csv}")
    made = command(tmp_path, "run", "a.yaml", "--config=b.yaml")
    assert made[3:] == ["--workspace", f"{tmp_path}/ws", "--source.path", f"{tmp_path}/other.csv"]
    made = command(tmp_path, "run", "a.yaml", "--source.path", "/x.csv", workspace="/w", same_machine=False)
    assert made[2:] == ["--source.path", "/x.csv", "--workspace", "/w"]
    with pytest.raises(UserError, match=r"source.path \(in YAML\) raw.csv"):
        command(tmp_path, "run", "a.yaml", workspace="/w", same_machine=False)


def test_yaml_files_from_anywhere_are_uploaded(tmp_path):
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    for path in (here / "sub" / "mine.yaml", tmp_path / "far.yml"):
        path.write_text("seed: 2")
    made = made_of(
        ["train", "sub/mine.yaml", "--config", str(tmp_path / "far.yml")], here, workspace="/w", same_machine=False
    )
    assert made.arguments == ("train", "sub/mine.yaml", "--config", "uploaded/1/far.yml", "--workspace", "/w")
    stage(tmp_path / "upload", made.files)
    assert (tmp_path / "upload" / "uploaded" / "1" / "far.yml").read_text() == "seed: 2"
    with pytest.raises(UserError, match=r"nothere\.yaml: no such file"):
        command(here, "train", "nothere.yaml")


@pytest.mark.parametrize(
    ("arguments", "workspace", "named"),
    [
        (["train", "ml-1m", "--tracking.uri", "https://user:secret@host"], None, "a password must not be"),
        (["train", "ml-1m", "--notify.url", "https://hooks/secret"], None, "--notify.url: .* SOLAR_NOTIFY_URL"),
        (["train", "ml-1m", "--workspace", "/a"], "/b", "the command has a --workspace, too"),
        (["doctor"], "/b", "`solar doctor` has no workspace"),
        (["gc", "shards", "--keep", "1"], "/b", "`solar gc` has no workspace"),
    ],
)
def test_mistakes_are_told_before_anything_is_uploaded(tmp_path, arguments, workspace, named):
    with pytest.raises(UserError, match=named) as raised:
        command(tmp_path, *arguments, workspace=workspace)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "no command given"),
        (["--", "submit", "--", "train"], "'submit' cannot be a job"),
        (["--", "no"], "'no' cannot"),
    ],
)
def test_what_cannot_be_a_job_is_told_before_a_cluster_is_looked_for(arguments, named, capsys):
    assert cli.run(["submit", "--address", "http://nowhere:1", *arguments]) == 2
    assert named in capsys.readouterr().err


def places_of(name: str) -> list[tuple[Sequence[str], argparse.Action, Kind]]:
    """(how its parser is chosen, the argument, what kind of place it is) of all a command's arguments that are one."""
    chosen = [[source] for source in SOURCES] if name == "import" else [[]]
    return [
        (first, action, kind)
        for first in chosen
        for parser in parsers_of(name, *first)
        for action in parser._actions
        if (kind := kind_of(action))
    ]


JOBS = [name for name, each in COMMANDS.items() if each.is_job]


@pytest.mark.parametrize("name", JOBS)
def test_every_place_of_every_command_becomes_absolute_and_is_read_by_its_parser(name, tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 2")
    (tmp_path / "dir").mkdir()
    values = {Place: "dir", StatesPlace: "dir", Subject: "dir", YamlFile: "mine.yaml"}
    resolved = {**dict.fromkeys(values, f"{tmp_path}/dir"), YamlFile: "mine.yaml"}
    for chosen, action, kind in places_of(name):
        option = next(iter(action.option_strings), None)
        for given in ([option, values[kind]], [f"{option}={values[kind]}"]) if option else ([values[kind]],):
            made = command(tmp_path, name, *chosen, *given)
            expected = resolved[kind] if len(given) == 2 or option is None else f"{option}={resolved[kind]}"
            assert expected in made, (action.dest, made)
            assert values[kind] not in made or kind is YamlFile


def test_commands_have_places_at_all():
    without = [name for name in JOBS if not places_of(name)]
    assert without == ["doctor"]


def test_flags_take_no_value_and_several_values_are_all_places(tmp_path):
    made = command(tmp_path, "forget", "--verify", "shards", "--outputs", "a", "b", "--users", "left.txt")
    assert made[1:8] == [
        *("--verify", f"{tmp_path}/shards", "--outputs", f"{tmp_path}/a", f"{tmp_path}/b"),
        *("--users", f"{tmp_path}/left.txt"),
    ]
    made = command(tmp_path, "train", "ml-1m", "--from-previous", "--training.warm_start", "runs/monday", "--resume")
    assert made[2:6] == ["--from-previous", "--training.warm_start", f"{tmp_path}/runs/monday", "--resume"]
    made = command(tmp_path, "score", "models:/a/1", "--states", "auto", "--shards", "s", "--build-states", "-v")
    assert made[1:8] == ["models:/a/1", "--states", "auto", "--shards", f"{tmp_path}/s", "--build-states", "-v"]


def test_a_workspace_is_given_to_commands_that_have_one(tmp_path):
    assert command(tmp_path, "gc", "shards", "--keep", "1") == ["gc", f"{tmp_path}/shards", "--keep", "1"]
    assert command(tmp_path, "grow", "c", "--shards", "s", "--out", "o")[-1] == f"{tmp_path}/o"
    assert command(tmp_path, "compact", "shards")[-2:] == ["--workspace", f"{tmp_path}/workspace"]


def test_recipes_of_the_package_name_no_paths():
    keys = place_keys(COMMANDS["train"].parsers([]))
    assert {"workspace", "data.events", "source.path", "tracking.uri", "training.warm_start"} <= set(keys)
    for recipe in RECIPES.glob("*.yaml"):
        values = yaml.safe_load(recipe.read_text())
        for key in keys:
            section, _, field = key.rpartition(".")
            assert field not in (values.get(section, {}) if section else values), f"{recipe.name}: {key}"


def test_upload_holds_the_code_and_nothing_else(tmp_path):
    stage(tmp_path, {})
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {"pyproject.toml", "jobs/cli.py", "jobs/recipes/ml-1m.yaml", "models/solar.py", "pipeline/build.py"} <= names
    assert "jobs/nightly/report.html" in names
    assert {Path(name).suffix for name in names} == {".py", ".yaml", ".toml", ".html"}


def test_upload_above_the_limit_names_the_largest_files(tmp_path):
    for name, size in (("small.py", 10), ("large.yaml", 3 << 20), ("middle.yaml", 1 << 20)):
        (tmp_path / name).write_bytes(b" " * size)
    with pytest.raises(UserError, match=r"4\.0 MiB, Ray accepts 2; the largest: large.yaml \(3\.0 MiB\), middle.yaml"):
        check_size(tmp_path, limit=2 << 20)
    check_size(tmp_path, limit=5 << 20)


def test_address_is_the_option_then_the_environment_then_this_machine():
    both = {"RAY_API_SERVER_ADDRESS": "https://api:1", "RAY_ADDRESS": "http://ray:2"}
    assert choose_address("http://given:3/", both) == "http://given:3"
    assert choose_address(None, both) == "https://api:1"
    assert choose_address(None, {"RAY_ADDRESS": "http://ray:2"}) == "http://ray:2"
    assert choose_address(None, {"RAY_ADDRESS": "auto"}) == choose_address(None, {}) == "http://127.0.0.1:8265"


@pytest.mark.parametrize("address", ["head:6379", "ray://head:10001", "head"])
def test_address_of_another_port_is_answered_with_the_dashboard(address):
    with pytest.raises(UserError, match=f"^RAY_ADDRESS={address}: .* --address http://head:8265$"):
        choose_address(None, {"RAY_ADDRESS": address})


def test_token_is_found_where_ray_looks_for_it(tmp_path):
    assert auth_headers({}, tmp_path) == {}
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("home\n")
    (tmp_path / "file").write_text("file")
    assert auth_headers({}, tmp_path) == {"Authorization": "Bearer home"}
    named = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "file")}
    assert auth_headers(named, tmp_path) == {"Authorization": "Bearer file"}
    assert auth_headers({**named, "RAY_AUTH_TOKEN": "direct"}, tmp_path) == {"Authorization": "Bearer direct"}
    with pytest.raises(UserError, match="nothere: no such file"):
        auth_headers({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "nothere")}, tmp_path)


@pytest.mark.parametrize(
    ("error", "has_token", "kind", "text"),
    [
        (AuthenticationError("401"), False, UserError, "requires a token, and there is none here"),
        (AuthenticationError("403"), True, UserError, "refuses this token"),
        (requests.ConnectTimeout("slow"), False, ConnectionError, "does not answer"),
        (ConnectionError("Failed to connect"), False, ConnectionError, "does not answer"),
        (requests.exceptions.JSONDecodeError("no", "", 0), False, UserError, "is not a Ray dashboard"),
        (RuntimeError("Version check returned 404. x"), False, UserError, "is not a Ray dashboard"),
        (
            RuntimeError("Request failed with status code 404: x"),
            False,
            UserError,
            "job j: http://h has no job with this id",
        ),
        (RuntimeError("Request failed with status code 500: a\nhttp://u:pw@x"), False, ConnectionError, r"u:\*\*\*@x$"),
    ],
)
def test_errors_of_the_client_are_one_line(error, has_token, kind, text):
    told = explained(error, address="http://h", has_token=has_token, default=False, named="job j")
    assert isinstance(told, kind)
    with pytest.raises(kind, match=text):
        raise told
    assert "\n" not in str(told)


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, 0, "succeeded"),
        ({"driver_exit_code": 2}, 2, "exit code 2"),
        ({"driver_exit_code": 130}, 130, "exit code 130"),
        ({"driver_exit_code": 127}, 127, "--python"),
        ({"driver_exit_code": -9}, 137, "killed by signal 9"),
        ({"message": "runtime env\nfailed"}, 1, "runtime env failed"),
        ({"status": "STOPPED"}, 130, "was stopped"),
    ],
)
def test_exit_code_is_the_job_s_own(fields, code, text):
    job = details(start_time=1_000, end_time=3_662_000, **fields)
    assert exit_code(job) == code
    assert text in outcome(job)
    assert "1:01:01" in outcome(job)


def test_commands_of_jobs_are_shown_without_passwords():
    assert shown_command(details(metadata={"solar_command": "solar doctor"})) == "solar doctor"
    assert shown_command(details(entrypoint="run --uri https://u:secret@h")) == "run --uri https://u:***@h"


class Played:
    """A cluster whose jobs end as they are told to: exit codes, or errors that come instead."""

    shown = "http://h"

    def __init__(self, *ends: int | Exception) -> None:
        self.ends = list(ends)
        self.submitted: list[dict[str, Any]] = []

    def __call__(self, _address: str | None) -> Played:
        if isinstance(self.ends[0], ConnectionError):
            raise self.ends.pop(0)  # type: ignore[misc]
        return self

    def on_this_machine(self) -> bool:
        return True

    def submit(self, **options: Any) -> str:
        self.submitted.append(options)
        return options["submission_id"] or f"job-{len(self.submitted)}"

    def follow(self, job_id: str, _console: Console) -> JobDetails:
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        status = {0: "SUCCEEDED", 130: "STOPPED"}.get(end, "FAILED")
        return details(status=status, driver_exit_code=end, submission_id=job_id, start_time=1, end_time=2)


def submitted(monkeypatch, played: Played, *options: str) -> tuple[int, list[float]]:
    """(exit code, how long was waited before each further try)."""
    waits: list[float] = []
    monkeypatch.setattr(job_client, "Cluster", played)
    monkeypatch.setattr("jobs.commands.cluster.time.sleep", waits.append)
    return cli.run(["submit", *options, "--", "doctor"]), waits


@pytest.mark.parametrize(
    ("ends", "code", "waits", "jobs"),
    [
        ([0], 0, [], 1),
        ([75, 1, 137, 0], 0, [60, 120, 240], 4),
        ([1, 1, 1, 1, 0], 1, [60, 120, 240], 4),
        ([75, 2, 0], 2, [60], 2),
        ([130, 0], 130, [], 1),
        ([ConnectionError("away"), 0], 0, [60], 1),
        ([job_client.ConnectionLost("gone"), 0], 1, [], 1),
    ],
)
def test_failed_job_is_followed_by_a_new_one(monkeypatch, ends, code, waits, jobs):
    played = Played(*ends)
    assert submitted(monkeypatch, played, "--retries", "3", "--retry-minutes", "1") == (code, waits)
    assert len(played.submitted) == jobs


def test_without_retries_a_failure_is_the_end(monkeypatch, capsys):
    assert submitted(monkeypatch, Played(75, 0)) == (75, [])
    assert submitted(monkeypatch, Played(ConnectionError("away"), 0)) == (2, [])
    assert capsys.readouterr().err.splitlines()[-1] == "solar: away"


def test_further_tries_have_ids_of_their_own_and_are_told(monkeypatch, capsys):
    played = Played(75, 0)
    submitted(
        monkeypatch, played, "--retries", "1", "--submission-id", "night", "--tag", "team=shop", "--tag", "day=sun"
    )
    assert [each["submission_id"] for each in played.submitted] == ["night", "night-2"]
    assert played.submitted[1]["tags"] == {"team": "shop", "day": "sun"}
    assert "solar: try 1 of 2 failed (exit code 75); a new job in 300 s" in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--retries", "-1"], "--retries -1: must be from 0 to 100"),
        (["--retries", "1", "--retry-minutes", "0"], "--retry-minutes 0: must be above 0"),
        (["--retries", "1", "--detach"], "omit --detach"),
        (["--tag", "team"], "--tag team: must be KEY=VALUE"),
        (["--tag", "solar_command=x"], "--tag solar_command=x: must be KEY=VALUE"),
        (["--tag", "a=https://u:secret@h"], r"--tag a=https://u:\*\*\*@h: a cluster shows"),
        (["--tag", "a=1", "--tag", "a=2"], "a is '1' already: give it once"),
    ],
)
def test_mistake_in_retries_and_tags_is_one_line(monkeypatch, capsys, options, named):
    played = Played(0)
    assert submitted(monkeypatch, played, *options) == (2, [])
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(named, line)
    assert played.submitted == []


def test_tags_are_shown_without_passwords():
    assert shown_tags({"solar_command": "x", "b": "2", "a": "http://u:pw@h"}) == "a=http://u:***@h b=2"
    assert shown_tags(None) == ""


class BrokenStreams:
    """A client whose log stream ends early, twice: once silently, once with an error."""

    def __init__(self) -> None:
        self.streams: list[list[str | Exception]] = [
            ["one\n"],
            ["one\n", "two\n", RuntimeError("closed")],
            ["one\ntwo\nthree\n"],
        ]

    async def tail_job_logs(self, _job_id: str):
        for item in self.streams.pop(0):
            if isinstance(item, Exception):
                raise item
            yield item


def test_following_goes_on_after_the_stream_broke_and_prints_each_line_once(monkeypatch, capsys):
    monkeypatch.setattr(job_client, "POLL_SECONDS", 0.0)
    cluster = object.__new__(job_client.Cluster)
    cluster.address = "http://h"
    cluster._client = client = BrokenStreams()  # type: ignore[assignment]
    monkeypatch.setattr(
        cluster, "job", lambda _id: details(status="RUNNING" if client.streams else "SUCCEEDED"), raising=False
    )
    job = cluster.follow("a", Console())
    out, err = capsys.readouterr()
    assert job.status == "SUCCEEDED"
    assert out == "one\ntwo\nthree\n"
    assert err.count("does not answer") == 1


def test_following_a_cluster_that_stays_away_is_no_success(monkeypatch):
    monkeypatch.setattr(job_client, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(job_client, "LOST_SECONDS", 0.01)
    cluster = object.__new__(job_client.Cluster)
    cluster.address = "http://h"

    def away(_job_id: str) -> JobDetails:
        raise ConnectionError("gone")

    cluster._client = None  # type: ignore[assignment]
    monkeypatch.setattr(cluster, "job", away, raising=False)
    with pytest.raises(job_client.ConnectionLost, match="gone"):
        cluster.follow("a", Console())


def test_ctrl_c_leaves_the_job_and_says_how_to_go_on(monkeypatch, capsys):
    from jobs.commands.cluster import _follow

    class Interrupting:
        shown = "http://h"

        def follow(self, _job_id: str, _console: Console) -> None:
            raise KeyboardInterrupt

    assert _follow(Interrupting(), "a", Console()) == 130
    err = capsys.readouterr().err
    assert "job a continues" in err
    assert "solar jobs stop a --address http://h" in err


def test_pending_job_says_what_it_waits_for(monkeypatch, capsys):
    clock = iter([0.0, 5.0, 11.0, 12.0, 80.0])
    monkeypatch.setattr(job_client.time, "monotonic", lambda: next(clock))
    pending = Pending(Console())
    for _ in range(4):
        pending.tell(details(status="PENDING", message="waiting for CPUs"))
    assert capsys.readouterr().out.splitlines() == [
        "waiting for 11 s: waiting for CPUs",
        "waiting for 80 s: waiting for CPUs",
    ]
