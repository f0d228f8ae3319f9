"""Where the time of a step and the cost of a run go, on one rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTS = ("data", "look_up", "dense", "optimizer")
"""Waiting for the next batch; the tables' rows, forward; the tower, forward, and all of backward, in which fbgemm
updates the tables; the tower's optimizer, and the tables' where it is not fused."""


class StepClock:
    """Seconds of each part since the last `take`. On a GPU kernels run on behind the calls that are measured."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """{"data_seconds": ..., ...}; then all are zero."""
        taken = {f"{name}_seconds": seconds for name, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(PARTS, 0.0)
        return taken


def cost_of_process() -> dict[str, float]:
    """What this process took of its machine since it started: core-seconds, and bytes that it read and wrote, those of
    the page cache included; without the bytes where the system does not count them."""
    cost = {"core_seconds": time.process_time()}
    try:
        counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return cost
    return cost | {"read_bytes": float(counters["rchar"]), "written_bytes": float(counters["wchar"])}
