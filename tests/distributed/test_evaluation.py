"""Evaluation against a brute-force reading of the raw log: who is ranked, among what, with which items removed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn

from jobs.training import catalogue_scorer
from jobs.training.baselines import ITEM_RATE, LATEST_ITEMS, OWN_ITEMS, POPULARITY
from jobs.training.catalogue import catalogue_of, training_counts
from jobs.training.catalogue_scorer import CatalogueScorer
from jobs.training.evaluation import evaluate, evaluate_baseline, evaluation_loader
from jobs.training.model import item_features, table_specs
from jobs.training.optimizers import OptimizerConfig
from jobs.training.results import RankedTargets, ScoredImpressions
from jobs.training.tables import ShardedTables
from models.interface import ModelInput
from models.zoo import MODELS, tower_class
from pipeline.batches.batch import Batch
from pipeline.batches.requests import RequestConfig
from pipeline.build import PrepareConfig, index_requests, prepare
from pipeline.shards.dataset import Shards
from pipeline.shards.vocabulary import NUM_RESERVED
from tests.support.ranks import run_ranks
from tests.support.serial import without_ray
from tests.support.tiny import prepare_tiny, write_tiny_log

FIRST, STEP = 1_000_000_000, 5_000_000
"""Milliseconds of the tiny log's first event, and between two events of a user."""
LAST = RequestConfig(min_label=0)
BASKETS = RequestConfig(
    split="temporal",
    valid_from=FIRST + 6 * STEP,
    test_from=FIRST + 9 * STEP,
    group="request",
    seen_items="kept",
    min_label=0,
)
IMPRESSIONS = dataclasses.replace(BASKETS, task="impressions", group="event", min_history=0)


class LengthTimesItem(nn.Module):
    """A score that depends on the item and on how much history is shown, and can be computed by hand."""

    def forward(self, inputs: ModelInput) -> Tensor:
        size_B = inputs.candidate_offsets_B1.diff()
        length_M = torch.repeat_interleave(inputs.request_position_B, size_B)
        return score(inputs.candidate_item_M, length_M)


def score(item: Any, length: Any) -> Any:
    return ((item * 37 + length * 11) % 61) * 1.0


def evaluate_here(shards_dir: str, requests: RequestConfig, model_dir: str) -> dict[str, Any]:
    """Systems of a model that was trained on the shards of `model_dir`."""
    shards, trained_on = Shards.open(shards_dir), Shards.open(model_dir)
    tables = ShardedTables(
        table_specs(trained_on.vocabulary, width=4),
        item_features(trained_on.vocabulary),
        optimizer=OptimizerConfig(),
        device="cpu",
    )
    catalogue = catalogue_of(
        shards,
        requests=requests,
        training_count=training_counts(trained_on, requests=requests),
        vocabulary=trained_on.vocabulary,
    )
    loader = evaluation_loader(shards, requests=requests, part="test")
    done: list[tuple[int, int]] = []
    return {
        "model": evaluate(
            LengthTimesItem(), tables, loader, catalogue=catalogue, progress=lambda *counts: done.append(counts)
        ),
        "emptied": evaluate(LengthTimesItem(), tables, loader, catalogue=catalogue, transform=Batch.without_history),
        **{
            name: evaluate_baseline(name, loader, catalogue=catalogue, shards=shards)
            for name in (POPULARITY, OWN_ITEMS, LATEST_ITEMS)
        },
        "progress": done,
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Path, Shards]:
    directory = tmp_path_factory.mktemp("evaluation")
    log = write_tiny_log(directory / "log")
    return log, prepare_tiny(log, directory / "shards", LAST, BASKETS, IMPRESSIONS)


@pytest.fixture(scope="module")
def last_items(prepared) -> list[dict[str, Any]]:
    return run_ranks(evaluate_here, 2, prepared[1].path, LAST, prepared[1].path)


@pytest.fixture(scope="module")
def baskets(prepared) -> list[dict[str, Any]]:
    return run_ranks(evaluate_here, 2, prepared[1].path, BASKETS, prepared[1].path)


def read_log(log: Path) -> pl.DataFrame:
    return pl.read_parquet(log / "events-00000.parquet").sort("user_id", "timestamp", "item_id")


