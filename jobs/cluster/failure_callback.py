"""Runs in Ray Train's controller: reports to the driver why a worker group is about to be restarted."""

from __future__ import annotations

import time
from typing import Any

from ray.train import UserCallback

from jobs.cluster.failures import cause_text
from jobs.cluster.parallel import ParallelConfig


class FailureCallback(UserCallback):
    """Pushes a row `failure` (text) into the telemetry actor."""

    def __init__(self, telemetry: Any, parallel: ParallelConfig) -> None:
        self._telemetry, self._parallel = telemetry, parallel

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        text = cause_text(worker_exceptions, self._parallel)
        self._telemetry.push.remote([{"kind": "failure", "time": time.time(), "text": text}])
