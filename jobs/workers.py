"""A group of Ray Train workers, seen from the driver: start it, follow it, stop it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jobs.config import ConfigError, RunConfig
from jobs.training.checkpoint import CheckpointError
from jobs.training.parallel import ParallelConfig
from pipeline.events import DataError

POLL_SECONDS = 0.5


class Interrupted(Exception):
    """The run stopped on Ctrl-C or SIGTERM, after a checkpoint."""


class WorkerFailure(Exception):
    """A worker died or raised; the message is the first line of its error."""


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
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from jobs.training.telemetry import Telemetry

    parallel = config.parallel
    _check_resources(parallel)
    telemetry = Telemetry.remote()
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
    with _signals(lambda: telemetry.stop.remote() if stoppable else None) as asked_to_stop:
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            on_rows(ray.get(telemetry.drain.remote()))
            if asked_to_stop() and not stoppable:
                raise Interrupted(name)
    on_rows(ray.get(telemetry.drain.remote()))
    if failure:
        cause = _first_cause(failure[0])
        if isinstance(cause, DataError | CheckpointError):
            raise cause
        lines = [line for line in str(cause).splitlines() if line.strip()]
        raise WorkerFailure(f"{type(cause).__name__}: {lines[-1] if lines else ''}") from failure[0]
    if asked_to_stop():
        raise Interrupted(name)


def _start_worker(arguments: dict[str, Any]) -> None:
    """Runs in every worker: threads, noise, then the job's function."""
    import torch

    from jobs.training.parallel import quiet_libraries
    from jobs.training.telemetry import Reporter

    parallel = arguments["parallel"]
    torch.set_num_threads(parallel.threads_per_worker)
    quiet_libraries()
    arguments["function"](arguments | {"reporter": Reporter(arguments["telemetry"])})


@contextmanager
def _signals(on_first: Callable[[], Any]) -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM set a flag and call `on_first`; a second one raises KeyboardInterrupt."""
    seen: list[int] = []

    def handle(number: int, _frame: Any) -> None:
        seen.append(number)
        if len(seen) > 1:
            raise KeyboardInterrupt
        on_first()

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


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


def _first_cause(error: BaseException) -> BaseException:
    """The worker's own error, out of Ray's wrappers."""
    failures = getattr(error, "worker_failures", None)
    cause: Any = next(iter(failures.values())) if failures else error
    while getattr(cause, "cause", None) is not None or cause.__cause__ is not None:
        cause = getattr(cause, "cause", None) or cause.__cause__
    return cause
