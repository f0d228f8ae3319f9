"""The start of a prior against plain searches for it, and item counters against a loop over the raw events."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections import defaultdict
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from jobs.training import prior_fit
from jobs.training.baselines import OWN_ITEMS, ranking_scores
from jobs.training.catalogue import catalogue_of, evidence_counts
from jobs.training.item_counting import count_items
from jobs.training.model import catalogue_input
from jobs.training.prior_fit import fit_prior
from models.item_counters import MS_PER_DAY, ItemCounters
from models.prior import ITEM_EVENTS, USER_EVENTS, Prior
from pipeline.batches.loader import TrainLoader, training_item_counts
from pipeline.batches.loader_config import LoaderConfig
from pipeline.batches.requests import RequestConfig
from pipeline.build import index_requests
from pipeline.events import EventColumns
from pipeline.shards.dataset import Shards
from pipeline.shards.vocabulary import NUM_RESERVED, UNKNOWN

USERS, ITEMS, DAYS, FIRST_DAY = 20, 40, 20, 19_000
VALID_FROM = (FIRST_DAY + 16) * MS_PER_DAY
TEMPORAL: dict[str, Any] = {
    "split": "temporal", "valid_from": VALID_FROM, "test_from": VALID_FROM + 2 * MS_PER_DAY, "max_requests": 1000,
}  # fmt: skip
SHOWN = RequestConfig(task="impressions", **TEMPORAL)
RETURNING = RequestConfig(seen_items="kept", min_label=0, num_negatives=4, **TEMPORAL)


@pytest.fixture(autouse=True)
def one_rank():
    """A process group of this process alone: fitting and counting are collectives."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def open_log(prepare, write_log, tmp_path):
    """Shards of a log, with its requests counted."""

    def make(log: pl.DataFrame, requests: RequestConfig) -> Shards:
        write_log(log)
        columns = EventColumns(timestamp_unit="ms", label="label", request_id="request_id")
        prepare(tmp_path / "log", tmp_path / "shards", columns=columns, buckets=2, row_group_events=150)
        data = Shards.open(str(tmp_path / "shards"))
        index_requests(data, config=requests)
        return data

    return make


def shown_log(seed: int = 0) -> pl.DataFrame:
    """What is shown together has one time; whether it is liked depends on the item and on the user."""
    rng = np.random.default_rng(seed)
    of_item, of_user = rng.normal(0, 1, ITEMS), rng.normal(0, 1, USERS)
    rows = []
    for user in range(USERS):
        times = np.sort(rng.choice(DAYS * 24, 30, replace=False)) * (MS_PER_DAY // 24)
        for request, time in enumerate(times):
            for item in rng.choice(ITEMS, 4, replace=False):
                liked = rng.random() < 1 / (1 + math.exp(0.5 - of_item[item] - of_user[user]))
                rows.append((user, 100 + item, FIRST_DAY * MS_PER_DAY + int(time), int(liked), request))
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "label", "request_id"], orient="row")


