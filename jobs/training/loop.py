"""The training loop: read `train` from top to bottom; everything it calls stands below or in a neighbour file.

Runs inside every worker of a Ray Train job (jobs/train.py starts it); every rank takes part in every line.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import resource
import time
from pathlib import Path
from typing import Any, Literal

import psutil
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
from jobs.training.clock import StepClock, cost_of_process
from jobs.training.dense_state import restore_dense_state
from jobs.training.evaluation import evaluate
from jobs.training.in_batch import InBatchNegatives
from jobs.training.model import (
    build_tower,
    catalogue_input,
    item_features,
    model_settings,
    table_specs,
    training_input,
    user_codes,
    user_features,
    user_tables,
)
from jobs.training.optimizers import OptimizerConfig
from jobs.training.parallel import ParallelConfig, dense_engine
from jobs.training.results import primary_metric
from jobs.training.tables import ShardedTables
from jobs.training.telemetry import Reporter, said_by_rank_0
from models.interface import ModelInput, Recommender, refuse_bad_rows
from models.losses import RequestLoss, calibrated_positive_weight, catalogue_loss, request_loss
from models.repeats import SeenItems
from pipeline.batch import Batch
from pipeline.loader import LoaderConfig, TrainLoader
from pipeline.requests import RequestConfig
from pipeline.shards import Shards
from pipeline.vocabulary import NUM_RESERVED


class NonFiniteLoss(ArithmeticError):
    """The loss is no number any more: nothing was updated with it; one line says of which users the batch was."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long to train, on what loss, and how often to look."""

    epochs: int = 10
    """Passes over all training requests."""
    loss: Literal["candidates", "catalogue"] = "candidates"
    """candidates: over each request's positives and negatives, weighed by the next two. catalogue: softmax over all
    items, for next_item and sequence models, whose requests are vectors; without data.requests.num_negatives."""
    pointwise_loss_weight: float = 1.0
    """Weight of the binary cross-entropy; 0 leaves the softmax over the drawn candidates."""
    set_loss_weight: float = 1.0
    """Weight of the set-wise softmax cross-entropy; 0 leaves the binary one."""
    gbce_strength: float = 0.0
    """t of gBCE (Petrov and Macdonald, RecSys 2023), from 0 (plain) to 1: how far positives weigh less in the binary
    cross-entropy to make up for negatives that are few."""
    log_q: bool = False
    """next_item: correct the loss for what negatives are drawn from; logits then estimate log p(item | history)."""
    embedding_std: float = 0.02
    """Standard deviation of an untrained embedding row."""
    eval_every_epochs: int = 1
    """Epochs between validations (and checkpoints); the best one is what is evaluated and registered."""
    valid_requests: int = 2000
    """Validation requests, the same ones each time; 0 = all."""
    patience: int = 0
    """Validations without a better one after which training ends; 0 = it goes on to the last epoch."""
    max_seconds: float = 0.0
    """Seconds of training steps, over all restarts, after which training ends with a validation; 0 = no limit. The
    learning rates end their fall there where this comes before the last step."""

    def __post_init__(self) -> None:
        for name in ("epochs", "eval_every_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be 1 or more")
        if not self.embedding_std > 0:
            raise ValueError(f"embedding_std={self.embedding_std}: must be above 0")
        for name in ("pointwise_loss_weight", "set_loss_weight", "valid_requests", "patience", "max_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more")
        if self.loss not in ("candidates", "catalogue"):
            raise ValueError(f"loss={self.loss!r}: must be candidates or catalogue")
        if not self.pointwise_loss_weight + self.set_loss_weight > 0:
            raise ValueError(
                "set_loss_weight=0: must be above 0 where pointwise_loss_weight is 0, or nothing is learned"
            )
        if not 0 <= self.gbce_strength <= 1:
            raise ValueError(f"gbce_strength={self.gbce_strength}: must be from 0 to 1")

    def share_done(self, *, step: int, num_steps: int, seconds: float) -> float:
        """Share of the training that is behind after so many steps and seconds of steps, from 0 to 1."""
        shares = [step / max(1, num_steps), seconds / self.max_seconds if self.max_seconds else 0.0]
        return min(1.0, max(shares))


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
    share = training.share_done(step=state.step, num_steps=num_steps, seconds=state.train_seconds)
    reporter.row("start", step=state.step, num_steps=num_steps, share=share)

    catalogue = catalogue_of(shards, requests=job.requests, training_count=counts)
    complete = InBatchNegatives(job.requests, item_counts=counts, seed=job.seed)
    batches, clock, num_items = iter(loader), StepClock(), shards.vocabulary.size
    while state.step < num_steps:
        started = time.perf_counter()
        with clock.part("data"):
            batch = complete(next(batches))
        figures = train_step(job, batch, tables, engine, num_items=num_items, step=state.step, share=share, clock=clock)
        state.step += 1
        state.events += int(figures["events"])
        state.loader = loader.state_dict()
        seconds = time.perf_counter() - started
        state.train_seconds += seconds
        if training.max_seconds:
            # One clock for all ranks: rates and the end follow it.
            state.train_seconds = said_by_rank_0(state.train_seconds)
        share = training.share_done(step=state.step, num_steps=num_steps, seconds=state.train_seconds)
        reporter.row("step", step=state.step, seconds=seconds, share=share, **clock.take(), **figures)

        out_of_time = bool(training.max_seconds) and state.train_seconds >= training.max_seconds
        validated = state.step in last_steps or out_of_time
        if validated:
            _validate(job, shards, catalogue, state, tables, engine, reporter)
        stop = reporter.should_stop()
        no_better = bool(training.patience) and state.validations_since_best >= training.patience
        state.finished = state.step == num_steps or out_of_time or no_better
        due = job.checkpoint.every_steps and state.step % job.checkpoint.every_steps == 0
        if due or stop or validated:
            path = save_checkpoint(
                run_dir, state, tables=tables, engine=engine, facts=job.facts, keep=job.checkpoint.keep
            )
            reporter.row("checkpoint", step=state.step, path=str(path))
        if stop or state.finished:
            break
    reporter.row("cost", step=state.step, **_cost())
    return state


