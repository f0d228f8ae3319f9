"""Points that MLflow has not taken yet, in a file beside the run: not lost while it is away, nor with the command."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.host.files import read_rows

NAME = "mlflow-unsent.jsonl"
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""Environment in which MLflow's client gives up soon: it tries for minutes, and who follows a run would stand still."""


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
        return [Point(**row) for row in read_rows(self.file)]

    def clear(self) -> None:
        self.file.unlink(missing_ok=True)


def is_away(error: Exception) -> bool:
    """Whether the store did not answer or failed, as opposed to refusing what it was sent."""
    status: Any = getattr(error, "get_http_status_code", lambda: 500)()
    return status >= 500 or status in (408, 429)
