"""What a group of workers reserves, when idle workers end, and what a failed group tells its user in one line."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError

from jobs.cluster import worker_group
from jobs.cluster.failures import Interrupted, WorkerFailure, cause_text
from jobs.cluster.failures import explained as explained_failure
from jobs.cluster.parallel import ParallelConfig
from jobs.host.errors import UserError
from pipeline.events import DataError

LOST = RuntimeError("gloo: connection closed by peer")
TIMED_OUT = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 610000ms for recv operation")


def explained(failures: dict[int, BaseException], *, asked_to_stop: bool = False, max_failures: int = 0) -> Any:
    error: Any = RuntimeError("the group failed")
    error.worker_failures = failures
    return explained_failure(
        error, asked_to_stop=asked_to_stop, parallel=ParallelConfig(num_workers=2), restarts=max_failures, name="run"
    )


@pytest.mark.parametrize(
    ("failures", "says"),
    [
        ({0: LOST, 1: ActorDiedError()}, "rank 1 of 2 died .* with --cluster.max_failures 3"),
        (
            {0: OutOfMemoryError("long\nadvice"), 1: LOST},
            "rank 0 of 2 was ended by Ray because .* lower data.loader.batch_ev",
        ),
        (
            {0: TIMED_OUT, 1: WorkerHealthCheckTimeoutError("hanging")},
            r"rank 1 of 2 did not answer for 600 s \(parallel.stall_seconds\)",
        ),
        (
            {0: TIMED_OUT},
            "rank 0 of 2 waited for 600 s .* for another rank, which stalls .*: run the same command again",
        ),
        (
            {0: LOST, 1: ActorUnavailableError("no route", None)},
            r"rank 1 of 2 is lost with its node \(dead, or not rea",
        ),
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


def test_cause_of_a_restart_has_no_advice_and_no_number_of_workers_that_changes():
    failures = {0: LOST, 1: ActorDiedError()}
    assert cause_text(failures, ParallelConfig(num_workers=(1, 2))) == (
        "rank 1 died (killed from outside, out of memory, or crashed)"
    )


FULL = OutOfMemoryError("Task was killed due to the node running low on memory.\nlong\nadvice")


def controller_ended(error: BaseException, **settings: Any) -> BaseException:
    """What is said where `fit` itself raises, which then has no errors of ranks."""
    facts = {"asked_to_stop": False, "restarts": 3, "name": "run"}
    return explained_failure(error, parallel=ParallelConfig(num_workers=2), **(facts | settings))


def test_full_memory_names_another_programs_process_and_says_that_the_command_continues():
    told = str(controller_ended(FULL, other="python (pid 7) with 18.0 GB"))
    assert told == (
        "Ray Train's controller was ended by Ray because its machine's memory is full; the largest process there is "
        "another program's, python (pid 7) with 18.0 GB: end it, or lower data.loader.batch_events or "
        "parallel.num_workers, or use a larger machine; run the same command again (`solar train` with --resume)"
    )
    assert "another program" not in str(controller_ended(FULL))


def test_the_death_of_the_controller_is_told_like_that_of_a_rank():
    assert str(controller_ended(ActorDiedError())) == (
        "Ray Train's controller died (killed from outside, out of memory, or crashed): run the same command again "
        "(`solar train` with --resume)"
    )
    assert isinstance(controller_ended(ActorDiedError(), asked_to_stop=True), Interrupted)


@pytest.mark.parametrize(
    ("error", "says"),
    [(FULL, "was ended by Ray because .* another program's, python .* run the same"), (ActorDiedError(), "died: run")],
)
def test_the_death_of_the_telemetry_actor_is_one_line(monkeypatch, error, says):
    def fail(reference):
        raise error

    monkeypatch.setattr("ray.get", fail)
    monkeypatch.setattr("ray.nodes", lambda: [{}])
    monkeypatch.setattr(worker_group, "largest_other_process", lambda: "python (pid 7) with 18.0 GB")
    with pytest.raises(WorkerFailure, match=f"^the actor that collects telemetry {says}") as caught:
        worker_group._answer(None)
    assert "\n" not in str(caught.value)


class FakeGroup:
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize(("cpus", "kept"), [({"CPU": 0.5}, False), ({}, False), ({"CPU": 1.0}, True)])
def test_idle_workers_end_before_tasks_where_they_leave_no_cpu(monkeypatch, cpus, kept):
    group = FakeGroup()
    monkeypatch.setattr(worker_group._Group, "kept", group)
    monkeypatch.setattr("ray.available_resources", lambda: cpus)
    worker_group.make_room_for_tasks()
    assert (group.closed, worker_group._Group.kept is group) == ((0, True) if kept else (1, False))


def test_workers_of_a_local_ray_reserve_a_resource_of_their_own_and_elsewhere_cpus(monkeypatch):
    parallel = ParallelConfig(num_workers=2, threads_per_worker=3)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0, worker_group.LOCAL_WORKERS: 6.0})
    assert worker_group._reserved(parallel) == {worker_group.LOCAL_WORKERS: 3}
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 6.0})
    assert worker_group._reserved(parallel) == {"CPU": 3}
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 5.0})
    with pytest.raises(UserError, match=r"parallel.num_workers=2, device=cpu: needs 6 CPU, this Ray has 5: lower "):
        worker_group._reserved(parallel)
