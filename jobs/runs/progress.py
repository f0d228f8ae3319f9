"""Rank 0's rows -> the progress bar, MLflow metrics and RUN/telemetry.jsonl, in the driver of a training run."""

from __future__ import annotations

import collections
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jobs.host.console import Stage
from jobs.host.json_files import read_rows, write_json
from jobs.tracking.mlflow_runs import TrackedRun
from jobs.training.clock import PARTS
from jobs.training.placement import PLAN_FILE

QUIET_SECONDS = 60.0
"""After this time without a row the bar says so; rows come with every step, and also during validations."""
_STEPS_SHOWN = 20
"""The speed shown beside the bar is that of this many latest steps."""
_SUMMED = ("seconds", "events", *(f"{name}_seconds" for name in PARTS))
_PREFIXES = {"step": "train", "valid": "valid", "checkpoint": "checkpoint", "cost": "cost"}
"""Prefixes of the names of MLflow metrics, by kind of row."""
_NO_METRICS = ("kind", "time", "step", "share", "path")


class Follower:
    """Called with every batch of rows. telemetry.jsonl has each step once, even if restarts trained it again."""

    def __init__(
        self,
        run: TrackedRun,
        stage: Stage,
        log: Path,
        *,
        primary: str,
        workers: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`workers`: how the bar names the workers while they start; `clock`: the time in seconds."""
        self._run, self._stage, self._log, self._primary = run, stage, log, primary
        self._step, self._num_steps, self._share = 0, 0, 0.0
        self._loss, self._best = float("nan"), float("nan")
        self._starts = 0
        self._began, self._began_share = 0.0, 0.0
        self._latest: collections.deque[dict[str, Any]] = collections.deque(maxlen=_STEPS_SHOWN)
        self._sums: collections.Counter[str] = collections.Counter()
        self._cost = ""
        self._doing = f"starting {workers}"
        self._clock, self._last_row_at = clock, clock()
        self._failure = ""

    def __call__(self, rows: list[dict[str, Any]]) -> None:
        if rows:
            self._last_row_at = self._clock()
        self._show(rows)
        self._record([row for row in rows if row["kind"] not in ("progress", "waiting")])

    def _show(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self._doing = ""
            if row["kind"] == "progress":
                self._doing = f"{row['stage']} {row['done']}/{row['total']}"
            elif row["kind"] == "start":
                self._starts += 1
                self._print_restart(row)
                self._step, self._num_steps, self._share = row["step"], row["num_steps"], row["share"]
                self._began, self._began_share = row["time"], row["share"]
                self._doing = "first batch"
            elif row["kind"] == "step":
                self._step, self._loss, self._share = row["step"], row["loss"], row["share"]
                self._latest.append(row)
                self._sums.update(_summed(row))
            elif row["kind"] == "valid":
                self._best = row["best"]
            elif row["kind"] == "cost":
                self._cost = cost_text(row)
            elif row["kind"] == "waiting":
                self._doing = row["text"]
            elif row["kind"] == "failure":
                self._failure = row["text"]
                self._doing = "restarting the workers"
            elif row["kind"] == "plan":
                self._stage.tell(plan_text(row))
        parts = [f"step {self._step}/{self._num_steps}"] if self._num_steps else []
        parts += [f"loss {self._loss:.4f}"] if self._loss == self._loss else []
        parts += [f"best {self._primary} {self._best:.4f}"] if self._best == self._best else []
        parts += [f"restarts {self._starts - 1}"] if self._starts > 1 else []
        self._stage.result = "  ".join([*parts, *speed_texts(self._sums), self._cost]).rstrip()
        recent: collections.Counter[str] = collections.Counter()
        for row in self._latest:
            recent.update(_summed(row))
        parts += speed_texts(recent)
        if self._latest:
            last = self._latest[-1]
            parts += [f"{last['memory_gib']:.1f} GiB"] if "memory_gib" in last else []
            parts += self._time_left(last)
        parts += [self._doing] if self._doing else []
        quiet = self._clock() - self._last_row_at
        parts += [f"no news from the workers for {quiet:.0f} s"] if quiet >= QUIET_SECONDS else []
        self._stage.update(self._share, 1.0 if self._num_steps else None, "  ".join(parts))

    def _print_restart(self, start: dict[str, Any]) -> None:
        """Print a separate line, which stays visible; the bar is overwritten."""
        if self._starts > 1:
            why = self._failure or "the cluster has room for a different number of workers"
            workers = f"{start['workers']} worker{'s' * (start['workers'] != 1)}"
            self._stage.tell(f"{why}; goes on with {workers} from step {start['step']}")
        self._failure = ""

    def _time_left(self, last: dict[str, Any]) -> list[str]:
        done = last["share"] - self._began_share
        if not 0 < done < 1 or last["share"] >= 1:
            return []
        left = (last["time"] - self._began) * (1 - last["share"]) / done
        return [f"{left / 60:.0f} min left" if left > 90 else f"{left:.0f} s left"]

    def _record(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if row["kind"] == "start":
                drop_superseded(self._log, after_step=row["step"])
            self._append(json.dumps(row) + "\n")
            if row["kind"] == "plan":
                write_json(self._log.with_name(PLAN_FILE), row)
            if prefix := _PREFIXES.get(row["kind"]):
                values = {f"{prefix}/{key}": row[key] for key in row if key not in _NO_METRICS}
                self._run.metrics(values, step=row["step"], time_seconds=row["time"])

    def _append(self, line: str) -> None:
        try:
            with self._log.open("a") as stream:
                stream.write(line)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._log)) from error


def _summed(step: Mapping[str, Any]) -> dict[str, float]:
    """The values of a step's row that are summed over steps."""
    return {name: step[name] for name in _SUMMED if name in step}


def speed_texts(sums: Mapping[str, float]) -> list[str]:
    """Events per second, and how the time of the summed steps is divided; [] if nothing is known."""
    if not sums.get("seconds") or not sums.get("events"):
        return []
    split = ", ".join(f"{name.replace('_', '-')} {sums[f'{name}_seconds'] / sums['seconds']:.0%}" for name in PARTS)
    return [f"{sums['events'] / sums['seconds']:,.0f} events/s ({split})"]


def plan_text(row: Mapping[str, Any]) -> str:
    """How the tables are placed, in one line."""
    tables = ", ".join(f"{table['name']} {table['rows']:,} x {table['width']}" for table in row["tables"])
    kernels = " and ".join(sorted({table["kernel"] for table in row["tables"]}))
    each = sum(table["mib_per_worker"] for table in row["tables"])
    size = f"{each:,.0f} MiB" if each >= 10 else f"{each * 1024:,.0f} KiB"
    room = f"{row['memory_gib']:.1f} GiB"
    if row["device_memory_gib"]:
        room += f" and {row['device_memory_gib']:.1f} GiB of a GPU"
    speed = f"memory {row['memory_gib_per_second']:.1f} GiB/s"
    if row["network_gib_per_second"]:
        speed += f", network {row['network_gib_per_second']:.2f} GiB/s"
    return f"tables by rows over {row['workers']} workers ({kernels}): {tables}: {size} each of {room}; {speed}"


def cost_text(row: Mapping[str, Any]) -> str:
    """The cost of a run, as reported by its workers."""
    text = f"{row['core_seconds'] / 3600:.2f} core-hours"
    if "read_bytes" in row:
        text += f", {row['read_bytes'] / 2**30:.1f} GiB read, {row['written_bytes'] / 2**30:.1f} GiB written"
    return text


def drop_superseded(log: Path, *, after_step: int) -> None:
    """Remove the rows of steps that a restart from `after_step` trains again, and the incomplete last line of a
    killed driver.

    MLflow cannot remove points: there these steps get a second point, with the same value and a later time stamp.
    """
    if not log.exists():
        return
    kept = [json.dumps(row) + "\n" for row in read_rows(log) if row.get("step", 0) <= after_step]
    staged = log.with_suffix(".tmp")
    staged.write_text("".join(kept))
    os.replace(staged, log)
