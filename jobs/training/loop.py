"""The training loop: read `train` from top to bottom; everything it calls stands below or in a neighbour file.

Runs inside every worker of a Ray Train job (jobs/train.py starts it); every rank takes part in every line.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from jobs.training.catalogue import Catalogue, catalogue_of, training_counts
from jobs.training.checkpoint import (
    CheckpointConfig,
    TrainState,
    latest_checkpoint,
    load_dense,
    load_tables,
    read_state,
    restore_random_state,
    save_checkpoint,
)
from jobs.training.dense_state import restore_dense_state
from jobs.training.evaluation import evaluate
from jobs.training.in_batch import InBatchNegatives
from jobs.training.model import (
    build_tower,
    item_features,
    model_settings,
    table_specs,
    training_input,
    user_features,
    user_tables,
)
from jobs.training.optimizers import OptimizerConfig
from jobs.training.parallel import ParallelConfig, ShardedTables, dense_engine
from jobs.training.results import primary_metric
from jobs.training.telemetry import Reporter
from models.interface import Recommender
from models.losses import request_loss
from pipeline.batch import Batch
from pipeline.loader import LoaderConfig, TrainLoader
from pipeline.requests import RequestConfig
from pipeline.shards import Shards


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long to train, on what loss, and how often to look."""

    epochs: int = 10
    """Passes over all training requests."""
    set_loss_weight: float = 1.0
    """Weight of the set-wise softmax cross-entropy beside the binary cross-entropy."""
    log_q: bool = False
    """next_item: correct the loss for what negatives are drawn from; logits then estimate log p(item | history)."""
    embedding_std: float = 0.02
    """Standard deviation of an untrained embedding row."""
    eval_every_epochs: int = 1
    """Epochs between validations (and checkpoints); the best one is what is evaluated and registered."""
    valid_requests: int = 2000
    """Validation requests, the same ones each time; 0 = all."""

    def __post_init__(self) -> None:
        for name in ("epochs", "eval_every_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be 1 or more")
        if not self.embedding_std > 0:
            raise ValueError(f"embedding_std={self.embedding_std}: must be above 0")
        for name in ("set_loss_weight", "valid_requests"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Everything a worker needs; plain values, so that it travels."""

    run_dir: str
    shards: str
    manifest: int
    seed: int
    model: dict[str, Any]
    training: TrainingConfig
    requests: RequestConfig
    loader: LoaderConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig
    checkpoint: CheckpointConfig
    facts: dict[str, Any]
    """Stored with every checkpoint: the resolved config and the fingerprints."""


def train(job: TrainJob, *, reporter: Reporter) -> TrainState:
    """Train to the last epoch, or until the driver asks to stop; continues from the latest checkpoint of `run_dir`."""
    run_dir, training = Path(job.run_dir), job.training
    shards = Shards.open(job.shards, number=job.manifest)
    counts = training_counts(shards, requests=job.requests)
    loader = TrainLoader(
        shards,
        requests=job.requests,
        loader=job.loader,
        seed=job.seed,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        item_counts=counts,
    )
    batches_per_epoch = [loader.num_batches(epoch) for epoch in range(training.epochs)]
    num_steps = sum(batches_per_epoch)

    state, tables, engine = _create_or_restore(job, shards, loader)
    epoch_ends = list(itertools.accumulate(batches_per_epoch))
    last_steps = set(epoch_ends[training.eval_every_epochs - 1 :: training.eval_every_epochs])
    last_steps.add(num_steps)
    reporter.row("start", step=state.step, num_steps=num_steps)

    catalogue = catalogue_of(shards, requests=job.requests, training_count=counts)
    complete = InBatchNegatives(job.requests, item_counts=counts, seed=job.seed)
    batches = iter(loader)
    while state.step < num_steps:
        started = time.perf_counter()
        losses = train_step(job, complete(next(batches)), tables, engine, step=state.step, num_steps=num_steps)
        state.step += 1
        state.loader = loader.state_dict()
        state.train_seconds += time.perf_counter() - started
        reporter.row("step", step=state.step, seconds=time.perf_counter() - started, **losses)

        if state.step in last_steps:
            _validate(job, shards, catalogue, state, tables, engine, reporter)
        stop = reporter.should_stop()
        state.finished = state.step == num_steps
        due = job.checkpoint.every_steps and state.step % job.checkpoint.every_steps == 0
        if due or stop or state.step in last_steps:
            path = save_checkpoint(
                run_dir, state, tables=tables, engine=engine, facts=job.facts, keep=job.checkpoint.keep
            )
            reporter.row("checkpoint", step=state.step, path=str(path))
        if stop:
            break
    return state


def train_step(
    job: TrainJob, batch: Batch, tables: ShardedTables, engine: Any, *, step: int, num_steps: int
) -> dict[str, float]:
    """One optimizer step of both halves on one global batch; returns its mean losses (all ranks join).

    TorchRec and DeepSpeed both average over ranks, so the local loss is world size x local sum / global count: then
    one rank and many ranks follow the same gradient, however unevenly requests fall.
    """
    world_size, count = dist.get_world_size(), max(1, batch.num_global_requests)
    share = job.optimizer.lr_share_at(step, num_steps=num_steps)
    tables.set_learning_rate(job.optimizer.sparse_lr * share)
    for group in engine.optimizer.param_groups:
        group["lr"] = job.optimizer.dense_lr * share

    inputs = training_input(batch, tables)
    logits_M = engine(inputs)
    log_q_M = batch.candidate_log_q if job.training.log_q else None
    loss = request_loss(
        logits_M,
        label_M=batch.candidate_label.to(logits_M.device),
        candidate_offsets_B1=batch.candidate_offsets.to(logits_M.device),
        set_weight=job.training.set_loss_weight,
        log_q_M=None if log_q_M is None else log_q_M.to(logits_M.device),
    )
    engine.backward(loss.total * (world_size / count))
    engine.step()

    sums = torch.stack([part.detach().double() for part in (loss.total, loss.pointwise, loss.setwise)])
    dist.all_reduce(sums)
    return dict(zip(("loss", "pointwise_loss", "setwise_loss"), (sums / count).tolist(), strict=True))


def build_model(job: TrainJob, shards: Shards, *, checkpoint: Path | None) -> tuple[ShardedTables, Recommender]:
    """Sharded tables and an unwrapped tower: fresh from the seed, or with a checkpoint's weights. All ranks join."""
    vocabulary = shards.vocabulary
    tables = ShardedTables(
        table_specs(vocabulary, width=job.model["width"], user_features=user_features(job.model, vocabulary)),
        item_features(vocabulary),
        user_tables=user_tables(job.model, vocabulary),
        optimizer=job.optimizer,
        device=job.parallel.device,
    )
    tables.initialize(seed=job.seed, std=job.training.embedding_std)
    # Here and not earlier: sharding the tables draws random numbers, more or fewer of them by world size.
    torch.manual_seed(job.seed)
    tower = build_tower(model_settings(job.model, vocabulary), num_features=len(vocabulary.features))
    if checkpoint is not None:
        load_tables(checkpoint, tables.shards())
        dense = load_dense(checkpoint)
        tower.load_state_dict({name: dense[name] for name, _ in tower.named_parameters()})
    return tables, tower


def _create_or_restore(job: TrainJob, shards: Shards, loader: TrainLoader) -> tuple[TrainState, ShardedTables, Any]:
    checkpoint = latest_checkpoint(Path(job.run_dir))
    tables, tower = build_model(job, shards, checkpoint=checkpoint)
    engine = dense_engine(tower, optimizer=job.optimizer, parallel=job.parallel)
    # The weights above were drawn alike on every rank; dropout is not.
    torch.manual_seed(job.seed * 1_000_003 + dist.get_rank())
    if checkpoint is None:
        return TrainState(), tables, engine
    document = read_state(checkpoint)
    state = TrainState(**document["train_state"])
    restore_dense_state(engine, load_dense(checkpoint), num_steps=state.step)
    loader.load_state_dict(state.loader)
    restore_random_state(document)
    return state, tables, engine


def _validate(
    job: TrainJob,
    shards: Shards,
    catalogue: Catalogue,
    state: TrainState,
    tables: ShardedTables,
    engine: Any,
    reporter: Reporter,
) -> None:
    """Measure the validation part; remember the best step. The metrics are the same on every rank."""
    started = time.perf_counter()
    metrics = evaluate(
        engine,
        tables,
        shards,
        catalogue=catalogue,
        requests=job.requests,
        part="valid",
        limit=job.training.valid_requests or None,
        progress=lambda done, total: reporter.row("progress", stage="validation", done=done, total=total),
    ).metrics()
    primary = metrics[primary_metric(job.requests)]
    if not math.isnan(primary) and (state.best_metric is None or primary > state.best_metric):
        state.best_metric, state.best_step = primary, state.step
    reporter.row("valid", step=state.step, seconds=time.perf_counter() - started, **metrics)
