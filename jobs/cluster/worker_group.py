"""The driver's side of a group of Ray Train workers: start it, receive its rows, stop it."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.cluster.failures import Interrupted, WorkerFailure, explained
from jobs.cluster.parallel import ParallelConfig
from jobs.cluster.session import ClusterConfig
from jobs.host.errors import UserError
from jobs.host.process import environment, noted_signals

POLL_SECONDS = 0.5
STOP_SECONDS = 300.0
"""After a first signal, the running step, validation and checkpoint may take this long; then the command ends without
waiting for them."""
RESERVE_SECONDS = 10.0
"""If the number of workers is a range: a group that cannot be placed for this long is resized. Ray counts the resources
of a dead node for some 15 s more, and would wait a minute for them; resources that exist are reserved within a second.
"""
LATER_SECONDS = 10.0
"""Ranks wait so much longer for each other in a step than Ray waits for an answer: a stopped process is then found by
Ray first, which knows its rank."""


def run_workers(
    function: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    *,
    parallel: ParallelConfig,
    cluster: ClusterConfig,
    run_dir: Path,
    name: str,
    on_rows: Callable[[list[dict[str, Any]]], None],
    stoppable: bool = False,
) -> None:
    """Run `function` on every worker of a Ray Train group and pass rank 0's rows to `on_rows`. Ray stores its own files
    in `run_dir`/ray.

    `fit` runs in another thread, because only the main thread receives signals. If `stoppable`, the first SIGINT or
    SIGTERM makes all ranks write a checkpoint and stop, and Interrupted is raised afterwards; the second one raises at
    once.
    """
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from jobs.cluster.failure_callback import FailureCallback
    from jobs.cluster.telemetry import Telemetry

    # Describe the group: resources, process group, restarts.
    _check_resources(parallel)
    restarts = cluster.restarts(elastic=parallel.elastic)
    # The actor must run on the node of the driver and of Ray Train's controller, to survive the loss of other nodes.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    telemetry = ray.remote(num_cpus=0)(Telemetry).options(scheduling_strategy=here).remote()
    trainer = TorchTrainer(
        _start_worker,
        train_loop_config={**arguments, "function": function, "telemetry": telemetry, "parallel": parallel},
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if parallel.device == "cuda" else "gloo",
            timeout_s=math.ceil(parallel.stall_seconds + LATER_SECONDS),
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(parallel.min_workers, parallel.max_workers) if parallel.elastic else parallel.min_workers,
            use_gpu=parallel.device == "cuda",
            resources_per_worker={
                "CPU": parallel.threads_per_worker,
                **({"GPU": 1} if parallel.device == "cuda" else {}),
            },
        ),
        run_config=ray.train.RunConfig(
            name=f"{name}-{int(time.time())}",
            storage_path=str((run_dir / "ray").absolute()),
            failure_config=ray.train.FailureConfig(max_failures=restarts),
            callbacks=[FailureCallback(telemetry, parallel)],
        ),
    )
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # handed to the main thread
            failure.append(error)

    # Run the group, pass on its rows, and handle signals.
    thread = threading.Thread(target=fit, daemon=True)
    stop_requested: float | None = None
    with environment(_controller_settings(parallel)), noted_signals() as signalled:
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            on_rows(_answer(telemetry.drain.remote()))
            if stop_requested is None and signalled():
                stop_requested = time.monotonic()
                # Before training has begun there is nothing to store in a checkpoint.
                if not stoppable or not _answer(telemetry.stop.remote()):
                    raise Interrupted(name)
            if stop_requested is not None and time.monotonic() - stop_requested > STOP_SECONDS:
                raise Interrupted(name)
    # The group has ended: pass on its last rows and report its outcome.
    on_rows(_answer(telemetry.drain.remote()))
    if failure:
        raise explained(
            failure[0], asked_to_stop=stop_requested is not None, parallel=parallel, restarts=restarts, name=name
        ) from failure[0]
    if stop_requested is not None:
        raise Interrupted(name)


def _controller_settings(parallel: ParallelConfig) -> dict[str, str]:
    """Environment variables that Ray Train's controller reads from the driver's environment."""
    import ray

    settings = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(parallel.stall_seconds)}
    if parallel.max_workers == 1:
        # Poll a single worker more often than Ray's 2 s, to notice its end sooner. Not with several workers: when one
        # dies, Ray must learn of it before the broken connections of the others are mistaken for the cause.
        settings["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"
    if not parallel.elastic and len(ray.nodes()) == 1:
        # A preemption of the only node would end the driver, too: no need to watch for it.
        settings["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    if parallel.elastic:
        settings["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(RESERVE_SECONDS)
    return settings


def _answer(reference: Any) -> Any:
    """The answer of the telemetry actor; WorkerFailure if the actor has died."""
    import ray
    from ray.exceptions import RayActorError

    try:
        return ray.get(reference)
    except RayActorError as error:
        raise WorkerFailure("the actor that collects telemetry died: run the same command again") from error


def _start_worker(arguments: dict[str, Any]) -> None:
    """Runs in every worker: sets the number of threads, silences libraries, then runs the job's function."""
    import torch

    from jobs.cluster.telemetry import Reporter
    from jobs.cluster.worker_group import quiet_libraries

    parallel = arguments["parallel"]
    torch.set_num_threads(parallel.threads_per_worker)
    quiet_libraries()
    arguments["function"](arguments | {"reporter": Reporter(arguments["telemetry"])})


def _check_resources(parallel: ParallelConfig) -> None:
    """UserError if the cluster is too small for the group, which would otherwise wait for ever."""
    import ray

    there = ray.cluster_resources()
    needed = {
        "CPU": parallel.min_workers * parallel.threads_per_worker,
        "GPU": parallel.min_workers if parallel.device == "cuda" else 0,
    }
    for kind, count in needed.items():
        if there.get(kind, 0) < count:
            workers = [parallel.min_workers, parallel.max_workers] if parallel.elastic else parallel.num_workers
            raise UserError(
                f"parallel.num_workers={workers}, device={parallel.device}: needs {count} {kind}, "
                f"this Ray has {there.get(kind, 0):.0f}: lower parallel.num_workers or set parallel.device"
            )


def quiet_libraries() -> None:
    """Silence start-up messages of libraries; our own warnings, and all errors, are still shown."""
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    for name in ("deepspeed", "DeepSpeed", "torchrec", "torch.distributed", "fbgemm_gpu"):
        logging.getLogger(name).setLevel(logging.ERROR)
