"""The driver's side of a group of Ray Train workers: start it, give it jobs, receive its rows, end it.

A command starts one group, which does all its jobs: a group costs seconds of imports in every worker.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from jobs.cluster.failures import Interrupted, death, explained
from jobs.cluster.parallel import ParallelConfig
from jobs.cluster.session import LOCAL_WORKERS, ClusterConfig, at_end_of_session
from jobs.cluster.telemetry import Job, Telemetry
from jobs.host.errors import UserError
from jobs.host.process import environment, largest_other_process, noted_signals

POLL_SECONDS = 0.5
STOP_SECONDS = 300.0
"""After a first signal, the running step, validation and checkpoint may take this long; then the command ends without
waiting for them."""
RESERVE_SECONDS = 10.0
"""If the number of workers is a range: a group that cannot be placed for this long is resized. Ray counts the resources
of a dead node for some 15 s more, and would wait a minute for them; resources that exist are reserved within a second.
"""
CLOSE_SECONDS = 60.0
"""Idle workers end within Ray's 2 s between two polls; after this time they are left to the end of the Ray session."""
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
    """Run `function` on every worker of a group and pass rank 0's rows to `on_rows`. Ray stores its own files in
    `run_dir`/ray.

    The group of the job before is used if it was started alike and nothing happened to it; the Ray session keeps it
    for the next job. If `stoppable`, the first SIGINT or SIGTERM makes all ranks write a checkpoint and stop, and
    Interrupted is raised afterwards; the second one raises at once.
    """
    group = _Group.kept
    if group is None or not group.is_fit_for(parallel, cluster):
        release_workers()
        group = _Group.kept = _Group(parallel, cluster, run_dir=run_dir)
        at_end_of_session(release_workers)
    group.run(Job(function, arguments), name=name, on_rows=on_rows, stoppable=stoppable)


def release_workers() -> None:
    """End the idle workers that the session keeps, if there are any; their CPUs and GPUs are free afterwards."""
    group, _Group.kept = _Group.kept, None
    if group is not None:
        group.close()


def make_room_for_tasks() -> None:
    """Before Ray tasks are started: end the idle workers if they leave no CPU for tasks."""
    import ray

    if _Group.kept is not None and ray.available_resources().get("CPU", 0) < 1:
        release_workers()


