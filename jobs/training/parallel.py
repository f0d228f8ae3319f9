"""How a model is spread over ranks: TorchRec owns the tables, DeepSpeed owns the tower, never the other way round.

DeepSpeed broadcasts rank 0's parameters of whatever it wraps, so a table inside it would lose every shard but one.
The order below is the one that works: process group (Ray Train's) -> optimizer fused into the tables' backward ->
DistributedModelParallel around the tables alone -> deepspeed.initialize around the tower alone.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from jobs.training.optimizers import OptimizerConfig
from models.embeddings import (
    ItemFeature,
    TableSpec,
    UserCodes,
    embedding_collection,
    initial_rows,
    look_up_ids,
    pool_features,
    pool_user_features,
)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the job is spread."""

    num_workers: int = 2
    """Training processes; each holds a slice of every table and the whole tower."""
    threads_per_worker: int = 1
    """CPU threads of each worker's tensor operations, and the CPUs it reserves in Ray."""
    device: str = "cpu"
    """cpu (gloo) or cuda (NCCL, one GPU a worker)."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage of the tower: 0 replicates, 1 shards optimizer state, 2 also gradients, 3 also weights."""
    precision: str = "fp32"
    """fp32, or bf16 for the tower (stages 1-3). Tables, decompositions and losses stay in fp32 or above."""

    @property
    def num_cpus(self) -> int:
        """CPUs that all workers reserve together."""
        return self.num_workers * self.threads_per_worker

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"num_workers={self.num_workers}: must be 1 or more")
        if self.threads_per_worker < 1:
            raise ValueError(f"threads_per_worker={self.threads_per_worker}: must be 1 or more")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device={self.device!r}: must be cpu or cuda")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage={self.zero_stage}: must be 0, 1, 2 or 3")
        if self.precision == "fp16":
            raise ValueError("precision=fp16: loss scaling would leak into the fused table updates; use bf16 or fp32")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}: must be fp32 or bf16")
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError("precision=bf16 with zero_stage=0: no fp32 master weights; use zero_stage 1, 2 or 3")


@dataclasses.dataclass(frozen=True)
class TableShard:
    """This rank's rows of one table, as views: writing to them changes the table."""

    table: str
    first_row: int
    weight: Tensor
    """[rows, C] float32"""
    accumulator: Tensor
    """[rows] float32: row-wise Adagrad's mean of squared gradients"""


