"""A Ray session: starts a local Ray, or connects to a cluster by its address."""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path

import psutil

from jobs.host.errors import TryLater
from jobs.host.process import environment, noted_signals
from jobs.host.secrets import keep_private

OBJECT_STORE_BYTES = 512 << 20
"""Enough for a local run: events are passed in files, not in the object store."""


ELASTIC_RESTARTS = 3
"""Default number of restarts of an elastic group: enough for lost nodes, and not too many for an error that occurs
every time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The Ray cluster on which the job runs."""

    address: str | None = None
    """Ray address: `auto`, `ray://host:10001`, `host:6379`, or `local` for a Ray that runs as long as the command.
    Unset = the environment variable RAY_ADDRESS, which Ray sets inside a submitted job, else `local`."""
    max_failures: int | None = None
    """How often Ray Train restarts the worker group after the death of a worker, each time from the latest checkpoint;
    -1 = no limit. Unset = 0, or 3 if parallel.num_workers is a range."""

    def restarts(self, *, elastic: bool) -> int:
        """`max_failures`, or its default; -1 = no limit."""
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
    # Ray begins a task that it ended for memory again without end, and the command would wait without a word.
    "RAY_task_oom_retries": "5",
    # How long Ray Train waits until the ranks of a failed group leave their process group; a hanging rank never does.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    # Keep freed memory in the process: returning it to the system page by page makes a step 20 to 30 % slower on a CPU
    # (MovieLens-100K, 1 and 2 ranks). Workers of a local Ray inherit this, those of a job get it from `solar submit`.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
}

LOCAL_WORKERS = "solar_worker"
"""The resource that workers of a training reserve in a local Ray, instead of CPUs: a command keeps them between its
jobs, and runs tasks then."""

WORKER_ENVIRONMENT = {"POLARS_MAX_THREADS": "1"}
"""For Ray workers only: Ray runs one task per core, and if each task had a thread for every core, the work would take a
quarter more time (prepare, 2 cores)."""
LOCAL_ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo"}
"""For workers of a local Ray: ranks meet on this machine alone."""
CLUSTERS_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""With 0 a local Ray has the address 127.0.0.1 and listens there alone, as it does on macOS and Windows. The argument
`_node_ip_address` of `ray.init` does not help: Ray replaces 127.0.0.1 by the machine's own address."""
TRIES_VARIABLE = "RAY_gcs_server_port_wait_time_s"
"""How often Ray tries to connect to a cluster: 20 times by default, each up to 30 s if the address does not answer."""


def quiet_environment() -> None:
    """Set environment variables that libraries read at import, among them those that turn off usage reports."""
    os.environ.update(FIXED_ENVIRONMENT)
    for key, value in DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(key, value)


