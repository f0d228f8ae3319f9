"""telemetry.jsonl, MLflow's points and the note beside the bar, over restarts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.runs.progress import Follower


class FakeStage:
    result = ""

    def __init__(self) -> None:
        self.note = ""
        self.told: list[str] = []

    def tell(self, text: str) -> None:
        self.told.append(text)

    def update(self, done: float, total: float | None, note: str = "") -> None:
        self.note = note


class FakeRun:
    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []

    def metrics(self, values: dict[str, float], *, step: int, time_seconds: float) -> None:
        self.points.append((step, values))


@pytest.fixture
def stage() -> Any:
    return FakeStage()


@pytest.fixture
def run() -> Any:
    return FakeRun()


@pytest.fixture
def log(tmp_path) -> Path:
    return tmp_path / "telemetry.jsonl"


class FakeClock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def follow(run, stage, log, clock) -> Follower:
    return Follower(run, stage, log, primary="ndcg@10", workers="2 workers", clock=clock)


def row(kind: str, **values: Any) -> dict[str, Any]:
    share = {"share": 0.5} if kind in ("start", "step") else {}
    workers = {"workers": 2} if kind == "start" else {}
    return {"kind": kind, "time": 1.0, **share, **workers, **values}


def rows_of(log: Path) -> list[tuple[str, int, float | None]]:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [(found["kind"], found["step"], found.get("loss")) for found in rows]


def test_steps_of_a_restart_supersede_the_lost_ones(follow, run, log):
    follow([row("start", step=0, num_steps=4), *(row("step", step=step, loss=1.0) for step in (1, 2, 3))])
    follow([row("checkpoint", step=2, path="x", stall_seconds=0.1)])
    follow([row("start", step=2, num_steps=4), *(row("step", step=step, loss=2.0) for step in (3, 4))])
    assert rows_of(log) == [
        ("start", 0, None),
        ("step", 1, 1.0),
        ("step", 2, 1.0),
        ("checkpoint", 2, None),
        ("start", 2, None),
        ("step", 3, 2.0),
        ("step", 4, 2.0),
    ]
    assert [step for step, _ in run.points] == [1, 2, 3, 2, 3, 4]
    assert run.points[3] == (2, {"checkpoint/stall_seconds": 0.1})
    assert run.points[0][1] == {"train/loss": 1.0}


def test_half_a_line_of_a_killed_command_is_dropped(follow, log):
    log.write_text(json.dumps(row("step", step=1, loss=1.0)) + '\n{"kind": "step", "ti')
    follow([row("start", step=1, num_steps=4), row("step", step=2, loss=1.0)])
    assert rows_of(log) == [("step", 1, 1.0), ("start", 1, None), ("step", 2, 1.0)]


def test_progress_is_shown_and_not_kept(follow, run, stage, log):
    follow([])
    assert stage.note == "starting 2 workers"
    assert not log.exists()
    follow([row("start", step=0, num_steps=4)])
    assert stage.note == "step 0/4  first batch"
    follow([row("step", step=1, loss=0.5), row("progress", stage="valid", done=3, total=9)])
    assert stage.note == "step 1/4  loss 0.5000  valid 3/9"
    follow([row("valid", step=1, best=0.3, **{"ndcg@10": 0.25})])
    # The best is that of the chosen checkpoint, not the highest.
    assert stage.note == "step 1/4  loss 0.5000  best ndcg@10 0.3000"
    follow([row("start", step=1, num_steps=4), row("step", step=2, loss=0.5)])
    assert "restarts 1" in stage.note
    assert "progress" not in log.read_text()
    assert run.points == [
        (1, {"train/loss": 0.5}),
        (1, {"valid/best": 0.3, "valid/ndcg@10": 0.25}),
        (2, {"train/loss": 0.5}),
    ]


def test_restart_is_told_with_its_cause_the_workers_and_the_step(follow, stage, log):
    follow([row("start", step=0, num_steps=4), row("step", step=1, loss=0.5)])
    assert stage.told == []
    follow([row("failure", text="rank 1 is lost with its node")])
    assert stage.note == "step 1/4  loss 0.5000  restarting the workers"
    follow([row("waiting", text="waiting for process 7")])
    assert stage.note == "step 1/4  loss 0.5000  waiting for process 7"
    follow([row("start", step=0, num_steps=4, workers=1)])
    follow([row("start", step=1, num_steps=4)])
    assert stage.told == [
        "rank 1 is lost with its node; goes on with 1 worker from step 0",
        "the cluster has room for a different number of workers; goes on with 2 workers from step 1",
    ]
    kinds = [json.loads(line)["kind"] for line in log.read_text().splitlines()]
    assert kinds == ["start", "failure", "start", "start"]


def test_silence_of_the_workers_stands_beside_the_bar(follow, stage, clock):
    follow([row("start", step=0, num_steps=4)])
    clock.now = 59.0
    follow([])
    assert stage.note == "step 0/4  first batch"
    clock.now = 75.0
    follow([])
    assert stage.note == "step 0/4  first batch  no news from the workers for 75 s"
    follow([row("step", step=1, loss=0.5)])
    assert stage.note == "step 1/4  loss 0.5000"


def test_speed_split_memory_and_time_left_stand_beside_the_bar_and_the_cost_at_the_end(follow, run, stage):
    split = {"data_seconds": 0.02, "look_up_seconds": 0.2, "dense_seconds": 1.6, "optimizer_seconds": 0.1}
    step = {"loss": 0.5, "seconds": 2.0, "events": 3000.0, "memory_gib": 1.25, **split}
    follow([row("start", step=0, num_steps=400, share=0.0) | {"time": 100.0}])
    follow([row("step", step=1, **step) | {"share": 0.25, "time": 160.0}])
    speed = "1,500 events/s (data 1%, look-up 10%, dense 80%, optimizer 5%)"
    assert stage.note == f"step 1/400  loss 0.5000  {speed}  1.2 GiB  3 min left"
    follow([row("cost", step=1, core_seconds=1800.0, read_bytes=2.0**31, written_bytes=2.0**30)])
    assert stage.result == f"step 1/400  loss 0.5000  {speed}  0.50 core-hours, 2.0 GiB read, 1.0 GiB written"
    assert run.points[-1] == (
        1,
        {"cost/core_seconds": 1800.0, "cost/read_bytes": 2.0**31, "cost/written_bytes": 2.0**30},
    )


def test_plan_of_the_tables_is_told_and_kept(follow, stage, log):
    plan = {
        "workers": 2, "memory_gib": 11.25, "device_memory_gib": 0.0,
        "memory_gib_per_second": 8.5, "network_gib_per_second": 1.25,
        "tables": [
            {"name": "item", "rows": 2048, "width": 64, "kernel": "fused", "mib_per_worker": 0.25},
            {"name": "genres", "rows": 32, "width": 8, "kernel": "fused", "mib_per_worker": 0.25},
        ],
    }  # fmt: skip
    follow([row("plan", **plan)])
    assert stage.told == [
        "tables by rows over 2 workers (fused): item 2,048 x 64, genres 32 x 8: 512 KiB each of 11.2 GiB; "
        "memory 8.5 GiB/s, network 1.25 GiB/s"
    ]
    assert json.loads(log.with_name("plan.json").read_text())["tables"] == plan["tables"]
