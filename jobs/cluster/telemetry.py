"""What workers tell the driver while they train, and the one thing the driver tells them: stop.

Rank 0 of the workers pushes rows into an actor; the driver polls them for its progress bar and for MLflow. The stop
flag goes the other way and reaches every rank in the same step.
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
        """Ask all ranks to checkpoint at the same step and end; returns whether they have begun (row `start`)."""
        self._stop = True
        return self._started


class Reporter:
    """One rank's end: `row` on rank 0 sends, `should_stop` is joined by every rank."""

    def __init__(self, actor: Any | None) -> None:
        # Torch and Ray are imported where a rank uses them: the actor needs neither.
        import torch.distributed as dist

        self._actor = actor if dist.get_rank() == 0 else None
        self._pending: list[Any] = []
        self._stop = False

    def row(self, kind: str, **values: Any) -> None:
        """Send one row without waiting; other ranks do nothing.

        A row of kind `progress` (stage, done, total) is shown beside the bar and not kept.
        """
        if self._actor is not None:
            rows = [{"kind": kind, "time": time.time(), **values}]
            self._pending.append(self._actor.push.remote(rows))

    def should_stop(self) -> bool:
        """Whether the driver asked to stop, the same answer on every rank. A collective."""
        import ray

        if self._pending:
            # Answers of earlier steps: waiting for this step's would cost a round trip.
            ready, self._pending = ray.wait(self._pending, num_returns=len(self._pending), timeout=0)
            self._stop = self._stop or any(ray.get(ready))
        return bool(said_by_rank_0(float(self._stop)))


def said_by_rank_0(number: float) -> float:
    """Rank 0's number, on every rank. A collective."""
    import torch
    import torch.distributed as dist

    said = torch.tensor([number], dtype=torch.float64)
    dist.broadcast(said, src=0)
    return float(said)
