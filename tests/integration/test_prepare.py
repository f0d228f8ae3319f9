"""Prepare and index_requests on a real local Ray: the same bytes as without it, progress, errors of tasks."""

import filecmp
import os

import numpy as np
import polars as pl
import pytest

from jobs import cli
from pipeline.batches.loader import TrainLoader
from pipeline.batches.loader_config import LoaderConfig
from pipeline.batches.request_index import request_counts
from pipeline.batches.requests import RequestConfig
from pipeline.build import PrepareConfig, index_requests, prepare
from pipeline.events import DataError, EventColumns
from pipeline.shards.dataset import Shards
from pipeline.shards.inspection import digest, verify
from pipeline.shards.manifest import current_manifest

pytestmark = pytest.mark.usefixtures("local_ray")

CONFIG = PrepareConfig(columns=EventColumns(action="action", label="label"), buckets=3, row_group_events=300)


def write_day(folder, day, *, rows=1_000):
    rng = np.random.default_rng(day)
    folder.mkdir(exist_ok=True)
    pl.DataFrame(
        {
            "user_id": rng.integers(0, 40, rows),
            "item_id": rng.integers(0, 60, rows),
            "timestamp": 1_700_000_000 + 86_400 * day + rng.integers(0, 3_600, rows),
            "action": rng.choice(["view", "click"], rows),
            "label": rng.integers(0, 2, rows),
        }
    ).write_parquet(folder / f"day-{day}.parquet", row_group_size=250)


def test_days_added_one_by_one_equal_the_whole_log_and_run_to_run_the_bytes_are_the_same(tmp_path):
    seen = []
    for day in range(3):
        write_day(tmp_path / "log", day)
        result = prepare(
            str(tmp_path / "log"), str(tmp_path / "days"), config=CONFIG, progress=lambda *step: seen.append(step)
        )
    assert result.manifest.number == 3
    assert seen[:5] == [("read", done, 4) for done in range(5)]
    assert seen[-4:] == [("build", done, 3) for done in range(4)]
    for name in ("a", "b"):
        prepare(str(tmp_path / "log"), str(tmp_path / name), config=CONFIG)
    assert digest(str(tmp_path / "days")) == digest(str(tmp_path / "a"))
    assert verify(str(tmp_path / "days")) == []
    for folder, _, files in os.walk(tmp_path / "a"):
        other = folder.replace(str(tmp_path / "a"), str(tmp_path / "b"))
        assert sorted(os.listdir(other)) == sorted(os.listdir(folder))
        assert filecmp.cmpfiles(folder, other, files, shallow=False)[0] == files
    assert prepare(str(tmp_path / "log"), str(tmp_path / "a"), config=CONFIG).reused


def test_an_error_inside_a_task_reaches_the_user_in_one_line(tmp_path):
    write_day(tmp_path / "log", 0)
    first = prepare(str(tmp_path / "log"), str(tmp_path / "out"), config=CONFIG).manifest
    pl.DataFrame(
        {"user_id": [1.5], "item_id": [1], "timestamp": [1], "action": ["a"], "label": [1]}
    ).write_parquet(tmp_path / "log/wrong.parquet")  # fmt: skip
    with pytest.raises(DataError, match=r"^log/wrong.parquet: column 'user_id'.*map another column$"):
        prepare(str(tmp_path / "log"), str(tmp_path / "out"), config=CONFIG)
    assert current_manifest(str(tmp_path / "out")) == first


def test_requests_counted_by_ray_are_those_a_loader_counts_alone(tmp_path):
    write_day(tmp_path / "log", 0)
    for name in ("a", "b"):
        prepare(str(tmp_path / "log"), str(tmp_path / name), config=CONFIG)
    config = RequestConfig(max_history=10)
    index_requests(Shards.open(str(tmp_path / "a")), config=config)
    request_counts(Shards.open(str(tmp_path / "b")), config)
    (name,) = os.listdir(tmp_path / "a/requests")
    assert (tmp_path / "a/requests" / name).read_bytes() == (tmp_path / "b/requests" / name).read_bytes()
    loader = TrainLoader(
        Shards.open(str(tmp_path / "a")), requests=config, loader=LoaderConfig(batch_events=2_000), seed=0
    )
    assert sum(batch.num_requests for batch in loader.epoch(0)) == loader.num_requests(0)


@pytest.fixture
def solar(tmp_path, monkeypatch, capsys):
    """Runs a command in this process, on its Ray; exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = cli.run([*arguments, "-v"])
        return (code, *capsys.readouterr())

    return run


def test_a_data_set_is_kept_in_order_by_commands(solar, tmp_path):
    for day in range(2):
        write_day(tmp_path / "log", day)
        prepare(str(tmp_path / "log"), str(tmp_path / "shards"), config=CONFIG)
    (tmp_path / "users.txt").write_text("3\n17\n")
    assert solar("forget", "shards", "--users", "users.txt", "--verify")[0] == 1
    assert "6 files -> 3, manifest 3 in shards" in solar("compact", "shards")[1]
    _, output, _ = solar("forget", "shards", "--users", "users.txt")
    assert "2 of 2 users were found" in output
    assert "not covered  the log from which the shards were prepared (log/day-0.parquet, log/day-1.parquet)" in output
    code, output, _ = solar("forget", "shards", "--users", "users.txt", "--verify")
    assert (code, output) == (0, "nothing is left of these 2 users in the data set and in workspace\n")
    write_day(tmp_path / "log", 2)
    prepare(str(tmp_path / "log"), str(tmp_path / "shards"), config=CONFIG)
    assert "removed       manifests 4 to 4" in solar("gc", "shards", "--keep", "1")[1]
    assert verify(str(tmp_path / "shards")) == []


def test_places_are_those_of_the_command_wherever_ray_s_processes_work(solar, tmp_path):
    write_day(tmp_path / "log", 0)
    code, output, errors = solar("prepare", "--events", "log", "--out", "shards")
    assert code == 0, errors
    assert "items in shards\n" in output
    assert verify(str(tmp_path / "shards")) == []


def test_mistakes_in_keeping_a_data_set_are_told_in_one_line(solar, tmp_path):
    write_day(tmp_path / "log", 0)
    prepare(str(tmp_path / "log"), str(tmp_path / "shards"), config=CONFIG)
    for command, words in (
        (["gc", "shards", "--keep", "0"], "--keep is 0: it must be at least 1"),
        (["compact", "elsewhere"], "no prepared data set there"),
        (["forget", "shards", "--users", "nobody.txt"], "no such file"),
    ):
        code, _, errors = solar(*command)
        assert code == 2
        (line,) = errors.strip().splitlines()
        assert words in line
