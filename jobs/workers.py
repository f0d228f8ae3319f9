"""A group of Ray Train workers, seen from the driver: start it, follow it, stop it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from jobs.config import ConfigError, RunConfig
from jobs.signals import noted_signals
from jobs.training.checkpoint import CheckpointError
from jobs.training.parallel import ParallelConfig
from jobs.training.plan import TablesDoNotFit
from pipeline.events import DataError

POLL_SECONDS = 0.5
STOP_SECONDS = 300.0
"""After a first signal the running step, validation and checkpoint get this long; then the command ends without."""


class Interrupted(KeyboardInterrupt):
    """The run stopped on Ctrl-C or SIGTERM, after a checkpoint where there was anything to keep."""


class WorkerFailure(Exception):
    """A worker died or raised; the message says which one and what to do, in one line."""


def run_workers(
    function: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    *,
    config: RunConfig,
    name: str,
    on_rows: Callable[[list[dict[str, Any]]], None],
    stoppable: bool = False,
) -> None:
    """Run `function` on every worker of a Ray Train group and hand rank 0's rows to `on_rows`.

    `fit` runs beside the main thread, which keeps the signals. The first SIGINT or SIGTERM asks all ranks to
    checkpoint and stop (`stoppable`) and raises Interrupted once they did; the second raises at once.
    """
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from jobs.training.telemetry import Telemetry

    parallel = config.parallel
    _check_resources(parallel)
    telemetry = ray.remote(num_cpus=0)(Telemetry).remote()
    trainer = TorchTrainer(
        _start_worker,
        train_loop_config={**arguments, "function": function, "telemetry": telemetry, "parallel": parallel},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if parallel.device == "cuda" else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=parallel.num_workers,
            use_gpu=parallel.device == "cuda",
            resources_per_worker={
                "CPU": parallel.threads_per_worker,
                **({"GPU": 1} if parallel.device == "cuda" else {}),
            },
        ),
        run_config=ray.train.RunConfig(
            name=f"{name}-{int(time.time())}",
            storage_path=str((config.run_dir / "ray").absolute()),
            failure_config=ray.train.FailureConfig(max_failures=config.cluster.max_failures),
        ),
    )
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # handed to the main thread
            failure.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    asked: float | None = None
    with noted_signals() as signalled:
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            on_rows(_answer(telemetry.drain.remote()))
            if asked is None and signalled():
                asked = time.monotonic()
                # Before the first step there is nothing that a checkpoint could keep.
                if not stoppable or not _answer(telemetry.stop.remote()):
                    raise Interrupted(name)
            if asked is not None and time.monotonic() - asked > STOP_SECONDS:
                raise Interrupted(name)
    on_rows(_answer(telemetry.drain.remote()))
    if failure:
        raise _explained(failure[0], asked_to_stop=asked is not None, config=config, name=name) from failure[0]
    if asked is not None:
        raise Interrupted(name)


def _answer(reference: Any) -> Any:
    """What the telemetry actor answers; a WorkerFailure if it is gone."""
    import ray
    from ray.exceptions import RayActorError

    try:
        return ray.get(reference)
    except RayActorError as error:
        raise WorkerFailure("the actor that collects telemetry died: run the same command again") from error


def _start_worker(arguments: dict[str, Any]) -> None:
    """Runs in every worker: threads, noise, then the job's function."""
    import torch

    from jobs.training.parallel import quiet_libraries
    from jobs.training.telemetry import Reporter

    parallel = arguments["parallel"]
    torch.set_num_threads(parallel.threads_per_worker)
    quiet_libraries()
    arguments["function"](arguments | {"reporter": Reporter(arguments["telemetry"])})


def _check_resources(parallel: ParallelConfig) -> None:
    """A group that can never be placed would wait for ever."""
    import ray

    there = ray.cluster_resources()
    needed = {"CPU": parallel.num_cpus, "GPU": parallel.num_workers if parallel.device == "cuda" else 0}
    for kind, count in needed.items():
        if there.get(kind, 0) < count:
            raise ConfigError(
                f"parallel.num_workers={parallel.num_workers}, device={parallel.device}: needs {count} {kind}, "
                f"this Ray has {there.get(kind, 0):.0f}: lower parallel.num_workers or set parallel.device"
            )


def _explained(error: BaseException, *, asked_to_stop: bool, config: RunConfig, name: str) -> BaseException:
    """The error of `fit` as one that is told in a line: of all workers' errors the one that caused the others."""
    from ray.exceptions import OutOfMemoryError, RayActorError

    failures = getattr(error, "worker_failures", None) or {None: error}
    causes = {rank: _root(failure) for rank, failure in failures.items()}
    for cause in causes.values():
        if isinstance(cause, DataError | CheckpointError | TablesDoNotFit):
            return cause
    died, full = (
        ", ".join(str(rank) for rank, cause in sorted(causes.items()) if rank is not None and isinstance(cause, kind))
        for kind in (RayActorError, OutOfMemoryError)
    )
    # A signal to the whole process group ends workers too.
    if asked_to_stop and died:
        return Interrupted(name)
    if full:
        return WorkerFailure(
            f"rank {full} of {config.parallel.num_workers} was ended by Ray, its machine's memory is full: lower "
            "data.loader.batch_events or parallel.num_workers, or take a larger machine"
        )
    if died:
        again = "run the same command again (`solar train` with --resume)"
        if config.cluster.max_failures == 0:
            again += ", or let Ray restart workers with --cluster.max_failures 3"
        return WorkerFailure(
            f"rank {died} of {config.parallel.num_workers} died "
            f"(killed from outside, out of memory, or crashed): {again}"
        )
    # When a rank ends, the others lose their connection to it: what they say tells nothing.
    rank, cause = min(causes.items(), key=lambda item: "gloo" in str(item[1]))
    lines = [line for line in str(cause).splitlines() if line.strip()]
    where = "" if rank is None else f"rank {rank}: "
    return WorkerFailure(f"{where}{type(cause).__name__}: {lines[-1] if lines else ''}")


def _root(error: BaseException) -> BaseException:
    """The worker's own error, out of Ray's wrappers."""
    cause: Any = error
    while True:
        inner = (
            getattr(cause, "cause", None)
            or getattr(cause, "health_check_failure", None)
            or getattr(cause, "controller_failure", None)
            or cause.__cause__
        )
        if inner is None:
            return cause
        cause = inner
