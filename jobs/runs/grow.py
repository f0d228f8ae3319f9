"""solar grow CHECKPOINT --shards DIR --out DIR: a checkpoint whose tables are as large as the vocabulary asks for now.

    step-00000400/ of 4,096 rows        OUT/ of 8,192 rows
      table-item-000000000000    -->      table-item-000000000000     the same bytes (a hard link where possible)
      table-item-000000002048             table-item-000000002048     the same bytes
                                          table-item-000000004096     rows drawn from (seed, table, row), no state
      dense, state.json, COMMIT           dense; state.json, COMMIT anew

What is written is what a warm start of CHECKPOINT with its own seed makes in memory. Rows are written as they are
drawn: memory does not follow the size of a table. Nothing is at OUT before all of it is.
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
    """Write the grown checkpoint; returns where it is. UserError, DataError, CheckpointError: nothing was written."""
    if "://" in out:
        raise UserError(f"--out {out}: must be a local or shared directory, not a URI")
    checkpoint, target = find_checkpoint(text), Path(out)
    document = read_state(checkpoint, checksums=True)
    config = stored_config("grow", document["config"], str(checkpoint), [])
    shards = Shards.open(absolute(shards_dir))
    if problem := misfit(checkpoint, document, model=config.model, sparse=config.optimizer.sparse, shards=shards):
        raise UserError(f"{checkpoint}: {problem}")
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
        stage.result = ", ".join(grown) or "every table is large enough"
    return target


@contextlib.contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A directory that becomes `target` as a whole if nothing fails inside; else nothing of it stays.

    What a killed command left is removed by the next one of the same target.
    """
    work = target.with_name(f".{target.name}.growing")
    staging = work / "checkpoint"
    with sole_command(work, otherwise="name another --out"):
        # Whoever wrote the same target held this lock.
        if target.exists():
            raise UserError(f"--out {target}: is there already: name a directory that is not, or remove it")
        try:
            remove_committed(staging)
            staging.mkdir()
            yield staging
            os.rename(staging, target)
            sync(target.parent)
        finally:
            remove_committed(staging)


def _link_tables(checkpoint: Path, staging: Path) -> list[dict[str, Any]]:
    """All files but state.json; what COMMIT says of them. They were checked against it."""
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
    """Rows first..capacity - 1 of a table with the state of `like`, all zero, as one safetensors file. `tell` hears how
    many were drawn."""
    file, num_rows = staging / f"table-{spec.name}-{first:012d}.safetensors", spec.capacity - first
    of_row = {name: shape[1:] for name, shape in stored_shapes(like).items()}
    header, start = {}, 0
    for name in sorted(of_row, key=lambda name: name != "weight"):
        size = 4 * num_rows * math.prod(of_row[name])
        header[name] = {"dtype": "F32", "shape": [num_rows, *of_row[name]], "data_offsets": [start, start + size]}
        start += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with file.open("wb") as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        for name in header:
            for begin in range(first, spec.capacity, ROWS_AT_ONCE):
                shape = [min(ROWS_AT_ONCE, spec.capacity - begin), *of_row[name]]
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
    """state.json: as it was, of the new data and tables, with where it comes from."""
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
