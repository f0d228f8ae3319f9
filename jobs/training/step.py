"""The training step: one look-up in TorchRec's tables, the tower in DeepSpeed, one loss, one update of both."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import nn

from jobs.training.clock import StepClock
from jobs.training.dense_model import DenseModel
from jobs.training.job import TrainingConfig, TrainJob
from jobs.training.model import WantedItems, catalogue_input, user_codes, wanted_input
from jobs.training.tables import AskedRows, ShardedTables
from models.interface import ModelInput, refuse_bad_rows
from models.losses import RequestLoss, calibrated_positive_weight, catalogue_loss, request_loss
from models.repeats import SeenItems
from models.sequence_tower import Vectors
from pipeline.batches.batch import Batch
from pipeline.batches.requests import RequestConfig
from pipeline.shards.vocabulary import NUM_RESERVED


class NonFiniteLoss(ArithmeticError):
    """The loss is NaN or infinite; nothing was updated with it. The message names the users of the batch."""


@dataclasses.dataclass(frozen=True)
class AskedBatch:
    """A batch whose look-up has begun."""

    batch: Batch
    wanted: WantedItems | None
    """The items to look up; None = the whole catalogue."""
    rows: AskedRows
    loader_state: dict[str, Any]
    """State of the loader after this batch."""


def ask(
    job: TrainJob, batch: Batch, tables: ShardedTables, *, num_items: int, loader_state: dict[str, Any] | None = None
) -> AskedBatch:
    """Begin the look-up of a batch. A collective: all ranks take part."""
    wanted = None if job.training.loss == "catalogue" else WantedItems.of(batch)
    rows = tables.ask(torch.arange(num_items) if wanted is None else wanted.rows_I, user_codes(batch))
    return AskedBatch(batch, wanted, rows, loader_state or {})


def train_step(
    job: TrainJob,
    asked: AskedBatch,
    tables: ShardedTables,
    dense: DenseModel,
    *,
    num_items: int,
    step: int,
    share: float,
    clock: StepClock,
    ask_next: Callable[[], AskedBatch | None] = lambda: None,
) -> tuple[dict[str, float], AskedBatch | None]:
    """One optimizer step of tables and tower on one global batch. A collective: all ranks take part. NonFiniteLoss.

    `step`: steps made before; `share`: share of the training that is done. Returns (figures, next batch), where the
    figures are the global batch's mean losses, its numbers of events and of scored candidates, and the resident memory
    of all ranks in GiB.

    The next batch is read before the tower computes, and its ids are sent to the ranks that own their rows meanwhile.
    The rows themselves are not: this step's update may still change them.

    TorchRec and DeepSpeed both average over ranks, so the local loss is world size x local sum / global count: then
    one rank and many ranks follow the same gradient, however unevenly requests are distributed.
    """
    # Each rank: set both learning rates.
    batch = asked.batch
    world_size, count = dist.get_world_size(), max(1, batch.num_global_requests)
    lr_share = job.optimizer.lr_share_at(step, share_done=share)
    tables.begin_step(job.optimizer.sparse_lr * lr_share)
    dense.begin_step(lr_share)

    # All ranks: receive the rows of this batch (all-to-all), then read the next batch and announce its ids.
    with clock.part("look_up"):
        inputs = _answered(asked, tables)
    following = ask_next()
    # Forward. Under ZeRO-3 all ranks gather weights here.
    with clock.part("dense"):
        loss = _loss(job.training, job.requests, batch, inputs, dense.model, num_items=num_items)
    # All ranks: send the ids of the next batch.
    with clock.part("look_up"):
        if following is not None:
            following.rows.send()
    # All ranks: sum the losses (all-reduce). All see the same value, so all raise or none does.
    scored = batch.num_requests * num_items if asked.wanted is None else batch.num_candidates
    figures = _global_figures(loss, batch, count=count, scored=scored)
    if not math.isfinite(figures["loss"]):
        _refuse_non_finite(Path(job.run_dir), batch, loss=figures["loss"], step=step)
    # Backward, all ranks: DeepSpeed reduces the tower's gradients, TorchRec sends the rows' gradients to their owners.
    with clock.part("dense"):
        dense.backward(loss.total * (world_size / count))
    # Update the tower (under ZeRO-1 and ZeRO-2 all ranks gather its weights) and, for adam, each rank's table rows.
    with clock.part("optimizer"):
        dense.end_step()
        tables.end_step()
    return figures, following


def _answered(asked: AskedBatch, tables: ShardedTables) -> ModelInput:
    """Finish the look-up; returns the tower's input. A collective."""
    rows = tables.answer(asked.rows)
    if asked.wanted is not None:
        return wanted_input(asked.batch, asked.wanted, *rows)
    refuse_bad_rows(*rows[:2])
    return catalogue_input(asked.batch, *rows)


def _global_figures(loss: RequestLoss, batch: Batch, *, count: int, scored: int) -> dict[str, float]:
    """Mean losses over the requests of the global batch, its numbers of events and of scored candidates, and the
    resident memory of all ranks in GiB. A collective."""
    sums = torch.stack([part.detach().double() for part in (loss.total, loss.pointwise, loss.setwise)]) / count
    sums = torch.cat([sums, sums.new_tensor([batch.num_events, scored, psutil.Process().memory_info().rss / 2**30])])
    dist.all_reduce(sums)
    names = ("loss", "pointwise_loss", "setwise_loss", "events", "scored", "memory_gib")
    return dict(zip(names, sums.tolist(), strict=True))


def _refuse_non_finite(run_dir: Path, batch: Batch, *, loss: float, step: int) -> None:
    """Write the user rows of the global batch to RUN/non-finite.json (rank 0) and raise NonFiniteLoss. A collective."""
    rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rows, batch.user.tolist())
    users = sorted(row for of_rank in rows for row in of_rank)
    found = {"step": step, "epoch": batch.epoch, "loss": str(loss), "user_rows": users}
    if dist.get_rank() == 0:
        (run_dir / "non-finite.json").write_text(json.dumps(found) + "\n")
    shown = ", ".join(map(str, users[:5])) + (f" and {len(users) - 5} more" if len(users) > 5 else "")
    raise NonFiniteLoss(f"the loss of step {step + 1} is {loss}, of user rows {shown} ({run_dir / 'non-finite.json'})")


def _loss(
    training: TrainingConfig,
    requests: RequestConfig,
    batch: Batch,
    inputs: ModelInput,
    model: nn.Module,
    *,
    num_items: int,
) -> RequestLoss:
    """The sums of losses over this rank's requests; one forward."""
    if training.loss == "catalogue":
        vectors: Vectors = model(inputs, vectors=True)
        device, repeat_1 = vectors.state_BD.device, vectors.repeat_1
        known = batch.candidate_item >= NUM_RESERVED
        request_P = torch.repeat_interleave(batch.candidate_offsets.diff())[known]
        positive_P = batch.candidate_item[known] - NUM_RESERVED
        return catalogue_loss(
            vectors.state_BD,
            vectors.vector_ID[NUM_RESERVED:],
            positive_P=positive_P.to(device),
            request_P=request_P.to(device),
            repeat_1=repeat_1,
            seen=None if repeat_1 is None else SeenItems.of_requests(inputs, first_item=NUM_RESERVED),
        )
    logits_M = model(inputs)
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
