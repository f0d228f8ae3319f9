"""Where the rows of the tables are stored: each rank measures its machine, and TorchRec's planner places the tables by
these measurements.

Every table is sharded by rows, so that ranks hold equal parts of it, however popular single items are.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from jobs.host.errors import UserError
from models.embeddings import TableSpec

PLAN_FILE = "plan.json"
"""File in a run's directory with the plan of its latest start."""
KERNELS = {"device": "fused", "host": "fused_uvm", "cached": "fused_uvm_caching"}
"""parallel.table_memory -> TorchRec's compute kernel."""
STATE_FLOATS = {"rowwise_adagrad": lambda width: 1, "adam": lambda width: 3 * width}
"""optimizer.sparse -> floats that the optimizer keeps in memory for a row of this width, besides its weights."""
_COPIED_BYTES, _SENT_BYTES = 1 << 26, 1 << 24
"""Sizes for the measurement of bandwidths: a copy larger than CPU caches, and a typical exchange of rows."""
_PROBES = 3


class TablesDoNotFit(UserError):
    """A machine has less memory than its rows need; the message has both numbers."""


def available_memory() -> int:
    """Free bytes of memory on this machine, or in the container of this process if that is less."""
    free, limits = psutil.virtual_memory().available, Path("/sys/fs/cgroup/memory.max")
    if limits.exists() and (limit := limits.read_text().strip()) != "max":
        free = min(free, int(limit) - int(limits.with_name("memory.current").read_text()))
    return max(0, free)


def plan_tables(
    tables: Sequence[TableSpec], collection: Any, sharder: Any, *, device: str, memory: str, cache: float, sparse: str
) -> tuple[Any, dict[str, Any]]:
    """(TorchRec's plan, its description for plan.json). A collective; TablesDoNotFit is raised on all ranks."""
    ranks = _on_every_rank(_measured(device))
    _require_room(tables, ranks, on_device=device == "cuda" and memory == "device", sparse=sparse)
    group = dist.group.WORLD
    assert group is not None
    plan = _planner(tables, ranks, device=device, memory=memory, cache=cache).collective_plan(
        collection, [sharder], group
    )
    return plan, _described(tables, plan, ranks, sparse=sparse)


def _measured(device: str) -> dict[str, float]:
    """Memory that this rank may use, in bytes, and bandwidths in bytes/s. A collective: ranks exchange data."""
    source, target = torch.zeros(_COPIED_BYTES // 4), torch.zeros(_COPIED_BYTES // 4)
    found = {
        "memory": available_memory() / local_world_size(),
        "memory_bandwidth": 2 * _COPIED_BYTES / _best_seconds(lambda: target.copy_(source)),
        "device_memory": float(torch.cuda.get_device_properties(0).total_memory) if device == "cuda" else 0.0,
        "network_bandwidth": float("inf"),
    }
    ranks = dist.get_world_size()
    if ranks > 1:
        where = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
        sent = torch.zeros(_SENT_BYTES // 4 // ranks * ranks, device=where)
        received = torch.zeros_like(sent)

        def exchange() -> None:
            dist.all_to_all_single(received, sent)
            if device == "cuda":
                torch.cuda.synchronize()

        found["network_bandwidth"] = _SENT_BYTES * (ranks - 1) / ranks / _best_seconds(exchange)
    return found


def _best_seconds(work: Any) -> float:
    """The shortest duration of `work`. Its first run does not count: it also touches new memory, opens connections."""
    seconds = []
    for _ in range(1 + _PROBES):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def _require_room(tables: Sequence[TableSpec], ranks: list[dict[str, float]], *, on_device: bool, sparse: str) -> None:
    needed = sum(_bytes_of_a_rank(spec, len(ranks), sparse=sparse) for spec in tables)
    kind = "device_memory" if on_device else "memory"
    least = min(rank[kind] for rank in ranks)
    if needed > least:
        whose, cached = ("GPU", "--parallel.table_memory cached, ") if on_device else ("machine", "")
        raise TablesDoNotFit(
            f"parallel.num_workers={len(ranks)}: the tables need {needed / 2**30:.2f} GiB per worker, with their "
            f"optimizer state, but a worker may use {least / 2**30:.2f} GiB of its {whose}: use more machines, "
            f"{cached}or a smaller model.width"
        )


def _bytes_of_a_rank(spec: TableSpec, num_ranks: int, *, sparse: str) -> int:
    return 4 * -(-spec.capacity // num_ranks) * (spec.width + STATE_FLOATS[sparse](spec.width))


def _planner(
    tables: Sequence[TableSpec], ranks: list[dict[str, float]], *, device: str, memory: str, cache: float
) -> Any:
    from torchrec.distributed.planner import EmbeddingShardingPlanner
    from torchrec.distributed.planner.constants import INTRA_NODE_BANDWIDTH
    from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
    from torchrec.distributed.planner.types import ParameterConstraints, Topology
    from torchrec.distributed.types import CacheParams

    # All ranks get the smallest measured values: TorchRec shards unevenly if capacities differ, rows must be spread
    # evenly.
    least = {name: min(rank[name] for rank in ranks) for name in ranks[0]}
    # TorchRec's unit is bytes per millisecond.
    network = least["network_bandwidth"] / 1000 if len(ranks) > 1 else INTRA_NODE_BANDWIDTH
    topology = Topology(
        world_size=len(ranks),
        local_world_size=local_world_size(),
        compute_device=device,
        hbm_cap=int(least["device_memory"]),
        ddr_cap=int(least["memory"]),
        ddr_mem_bw=least["memory_bandwidth"] / 1000,
        intra_host_bw=network,
        inter_host_bw=network,
    )
    constraints = {
        table.name: ParameterConstraints(
            sharding_types=["row_wise"],
            compute_kernels=[KERNELS[memory]],
            cache_params=CacheParams(load_factor=cache) if memory == "cached" else None,
        )
        for table in tables
    }
    # No reservation for the tower and the batches, whose size is unknown here; `_require_room` has checked the tables.
    return EmbeddingShardingPlanner(
        topology=topology, constraints=constraints, storage_reservation=FixedPercentageStorageReservation(0.0)
    )


def _described(tables: Sequence[TableSpec], plan: Any, ranks: list[dict[str, float]], *, sparse: str) -> dict[str, Any]:
    placed = {name: place for collection in plan.plan.values() for name, place in collection.items()}
    return {
        "workers": len(ranks),
        "memory_gib": min(rank["memory"] for rank in ranks) / 2**30,
        "device_memory_gib": min(rank["device_memory"] for rank in ranks) / 2**30,
        "memory_gib_per_second": min(rank["memory_bandwidth"] for rank in ranks) / 2**30,
        "network_gib_per_second": min(rank["network_bandwidth"] for rank in ranks) / 2**30 if len(ranks) > 1 else None,
        "tables": [
            {
                "name": spec.name,
                "rows": spec.capacity,
                "width": spec.width,
                "sharding": placed[spec.name].sharding_type,
                "kernel": placed[spec.name].compute_kernel,
                "rows_per_worker": [shard.shard_sizes[0] for shard in placed[spec.name].sharding_spec.shards],
                "mib_per_worker": _bytes_of_a_rank(spec, len(ranks), sparse=sparse) / 2**20,
            }
            for spec in tables
        ],
    }


def _on_every_rank(found: dict[str, float]) -> list[dict[str, float]]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    return gathered


def local_world_size() -> int:
    """The number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
