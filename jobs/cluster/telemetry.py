"""Communication between driver and workers during training: rows from rank 0 to the driver, a stop flag to all ranks.

Rank 0 pushes rows into an actor; the driver polls them for its progress bar and for MLflow. The driver sets the stop
flag in the same actor; it reaches all ranks in the same step.
"""

from __future__ import annotations

import time
from typing import Any


class Telemetry:
    """The actor: rows from rank 0, a stop flag from the driver."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._stop = self._started = False

    def push(self, rows: list[dict[str, Any]]) -> bool:
        """Append rows; returns the stop flag."""
        self._rows.extend(rows)
        self._started = self._started or any(row["kind"] == "start" for row in rows)
        return self._stop

    def drain(self) -> list[dict[str, Any]]:
        """All rows since the last call."""
        rows, self._rows = self._rows, []
        return rows

    def stop(self) -> bool:
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
