"""Points that MLflow has not taken yet, in a file beside the run: not lost while it is away, nor with the command."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAME = "mlflow-unsent.jsonl"
_IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""MLflow's client tries for minutes, and whoever follows a run would stand still as long."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One value of a metric. The store keeps two equal ones as one, so that sending again is harmless."""

    key: str
    value: float
    timestamp: int
    """Milliseconds since 1970, when it was measured."""
    step: int


class Spool:
    """A file with a line a point, in the order in which they were measured."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def append(self, points: Sequence[Point]) -> None:
        # The newline first: half a line of a killed process stays alone.
        with self.file.open("a") as stream:
            stream.writelines("\n" + json.dumps(dataclasses.asdict(point)) for point in points)

    def read(self) -> list[Point]:
        """All points; half a line of a killed process is not one."""
        points = []
        for line in self.file.read_text().splitlines() if self.file.exists() else ():
            try:
                points.append(Point(**json.loads(line)))
            except (ValueError, TypeError):
                continue
        return points

    def clear(self) -> None:
        self.file.unlink(missing_ok=True)


def is_away(error: Exception) -> bool:
    """Whether the store did not answer or failed, as opposed to refusing what it was sent."""
    status: Any = getattr(error, "get_http_status_code", lambda: 500)()
    return status >= 500 or status in (408, 429)


@contextmanager
def impatient() -> Iterator[None]:
    """MLflow's requests in this block give up soon."""
    before = {name: os.environ.get(name) for name in _IMPATIENT}
    os.environ.update(_IMPATIENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
