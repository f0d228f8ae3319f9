"""A worker's side of a group: does one job after the other, each from the state of a fresh process."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import pickle
import random
from typing import Any

import numpy as np

from jobs.cluster.parallel import ParallelConfig


def work(arguments: dict[str, Any]) -> None:
    """Runs in every worker of Ray Train: asks for jobs and does them until there are no more.

    After a job nothing of it is left: no random state, no default of Torch, no memory. An error ends the worker.
    """
    import ray
    import torch
    import torch.distributed as dist

    from jobs.cluster.telemetry import Job, Reporter

    telemetry: Any = arguments["telemetry"]
    parallel: ParallelConfig = arguments["parallel"]
    torch.set_num_threads(parallel.threads_per_worker)
    quiet_libraries()
    fresh = _process_state()

    def next_job() -> Job | None:
        packed: Any = ray.get(telemetry.next_job.remote())
        return packed and pickle.loads(packed)

    while (job := next_job()) is not None:
        job.function(job.arguments | {"telemetry": telemetry, "reporter": Reporter(telemetry)})
        del job
        _restore(fresh)
        # All ranks: are done before rank 0 says so, and ask for the next job only after that.
        dist.barrier()
        if dist.get_rank() == 0:
            ray.get(telemetry.finish.remote())
        dist.barrier()


def quiet_libraries() -> None:
    """Silence start-up messages of libraries, and switch Torch's compiler off; our own warnings, and all errors, are
    still shown."""
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    # Nothing here compiles, but DeepSpeed imports an optimizer that would: 2.3 s for Inductor in every worker.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    for name in ("deepspeed", "DeepSpeed", "torchrec", "torch.distributed", "fbgemm_gpu"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _process_state() -> dict[str, Any]:
    """What a job may change in its process and the next one would see."""
    import torch

    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {
        "drawn": (random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
    }


def _restore(state: dict[str, Any]) -> None:
    """Bring the process back to `state`, and give the job's memory back."""
    import torch

    python, numpy, cpu, cuda = state["drawn"]
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
    torch.set_default_dtype(state["dtype"])
    torch.set_num_threads(state["threads"])
    # Engines and tables hold themselves in circles; the allocator keeps what is freed (jobs/cluster/session.py).
    gc.collect()
    if cuda is not None:
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