class _Group:
    """A group of Ray Train workers that does one job after the other, each from the state of a fresh process.

    `fit` runs in another thread for as long as the group lives, because only the main thread receives signals.
    """

    kept: ClassVar[_Group | None] = None
    """The group of this process's Ray session."""

    def __init__(self, parallel: ParallelConfig, cluster: ClusterConfig, *, run_dir: Path) -> None:
        import ray
        import ray.train
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from jobs.cluster.failure_callback import FailureCallback
        from jobs.cluster.worker import work

        self._parallel, self._cluster = parallel, cluster
        self._restarts = cluster.restarts(elastic=parallel.elastic)
        self._failures: list[BaseException] = []
        self._worn, self._idle = False, True
        reserved = _reserved(parallel)
        # The actor must run on the node of the driver and of Ray Train's controller, to survive the loss of other
        # nodes.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._telemetry: Any = ray.remote(num_cpus=0)(Telemetry).options(scheduling_strategy=here).remote()
        self._trainer = TorchTrainer(
            work,
            train_loop_config={"telemetry": self._telemetry, "parallel": parallel},
            torch_config=TorchConfig(
                backend="cpu:gloo,cuda:nccl" if parallel.device == "cuda" else "gloo",
                timeout_s=math.ceil(parallel.stall_seconds + LATER_SECONDS),
            ),
            scaling_config=ray.train.ScalingConfig(
                num_workers=(parallel.min_workers, parallel.max_workers) if parallel.elastic else parallel.min_workers,
                use_gpu=parallel.device == "cuda",
                resources_per_worker=reserved,
            ),
            run_config=ray.train.RunConfig(
                name=f"workers-{time.time_ns()}",
                storage_path=str((run_dir / "ray").absolute()),
                failure_config=ray.train.FailureConfig(max_failures=self._restarts),
                callbacks=[FailureCallback(self._telemetry, parallel)],
            ),
        )
        self._thread = threading.Thread(target=self._fit, daemon=True)
        self._settings = ExitStack()
        self._settings.enter_context(environment(_controller_settings(parallel)))
        self._thread.start()

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:  # raised by the main thread
            self._failures.append(error)

    def is_fit_for(self, parallel: ParallelConfig, cluster: ClusterConfig) -> bool:
        """Whether a job of these settings may run here: started alike, alive, and never restarted, because every job
        has all its restarts."""
        return (parallel, cluster) == (self._parallel, self._cluster) and self._thread.is_alive() and not self._worn

    def run(self, job: Job, *, name: str, on_rows: Callable[[list[dict[str, Any]]], None], stoppable: bool) -> None:
        """Have the job done, pass on its rows, and handle signals."""
        finished, stop_requested = False, None
        with noted_signals() as signalled:
            self._idle = False
            _answer(self._telemetry.give.remote(job.packed()))
            while self._thread.is_alive() and not finished:
                finished = self._idle = self._pass_on(on_rows, seconds=POLL_SECONDS)
                if stop_requested is None and signalled():
                    stop_requested = time.monotonic()
                    # Before training has begun there is nothing to store in a checkpoint.
                    if not stoppable or not _answer(self._telemetry.stop.remote()):
                        raise Interrupted(name)
                if stop_requested is not None and time.monotonic() - stop_requested > STOP_SECONDS:
                    raise Interrupted(name)
        # The group has ended without an answer: pass on its last rows and say why.
        if not finished and not self._pass_on(on_rows):
            failure = self._failures[0] if self._failures else RuntimeError("the workers ended before their job")
            raise explained(
                failure, asked_to_stop=stop_requested is not None, parallel=self._parallel, restarts=self._restarts,
                name=name, other=_largest_other(),
            ) from failure  # fmt: skip
        if stop_requested is not None:
            raise Interrupted(name)

    def _pass_on(self, on_rows: Callable[[list[dict[str, Any]]], None], *, seconds: float = 0.0) -> bool:
        """Pass on what rank 0 pushed within `seconds`; returns whether the job is finished."""
        rows, finished = _answer(self._telemetry.drain.remote(seconds))
        self._worn = self._worn or any(row["kind"] == "failure" for row in rows)
        on_rows(rows)
        return finished

    def close(self) -> None:
        """End the workers if they are idle; after an error of the driver itself the Ray session's end ends them."""
        if self._idle and self._thread.is_alive():
            _answer(self._telemetry.close.remote())
            self._thread.join(CLOSE_SECONDS)
        self._settings.close()


def _reserved(parallel: ParallelConfig) -> dict[str, float]:
    """What each worker reserves in Ray; UserError if the cluster is too small for the group, which would otherwise wait
    for ever."""
    import ray

    there = ray.cluster_resources()
    # A local Ray has a resource for workers alone: kept while tasks run, they are idle and need no CPU.
    kind = LOCAL_WORKERS if LOCAL_WORKERS in there else "CPU"
    reserved: dict[str, float] = {kind: parallel.threads_per_worker}
    if parallel.device == "cuda":
        reserved["GPU"] = 1
    for kind, count in reserved.items():
        if there.get(kind, 0) < parallel.min_workers * count:
            workers = [parallel.min_workers, parallel.max_workers] if parallel.elastic else parallel.num_workers
            raise UserError(
                f"parallel.num_workers={workers}, device={parallel.device}: needs {parallel.min_workers * count:g} "
                f"{kind}, this Ray has {there.get(kind, 0):.0f}: lower parallel.num_workers or set parallel.device"
            )
    return reserved


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
    """The answer of the telemetry actor; WorkerFailure if the actor has died, also if Ray ended it for memory."""
    import ray
    from ray.exceptions import OutOfMemoryError, RayActorError

    try:
        return ray.get(reference)
    except (RayActorError, OutOfMemoryError) as error:
        raise death("the actor that collects telemetry", error, other=_largest_other()) from error


def _largest_other() -> str | None:
    """The largest process of this machine if it is not Solar's; None in a cluster of several machines, where it need
    not be the one that matters."""
    import ray

    return largest_other_process() if len(ray.nodes()) == 1 else None
