"""The log follows its equations: frequencies against the true probabilities, and the same bytes however it is made."""

from __future__ import annotations

import dataclasses

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from pipeline.events import DataError
from pipeline.sources import synthetic_world
from pipeline.sources.synthetic import block_columns, import_synthetic, item_table
from pipeline.sources.synthetic_model import click_probability, item_probability, simulate
from pipeline.sources.synthetic_world import SyntheticConfig, build_world

CLICKS = SyntheticConfig(
    users=60, items=300, topics=5, groups=30, events_per_user=400, max_events_per_user=2_000, session_events=20
)
SHOWN = dataclasses.replace(CLICKS, form="impressions", candidates=6)
FORMS = pytest.mark.parametrize("config", [CLICKS, SHOWN], ids=["events", "impressions"])


def within_noise(hits: np.ndarray, probability: np.ndarray) -> bool:
    """The number of hits is within 5 standard deviations of what independent draws give: one failure in a million."""
    noise = np.sqrt((probability * (1 - probability)).sum())
    return bool(abs(hits.sum() - probability.sum()) <= 5 * noise)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks from little data."""
    monkeypatch.setattr(synthetic_world, "_BLOCK_EVENTS", 5_000)


@FORMS
def test_files_are_the_same_from_one_and_from_two_processes(config, tmp_path):
    # About a million events: more than one block, and more than one row group.
    config = dataclasses.replace(config, users=2_500)
    assert len(build_world(config).blocks) > 2
    for processes in (1, 2):
        out = str(tmp_path / f"log{processes}")
        import_synthetic(out, config=dataclasses.replace(config, processes=processes))
    one, two = (sorted((tmp_path / f"log{processes}").iterdir()) for processes in (1, 2))
    assert [(file.name, file.read_bytes()) for file in one] == [(file.name, file.read_bytes()) for file in two]


@FORMS
def test_blocks_join_to_whole_users_in_time_order(config, small_blocks, tmp_path):
    world = build_world(config)
    assert len(world.blocks) > 3
    log = pl.concat([pl.DataFrame(block_columns(world, number)) for number in range(len(world.blocks) - 1)])
    turns = log.unique("request_id", maintain_order=True) if "request_id" in log.columns else log
    assert turns.group_by("user_id", maintain_order=True).len()["len"].to_list() == world.turns.tolist()
    steps = turns.select(pl.col("timestamp").diff().over("user_id")).drop_nulls()["timestamp"]
    assert (steps > 0).all()
    first, last = config.start, config.start + config.days * 86_400_000 + config.max_events_per_user
    assert log["timestamp"].is_between(first, last).all()
    assert abs(np.log(world.turns.sum() * (len(log) / len(turns)) / config.users / config.events_per_user)) < 0.5


@FORMS
@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_clicks_follow_the_order_as_often_as_configured(config, strength):
    world = build_world(dataclasses.replace(config, order_strength=strength))
    block = simulate(world, 0)
    later = np.flatnonzero((block.previous >= 0) & (block.clicked >= 0))
    assert len(later) == (block.clicked >= 0).sum() - config.users
    follows = block.clicked[later] == world.next_item(block.previous[later])
    probability = item_probability(world, block, later, world.next_item(block.previous[later]))
    assert within_noise(follows, probability)
    # 5 standard deviations of 3,000 clicks are 0.045; by chance the next item is clicked too, about once in 300.
    assert abs(follows.mean() - strength) < 0.05


def test_item_probabilities_sum_to_one_and_match_what_was_clicked():
    world = build_world(CLICKS)
    block = simulate(world, 0)
    every = np.broadcast_to(np.arange(CLICKS.items), (len(block.user), CLICKS.items))
    probability = item_probability(world, block, np.arange(len(block.user)), every)
    np.testing.assert_allclose(probability.sum(axis=1), 1, rtol=1e-9)
    hit = block.clicked[:, None] == every
    # Of candidates put in ten classes by their true probability, each class is clicked as often as it says.
    edges = np.quantile(probability, np.linspace(0, 1, 11)[1:-1])
    place = np.searchsorted(edges, probability)
    assert all(within_noise(hit[place == tenth], probability[place == tenth]) for tenth in range(10))


def test_click_probabilities_are_calibrated_and_the_oracle_ranks_well():
    # Enough requests that an oracle with sharpness 2.5 instead of 3 fails.
    world = build_world(dataclasses.replace(SHOWN, users=600))
    block = simulate(world, 0)
    assert block.shown is not None
    probability = click_probability(world, block, np.arange(len(block.user)))
    clicked = block.shown == block.clicked[:, None]
    assert (np.diff(block.shown, axis=1) > 0).all()
    assert np.array_equal(clicked.sum(axis=1), block.clicked >= 0)
    assert within_noise(block.clicked >= 0, np.full(len(clicked), SHOWN.click_rate))
    edges = np.quantile(probability, np.linspace(0, 1, 11)[1:-1])
    place = np.searchsorted(edges, probability)
    assert all(within_noise(clicked[place == tenth], probability[place == tenth]) for tenth in range(10))
    # Measured 0.96; popularity alone (sharpness and order_strength 0) gives 0.61.
    assert roc_auc_score(clicked.ravel(), probability.ravel()) > 0.9


def test_without_interests_order_and_popularity_nothing_can_be_known():
    world = build_world(dataclasses.replace(SHOWN, sharpness=0.0, order_strength=0.0, popularity=0.0))
    block = simulate(world, 0)
    probability = click_probability(world, block, np.arange(len(block.user)))
    assert block.shown is not None
    clicked = block.shown == block.clicked[:, None]
    # Groups have ten items each, so that all items are alike.
    np.testing.assert_allclose(probability, SHOWN.click_rate / SHOWN.candidates, rtol=1e-9)
    assert within_noise(clicked, np.full(clicked.shape, SHOWN.click_rate / SHOWN.candidates))


def test_interests_drift_as_fast_as_configured():
    config = dataclasses.replace(CLICKS, drift=0.2, lasting=0.3, rank=16, users=400)
    block = simulate(build_world(config), 0)
    sessions, first = np.unique(block.session, return_index=True)
    owner = block.user[first]
    for lag in (1, 3):
        pairs = np.flatnonzero(owner[lag:] == owner[:-lag])
        product = block.interest[sessions[pairs]] * block.interest[sessions[pairs + lag]]
        # Over 20 other seeds the difference had a standard deviation of 0.015.
        assert abs(product.mean() - (0.3 + 0.7 * 0.8**lag)) < 0.06


def test_every_session_is_in_one_of_its_users_moods():
    config = dataclasses.replace(CLICKS, moods=3, lasting=1.0, session_events=5, spread=0.0)
    block = simulate(build_world(config), 0)
    sessions, first = np.unique(block.session, return_index=True)
    mood, visits = np.unique(block.interest[sessions], axis=0, return_counts=True)
    assert len(mood) == 3 * config.users
    owner = block.user[first]
    assert all(len(np.unique(block.interest[sessions[owner == user]], axis=0)) == 3 for user in np.unique(owner))
    # 80 sessions a user, all moods alike: chi-square with two degrees of freedom a user, 5 standard deviations.
    chi_square = ((visits - 80 / 3) ** 2 / (80 / 3)).sum()
    assert chi_square < 2 * config.users + 5 * np.sqrt(4 * config.users)


def test_items_carry_their_topic_and_the_log_is_reused(tmp_path):
    out = tmp_path / "log"
    imported = import_synthetic(str(out), config=SHOWN)
    log = pl.read_parquet(out / "events-*.parquet")
    assert log.columns == ["user_id", "item_id", "timestamp", "label", "request_id"]
    assert (imported.events, imported.items) == (len(log), SHOWN.items)
    items = pl.read_parquet(out / "items.parquet")
    assert items.equals(item_table(build_world(SHOWN)))
    assert items["topic"].n_unique() == SHOWN.topics
    assert import_synthetic(str(out), config=dataclasses.replace(SHOWN, processes=2)).reused
    with pytest.raises(DataError, match=r"imported with drift=0.05, asked is 0.5; name a new directory"):
        import_synthetic(str(out), config=dataclasses.replace(SHOWN, drift=0.5))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"form": "clicks"}, "form='clicks'"),
        ({"users": 0}, "users=0: must be 1 or more"),
        ({"groups": 5, "topics": 6}, "topics=6: must not exceed groups=5"),
        ({"events_per_user": 200_000}, "events_per_user=200000: must not exceed max_events_per_user=100000"),
        ({"order_strength": 1.5}, "order_strength=1.5: must be from 0 to 1"),
        ({"form": "impressions", "click_rate": 0.0}, "click_rate=0.0: must be above 0"),
        ({"form": "impressions", "events_per_user": 4}, "candidates=10: must not exceed"),
        ({"days": 100_000}, "days=100000: must end before the year 2100"),
    ],
)
def test_configurations_that_cannot_be_simulated_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        SyntheticConfig(**options)