def returning_log(seed: int = 0) -> pl.DataFrame:
    """Everybody comes back to three items of their own."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(USERS // 2):
        own = rng.choice(ITEMS, 3, replace=False)
        for request, time in enumerate(np.sort(rng.choice(DAYS * 24 * 60, 30, replace=False))):
            item = rng.choice(own) if rng.random() < 0.8 else rng.integers(ITEMS)
            rows.append((user, 100 + item, FIRST_DAY * MS_PER_DAY + 60_000 * int(time), 1, request))
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "label", "request_id"], orient="row")


def loader_of(data: Shards, requests: RequestConfig, *, seed: int = 1) -> TrainLoader:
    loader = LoaderConfig(batch_events=1500, window_row_groups=2)
    return TrainLoader(data, requests=requests, loader=loader, seed=seed)


def counters_of(data: Shards, requests: RequestConfig) -> ItemCounters:
    counts = training_item_counts(data, requests=requests)
    return count_items(data, min_label=requests.least_label, evidence=counts)


def fitted(data: Shards, requests: RequestConfig, *, seed: int = 1) -> Prior:
    prior, loader = Prior(requests.task), loader_of(data, requests, seed=seed)
    before = loader.state_dict()
    fit_prior(prior, counters_of(data, requests), loader, requests=requests, num_items=data.vocabulary.size, seed=seed)
    assert loader.state_dict() == before
    assert all(bool(torch.isfinite(parameter).all()) for parameter in prior.parameters())
    return prior


def shrunk(positives: int, events: int, *, mean: float, added: float) -> float:
    rate = (positives + added * mean) / (events + added)
    return math.log(rate / (1 - rate)) - math.log(mean / (1 - mean))


def shown_rates(log: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """([M, 3] rates of item and user and a 1, [M] labels) of all that was shown before VALID_FROM, from the raw log."""
    rows = log.rows(named=True)
    trained = [row["label"] for row in rows if row["timestamp"] < VALID_FROM]
    mean = (sum(trained) + 1) / (len(trained) + 2)
    features, labels = [], []
    for row in rows:
        if row["timestamp"] >= VALID_FROM:
            continue
        day = row["timestamp"] // MS_PER_DAY
        of_item = [r["label"] for r in rows if r["item_id"] == row["item_id"] and r["timestamp"] // MS_PER_DAY < day]
        of_user = [r["label"] for r in rows if r["user_id"] == row["user_id"] and r["timestamp"] < row["timestamp"]]
        features.append(
            (
                shrunk(sum(of_item), len(of_item), mean=mean, added=ITEM_EVENTS),
                shrunk(sum(of_user), len(of_user), mean=mean, added=USER_EVENTS),
                1.0,
            )
        )
        labels.append(row["label"])
    return np.array(features), np.array(labels, float)


def test_rates_of_impressions_get_the_weights_of_a_logistic_regression(open_log):
    log = shown_log()
    prior = fitted(open_log(log, SHOWN), SHOWN)
    features, labels = shown_rates(log)
    weights = np.zeros(3)
    for _ in range(5000):
        weights += features.T @ (labels - 1 / (1 + np.exp(-features @ weights))) / len(labels)
    found = torch.cat([prior.rate_2, prior.bias_1]).tolist()
    # The product keeps rates in float32, and its fit has a light penalty.
    assert found == pytest.approx(weights.tolist(), rel=1e-3, abs=1e-3)
    assert min(found[:2]) > 0.3


def ndcg(scores_BI: torch.Tensor, target_B: torch.Tensor) -> float:
    """Of one target a request, ties with expected ranks."""
    scores_BI = scores_BI.clone()
    scores_BI[:, :NUM_RESERVED] = -math.inf
    target_B1 = scores_BI.gather(1, target_B[:, None])
    ties_B = (scores_BI == target_B1).sum(1) - 1
    rank_B = (scores_BI > target_B1).sum(1) + 0.5 * ties_B
    return float(torch.where(rank_B < 10, 1 / torch.log2(2 + rank_B), 0.0).mean())


def test_where_people_come_back_the_prior_ranks_no_worse_than_their_own_items(open_log):
    data = open_log(returning_log(), RETURNING)
    prior, counters = fitted(data, RETURNING).eval(), counters_of(data, RETURNING)
    assert prior.own_3[0] > 0
    assert float(prior.own_3[1:].detach().sum()) > 0
    assert (prior.window_5 > 0).sum() == 1
    counts = training_item_counts(data, requests=RETURNING)
    catalogue = catalogue_of(data, requests=RETURNING, training_count=counts[: data.vocabulary.size])
    own, size = ranking_scores(OWN_ITEMS, catalogue), data.vocabulary.size
    found: list[tuple[float, float, float, int]] = []
    requests = dataclasses.replace(RETURNING, num_negatives=0)
    for batch in loader_of(data, requests).epoch(0):
        none = torch.zeros(size, 0)
        users = torch.zeros(batch.num_users, 0, 0)
        inputs = catalogue_input(batch, none, none[..., None], users, candidates=range(size))
        scores_BI = prior(inputs, counters).view(-1, size)
        # Popularity of all training would know what comes later: items outside the history count as nothing here.
        own_BI, target_B = own(batch).expand(batch.num_requests, -1), batch.candidate_item
        popular_BI = torch.from_numpy(counts[:size]).float().expand(batch.num_requests, -1)
        own_BI = torch.where(own_BI >= 1, own_BI, 0.0)
        each = (ndcg(one, target_B) for one in (scores_BI, own_BI, popular_BI))
        found.append((*each, batch.num_requests))  # type: ignore[arg-type]
    of_prior, of_own, of_popularity, _ = np.average(found, axis=0, weights=[row[-1] for row in found])
    assert sum(row[-1] for row in found) > 200
    assert of_prior >= of_own > of_popularity


def test_where_nobody_comes_back_the_own_items_are_worth_nothing(open_log):
    requests = dataclasses.replace(RETURNING, seen_items="removed")
    prior = fitted(open_log(returning_log(), requests), requests)
    assert prior.own_3.tolist() == [0, 0, 0]
    assert prior.window_5.max() > 0


@pytest.mark.parametrize(("log", "requests"), [(shown_log, SHOWN), (returning_log, RETURNING)])
def test_a_fit_follows_from_the_data_and_the_seed_changes_no_more_than_an_order_of_sums(
    open_log, monkeypatch, log, requests
):
    monkeypatch.setattr(prior_fit, "USER_REQUESTS", 1000)
    data = open_log(log(), requests)
    first, again, other = (fitted(data, requests, seed=seed).state_dict() for seed in (1, 1, 2))
    for name, tensor in first.items():
        assert torch.equal(again[name], tensor), name
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-4)


def test_other_samples_of_the_catalogue_give_nearly_the_same_prior(open_log, monkeypatch):
    """Only the bias reads them, of the items that cannot be among the first."""
    data = open_log(returning_log(), RETURNING)
    monkeypatch.setattr(prior_fit, "USER_REQUESTS", 1000)
    monkeypatch.setattr(prior_fit, "HEAD_ITEMS", 10)
    whole = fitted(data, RETURNING)
    monkeypatch.setattr(prior_fit, "SAMPLED_ITEMS", ITEMS // 2)
    first, second = (fitted(data, RETURNING, seed=seed) for seed in (1, 2))
    assert not torch.equal(first.bias_1, second.bias_1)
    for prior in (first, second):
        torch.testing.assert_close(prior.own_3, whole.own_3, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(prior.window_5, whole.window_5, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(prior.bias_1, whole.bias_1, rtol=0, atol=0.2)


def test_events_after_the_split_change_nothing_of_a_prior(open_log, monkeypatch, tmp_path):
    monkeypatch.setattr(prior_fit, "POPULAR_ITEMS", 3)
    log = returning_log()
    early, late = (log.filter((pl.col("timestamp") < VALID_FROM) == before) for before in (True, False))
    rare = early["item_id"].value_counts().sort("count", "item_id")["item_id"]
    found = []
    for items in (rare[:3], rare[-3:]):
        many = late.sample(200, with_replacement=True, seed=0).with_columns(
            item_id=items.gather(np.arange(200) % 3), timestamp=VALID_FROM + np.arange(200)
        )
        found.append(fitted(open_log(pl.concat([early, many]), RETURNING), RETURNING).state_dict())
        for name in ("log", "shards"):
            shutil.rmtree(tmp_path / name)
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


def test_the_weights_of_a_ranking_are_those_of_the_greatest_likelihood():
    """Against gradient descent by autograd, of requests with several targets and none."""
    generator = torch.Generator().manual_seed(1)
    size_Q, true_4 = [1, 5, 30, 12, 8] * 20, torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
    request_C = torch.repeat_interleave(torch.tensor(size_Q))
    x_C4 = torch.randn(len(request_C), 4, generator=generator).double()
    noise_C = torch.randn(len(request_C), generator=generator)
    goals = []
    for x_D4, noise_D in zip(x_C4.split(size_Q), noise_C.split(size_Q), strict=True):
        first_D = ((x_D4 @ true_4 + 3 * noise_D).argsort(descending=True).argsort() < 2).double()
        goals.append(first_D / first_D.sum())
    goal_C = torch.cat(goals)
    found_4 = prior_fit._minimum(
        lambda weight_4: prior_fit._softmax_loss(x_C4, goal_C, request_C, weight_4), torch.zeros(4).double(),
        num_examples=len(size_Q),
    )  # fmt: skip
    weight_4 = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight_4], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = (x_C4 @ weight_4).split(size_Q)
        losses = [
            -(goal_D * torch.log_softmax(logit_D, 0)).sum() for goal_D, logit_D in zip(goals, logits, strict=True)
        ]
        loss = torch.stack(losses).mean() + prior_fit.RIDGE / 2 * weight_4.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call, arg-type]
    torch.testing.assert_close(found_4, weight_4.detach(), rtol=1e-5, atol=1e-5)
    assert float(torch.nn.functional.cosine_similarity(found_4, true_4, dim=0)) > 0.9


def test_a_user_of_many_requests_does_not_decide_for_the_others(open_log, monkeypatch):
    """Ten users come back to their own items; an eleventh with far more requests than all of them goes round."""
    rng = np.random.default_rng(2)
    times = np.sort(rng.choice(DAYS * 24 * 60, 1200, replace=False))
    rows = [(99, 100 + k % ITEMS, FIRST_DAY * MS_PER_DAY + 60_000 * int(time), 1, k) for k, time in enumerate(times)]
    log = returning_log()
    data = open_log(pl.concat([log, pl.DataFrame(rows, schema=log.schema, orient="row")]), RETURNING)
    # A recent item is one that the eleventh asks for last.
    few = float(fitted(data, RETURNING).own_3[2].detach())
    monkeypatch.setattr(prior_fit, "USER_REQUESTS", 10_000)
    everything = float(fitted(data, RETURNING).own_3[2].detach())
    assert everything < few - 0.2


def counted(data: Shards, *, min_label: int, row_of_item: dict[int, int]) -> dict[tuple[int, int], tuple[int, int]]:
    """{(row, day): (events, positives)} by a loop over the raw events."""
    found: dict[tuple[int, int], list[int]] = defaultdict(lambda: [0, 0])
    for event in data.raw_events(range(data.num_groups)).rows(named=True):
        if event["label"] >= min_label:
            cell = found[row_of_item[event["item_id"]], event["timestamp"] // MS_PER_DAY]
            cell[0] += 1
            cell[1] += event["label"] > 0
    return {pair: (events, positives) for pair, (events, positives) in found.items()}


def stored(counters: ItemCounters) -> dict[tuple[int, int], tuple[int, int]]:
    columns = (counters.tensors()[name].tolist() for name in ("row_K", "day_K", "events_K", "positives_K"))
    return {(row, day): (events, positives) for row, day, events, positives in zip(*columns, strict=True)}


def at_midnight(log: pl.DataFrame) -> pl.DataFrame:
    """Half of the times at the first millisecond of a day in UTC, or at the last one."""
    last, kind = pl.col("timestamp") // MS_PER_DAY * MS_PER_DAY, pl.int_range(pl.len()) % 4
    moved = pl.when(kind == 0).then(last).when(kind == 1).then(last - 1).otherwise(pl.col("timestamp"))
    return log.with_columns(timestamp=moved).unique(["user_id", "item_id", "timestamp"], maintain_order=True)


@pytest.mark.parametrize("min_label", [0, 1])
def test_counters_are_those_of_a_loop_over_all_events(open_log, min_label):
    data = open_log(at_midnight(shown_log()), SHOWN)
    counts = training_item_counts(data, requests=SHOWN)
    counters = count_items(data, min_label=min_label, evidence=counts)
    items = data.vocabulary.items.to_pylist()
    expected = counted(
        data, min_label=min_label, row_of_item={item: row for row, item in enumerate(items, start=NUM_RESERVED)}
    )
    assert stored(counters) == expected
    # Also the days of the test.
    assert max(day for _, day in expected) > (VALID_FROM + 2 * MS_PER_DAY) // MS_PER_DAY
    assert torch.equal(counters.training_R, torch.from_numpy(counts))


def test_counters_for_the_rows_of_another_vocabulary(open_log):
    """One that has its own order and lacks every third item."""
    data = open_log(shown_log(), SHOWN)
    rows = np.full(data.vocabulary.capacity, UNKNOWN)
    items = data.vocabulary.items.to_pylist()
    for place in range(len(items)):
        if place % 3:
            rows[NUM_RESERVED + place] = NUM_RESERVED + len(items) - place
    model_rows = NUM_RESERVED + len(items) + 1
    counters = count_items(
        data, min_label=0, evidence=np.zeros(model_rows, np.int64), row_of_item=torch.from_numpy(rows)
    )
    known = {item: int(rows[NUM_RESERVED + place]) for place, item in enumerate(items)}
    expected = counted(data, min_label=0, row_of_item=known)
    found = stored(counters)
    assert {pair: cell for pair, cell in found.items() if pair[0] >= NUM_RESERVED} == {
        pair: cell for pair, cell in expected.items() if pair[0] >= NUM_RESERVED
    }
    assert counters.training_R.shape == (model_rows,)


@pytest.mark.parametrize("case", ["opposite", "all positive", "separable", "noise", "one candidate"])
def test_a_logistic_regression_is_finite_and_never_worse_than_the_mean(case):
    """Rates of a past that says nothing, or the opposite, of the labels; labels that a line separates."""
    rng = np.random.default_rng(1)
    rates = torch.from_numpy(rng.normal(size=(1 if case == "one candidate" else 4000, 2)) * 3)
    label = {
        "opposite": (rates[:, 0] < 0).double() * torch.from_numpy(rng.random(len(rates)) < 0.2),
        "all positive": torch.ones(len(rates), dtype=torch.float64),
        "separable": (rates[:, 0] > 0.5).double(),
        "noise": torch.from_numpy(rng.integers(0, 2, len(rates))).double(),
        "one candidate": torch.ones(1, dtype=torch.float64),
    }[case]
    mean = (float(label.sum()) + 1) / (len(label) + 2)
    weight_2, bias = prior_fit.fit_logistic(rates, label, mean=mean)

    def loss(logit: torch.Tensor) -> float:
        return float(torch.nn.functional.binary_cross_entropy_with_logits(logit, label))

    constant = torch.full_like(label, math.log(mean / (1 - mean)))
    assert loss(rates @ weight_2 + bias) <= loss(constant)
    assert max(*weight_2.abs().tolist(), abs(bias)) < 50


def test_a_window_of_training_takes_no_evidence_from_rows_that_were_trained_before(open_log):
    data = open_log(returning_log(), RETURNING)
    late = dataclasses.replace(RETURNING, train_from=VALID_FROM - MS_PER_DAY, replay_share=0.1)
    index_requests(data, config=late)
    whole, windowed = (training_item_counts(data, requests=requests) for requests in (RETURNING, late))
    assert windowed.sum() < whole.sum() / 2
    assert np.array_equal(evidence_counts(data, requests=late, training_count=windowed), whole)
