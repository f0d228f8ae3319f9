"""Who uses the machine's memory."""

from __future__ import annotations

import os
import types

import psutil
import pytest

from jobs.host.process import largest_other_process


def process(pid: int, name: str, *, bytes_used: int, parents: tuple[int, ...] = ()) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        pid=pid,
        info={"memory_info": types.SimpleNamespace(rss=bytes_used)},
        name=lambda: name,
        parents=lambda: [types.SimpleNamespace(pid=parent) for parent in parents],
    )


OWN = process(os.getpid(), "solar", bytes_used=2 * 10**9)


@pytest.mark.parametrize(
    ("largest", "says"),
    [
        (process(7, "java", bytes_used=18 * 10**9, parents=(1,)), "java (pid 7) with 18.0 GB"),
        (process(7, "java", bytes_used=10**9, parents=(1,)), None),
        (process(8, "raylet", bytes_used=3 * 10**9, parents=(os.getpid(), 1)), None),
        (process(9, "ray::RayTrainWorker", bytes_used=3 * 10**9, parents=(5, 1)), None),
    ],
)
def test_only_a_process_of_another_program_is_named(monkeypatch, largest, says):
    monkeypatch.setattr(psutil, "process_iter", lambda attributes: [OWN, largest])
    assert largest_other_process() == says


def test_this_machine_can_be_asked():
    assert (found := largest_other_process()) is None or found.endswith("GB")
