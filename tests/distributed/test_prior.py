"""A model with a prior in the whole loop on real ranks: its start, its checkpoints, and what is taken from them."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from jobs.training import loop
from jobs.training.catalogue import catalogue_of, training_counts
from jobs.training.checkpoint import committed_checkpoints, read_state
from jobs.training.dense_state import MOMENTS
from jobs.training.evaluation import evaluate, evaluation_loader
from jobs.training.item_counting import count_items, with_prior
from jobs.training.job import CheckpointConfig, TrainJob
from jobs.training.optimizers import OptimizerConfig
from jobs.training.results import primary_metric
from jobs.training.warm_start import best_of
from models.item_counters import MS_PER_DAY
from models.prior import PRIOR_PREFIX, Prior, PriorAlone, PriorModel
from models.solar import SolarConfig
from pipeline.batches.requests import RequestConfig
from pipeline.shards.dataset import Shards
from tests.distributed.test_training_loop import (
    SMALL,
    begin,
    losses,
    make_job,
    run_each,
    weights,
)
from tests.support.ranks import run_ranks
from tests.support.tiny import prepare_tiny

FIRST_DAY, DAYS, USERS, ITEMS = 19_000, 20, 24, 40
TEMPORAL = RequestConfig(
    num_negatives=8, min_label=0, seen_items="kept", split="temporal",
    valid_from=(FIRST_DAY + 14) * MS_PER_DAY, test_from=(FIRST_DAY + 18) * MS_PER_DAY,
)  # fmt: skip
EVERY_THIRD = CheckpointConfig(keep=99, every_steps=3)


@pytest.fixture(scope="module")
def shards_dir(tmp_path_factory) -> str:
    """Everybody comes back to three items of their own, which counting knows and training has to find."""
    directory, rng, rows = tmp_path_factory.mktemp("tiny"), np.random.default_rng(0), []
    for user in range(USERS):
        own = rng.choice(ITEMS, 3, replace=False)
        for hour in np.sort(rng.choice(DAYS * 24, 24, replace=False)):
            item = rng.choice(own) if rng.random() < 0.9 else rng.integers(ITEMS)
            rows.append((user, 100 + int(item), FIRST_DAY * MS_PER_DAY + 3_600_000 * int(hour)))
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    (directory / "log").mkdir()
    log = log.with_columns(pl.col("timestamp").cast(pl.Datetime("ms", "UTC")))
    log.write_parquet(directory / "log" / "events.parquet")
    return prepare_tiny(directory / "log", directory / "shards", TEMPORAL).path


def prior_job(shards_dir: str, run_dir: Path, *, dropout: float = 0.0, **changes: Any) -> TrainJob:
    model = {"name": "solar", **dataclasses.asdict(SolarConfig(**SMALL, dropout=dropout, prior=True))}
    kept = CheckpointConfig(keep=99)
    return make_job(shards_dir, run_dir, **{"model": model, "requests": TEMPORAL, "checkpoint": kept} | changes)


@pytest.fixture(scope="module")
def runs(shards_dir, tmp_path_factory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """{name: its rows} of two ranks."""
    directory = tmp_path_factory.mktemp("runs")
    absurd = OptimizerConfig(dense_lr=1.0, sparse_lr=3.0, warmup_steps=0)
    jobs: dict[str, tuple[TrainJob, list[int | None]]] = {
        "straight": (prior_job(shards_dir, directory / "straight", dropout=0.1, checkpoint=EVERY_THIRD), [None]),
        "resumed": (prior_job(shards_dir, directory / "resumed", dropout=0.1), [1, 3, None]),
        "without dropout": (prior_job(shards_dir, directory / "without dropout"), [None]),
        "worse": (prior_job(shards_dir, directory / "worse", optimizer=absurd), [None]),
        "warm": (
            prior_job(shards_dir, directory / "warm", warm_start=str(directory / "straight/step-00000003")),
            [None],
        ),
    }
    return directory, dict(zip(jobs, run_ranks(run_each, 2, list(jobs.values()))[0], strict=True))


def of_prior(checkpoint: Path) -> dict[str, torch.Tensor]:
    dense = load_file(checkpoint / "dense.safetensors")
    return {name: tensor for name, tensor in dense.items() if name.startswith(PRIOR_PREFIX)}


def valid_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == "valid"]


def test_an_interrupted_and_resumed_run_is_bit_equal_to_an_uninterrupted_one(runs):
    directory, found = runs
    assert len(losses(found["straight"])) > 4
    assert losses(found["resumed"]) == losses(found["straight"])
    expected, resumed = weights(directory / "straight"), weights(directory / "resumed")
    assert expected.keys() == resumed.keys()
    for name, tensor in expected.items():
        assert torch.equal(resumed[name], tensor), name


def test_checkpoints_hold_the_prior_with_its_moments_which_training_moves(runs):
    directory, _ = runs
    first, *_, last = (of_prior(path) for path in committed_checkpoints(directory / "straight"))
    names = [f"{PRIOR_PREFIX}{name}" for name, _ in Prior("next_item").named_parameters()]
    assert first.keys() == last.keys() == {*names, *(f"{name}/{moment}" for name in names for moment in MOMENTS)}
    for name in names:
        assert torch.isfinite(last[name]).all()
        assert not any(first[f"{name}/{moment}"].any() for moment in MOMENTS)
    assert any(not torch.equal(first[name], last[name]) for name in names)
    assert any(bool(last[f"{name}/exp_avg_sq"].any()) for name in names)


def test_the_run_validates_and_stores_what_it_is_before_its_first_step(runs):
    directory, found = runs
    for name in ("straight", "resumed", "warm"):
        assert valid_rows(found[name])[0]["step"] == 0
        # Once, also after an interruption.
        assert [row["step"] for row in valid_rows(found[name])].count(0) == 1
        assert committed_checkpoints(directory / name)[0].name == "step-00000000"


def test_a_run_whose_training_makes_it_worse_keeps_its_prior_as_the_best_checkpoint(runs):
    directory, found = runs
    before, *after = (row[primary_metric(TEMPORAL)] for row in valid_rows(found["worse"]))
    assert all(value < before for value in after)
    assert best_of(directory / "worse").name == "step-00000000"
    state = read_state(committed_checkpoints(directory / "worse")[-1])["train_state"]
    assert (state["best_step"], state["best_metric"]) == (0, before)


def evaluated_at_step_0(job: TrainJob, checkpoint: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The validation metrics of the model of the checkpoint, and those of its prior alone."""
    shards = Shards.open(job.shards)
    tables, tower, prior = loop.build_model(job, shards, checkpoint=checkpoint)
    counts = training_counts(shards, requests=job.requests)
    catalogue = catalogue_of(shards, requests=job.requests, training_count=counts)
    model = with_prior(tower, prior, shards, requests=job.requests, catalogue=catalogue, evidence=counts)
    assert isinstance(model, PriorModel)
    limit = read_state(checkpoint)["train_state"]["valid_requests"] or None
    part = evaluation_loader(shards, requests=job.requests, part="valid", limit=limit)
    results = [evaluate(each, tables, part, catalogue=catalogue) for each in (model, PriorAlone(model))]
    first, second = (result.metrics() for result in results)
    return first, second


