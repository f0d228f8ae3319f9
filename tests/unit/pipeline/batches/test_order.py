import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batches.order import batch_totals, cut_batches, deal, epoch_order

costs = st.lists(st.integers(0, 30), max_size=40).map(lambda found: np.array(found, np.int64))


def order(group, *, wanted=None, window=2, seed=0, epoch=0):
    wanted = np.ones(len(group), bool) if wanted is None else wanted
    return epoch_order(group, wanted=wanted, window_row_groups=window, seed=seed, epoch=epoch)


def test_an_epoch_visits_every_wanted_user_once():
    group = np.repeat(np.arange(7), [5, 1, 8, 3, 9, 2, 4])
    wanted = np.arange(32) % 3 > 0
    assert sorted(order(group, wanted=wanted)) == np.flatnonzero(wanted).tolist()


def test_users_mix_inside_windows_of_row_groups_and_not_across():
    group = np.repeat(np.arange(6), 50)
    visited = group[order(group)]
    windows = [set(visited[at : at + 100]) for at in (0, 100, 200)]
    assert [len(window) for window in windows] == [2, 2, 2]
    assert set.union(*windows) == set(range(6))
    assert all((np.diff(visited[at : at + 100]) != 0).sum() > 20 for at in (0, 100, 200))


def test_order_follows_seed_and_epoch_and_the_wanted_do_not_move():
    group = np.repeat(np.arange(4), 25)
    assert order(group).tolist() == order(group).tolist()
    assert order(group).tolist() != order(group, epoch=1).tolist()
    assert order(group).tolist() != order(group, seed=1).tolist()
    wanted = np.arange(100) % 2 == 0
    everyone = order(group)
    assert order(group, wanted=wanted).tolist() == everyone[wanted[everyone]].tolist()


@settings(max_examples=100, deadline=None)
@given(cost=costs, limit=st.integers(1, 40))
def test_batches_are_the_longest_runs_that_fit(cost, limit):
    offsets = cut_batches(cost, batch_events=limit).tolist()
    expected, load = [0], 0
    for place, value in enumerate(cost.tolist()):
        if place > expected[-1] and load + value > limit:
            expected.append(place)
            load = 0
        load += value
    assert offsets == ([*expected, len(cost)] if len(cost) else [0])
    assert batch_totals(cost, np.array(offsets)).sum() == cost.sum()


@settings(max_examples=100, deadline=None)
@given(cost=costs, world=st.integers(1, 5))
def test_dealing_is_even(cost, world):
    ranks = deal(cost, world_size=world)
    loads = np.bincount(ranks, weights=cost, minlength=world)
    # LPT: the fullest rank received its last user when it was the emptiest.
    assert loads.max() <= loads.min() + cost.max(initial=0)
    assert ((ranks >= 0) & (ranks < world)).all()
    if len(cost) >= world and (cost > 0).all():
        assert set(ranks.tolist()) == set(range(world))


def test_a_million_users_take_seconds():
    group = np.arange(1_000_000) // 1_000
    cost = np.random.default_rng(0).integers(10, 200, 1_000_000)
    start = time.process_time()
    users = order(group, window=8)
    offsets = cut_batches(cost[users], batch_events=65_536)
    # Measured 0.3 s.
    assert time.process_time() - start < 5
    assert offsets[-1] == 1_000_000
