"""Why a worker group failed, in one line: finds among the errors of all ranks the one that caused the others."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from jobs.cluster.parallel import ParallelConfig
from jobs.host.errors import UserError
from pipeline import system_errors
from pipeline.events import DataError
from pipeline.system_errors import as_data_error


class Interrupted(KeyboardInterrupt):
    """The workers' job was stopped by Ctrl-C or SIGTERM; training stops after a checkpoint if it had made a step."""

    def __init__(self, name: str, *, has_checkpoint: bool | None = None) -> None:
        """`has_checkpoint`: whether the training that was stopped has one; None = no training was stopped."""
        super().__init__(name)
        self.has_checkpoint = has_checkpoint


class WorkerFailure(Exception):
    """A worker died or raised an error; the message says in one line which one, and what to do."""


def explained(
    error: BaseException, *, asked_to_stop: bool, parallel: ParallelConfig, restarts: int, name: str,
    other: str | None = None,
) -> BaseException:  # fmt: skip
    """An error of Ray Train's `fit` as an error with a message of one line. `asked_to_stop`: whether this process got a
    signal; `restarts`: number of restarts that the group was allowed; `other`: the largest process of the machine if it
    is not Solar's, as text."""
    failures = getattr(error, "worker_failures", None) or {None: error}
    causes = {rank: _root(failure) for rank, failure in failures.items()}
    for cause in causes.values():
        if isinstance(cause, DataError | UserError):
            return cause
        if (refused := as_data_error(cause)) is not None:
            return refused
    # A signal to the whole process group ends workers too.
    if asked_to_stop and _who(causes, _died, parallel):
        return Interrupted(name)
    text, advice = _cause(causes, parallel, other=other)
    if advice == _AGAIN and restarts == 0:
        advice += ", or let Ray restart workers with --cluster.max_failures 3"
    return WorkerFailure(f"{text}: {advice}" if advice else text)


def death(who: str, error: BaseException, *, other: str | None) -> WorkerFailure:
    """The death of a process of a group that is not a rank, as one line."""
    if _out_of_memory(error):
        text, advice = _memory_full(who, other=other)
    else:
        text, advice = f"{who} died", _AGAIN
    return WorkerFailure(f"{text}: {advice}")


def task_failure(error: BaseException) -> WorkerFailure | None:
    """The failure of a task that Ray ended for memory, again and again, as one line; None for any other error."""
    if "ray" not in sys.modules or not any(_out_of_memory(cause) for cause in system_errors.causes(error)):
        return None
    text, _ = _memory_full("a task", other=None)
    return WorkerFailure(f"{text}: end other programs there or use a larger machine, then run the same command again")


def cause_text(failures: Mapping[int, BaseException], parallel: ParallelConfig) -> str:
    """What happened to a group, without advice."""
    return _cause({rank: _root(failure) for rank, failure in failures.items()}, parallel)[0]


_AGAIN = "run the same command again (`solar train` with --resume)"


def _cause(
    causes: Mapping[Any, BaseException], parallel: ParallelConfig, *, other: str | None = None
) -> tuple[str, str]:
    """(what happened, advice), from each rank's error."""
    if who := _who(causes, _out_of_memory, parallel):
        return _memory_full(who, other=other)
    if who := _who(causes, _lost_with_its_node, parallel):
        return f"{who} is lost with its node (dead, or not reachable)", _AGAIN
    if who := _who(causes, _died, parallel):
        return f"{who} died (killed from outside, out of memory, or crashed)", _AGAIN
    stalls = f"for {parallel.stall_seconds:g} s (parallel.stall_seconds)"
    if who := _who(causes, _silent, parallel):
        return f"{who} did not answer {stalls}: it is stopped, or its machine hangs", _AGAIN
    # When a rank ends, the others lose their connection to it: their (gloo) errors are not the cause.
    rank, cause = min(causes.items(), key=lambda item: "gloo" in str(item[1]))
    if "gloo" in str(cause) and "Timed out" in str(cause):
        who = f"rank {rank}{_of(parallel)}"
        return f"{who} waited {stalls} for another rank, which stalls (disk or network hangs)", _AGAIN
    lines = [line for line in str(cause).splitlines() if line.strip()]
    where = "" if rank is None else f"rank {rank}: "
    return f"{where}{type(cause).__name__}: {lines[-1] if lines else ''}", ""


def _memory_full(who: str, *, other: str | None) -> tuple[str, str]:
    """(what happened, advice) where Ray ended a process for its machine's memory."""
    text = f"{who} was ended by Ray because its machine's memory is full"
    smaller = "lower data.loader.batch_events or parallel.num_workers, or use a larger machine"
    if other:
        return f"{text}; the largest process there is another program's, {other}", f"end it, or {smaller}; {_AGAIN}"
    return text, f"{smaller}; {_AGAIN}"


def _who(causes: Mapping[Any, BaseException], holds: Callable[[BaseException], bool], parallel: ParallelConfig) -> str:
    """The ranks whose error satisfies `holds`, as text; empty if there are none. An error without a rank (None) is that
    of Ray Train's controller."""
    found = [rank for rank, cause in causes.items() if holds(cause)]
    if ranks := ", ".join(str(rank) for rank in sorted(rank for rank in found if rank is not None)):
        return f"rank {ranks}{_of(parallel)}"
    return "Ray Train's controller" if found else ""


def _of(parallel: ParallelConfig) -> str:
    return "" if parallel.elastic else f" of {parallel.num_workers}"


def _out_of_memory(cause: BaseException) -> bool:
    from ray.exceptions import OutOfMemoryError

    return isinstance(cause, OutOfMemoryError)


def _died(cause: BaseException) -> bool:
    from ray.exceptions import RayActorError

    return isinstance(cause, RayActorError)


def _lost_with_its_node(cause: BaseException) -> bool:
    from ray.exceptions import ActorUnavailableError

    return isinstance(cause, ActorUnavailableError) or (_died(cause) and "node has died" in str(cause))


def _silent(cause: BaseException) -> bool:
    from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError

    return isinstance(cause, WorkerHealthCheckTimeoutError)


def _root(error: BaseException) -> BaseException:
    """The worker's own error, taken out of Ray's wrappers."""
    cause: Any = error
    while True:
        inner = (
            getattr(cause, "cause", None)
            or getattr(cause, "health_check_failure", None)
            or getattr(cause, "controller_failure", None)
            or cause.__cause__
        )
        if inner is None:
            return cause
        cause = inner
