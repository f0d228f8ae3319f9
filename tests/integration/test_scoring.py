"""`solar score` as a user types it: from states and from raw histories, options that contradict, and Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.commands import SOLAR, refused, solar
from tests.support.registered import prepared_users, registered, store

WAIT_SECONDS = 180


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("scoring")
    registered(found, prepared_users(found))
    return found


@pytest.fixture(scope="module")
def model(place) -> list[str]:
    return ["score", "models:/tiny/1", "--tracking.uri", store(place), "--workspace", "workspace"]


def scores(file: Path) -> list[dict[int, float]]:
    rows = pq.read_table(file).to_pylist()
    return [dict(zip(row["candidates"], row["scores"], strict=True)) for row in rows]


def test_states_are_built_found_by_themselves_and_score_as_raw_histories(place, model):
    pq.write_table(
        pa.table({"user_id": [1, 2, 3, 4], "candidates": [list(range(100, 150))] * 4}), place / "asked.parquet"
    )
    asked = [*model, "--requests", "asked.parquet", "--shards", "shards"]
    assert solar(*asked, "--out", "raw.parquet", cwd=place).returncode == 0
    missing = solar(*asked, "--states", "auto", "--out", "fallback.parquet", cwd=place)
    assert missing.returncode == 0, missing.stderr
    assert "no complete states at workspace/states/tiny/1: raw histories are read" in missing.stdout
    assert "requests from stored states, 4 without one" in missing.stdout
    build = [*model, "--build-states", "--shards", "shards", "--parallel", "1"]
    done = solar(*build, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "3 users" in done.stdout
    assert "already there: 3 users" in solar(*build, cwd=place).stdout
    found = solar(*asked, "--states", "auto", "--out", "stored.parquet", cwd=place)
    assert found.returncode == 0, found.stderr
    assert "3  requests from stored states, 1 without one" in found.stdout
    for stored, raw in zip(scores(place / "stored.parquet"), scores(place / "raw.parquet"), strict=True):
        assert stored == pytest.approx(raw, abs=1e-3)
    assert (place / "workspace/states/tiny/1/00000001/COMMIT").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--build-states"], "--build-states: needs --shards DIR"),
        (["--build-states", "--shards", "shards", "--requests", "a"], "--requests: is for scoring requests"),
        (["--out", "a"], "--requests is missing"),
        (["--requests", "a"], "--out is missing"),
        (["--requests", "a", "--out", "b", "--manifest", "1"], "--manifest: is only for --build-states"),
        (["--requests", "a", "--out", "b", "--parallel", "0"], "--parallel=0: must be 1 or more"),
    ],
)
def test_options_that_contradict_are_one_line(place, model, options, words):
    assert words in refused(*model, *options, cwd=place)


def test_ctrl_c_leaves_nothing_half_written(place, model, tmp_path):
    many = tmp_path / "many.parquet"
    pq.write_table(pa.table({"user_id": [1, 2] * 15_000, "candidates": [[100, 101]] * 30_000}), many)
    out = tmp_path / "results"
    command = [
        SOLAR,
        *model,
        "--requests",
        tmp_path / "many.parquet",
        "--out",
        out / "scores.parquet",
        "--shards",
        "shards",
    ]
    process = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + WAIT_SECONDS
    # A part is there: actors are at work.
    while not list(out.glob("staging-*/part-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 130, errors
    assert len(errors.strip().splitlines()) == 1
    assert not out.exists() or list(out.iterdir()) == []
