"""Sequence models in the whole loop on real ranks: softmax over the catalogue, Adam for the tables, early ends."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from jobs.cluster.parallel import ParallelConfig
from jobs.training.checkpoint import latest_checkpoint, read_state
from jobs.training.job import TrainingConfig, TrainJob
from jobs.training.optimizers import OptimizerConfig
from models.sequence_settings import SequenceConfig
from models.zoo import MODELS
from pipeline.batches.loader_config import LoaderConfig
from pipeline.batches.requests import RequestConfig
from tests.distributed import test_training_loop
from tests.distributed.test_training_loop import losses, run_each, tiny_shards, weights
from tests.support.ranks import run_ranks

SEQUENCE_MODELS = [name for name, (config, _) in MODELS.items() if issubclass(config, SequenceConfig)]
REQUESTS = RequestConfig(num_negatives=0, min_label=0)


@pytest.fixture(scope="module")
def shards_dir(tmp_path_factory) -> str:
    return tiny_shards(tmp_path_factory.mktemp("tiny"), REQUESTS)


def make_job(shards_dir: str, run_dir: Path, name: str, *, dropout: float = 0.0, **changes: Any) -> TrainJob:
    config_class, _ = MODELS[name]
    # No path and no attention is dropped where no unit is: what is drawn depends on the rank.
    sizes = {"width": 16, "num_layers": 1, "max_length": 8, "dropout": dropout, "drop_path": 0.0, "repeats": True}
    known = {field.name for field in dataclasses.fields(config_class)}
    config = config_class(**{key: value for key, value in sizes.items() if key in known})
    job = test_training_loop.make_job(
        shards_dir,
        run_dir,
        model={"name": name, **dataclasses.asdict(config)},
        training=TrainingConfig(epochs=2, loss="catalogue"),
        requests=REQUESTS,
        loader=LoaderConfig(batch_events=400, window_row_groups=2),
        optimizer=OptimizerConfig(sparse="adam", dense_lr=0.01, sparse_lr=0.01, warmup_steps=0),
    )
    return dataclasses.replace(job, **changes)


@pytest.fixture(scope="module")
def two_rank_runs(shards_dir, tmp_path_factory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    directory = tmp_path_factory.mktemp("runs")
    jobs: dict[str, tuple[TrainJob, list[int | None]]] = {
        name: (make_job(shards_dir, directory / name, name), [None]) for name in SEQUENCE_MODELS
    }
    jobs["straight"] = (make_job(shards_dir, directory / "straight", "sasrec", dropout=0.2), [None])
    jobs["resumed"] = (make_job(shards_dir, directory / "resumed", "sasrec", dropout=0.2), [2, None])
    return directory, dict(zip(jobs, run_ranks(run_each, 2, list(jobs.values()))[0], strict=True))


def test_one_and_two_ranks_give_the_same_losses_and_validation(two_rank_runs, shards_dir, tmp_path):
    _, two_ranks = two_rank_runs
    jobs = [(make_job(shards_dir, tmp_path / name, name), [None]) for name in SEQUENCE_MODELS]
    for name, rows in zip(SEQUENCE_MODELS, run_ranks(run_each, 1, jobs)[0], strict=True):
        # fp32 sums in another order, the bound of the project's contract; Adam divides by what is near zero at first.
        assert losses(rows) == pytest.approx(losses(two_ranks[name]), rel=1e-3), name
        first, second = ([row["ndcg@10"] for row in each if row["kind"] == "valid"] for each in (rows, two_ranks[name]))
        # One request in forty may change its rank by such a difference.
        assert first == pytest.approx(second, abs=0.03), name


def test_weights_that_are_spread_over_ranks_train_as_whole_ones(two_rank_runs, shards_dir, tmp_path):
    # A recurrence, which keeps its own list of weights, a convolution, and parameters that no module of torch holds.
    names, spread = ("gru4rec", "recgrela", "hstu"), ParallelConfig(zero_stage=3)
    jobs = [(make_job(shards_dir, tmp_path / name, name, parallel=spread), [None]) for name in names]
    for name, rows in zip(names, run_ranks(run_each, 2, jobs)[0], strict=True):
        assert losses(rows) == pytest.approx(losses(two_rank_runs[1][name]), rel=1e-3), name


def test_loss_over_the_catalogue_falls_from_that_of_a_guess(two_rank_runs):
    for name, rows in two_rank_runs[1].items():
        values = losses(rows)
        # Sixty items, drawn rows near zero: log(60) = 4.09.
        assert values[0] == pytest.approx(4.09, abs=0.3), name
        assert values[-1] < values[0], name


def test_resumed_run_with_adam_is_bit_equal_to_an_uninterrupted_one(two_rank_runs):
    directory, rows = two_rank_runs
    assert losses(rows["resumed"]) == losses(rows["straight"])
    expected, found = weights(directory / "straight"), weights(directory / "resumed")
    assert expected.keys() == found.keys()
    assert any(name.endswith("exp_avg_sq") for name in expected if name.startswith("table-item"))
    for name, tensor in expected.items():
        assert (found[name] == tensor).all(), name


def test_training_ends_after_validations_without_a_better_one_or_out_of_time(shards_dir, tmp_path):
    # A rate so small that no validation differs from the first.
    still = OptimizerConfig(dense_lr=1e-12, sparse_lr=1e-12, warmup_steps=0)
    patient = make_job(
        shards_dir,
        tmp_path / "patience",
        "sasrec",
        optimizer=still,
        training=TrainingConfig(epochs=9, loss="catalogue", patience=2),
    )
    hasty = make_job(
        shards_dir, tmp_path / "hasty", "sasrec", training=TrainingConfig(epochs=9, loss="catalogue", max_seconds=1e-6)
    )
    without_better, out_of_time = run_ranks(run_each, 1, [(patient, [None]), (hasty, [None])])[0]
    assert sum(row["kind"] == "valid" for row in without_better) == 3
    assert [row["kind"] for row in out_of_time] == [
        "start", "plan", "step", "progress", "valid", "checkpoint", "cost",
    ]  # fmt: skip
    for name in ("patience", "hasty"):
        checkpoint = latest_checkpoint(tmp_path / name)
        assert checkpoint is not None
        assert read_state(checkpoint)["train_state"]["finished"]
