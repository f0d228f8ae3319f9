"""Whatever ends a run, wherever: the data set is the old or the new one, and the next run makes the same bytes."""

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.events import DataError, EventColumns
from pipeline.shards.inspection import verify
from pipeline.shards.manifest import current_manifest
from pipeline.storage import Store

FULL = EventColumns(action="action", label="label", request_id="request_id")
CONFIG = {"columns": FULL, "buckets": 3, "row_group_events": 60, "max_deltas": 0}
OPERATIONS = ("write", "adopt", "create")

KILLED = """
import os, signal, sys
from pipeline import build
from pipeline.storage import Store
from tests.support.serial import without_ray
from tests.unit.pipeline.test_crashes import CONFIG, after_operations

without_ray(setattr)
after_operations(int(sys.argv[3]), lambda: os.kill(os.getpid(), signal.SIGKILL), set_attribute=setattr)
build.prepare(sys.argv[1], sys.argv[2], config=build.PrepareConfig(**CONFIG))
"""


def after_operations(number, end, *, set_attribute):
    """Call `end` instead of the operation of that number that changes the store."""
    counter = itertools.count()

    def counted(original):
        def operation(*arguments, **named):
            if next(counter) == number:
                end()
            return original(*arguments, **named)

        return operation

    for name in OPERATIONS:
        set_attribute(Store, name, counted(getattr(Store, name)))
    return counter


def state(path):
    manifest = current_manifest(str(path))
    assert manifest is not None
    return manifest


def content(path):
    """Every file that the current state consists of, and the manifests."""
    manifest = state(path)
    names = [entry["name"] for entry in manifest.entries()]
    names += [f"manifests/{found.name}" for found in Path(path, "manifests").glob("*.json")]
    return {name: Path(path, name).read_bytes() for name in names}


@pytest.fixture
def two_days(prepare, write_log, random_log, tmp_path):
    """A data set of one day, a log of two, and what preparing both undisturbed gives: an ingest and a compaction."""
    write_log(random_log(seed=0), "log/0.parquet")
    prepare(tmp_path / "log", tmp_path / "old", **CONFIG)
    write_log(random_log(seed=1), "log/1.parquet")
    shutil.copytree(tmp_path / "old", tmp_path / "undisturbed")
    prepare(tmp_path / "log", tmp_path / "undisturbed", **CONFIG)
    assert state(tmp_path / "undisturbed").number == 3
    return tmp_path


def check_and_repeat(prepare, root, out):
    """After a run that ended early: one of the states, whole; then the same bytes as undisturbed."""
    assert state(out).number in (1, 2, 3)
    assert verify(str(out)) == []
    prepare(root / "log", out, **CONFIG)
    assert content(out) == content(root / "undisturbed")
    assert not [name for name in os.listdir(out) if name.startswith("staging")]


def test_a_full_disk_at_any_write_leaves_the_old_state_and_the_next_run_the_new(prepare, two_days, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    number = 0
    while True:
        out = two_days / f"full-{number}"
        shutil.copytree(two_days / "old", out)
        with monkeypatch.context() as patch:
            after_operations(number, full, set_attribute=patch.setattr)
            try:
                prepare(two_days / "log", out, **CONFIG)
                break
            except OSError:
                pass
        check_and_repeat(prepare, two_days, out)
        shutil.rmtree(out)
        number += 1
    assert number > 20


@pytest.mark.parametrize("number", [0, 5, 10, 14, 17, 20, 23])
def test_a_killed_run_leaves_the_old_state_or_the_new_one(prepare, two_days, number):
    out = two_days / "killed"
    shutil.copytree(two_days / "old", out)
    command = [sys.executable, "-c", KILLED, str(two_days / "log"), str(out), str(number)]
    ended = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    check_and_repeat(prepare, two_days, out)


def test_a_log_that_cannot_be_read_leaves_the_old_state(prepare, two_days, monkeypatch):
    from pipeline.log import readers

    before = content(two_days / "old")

    def broken(*arguments, **named):
        raise DataError("log/1.parquet: cannot be read (input/output error); copy it again")

    monkeypatch.setattr(readers, "read_blocks", broken)
    with pytest.raises(DataError, match="cannot be read"):
        prepare(two_days / "log", two_days / "old", **CONFIG)
    monkeypatch.undo()
    assert content(two_days / "old") == before
