"""A state that a running command reads stays, however many newer ones there are; and what ends a run is named."""

from __future__ import annotations

import datetime
import errno
import json
import os
import socket
from pathlib import Path

import pytest

from pipeline import build
from pipeline.events import DataError
from pipeline.prepare.garbage import collect
from pipeline.shards import leases
from pipeline.shards.dataset import Shards
from pipeline.shards.inspection import verify
from pipeline.shards.leases import current_leases, lease
from pipeline.shards.manifest import manifest_numbers
from pipeline.storage import SCRATCH, Store


@pytest.fixture
def grown(prepare, write_log, random_log, tmp_path):
    """A data set of three states; its path."""
    for day in range(3):
        write_log(random_log(seed=day), f"log/{day}.parquet")
        prepare(tmp_path / "log", tmp_path / "out", buckets=2)
    return str(tmp_path / "out")


def held(path: str, number: int, **options):
    return lease(path, number=number, command="training of run small", tell=pytest.fail, **options)


def stored(path: str, name: str = "00000001-elsewhere-7-aa.json", **changed) -> Path:
    """A lease as another machine would have written it."""
    expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    fields = {"manifest": 1, "host": "elsewhere", "pid": 7, "command": "training of run big"}
    file = Path(path, "leases", name)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({**fields, "expires": expires.isoformat(), **changed}))
    return file


def test_gc_keeps_the_state_that_a_running_command_reads_and_names_the_command(grown):
    with held(grown, 1):
        collected = collect(grown, keep=1)
        assert collected.manifests == [2]
        assert manifest_numbers(Store(grown)) == [1, 3]
        assert verify(grown, number=1) == verify(grown) == []
        told = f"training of run small (process {os.getpid()} on {socket.gethostname()}) reads manifest 1"
        assert [str(each) for each in collected.held] == [told]
    assert current_leases(grown) == []
    assert collect(grown, keep=1).manifests == [1]


def test_a_lease_of_the_states_to_keep_is_not_told(grown):
    with held(grown, 3):
        assert collect(grown, keep=1).held == []


def test_leases_that_expired_and_those_of_dead_processes_are_removed(grown):
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=1)
    over = stored(grown, expires=past.isoformat())
    dead = stored(grown, f"00000002-{socket.gethostname()}-999999999-bb.json", manifest=2, host=socket.gethostname())
    valid = stored(grown, "00000001-elsewhere-7-cc.json")
    assert [each.host for each in current_leases(grown)] == ["elsewhere"]
    assert not over.exists()
    assert not dead.exists()
    assert collect(grown, keep=1).manifests == [2]
    valid.unlink()


