"""The embedding tables: TorchRec's, sharded by rows over the ranks, and their optimizers.

    rowwise_adagrad   fused into backward; keeps one number of state per row
    adam              torch.optim.Adam after backward; keeps two numbers per weight and a copy of the table: how
                      published sequence models train their item embedding

fbgemm's fused Adam runs on GPUs only and its dense kernel is wrong on CPUs, so for adam a fused SGD transports the
gradient: backward moves a row by -2^20 times the gradient, and `end_step` computes the gradient from that move. The
factor is a power of two and makes the move large compared with the row, so the rounding error is negligible: 6e-8 of
the gradient, or 6e-14 of the row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from jobs.training.optimizers import OptimizerConfig
from jobs.training.placement import plan_tables
from models.embeddings import (
    EmbeddingCollections,
    ItemFeature,
    TableSpec,
    UserCodes,
    initial_rows,
    look_up_ids,
    pool_features,
    pool_user_features,
)

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The state that Adam keeps for each weight, by the names of torch.optim."""
CARRIER_RATE = 2.0**20
"""Learning rate of the SGD that transports adam's gradient."""


@dataclasses.dataclass(frozen=True)
class TableShard:
    """This rank's rows of one table, as views: writing to them changes the table."""

    table: str
    first_row: int
    weight: Tensor
    """[rows, C] float32"""
    state: Mapping[str, Tensor]
    """The optimizer's state of these rows by name, float32: for row-wise Adagrad an `accumulator` [rows], the sum over
    steps of the mean squared gradient; for Adam `exp_avg` and `exp_avg_sq` [rows, C]."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors that a checkpoint stores, by name."""
        return {"weight": self.weight, **self.state}


