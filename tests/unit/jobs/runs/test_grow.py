"""`solar grow`: old bytes stay, new rows follow (seed, table, row), and nothing half-written is ever at --out."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from jobs.host.console import Console
from jobs.host.errors import UserError
from jobs.host.locks import RunInUse, sole_command
from jobs.runs import grow as grow_module
from jobs.runs.grow import grow
from jobs.training.checkpoint import CheckpointError, checkpoint_key, read_state, verify_checkpoint
from jobs.training.warm_start import begin_from
from models.embeddings import initial_rows
from pipeline.events import DataError
from pipeline.shards.dataset import Shards
from tests.support.growth import (
    first_day,
    rewrite,
    second_day,
    specs_of,
    tiny_config,
    whole_table,
    write_model_checkpoint,
)
from tests.support.serial import without_ray


@pytest.fixture(scope="module")
def days(tmp_path_factory) -> tuple[Path, Shards, Shards]:
    directory = tmp_path_factory.mktemp("days")
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch.setattr)
        return directory, first_day(directory), second_day(directory)


@pytest.fixture(params=["rowwise_adagrad", "adam"])
def sparse(request) -> str:
    return request.param


def written(days, path: Path, *arguments: str) -> Path:
    directory, first, _ = days
    return write_model_checkpoint(path, tiny_config(directory, *arguments), first)


@pytest.fixture
def checkpoint(days, tmp_path) -> Path:
    return written(days, tmp_path / "run" / "step-00000008")


def test_old_rows_are_the_same_bytes_and_new_ones_follow_seed_table_and_row(days, tmp_path, sparse, monkeypatch):
    # Several blocks to a table, the last one smaller.
    monkeypatch.setattr(grow_module, "ROWS_AT_ONCE", 48)
    directory, first, second = days
    arguments = ["--optimizer.sparse", sparse, "--seed", "7"]
    old = written(days, tmp_path / "run" / "step-00000008", *arguments)
    out = grow(str(old), Console(), shards_dir=second.path, out=str(tmp_path / "grown"))
    assert verify_checkpoint(out) == []
    for file in old.iterdir():
        if file.name not in ("state.json", "COMMIT"):
            assert (out / file.name).read_bytes() == file.read_bytes()
    config = tiny_config(directory, *arguments)
    pairs = zip(specs_of(config, first), specs_of(config, second), strict=True)
    new_files = {f"table-{before.name}-{before.capacity:012d}.safetensors" for before, _ in pairs}
    assert {file.name for file in out.iterdir()} - {file.name for file in old.iterdir()} == new_files
    for before, after in zip(specs_of(config, first), specs_of(config, second), strict=True):
        was, now = whole_table(old, before.name), whole_table(out, after.name)
        assert was.keys() == now.keys()
        assert len(was) == (2 if sparse == "rowwise_adagrad" else 3)
        for name in was:
            assert now[name].dtype == torch.float32
            assert now[name].shape == (after.capacity, *was[name].shape[1:])
            assert torch.equal(now[name][: before.capacity], was[name])
            if name != "weight":
                assert not now[name][before.capacity :].any()
        drawn = initial_rows(after.name, seed=7, first=0, num_rows=after.capacity, width=after.width, std=0.02)
        assert torch.equal(now["weight"][before.capacity :], drawn[before.capacity :])


def test_state_says_the_new_data_and_where_it_comes_from(days, checkpoint, tmp_path):
    directory, first, second = days
    out = grow(str(checkpoint.parent), Console(), shards_dir=second.path, out=str(tmp_path / "deep" / "grown"))
    before, after = read_state(checkpoint), read_state(out, checksums=True)
    assert after["grown_from"] == {
        "checkpoint": str(checkpoint),
        "key": checkpoint_key(checkpoint),
        "manifest": 1,
        "manifest_fingerprint": first.manifest.fingerprint,
        "tables": before["tables"],
    }
    assert (after["manifest"], after["manifest_fingerprint"]) == (2, second.manifest.fingerprint)
    assert {table["name"]: table["capacity"] for table in after["tables"]} == {
        "item": 256, "genres": 32, "user-taste": 16,
    }  # fmt: skip
    assert after["train_state"] == before["train_state"]
    # It is a beginning like any other, and grows no further on the same data.
    config = tiny_config(directory)
    begin_from(
        str(out), model=config.model, task=config.data.requests.task, sparse=config.optimizer.sparse, shards=second
    )
    again = grow(str(out), Console(), shards_dir=second.path, out=str(tmp_path / "again"))
    assert {file.name for file in again.iterdir()} == {file.name for file in out.iterdir()}


def left_beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


def test_refusals_leave_nothing(days, checkpoint, tmp_path):
    directory, _, second = days
    out = tmp_path / "place" / "grown"
    out.parent.mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        grow(str(tmp_path / "nothing"), Console(), shards_dir=second.path, out=str(out))
    with pytest.raises(DataError, match="no prepared data set there"):
        grow(str(checkpoint), Console(), shards_dir=str(tmp_path / "nothing"), out=str(out))
    grown = write_model_checkpoint(tmp_path / "run" / "step-00000016", tiny_config(directory), second)
    (tmp_path / "small").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch.setattr)
        smaller = first_day(tmp_path / "small")
    with pytest.raises(UserError, match="table item has 256 rows, more than the 128"):
        grow(str(grown), Console(), shards_dir=smaller.path, out=str(out))
    with pytest.raises(UserError, match="must be a local or shared directory"):
        grow(str(checkpoint), Console(), shards_dir=second.path, out="s3://bucket/grown")
    vocabulary = json.loads((checkpoint / "state.json").read_text())["vocabulary"]
    vocabulary["value:genres"]["digest"] = "0" * 32
    rewrite(checkpoint, vocabulary=vocabulary)
    with pytest.raises(UserError, match="the first 5 values of genres have changed"):
        grow(str(checkpoint), Console(), shards_dir=second.path, out=str(out))
    assert left_beside(out) == []


def test_what_is_there_is_never_touched(days, checkpoint, tmp_path):
    out = tmp_path / "place" / "grown"
    out.mkdir(parents=True)
    with pytest.raises(UserError, match="exists already: choose another directory, or remove it"):
        grow(str(checkpoint), Console(), shards_dir=days[2].path, out=str(out))
    assert (list(out.iterdir()), left_beside(out)) == ([], ["grown"])


def test_full_disk_at_any_file_leaves_nothing(days, checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "place" / "grown"

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("describe_file", "commit_files"):
        with monkeypatch.context() as patch:
            patch.setattr(grow_module, name, refuse)
            with pytest.raises(OSError, match="No space left"):
                grow(str(checkpoint), Console(), shards_dir=days[2].path, out=str(out))
        assert left_beside(out) == []
    assert verify_checkpoint(checkpoint) == []


def test_what_a_killed_growth_left_is_no_checkpoint_and_goes_with_the_next(days, checkpoint, tmp_path):
    out = tmp_path / "place" / "grown"
    left = out.parent / ".grown.growing" / "checkpoint"
    left.mkdir(parents=True)
    (left / "table-item-000000000128.safetensors").write_bytes(b"half")
    (left.parent / "lock").write_text("a process that is gone")
    grow(str(checkpoint), Console(), shards_dir=days[2].path, out=str(out))
    assert left_beside(out) == ["grown"]
    assert verify_checkpoint(out) == []


def test_two_growths_of_one_target_do_not_meet(days, checkpoint, tmp_path):
    out = tmp_path / "place" / "grown"
    with (
        sole_command(out.parent / ".grown.growing"),
        pytest.raises(RunInUse, match="is working there: wait for it, or name another --out"),
    ):
        grow(str(checkpoint), Console(), shards_dir=days[2].path, out=str(out))
    assert left_beside(out) == []


def test_another_file_system_gets_copies(days, checkpoint, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    with monkeypatch.context() as patch:
        real = grow_module.os.link
        patch.setattr(
            grow_module.os, "link", lambda *where: real(*where) if where[0].name == ".COMMIT.tmp" else refuse()
        )
        out = grow(str(checkpoint), Console(), shards_dir=days[2].path, out=str(tmp_path / "grown"))
    assert verify_checkpoint(out) == []
    item = "table-item-000000000000.safetensors"
    assert (out / item).stat().st_ino != (checkpoint / item).stat().st_ino
    assert (out / item).read_bytes() == (checkpoint / item).read_bytes()
