"""The whole loop on real ranks: loader, model, loss, evaluation and checkpoints together."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from jobs.cluster.parallel import ParallelConfig
from jobs.cluster.telemetry import Reporter
from jobs.host.locks import RunInUse
from jobs.training import checkpoint_writer, loop
from jobs.training import step as step_module
from jobs.training.catalogue import training_counts
from jobs.training.checkpoint import (
    CheckpointError,
    committed_checkpoints,
    latest_checkpoint,
    read_state,
    verify_checkpoint,
)
from jobs.training.dense_model import DenseModel
from jobs.training.group_lock import sole_group
from jobs.training.job import CheckpointConfig, TrainingConfig, TrainJob
from jobs.training.loop import train
from jobs.training.optimizers import OptimizerConfig
from jobs.training.step import NonFiniteLoss
from jobs.training.tables import ShardedTables
from jobs.training.validation import LEAST_REQUESTS
from models.solar import SolarConfig
from pipeline.batches.loader import TrainLoader
from pipeline.batches.loader_config import LoaderConfig
from pipeline.batches.requests import RequestConfig
from pipeline.shards.dataset import Shards
from tests.support.ranks import run_ranks
from tests.support.tiny import prepare_tiny, write_tiny_log

NEXT_ITEM = RequestConfig(num_negatives=8, min_label=0)


@pytest.fixture(scope="module")
def shards_dir(tmp_path_factory) -> str:
    return tiny_shards(tmp_path_factory.mktemp("tiny"), NEXT_ITEM)


def tiny_shards(directory: Path, requests: RequestConfig) -> str:
    return prepare_tiny(write_tiny_log(directory / "log"), directory / "shards", requests).path


def make_job(shards_dir: str, run_dir: Path, **changes: Any) -> TrainJob:
    model = SolarConfig(**SMALL, dropout=0.1)
    job = TrainJob(
        run_dir=str(run_dir),
        shards=shards_dir,
        manifest=Shards.open(shards_dir).manifest.number,
        seed=3,
        model={"name": "solar", **dataclasses.asdict(model)},
        training=TrainingConfig(epochs=2),
        requests=NEXT_ITEM,
        loader=LoaderConfig(batch_events=1500, window_row_groups=2),
        optimizer=OptimizerConfig(warmup_steps=5),
        parallel=ParallelConfig(zero_stage=1),
        checkpoint=CheckpointConfig(),
        facts={"manifest": 1, "manifest_fingerprint": "tiny"},
    )
    return dataclasses.replace(job, **changes)


def in_bf16(job: TrainJob, stage: int) -> TrainJob:
    return dataclasses.replace(job, parallel=ParallelConfig(zero_stage=stage, precision="bf16"))


def without_overlap(job: TrainJob) -> TrainJob:
    return dataclasses.replace(job, parallel=dataclasses.replace(job.parallel, overlap=False))


def in_batch_job(shards_dir: str, run_dir: Path) -> TrainJob:
    return make_job(
        shards_dir,
        run_dir,
        model=WITHOUT_DROPOUT,
        requests=dataclasses.replace(NEXT_ITEM, negatives="in_batch"),
        training=TrainingConfig(epochs=2, log_q=True),
    )


BF16_STAGES = (1, 2, 3)
SMALL: dict[str, Any] = {"width": 16, "rank": 4, "recent_window": 8, "checkpoint_every": 4}
WITHOUT_DROPOUT = {"name": "solar", **dataclasses.asdict(SolarConfig(**SMALL, dropout=0.0))}


def final_state(run_dir: Path) -> dict[str, Any]:
    last = latest_checkpoint(run_dir)
    assert last is not None
    return read_state(last)["train_state"]


class RecordingReporter(Reporter):
    """Keeps rows, and asks all ranks to stop after a step."""

    def __init__(self, stop_at: int | None) -> None:
        super().__init__(None)
        self.rows: list[dict[str, Any]] = []
        self._stop_at = stop_at
        self._step = 0

    def row(self, kind: str, **values: Any) -> None:
        self.rows.append({"kind": kind, **values})
        if kind == "step":
            self._step = values["step"]

    def should_stop(self) -> bool:
        return self._step == self._stop_at


def begin(job: TrainJob) -> tuple[Any, TrainLoader, ShardedTables, DenseModel]:
    """(state, loader, tables, dense half) of a run before its first step. A collective."""
    shards = Shards.open(job.shards)
    loader = TrainLoader(
        shards, requests=job.requests, loader=job.loader, seed=job.seed, rank=dist.get_rank(),
        world_size=dist.get_world_size(),
    )  # fmt: skip
    counts = training_counts(shards, requests=job.requests)
    state, tables, dense = loop._create_or_restore(job, shards, loader, training_count=counts)
    return state, loader, tables, dense


def run_each(jobs: list[tuple[TrainJob, list[int | None]]]) -> list[list[dict[str, Any]]]:
    """Each job with its interruptions: one `train` per entry, stopping at that step (None: to the end)."""
    results = []
    for job, stops in jobs:
        rows: list[dict[str, Any]] = []
        for stop_at in stops:
            reporter = RecordingReporter(stop_at)
            train(job, reporter=reporter)
            rows += reporter.rows
        results.append(rows)
    dist.barrier()
    return results


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None
    files = sorted(checkpoint.glob("*.safetensors"))
    return {f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows if row["kind"] == "step"]


@pytest.fixture(scope="module")
def two_rank_runs(shards_dir, tmp_path_factory) -> tuple[Path, list[list[dict[str, Any]]]]:
    directory = tmp_path_factory.mktemp("runs")
    jobs = [
        (make_job(shards_dir, directory / "straight"), [None]),
        # After step 4 it is stopped in the validation.
        (make_job(shards_dir, directory / "resumed"), [4, 5, 9, None]),
        (make_job(shards_dir, directory / "without-dropout", model=WITHOUT_DROPOUT), [None]),
        (
            make_job(shards_dir, directory / "stage-3", model=WITHOUT_DROPOUT, parallel=ParallelConfig(zero_stage=3)),
            [None],
        ),
        (in_batch_job(shards_dir, directory / "in-batch"), [None]),
        (in_batch_job(shards_dir, directory / "in-batch-resumed"), [5, None]),
        *(
            (in_bf16(make_job(shards_dir, directory / f"bf16-{stage}", model=WITHOUT_DROPOUT), stage), [None])
            for stage in BF16_STAGES
        ),
        (without_overlap(in_batch_job(shards_dir, directory / "in-batch-without-overlap")), [None]),
    ]
    return directory, run_ranks(run_each, 2, jobs)[0]


def test_interrupted_and_resumed_run_is_bit_equal_to_an_uninterrupted_one(two_rank_runs):
    directory, (straight, resumed, *_) = two_rank_runs
    assert losses(resumed) == losses(straight)
    measured = [[{**row, "seconds": 0} for row in rows if row["kind"] == "valid"] for rows in (straight, resumed)]
    assert [row["step"] for row in measured[0]] == [4, 8]
    assert measured[0] == measured[1]
    expected, found = weights(directory / "straight"), weights(directory / "resumed")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_in_batch_negatives_are_the_same_ones_after_a_resume(two_rank_runs):
    _, _, _, _, straight, resumed, *_ = two_rank_runs[1]
    assert losses(resumed) == losses(straight)


def test_sending_the_next_ids_ahead_changes_nothing(two_rank_runs):
    directory, (_, _, _, _, ahead, *_, without) = two_rank_runs
    assert losses(ahead) == losses(without)
    expected, found = weights(directory / "in-batch-without-overlap"), weights(directory / "in-batch")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_one_and_two_ranks_give_the_same_losses_and_validation(two_rank_runs, shards_dir, tmp_path):
    _, (_, _, two_ranks, _, in_batch, *_) = two_rank_runs
    jobs = [
        (make_job(shards_dir, tmp_path / "one", model=WITHOUT_DROPOUT), [None]),
        (in_batch_job(shards_dir, tmp_path / "one-in-batch"), [None]),
    ]
    one_rank, in_batch_of_one_rank = run_ranks(run_each, 1, jobs)[0]
    # fp32 sums in another order, the bound of the project's contract.
    assert losses(one_rank) == pytest.approx(losses(two_ranks), rel=1e-4)
    assert losses(in_batch_of_one_rank) == pytest.approx(losses(in_batch), rel=1e-4)
    assert losses(in_batch) != pytest.approx(losses(two_ranks), rel=1e-2)
    first, second = ([row for row in rows if row["kind"] == "valid"] for rows in (one_rank, two_ranks))
    assert [row["requests"] for row in first] == [row["requests"] for row in second]
    # One request in forty may change its rank by such a difference.
    assert [row["ndcg@10"] for row in first] == pytest.approx([row["ndcg@10"] for row in second], abs=0.02)


def test_zero_stage_3_trains_and_evaluates_like_stage_1(two_rank_runs):
    _, (_, _, stage_1, stage_3, *_) = two_rank_runs
    # fp32 sums in another order, the bound of the project's contract.
    assert losses(stage_3) == pytest.approx(losses(stage_1), rel=1e-4)
    assert [row["requests"] for row in stage_3 if row["kind"] == "valid"] == [40.0, 40.0]


def test_bf16_tower_trains_like_fp32_at_every_stage(two_rank_runs):
    _, (_, _, fp32, _, _, _, *bf16, _) = two_rank_runs
    assert len(bf16) == len(BF16_STAGES)
    for rows in bf16:
        # 8 bits of mantissa: the bound of the project's contract.
        assert losses(rows) == pytest.approx(losses(fp32), rel=3e-2)


def test_a_run_that_is_asked_to_stop_does_not_wait_for_the_end_of_a_validation(shards_dir, tmp_path):
    job = make_job(shards_dir, tmp_path / "run", model=WITHOUT_DROPOUT)
    rows = run_ranks(run_each, 2, [(job, [4])])[0][0]
    assert [row["kind"] for row in rows].count("progress") == 1
    assert "valid" not in [row["kind"] for row in rows]
    state = final_state(tmp_path / "run")
    assert (state["step"], state["validation_due"], state["finished"], state["best_metric"]) == (4, True, False, None)


@pytest.fixture(scope="module")
def stopped_run(shards_dir, tmp_path_factory) -> Path:
    """Two ranks, ended at step 5 of 8."""
    directory = tmp_path_factory.mktemp("stopped") / "run"
    run_ranks(run_each, 2, [(make_job(shards_dir, directory, model=WITHOUT_DROPOUT), [5])])
    return directory


@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 0), (3, 2), (4, 3)])
def test_checkpoint_of_two_ranks_continues_on_others_with_the_same_batches(
    two_rank_runs, stopped_run, shards_dir, tmp_path, world_size, zero_stage
):
    _, (_, _, straight, *_) = two_rank_runs
    shutil.copytree(stopped_run, tmp_path / "run")
    job = make_job(shards_dir, tmp_path / "run", model=WITHOUT_DROPOUT, parallel=ParallelConfig(zero_stage=zero_stage))
    resumed = run_ranks(run_each, world_size, [(job, [None])])[0][0]
    assert [row["step"] for row in resumed if row["kind"] == "step"] == [6, 7, 8]
    # Optimizer rows and moments, batches and rates came along, or these would differ by more than the order of sums.
    assert losses(resumed) == pytest.approx(losses(straight)[5:], rel=1e-4)
    for name in ("events", "scored"):
        counts = [[row[name] for row in rows if row["kind"] == "step"] for rows in (resumed, straight)]
        assert counts[0] == counts[1][5:]
        assert final_state(tmp_path / "run")[name] == sum(counts[1])
    assert final_state(tmp_path / "run")["valid_requests"] == LEAST_REQUESTS


def test_training_lowers_the_loss(two_rank_runs):
    values = losses(two_rank_runs[1][0])
    third = len(values) // 3
    assert sum(values[-third:]) < sum(values[:third])


def test_checkpoint_is_refused_when_a_file_is_cut_and_found_damaged_when_a_byte_flips(two_rank_runs, tmp_path):
    directory, _ = two_rank_runs
    copy = tmp_path / "copy"
    latest = latest_checkpoint(directory / "straight")
    assert latest is not None
    shutil.copytree(latest, copy)
    assert verify_checkpoint(copy) == []
    dense = copy / "dense.safetensors"
    raw = bytearray(dense.read_bytes())
    raw[-1] ^= 1
    dense.write_bytes(bytes(raw))
    assert verify_checkpoint(copy) == [f"{dense}: checksum differs"]
    dense.write_bytes(bytes(raw[:-10]))
    with pytest.raises(CheckpointError, match=r"dense\.safetensors: \d+ bytes instead of"):
        read_state(copy)
    (copy / "COMMIT").unlink()
    with pytest.raises(CheckpointError, match="no COMMIT"):
        read_state(copy)


def test_old_checkpoints_are_collected_but_the_best_one_stays(two_rank_runs):
    directory, _ = two_rank_runs
    kept = [int(path.name.removeprefix("step-")) for path in committed_checkpoints(directory / "resumed")]
    best = read_state(directory / "resumed" / f"step-{kept[-1]:08d}")["train_state"]["best_step"]
    assert best in kept
    assert len(kept) <= 3


def run_on_a_full_disk(job: TrainJob) -> list[str]:
    """Stop at step 5, then twice try to stop at step 7 while the disk refuses rank 1's table, or rank 0's dense file.

    Returns what the two refused attempts said.
    """
    written = checkpoint_writer.save_file

    def refuse(names: tuple[str, ...], rank: int):
        def save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
            if dist.get_rank() == rank and path.name.startswith(names):
                path.write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
            written(tensors, path)

        return save_file

    with sole_group(Path(job.run_dir)):
        train(job, reporter=RecordingReporter(5))
    said = []
    for names, rank in ((("table-",), 1), (("dense",), 0)):
        checkpoint_writer.save_file = refuse(names, rank)
        try:
            with sole_group(Path(job.run_dir)):
                train(job, reporter=RecordingReporter(7))
        except CheckpointError as error:
            said.append(str(error))
        finally:
            checkpoint_writer.save_file = written
    dist.barrier()
    return said


class SignallingReporter(RecordingReporter):
    """Tells a thread when a step was made."""

    def __init__(self, step: int) -> None:
        super().__init__(None)
        self._awaited, self.made = step, threading.Event()

    def row(self, kind: str, **values: Any) -> None:
        super().row(kind, **values)
        if kind == "step" and values["step"] == self._awaited:
            self.made.set()


def run_beside_a_slow_disk(asynchronous: TrainJob, waiting: TrainJob) -> list[dict[str, Any]]:
    """The first job, whose first checkpoint, after step 2, is on rank 1's disk only after step 3 was made; its rows."""
    written, reporter = checkpoint_writer.save_file, SignallingReporter(3)

    def save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if dist.get_rank() == 1 and path.parent.name == "step-00000002":
            assert reporter.made.wait(60), "training waited for the disk"
        written(tensors, path)

    checkpoint_writer.save_file = save_file
    train(asynchronous, reporter=reporter)
    checkpoint_writer.save_file = written
    train(waiting, reporter=RecordingReporter(None))
    dist.barrier()
    return reporter.rows


