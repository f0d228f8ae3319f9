"""How a model is distributed over ranks: TorchRec shards the tables, DeepSpeed wraps the tower, never the other way
round.

DeepSpeed broadcasts rank 0's parameters of the module that it wraps, so a table inside it would lose every shard but
one. The order that works: process group (Ray Train's) -> the tables' optimizer, DistributedModelParallel around the
tables alone (tables.py) -> deepspeed.initialize around the tower alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from jobs.cluster.parallel import ParallelConfig
from jobs.training.optimizers import OptimizerConfig

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def dense_engine(tower: nn.Module, *, optimizer: OptimizerConfig, parallel: ParallelConfig) -> Any:
    """The tower inside a DeepSpeed engine: `engine(inputs)`, `engine.backward(loss)`, `engine.step()`. A collective."""
    with _without_mlflow():
        import deepspeed

    if parallel.device == "cpu":
        # This op is for inference only; disabled, the start needs no C++ compiler.
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
    groups = parameter_groups(tower, weight_decay=optimizer.weight_decay)
    adamw = torch.optim.AdamW(groups, lr=optimizer.dense_lr, betas=optimizer.betas, eps=optimizer.dense_eps)
    engine, *_ = deepspeed.initialize(model=tower, optimizer=adamw, config=config, dist_init_required=False)
    return engine


@contextmanager
def _without_mlflow() -> Iterator[None]:
    """DeepSpeed's tuner, which nothing here uses, imports MLflow if it can: four fifths of the time of its import."""
    if "mlflow" in sys.modules:
        yield
        return
    missing: Any = None  # what Python takes for a module that is not there
    sys.modules["mlflow"] = missing
    try:
        yield
    finally:
        del sys.modules["mlflow"]


def parameter_groups(tower: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups: matrices with weight decay, everything else without."""
    matrices = [parameter for parameter in tower.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in tower.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