class ShardedTables:
    """All tables, sharded by rows over the ranks; an update is `begin_step`, a look-up, backward, `end_step`.

    Look-ups and the constructor are collectives: all ranks of the group must call them equally often.
    """

    def __init__(
        self,
        tables: Sequence[TableSpec],
        features: Sequence[ItemFeature],
        *,
        user_tables: Sequence[str] = (),
        optimizer: OptimizerConfig,
        device: str,
        memory: str = "device",
        cache: float = 0.2,
    ) -> None:
        """`user_tables`: names of the `tables` with the values of user features, in the order of users' codes.
        `memory` and `cache`: ParallelConfig's table_memory and table_cache. TablesDoNotFit."""
        from torchrec.distributed.embedding import EmbeddingCollectionSharder
        from torchrec.distributed.model_parallel import DistributedModelParallel
        from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
        from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

        self.specs = list(tables)
        self.features = list(features)
        self.user_tables = list(user_tables)
        self.device = torch.device(device if device == "cpu" else f"cuda:{torch.cuda.current_device()}")
        self._stream = torch.cuda.Stream(self.device) if device == "cuda" else None
        self._adam = optimizer.sparse == "adam"
        # Each rank: attach the optimizer that runs inside backward; for adam this is the SGD of the module's docstring.
        collection = EmbeddingCollections(tables)
        if self._adam:
            apply_optimizer_in_backward(torch.optim.SGD, collection.parameters(), {"lr": CARRIER_RATE})
        else:
            apply_optimizer_in_backward(
                RowWiseAdagrad, collection.parameters(), {"lr": optimizer.sparse_lr, "eps": optimizer.sparse_eps}
            )
        # All ranks: agree on the plan, then shard the tables by it.
        sharder: Any = EmbeddingCollectionSharder()
        self.plan, self.described_plan = plan_tables(
            tables, collection, sharder, device=device, memory=memory, cache=cache, sparse=optimizer.sparse
        )
        self.module = DistributedModelParallel(
            collection,
            device=self.device,
            plan=self.plan,
            sharders=[sharder],
            init_data_parallel=False,
        )
        self._adams = {
            (table, first_row): _Adam(weight, optimizer) for table, first_row, weight in self._weights() if self._adam
        }

    def look_up(self, item_rows_I: Tensor) -> tuple[Tensor, Tensor]:
        """(item_IC, features_IFC) of distinct items, without users. A collective, also for ranks without items."""
        no_users = UserCodes.of_nobody(len(self.user_tables))
        item_IC, features_IFC, _ = self.look_up_with_users(item_rows_I, no_users)
        return item_IC, features_IFC

    def look_up_with_users(self, item_rows_I: Tensor, users: UserCodes) -> tuple[Tensor, Tensor, Tensor]:
        """(item_IC, features_IFC, user_features_UGC) of distinct items and of users; a step makes one such look-up.

        A collective: all ranks take part, also with no item and no user. A model without user tables ignores the users'
        codes: G is 0.
        """
        return self.answer(self.ask(item_rows_I, users))

    def ask(self, item_rows_I: Tensor, users: UserCodes) -> AskedRows:
        """Begin `look_up_with_users`: announce to the ranks that own the rows how many ids come. A collective."""
        # TorchRec cannot look up an empty list; a rank without items takes part with the padding row (gradient 0).
        asked = item_rows_I if item_rows_I.numel() else item_rows_I.new_zeros(1)
        ids = look_up_ids(asked, self.features, user_tables=self.user_tables, users=users)
        with torch.cuda.stream(self._stream):
            parts = []
            for collection, part in self._collections.parts(ids.to(self.device, non_blocking=True)):
                context = collection.create_context()
                parts.append((collection, context, collection.input_dist(context, part)))
        return AskedRows(item_rows_I.numel(), users.lengths_UG.shape[0], parts, self._stream)

    def answer(self, asked: AskedRows) -> tuple[Tensor, Tensor, Tensor]:
        """Finish `look_up_with_users`; the rows include all updates made before this call. A collective."""
        # Start the exchange of every width before waiting for the first.
        found = [collection.compute_and_output_dist(context, ids) for collection, context, ids in asked.receive()]
        rows = {table: part for each in found for table, part in each.wait().items()}
        item_IC, features_IFC = pool_features(rows, self.features)
        if self.user_tables:
            users_UGC = pool_user_features(rows, self.user_tables)
        else:
            users_UGC = item_IC.new_zeros(asked.num_users, 0, item_IC.shape[1])
        return item_IC[: asked.num_items], features_IFC[: asked.num_items], users_UGC

    @property
    def _collections(self) -> EmbeddingCollections:
        """TorchRec's sharded collections, one per width."""
        collections = self.module.module
        assert isinstance(collections, EmbeddingCollections)
        return collections

    def begin_step(self, rate: float) -> None:
        """Set the learning rate of the next update; called before its look-up. Not a collective."""
        for adam in self._adams.values():
            adam.begin(rate)
        if self._adam:
            return
        optimizer: Any = self.module.fused_optimizer
        for group in optimizer.param_groups:
            group["lr"] = rate
        # This call passes the rate on to the fused kernels.
        optimizer.zero_grad()

    def end_step(self) -> None:
        """Update this rank's rows after backward, if the optimizer is not fused into backward. Not a collective."""
        for adam in self._adams.values():
            adam.end()

    def restore_step(self, num_steps: int) -> None:
        """Set the number of updates made so far, which Adam's bias correction needs. Not a collective."""
        for adam in self._adams.values():
            adam.state["step"].fill_(num_steps)

    def initialize(self, *, seed: int, std: float) -> None:
        """Fill every local row from (seed, table, row): the table is the same at any world size. Not a collective."""
        for shard in self.shards():
            for first in range(0, shard.weight.shape[0], 1 << 16):
                part = shard.weight[first : first + (1 << 16)]
                rows = initial_rows(
                    shard.table,
                    seed=seed,
                    first=shard.first_row + first,
                    num_rows=part.shape[0],
                    width=part.shape[1],
                    std=std,
                )
                part.copy_(rows)
            for state in shard.state.values():
                state.zero_()

    def shards(self) -> Iterator[TableShard]:
        """This rank's shard of every table; a rank may own no rows of a small table. Not a collective."""
        accumulators = {} if self._adam else self._accumulators()
        for table, first_row, weight in self._weights():
            if self._adam:
                kept = self._adams[table, first_row].state
                state = {name: kept[name] for name in MOMENTS}
            else:
                state = {"accumulator": accumulators[table, first_row]}
            yield TableShard(table, first_row, weight, state)

    def _weights(self) -> Iterator[tuple[str, int, Tensor]]:
        """(table, first row, rows) of this rank's shards."""
        weights = self.module.state_dict()
        for spec in self.specs:
            key = f"collections.{spec.width}.embeddings.{spec.name}.weight"
            for local in weights[key].local_shards():
                yield spec.name, local.metadata.shard_offsets[0], local.tensor.detach()

    def _accumulators(self) -> dict[tuple[str, int], Tensor]:
        """The state of fused row-wise Adagrad, by table and first row."""
        return {
            (key.rsplit(".", 2)[0], local.metadata.shard_offsets[0]): local.tensor.detach()
            for state in self.module.fused_optimizer.state_dict()["state"].values()
            for key, tensor in state.items()
            if key.endswith(".momentum1")
            for local in tensor.local_shards()
        }


