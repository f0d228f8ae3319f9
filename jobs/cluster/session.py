"""Ray, started here or joined by address."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from jobs.host.process import environment, noted_signals

OBJECT_STORE_BYTES = 512 << 20
"""Enough for a local run: events travel through files, not through the object store."""


ELASTIC_RESTARTS = 3
"""Of a group that may lose a node: enough for nodes, few for an error that comes again every time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where the job runs."""

    address: str | None = None
    """Ray address (`auto`, `ray://host:10001`, `host:6379`, or `local` for a Ray that lives as long as the command);
    unset = RAY_ADDRESS, which Ray sets inside a submitted job, else `local`."""
    max_failures: int | None = None
    """Restarts of the worker group by Ray Train after a worker died; each continues from the latest checkpoint.
    Unset = 0, and 3 where parallel.num_workers is a range."""

    def restarts(self, *, elastic: bool) -> int:
        """`max_failures`, or what stands for it; -1: no limit."""
        if self.max_failures is None:
            return ELASTIC_RESTARTS if elastic else 0
        return self.max_failures

    def __post_init__(self) -> None:
        if self.max_failures is not None and self.max_failures < -1:
            raise ValueError(f"max_failures={self.max_failures}: must be -1 (no limit), 0 or more")


FIXED_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
}
DEFAULT_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray Train waits so long for a failed group to leave its process group; a rank that hangs never does.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    # Keep freed tensors in the process: giving them back page by page costs a step 20 to 30 % on a CPU
    # (MovieLens-100K, 1 and 2 ranks). Workers of a local Ray inherit it, those of a job get it from `solar submit`.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
}

WORKER_ENVIRONMENT = {"POLARS_MAX_THREADS": "1"}
"""For workers alone: tasks share out the cores; threads of each for all of them cost a quarter (prepare, 2 cores)."""
TRIES_VARIABLE = "RAY_gcs_server_port_wait_time_s"
"""How often Ray tries to connect to a cluster: 20 times unless set, each of up to 30 s where nobody answers."""


def quiet_environment() -> None:
    """Settings that libraries read when they are imported; nothing of ours phones home."""
    os.environ.update(FIXED_ENVIRONMENT)
    for key, value in DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(key, value)


@contextmanager
def ray_session(config: ClusterConfig, *, num_cpus: int = 1, verbose: bool = False) -> Iterator[None]:
    """Ray for the duration of the block; a session that is already there is used and left alone.

    A local Ray offers at least `num_cpus`, so that a training group of that size can be placed on a smaller machine.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    level = logging.INFO if verbose else logging.ERROR
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    # What Ray's C++ makes at its start waits for ever in its destructors when a signal interrupts it (seen: Ctrl-C).
    with noted_signals(second=lambda: os._exit(130)) as signalled:
        if address == "local":
            _start(num_cpus=num_cpus, level=level)
        else:
            _join(address, named=f"{'cluster.address' if config.address else 'RAY_ADDRESS'}={address}", level=level)
    if signalled():
        raise KeyboardInterrupt
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    except Exception:
        ray.shutdown()
        raise
    # On an interruption another thread (Ray Train's, Ray Data's) may be waiting in Ray's C++ code, and a shutdown under
    # it crashes (seen: SIGSEGV). The process is about to end, and a local Ray ends with it.
    ray.shutdown()


def _start(*, num_cpus: int, level: int) -> None:
    """A Ray of this command alone; ConnectionError where the machine is too busy to start one."""
    import ray

    # What Ray starts inherits it; what a user set stays.
    inherited = {name: os.environ.get(name, value) for name, value in WORKER_ENVIRONMENT.items()}
    try:
        with environment(inherited):
            ray.init(
                address="local",
                num_cpus=max(num_cpus, psutil.cpu_count() or 1),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                logging_level=level,
                log_to_driver=level == logging.INFO,
            )
    # Ray raises the base class here, after a limit that it cannot be told to change.
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        raise ConnectionError(
            "Ray did not start within 30 s, this machine is too busy (or out of memory): end something and try again"
        ) from error


def _join(address: str, *, named: str, level: int) -> None:
    """Connect to a running cluster; ConnectionError with one line that starts with `named`."""
    import ray
    from ray.exceptions import AuthenticationError

    if address.startswith(("http://", "https://")):
        raise ConnectionError(
            f"{named}: is a dashboard, which takes jobs: use `solar submit`, or --cluster.address local to run here"
        )
    try:
        with environment({TRIES_VARIABLE: os.environ.get(TRIES_VARIABLE, "1")}):
            ray.init(address=address, logging_level=level, log_to_driver=level == logging.INFO)
    except (AuthenticationError, ConnectionError) as error:
        # While it joins, Ray tells of a refused token only in the text of the cause.
        if isinstance(error, AuthenticationError) or "InvalidAuthToken" in str(error.__cause__):
            raise ConnectionError(
                f"{named}: refuses this machine's token, or there is none: copy the cluster's (`ray get-auth-token`) "
                "to ~/.ray/auth_token, or set RAY_AUTH_TOKEN_PATH, and set RAY_AUTH_MODE=token"
            ) from error
        raise ConnectionError(
            f"{named}: no Ray cluster answers there: start one with `ray start --head`, "
            "or use --cluster.address local to run on this machine"
        ) from error
