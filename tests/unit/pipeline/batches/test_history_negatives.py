import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batches.history_negatives import count_before, expected_history_draws, with_history_negatives
from pipeline.batches.negatives import Candidates, Uniform, draw_keys, with_negatives
from pipeline.batches.requests import RequestConfig, Requests, list_requests
from pipeline.shards.sequences import UserEvents, offsets_of

CONFIG = RequestConfig(seen_items="kept")


def events_of(*users: list[int]) -> UserEvents:
    lengths = np.array([len(items) for items in users], np.int64)
    item = np.array([item for items in users for item in items], np.int64)
    place = np.concatenate([np.arange(length) for length in lengths]) if users else lengths
    return UserEvents(
        offsets=offsets_of(lengths),
        item=item,
        time=place,
        before=place,
        action=np.zeros_like(item),
        label=None,
        request=None,
    )


def drawn(events: UserEvents, *, uniform: int, history: int, seed: int = 3) -> tuple[Requests, Candidates]:
    requests = list_requests(events, CONFIG)
    keys = draw_keys(seed=seed, epoch=1, user=requests.user, request=requests.key)
    candidates = with_negatives(
        requests.candidate, requests.offsets, keys=keys, proposal=Uniform(40), num_negatives=uniform
    )
    return requests, with_history_negatives(
        candidates, requests=requests, events=events, keys=keys, num_negatives=history
    )


histories = st.lists(st.lists(st.integers(2, 12), min_size=1, max_size=20), min_size=1, max_size=4)


@settings(max_examples=50, deadline=None)
@given(users=histories, uniform=st.integers(0, 3), history=st.integers(0, 6))
def test_they_are_other_items_of_the_history_before_the_request_and_stand_once(users, uniform, history):
    events = events_of(*users)
    requests, candidates = drawn(events, uniform=uniform, history=history)
    _, without = drawn(events, uniform=uniform, history=0)
    for b in range(len(requests)):
        found = slice(candidates.offsets[b], candidates.offsets[b + 1])
        first = slice(without.offsets[b], without.offsets[b + 1])
        size = first.stop - first.start
        item, label = candidates.item[found], candidates.label[found]
        assert item[:size].tolist() == without.item[first].tolist()
        assert label[:size].tolist() == without.label[first].tolist()
        added = item[size:].tolist()
        before = users[requests.user[b]][: requests.position[b]]
        assert len(added) <= history
        assert len(set(added)) == len(added)
        assert set(added) <= set(before) - set(item[:size].tolist())
        assert not label[size:].any()
        if history and set(before) - set(item[:size].tolist()) == set(before) != set():
            assert added


def test_expected_draws_are_how_often_an_item_is_added():
    events = events_of([2, 3, 3, 4, 3, 5, 6, 9])
    rounds = 3000
    counts = np.zeros(10)
    for seed in range(rounds):
        _, candidates = drawn(events, uniform=0, history=3, seed=seed)
        last = candidates.item[candidates.offsets[-2] + 1 :]
        counts[last] += 1
    requests = list_requests(events, CONFIG).take(np.array([7]))
    every = Candidates(item=np.arange(2, 10), label=np.zeros(8, np.float32), offsets=np.array([0, 8]))
    expected = expected_history_draws(every, requests=requests, events=events, num_negatives=3)
    # Three of seven events are of item 3; nothing is drawn of items 7 and 8, nor of the positive 9.
    assert expected[1] == 1 - (4 / 7) ** 3
    assert counts[7:].tolist() == [0, 0, 0]
    np.testing.assert_allclose(counts[2:7] / rounds, expected[:5], atol=5 * np.sqrt(0.25 / rounds))


@settings(max_examples=50, deadline=None)
@given(users=histories, data=st.data())
def test_counts_before_a_place_equal_those_by_hand(users, data):
    asked = data.draw(
        st.lists(st.tuples(st.integers(0, len(users) - 1), st.integers(2, 14), st.integers(0, 20)), max_size=10)
    )
    columns = np.array(asked, np.int64).reshape(-1, 3)
    position = np.minimum(columns[:, 2], np.array([len(items) for items in users])[columns[:, 0]])
    counts = count_before(events_of(*users), user=columns[:, 0], item=columns[:, 1], position=position)
    assert counts.tolist() == [
        users[user][:end].count(item) for user, item, end in zip(columns[:, 0], columns[:, 1], position, strict=True)
    ]