def histories(log: Path) -> dict[int, list[int]]:
    users = read_log(log).group_by("user_id", maintain_order=True)
    return {user: events["item_id"].to_list() for (user,), events in users}  # type: ignore[misc]


def rank_by_hand(scores: dict[int, float], target: int, removed: set[int]) -> float:
    others = [value for item, value in scores.items() if item != target and item not in removed]
    better = sum(value > scores[target] for value in others)
    equal = sum(value == scores[target] for value in others)
    return 1 + better + equal / 2


def rows_of(shards: Shards) -> dict[int, int]:
    catalogue = shards.vocabulary.raw(np.arange(NUM_RESERVED, shards.vocabulary.size)).to_pylist()
    return {item: place for place, item in enumerate(catalogue, start=NUM_RESERVED)}


@pytest.mark.parametrize("system", ["model", "emptied", "popularity", "own items", "latest items"])
def test_ranks_equal_brute_force_on_every_rank(prepared, last_items, system):
    log, shards = prepared
    row, by_user = rows_of(shards), histories(log)
    popularity = dict.fromkeys(row, 0)
    for items in by_user.values():
        for item in items[:-2]:
            popularity[item] += 1
    user_ids = shards.user_ids.to_pylist()
    for results in last_items:
        result = results[system]
        assert sorted(user_ids[user] for user in result.user) == sorted(by_user)
        for place, user in enumerate(result.user):
            *history, target = by_user[user_ids[user]]
            scores = {item: score(row[item], len(history) if system == "model" else 0) for item in row}
            if system in ("popularity", "own items", "latest items"):
                scores = {item: float(count) for item, count in popularity.items()}
            if system == "own items":
                ages = list(enumerate(reversed(history)))
                own = {item: 1e6 + 1e6 * sum(2 ** (-age / 100) for age, each in ages if each == item) for item in row}
                scores = {item: own[item] if item in history else scores[item] for item in row}
            if system == "latest items":
                scores |= {item: 1e6 + place for place, item in enumerate(history)}
            assert result.history_length[place] == len(history)
            assert result.rank_kept[place] == rank_by_hand(scores, target, set())
            assert result.rank_removed[place] == rank_by_hand(scores, target, set(history))
            assert result.repeat[place] == (target in history)
            assert result.training_count[place] == popularity[target]
            assert not result.tied[place]
        repeats = result.repeat
        assert 0 < repeats.sum() < len(repeats)
        assert result.metrics()["hr@10"] == pytest.approx((result.rank_removed[~repeats] <= 10).mean())
        assert result.metrics()["hr@10_seen_kept"] == pytest.approx((result.rank_kept <= 10).mean())
    assert last_items[0]["progress"][-1] == (40, 40)


def test_targets_of_one_request_share_it_and_do_not_compete(prepared, baskets):
    log, shards = prepared
    row, user_ids = rows_of(shards), shards.user_ids.to_pylist()
    events = read_log(log).with_columns(pl.col("timestamp").dt.epoch("ms"))
    first_time = dict(events.group_by("item_id").agg(pl.col("timestamp").min()).iter_rows())
    trained = events.group_by("user_id", "request_id").agg(pl.col("item_id").unique(), pl.col("timestamp").min())
    trained = trained.filter(pl.col("timestamp") < BASKETS.bounds[0]).explode("item_id")
    counts = dict(trained["item_id"].value_counts().iter_rows())
    expected = {}
    for (user, _), basket in events.group_by("user_id", "request_id", maintain_order=True):
        time: Any = basket["timestamp"].min()
        if time < BASKETS.bounds[1]:
            continue
        mine = events.filter(pl.col("user_id") == user)
        history = mine.filter(pl.col("timestamp") < time)["item_id"].to_list()
        targets = set(basket["item_id"])
        known = {item: score(row[item], len(history)) for item in row if first_time[item] <= time}
        for target in targets:
            # A target that no one has seen yet stands last: nobody can recommend it.
            unseen = len([item for item in known if item not in targets]) + 1
            kept = rank_by_hand(known, target, targets) if target in known else unseen
            key = (user, len(history), target)
            expected[key] = (kept, target in history, counts.get(target, 0), 1 / len(targets))
    result = baskets[0]["model"]
    assert isinstance(result, RankedTargets)
    assert len(result.user) == len(expected)
    assert sum(weight for *_, weight in expected.values()) == pytest.approx(result.metrics()["requests"])
    found = sorted(
        (user_ids[user], length, rank, repeat, count, weight)
        for user, length, rank, repeat, count, weight in zip(
            result.user, result.history_length, result.rank_kept, result.repeat, result.training_count, result.weight,
            strict=True,
        )
    )  # fmt: skip
    wanted = sorted((user, length, *values) for (user, length, _), values in expected.items())
    assert [tuple(map(float, line)) for line in found] == [pytest.approx(tuple(map(float, line))) for line in wanted]
    assert any(weight < 1 for *_, weight in expected.values())


