"""solar train RECIPE: shards -> checkpoints and an MLflow run.

The driver checks everything that can be checked before a worker starts, starts the workers with Ray Train, shows a
progress bar, and writes to MLflow. The training itself is in jobs/training/loop.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from jobs.cluster.failures import Interrupted
from jobs.cluster.session import ray_session
from jobs.cluster.worker_group import run_workers
from jobs.config.run_config import RunConfig
from jobs.host.console import Console
from jobs.host.documents import as_json
from jobs.host.errors import UserError
from jobs.host.locks import sole_command, wait_for_workers
from jobs.runs.progress import Follower
from jobs.runs.record import RunRecord, close_tracked_run, open_tracked_run, previous_run, run_facts
from jobs.runs.request_checks import check_requests, count_requests
from jobs.runs.run_dir import Trained, best_checkpoint, open_shards, run_shards, settled
from jobs.tracking.unsent import NAME as SPOOL
from jobs.training.checkpoint import (
    CheckpointError,
    CheckpointNotWritten,
    checkpoint_bytes,
    committed_checkpoints,
    latest_checkpoint,
    read_train_state,
    set_aside_damaged,
)
from jobs.training.job import TrainJob
from jobs.training.model import model_settings, model_tables
from jobs.training.results import primary_metric
from jobs.training.warm_start import Begun, begin_from
from models.zoo import build_tower
from pipeline.shards.dataset import Shards
from pipeline.shards.leases import lease
from pipeline.shards.vocabulary_growth import beginnings_of

FEW_STEPS = 100
"""A run from scratch with fewer steps is told to be short: 9,497 events of 300 users of MovieLens-1M have a validation
NDCG@10 of .016 after 15 steps and of .039 after 750."""


def train(
    config: RunConfig, console: Console, *, resume: bool, from_previous: bool = False, verbose: bool = False
) -> Trained:
    """Train to the end. A finished run of the same configuration is reused; an unfinished one is only continued with
    `resume`, or with `from_previous`, which sets damaged checkpoints aside and continues from the latest intact one."""
    config = settled(config, tell=console.line)
    shards, present = run_shards(config), open_shards(config).manifest.number
    _check_model(config, shards)
    with sole_command(config.run_dir):
        previous = previous_run(config, shards)
        for line in set_aside_damaged(config.run_dir) if from_previous else ():
            console.line(f"{'train':<12} {line}")

        # A finished run is reused; an unfinished one is continued with the data that it began with.
        latest = latest_checkpoint(config.run_dir)
        if latest is not None:
            if read_train_state(latest, checksums=True).finished:
                if shards.manifest.number != present:
                    raise UserError(
                        f"{config.run_dir}: was trained on manifest {shards.manifest.number}, the shards are now at "
                        f"manifest {present}: choose another --name"
                    )
                facts = run_facts(config, shards, warm_start=previous.warm_start if previous else None)
                return _finished_before(config, facts, previous)
            if not (resume or from_previous):
                raise UserError(
                    f"{config.run_dir}: holds an unfinished run ({latest.name}): add --resume, or --name NEW"
                )
        if shards.manifest.number != present:
            console.line(
                f"{'train':<12} continues on manifest {shards.manifest.number}; the shards are at {present} now"
            )

        # Prepare: the checkpoint to begin from, disk space, and the end of an earlier command's workers.
        begun = _begin(config, shards, console) if latest is None else None
        _require_disk(config, shards)
        wait_for_workers(config.run_dir, tell=console.teller("train"))

        # Check the requests, then train. Meanwhile `solar gc` keeps what is read.
        with (
            lease(
                shards.path, number=shards.manifest.number, command=f"training of run {config.name}",
                tell=console.teller("train"),
            ),
            ray_session(config.cluster, num_cpus=config.parallel.num_cpus, verbose=verbose),
        ):  # fmt: skip
            check_requests(config, shards, count_requests(shards, config.data.requests), console)
            run_id = _train(config, shards, console, previous, begun=begun)
        _tell_few_steps(config, console)
        _tell_what_became_of_the_prior(config, console)
    return Trained(config.run_dir, best_checkpoint(config.run_dir), run_id, reused=False)


def _begin(config: RunConfig, shards: Shards, console: Console) -> Begun | None:
    """The checkpoint that the run begins from; None = training from scratch."""
    if config.training.warm_start is None:
        return None
    try:
        begun = begin_from(
            config.training.warm_start, model=config.model, task=config.data.requests.task,
            sparse=config.optimizer.sparse, shards=shards,
        )  # fmt: skip
    except CheckpointError as error:
        raise UserError(f"training.warm_start={config.training.warm_start}: {error}") from error
    console.line(f"{'train':<12} begins from {begun.path} ({begun.key})")
    return begun


def _train(
    config: RunConfig, shards: Shards, console: Console, previous: RunRecord | None, *, begun: Begun | None
) -> str:
    """Start the workers, follow them until they end, and record the outcome; returns the id of the MLflow run."""
    warm_start = begun.key if begun else previous.warm_start if previous else None
    facts = run_facts(config, shards, warm_start=warm_start)
    run = open_tracked_run(config, facts, previous)
    status = "FAILED"
    try:
        with console.stage("train") as stage:
            follow = Follower(
                run,
                stage,
                config.run_dir / "telemetry.jsonl",
                primary=primary_metric(config.data.requests),
                workers=config.parallel.workers_text,
            )
            stored = {**as_json(facts), "vocabulary": beginnings_of(shards.vocabulary)}
            arguments = {"job": train_job(config, shards, facts=stored, begun=begun)}
            run_workers(
                _train_worker, arguments, parallel=config.parallel, cluster=config.cluster, run_dir=config.run_dir,
                name="train", on_rows=follow, stoppable=True,
            )  # fmt: skip
        status = "FINISHED"
    except SystemExit:
        status = "KILLED"
        raise
    except KeyboardInterrupt as error:
        status = "KILLED"
        raise Interrupted(config.name, has_checkpoint=latest_checkpoint(config.run_dir) is not None) from error
    finally:
        if not close_tracked_run(config, run, status=status):
            console.line(
                f"{'train':<12} MLflow does not answer: its points are kept in {config.run_dir / SPOOL}; run the same "
                "command again to send them"
            )
    return run.run_id


def _tell_few_steps(config: RunConfig, console: Console) -> None:
    """Say so if the run was too short to learn much; one that begins from a checkpoint goes on from what that knows."""
    latest = latest_checkpoint(config.run_dir)
    steps = read_train_state(latest).step if latest else 0
    if steps >= FEW_STEPS or config.training.warm_start is not None:
        return
    longer = f"training.epochs ({config.training.epochs})"
    if config.training.max_seconds:
        longer = f"training.max_seconds ({config.training.max_seconds:g})"
    console.line(
        f"{'train':<12} note: only {steps} steps, which is little to learn from: lower data.loader.batch_events "
        f"({config.data.loader.batch_events:,}) or raise {longer}, in a run of another --name"
    )


def _tell_what_became_of_the_prior(config: RunConfig, console: Console) -> None:
    """Say whether the best checkpoint of a model that starts at a prior is the one before the first step."""
    latest = latest_checkpoint(config.run_dir)
    state = read_train_state(latest) if latest else None
    if state is None or not state.step or state.users_at_start is None:
        return
    if state.best_step:
        console.line(
            f"{'train':<12} the prior, which counts, was fitted first; step {state.best_step} is clearly better on the "
            "validation part"
        )
    else:
        console.line(
            f"{'train':<12} note: no later checkpoint is clearly better on the validation part than the prior, which "
            "counts (one-sided 95 %, paired over users): the model is its prior"
        )


def _finished_before(config: RunConfig, facts: RunRecord, previous: RunRecord | None) -> Trained:
    """The results of a finished run. Its MLflow run is ended now if an earlier command died before it could do so."""
    if previous and previous.mlflow_run_id and previous.mlflow_status == "FINISHED":
        run_id = previous.mlflow_run_id
    else:
        run = open_tracked_run(config, facts, previous)
        close_tracked_run(config, run, status="FINISHED")
        run_id = run.run_id
    return Trained(config.run_dir, best_checkpoint(config.run_dir), run_id, reused=True)


def train_job(
    config: RunConfig, shards: Shards, *, facts: dict[str, Any] | None = None, begun: Begun | None = None
) -> TrainJob:
    """The part of a config that the workers need."""
    return TrainJob(
        run_dir=str(config.run_dir.absolute()),
        shards=shards.path,
        manifest=shards.manifest.number,
        seed=config.seed,
        model=config.model,
        training=config.training,
        requests=config.data.requests,
        loader=config.data.loader,
        optimizer=config.optimizer,
        parallel=config.parallel,
        checkpoint=config.checkpoint,
        facts=facts or {},
        warm_start=str(begun.path.absolute()) if begun else None,
    )


def _train_worker(arguments: dict[str, Any]) -> None:
    import torch.distributed as dist

    from jobs.training.checkpoint import discard_unfinished
    from jobs.training.group_lock import sole_group
    from jobs.training.loop import train as train_loop

    run_dir, reporter = Path(arguments["job"].run_dir), arguments["reporter"]
    with sole_group(run_dir, tell=lambda text: reporter.row("waiting", text=text)):
        if dist.get_rank() == 0:
            discard_unfinished(run_dir)
        dist.barrier()
        train_loop(arguments["job"], reporter=reporter)


def _check_model(config: RunConfig, shards: Shards) -> None:
    if config.model.get("time_features") and not shards.manifest.has_time:
        raise UserError(
            f"model.time_features=true: {config.shards_dir} has only an order, no time stamps: "
            "remove it, or set --model.time_features false"
        )
    if config.model.get("history_labels") and not shards.manifest.has_labels:
        raise UserError(
            f"model.history_labels=true: {config.shards_dir} has no labels: map a label column, or set "
            "--model.history_labels false"
        )
    if config.model.get("prior"):
        _check_prior(config)
    if config.optimizer.sparse == "adam" and config.parallel.table_memory == "cached":
        raise UserError(
            "optimizer.sparse=adam with parallel.table_memory=cached: adam's updates bypass the GPU's cache: set "
            "--parallel.table_memory host, or --optimizer.sparse rowwise_adagrad"
        )
    if config.model["width"] % 4:
        raise UserError(f"model.width={config.model['width']}: must be a multiple of 4, which stored tables need")
    widths = config.model.get("feature_width")
    features = [*shards.vocabulary.features, *shards.vocabulary.user_features]
    if isinstance(widths, dict) and (unknown := sorted(set(widths) - set(features))):
        raise UserError(
            f"model.feature_width: {config.shards_dir} has no feature {unknown[0]!r}: it has "
            f"{', '.join(features) or 'none'}; remove {unknown[0]!r}"
        )


def _check_prior(config: RunConfig) -> None:
    if config.data.requests.split != "temporal":
        raise UserError(
            f"model.prior=true: data.requests.split is {config.data.requests.split}, under which nothing says what was "
            "known when: set --data.requests.split temporal, or --model.prior false"
        )
    if config.training.loss == "catalogue":
        raise UserError(
            "model.prior=true: training.loss=catalogue compares vectors alone: set --training.loss candidates, or "
            "--model.prior false"
        )


def _require_disk(config: RunConfig, shards: Shards) -> None:
    """CheckpointNotWritten if the disk has no room for the checkpoints: those kept, the best one and the one being
    written."""
    vocabulary = shards.vocabulary
    tower = build_tower(model_settings(config.model, vocabulary), num_features=len(vocabulary.features))
    size = checkpoint_bytes(
        ((spec.capacity, spec.width) for spec in model_tables(config.model, vocabulary)),
        sparse=config.optimizer.sparse,
        dense_parameters=sum(parameter.numel() for parameter in tower.parameters()),
    )
    existing = sum(file.stat().st_size for path in committed_checkpoints(config.run_dir) for file in path.iterdir())
    needed = size * (config.checkpoint.keep + 2) - existing
    free = shutil.disk_usage(config.run_dir).free
    if free < needed:
        raise CheckpointNotWritten(
            f"{config.run_dir}: {free >> 20} MiB free, its checkpoints need {-(-needed >> 20)} MiB more "
            f"({config.checkpoint.keep + 2} of {-(-size >> 20)} MiB): free some disk space, lower checkpoint.keep, "
            "or choose another --workspace"
        )
