import errno
import multiprocessing
import os
import uuid

import pytest

from pipeline.events import DataError
from pipeline.storage import Store, _written_beside


def _create(arguments):
    root, number = arguments
    return [Store(root).create(f"manifests/{key:08d}.json", b"writer %d" % number) for key in range(20)]


def test_of_racing_processes_exactly_one_creates_each_file(tmp_path):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        won = pool.map(_create, [(str(tmp_path), n) for n in range(4)])
    for key in range(20):
        winners = [n for n in range(4) if won[n][key]]
        assert len(winners) == 1
        assert Store(str(tmp_path)).read(f"manifests/{key:08d}.json") == b"writer %d" % winners[0]
    assert len(Store(str(tmp_path)).names("manifests")) == 20


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return Store(str(tmp_path / "s") if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def test_create_refuses_what_exists_and_write_replaces_it(store):
    assert store.create("a/b", b"1")
    assert not store.create("a/b", b"2")
    assert store.read("a/b") == b"1"
    store.write("a/b", b"22")
    assert (store.read("a/b"), store.size("a/b"), store.names("a")) == (b"22", 2, ["b"])
    store.remove("a")
    assert not store.exists("a/b")


def test_adopted_files_are_whole_and_leave_no_trace(store):
    with store.scratch() as scratch:
        with open(f"{scratch}/file", "wb") as stream:
            stream.write(b"x" * 100_000)
        store.adopt(f"{scratch}/file", "shards/file")
    assert store.size("shards/file") == 100_000
    assert store.names() == ["shards"]


@pytest.mark.parametrize("step", ["fdopen", "fsync", "chmod", "replace", "link"])
def test_a_file_that_cannot_be_written_is_named_and_leaves_no_trace(tmp_path, monkeypatch, step):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    store = Store(str(tmp_path))
    store.write("a/b", b"1")
    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        for write in (store.write, store.create):
            if (write, step) in ((store.write, "link"), (store.create, "replace")):
                continue
            with pytest.raises(OSError, match="No space left on device") as error:
                write("a/new", b"2")
            assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / "a/new"))
    assert os.listdir(tmp_path / "a") == ["b"]


def test_readers_see_no_unfinished_files(tmp_path):
    store = Store(str(tmp_path))
    store.write("a/b", b"1")
    with store.scratch() as scratch, _written_beside(tmp_path / "a/c", b"2") as unfinished:
        assert (store.names(), store.names("a")) == (["a"], ["b"])
        assert store.unfinished("a") == [unfinished.name]
        assert store.unfinished() == [os.path.basename(scratch)]
    assert store.unfinished() + store.unfinished("a") == []


def test_absent_things_are_empty_or_raise(store):
    assert store.names("nowhere") == []
    with pytest.raises(FileNotFoundError):
        store.size("nowhere")


@pytest.mark.parametrize("name", ["a::b", "s3::day", "[1]*", "a b#c%20", "日々"])
def test_a_local_directory_may_have_any_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for root in (name, str(tmp_path / name), f"file://{tmp_path}/{name}"):
        store = Store(root)
        store.write("day.json", b"1")
        assert (store.is_local, store.path, store.names(), store.read("day.json")) == (
            True, str(tmp_path / name), ["day.json"], b"1"
        )  # fmt: skip


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("s3://user:secret@bucket/x", r"s3://\.\.\.@bucket: has a user or a password: remove it"),
        ("https://bob:secret@host/x.csv", r"https://\.\.\.@host: has a user or a password"),
        ("zip://a.zip::s3://user:secret@bucket/x", r"zip://\.\.\.@bucket: has a user or a password"),
        ("s3://", "'' cannot be a bucket"),
        ("s3://My Bucket/x", "'My Bucket' cannot be a bucket"),
        ("S3://bucket/x", "unknown protocol 'S3': write a path, or s3:// and a bucket"),
        ("gs://bucket/x", "Please install gcsfs"),
    ],
)
def test_a_wrong_uri_is_told_without_its_secret(uri, told):
    with pytest.raises(DataError, match=told) as error:
        Store(uri)
    assert "secret" not in str(error.value)