class AskedRows:
    """A look-up that has begun: `ShardedTables.ask` has announced to the ranks how many ids come, `send` sends the ids,
    `receive` receives them."""

    def __init__(self, num_items: int, num_users: int, parts: Sequence[tuple[Any, Any, Any]], stream: Any) -> None:
        """`parts`: (collection, its context, what its `input_dist` announced) of every width."""
        self.num_items, self.num_users = num_items, num_users
        self._parts, self._stream = parts, stream
        self._sent: list[Any] | None = None

    def send(self) -> None:
        """Wait for the announced numbers and send the ids. The first call is a collective, later ones do nothing."""
        if self._sent is None:
            with torch.cuda.stream(self._stream):
                self._sent = [announced.wait() for _, _, announced in self._parts]

    def receive(self) -> list[tuple[Any, Any, Any]]:
        """(collection, its context, the ids whose rows this rank owns) of every width. A collective."""
        self.send()
        assert self._sent is not None
        with torch.cuda.stream(self._stream):
            received = [sent.wait() for sent in self._sent]
        found = [
            (collection, context, ids) for (collection, context, _), ids in zip(self._parts, received, strict=True)
        ]
        if self._stream is not None:
            computing = torch.cuda.current_stream()
            computing.wait_stream(self._stream)
            for _, context, ids in found:
                ids.record_stream(computing)
                context.record_stream(computing)
        return found


class _Adam:
    """torch.optim.Adam for one shard. Backward moves the weights by -CARRIER_RATE x gradient; `end` undoes this move
    and makes Adam's update with the gradient instead."""

    def __init__(self, weight_RC: Tensor, optimizer: OptimizerConfig) -> None:
        self._weight_RC = weight_RC
        self._before_RC = torch.nn.Parameter(torch.empty_like(weight_RC))
        self._optimizer = torch.optim.Adam(
            [self._before_RC], lr=optimizer.sparse_lr, betas=optimizer.betas, eps=optimizer.sparse_eps
        )
        self.state: dict[str, Tensor] = {
            "step": torch.zeros(()),
            **{name: torch.zeros_like(weight_RC) for name in MOMENTS},
        }
        self._optimizer.state[self._before_RC] = self.state

    @torch.no_grad()
    def begin(self, rate: float) -> None:
        self._optimizer.param_groups[0]["lr"] = rate
        self._before_RC.copy_(self._weight_RC)

    @torch.no_grad()
    def end(self) -> None:
        self._before_RC.grad = (self._before_RC - self._weight_RC) / CARRIER_RATE
        self._optimizer.step()
        self._weight_RC.copy_(self._before_RC)
