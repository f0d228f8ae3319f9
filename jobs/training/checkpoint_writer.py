"""Writes checkpoints while training continues: a step waits only for a copy in memory, and threads write that copy.

    begin    all ranks: each copies its table rows and its part of the dense state in memory
    write    one thread per rank: each writes its table rows, then they gather the dense state, one parameter at a time;
             then rank 0's thread alone writes dense.safetensors, state.json and COMMIT, and removes old checkpoints
    settle   all ranks: report the checkpoint if it is written, raise if writing failed

The threads use a process group of their own, so that their collectives never mix with those of the steps.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from jobs.cluster.telemetry import said_by_rank_0
from jobs.training.checkpoint import (
    CheckpointError,
    CheckpointNotWritten,
    TrainState,
    commit_files,
    committed_checkpoints,
    describe_file,
    random_state,
    remove_committed,
)
from jobs.training.dense_model import DenseModel
from jobs.training.dense_state import DenseFragment, gather_dense_state
from jobs.training.job import CheckpointConfig
from jobs.training.placement import available_memory, local_world_size
from jobs.training.tables import ShardedTables, TableShard

T = TypeVar("T")

SLOWEST_DISK = datetime.timedelta(hours=12)
"""Longest time for which the writing threads wait for each other; a rank that dies is noticed at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Copied:
    """The data that one rank has to write; training does not change it."""

    path: Path
    train_state: Mapping[str, Any]
    shards: list[TableShard]
    random_state: dict[str, str]
    dense: list[DenseFragment]


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time; a context manager that all ranks enter and leave.

    The constructor and all methods are collectives. If one rank cannot write a checkpoint, its directory is removed and
    all ranks raise the same CheckpointError, in `settle` or in the next `begin`.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        tables: ShardedTables,
        dense: DenseModel,
        facts: Mapping[str, Any],
        config: CheckpointConfig,
        tell: Callable[..., None] = lambda **figures: None,
    ) -> None:
        """`facts` (config, fingerprints) go into every state.json; `tell(step=, path=, stall_seconds=, write_seconds=,
        bytes=)` is called for each committed checkpoint."""
        self._run_dir, self._tables, self._dense = run_dir, tables, dense
        self._facts, self._config, self._tell = facts, config, tell
        self._group: Any = dist.new_group(backend="gloo", timeout=SLOWEST_DISK)
        self._buffers: dict[tuple[str, int, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._figures: dict[str, Any] = {}
        self._error: BaseException | None = None
        self._latest = time.monotonic()
        if config.asynchronous:
            self._require_memory()
            self._buffers = {
                (shard.table, shard.first_row, name): torch.zeros_like(part, device="cpu", pin_memory=part.is_cuda)
                for shard in tables.shards()
                for name, part in shard.tensors.items()
            }

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        # This group of workers must hold the run directory's lock until its threads have finished.
        if self._thread is not None:
            self._thread.join()
        dist.destroy_process_group(self._group)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step by `every_steps` or, on rank 0's clock, by `every_minutes`. A
        collective."""
        if self._config.every_steps and step % self._config.every_steps == 0:
            return True
        minutes = self._config.every_minutes
        return bool(minutes and said_by_rank_0(time.monotonic() - self._latest >= 60 * minutes))

    def begin(self, state: TrainState, *, last: bool = False) -> None:
        """Wait until the previous checkpoint is written, then begin `step-XXXXXXXX`. The `last` one, after which
        training ends, needs no copy: it is written before this returns."""
        started = time.perf_counter()
        # All ranks: one checkpoint at a time.
        self.settle(wait=True)
        direct = last or not self._config.asynchronous
        # Each rank: copy its rows and its part of the dense state.
        copied = _Copied(
            path=self._run_dir / f"step-{state.step:08d}",
            train_state=dataclasses.asdict(state),
            shards=[shard if direct else self._copy(shard) for shard in self._tables.shards() if len(shard.weight)],
            random_state=random_state(),
            dense=self._dense.local_state(),
        )
        # Each rank: its thread writes, and joins collectives of its own group.
        self._thread = threading.Thread(target=self._work, args=(copied,), name="solar-checkpoint", daemon=True)
        self._figures = {"step": state.step, "path": str(copied.path)}
        self._thread.start()
        if direct:
            self._thread.join()
        self._figures["stall_seconds"] = time.perf_counter() - started
        self._latest = time.monotonic()
        if direct:
            self.settle(wait=True)

    def settle(self, *, wait: bool = False) -> None:
        """Report the checkpoint under way if it is written by now (rank 0 decides); with `wait`, wait for it first.
        CheckpointError if it could not be written. A collective."""
        if self._thread is None or not (wait or said_by_rank_0(not self._thread.is_alive())):
            return
        self._thread.join()
        self._thread = None
        if self._error is not None:
            raise self._error
        self._tell(**self._figures)

    def _copy(self, shard: TableShard) -> TableShard:
        """The shard, copied to the constructor's buffers: allocation in a step would cost more than the copy."""

        def copy(name: str, tensor: Tensor) -> Tensor:
            return self._buffers[shard.table, shard.first_row, name].copy_(tensor)

        state = {name: copy(name, tensor) for name, tensor in shard.state.items()}
        return dataclasses.replace(shard, weight=copy("weight", shard.weight), state=state)

    def _require_memory(self) -> None:
        """CheckpointError on all ranks if some machine has no free memory for the copies of its ranks. A collective."""
        parts = [part for shard in self._tables.shards() for part in shard.tensors.values()]
        ours = sum(part.numel() * part.element_size() for part in parts)
        needed = ours * local_world_size()
        missing = torch.tensor(max(0, needed - available_memory()) >> 20)
        dist.all_reduce(missing, op=dist.ReduceOp.MAX)
        if missing:
            raise CheckpointError(
                f"checkpoint.asynchronous=true: a machine is {missing} MiB short of memory for the copy of its tables: "
                "set --checkpoint.asynchronous false, or spread the tables over more machines"
            )

    def _work(self, copied: _Copied) -> None:
        started = time.perf_counter()
        try:
            written = self._write(copied)
        except BaseException as error:  # raised by `settle`, on the thread that trains
            self._error = error
        else:
            self._figures |= {"write_seconds": time.perf_counter() - started, "bytes": written}

    def _write(self, copied: _Copied) -> int:
        """Write and commit the checkpoint; returns its bytes, over all ranks. A collective of the threads."""
        path = copied.path

        def begin() -> None:
            remove_committed(path)
            path.mkdir(parents=True)

        def write_tables() -> tuple[list[dict[str, Any]], dict[str, str]]:
            return [_save_table(path, shard) for shard in copied.shards], copied.random_state

        def finish() -> int:
            document = {
                **self._facts,
                "train_state": copied.train_state,
                "world_size": dist.get_world_size(),
                "random_states": [drawn for _, drawn in written],
                "tables": [dataclasses.asdict(spec) for spec in self._tables.specs],
                "sharding_plan": str(self._tables.plan),
            }
            save_file(dense, path / "dense.safetensors")
            (path / "state.json").write_text(json.dumps(document, indent=1, sort_keys=True))
            files = [file for part, _ in written for file in part]
            files += [describe_file(path / "dense.safetensors"), describe_file(path / "state.json")]
            commit_files(path, files)
            _remove_old(
                self._run_dir,
                keep=self._config.keep,
                protected={copied.train_state["best_step"], copied.train_state["step"]},
            )
            return sum(file["bytes"] for file in files)

        # Rank 0: create the directory.
        self._agreed(path, begin, first_rank_only=True)
        # All ranks: write their own table rows.
        written = self._agreed(path, write_tables)
        # All ranks: gather the dense state, which rank 0 writes.
        dense = dict(gather_dense_state(copied.dense, group=self._group))
        # Rank 0: write dense.safetensors and state.json, commit, remove old checkpoints.
        return self._agreed(path, finish, first_rank_only=True)[0]

    def _agreed(self, path: Path, write: Callable[[], T], *, first_rank_only: bool = False) -> list[T]:
        """Call `write` (on rank 0 alone with `first_rank_only`); returns the results of all ranks. If it fails on one
        rank, all ranks raise CheckpointNotWritten. A collective of the threads."""
        result, problem = None, None
        try:
            if dist.get_rank() == 0 or not first_rank_only:
                result = write()
        except Exception as error:  # any error must reach the all_gather below, where the other ranks wait
            problem = " ".join((getattr(error, "strerror", None) or f"{type(error).__name__}: {error}").split())
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (result, problem), group=self._group)
        found = next((text for _, text in gathered if text), None)
        if found is None:
            return [each for each, _ in gathered]
        if dist.get_rank() == 0 and not (path / "COMMIT").exists():
            shutil.rmtree(path, ignore_errors=True)
        raise CheckpointNotWritten(
            f"{path}: not written: {found}: make room (or make it writable) and continue with --resume; "
            "earlier checkpoints are intact"
        )


def _save_table(path: Path, shard: TableShard) -> dict[str, Any]:
    file = path / f"table-{shard.table}-{shard.first_row:012d}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in shard.tensors.items()}, file)
    return describe_file(file)


def _remove_old(run_dir: Path, *, keep: int, protected: set[int]) -> None:
    """Remove all committed checkpoints but the latest `keep` and those of the `protected` steps."""
    for path in committed_checkpoints(run_dir)[:-keep]:
        if int(path.name.removeprefix("step-")) not in protected:
            remove_committed(path)
