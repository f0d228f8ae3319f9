"""How a job is distributed: number of workers, device, precision, and when a worker counts as dead."""

from __future__ import annotations

import dataclasses

TABLE_MEMORY = ("device", "host", "cached")
PRECISION = ("fp32", "bf16")
MIN_STALL_SECONDS = 10.0
"""Smallest `stall_seconds`: Ray polls workers every 2 seconds, and slow steps of a busy machine must not count."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the job is distributed."""

    num_workers: int | tuple[int, ...] = 2
    """Number of training processes, 1 or more; each holds a part of every table and the whole tower. [MIN, MAX]: as
    many as the cluster has room for; a group that loses a node continues with fewer workers, and restarts with more
    when there is room for them."""
    threads_per_worker: int = 1
    """CPU threads for the tensor operations of each worker, and CPUs that it reserves in Ray; 1 or more."""
    device: str = "cpu"
    """cpu (gloo) or cuda (NCCL, one GPU per worker)."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage of the tower. 0: replicates all; 1: shards optimizer state; 2: also gradients; 3: also
    weights."""
    precision: str = "fp32"
    """Precision of the tower: fp32, or bf16 (ZeRO stages 1 to 3). Tables, decompositions and losses stay in fp32 or
    above."""
    table_memory: str = "device"
    """Where table rows are stored. With cuda: device (the GPU's memory), host (the machine's memory, read by the GPU
    through UVM) or cached (host, with rows in use on the GPU). With cpu: device only."""
    table_cache: float = 0.2
    """table_memory=cached: share of the rows that the GPU's cache holds, above 0 and at most 1."""
    stall_seconds: float = 600.0
    """A worker that does not answer, or takes part in no step, for this many seconds counts as dead; 10 or more."""
    overlap: bool = True
    """While the tower computes, read the next batch and send its ids to the ranks that own their rows. Does not change
    the losses."""

    @property
    def elastic(self) -> bool:
        """Whether the number of workers is a range, and follows the size of the cluster."""
        return not isinstance(self.num_workers, int)

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def workers_text(self) -> str:
        """`2 workers` or `1 to 2 workers`."""
        return f"{self.min_workers} to {self.max_workers} workers" if self.elastic else f"{self.num_workers} workers"

    @property
    def num_cpus(self) -> int:
        """Most CPUs that all workers reserve together."""
        return self.max_workers * self.threads_per_worker

    def __post_init__(self) -> None:
        if isinstance(self.num_workers, int):
            if self.num_workers < 1:
                raise ValueError(f"num_workers={self.num_workers}: must be 1 or more")
        elif len(self.num_workers) != 2 or not 1 <= self.num_workers[0] <= self.num_workers[1]:
            raise ValueError(
                f"num_workers={list(self.num_workers)}: must be one number, or [MIN, MAX] with 1 <= MIN <= MAX"
            )
        if self.stall_seconds < MIN_STALL_SECONDS:
            raise ValueError(f"stall_seconds={self.stall_seconds:g}: must be {MIN_STALL_SECONDS:g} or more")
        if self.threads_per_worker < 1:
            raise ValueError(f"threads_per_worker={self.threads_per_worker}: must be 1 or more")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device={self.device!r}: must be cpu or cuda")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage={self.zero_stage}: must be 0, 1, 2 or 3")
        if self.table_memory not in TABLE_MEMORY:
            raise ValueError(f"table_memory={self.table_memory!r}: must be {', '.join(TABLE_MEMORY)}")
        if self.table_memory != "device" and self.device == "cpu":
            raise ValueError(f"table_memory={self.table_memory}: must be device if parallel.device is cpu")
        if not 0 < self.table_cache <= 1:
            raise ValueError(f"table_cache={self.table_cache}: must be above 0 and at most 1")
        if self.precision == "fp16":
            raise ValueError("precision=fp16: loss scaling would leak into the fused table updates; use bf16 or fp32")
        if self.precision not in PRECISION:
            raise ValueError(f"precision={self.precision!r}: must be fp32 or bf16")
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError("precision=bf16 with zero_stage=0: no fp32 master weights; use zero_stage 1, 2 or 3")
