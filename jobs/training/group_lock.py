"""Only the newest worker group of a run may write: all of its ranks together hold RUN/workers.lock."""

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
"""How long to wait for workers of an earlier group of the same command. A host that is cut off from the network ends
its workers after a minute without Ray's head node (gcs_rpc_server_reconnect_timeout_s), measured as three minutes after
the cut; a file server releases the locks of a dead host after one or two minutes."""


@contextlib.contextmanager
def sole_group(
    run_dir: Path, *, wait_seconds: float = GROUP_WAIT_SECONDS, tell: Callable[[str], None] = lambda text: None
) -> Iterator[None]:
    """Hold RUN/workers.lock during the block, together with the other ranks of this group alone. A collective.

    While a worker of an earlier group holds it, `tell` gets a line once a second; RunInUse after `wait_seconds`.
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
    """Rank 0's descriptor, None on other ranks. A collective: every try is broadcast, so that a long wait does not
    look like a stalled rank.

    The answer of rank 0: None = try again, "" = locked, other text = the error.
    """
    started, last_line, descriptor = time.monotonic(), 0.0, None
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
                answer = [f"{path.parent}: a worker of an earlier group still writes there: end {holder(path)}"]
        dist.broadcast_object_list(answer, src=0)
        if answer[0]:
            raise RunInUse(answer[0])
        if answer[0] == "":
            return descriptor
        if waited >= last_line + 1:
            last_line = waited
            tell(f"waiting for the workers of an earlier group to end ({holder(path)}), {waited:.0f} s")
        time.sleep(POLL_SECONDS)