def test_training_goes_on_while_a_checkpoint_is_written_of_what_was_when_it_began(shards_dir, tmp_path):
    each_second = CheckpointConfig(every_steps=2, keep=9)
    beside = make_job(shards_dir, tmp_path / "beside", checkpoint=each_second)
    waiting = make_job(
        shards_dir, tmp_path / "waiting", checkpoint=dataclasses.replace(each_second, asynchronous=False)
    )
    rows = run_ranks(run_beside_a_slow_disk, 2, beside, waiting)[0]
    order = [(row["kind"], row["step"]) for row in rows if row["kind"] in ("step", "checkpoint")]
    assert order.index(("step", 3)) < order.index(("checkpoint", 2)) < order.index(("checkpoint", 4))
    names = [path.name for path in committed_checkpoints(tmp_path / "beside")]
    assert names == [f"step-0000000{step}" for step in (2, 4, 6, 8)]
    for name in names:
        for file in sorted((tmp_path / "waiting" / name).glob("*.safetensors")):
            assert (tmp_path / "beside" / name / file.name).read_bytes() == file.read_bytes(), file
    told = next(row for row in rows if row["kind"] == "checkpoint")
    files = (tmp_path / "beside" / names[0]).iterdir()
    assert told["bytes"] == sum(file.stat().st_size for file in files if file.name != "COMMIT")
    assert told["stall_seconds"] > 0