def item_rate_here(shards_dir: str) -> ScoredImpressions:
    shards = Shards.open(shards_dir)
    catalogue = catalogue_of(shards, requests=IMPRESSIONS, training_count=training_counts(shards, requests=IMPRESSIONS))
    loader = evaluation_loader(shards, requests=IMPRESSIONS, part="test")
    result = evaluate_baseline(ITEM_RATE, loader, catalogue=catalogue, shards=shards)
    assert isinstance(result, ScoredImpressions)
    return result


def test_the_item_rate_is_that_of_the_training_events_and_a_probability(prepared):
    log, shards = prepared
    row = rows_of(shards)
    # A request begins with its first event, and an item is a candidate of it once.
    began = pl.col("timestamp").dt.epoch("ms").min().over("user_id", "request_id")
    candidates = read_log(log).with_columns(began=began).group_by("user_id", "request_id", "item_id")
    candidates = candidates.agg(pl.col("began").first(), pl.col("label").max())
    train = candidates.filter(pl.col("began") < BASKETS.bounds[0])
    mean = (float(train["label"].sum()) + 1) / (len(train) + 2)
    shown = {row[item]: (0.0, 0) for item in row}
    for item, likes, count in train.group_by("item_id").agg(pl.col("label").sum(), pl.len()).iter_rows():
        shown[row[item]] = (likes, count)
    expected = {item: (likes + 8 * mean) / (count + 8) for item, (likes, count) in shown.items()}
    test = candidates.filter(pl.col("began") >= BASKETS.bounds[1])
    for result in run_ranks(item_rate_here, 2, shards.path):
        assert len(result.logit) == len(test) > 50
        assert result.label.sum() == test["label"].sum() > 0
        found = 1 / (1 + np.exp(-result.logit.astype(float)))
        by_hand = sorted((expected[row[item]], label) for item, label in test.select("item_id", "label").iter_rows())
        pairs = sorted(zip(found, result.label, strict=True))
        np.testing.assert_allclose([p for p, _ in pairs], [p for p, _ in by_hand], rtol=1e-5)
        assert result.metrics()["logloss"] < 1


def test_every_rank_gets_the_same_results(baskets):
    first, second = ([result["model"].rank_kept, result["popularity"].rank_kept] for result in baskets)
    assert all(left.tolist() == right.tolist() for left, right in zip(first, second, strict=True))


def test_items_that_the_model_does_not_know_are_misses_and_others_are_found_by_raw_id(prepared, tmp_path, monkeypatch):
    without_ray(monkeypatch.setattr)
    log, _ = prepared
    events = read_log(log)
    known = events.filter(pl.col("item_id") % 3 != 0)
    for name, part in (("all", events), ("known", known.with_columns(pl.col("item_id").cast(pl.String)))):
        (tmp_path / name).mkdir()
        part.write_parquet(tmp_path / name / "events-00000.parquet")
        prepare(str(tmp_path / name), str(tmp_path / f"{name}-shards"), config=PrepareConfig(buckets=2))
    shards, trained_on = Shards.open(str(tmp_path / "all-shards")), Shards.open(str(tmp_path / "known-shards"))
    for data in (shards, trained_on):
        index_requests(data, config=LAST)
    result = run_ranks(evaluate_here, 1, shards.path, LAST, trained_on.path)[0]["model"]
    row = {int(item): place for item, place in rows_of(trained_on).items()}
    by_user, user_ids = histories(log), shards.user_ids.to_pylist()
    for place, user in enumerate(result.user):
        *history, target = by_user[user_ids[user]]
        if target % 3 == 0:
            assert np.isinf(result.rank_kept[place])
            assert result.training_count[place] == -1
            assert not result.repeat[place]
        else:
            scores = {item: score(row[item], len(history)) for item in row}
            assert result.rank_kept[place] == rank_by_hand(scores, target, set())
            assert result.rank_removed[place] == rank_by_hand(scores, target, set(history))
    metrics = result.metrics()
    assert 0.1 < metrics["share_unknown"] < 0.6
    assert metrics["hr@10_seen_kept"] == pytest.approx((result.rank_kept <= 10).mean())


