"""Checkpoints: all state that must survive a crash, readable without TorchRec or DeepSpeed, at any world size and ZeRO
stage.

    step-00000400/
      table-item-000000000000.safetensors   rows from 0: `weight` [rows, C] and the optimizer's state; one file per rank
      table-item-000000001024.safetensors   rows from 1024
      dense.safetensors                     every parameter `NAME` fp32 with `NAME/exp_avg`, `NAME/exp_avg_sq`
      state.json                            counters, loader state, random states, config, fingerprints, plan
      COMMIT                                size and checksum of every file above; created last, never replaced

A directory without COMMIT is not a checkpoint. No file uses pickle. checkpoint_writer.py writes checkpoints.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from jobs.host.errors import UserError
from jobs.training.tables import TableShard
from pipeline.storage import is_inside, sync


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the file and the fix in one line."""


class CheckpointNotWritten(CheckpointError):
    """The disk did not accept the checkpoint (it is full or not writable): nothing is wrong with the run, and the same
    command may succeed once there is room."""


@dataclasses.dataclass(kw_only=True)
class TrainState:
    """All that must survive a crash, apart from weights and optimizer state."""

    step: int = 0
    """Optimizer steps that this run has made."""
    loader: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The loader's cursor and fingerprint."""
    best_metric: float | None = None
    """Best value of the primary metric in a validation so far; None before the first validation."""
    best_step: int = 0
    """The step of `best_metric`."""
    users_at_start: list[float] | None = None
    """Of a model that starts at a prior, each validation user's sum of the primary metric before the first step; None
    for others, and for runs that begin from another run's checkpoint."""
    validations_since_best: int = 0
    """Number of validations after `best_step`."""
    train_seconds: float = 0.0
    """Seconds spent in steps, over all restarts."""
    events: int = 0
    """Events of all histories read in steps, over all ranks and restarts."""
    scored: int = 0
    """Candidates of all requests scored in steps, over all ranks and restarts."""
    valid_requests: int | None = None
    """Requests of a validation, 0 = all; None before the first one."""
    steps_before: int = 0
    """Optimizer steps of the checkpoint from which a warm-started run began: the optimizers' own step counts continue
    from there."""
    peak_gib: float = 0.0
    """Sum over ranks of their peak resident memory in GiB, as of the last validation."""
    validation_due: bool = False
    """The step ends with a validation that has not been made: the run was asked to stop before its end."""
    finished: bool = False
    """Training has ended: all epochs are done, its time is over, or `patience` validations brought no improvement."""

    @property
    def updates(self) -> int:
        """Optimizer steps that led to the weights, including those before a warm start."""
        return self.steps_before + self.step


def remove_committed(path: Path) -> None:
    """Remove a directory; its COMMIT files go first: an interrupted removal leaves no partial checkpoint that looks
    complete. Does nothing if there is no such directory."""
    for commit in path.glob("**/COMMIT"):
        commit.unlink(missing_ok=True)
    if path.exists():
        shutil.rmtree(path)


def discard_unfinished(run_dir: Path) -> None:
    """Remove the directories that a killed run left without COMMIT. The caller is the only writer."""
    for path in run_dir.glob("step-*"):
        if not (path / "COMMIT").exists():
            remove_committed(path)


def checkpoint_bytes(table_rows: Iterable[tuple[int, int]], *, sparse: str, dense_parameters: int) -> int:
    """Bytes of one checkpoint: tables, given as (rows, width), with the state that `optimizer.sparse` keeps, and
    `dense_parameters` with two moments each."""
    state = (lambda width: 2 * width) if sparse == "adam" else (lambda width: 1)
    return 4 * (sum(rows * (width + state(width)) for rows, width in table_rows) + 3 * dense_parameters)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The committed checkpoint with the highest step; None if there is none."""
    found = committed_checkpoints(run_dir)
    return found[-1] if found else None


def committed_checkpoints(run_dir: Path) -> list[Path]:
    """Committed checkpoints, in the order of their steps."""
    return sorted(path.parent for path in run_dir.glob("step-*/COMMIT"))


def read_state(path: Path, *, checksums: bool = False) -> dict[str, Any]:
    """state.json of a committed checkpoint, after the size (with `checksums` also the checksum) of every file was
    compared with COMMIT. CheckpointError."""
    if not (path / "COMMIT").exists():
        raise CheckpointError(f"{path}: not a checkpoint (no COMMIT): give a step-XXXXXXXX directory of a run")
    problems = verify_checkpoint(path, checksums=checksums)
    if problems:
        raise CheckpointError(f"{problems[0]}: {_recovery_hint(path)}")
    try:
        return json.loads((path / "state.json").read_text())
    except ValueError as error:
        raise CheckpointError(f"{path / 'state.json'}: not valid JSON: {_recovery_hint(path)}") from error


def read_train_state(path: Path, *, checksums: bool = False) -> TrainState:
    """How far training was at a committed checkpoint, read like `read_state`."""
    return TrainState(**read_state(path, checksums=checksums)["train_state"])


def set_aside_damaged(run_dir: Path) -> list[str]:
    """Rename damaged checkpoints to damaged-step-XXXXXXXX, from the latest backwards to the first that is intact (all
    checksums are right). Returns one line for each renamed checkpoint.

    CheckpointError, with nothing renamed, if no checkpoint is intact.
    """
    damaged = []
    for path in reversed(committed_checkpoints(run_dir)):
        if not (problems := verify_checkpoint(path)):
            break
        damaged.append((path, problems[0]))
    else:
        if damaged:
            raise CheckpointError(f"{damaged[0][1]}; no checkpoint of {run_dir} is intact: start again with --name NEW")
    for path, _ in damaged:
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    return [f"{problem}: {path.name} is now damaged-{path.name}" for path, problem in damaged]


def checkpoint_key(path: Path) -> str:
    """Sixteen hex digits that identify the checkpoint's content: a hash over all checksums."""
    return hashlib.sha256((path / "COMMIT").read_bytes()).hexdigest()[:16]


