"""A data set on two days, the second with more of everything, and checkpoints of its models written without ranks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.torch import load_file, save_file

from jobs.config.reader import load_config
from jobs.config.run_config import RunConfig
from jobs.host.documents import as_json
from jobs.runs.record import run_facts
from jobs.training.checkpoint import commit_files, describe_file
from jobs.training.model import model_settings, model_tables, user_features
from models.embeddings import TableSpec, initial_rows
from models.zoo import build_tower
from pipeline.batches.requests import RequestConfig
from pipeline.build import PrepareConfig, index_requests, prepare
from pipeline.shards.dataset import Shards
from pipeline.shards.vocabulary import NUM_RESERVED
from pipeline.shards.vocabulary_growth import beginnings_of
from tests.support.tiny import NUM_ITEMS, NUM_USERS, write_tiny_log, write_tiny_recipe

MOMENTS = ("exp_avg", "exp_avg_sq")


def first_day(directory: Path, *requests: RequestConfig) -> Shards:
    """The tiny log as shards."""
    return _prepare(write_tiny_log(directory / "log"), directory, requests)


def second_day(directory: Path, *requests: RequestConfig) -> Shards:
    """The same directory a day later: 20 users, 70 items, 12 genres and 8 tastes more, so that every table grows."""
    rng = np.random.default_rng(5)
    rows = [
        (user, 100 + int(rng.integers(NUM_ITEMS + 70)), 2_000_000 + 5_000 * place, int(rng.random() < 0.4), place // 3)
        for user in range(NUM_USERS, NUM_USERS + 20)
        for place in range(24)
    ]
    rows += [(0, 100 + item, 3_000_000 + item, 0, 900 + item) for item in range(NUM_ITEMS, NUM_ITEMS + 70)]
    events = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "label", "request_id"], orient="row")
    events = events.with_columns((pl.col("timestamp") * 1000).cast(pl.Datetime("ms", "UTC")))
    events.write_parquet(directory / "log" / "events-00001.parquet")
    items, users = directory / "items-2.parquet", directory / "users-2.parquet"
    new = range(NUM_ITEMS, NUM_ITEMS + 70)
    pl.DataFrame({"item_id": [100 + i for i in new], "genres": [[f"new{i % 12}"] for i in new]}).write_parquet(items)
    people = range(NUM_USERS, NUM_USERS + 20)
    pl.DataFrame({"user_id": people, "taste": [f"taste{user % 8}" for user in people]}).write_parquet(users)
    return _prepare(directory / "log", directory, requests, items=str(items), users=str(users))


def _prepare(
    log: Path,
    directory: Path,
    requests: tuple[RequestConfig, ...],
    *,
    items: str | None = None,
    users: str | None = None,
) -> Shards:
    shards = str(directory / "shards")
    prepare(str(log), shards, config=PrepareConfig(buckets=3, row_group_events=200), items=items, users=users)
    for config in requests:
        index_requests(Shards.open(shards), config=config)
    return Shards.open(shards)


def tiny_config(directory: Path, *arguments: str, name: str = "tiny") -> RunConfig:
    """The tiny recipe over the shards of `directory`."""
    recipe = write_tiny_recipe(directory / "tiny.yaml", workspace=directory / "workspace", events=directory / "log")
    return load_config("train", str(recipe), ["--data.shards", str(directory / "shards"), "--name", name, *arguments])


def facts_of(config: RunConfig, shards: Shards, **more: Any) -> dict[str, Any]:
    """What the driver of a run has stored with its checkpoints."""
    return {**as_json(run_facts(config, shards)), "vocabulary": beginnings_of(shards.vocabulary), **more}


def specs_of(config: RunConfig, shards: Shards) -> list[TableSpec]:
    return model_tables(config.model, shards.vocabulary)


def sizes_of(config: RunConfig, shards: Shards) -> dict[str, int]:
    """{table: rows in use}."""
    vocabulary = shards.vocabulary
    sizes = {"item": vocabulary.size, **{name: feature.size for name, feature in vocabulary.features.items()}}
    for name in user_features(config.model, vocabulary):
        sizes[f"user-{name}"] = len(vocabulary.user_features[name]) + NUM_RESERVED
    return sizes


def write_model_checkpoint(path: Path, config: RunConfig, shards: Shards, *, step: int = 8) -> Path:
    """A checkpoint as a run of two ranks writes it: used rows random, unused ones as they were drawn."""
    path.mkdir(parents=True)
    specs, sizes = specs_of(config, shards), sizes_of(config, shards)
    for spec in specs:
        weight = initial_rows(
            spec.name, seed=config.seed, first=0, num_rows=spec.capacity, width=spec.width,
            std=config.training.embedding_std,
        )  # fmt: skip
        weight[: sizes[spec.name]] = torch.randn(sizes[spec.name], spec.width)
        widths = (
            {"accumulator": ()}
            if config.optimizer.sparse == "rowwise_adagrad"
            else dict.fromkeys(MOMENTS, (spec.width,))
        )
        tensors = {"weight": weight, **{name: torch.rand(spec.capacity, *width) for name, width in widths.items()}}
        half = spec.capacity // 2
        for first, last in ((0, half), (half, spec.capacity)):
            part = {name: tensor[first:last].clone() for name, tensor in tensors.items()}
            save_file(part, path / f"table-{spec.name}-{first:012d}.safetensors")
    vocabulary = shards.vocabulary
    tower = build_tower(model_settings(config.model, vocabulary), num_features=len(vocabulary.features))
    dense = {name: parameter.detach().clone() for name, parameter in tower.named_parameters()}
    moments = {f"{name}/{moment}": torch.zeros_like(dense[name]) for name in dense for moment in MOMENTS}
    save_file({**dense, **moments}, path / "dense.safetensors")
    document = {
        **facts_of(config, shards),
        "train_state": {"step": step, "best_step": step},
        "world_size": 2,
        "random_states": ["", ""],
        "tables": [dataclasses.asdict(spec) for spec in specs],
        "sharding_plan": "",
    }
    return commit(path, document)


def commit(path: Path, document: dict[str, Any]) -> Path:
    """Write state.json, and COMMIT for what stands there."""
    (path / "COMMIT").unlink(missing_ok=True)
    (path / "state.json").write_text(json.dumps(document))
    commit_files(path, [describe_file(file) for file in sorted(path.iterdir())])
    return path


def rewrite(path: Path, **changes: Any) -> Path:
    """The checkpoint with other facts in its state.json; one that is None is taken out."""
    document = {**json.loads((path / "state.json").read_text()), **changes}
    return commit(path, {key: value for key, value in document.items() if value is not None})


def whole_table(path: Path, table: str) -> dict[str, torch.Tensor]:
    """A table as its files hold it."""
    files = [load_file(file) for file in sorted(path.glob(f"table-{table}-{'[0-9]' * 12}.safetensors"))]
    return {name: torch.cat([file[name] for file in files]) for name in files[0]}