BROKEN = {
    "empty": b"",
    "half": b'{"manifest": 1, "host": "elsewhe',
    "no text": b"\xff\x00\xfe",
    "a list": b"[1, 2]",
    "no list": b"[]",
    "an object": b"{}",
    "null": b"null",
    "deep": b"[" * 100_000,
    "fields missing": b'{"manifest": 1, "expires": "2999-01-01T00:00:00+00:00"}',
    "no number": b'{"manifest": "1", "host": "h", "pid": 7, "command": "c", "expires": "2999-01-01T00:00:00+00:00"}',
    "no zone": b'{"manifest": 1, "host": "h", "pid": 7, "command": "c", "expires": "2999-01-01T00:00:00"}',
    "no time": b'{"manifest": 1, "host": "h", "pid": 7, "command": "c", "expires": 5}',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_lease_that_cannot_be_read_holds_its_state_for_the_life_of_a_lease(grown, content):
    file = Path(grown, "leases", "00000001-else-where-7-aa.json")
    file.parent.mkdir()
    file.write_bytes(content)
    (held_by,) = collect(grown, keep=1).held
    assert manifest_numbers(Store(grown)) == [1, 3]
    told = "a lease of manifest 1 that cannot be read (remove it if process 7 on else-where has ended)"
    assert str(held_by) == f"leases/{file.name}, {told}"
    written = datetime.datetime.now().timestamp() - leases.LEASE_SECONDS - 1
    os.utime(file, (written, written))
    assert collect(grown, keep=1).manifests == [1]
    assert not file.exists()


@pytest.mark.parametrize("content", [b"", b"\xff\x00\xfe", b"{}", b"[]", b"null", b'{"manifest": 1, "x": 2}'])
def test_forgetting_and_gc_wait_for_no_lease_that_cannot_be_read(grown, content):
    folder = Path(grown, "leases")
    folder.mkdir()
    # The second: an unfinished lease of an earlier version.
    for name in ("00000001-else-where-7-aa.json", ".00000001-vm-99-abcdabcd.json-0fcnad4t", f"{SCRATCH}vm-99-abcd"):
        (folder / name).write_bytes(content)
    build.forget(grown, ["3"])
    assert manifest_numbers(Store(grown)) == [4]
    assert [each.command for each in current_leases(grown)] == ["leases/00000001-else-where-7-aa.json"]
    assert collect(grown, keep=1).held == []


def test_a_lease_of_a_dead_process_is_removed_even_if_it_cannot_be_read(grown):
    file = Path(grown, "leases", f"00000001-{socket.gethostname()}-999999999-aa.json")
    file.parent.mkdir()
    file.write_text("")
    assert collect(grown, keep=1).manifests == [1, 2]
    assert not file.exists()


def test_a_lease_of_a_later_version_with_more_fields_is_read(grown):
    stored(grown, purpose="x")
    assert [each.command for each in current_leases(grown)] == ["training of run big"]


def test_files_that_are_no_leases_hold_nothing_and_stay(grown):
    folder = Path(grown, "leases")
    folder.mkdir()
    # Others may be of an editor, of a file server, or a lease that is being written.
    names = (".00000001-elsewhere-7-aa.json-x1", ".nfs0001", "notes.txt", "1-elsewhere-7-aa.json", "00000001.json")
    for name in names:
        (folder / name).write_text("{")
    (folder / "directory").mkdir()
    assert collect(grown, keep=1).manifests == [1, 2]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "directory"])


def test_a_lease_is_renewed_while_its_command_runs(grown, monkeypatch):
    written = []
    write = leases._write
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.001)
    monkeypatch.setattr(leases, "_write", lambda *arguments: written.append(write(*arguments)))
    with held(grown, 1):
        deadline = datetime.datetime.now() + datetime.timedelta(minutes=1)
        while len(written) < 3 and datetime.datetime.now() < deadline:
            pass
    assert len(written) >= 3
    assert Store(grown).names("leases") == []


def test_a_run_whose_state_was_collected_ends_with_the_command_and_the_time(grown):
    running, late = Shards.open(grown, number=2), Shards.open(grown, number=1)
    running.read(0)
    assert len(late.manifest.files) < len(running.manifest.files)
    build.compact(grown)
    collect(grown, keep=1)
    reason = r"`solar gc` on .* removed it at 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC; start a new run"
    for read in (lambda: running.read(1), lambda: late.index, lambda: Shards.open(grown, number=2)):
        with pytest.raises(DataError, match=reason):
            read()
    with pytest.raises(DataError, match=reason):
        with held(grown, 2):
            pytest.fail("the state is not there")
    assert Store(grown).names("leases") == []


def test_forgetting_waits_for_no_lease(grown):
    with held(grown, 1):
        build.forget(grown, ["3"])
        assert manifest_numbers(Store(grown)) == [4]
    with pytest.raises(DataError, match=r"`solar forget` on .* removed it at .* UTC; it held users who were forgotten"):
        Shards.open(grown, number=1)


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied"),
        # As s3fs words a refusal: without a number.
        PermissionError("Access Denied"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=str,
)
def test_a_data_set_that_may_not_be_written_to_is_read_without_a_lease(grown, monkeypatch, error):
    def refuse(*_: object) -> None:
        raise error

    told: list[str] = []
    monkeypatch.setattr(leases, "_write", refuse)
    with lease(grown, number=1, command="x", tell=told.append):
        pass
    why = error.strerror or str(error)
    assert told == [f"{grown}: no lease ({why}): `solar gc` may remove what is read here"]
