"""The training loop: read `train` from top to bottom; everything it calls is below or in a file of this folder.

Runs inside every worker of a Ray Train job (jobs/runs/train.py starts it). Every rank runs every line: calls that
communicate are collectives of all ranks.
"""

from __future__ import annotations

import functools
import itertools
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from jobs.cluster.telemetry import Reporter, said_by_rank_0
from jobs.training.catalogue import catalogue_of, evidence_counts, training_counts
from jobs.training.checkpoint import (
    TrainState,
    latest_checkpoint,
    load_dense,
    load_tables,
    read_state,
    restore_random_state,
)
from jobs.training.checkpoint_writer import CheckpointWriter
from jobs.training.clock import StepClock, cost_of_process
from jobs.training.dense_model import DenseModel
from jobs.training.in_batch import InBatchNegatives
from jobs.training.item_counting import count_items
from jobs.training.job import TrainingConfig, TrainJob
from jobs.training.model import item_features, model_settings, model_tables, user_tables
from jobs.training.prior_fit import fit_prior
from jobs.training.step import AskedBatch, NonFiniteLoss, ask, train_step
from jobs.training.tables import ShardedTables
from jobs.training.validation import Validation
from models.interface import Recommender
from models.prior import PRIOR_PREFIX, Prior, PriorModel
from models.zoo import build_tower
from pipeline.batches.loader import TrainLoader
from pipeline.shards.dataset import Shards


def train(job: TrainJob, *, reporter: Reporter) -> TrainState:
    """Train to the end (last epoch, `max_seconds` or `patience`), or until the driver asks to stop. Continues from the
    latest checkpoint of `run_dir`, if there is one. A collective: all ranks take part."""
    # All ranks: open the data and count the training positives of every item, each rank in its row groups.
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
        pin=job.parallel.device == "cuda",
    )
    batches_per_epoch = [loader.num_batches(epoch) for epoch in range(training.epochs)]
    num_steps = sum(batches_per_epoch)

    # All ranks: create the model, from scratch or from a checkpoint, and find the steps that end with a validation.
    state, tables, dense = _create_or_restore(job, shards, loader, training_count=counts)
    epoch_ends = list(itertools.accumulate(batches_per_epoch))
    last_steps = set(epoch_ends[training.eval_every_epochs - 1 :: training.eval_every_epochs])
    last_steps.add(num_steps)
    share = training.share_done(step=state.step, num_steps=num_steps, seconds=state.train_seconds)
    reporter.row("start", step=state.step, num_steps=num_steps, share=share, workers=dist.get_world_size())
    reporter.row("plan", **tables.described_plan)

    # All ranks: prepare validation, and the two functions that read a batch and begin its look-up.
    catalogue = catalogue_of(shards, requests=job.requests, training_count=counts)
    validation = Validation(job, shards, catalogue, planned_scores=_planned_scores(job, loader))
    add_negatives = InBatchNegatives(job.requests, item_counts=counts, seed=job.seed)
    batches, clock, num_items = iter(loader), StepClock(), shards.vocabulary.size

    def read_and_ask() -> AskedBatch:
        with clock.part("data"):
            batch = add_negatives(next(batches))
        with clock.part("look_up"):
            return ask(job, batch, tables, num_items=num_items, loader_state=loader.state_dict())

    def ask_next() -> AskedBatch | None:
        # With overlap the next batch's look-up begins during this step; the last step has no next batch.
        return read_and_ask() if job.parallel.overlap and state.step + 1 < num_steps else None

    checkpoints = CheckpointWriter(
        run_dir, tables=tables, dense=dense, facts=job.facts, config=job.checkpoint,
        tell=functools.partial(reporter.row, "checkpoint"),
    )  # fmt: skip

    def conclude() -> bool:
        """All ranks: validate if that is due; agree whether the run ends here; begin a checkpoint together."""
        validated = state.validation_due and validation.run(state, tables, dense.model, reporter)
        if validated:
            state.validation_due = False
        stop = reporter.should_stop()
        no_better = 0 < training.patience <= state.validations_since_best and state.step > 0
        is_last = state.step == num_steps or _out_of_time(training, state) or no_better
        state.finished = is_last and not state.validation_due
        if stop or validated or checkpoints.due(state.step):
            checkpoints.begin(state, last=stop or state.finished)
        return stop or state.finished

    asked: AskedBatch | None = None
    with checkpoints:
        if dense.starts_at_prior and state.best_metric is None and state.step == 0:
            # A model with a prior is of use before its first step, which may stay the best one.
            state.validation_due, state.loader = True, loader.state_dict()
        # Also where a run was stopped in a validation.
        ended = state.validation_due and conclude()
        while not ended and state.step < num_steps:
            # Step, all ranks: forward, backward and update; `asked` becomes the next batch if its look-up has begun.
            started = time.perf_counter()
            asked = asked or read_and_ask()
            state.loader = asked.loader_state
            try:
                figures, asked = train_step(
                    job, asked, tables, dense,
                    num_items=num_items, step=state.step, share=share, clock=clock, ask_next=ask_next,
                )  # fmt: skip
            except NonFiniteLoss as error:
                checkpoints.settle(wait=True)
                raise _with_recovery_hint(error, run_dir) from None

            # Each rank counts alike; with a time limit, all ranks take the time of rank 0, so that they end together.
            state.step += 1
            state.events += int(figures["events"])
            state.scored += int(figures["scored"])
            seconds = time.perf_counter() - started
            state.train_seconds += seconds
            if training.max_seconds:
                state.train_seconds = said_by_rank_0(state.train_seconds)
            share = training.share_done(step=state.step, num_steps=num_steps, seconds=state.train_seconds)
            reporter.row("step", step=state.step, seconds=seconds, share=share, **clock.take(), **figures)

            # All ranks: report a checkpoint that is written by now; validate at the end of an epoch or of the time.
            checkpoints.settle()
            state.validation_due = state.step in last_steps or _out_of_time(training, state)
            ended = conclude()
    # All ranks: complete the look-up that the last step began, so that no collective is left open.
    if asked is not None:
        asked.rows.receive()
    reporter.row("cost", step=state.step, **_cost())
    dense.destroy()
    return state


