"""Two nights as a user types them: yesterday's run, a larger catalogue, `solar grow`, and a run that begins from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.training.checkpoint import checkpoint_key
from tests.support.commands import refused, solar
from tests.support.growth import first_day, second_day
from tests.support.serial import without_ray
from tests.support.tiny import write_tiny_recipe


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """After the first night; the second day's log is in the shards."""
    directory = tmp_path_factory.mktemp("nights")
    recipe = write_tiny_recipe(directory / "tiny.yaml", workspace=directory / "workspace", events=directory / "log")
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch.setattr)
        first_day(directory)
        first_night = solar("train", recipe, "--data.shards", "shards", "--name", "monday", cwd=directory)
        assert first_night.returncode == 0, first_night.stderr
        second_day(directory)
    return directory


@pytest.fixture(scope="module")
def grown(workplace) -> Path:
    done = solar("grow", "workspace/runs/monday", "--shards", "shards", "--out", "grown", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert "item 128 -> 256 rows, genres 16 -> 32 rows, user-taste 8 -> 16 rows" in done.stdout
    assert done.stdout.splitlines()[-1] == "grown"
    return workplace / "grown"


def test_grown_checkpoint_is_whole_says_where_it_is_from_and_can_be_evaluated(grown, workplace):
    inspected = solar("inspect", "grown", "--verify", cwd=workplace)
    assert "every file has its size and checksum" in inspected.stdout
    assert "grown from    " in inspected.stdout
    assert "item 256 x 16" in inspected.stdout
    evaluated = solar("evaluate", "grown", "--part", "valid", "--out", "measured", cwd=workplace)
    assert evaluated.returncode == 0, evaluated.stderr
    summary = json.loads((workplace / "measured" / "summary.json").read_text())
    assert summary["metrics"]["solar"]["requests"] == 60


def test_second_night_begins_from_it_once_and_its_record_names_it(grown, workplace):
    command = ["train", "tiny.yaml", "--data.shards", "shards", "--name", "tuesday"]
    warm = ["--training.warm_start", "grown"]
    first = solar(*command, *warm, cwd=workplace)
    assert first.returncode == 0, first.stderr
    assert f"begins from grown ({checkpoint_key(grown)})" in first.stdout
    record = json.loads((workplace / "workspace/runs/tuesday/run.json").read_text())
    assert record["warm_start"] == checkpoint_key(grown)
    again = solar(*command, *warm, cwd=workplace)
    assert "already there" in again.stdout
    assert "begins from" not in again.stdout
    line = refused(*command, cwd=workplace)
    assert "training.warm_start is grown with content" in line
    assert "null here): choose another --name" in line
    assert "began from    grown" in solar("inspect", first.stdout.splitlines()[-1], cwd=workplace).stdout


def test_what_does_not_fit_ends_with_one_line_and_leaves_nothing(workplace):
    line = refused(
        "train", "tiny.yaml", "--data.shards", "shards", "--name", "wide", "--model.width", "32",
        "--training.warm_start", "workspace/runs/monday", cwd=workplace,
    )  # fmt: skip
    assert line.startswith("solar: training.warm_start=workspace/runs/monday: ")
    assert "table item has width 16, this model's has 32" in line
    assert not (workplace / "workspace/runs/wide").exists()
    line = refused("grow", "workspace/runs/tiny", "--shards", "shards", "--out", "elsewhere", cwd=workplace)
    assert "workspace/runs/tiny: no checkpoint there" in line
    assert not (workplace / "elsewhere").exists()
