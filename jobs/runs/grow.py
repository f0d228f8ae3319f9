"""solar grow CHECKPOINT --shards DIR --out DIR: a checkpoint with tables as large as the vocabulary needs now.

    step-00000400/ of 4,096 rows        OUT/ of 8,192 rows
      table-item-000000000000    -->      table-item-000000000000     the same bytes (a hard link where possible)
      table-item-000000002048             table-item-000000002048     the same bytes
                                          table-item-000000004096     rows drawn from (seed, table, row), no state
      dense, state.json, COMMIT           dense: the same bytes; state.json, COMMIT: written anew

The result equals what a warm start from CHECKPOINT with the checkpoint's own seed creates in memory. New rows are
written in blocks, so the memory needed does not depend on the size of a table. OUT appears only when it is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jobs.config.reader import stored_config
from jobs.host.console import Console
from jobs.host.errors import UserError
from jobs.host.locks import sole_command
from jobs.training.checkpoint import (
    checkpoint_key,
    commit_files,
    describe_file,
    read_state,
    remove_committed,
    table_files,
)
from jobs.training.model import model_tables
from jobs.training.warm_start import find_checkpoint, misfit, stored_shapes
from models.embeddings import TableSpec, initial_rows
from pipeline.shards.dataset import Shards
from pipeline.shards.vocabulary_growth import beginnings_of
from pipeline.storage import absolute, sync

ROWS_AT_ONCE = 1 << 16


def grow(text: str, console: Console, *, shards_dir: str, out: str) -> Path:
    """Write the grown checkpoint; returns its path. UserError, DataError, CheckpointError: nothing was written."""
    if "://" in out:
        raise UserError(f"--out {out}: must be a local or shared directory, not a URI")
    # Check that the checkpoint fits these shards.
    checkpoint, target = find_checkpoint(text), Path(out)
    document = read_state(checkpoint, checksums=True)
    config = stored_config("grow", document["config"], str(checkpoint), [])
    shards = Shards.open(absolute(shards_dir))
    task, sparse = config.data.requests.task, config.optimizer.sparse
    if problem := misfit(checkpoint, document, model=config.model, task=task, sparse=sparse, shards=shards):
        raise UserError(f"{checkpoint}: {problem}")

    # Keep all files but state.json, add the new rows, and write state.json anew.
    specs = model_tables(config.model, shards.vocabulary)
    capacities = {each["name"]: each["capacity"] for each in document["tables"]}
    with _staged(target) as staging, console.stage("grow") as stage:
        files = _link_tables(checkpoint, staging)
        for spec in specs:
            first = capacities[spec.name]
            if spec.capacity > first:
                files.append(
                    _write_new_rows(
                        staging,
                        spec,
                        first=first,
                        like=table_files(checkpoint, spec.name)[0],
                        seed=config.seed,
                        std=config.training.embedding_std,
                        tell=lambda rows, spec=spec, first=first: stage.update(rows, spec.capacity - first, spec.name),
                    )
                )
        (staging / "state.json").write_text(
            json.dumps(_grown_state(document, checkpoint, shards, specs), indent=1, sort_keys=True)
        )
        commit_files(staging, [*files, describe_file(staging / "state.json")])
        grown = [
            f"{s.name} {capacities[s.name]:,} -> {s.capacity:,} rows" for s in specs if s.capacity > capacities[s.name]
        ]
        stage.result = ", ".join(grown) or "every table is large enough already"
    return target


@contextlib.contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A directory that becomes `target` if the block succeeds, and is removed if it fails.

    What a killed command left is removed by the next command with the same target.
    """
    work = target.with_name(f".{target.name}.growing")
    staging = work / "checkpoint"
    with sole_command(work, otherwise="name another --out"):
        # Checked under the lock: another command may have just written the same target.
        if target.exists():
            raise UserError(f"--out {target}: exists already: choose another directory, or remove it")
        try:
            remove_committed(staging)
            staging.mkdir()
            yield staging
            os.rename(staging, target)
            sync(target.parent)
        finally:
            remove_committed(staging)


def _link_tables(checkpoint: Path, staging: Path) -> list[dict[str, Any]]:
    """Link or copy all files but state.json; returns their entries in COMMIT. Their checksums were verified before."""
    kept = [
        entry for entry in json.loads((checkpoint / "COMMIT").read_text())["files"] if entry["name"] != "state.json"
    ]
    for entry in kept:
        source, copy = checkpoint / entry["name"], staging / entry["name"]
        try:
            os.link(source, copy)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                raise
            shutil.copyfile(source, copy)
            sync(copy)
    return kept


def _write_new_rows(
    staging: Path, spec: TableSpec, *, first: int, like: Path, seed: int, std: float, tell: Callable[[int], None]
) -> dict[str, Any]:
    """Write rows first..capacity - 1 of a table as one safetensors file, with the same optimizer state tensors as the
    file `like`, all zero. `tell` is called with the number of rows drawn so far."""
    file, num_rows = staging / f"table-{spec.name}-{first:012d}.safetensors", spec.capacity - first
    row_shapes = {name: shape[1:] for name, shape in stored_shapes(like).items()}
    # The header of the safetensors format: the tensors' types, shapes and places, padded to a multiple of 8 bytes.
    header, start = {}, 0
    for name in sorted(row_shapes, key=lambda name: name != "weight"):
        size = 4 * num_rows * math.prod(row_shapes[name])
        header[name] = {"dtype": "F32", "shape": [num_rows, *row_shapes[name]], "data_offsets": [start, start + size]}
        start += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    # The tensors, a block of rows at a time.
    with file.open("wb") as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        for name in header:
            for begin in range(first, spec.capacity, ROWS_AT_ONCE):
                shape = [min(ROWS_AT_ONCE, spec.capacity - begin), *row_shapes[name]]
                rows = np.zeros(shape, "<f4")
                if name == "weight":
                    drawn = initial_rows(
                        spec.name, seed=seed, first=begin, num_rows=shape[0], width=spec.width, std=std
                    )
                    rows[:] = drawn.numpy()
                    tell(begin + shape[0] - first)
                stream.write(rows.tobytes())
    return describe_file(file)


def _grown_state(document: dict[str, Any], checkpoint: Path, shards: Shards, specs: list[TableSpec]) -> dict[str, Any]:
    """The new state.json: the old one with the new data and tables, and where it was grown from."""
    manifest = shards.manifest
    config = {**document["config"], "data": {**document["config"]["data"], "shards": shards.path}}
    return {
        **document,
        "config": config,
        "manifest": manifest.number,
        "manifest_fingerprint": manifest.fingerprint,
        "vocabulary": beginnings_of(shards.vocabulary),
        "tables": [dataclasses.asdict(spec) for spec in specs],
        "grown_from": {
            "checkpoint": str(checkpoint.absolute()),
            "key": checkpoint_key(checkpoint),
            "manifest": document["manifest"],
            "manifest_fingerprint": document["manifest_fingerprint"],
            "tables": document["tables"],
        },
    }