def test_checkpoints_by_the_clock_come_between_those_of_evaluations(shards_dir, tmp_path):
    job = make_job(shards_dir, tmp_path / "run", checkpoint=CheckpointConfig(every_minutes=1e-9, keep=9))
    run_ranks(run_each, 2, [(job, [None])])
    assert [path.name for path in committed_checkpoints(tmp_path / "run")] == [f"step-{n:08d}" for n in range(1, 9)]


def run_beside_a_full_disk(job: TrainJob) -> tuple[str, int]:
    """Every second step's checkpoint is refused by rank 1's disk: (what the error says, the last step made)."""
    written, reporter = checkpoint_writer.save_file, RecordingReporter(None)

    def save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if dist.get_rank() == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        written(tensors, path)

    checkpoint_writer.save_file = save_file
    try:
        train(job, reporter=reporter)
    except CheckpointError as error:
        return str(error), reporter.rows[-1]["step"]
    finally:
        checkpoint_writer.save_file = written
    raise AssertionError("trained on")


def test_disk_that_refuses_beside_training_ends_it_on_every_rank_before_the_next_checkpoint(shards_dir, tmp_path):
    job = make_job(shards_dir, tmp_path / "run", checkpoint=CheckpointConfig(every_steps=2))
    first, second = run_ranks(run_beside_a_full_disk, 2, job)
    assert first == second
    assert "step-00000002: not written: No space left on device" in first[0]
    assert first[1] <= 4
    assert committed_checkpoints(tmp_path / "run") == []
    assert not (tmp_path / "run/step-00000002").exists()


