"""Checkpoints that a crash or a disk left in a bad state: refused by name, with a way on that works."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import save_file

from jobs.training.checkpoint import (
    CheckpointError,
    checkpoint_bytes,
    committed_checkpoints,
    discard_unfinished,
    latest_checkpoint,
    read_state,
    remove_committed,
    set_aside_damaged,
    verify_checkpoint,
)


def write_checkpoint(path: Path, **facts: Any) -> Path:
    """As the format is documented, without the code that writes it."""
    path.mkdir(parents=True)
    save_file({"weight": torch.ones(4, 2), "accumulator": torch.ones(4)}, path / "table-item-000000000000.safetensors")
    save_file({"w": torch.ones(3)}, path / "dense.safetensors")
    (path / "state.json").write_text(json.dumps({"train_state": {"step": int(path.name[5:])}, **facts}))
    files = [
        {"name": file.name, "bytes": file.stat().st_size, "xxh64": xxhash.xxh64(file.read_bytes()).hexdigest()}
        for file in sorted(path.iterdir())
    ]
    (path / "COMMIT").write_text(json.dumps({"format_version": 1, "files": files}))
    return path


@pytest.fixture
def run_dir(tmp_path) -> Path:
    for step in (4, 8):
        write_checkpoint(tmp_path / f"step-{step:08d}")
    return tmp_path


def cut(name: str, keep: int | None = None) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        raw = (path / name).read_bytes()
        (path / name).write_bytes(raw[: len(raw) // 2 if keep is None else keep])

    return damage


def flip(path: Path) -> None:
    raw = bytearray((path / "dense.safetensors").read_bytes())
    raw[-1] ^= 1
    (path / "dense.safetensors").write_bytes(bytes(raw))


def elsewhere(path):
    """A commit that names a file outside of the checkpoint, with the right size and checksum."""
    commit = json.loads((path / "COMMIT").read_text())
    commit["files"][0]["name"] = f"../{path.name}/{commit['files'][0]['name']}"
    (path / "COMMIT").write_text(json.dumps(commit))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (cut("table-item-000000000000.safetensors"), "table-item-000000000000.safetensors: "),
        (cut("dense.safetensors", 0), "dense.safetensors: 0 bytes instead of"),
        (flip, "dense.safetensors: checksum differs"),
        (cut("state.json"), "state.json: "),
        (cut("COMMIT"), "COMMIT: not a valid list of files"),
        (cut("COMMIT", 0), "COMMIT: not a valid list of files"),
        (lambda path: (path / "COMMIT").write_text("[1]"), "COMMIT: not a valid list of files"),
        (elsewhere, "COMMIT: not a valid list of files"),
        (lambda path: (path / "dense.safetensors").unlink(), "dense.safetensors: missing"),
    ],
)
def test_damage_is_refused_by_name_and_removing_the_directory_leads_to_the_one_before(run_dir, damage, named):
    latest = run_dir / "step-00000008"
    damage(latest)
    assert len(verify_checkpoint(latest)) == 1
    with pytest.raises(CheckpointError) as refused:
        read_state(latest, checksums=True)
    assert named in str(refused.value)
    assert f"remove {latest} to continue from step-00000004" in str(refused.value)
    (line,) = set_aside_damaged(run_dir)
    assert named in line
    assert line.endswith(": step-00000008 is now damaged-step-00000008")
    assert set_aside_damaged(run_dir) == []
    found = latest_checkpoint(run_dir)
    assert found is not None
    assert read_state(found, checksums=True)["train_state"]["step"] == 4


def test_nothing_is_set_aside_where_no_checkpoint_is_whole(run_dir):
    for path in committed_checkpoints(run_dir):
        flip(path)
    with pytest.raises(
        CheckpointError, match=r"checksum differs; no checkpoint of .* is intact: start again with --name"
    ):
        set_aside_damaged(run_dir)
    assert len(committed_checkpoints(run_dir)) == 2


def test_damage_of_the_only_checkpoint_does_not_promise_an_earlier_one(run_dir):
    remove_committed(run_dir / "step-00000008")
    cut("COMMIT")(run_dir / "step-00000004")
    with pytest.raises(CheckpointError, match="there is no earlier checkpoint"):
        read_state(run_dir / "step-00000004")


def test_what_a_killed_run_left_unfinished_is_removed_and_nothing_else(run_dir):
    unfinished = write_checkpoint(run_dir / "step-00000012")
    (unfinished / "COMMIT").rename(unfinished / ".COMMIT.tmp")
    # Killed between link and unlink: the checkpoint is whole.
    half_linked = run_dir / "step-00000008"
    (half_linked / ".COMMIT.tmp").hardlink_to(half_linked / "COMMIT")
    (run_dir / "step-00000016").mkdir()
    assert [path.name for path in committed_checkpoints(run_dir)] == ["step-00000004", "step-00000008"]
    discard_unfinished(run_dir)
    assert sorted(path.name for path in run_dir.iterdir()) == ["step-00000004", "step-00000008"]
    assert verify_checkpoint(half_linked) == []


def test_size_of_a_checkpoint_is_known_before_it_is_written(run_dir):
    files = (run_dir / "step-00000004").glob("*.safetensors")
    # A safetensors file begins with the length of its header.
    written = sum(len(raw) - 8 - int.from_bytes(raw[:8], "little") for raw in (file.read_bytes() for file in files))
    # The dense file of this test has no moments.
    assert checkpoint_bytes([(4, 2)], sparse="rowwise_adagrad", dense_parameters=1) == written
