"""The time of a step by parts, and the resources used by a run, on one rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTS = ("data", "look_up", "dense", "optimizer")
"""data: waiting for the next batch. look_up: rows of the tables, forward. dense: the tower's forward, and all of
backward, in which fbgemm updates the tables. optimizer: the tower's optimizer, and the tables' if it is not fused."""


class StepClock:
    """Seconds in each part since the last `take`. On a GPU, kernels run asynchronously: only the calls are measured."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the duration of the block to a part."""
        started = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """{"data_seconds": ..., ...}; then reset all parts to zero."""
        taken = {f"{name}_seconds": seconds for name, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(PARTS, 0.0)
        return taken


def cost_of_process() -> dict[str, float]:
    """Resources used by this process since it started: core-seconds, and bytes read and written, including those in the
    page cache; without the bytes if the system does not count them."""
    cost = {"core_seconds": time.process_time()}
    try:
        counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return cost
    return cost | {"read_bytes": float(counters["rchar"]), "written_bytes": float(counters["wchar"])}
