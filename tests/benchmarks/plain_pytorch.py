"""Training in plain PyTorch, to measure Solar's joint step against: DistributedDataParallel around table and tower.

Every rank holds the whole table as nn.Embedding(sparse=True) and sees the rows' gradients of all ranks. AdamW moves the
tower, row-wise Adagrad the table, by fbgemm's formula: what `training_scale.py` compares starts alike and learns alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jobs.training.clock import StepClock
from jobs.training.dense_engine import parameter_groups
from jobs.training.job import TrainingConfig
from jobs.training.model import WantedItems, wanted_input
from jobs.training.optimizers import OptimizerConfig
from models.embeddings import TableSpec, initial_rows
from models.interface import Recommender
from models.losses import request_loss
from pipeline.batches.batch import Batch


class Replicated:
    """Training of these batches, again and again. All ranks join the constructor and every step."""

    def __init__(
        self,
        batches: Sequence[Batch],
        *,
        tower: Recommender,
        table: TableSpec,
        seed: int,
        std: float,
        optimizer: OptimizerConfig,
        training: TrainingConfig,
    ) -> None:
        self._batches, self._optimizer, self._training = batches, optimizer, training
        self._model = TableAndTower(tower, table=table, seed=seed, std=std)
        self._accumulator_R = torch.zeros(table.capacity)
        self._replicas = DistributedDataParallel(self._model, gradient_as_bucket_view=True)
        self._adamw = torch.optim.AdamW(
            parameter_groups(tower, weight_decay=optimizer.weight_decay),
            lr=optimizer.dense_lr,
            betas=optimizer.betas,
            eps=optimizer.dense_eps,
            fused=True,
        )
        self._done, self.clock = 0, StepClock()

    def step(self) -> float:
        """Its loss, the mean over the requests of the global batch."""
        optimizer, training = self._optimizer, self._training
        with self.clock.part("data"):
            batch = self._batches[self._done % len(self._batches)]
        with self.clock.part("look_up"):
            wanted = WantedItems.of(batch)
        with self.clock.part("dense"):
            loss = request_loss(
                self._replicas(batch, wanted),
                label_M=batch.candidate_label,
                candidate_offsets_B1=batch.candidate_offsets,
                set_weight=training.set_loss_weight,
                pointwise_weight=training.pointwise_loss_weight,
            ).total
        mean_loss = loss.detach().double() / batch.num_global_requests
        dist.all_reduce(mean_loss)
        with self.clock.part("dense"):
            # DDP averages over ranks.
            (loss * (dist.get_world_size() / batch.num_global_requests)).backward()
        with self.clock.part("optimizer"):
            share = optimizer.lr_share_at(self._done, share_done=0.0)
            for group in self._adamw.param_groups:
                group["lr"] = optimizer.dense_lr * share
            nn.utils.clip_grad_norm_(self._model.tower.parameters(), optimizer.clip_norm)
            self._adamw.step()
            self._adamw.zero_grad()
            self._update_rows(optimizer.sparse_lr * share)
        self._done += 1
        return float(mean_loss)

    def end(self) -> None:
        """Nothing is under way."""

    @torch.no_grad()
    def _update_rows(self, rate: float) -> None:
        """Row-wise Adagrad of the rows that some rank looked up."""
        weight_RC = self._model.table.weight
        assert weight_RC.grad is not None
        gradient = weight_RC.grad.coalesce()
        row_I, gradient_IC = gradient.indices()[0], gradient.values()
        self._accumulator_R.index_add_(0, row_I, gradient_IC.square().mean(1))
        move_I = -rate / (self._accumulator_R[row_I].sqrt() + self._optimizer.sparse_eps)
        weight_RC.index_add_(0, row_I, gradient_IC * move_I[:, None])
        weight_RC.grad = None


class TableAndTower(nn.Module):
    """One module of both, the rows filled as `ShardedTables.initialize` fills them."""

    def __init__(self, tower: Recommender, *, table: TableSpec, seed: int, std: float) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.empty(table.capacity, table.width), freeze=False, sparse=True)
        self.tower = tower
        for first in range(0, table.capacity, 1 << 16):
            part = self.table.weight.data[first : first + (1 << 16)]
            rows = initial_rows(table.name, seed=seed, first=first, num_rows=len(part), width=table.width, std=std)
            part.copy_(rows)

    def forward(self, batch: Batch, wanted: WantedItems) -> Tensor:
        item_IC = self.table(wanted.rows_I)
        features_IFC = item_IC.new_zeros(item_IC.shape[0], 0, item_IC.shape[1])
        user_features_UGC = item_IC.new_zeros(batch.num_users, 0, item_IC.shape[1])
        return self.tower(wanted_input(batch, wanted, item_IC, features_IFC, user_features_UGC))