def train_step(
    job: TrainJob,
    batch: Batch,
    tables: ShardedTables,
    engine: Any,
    *,
    num_items: int,
    step: int,
    share: float,
    clock: StepClock,
) -> dict[str, float]:
    """One optimizer step of both halves on one global batch; returns its mean losses, its events and the resident
    memory of all ranks (all ranks join). `step` were made before it, `share` of the training is done. NonFiniteLoss.

    TorchRec and DeepSpeed both average over ranks, so the local loss is world size x local sum / global count: then
    one rank and many ranks follow the same gradient, however unevenly requests fall.
    """
    world_size, count = dist.get_world_size(), max(1, batch.num_global_requests)
    lr_share = job.optimizer.lr_share_at(step, share_done=share)
    tables.begin_step(job.optimizer.sparse_lr * lr_share)
    for group in engine.optimizer.param_groups:
        group["lr"] = job.optimizer.dense_lr * lr_share

    loss = _loss(job.training, job.requests, batch, tables, engine, num_items=num_items, clock=clock)
    figures = _global_figures(loss, batch, count=count)
    if not math.isfinite(figures["loss"]):
        _refuse_non_finite(Path(job.run_dir), batch, loss=figures["loss"], step=step)
    with clock.part("dense"):
        engine.backward(loss.total * (world_size / count))
    with clock.part("optimizer"):
        engine.step()
        tables.end_step()
    return figures


def _global_figures(loss: RequestLoss, batch: Batch, *, count: int) -> dict[str, float]:
    """Mean losses over the requests of the global batch; its events; GiB. A collective."""
    sums = torch.stack([part.detach().double() for part in (loss.total, loss.pointwise, loss.setwise)]) / count
    sums = torch.cat([sums, sums.new_tensor([batch.num_events, psutil.Process().memory_info().rss / 2**30])])
    dist.all_reduce(sums)
    return dict(zip(("loss", "pointwise_loss", "setwise_loss", "events", "memory_gib"), sums.tolist(), strict=True))


