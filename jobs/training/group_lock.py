"""Of the workers of a run only the newest group may write: RUN/workers.lock, held by all of its ranks together."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

from jobs.host.locks import POLL_SECONDS, RunInUse, holder, sign, try_lock

GROUP_WAIT_SECONDS = 600.0
"""For the workers of an earlier group of the same command. A host that was cut off ends its own after a minute without
Ray's head (gcs_rpc_server_reconnect_timeout_s), three minutes after the cut as measured; a file server lets go of the
locks of a dead one in one or two."""


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
                descriptor = try_lock(path, fcntl.LOCK_EX)
            except RunInUse as error:
                answer = [str(error)]
            if descriptor is not None:
                sign(descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                answer = [""]
            elif waited > wait_seconds:
                answer = [f"{path.parent}: a worker of an earlier group still writes there ({holder(path)}): end it"]
        dist.broadcast_object_list(answer, src=0)
        if answer[0]:
            raise RunInUse(answer[0])
        if answer[0] == "":
            return descriptor
        if waited >= told + 1:
            told = waited
            tell(f"waiting for the workers of an earlier group to end ({holder(path)}), {waited:.0f} s")
        time.sleep(POLL_SECONDS)