@contextmanager
def ray_session(config: ClusterConfig, *, num_cpus: int | None = None, verbose: bool = False) -> Iterator[None]:
    """A Ray session for the duration of the block; an existing session is used and not ended.

    `num_cpus`: the CPUs of training workers that the block starts; None if it starts none. A local Ray has room for
    them, also on a smaller machine.
    """
    global _open
    if _open:
        yield
        return
    import ray

    ours = not ray.is_initialized()
    if ours:
        with ThreadPoolExecutor(max_workers=1) as pool:
            # While this process waits for those of Ray, it imports what a command with workers needs next.
            for module in ("ray.train.torch", "mlflow") if num_cpus is not None else ():
                pool.submit(import_module, module)
            _connect(config, num_cpus=num_cpus or 1, level=logging.INFO if verbose else logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    _open = True
    try:
        yield
    except Exception:
        _end(shutdown=ours)
        raise
    finally:
        _open = False
    # No shutdown after an interruption: another thread (of Ray Train or Ray Data) may wait in Ray's C++ code, and a
    # shutdown then crashes (observed: SIGSEGV). The process is about to end, and a local Ray ends with it.
    _end(shutdown=ours)


_open = False
_at_end = ExitStack()


def at_end_of_session(call: Callable[[], None]) -> None:
    """Call this before this process's session ends, unless it is interrupted."""
    _at_end.callback(call)


def _end(*, shutdown: bool) -> None:
    import ray

    try:
        _at_end.close()
    finally:
        if shutdown:
            ray.shutdown()
            # Ray's C++ code leaves SIGTERM at its default then, which ends the process without a word, whatever Python
            # says its handler is.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)


def _connect(config: ClusterConfig, *, num_cpus: int, level: int) -> None:
    """Start a local Ray or join the cluster; KeyboardInterrupt if a signal came meanwhile."""
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    # Record signals while Ray starts: an exception there makes destructors of its C++ code wait for ever (observed with
    # Ctrl-C).
    with noted_signals(second=lambda: os._exit(130)) as signalled:
        if address == "local":
            _start(num_cpus=num_cpus, level=level)
        else:
            _join(address, named=f"{'cluster.address' if config.address else 'RAY_ADDRESS'}={address}", level=level)
    if signalled():
        raise KeyboardInterrupt


def _start(*, num_cpus: int, level: int) -> None:
    """Start a local Ray for this command, which listens on loopback alone; ConnectionError if the machine is too busy
    to start it."""
    import ray

    _keep_token_private()
    # Ray's processes inherit these variables; values set by the user stay.
    settings = WORKER_ENVIRONMENT | LOCAL_ENVIRONMENT
    inherited = {name: os.environ.get(name, value) for name, value in settings.items()}
    try:
        with environment(inherited), _loopback():
            ray.init(
                address="local",
                num_cpus=psutil.cpu_count() or 1,
                resources={LOCAL_WORKERS: max(num_cpus, psutil.cpu_count() or 1)},
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                logging_level=level,
                log_to_driver=level == logging.INFO,
            )
    # Ray raises the base class Exception here, after a time limit that cannot be changed.
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        raise TryLater(
            "Ray did not start within 30 s: this machine is too busy or out of memory: end other programs and try again"
        ) from error


def _keep_token_private() -> None:
    """Make the token that a local Ray would otherwise write itself, readable by everybody; an existing file loses what
    others may do. Nothing to do where the environment has a token or names its file, or where the user wants none."""
    elsewhere = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not elsewhere and os.environ.get("RAY_AUTH_MODE", "token").lower() == "token":
        keep_private(Path.home() / ".ray" / "auth_token", secrets.token_hex(32))


@contextmanager
def _loopback() -> Iterator[None]:
    """In the block, what Ray starts listens on 127.0.0.1 alone."""
    from ray._private import ray_constants

    # This process may have imported Ray before: there the constant counts, in Ray's new processes the variable.
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with environment({CLUSTERS_VARIABLE: "0"}):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _join(address: str, *, named: str, level: int) -> None:
    """Connect to a running cluster; ConnectionError with one line that starts with `named`."""
    import ray
    from ray.exceptions import AuthenticationError

    if address.startswith(("http://", "https://")):
        raise ConnectionError(
            f"{named}: is the address of a dashboard: use `solar submit`, or --cluster.address local to run here"
        )
    try:
        with environment({TRIES_VARIABLE: os.environ.get(TRIES_VARIABLE, "1")}):
            ray.init(address=address, logging_level=level, log_to_driver=level == logging.INFO)
    except (AuthenticationError, ConnectionError) as error:
        # While connecting, Ray reports a refused token only in the text of the cause.
        if isinstance(error, AuthenticationError) or "InvalidAuthToken" in str(error.__cause__):
            raise ConnectionError(
                f"{named}: refuses this machine's token, or there is none: copy the cluster's (`ray get-auth-token`) "
                "to ~/.ray/auth_token, or set RAY_AUTH_TOKEN_PATH, and set RAY_AUTH_MODE=token"
            ) from error
        raise ConnectionError(
            f"{named}: no Ray cluster answers there: start one with `ray start --head`, "
            "or use --cluster.address local to run on this machine"
        ) from error