def _refuse_non_finite(run_dir: Path, batch: Batch, *, loss: float, step: int) -> None:
    """Leave the rows of the global batch's users beside the checkpoints and raise NonFiniteLoss. All ranks join."""
    rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rows, batch.user.tolist())
    users = sorted(row for of_rank in rows for row in of_rank)
    found = {"step": step, "epoch": batch.epoch, "loss": str(loss), "user_rows": users}
    if dist.get_rank() == 0:
        (run_dir / "non-finite.json").write_text(json.dumps(found) + "\n")
    shown = ", ".join(map(str, users[:5])) + (f" and {len(users) - 5} more" if len(users) > 5 else "")
    latest = latest_checkpoint(run_dir)
    raise NonFiniteLoss(
        f"the loss of step {step + 1} is {loss}, of user rows {shown} ({run_dir / 'non-finite.json'}); the latest "
        f"checkpoint is {latest.name if latest else 'none yet'}: lower optimizer.dense_lr or sparse_lr in a new run"
    )


def _cost() -> dict[str, float]:
    """Of all ranks together. A collective."""
    cost = cost_of_process()
    sums = torch.tensor(list(cost.values()), dtype=torch.float64)
    dist.all_reduce(sums)
    return dict(zip(cost, sums.tolist(), strict=True))


def _loss(
    training: TrainingConfig,
    requests: RequestConfig,
    batch: Batch,
    tables: ShardedTables,
    engine: Any,
    *,
    num_items: int,
    clock: StepClock,
) -> RequestLoss:
    """Of this rank's requests; one look-up and one forward."""
    with clock.part("look_up"):
        if training.loss == "catalogue":
            rows = tables.look_up_with_users(torch.arange(num_items), user_codes(batch))
            refuse_bad_rows(*rows[:2])
            inputs = catalogue_input(batch, *rows)
        else:
            inputs = training_input(batch, tables)
    with clock.part("dense"):
        return _loss_of_inputs(training, requests, batch, inputs, engine, num_items=num_items)


def _loss_of_inputs(
    training: TrainingConfig, requests: RequestConfig, batch: Batch, inputs: ModelInput, engine: Any, *, num_items: int
) -> RequestLoss:
    if training.loss == "catalogue":
        state_BD, vector_ID, repeat_1 = engine(inputs, vectors=True)
        device = state_BD.device
        known = batch.candidate_item >= NUM_RESERVED
        request_P = torch.repeat_interleave(batch.candidate_offsets.diff())[known]
        positive_P = batch.candidate_item[known] - NUM_RESERVED
        return catalogue_loss(
            state_BD,
            vector_ID[NUM_RESERVED:],
            positive_P=positive_P.to(device),
            request_P=request_P.to(device),
            repeat_1=repeat_1,
            seen=None if repeat_1 is None else SeenItems.of_requests(inputs, first_item=NUM_RESERVED),
        )
    logits_M = engine(inputs)
    log_q_M = batch.candidate_log_q if training.log_q else None
    return request_loss(
        logits_M,
        label_M=batch.candidate_label.to(logits_M.device),
        candidate_offsets_B1=batch.candidate_offsets.to(logits_M.device),
        set_weight=training.set_loss_weight,
        pointwise_weight=training.pointwise_loss_weight,
        positive_weight=calibrated_positive_weight(
            training.gbce_strength, num_negatives=requests.num_negatives, num_items=num_items - NUM_RESERVED
        ),
        log_q_M=None if log_q_M is None else log_q_M.to(logits_M.device),
    )


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
    tables.restore_step(state.step)
    loader.load_state_dict(state.loader)
    restore_random_state(document)
    return state, tables, engine


def _peak_gib() -> float:
    """Resident memory of all ranks, each at its peak. A collective."""
    peak = torch.tensor([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20])
    dist.all_reduce(peak)
    return float(peak)


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
    state.peak_gib = _peak_gib()
    state.validations_since_best += 1
    if not math.isnan(primary) and (state.best_metric is None or primary > state.best_metric):
        state.best_metric, state.best_step, state.validations_since_best = primary, state.step, 0
    reporter.row("valid", step=state.step, seconds=time.perf_counter() - started, **metrics)
