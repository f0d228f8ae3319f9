"""Commands without Ray: tasks run in this process, one after the other; workers are ranks in forks."""

from __future__ import annotations

import importlib
import json
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.cluster import actor_pool, session, worker_group
from jobs.cluster.parallel import ParallelConfig
from jobs.cluster.telemetry import Reporter, said_by_rank_0
from jobs.host.errors import UserError
from pipeline import build
from pipeline.events import DataError

USERS = (
    "jobs.data.maintenance",
    "jobs.data.prepare",
    "jobs.nightly.night",
    "jobs.run",
    "jobs.runs.leaderboard",
    "jobs.serving.build_states",
    "jobs.serving.score",
)
"""With what they import, all that take the replaced names: imported later they would keep the replacements."""


def without_ray(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Replace what starts tasks; their arguments and results are still pickled, as with Ray."""

    def serially(function, rows, *, stage, report, at_once=None, tasks=1):
        return [_pickled(function(_pickled(row))) for row in rows]

    set_attribute(build, "_map", serially)
    set_attribute(build, "_require_ray", lambda: None)


def command_without_ray(set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """The same for all that a command starts: tasks, actors and workers."""
    for name in USERS:
        importlib.import_module(name)
    without_ray(set_attribute)
    for original, replacement in (
        (session.ray_session, _no_session),
        (actor_pool.map_in_actors, _map_here),
        (worker_group.run_workers, _run_ranks),
    ):
        # Most modules took the name when they were imported.
        for module in [module for name, module in sys.modules.items() if name.startswith("jobs.")]:
            for name in [name for name, value in vars(module).items() if value is original]:
                set_attribute(module, name, replacement)


@contextmanager
def _no_session(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _map_here(opened: Callable[[], Any], rows: Sequence[dict[str, Any]], *, parallel: int | None) -> Iterator[Any]:
    """`map_in_actors` with one actor, which is this process."""
    work = opened() if rows else None
    for row in rows:
        assert work is not None
        yield _through_json(work(_through_json(row)))


def _run_ranks(
    function: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    *,
    parallel: ParallelConfig,
    on_rows: Callable[[list[dict[str, Any]]], None],
    **_: Any,
) -> None:
    """`run_workers` with gloo ranks in forks; the driver hears of the rows at the end."""
    from tests.support.ranks import run_ranks

    with tempfile.TemporaryDirectory() as directory:
        rows, refusal = Path(directory) / "rows.pkl", Path(directory) / "refusal.pkl"
        try:
            run_ranks(_work, parallel.min_workers, function, arguments, parallel.threads_per_worker, rows, refusal)
        except Exception:
            # A user's mistake is raised as it was, as `run_workers` does.
            for error in _read(refusal):
                raise error from None
            raise
        finally:
            on_rows(_read(rows))


def _work(
    function: Callable[[dict[str, Any]], None], arguments: dict[str, Any], threads: int, rows: Path, refusal: Path
) -> None:
    import torch

    torch.set_num_threads(threads)
    try:
        function(arguments | {"reporter": _FileReporter(rows)})
    except (DataError, UserError) as error:
        # Several ranks may have one.
        with refusal.open("ab") as file:
            file.write(pickle.dumps(error))
        raise


class _FileReporter(Reporter):
    """Rank 0's rows in a file; nobody asks the ranks to stop."""

    def __init__(self, rows: Path) -> None:
        import torch.distributed as dist

        super().__init__(None)
        self._file = rows.open("ab") if dist.get_rank() == 0 else None

    def row(self, kind: str, **values: Any) -> None:
        if self._file is not None:
            pickle.dump({"kind": kind, "time": time.time(), **values}, self._file)
            self._file.flush()

    def should_stop(self) -> bool:
        return bool(said_by_rank_0(0.0))


def _read(rows: Path) -> list[Any]:
    found = []
    if rows.exists():
        with rows.open("rb") as file:
            while file.peek(1):
                found.append(pickle.load(file))
    return found


def _through_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))