def verify_checkpoint(path: Path, *, checksums: bool = True) -> list[str]:
    """Every difference between the files and COMMIT, one line each."""
    problems = []
    try:
        entries = [(path / entry["name"], entry["bytes"], entry["xxh64"]) for entry in _committed_files(path)]
    except (ValueError, TypeError, KeyError):
        return [f"{path / 'COMMIT'}: not a valid list of files (damaged or cut)"]
    for file, size, checksum in entries:
        if not file.exists():
            problems.append(f"{file}: missing")
        elif file.stat().st_size != size:
            problems.append(f"{file}: {file.stat().st_size} bytes instead of {size}")
        elif checksums and _checksum(file) != checksum:
            problems.append(f"{file}: checksum differs")
    return problems


def load_tables(path: Path, shards: Iterable[TableShard]) -> None:
    """Fill this rank's rows from a checkpoint written at any world size; rows that it lacks keep their values. Not a
    collective."""
    for shard in shards:
        last_row = shard.first_row + shard.weight.shape[0]
        for file in table_files(path, shard.table):
            with safe_open(file, framework="pt") as tensors:
                first_in_file = _first_row(file)
                rows = tensors.get_slice("weight").get_shape()[0]
                first, last = max(shard.first_row, first_in_file), min(last_row, first_in_file + rows)
                if first >= last:
                    continue
                source = slice(first - first_in_file, last - first_in_file)
                target = slice(first - shard.first_row, last - shard.first_row)
                for name, part in shard.tensors.items():
                    part[target] = tensors.get_slice(name)[source]


def table_files(path: Path, table: str) -> list[Path]:
    """The files of one table, in the order of their first rows."""
    return sorted(path.glob(f"table-{table}-{'[0-9]' * 12}.safetensors"))


def load_dense(path: Path) -> dict[str, Tensor]:
    """All tensors of dense.safetensors."""
    return load_file(path / "dense.safetensors")


def random_state() -> dict[str, str]:
    """This rank's random states, of the CPU and of its GPU if it uses one: device -> base64."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def restore_random_state(document: dict[str, Any]) -> None:
    """Restore this rank's random state. Does nothing if the checkpoint has another world size: then ranks continue with
    their own seeds."""
    if document["world_size"] != dist.get_world_size():
        return
    for name, encoded in document["random_states"][dist.get_rank()].items():
        state = torch.frombuffer(bytearray(base64.b64decode(encoded)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_initialized():
            torch.cuda.set_rng_state(state)


def describe_file(file: Path) -> dict[str, Any]:
    """Sync a file to the disk; returns its entry in COMMIT."""
    sync(file)
    return {"name": file.name, "bytes": file.stat().st_size, "xxh64": _checksum(file)}


def commit_files(path: Path, files: list[dict[str, Any]]) -> None:
    """Create COMMIT atomically: written under another name, synced, then linked."""
    staged = path / ".COMMIT.tmp"
    with staged.open("w") as stream:
        json.dump({"format_version": 1, "files": sorted(files, key=lambda file: file["name"])}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    os.link(staged, path / "COMMIT")
    staged.unlink()
    # Also sync both directories: older checkpoints are removed next, and this one must be on the disk by then.
    for directory in (path, path.parent):
        sync(directory)


def _recovery_hint(path: Path) -> str:
    """What the user can do about a damaged checkpoint, as part of a message."""
    before = [other.name for other in committed_checkpoints(path.parent) if other.name < path.name]
    return (
        f"remove {path} to continue from {before[-1]} (`solar train --from-previous` does both)"
        if before
        else f"remove {path}: there is no earlier checkpoint"
    )


def _committed_files(path: Path) -> list[dict[str, Any]]:
    files = json.loads((path / "COMMIT").read_text())["files"]
    if outside := [file["name"] for file in files if "/" in file["name"] or not is_inside(file["name"])]:
        raise ValueError(f"{outside[0]!r} is not the name of a file in the checkpoint")
    return files


def _first_row(file: Path) -> int:
    match = re.fullmatch(r"table-.*-(\d{12})", file.stem)
    assert match, file
    return int(match[1])


def _checksum(file: Path) -> str:
    digest = xxhash.xxh64()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
