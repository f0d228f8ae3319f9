"""Communication between driver and workers: jobs and a stop flag to all ranks, rows from rank 0 to the driver.

The driver hands one job after the other to an actor, of which every rank asks for the next one. Rank 0 pushes rows into
the same actor; the driver polls them for its progress bar and for MLflow. The driver sets the stop flag there, too; it
reaches all ranks in the same step.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Job:
    """What all workers of a group do next: call `function` with `arguments` and a reporter."""

    function: Callable[[dict[str, Any]], None]
    arguments: dict[str, Any]

    def packed(self) -> bytes:
        """As the actor keeps it: it need not import what the job does, Torch first of all, which takes seconds."""
        from ray.cloudpickle.cloudpickle import dumps

        return dumps(self)


class Telemetry:
    """The actor: jobs and a stop flag from the driver, rows from rank 0. A job is given out again, to a restarted
    group, until it is finished."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._job: bytes | None = None
        self._closed = self._stop = self._started = False
        self._changed = asyncio.Condition()

    async def give(self, job: bytes) -> None:
        """The next job, packed, once the one before is finished."""
        async with self._changed:
            self._job, self._stop, self._started = job, False, False
            self._changed.notify_all()

    async def next_job(self) -> bytes | None:
        """Waits for a packed job that is not finished; None = there are no more."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._job is not None or self._closed)
        return self._job

    async def finish(self) -> None:
        """All ranks have done the job; called by rank 0 before any rank asks for the next one."""
        async with self._changed:
            self._job = None
            self._changed.notify_all()

    async def close(self) -> None:
        """There are no more jobs: the workers end."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def push(self, rows: list[dict[str, Any]]) -> bool:
        """Append rows; returns the stop flag."""
        self._rows.extend(rows)
        self._started = self._started or any(row["kind"] == "start" for row in rows)
        return self._stop

    async def drain(self, seconds: float = 0.0) -> tuple[list[dict[str, Any]], bool]:
        """(all rows since the last call, whether the job is finished), after `seconds` or once it is."""
        with contextlib.suppress(TimeoutError):
            async with self._changed:
                await asyncio.wait_for(self._changed.wait_for(lambda: self._job is None), seconds)
        rows, self._rows = self._rows, []
        return rows, self._job is None

    async def stop(self) -> bool:
        """Request that all ranks write a checkpoint at the same step and end; returns whether training has begun (row
        `start`)."""
        self._stop = True
        return self._started


class Reporter:
    """A rank's side: `row` sends rows from rank 0, `should_stop` is a collective of all ranks."""

    def __init__(self, actor: Any | None) -> None:
        # Import Torch and Ray only in a rank: the actor needs neither.
        import torch.distributed as dist

        self._actor = actor if dist.get_rank() == 0 else None
        self._pending: list[Any] = []
        self._stop = False

    def row(self, kind: str, **values: Any) -> None:
        """On rank 0, send one row without waiting for the answer; on other ranks, do nothing.

        A row of kind `progress` (stage, done, total) is shown with the progress bar and not stored.
        """
        if self._actor is not None:
            rows = [{"kind": kind, "time": time.time(), **values}]
            self._pending.append(self._actor.push.remote(rows))

    def should_stop(self) -> bool:
        """Whether the driver requested a stop, the same answer on every rank. A collective: all ranks take part."""
        import ray

        if self._pending:
            # Use the answers that have arrived, of earlier steps: waiting for this step's would cost a round trip.
            ready, self._pending = ray.wait(self._pending, num_returns=len(self._pending), timeout=0)
            self._stop = self._stop or any(ray.get(ready))
        return bool(said_by_rank_0(float(self._stop)))


def said_by_rank_0(number: float) -> float:
    """Rank 0's number, on every rank. A collective: all ranks take part."""
    import torch
    import torch.distributed as dist

    value = torch.tensor([number], dtype=torch.float64)
    dist.broadcast(value, src=0)
    return float(value)