def _out_of_time(training: TrainingConfig, state: TrainState) -> bool:
    return bool(training.max_seconds) and state.train_seconds >= training.max_seconds


def _planned_scores(job: TrainJob, loader: TrainLoader) -> int:
    """About how many candidates are scored between two validations; 0 where a limit of time decides."""
    if job.training.max_seconds:
        return 0
    candidates = 1 + job.requests.num_negatives + job.requests.history_negatives
    return job.training.eval_every_epochs * loader.num_requests(0) * candidates


def _with_recovery_hint(error: NonFiniteLoss, run_dir: Path) -> NonFiniteLoss:
    """The error, with the latest checkpoint and advice in its message."""
    latest = latest_checkpoint(run_dir)
    return NonFiniteLoss(
        f"{error}; the latest checkpoint is {latest.name if latest else 'none yet'}: "
        "lower optimizer.dense_lr or sparse_lr in a new run"
    )


def _cost() -> dict[str, float]:
    """The resources used by all ranks together. A collective."""
    cost = cost_of_process()
    sums = torch.tensor(list(cost.values()), dtype=torch.float64)
    dist.all_reduce(sums)
    return dict(zip(cost, sums.tolist(), strict=True))


def build_model(
    job: TrainJob, shards: Shards, *, checkpoint: Path | None
) -> tuple[ShardedTables, Recommender, Prior | None]:
    """Sharded tables, the tower, not yet in an engine, and the prior of a model that has one: initialized with `seed`,
    then filled with the weights of `checkpoint` if there is one. A collective: all ranks take part."""
    vocabulary = shards.vocabulary
    tables = ShardedTables(
        model_tables(job.model, vocabulary),
        item_features(vocabulary),
        user_tables=user_tables(job.model, vocabulary),
        optimizer=job.optimizer,
        device=job.parallel.device,
        memory=job.parallel.table_memory,
        cache=job.parallel.table_cache,
    )
    tables.initialize(seed=job.seed, std=job.training.embedding_std)
    # Seed the tower only now: sharding the tables draws random numbers, and how many depends on the world size.
    torch.manual_seed(job.seed)
    tower = build_tower(model_settings(job.model, vocabulary), num_features=len(vocabulary.features))
    prior = Prior(job.requests.task) if job.model.get("prior") else None
    if checkpoint is not None:
        load_tables(checkpoint, tables.shards())
        dense = load_dense(checkpoint)
        tower.load_state_dict({name: dense[name] for name, _ in tower.named_parameters()})
        if prior is not None:
            prior.load_state_dict({name: dense[f"{PRIOR_PREFIX}{name}"] for name, _ in prior.named_parameters()})
    return tables, tower, prior


def _create_or_restore(
    job: TrainJob, shards: Shards, loader: TrainLoader, *, training_count: np.ndarray
) -> tuple[TrainState, ShardedTables, DenseModel]:
    """(state, tables, dense half) from the run's own latest checkpoint, else from the warm start's, else from scratch;
    the loader's cursor is restored, too. A collective: all ranks take part."""
    own = latest_checkpoint(Path(job.run_dir))
    checkpoint = own or (Path(job.warm_start) if job.warm_start else None)
    tables, tower, prior = build_model(job, shards, checkpoint=checkpoint)
    model = tower
    if prior is not None:
        evidence = evidence_counts(shards, requests=job.requests, training_count=training_count)
        counters = count_items(shards, min_label=job.requests.least_label, evidence=evidence)
        if checkpoint is None:
            fit_prior(prior, counters, loader, requests=job.requests, num_items=shards.vocabulary.size, seed=job.seed)
        model = PriorModel(tower, prior, counters)
    dense = DenseModel(model, optimizer=job.optimizer, parallel=job.parallel)
    # All ranks drew the same weights above; dropout must differ between ranks.
    torch.manual_seed(job.seed * 1_000_003 + dist.get_rank())
    if checkpoint is None:
        if dense.starts_at_prior:
            dense.create_state()
        return TrainState(), tables, dense
    document = read_state(checkpoint)
    state = TrainState(**document["train_state"])
    dense.restore_state(load_dense(checkpoint), num_steps=state.updates)
    tables.restore_step(state.updates)
    if own is None:
        return TrainState(steps_before=state.updates), tables, dense
    loader.load_state_dict(state.loader)
    restore_random_state(document)
    return state, tables, dense