class ShardedTables:
    """All tables, row-wise sharded over the ranks, updated by fused row-wise Adagrad inside backward.

    Look-ups and the constructor are collectives: all ranks of the group call them equally often.
    """

    def __init__(
        self,
        tables: Sequence[TableSpec],
        features: Sequence[ItemFeature],
        *,
        user_tables: Sequence[str] = (),
        optimizer: OptimizerConfig,
        device: str,
    ) -> None:
        """`user_tables`: those of `tables` that hold the values of user features, in the order of users' codes."""
        from torchrec.distributed.embedding import EmbeddingCollectionSharder
        from torchrec.distributed.model_parallel import DistributedModelParallel
        from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
        from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

        self.specs = list(tables)
        self.features = list(features)
        self.user_tables = list(user_tables)
        self.device = torch.device(device if device == "cpu" else f"cuda:{torch.cuda.current_device()}")
        collection = embedding_collection(tables)
        apply_optimizer_in_backward(
            RowWiseAdagrad, collection.parameters(), {"lr": optimizer.sparse_lr, "eps": optimizer.sparse_eps}
        )
        sharder: Any = EmbeddingCollectionSharder()
        group = dist.group.WORLD
        assert group is not None
        self.plan = _planner(tables, device=device).collective_plan(collection, [sharder], group)
        self.module = DistributedModelParallel(
            collection,
            device=self.device,
            plan=self.plan,
            sharders=[sharder],
            init_data_parallel=False,
        )

    def look_up(self, item_rows_I: Tensor) -> tuple[Tensor, Tensor]:
        """(item_IC, features_IFC) of distinct items and of no user. All ranks join, also with no item."""
        nobody = UserCodes.of_nobody(len(self.user_tables))
        item_IC, features_IFC, _ = self.look_up_with_users(item_rows_I, nobody)
        return item_IC, features_IFC

    def look_up_with_users(self, item_rows_I: Tensor, users: UserCodes) -> tuple[Tensor, Tensor, Tensor]:
        """(item_IC, features_IFC, user_features_UGC) of distinct items and of users; the one look-up of a step.

        All ranks join, also with no item and no user. Codes that no table is for are ignored: G is 0 then.
        """
        num_items = item_rows_I.numel()
        # TorchRec cannot look up nothing; a rank without items joins with the padding row, whose gradient is 0.
        asked = item_rows_I if num_items else item_rows_I.new_zeros(1)
        ids = look_up_ids(asked, self.features, user_tables=self.user_tables, users=users).to(self.device)
        rows = self.module(ids)
        item_IC, features_IFC = pool_features(rows, self.features)
        if self.user_tables:
            users_UGC = pool_user_features(rows, self.user_tables)
        else:
            users_UGC = item_IC.new_zeros(users.lengths_UG.shape[0], 0, item_IC.shape[1])
        return item_IC[:num_items], features_IFC[:num_items], users_UGC

    def set_learning_rate(self, rate: float) -> None:
        """The rate of the next backward. Not a collective."""
        optimizer: Any = self.module.fused_optimizer
        for group in optimizer.param_groups:
            group["lr"] = rate
        # What hands the rate to the fused kernels.
        optimizer.zero_grad()

    def initialize(self, *, seed: int, std: float) -> None:
        """Fill every local row from (seed, table, row): the same table at any world size."""
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
            shard.accumulator.zero_()

    def shards(self) -> Iterator[TableShard]:
        """This rank's shard of every table; a rank may own no row of a small table."""
        weights = self.module.state_dict()
        accumulators = {
            key.rsplit(".", 2)[0]: tensor
            for state in self.module.fused_optimizer.state_dict()["state"].values()
            for key, tensor in state.items()
            if key.endswith(".momentum1")
        }
        for spec in self.specs:
            weight = weights[f"embeddings.{spec.name}.weight"]
            accumulator = accumulators[spec.name]
            for local, state in zip(weight.local_shards(), accumulator.local_shards(), strict=True):
                first = local.metadata.shard_offsets[0]
                yield TableShard(spec.name, first, local.tensor.detach(), state.tensor.detach())


def dense_engine(tower: nn.Module, *, optimizer: OptimizerConfig, parallel: ParallelConfig) -> Any:
    """The tower inside a DeepSpeed engine: `engine(inputs)`, `engine.backward(loss)`, `engine.step()`."""
    import deepspeed

    if parallel.device == "cpu":
        # The op serves inference only; without it a start needs no C++ compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {
        "train_batch_size": dist.get_world_size(),
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": parallel.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": parallel.precision == "bf16"},
        "gradient_clipping": optimizer.clip_norm,
        "steps_per_print": 1 << 62,
    }
    groups = optimizer.parameter_groups(tower)
    adamw = torch.optim.AdamW(groups, lr=optimizer.dense_lr, betas=optimizer.betas, eps=optimizer.dense_eps)
    engine, *_ = deepspeed.initialize(model=tower, optimizer=adamw, config=config, dist_init_required=False)
    return engine


def quiet_libraries() -> None:
    """Silence third-party start-up messages; warnings of our own and all errors stay."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    for name in ("deepspeed", "DeepSpeed", "torchrec", "torch.distributed", "fbgemm_gpu"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _planner(tables: Sequence[TableSpec], *, device: str) -> Any:
    """Row-wise sharding for every table, planned against this machine's memory and not the library's example host."""
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.planner.types import ParameterConstraints

    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    topology = Topology(
        world_size=dist.get_world_size(),
        local_world_size=local_world_size,
        compute_device=device,
        hbm_cap=torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 0,
        ddr_cap=psutil.virtual_memory().total // local_world_size,
    )
    constraints = {
        table.name: ParameterConstraints(sharding_types=["row_wise"], compute_kernels=["fused"]) for table in tables
    }
    return EmbeddingShardingPlanner(topology=topology, constraints=constraints)
