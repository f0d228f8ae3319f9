"""A data set on S3: a real server process's protocol over HTTP, with answers that fail, stall and get lost."""

from __future__ import annotations

import dataclasses
import threading
import uuid

import fsspec
import numpy as np
import polars as pl
import pytest
from moto.server import ThreadedMotoServer
from werkzeug.serving import WSGIRequestHandler

from pipeline import build
from pipeline.events import DataError, EventColumns
from pipeline.log import readers
from pipeline.prepare.garbage import collect
from pipeline.shards.dataset import Shards
from pipeline.shards.inspection import digest, verify
from pipeline.shards.manifest import commit, current_manifest, manifest_numbers
from pipeline.storage import Store
from tests.support.object_store import FAULTS, FaultyProxy
from tests.support.serial import without_ray

CONFIG = build.PrepareConfig(columns=EventColumns(action="action", label="label"), buckets=2, row_group_events=300)


@pytest.fixture(scope="module")
def server():
    # As in FaultyProxy.
    WSGIRequestHandler.disable_nagle_algorithm = True
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def store(server, monkeypatch):
    """A URI on the server, and the proxy before it, which fails when told to."""
    proxy = FaultyProxy(server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.filesystem("s3").clear_instance_cache()
    # A server of this machine recovers at once; between tries the client would wait a second on average.
    monkeypatch.setattr("botocore.retryhandler.delay_exponential", lambda base, growth_factor, attempts: 0.01)
    without_ray(monkeypatch.setattr)
    bucket = f"data-{uuid.uuid4().hex}"
    fsspec.filesystem("s3").mkdir(bucket)
    yield f"s3://{bucket}", proxy
    fsspec.filesystem("s3").clear_instance_cache()
    proxy.stop()


def write_day(folder, day, *, rows=400):
    rng = np.random.default_rng(day)
    folder.mkdir(exist_ok=True)
    table = {
        "user_id": rng.integers(0, 40, rows), "item_id": rng.integers(0, 60, rows),
        "timestamp": 1_700_000_000 + 86_400 * day + rng.integers(0, 3_600, rows),
        "action": rng.choice(["view", "click"], rows), "label": rng.integers(0, 2, rows),
    }  # fmt: skip
    pl.DataFrame(table).write_parquet(folder / f"day-{day}.parquet", row_group_size=250)


@pytest.mark.parametrize("every", [0, 7])
def test_a_data_set_lives_on_s3_as_on_a_disk(store, tmp_path, every):
    uri, proxy = store
    proxy.every = every
    for day in range(3):
        write_day(tmp_path / "log", day)
        for out in (f"{uri}/shards", str(tmp_path / "local")):
            build.prepare(str(tmp_path / "log"), out, config=CONFIG)
    assert digest(f"{uri}/shards") == digest(str(tmp_path / "local"))
    assert current_manifest(f"{uri}/shards") == current_manifest(str(tmp_path / "local"))
    assert verify(f"{uri}/shards") == []
    build.compact(f"{uri}/shards")
    build.forget(f"{uri}/shards", ["3"])
    assert digest(f"{uri}/shards") != digest(str(tmp_path / "local"))
    build.forget(str(tmp_path / "local"), ["3"])
    assert digest(f"{uri}/shards") == digest(str(tmp_path / "local"))
    assert manifest_numbers(Store(f"{uri}/shards")) == [5]
    collect(f"{uri}/shards", keep=1)
    assert verify(f"{uri}/shards") == []
    assert (set(proxy.met) == set(FAULTS)) == bool(every)


def test_a_log_on_s3_that_changes_while_it_is_read_is_not_ingested(store, tmp_path, monkeypatch):
    uri, _ = store
    s3, original = fsspec.filesystem("s3"), readers.read_blocks
    for name in ("a", "b"):
        s3.pipe_file(f"{uri}/log/{name}.csv", f"user_id,item_id,timestamp\nu,{name},1\n".encode())

    def changed(file, **named):
        s3.pipe_file(f"{uri}/log/b.csv", b"user_id,item_id,timestamp\nw,b,1\n")
        return original(file, **named)

    with monkeypatch.context() as patch:
        patch.setattr(readers, "read_blocks", changed)
        with pytest.raises(DataError, match=r"log/b.csv changed while it was read; nothing was written"):
            build.prepare(f"{uri}/log", str(tmp_path / "out"), config=build.PrepareConfig())
    assert current_manifest(str(tmp_path / "out")) is None
    assert build.prepare(f"{uri}/log", str(tmp_path / "out"), config=build.PrepareConfig()).manifest.users == 2


def test_a_log_is_read_from_s3(store, tmp_path):
    uri, proxy = store
    write_day(tmp_path / "log", 0)
    fsspec.filesystem("s3").put(str(tmp_path / "log/day-0.parquet"), f"{uri}/log/day-0.parquet")
    proxy.every = 9
    build.prepare(f"{uri}/log", str(tmp_path / "a"), config=CONFIG)
    build.prepare(str(tmp_path / "log"), str(tmp_path / "b"), config=CONFIG)
    assert digest(str(tmp_path / "a")) == digest(str(tmp_path / "b"))
    assert proxy.met


def test_of_racing_writers_one_wins_and_the_others_are_told(store, tmp_path):
    uri, _ = store
    write_day(tmp_path / "log", 0)
    first = build.prepare(str(tmp_path / "log"), f"{uri}/shards", config=CONFIG).manifest
    outcomes: list[str] = []

    def write(items: int) -> None:
        try:
            commit(f"{uri}/shards", dataclasses.replace(first, number=2, items=items))
            outcomes.append("won")
        except DataError as error:
            outcomes.append(str(error))

    writers = [threading.Thread(target=write, args=(items,)) for items in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert outcomes.count("won") == 1
    assert sum("another prepare committed manifest 2 first" in outcome for outcome in outcomes) == 5


def test_a_commit_whose_answer_was_lost_is_a_commit(store, tmp_path):
    uri, proxy = store
    write_day(tmp_path / "log", 0)
    first = build.prepare(str(tmp_path / "log"), f"{uri}/shards", config=CONFIG).manifest
    second = dataclasses.replace(first, number=2)
    proxy.every, proxy.faults = 1, iter(["cut after"])
    commit(f"{uri}/shards", second)
    assert current_manifest(f"{uri}/shards") == second


def test_a_server_that_never_answers_well_leaves_the_old_state(store, tmp_path, monkeypatch):
    uri, proxy = store
    write_day(tmp_path / "log", 0)
    first = build.prepare(str(tmp_path / "log"), f"{uri}/shards", config=CONFIG).manifest
    write_day(tmp_path / "log", 1)
    proxy.every = 1
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises((OSError, DataError)):
        build.prepare(str(tmp_path / "log"), f"{uri}/shards", config=CONFIG)
    proxy.every = 0
    assert Shards.open(f"{uri}/shards").manifest == first
    build.prepare(str(tmp_path / "log"), f"{uri}/shards", config=CONFIG)
    assert verify(f"{uri}/shards") == []
