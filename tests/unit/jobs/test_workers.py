"""What a failed group of workers tells its user: one line, of the error that caused the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError

from jobs.workers import Interrupted, WorkerFailure, _explained
from pipeline.events import DataError

LOST = RuntimeError("gloo: connection closed by peer")


def explained(failures: dict[int, BaseException], *, asked_to_stop: bool = False, max_failures: int = 0) -> Any:
    error: Any = RuntimeError("the group failed")
    error.worker_failures = failures
    config: Any = SimpleNamespace(
        parallel=SimpleNamespace(num_workers=2), cluster=SimpleNamespace(max_failures=max_failures)
    )
    return _explained(error, asked_to_stop=asked_to_stop, config=config, name="run")


@pytest.mark.parametrize(
    ("failures", "says"),
    [
        ({0: LOST, 1: ActorDiedError()}, "rank 1 of 2 died .* with --cluster.max_failures 3"),
        ({0: OutOfMemoryError("long\nadvice"), 1: LOST}, "rank 0 of 2 was ended by Ray, .* lower data.loader.batch_ev"),
        ({0: LOST, 1: ArithmeticError("the loss of step 7 is nan")}, "^rank 1: ArithmeticError: the loss of step 7"),
    ],
)
def test_the_cause_is_told_in_a_line_and_not_its_consequence(failures, says):
    found = explained(failures)
    assert isinstance(found, WorkerFailure)
    assert "\n" not in str(found)
    with pytest.raises(WorkerFailure, match=says):
        raise found


def test_a_users_mistake_stays_what_it_is_and_a_stop_is_no_failure():
    mistake = DataError("bucket-00001 is damaged; prepare again")
    assert explained({0: LOST, 1: mistake}) is mistake
    assert isinstance(explained({0: ActorDiedError(), 1: LOST}, asked_to_stop=True), Interrupted)