def run_to_a_loss_that_is_no_number(job: TrainJob) -> tuple[str, list[dict[str, Any]]]:
    """Train until the loss of step 7 is not finite on rank 1; what the error says, and the rows."""
    computed, calls = step_module.request_loss, []

    def request_loss(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        loss = computed(*arguments, **named)
        broken = len(calls) == 7 and dist.get_rank() == 1
        return dataclasses.replace(loss, total=loss.total * float("nan")) if broken else loss

    step_module.request_loss = request_loss
    reporter = RecordingReporter(None)
    try:
        train(job, reporter=reporter)
    except NonFiniteLoss as error:
        return str(error), reporter.rows
    raise AssertionError("trained on")


def test_loss_that_is_no_number_ends_the_run_before_it_is_learned_from(shards_dir, tmp_path):
    job = make_job(shards_dir, tmp_path / "nan", checkpoint=CheckpointConfig(every_steps=6))
    (first, rows), (second, _) = run_ranks(run_to_a_loss_that_is_no_number, 2, job)
    assert first == second
    assert "the loss of step 7 is nan, of user rows " in first
    assert "the latest checkpoint is step-00000006" in first
    found = json.loads((tmp_path / "nan/non-finite.json").read_text())
    loader = TrainLoader(Shards.open(shards_dir), requests=job.requests, loader=job.loader, seed=job.seed)
    batches = [next(iterator) for iterator in [iter(loader)] for _ in range(7)]
    assert (found["step"], found["user_rows"]) == (6, sorted(batches[-1].user.tolist()))
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "nan").values())
    assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 2, 3, 4, 5, 6]


