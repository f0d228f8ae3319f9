"""Warm start of a new run: which checkpoint a path names, and whether it fits the model and the data.

A vocabulary only grows and its rows never move, so yesterday's table is the first rows of today's. This is verified: a
checkpoint stores sizes and digests of the vocabulary of its rows. The rows themselves are loaded by
jobs/training/loop.py, or by `solar grow` (jobs/runs/grow.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from jobs.training.checkpoint import (
    CheckpointError,
    checkpoint_key,
    committed_checkpoints,
    read_state,
    read_train_state,
    table_files,
)
from jobs.training.model import model_settings, model_tables
from models.embeddings import ITEM_TABLE, TableSpec
from models.prior import PRIOR_PREFIX, Prior, Task
from models.zoo import build_tower, current_settings
from pipeline.events import DataError
from pipeline.shards.dataset import Shards
from pipeline.shards.vocabulary_growth import beginnings_of, first_difference

RECOVERY_HINT = "a run on these shards must start from scratch"
OPTIMIZER_ROWS = {"rowwise_adagrad": {"accumulator"}, "adam": {"exp_avg", "exp_avg_sq"}}
"""optimizer.sparse -> names of the tensors that it keeps for a table, besides the weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Begun:
    """The checkpoint from which a run begins."""

    path: Path
    key: str
    """Its `checkpoint_key`, which identifies the content: a path may get other content later."""


def find_checkpoint(text: str) -> Path:
    """The committed checkpoint that a path names: the path itself, or the best one of a run's directory.
    CheckpointError."""
    path = Path(text)
    if (path / "COMMIT").exists():
        return path
    if committed_checkpoints(path):
        return best_of(path)
    raise CheckpointError(
        f"{path}: no checkpoint there: give a committed step-XXXXXXXX directory, or the directory of a run that has one"
    )


def best_of(run_dir: Path) -> Path:
    """The checkpoint with the best validation metric so far; the latest one if that is missing. The run must have at
    least one checkpoint."""
    committed = committed_checkpoints(run_dir)
    best = run_dir / f"step-{read_train_state(committed[-1]).best_step:08d}"
    return best if best in committed else committed[-1]


def begin_from(text: str, *, model: Mapping[str, Any], task: Task, sparse: str, shards: Shards) -> Begun:
    """The checkpoint that a path names, after its checksums and its fit to the model and the data were verified.
    CheckpointError names in one line what does not fit."""
    path = find_checkpoint(text)
    document = read_state(path, checksums=True)
    if problem := misfit(path, document, model=model, task=task, sparse=sparse, shards=shards):
        raise CheckpointError(f"{path}: {problem}")
    return Begun(path=path, key=checkpoint_key(path))


def misfit(
    checkpoint: Path, document: Mapping[str, Any], *, model: Mapping[str, Any], task: Task, sparse: str, shards: Shards
) -> str | None:
    """Why a checkpoint (`document` is its state.json) cannot initialize this model on these shards; None = it can."""
    there = current_settings(document["config"]["model"])
    if (name := there["name"]) != model["name"]:
        return f"is of model {name}, not of {model['name']}: choose a checkpoint of that model"
    if name == "solar" and there["form"] != model["form"]:
        return f"has form {there['form']}, whose weights mean something else: set --model.form {there['form']}"
    specs = model_tables(model, shards.vocabulary)
    return (
        _other_tables(document, specs)
        or _other_optimizer(checkpoint, specs, sparse=sparse)
        or _other_vocabulary(document, shards)
        or _other_tower(checkpoint, model, shards, task=task)
    )


def stored_shapes(file: Path) -> dict[str, list[int]]:
    """{name: shape} of the tensors in a safetensors file; reads only its header."""
    with safe_open(file, framework="pt") as tensors:
        names = tensors.keys()
        return {name: list(tensors.get_slice(name).get_shape()) for name in names}


def _other_tables(document: Mapping[str, Any], specs: Sequence[TableSpec]) -> str | None:
    there = {each["name"]: TableSpec(**each) for each in document["tables"]}
    for spec in specs:
        old = there.pop(spec.name, None)
        if old is None:
            return f"has no table {spec.name}, which came with later data or settings: {RECOVERY_HINT}"
        if old.width != spec.width:
            key = "width" if spec.name == ITEM_TABLE else "feature_width"
            return f"table {spec.name} has width {old.width}, this model's has {spec.width}: set --model.{key} back"
        if old.capacity > spec.capacity:
            return (
                f"table {spec.name} has {old.capacity} rows, more than the {spec.capacity} of these shards: "
                f"{RECOVERY_HINT}"
            )
    if there:
        return f"has a table {next(iter(there))} that this model lacks: {RECOVERY_HINT}"
    return None


def _other_optimizer(checkpoint: Path, specs: Sequence[TableSpec], *, sparse: str) -> str | None:
    for spec in specs:
        for file in table_files(checkpoint, spec.name):
            kept = set(stored_shapes(file)) - {"weight"}
            if kept != OPTIMIZER_ROWS[sparse]:
                return (
                    f"{file.name} has {', '.join(sorted(kept))}, not the state of optimizer.sparse={sparse}: "
                    "set --optimizer.sparse to the value of the checkpoint"
                )
    return None


def _other_vocabulary(document: Mapping[str, Any], shards: Shards) -> str | None:
    beginnings = document.get("vocabulary")
    if beginnings is None:
        # A checkpoint of an earlier version, which stored no digests: compare with its manifest if that still exists.
        try:
            then = Shards.open(shards.path, number=document["manifest"])
        except DataError:
            then = None
        if then is None or then.manifest.fingerprint != document["manifest_fingerprint"]:
            return (
                f"does not describe its vocabulary, and its manifest {document['manifest']} "
                f"({document['manifest_fingerprint']}) is not among those of {shards.path}: {RECOVERY_HINT}"
            )
        beginnings = beginnings_of(then.vocabulary)
    difference = first_difference(beginnings, shards.vocabulary)
    if difference is None:
        return None
    return f"its vocabulary is not the beginning of that of {shards.path} ({difference}): {RECOVERY_HINT}"


def _other_tower(checkpoint: Path, model: Mapping[str, Any], shards: Shards, *, task: Task) -> str | None:
    vocabulary = shards.vocabulary
    tower = build_tower(model_settings(model, vocabulary), num_features=len(vocabulary.features))
    parameters = [*tower.named_parameters()]
    if model.get("prior"):
        parameters += [(f"{PRIOR_PREFIX}{name}", each) for name, each in Prior(task).named_parameters()]
    here = {name: list(parameter.shape) for name, parameter in parameters}
    # Names with a slash (NAME/exp_avg) are optimizer state.
    there = {name: shape for name, shape in stored_shapes(checkpoint / "dense.safetensors").items() if "/" not in name}
    for name in [*here, *there]:
        if here.get(name) != there.get(name):
            sides = [str(side.get(name, "absent")) for side in (there, here)]
            return (
                f"parameter {name} is {sides[0]} in the checkpoint and {sides[1]} in this model: choose a checkpoint "
                f"with the model's settings, actions and features; otherwise {RECOVERY_HINT}"
            )
    return None
