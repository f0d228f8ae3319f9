"""The joint step: one look-up of TorchRec's tables, DeepSpeed's tower, one loss, one update of both halves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from jobs.training.checkpoint import latest_checkpoint
from jobs.training.clock import StepClock
from jobs.training.job import TrainingConfig, TrainJob
from jobs.training.model import catalogue_input, training_input, user_codes
from jobs.training.tables import ShardedTables
from models.interface import ModelInput, refuse_bad_rows
from models.losses import RequestLoss, calibrated_positive_weight, catalogue_loss, request_loss
from models.repeats import SeenItems
from pipeline.batch import Batch
from pipeline.requests import RequestConfig
from pipeline.vocabulary import NUM_RESERVED


class NonFiniteLoss(ArithmeticError):
    """The loss is no number any more: nothing was updated with it; one line says of which users the batch was."""


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
