"""Who may write into a run directory: one command at a time, and of its workers only the newest group.

    RUN/lock          held by the command that drives the run
    RUN/workers.lock  held by every worker; a new group begins when no worker of an earlier one is left

Both are advisory locks of the kernel: they end with the process that holds them, however it ends. Workers outlive a
killed driver by some seconds and may be writing a checkpoint in that time; that is why they have a lock of their own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

from jobs.training.checkpoint import CheckpointError

LOCK_FILES = ("lock", "workers.lock")
WAIT_SECONDS = 60.0
"""For the workers of a dead command; Ray ends them about two seconds after their driver (measured on one machine)."""
GROUP_WAIT_SECONDS = 600.0
"""For the workers of an earlier group of the same command. A host that was cut off ends its own after a minute without
Ray's head (gcs_rpc_server_reconnect_timeout_s), three minutes after the cut as measured; a file server lets go of the
locks of a dead one in one or two."""
POLL_SECONDS = 0.2


class RunInUse(CheckpointError):
    """Another process writes into the run directory; the message says which."""


@contextlib.contextmanager
def sole_command(run_dir: Path, *, otherwise: str = "choose another --name") -> Iterator[None]:
    """Hold RUN/lock; RunInUse if another command does. A directory that stayed empty is removed afterwards.

    `otherwise`: what a user can do but wait."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "lock"
    descriptor = _try_lock(path, fcntl.LOCK_EX)
    if descriptor is None:
        raise RunInUse(f"{run_dir}: {_holder(path)} is working there: wait for it, or {otherwise}")
    _sign(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        with contextlib.suppress(OSError):
            run_dir.rmdir()


def wait_for_workers(run_dir: Path, *, tell: Callable[[str], None], wait_seconds: float = WAIT_SECONDS) -> None:
    """Return when no worker of an earlier command is left; RunInUse after `wait_seconds`."""
    path = run_dir / "workers.lock"
    if not path.exists():
        return
    os.close(_wait_for_lock(path, wait_seconds=wait_seconds, tell=tell))


@contextlib.contextmanager
def sole_group(
    run_dir: Path, *, wait_seconds: float = GROUP_WAIT_SECONDS, tell: Callable[[str], None] = lambda text: None
) -> Iterator[None]:
    """Hold RUN/workers.lock together with the other ranks and with nobody else. Collective.

    `tell` hears on rank 0, once a second, of a worker of an earlier group that still holds it; RunInUse after
    `wait_seconds` of that.
    """
    path = run_dir / "workers.lock"
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = _lock_of_rank_0(path, wait_seconds=wait_seconds, tell=tell)
    if descriptor is None:
        descriptor = os.open(path, os.O_RDWR)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock_of_rank_0(path: Path, *, wait_seconds: float, tell: Callable[[str], None]) -> int | None:
    """Rank 0's descriptor, None on the others: they hear of every try, so that a long wait is no stall. Collective."""
    started, told, descriptor = time.monotonic(), 0.0, None
    while True:
        answer: list[str | None] = [None]
        waited = time.monotonic() - started
        if dist.get_rank() == 0:
            try:
                descriptor = _try_lock(path, fcntl.LOCK_EX)
            except RunInUse as error:
                answer = [str(error)]
            if descriptor is not None:
                _sign(descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                answer = [""]
            elif waited > wait_seconds:
                answer = [f"{path.parent}: a worker of an earlier group still writes there ({_holder(path)}): end it"]
        dist.broadcast_object_list(answer, src=0)
        if answer[0]:
            raise RunInUse(answer[0])
        if answer[0] == "":
            return descriptor
        if waited >= told + 1:
            told = waited
            tell(f"waiting for the workers of an earlier group to end ({_holder(path)}), {waited:.0f} s")
        time.sleep(POLL_SECONDS)


def _wait_for_lock(path: Path, *, wait_seconds: float, tell: Callable[[str], None] = lambda text: None) -> int:
    deadline, told = time.monotonic() + wait_seconds, False
    while (descriptor := _try_lock(path, fcntl.LOCK_EX)) is None:
        if not told:
            tell(f"waiting for workers of an earlier command to end ({_holder(path)})")
            told = True
        if time.monotonic() > deadline:
            raise RunInUse(f"{path.parent}: workers of an earlier command still write there ({_holder(path)}): end it")
        time.sleep(POLL_SECONDS)
    return descriptor


def _try_lock(path: Path, mode: int) -> int | None:
    """A descriptor that holds the lock, None where another process holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return None
            raise RunInUse(
                f"{path}: {error.strerror}: the file system has no locks (flock): choose another --workspace"
            ) from error
        # The holder before may have removed the file after it was opened here.
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)


def _sign(descriptor: int) -> None:
    text = f"process {os.getpid()} on {socket.gethostname()} (since {time.strftime('%Y-%m-%d %H:%M:%S')})"
    # The lock holds without its text; a full disk is told of where its free space is compared with the need.
    with contextlib.suppress(OSError):
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text() or "another process"
    return "another process"
