"""Metric values not yet accepted by MLflow, in a file of the run's directory, so that none are lost if MLflow does not
answer or the command ends."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.host.json_files import read_rows
from pipeline.system_errors import causes

NAME = "mlflow-unsent.jsonl"
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""Environment in which MLflow's client gives up soon. By default it tries for minutes, in which the driver would show
no progress of the run."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One value of a metric. The store merges equal points, so sending a point twice is harmless."""

    key: str
    value: float
    timestamp: int
    """Time of the measurement, in milliseconds since 1970."""
    step: int


class Spool:
    """A file with one line per point, in the order of measurement."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def append(self, points: Sequence[Point]) -> None:
        # The newline comes first: an incomplete line of a killed process then stays separate from the next point.
        with self.file.open("a") as stream:
            stream.writelines("\n" + json.dumps(dataclasses.asdict(point)) for point in points)

    def read(self) -> list[Point]:
        """All points; an incomplete line of a killed process is skipped."""
        return [Point(**row) for row in read_rows(self.file)]

    def clear(self) -> None:
        self.file.unlink(missing_ok=True)


def is_away(error: Exception) -> bool:
    """Whether the store did not answer or failed, as opposed to rejecting the data."""
    status: Any = getattr(error, "get_http_status_code", lambda: 500)()
    return status >= 500 or status in (408, 429)


def is_locked(error: BaseException) -> bool:
    """Whether another program holds the lock of the store's SQLite database."""
    return any("database is locked" in str(cause) for cause in causes(error))
