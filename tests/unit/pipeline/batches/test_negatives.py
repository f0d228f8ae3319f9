import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batches.negatives import Candidates, Uniform, Weighted, draw_keys, log_expected_draws, with_negatives
from pipeline.shards.sequences import offsets_of

ITEMS = 14
"""Rows 2 to 13 are items."""
COUNTS = np.array([0, 0, 5, 1, 0, 9, 2, 2, 30, 1, 0, 4, 7, 1])


def keys_of(users, *, seed=3, epoch=1, request=0):
    return draw_keys(seed=seed, epoch=epoch, user=np.asarray(users), request=np.full(len(users), request))


def drawn(positives, *, proposal, num_negatives, **keys):
    """Candidates of requests that have these positives, each of a user of its own."""
    offsets = offsets_of(np.array([len(items) for items in positives], np.int64))
    flat = np.array([item for items in positives for item in items], np.int64)
    keys = keys_of(range(len(positives)), **keys)
    return with_negatives(flat, offsets, keys=keys, proposal=proposal, num_negatives=num_negatives)


def by_request(candidates: Candidates):
    """(positives, negatives) of each request."""
    for first, last in zip(candidates.offsets[:-1], candidates.offsets[1:], strict=True):
        item, label = candidates.item[first:last], candidates.label[first:last]
        assert (np.diff(label) <= 0).all()
        yield item[label > 0].tolist(), item[label == 0].tolist()


PROPOSALS = {
    "uniform": (Uniform(ITEMS), np.array([0, 0] + [1] * 12)),
    "popularity": (Weighted.popularity(COUNTS, power=1.0), COUNTS),
    "flattened": (Weighted.popularity(COUNTS, power=0.5), COUNTS**0.5),
    "pool": (Weighted.pool(np.array([8, 3, 8, 5, 8, 13])), np.bincount([8, 3, 8, 5, 8, 13], minlength=ITEMS)),
}


@pytest.mark.parametrize("name", PROPOSALS)
@settings(max_examples=30, deadline=None)
@given(positives=st.lists(st.sets(st.integers(2, 13), min_size=1, max_size=6), min_size=1, max_size=5))
def test_negatives_follow_the_weights_of_everything_but_the_positives(name, positives):
    proposal, weight = PROPOSALS[name]
    candidates = drawn(positives, proposal=proposal, num_negatives=600)
    for items, (found, negatives) in zip(positives, by_request(candidates), strict=True):
        assert set(found) == items
        left = weight.astype(float).copy()
        left[list(items)] = 0
        if not left.any():
            assert negatives == []
            continue
        counts, expected = np.bincount(negatives, minlength=ITEMS), 600 * left / left.sum()
        assert counts[left == 0].sum() == 0
        # Chi-square has a mean of at most 11 and a standard deviation of at most 4.7; ten of them leave no room.
        assert (((counts - expected) ** 2)[left > 0] / expected[left > 0]).sum() < 60


@pytest.mark.parametrize("name", PROPOSALS)
def test_log_expected_draws_is_the_log_of_how_often_an_item_is_drawn(name):
    proposal, weight = PROPOSALS[name]
    candidates = drawn([{8}, {5, 3}], proposal=proposal, num_negatives=20)
    found = np.exp(log_expected_draws(candidates, proposal=proposal, num_negatives=20))
    remaining = np.repeat([weight.sum() - weight[8], weight.sum() - weight[5] - weight[3]], [21, 22])
    # Weights that are no counts are kept to 31 bits.
    np.testing.assert_allclose(found, 20 * weight[candidates.item] / remaining, rtol=1e-6)


def test_uniform_draws_are_what_they_have_always_been():
    positive, offsets = np.array([7, 3, 5]), np.array([0, 2, 3])
    keys = draw_keys(seed=3, epoch=1, user=np.array([11, 2]), request=np.array([4, 9]))
    candidates = with_negatives(positive, offsets, keys=keys, proposal=Uniform(50), num_negatives=6)
    assert candidates.item.tolist() == [7, 3, 17, 8, 17, 8, 31, 45, 5, 15, 46, 49, 4, 38, 32]
    assert candidates.label.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("name", PROPOSALS)
def test_draws_follow_user_request_seed_and_epoch_and_not_the_company(name):
    def draw(users, **keys):
        candidates = with_negatives(
            np.full(len(users), 2),
            np.arange(len(users) + 1),
            keys=keys_of(users, **keys),
            proposal=PROPOSALS[name][0],
            num_negatives=40,
        )
        return candidates.item.reshape(-1, 41)[:, 1:].tolist()

    together = draw([40, 10, 30])
    assert draw([10]) == together[1:2]
    assert draw([30, 40]) == [together[2], together[0]]
    others = [draw([40], seed=4), draw([40], epoch=2), draw([40], request=1), together[:1], together[1:2]]
    assert len({str(negatives) for negatives in others}) == 5


def test_pool_is_a_set_with_counts_whatever_its_order():
    pool = np.array([8, 3, 8, 5, 8, 13])
    first, second = (drawn([{3}, {8}], proposal=Weighted.pool(p), num_negatives=9) for p in (pool, pool[::-1]))
    assert first.item.tolist() == second.item.tolist()


@pytest.mark.parametrize("pool", [[], [5], [5, 3, 5]])
def test_request_whose_positives_are_the_whole_pool_gets_no_negatives(pool):
    candidates = drawn([{3, 5}, set()], proposal=Weighted.pool(np.array(pool, np.int64)), num_negatives=4)
    (positives, none), (nothing, some) = by_request(candidates)
    assert (set(positives), none, nothing) == ({3, 5}, [], [])
    assert len(some) == (4 if pool else 0)
    assert set(some) <= set(pool)
    log_q = log_expected_draws(candidates, proposal=Weighted.pool(np.array(pool, np.int64)), num_negatives=4)
    assert log_q[:2].tolist() == [0, 0]


def test_rare_items_of_a_large_catalogue_keep_their_share():
    counts = np.zeros(200_002, np.int64)
    counts[2:] = 1 + 100_000 // np.arange(1, 200_001)
    proposal = Weighted.popularity(counts, power=0.75)
    share = proposal.stretch(np.arange(2, 200_002))[1] / proposal.total
    exact = counts[2:] ** 0.75 / (counts[2:] ** 0.75).sum()
    # A whole number of 2^-31 parts: the rarest item has about 3,000 of them.
    np.testing.assert_allclose(share, exact, rtol=1e-3)