def test_rows_tell_where_time_and_memory_went(two_rank_runs):
    _, (rows, *_) = two_rank_runs
    *steps, last = (row for row in rows if row["kind"] == "step")
    for row in (*steps, last):
        parts = [row[f"{name}_seconds"] for name in ("data", "look_up", "dense", "optimizer")]
        # The last step has no next batch to read.
        assert all(seconds > 0 for seconds in (parts[1:] if row is last else parts))
        assert sum(parts) <= row["seconds"]
        assert row["events"] > 0
        assert 0.2 < row["memory_gib"] < 20
    (cost,) = [row for row in rows if row["kind"] == "cost"]
    assert cost["core_seconds"] > sum(row["dense_seconds"] for row in rows if row["kind"] == "step")
    assert min(cost["read_bytes"], cost["written_bytes"]) > 0


def test_full_disk_ends_the_run_on_every_rank_and_leaves_the_earlier_checkpoint(shards_dir, tmp_path):
    said = run_ranks(run_on_a_full_disk, 2, make_job(shards_dir, tmp_path / "full"))
    assert said[0] == said[1]
    assert len(said[0]) == 2
    assert all("step-00000007: not written: No space left on device: make room" in text for text in said[0])
    # Step 4 ends the first epoch.
    left = sorted((tmp_path / "full").glob("step-*"))
    assert [path.name for path in left] == ["step-00000004", "step-00000005"]
    assert [verify_checkpoint(path) for path in left] == [[], []]


def hold_together(run_dir: Path) -> str:
    with sole_group(run_dir):
        with (run_dir / "workers.lock").open() as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held = True
            else:
                held = False
        dist.barrier()
    dist.barrier()
    intruder = (run_dir / "workers.lock").open() if dist.get_rank() == 0 else None
    if intruder:
        fcntl.flock(intruder, fcntl.LOCK_SH)
    dist.barrier()
    try:
        with sole_group(run_dir, wait_seconds=0):
            return "entered"
    except RunInUse as error:
        return f"{held}, {error}"


def test_group_holds_its_lock_together_and_a_rank_of_another_group_keeps_all_out(tmp_path):
    said = run_ranks(hold_together, 2, tmp_path)
    assert said[0] == said[1]
    assert said[0].startswith("True, ")
    assert "a worker of an earlier group still writes there: end process " in said[0]