def test_loss_and_coverage_equal_brute_force(prepared, last_items):
    log, shards = prepared
    row_of = rows_of(shards)
    losses, recommended = [], set()
    for _, items in sorted(histories(log).items()):
        scores = {item: float(score(row, len(items) - 1)) for item, row in row_of.items()}
        total = sum(np.exp(value) for value in scores.values())
        losses.append(-np.log(0.99 * np.exp(scores[items[-1]]) / total + 0.01 / len(row_of)))
        new = [item for item in scores if item not in items[:-1]]
        recommended |= {row_of[item] for item in sorted(new, key=lambda item: (-scores[item], row_of[item]))[:10]}
    result = last_items[0]["model"]
    np.testing.assert_allclose(np.sort(result.log_loss), np.sort(losses), rtol=1e-9)
    # Equal scores may enter the ten best in another order.
    assert abs(result.recommended_items - len(recommended)) <= 3
    assert result.catalogue_items == len(row_of)
    assert np.isnan(last_items[0]["popularity"].log_loss).all()
    assert last_items[0]["popularity"].recommended_items < 60
    assert last_items[0]["model"].recommended_items == last_items[1]["model"].recommended_items


TOWERS = ("solar", "din", "light_sans", "linear_attention")


def rank_both_ways(shards_dir: str) -> dict[str, list[RankedTargets]]:
    """Each tower's results: in small blocks of items, and with the whole catalogue in one forward."""
    shards, found = Shards.open(shards_dir), {}
    tables = ShardedTables(
        table_specs(shards.vocabulary, width=16), item_features(shards.vocabulary), optimizer=OptimizerConfig(),
        device="cpu",
    )  # fmt: skip
    tables.initialize(seed=1, std=1.0)
    counts = training_counts(shards, requests=LAST)
    catalogue = catalogue_of(shards, requests=LAST, training_count=counts)
    loader = evaluation_loader(shards, requests=LAST, part="test")
    catalogue_scorer.BLOCK_ITEMS, catalogue_scorer.BLOCK_CANDIDATES = 7, 21
    in_blocks = CatalogueScorer._by_blocks
    for name in TOWERS:
        config_class, tower_of = MODELS[name][0], tower_class(name)
        sets: dict[str, Any] = {"set_attention": False} if name == "solar" else {}
        torch.manual_seed(5)
        tower = tower_of(
            config_class(width=16, repeats=True, context_features=True, time_features=True, **sets),
            num_features=len(shards.vocabulary.features),
        )  # fmt: skip
        # What starts at zero would hide which item it is read for.
        for parameter in tower.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        results = []
        for way in (in_blocks, CatalogueScorer._at_once):
            CatalogueScorer._by_blocks = way
            results.append(evaluate(tower, tables, loader, catalogue=catalogue))
        found[name] = results
    return found


def test_a_catalogue_scored_in_blocks_ranks_as_in_one_forward(prepared):
    found = run_ranks(rank_both_ways, 2, prepared[1].path)[0]
    for name in TOWERS:
        blocks, whole = found[name]
        assert len(blocks.user) == 40
        np.testing.assert_array_equal(blocks.rank_kept, whole.rank_kept, err_msg=name)
        np.testing.assert_array_equal(blocks.rank_removed, whole.rank_removed, err_msg=name)
        np.testing.assert_allclose(blocks.log_loss, whole.log_loss, rtol=1e-5, err_msg=name)
        assert blocks.log_loss.std() > 0.01, name
