"""Who may write into a run directory: one command at a time, and only the newest group of its workers.

    RUN/lock          held by the command that drives the run
    RUN/workers.lock  held by every worker; a new group starts when no worker of an earlier group is left

Both are advisory locks of the kernel: they are released when the process that holds them ends, for whatever reason.
Workers outlive a killed driver by some seconds and may write a checkpoint in that time: hence their separate lock.
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

from jobs.host.errors import TryLater, UserError

LOCK_FILES = ("lock", "workers.lock")
WAIT_SECONDS = 60.0
"""How long to wait for the workers of a dead command; Ray ends them about two seconds after their driver (measured on
one machine)."""
POLL_SECONDS = 0.2
_LONGEST_SIGNATURE = 400


class RunInUse(TryLater):
    """Another process writes into the run directory; the message says which one."""


@contextlib.contextmanager
def sole_command(run_dir: Path, *, otherwise: str = "choose another --name") -> Iterator[None]:
    """Hold RUN/lock during the block; RunInUse if another command holds it. A run directory that is still empty at the
    end is removed.

    `otherwise`: what the user can do instead of waiting, for the message."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "lock"
    descriptor = try_lock(path, fcntl.LOCK_EX)
    if descriptor is None:
        raise RunInUse(f"{run_dir}: {holder(path)} is working there: wait for it, or {otherwise}")
    try:
        with _signed(path, descriptor):
            yield
    finally:
        with contextlib.suppress(OSError):
            run_dir.rmdir()


def wait_for_workers(run_dir: Path, *, tell: Callable[[str], None], wait_seconds: float = WAIT_SECONDS) -> None:
    """Return when no worker of an earlier command is left; RunInUse after `wait_seconds`."""
    path = run_dir / "workers.lock"
    if not path.exists():
        return
    os.close(_wait_for_lock(path, wait_seconds=wait_seconds, tell=tell))


@contextlib.contextmanager
def in_turn(path: Path, *, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file during the block, one process after the other; `tell` gets a line if this one must wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if (descriptor := try_lock(path, fcntl.LOCK_EX)) is None:
        tell(f"waiting for {holder(path)}")
        while (descriptor := try_lock(path, fcntl.LOCK_EX)) is None:
            time.sleep(POLL_SECONDS)
    with _signed(path, descriptor):
        yield


@contextlib.contextmanager
def _signed(path: Path, descriptor: int) -> Iterator[None]:
    """The locked file names this process during the block; then it is removed and unlocked."""
    sign(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _wait_for_lock(path: Path, *, wait_seconds: float, tell: Callable[[str], None] = lambda text: None) -> int:
    deadline, announced = time.monotonic() + wait_seconds, False
    while (descriptor := try_lock(path, fcntl.LOCK_EX)) is None:
        if not announced:
            tell(f"waiting for workers of an earlier command to end ({holder(path)})")
            announced = True
        if time.monotonic() > deadline:
            raise RunInUse(
                f"{path.parent}: workers of an earlier command still write there ({holder(path)}): end that process"
            )
        time.sleep(POLL_SECONDS)
    return descriptor


def try_lock(path: Path, mode: int) -> int | None:
    """Try to take the flock `mode` of the file: a descriptor that holds it, or None if another process holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return None
            raise UserError(
                f"{path}: {error.strerror}: this file system does not support locks (flock): choose another --workspace"
            ) from error
        # The previous holder may have removed the file after it was opened here: then the lock protects nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)


def sign(descriptor: int) -> None:
    """Write into a held lock file which process holds it."""
    text = f"process {os.getpid()} on {socket.gethostname()} (since {time.strftime('%Y-%m-%d %H:%M:%S')})"
    # The lock works without this text. A full disk is reported elsewhere: where free space is compared with the need.
    with contextlib.suppress(OSError):
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)


def holder(path: Path) -> str:
    """The text of `sign` in a lock file, for messages; another text there is of no use to anybody."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        with path.open(encoding="utf-8") as stream:
            text = stream.read(_LONGEST_SIGNATURE)
        if text.startswith("process ") and text.isprintable():
            return text
    return "another process"