def test_the_first_checkpoint_is_the_prior_and_has_the_metrics_of_the_first_validation(runs, shards_dir):
    directory, found = runs
    job = prior_job(shards_dir, directory / "without dropout")
    model, alone = run_ranks(evaluated_at_step_0, 1, job, directory / "without dropout" / "step-00000000")[0]
    row = valid_rows(found["without dropout"])[0]
    assert model["requests"] == row["requests"] > 10
    assert model["ndcg@10"] == pytest.approx(row["ndcg@10"], abs=1e-6)
    # Nothing was learned yet.
    assert model["ndcg@10"] == pytest.approx(alone["ndcg@10"], abs=1e-6)


def test_a_run_goes_on_from_its_first_checkpoint_as_if_it_had_never_stopped(runs, shards_dir, tmp_path):
    directory, found = runs
    shutil.copytree(directory / "straight" / "step-00000000", tmp_path / "run" / "step-00000000")
    rows = run_ranks(run_each, 2, [(prior_job(shards_dir, tmp_path / "run", dropout=0.1), [None])])[0][0]
    assert losses(rows) == losses(found["straight"])
    assert 0 not in [row["step"] for row in valid_rows(rows)]
    expected, resumed = weights(directory / "straight"), weights(tmp_path / "run")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def priors_of_begun(job: TrainJob) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], set[float]]:
    """(the prior's parameters before the first step, its second moments, the steps that its optimizer counts)"""
    _, _, _, dense = begin(job)
    assert isinstance(dense.model, PriorModel)
    assert dense._adamw is not None
    named = dict(dense.model.prior.named_parameters())
    moments = {name: dense._adamw.state[each]["exp_avg_sq"].clone() for name, each in named.items()}
    steps = {float(dense._adamw.state[each]["step"]) for each in named.values()}
    return {name: each.detach().clone() for name, each in named.items()}, moments, steps


def test_a_warm_start_takes_the_prior_and_its_moments(runs, shards_dir, tmp_path):
    directory, _ = runs
    start = directory / "straight" / "step-00000003"
    expected = of_prior(start)
    job = prior_job(shards_dir, tmp_path / "warm", warm_start=str(start))
    for parameters, moments, steps in run_ranks(priors_of_begun, 2, job):
        for name, parameter in parameters.items():
            assert torch.equal(parameter, expected[f"{PRIOR_PREFIX}{name}"]), name
            assert torch.equal(moments[name], expected[f"{PRIOR_PREFIX}{name}/exp_avg_sq"]), name
        assert steps == {3.0}
    # Its first checkpoint is what it began from.
    found = of_prior(directory / "warm" / "step-00000000")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_one_and_two_ranks_begin_at_one_prior_and_train_alike(runs, shards_dir, tmp_path):
    directory, found = runs
    rows = run_ranks(run_each, 1, [(prior_job(shards_dir, tmp_path / "one"), [None])])[0][0]
    one, two = (of_prior(path / "step-00000000") for path in (tmp_path / "one", directory / "without dropout"))
    for name, tensor in one.items():
        # Ranks sum in another order.
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-6)
    assert all(math.isfinite(loss) for loss in losses(rows))
    # fp32 sums in another order, the bound of the project's contract.
    assert losses(rows) == pytest.approx(losses(found["without dropout"]), rel=1e-4)


def stored_counters(shards_dir: str, day_ms: int) -> dict[str, torch.Tensor]:
    shards = Shards.open(shards_dir)
    counts = training_counts(shards, requests=TEMPORAL)
    return count_items(shards, min_label=0, evidence=counts, day_ms=day_ms).tensors()


@pytest.mark.parametrize("day_ms", [MS_PER_DAY, 1_000])
def test_counters_are_the_same_on_one_rank_and_on_three(shards_dir, day_ms):
    (alone,) = run_ranks(stored_counters, 1, shards_dir, day_ms)
    assert int(alone["events_K"].sum()) > 400
    for found in run_ranks(stored_counters, 3, shards_dir, day_ms):
        assert found.keys() == alone.keys()
        for name, tensor in alone.items():
            assert torch.equal(found[name], tensor), name
