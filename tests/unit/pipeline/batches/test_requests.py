import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batches.requests import PARTS, RequestConfig, Requests, carried, list_requests, of_part, too_short
from pipeline.batches.sampling import evaluated, sample
from pipeline.hashing import hash64
from pipeline.shards.sequences import UserEvents, offsets_of

SECOND = 1000


def events_of(*users, labels=None, requests=None):
    """Users as lists of (item, seconds)."""
    flat = [event for user in users for event in user]
    times = np.array([seconds for _, seconds in flat], np.int64) * SECOND
    return UserEvents(
        offsets=offsets_of(np.array([len(user) for user in users], np.int64)),
        item=np.array([item for item, _ in flat], np.int64),
        time=times,
        before=times,
        action=np.zeros(len(flat), np.int64),
        label=None if labels is None else np.array(labels, np.float32),
        request=None if requests is None else np.array(requests, np.int64),
    )


def as_tuples(requests):
    """(user, position, seconds, part, {item: label})"""
    return [
        (
            int(requests.user[b]), int(requests.position[b]), int(requests.time[b]) // SECOND, PARTS[requests.part[b]],
            dict(zip(requests.candidate[slice(*requests.offsets[b : b + 2])].tolist(),
                     requests.label[slice(*requests.offsets[b : b + 2])].tolist(), strict=True)),
        )
        for b in range(len(requests))
    ]  # fmt: skip


def test_leave_one_out_counts_positions_even_where_times_tie():
    events = events_of([(5, 1), (6, 1), (7, 1), (8, 2)], [(5, 1), (6, 2)])
    assert as_tuples(list_requests(events, RequestConfig())) == [
        (0, 0, 1, "train", {5: 1}),
        (0, 1, 1, "train", {6: 1}),
        (0, 2, 1, "valid", {7: 1}),
        (0, 3, 2, "test", {8: 1}),
        (1, 0, 1, "train", {5: 1}),
        (1, 1, 2, "train", {6: 1}),
    ]


def test_bounds_are_dates_or_milliseconds_also_as_text():
    config = RequestConfig(split="temporal", valid_from="20240131", test_from="1706745600123")
    assert config.bounds == (1706659200000, 1706745600123)
    unquoted = RequestConfig(split="temporal", valid_from=20240131, test_from=1706745600123)
    assert unquoted.bounds == config.bounds


def test_temporal_histories_are_strictly_earlier():
    config = RequestConfig(split="temporal", valid_from=2 * SECOND, test_from=3 * SECOND)
    events = events_of([(5, 1), (6, 2), (7, 2), (8, 3)])
    assert as_tuples(list_requests(events, config)) == [
        (0, 0, 1, "train", {5: 1}),
        (0, 1, 2, "valid", {6: 1}),
        (0, 1, 2, "valid", {7: 1}),
        (0, 3, 3, "test", {8: 1}),
    ]


def test_impressions_gather_the_events_of_a_request_id():
    config = RequestConfig(task="impressions")
    events = events_of(
        [(5, 1), (6, 1), (5, 2), (7, 2), (8, 3), (9, 4)], [(4, 9)], labels=[0, 1, 1, 0, 0, 1, 1],
        requests=[3, 0, 0, 3, -1, 1, 0],
    )  # fmt: skip
    # Item 5 is shown by two requests; the event of no request is history only.
    assert as_tuples(list_requests(events, config)) == [
        (0, 0, 1, "train", {5: 0, 7: 0}),
        (0, 0, 1, "valid", {6: 1, 5: 1}),
        (0, 5, 4, "test", {9: 1}),
        (1, 0, 9, "train", {4: 1}),
    ]


def test_an_item_shown_twice_in_a_request_is_one_candidate_with_the_better_label():
    events = events_of([(5, 1), (5, 2), (6, 3)], labels=[0, 1, 0], requests=[0, 0, 0])
    assert as_tuples(list_requests(events, RequestConfig(task="impressions"))) == [(0, 0, 1, "train", {5: 1, 6: 0})]


def test_sessions_end_at_a_pause_and_at_the_user():
    config = RequestConfig(task="impressions", session_gap_seconds=10)
    events = events_of([(1, 0), (2, 10), (3, 21)], [(4, 22)], labels=[1, 0, 1, 1])
    assert as_tuples(list_requests(events, config)) == [
        (0, 0, 0, "train", {1: 1, 2: 0}),
        (0, 2, 21, "train", {3: 1}),
        (1, 0, 22, "train", {4: 1}),
    ]


user_lists = st.lists(st.lists(st.tuples(st.integers(2, 6), st.integers(0, 5)), max_size=8), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None)
@given(users=user_lists, data=st.data())
def test_impressions_equal_a_naive_reference(users, data):
    users = [sorted(user, key=lambda e: e[1]) for user in users]
    total = sum(len(user) for user in users)
    labels = data.draw(st.lists(st.integers(0, 1), min_size=total, max_size=total))
    ids = data.draw(st.lists(st.integers(-1, 2), min_size=total, max_size=total))
    config = RequestConfig(task="impressions", split="temporal", valid_from=2 * SECOND, test_from=4 * SECOND)
    expected, at = [], 0
    for number, user in enumerate(users):
        found = {}
        for place, (item, seconds) in enumerate(user):
            if ids[at + place] >= 0:
                _, _, shown = found.setdefault(ids[at + place], (place, seconds, {}))
                shown[item] = max(shown.get(item, 0), labels[at + place])
        for _, seconds, shown in sorted(found.values(), key=lambda r: r[0]):
            position = sum(other < seconds for _, other in user)
            part = "train" if seconds < 2 else "valid" if seconds < 4 else "test"
            expected.append((number, position, seconds, part, shown))
        at += len(user)
    assert as_tuples(list_requests(events_of(*users, labels=labels, requests=ids), config)) == expected


def test_no_users_and_users_without_events_are_legal():
    for task in ("next_item", "impressions"):
        assert len(list_requests(events_of(labels=[], requests=[]), RequestConfig(task=task))) == 0
        assert len(list_requests(events_of([], labels=[]), RequestConfig(task=task))) == 0


def test_training_is_cut_to_the_latest_events_and_evaluation_keeps_whole_histories():
    events = events_of([(2 + n, n) for n in range(10)])
    every = list_requests(events, RequestConfig(max_history=3))
    train = of_part(every, "train", RequestConfig(max_history=3))
    assert train.position.tolist() == [4, 5, 6, 7]
    assert [w.tolist() for w in carried(train, num_users=1, part="train", config=RequestConfig(max_history=3))] == [
        [4],
        [7],
    ]
    test = of_part(every, "test", RequestConfig(max_history=3))
    assert [w.tolist() for w in carried(test, num_users=1, part="test", config=RequestConfig(max_history=3))] == [
        [6],
        [9],
    ]


def test_evaluation_of_impressions_skips_and_counts_short_histories():
    config = RequestConfig(task="impressions", min_history=2)
    events = events_of(
        [(n, n) for n in range(2, 6)], [(2, 1), (3, 1), (4, 2)], labels=[1] * 7, requests=[0, 1, 2, 3, 0, 1, 2]
    )
    every = list_requests(events, config)
    assert of_part(every, "valid", config).user.tolist() == [0]
    assert PARTS[every.take(too_short(every, config)).part[0]] == "valid"
    assert len(of_part(every, "train", config)) == 3


def test_events_of_one_request_are_the_positives_of_one_request():
    config = RequestConfig(group="request", split="temporal", valid_from=3 * SECOND, test_from=4 * SECOND)
    users = [(5, 1), (6, 1), (7, 3), (5, 3), (7, 3), (8, 5)], [(9, 4)]
    by_id = events_of(*users, requests=[0, 0, 1, 1, 1, -1, 0])
    expected = [
        (0, 0, 1, "train", {5: 1, 6: 1}),
        (0, 2, 3, "valid", {5: 1, 7: 1}),
        (0, 5, 5, "test", {8: 1}),
        (1, 0, 4, "test", {9: 1}),
    ]
    assert as_tuples(list_requests(by_id, config)) == expected
    assert as_tuples(list_requests(events_of(*users), config)) == expected, "without ids: events of one time"
    events = events_of([(5, 1), (6, 1), (7, 1), (8, 2), (9, 3)], requests=[0, 1, 0, -1, -1])
    assert as_tuples(list_requests(events, RequestConfig(group="request"))) == [
        (0, 0, 1, "train", {5: 1, 7: 1}),
        (0, 0, 1, "train", {6: 1}),
        (0, 3, 2, "valid", {8: 1}),
        (0, 4, 3, "test", {9: 1}),
    ]


def test_evaluation_requests_are_capped_by_the_same_draw_each_time():
    config = RequestConfig(split="temporal", valid_from=10 * SECOND, test_from=50 * SECOND, max_eval_requests=6)
    every = of_part(list_requests(events_of([(5, n) for n in range(60)], [(5, 20), (6, 21)]), config), "valid", config)
    drawn = [evaluated(every, config=config) for _ in range(2)]
    assert np.bincount(drawn[0].user).tolist() == [6, 2]
    assert drawn[0].key.tolist() == drawn[1].key.tolist()
    assert (np.diff(drawn[0].key[drawn[0].user == 0]) > 0).all()
    assert len(evaluated(every, config=RequestConfig())) == len(every) == 42


def next_items(num_users, length, first_item=2):
    users = [[(first_item + (n + u) % 50, n) for n in range(length)] for u in range(num_users)]
    return of_part(list_requests(events_of(*users), RequestConfig()), "train", RequestConfig())


def test_the_sample_is_capped_ordered_fresh_each_epoch_and_independent_of_company():
    config = RequestConfig(max_requests=4)
    requests, rows = next_items(5, 20), np.array([40, 10, 30, 20, 50])
    draws = [sample(requests, user_rows=rows, seed=1, epoch=e, config=config) for e in (0, 0, 1)]
    assert np.bincount(draws[0].user).tolist() == [4] * 5
    assert (np.diff(draws[0].user * 1000 + draws[0].position) > 0).all()
    assert draws[0].position.tolist() == draws[1].position.tolist() != draws[2].position.tolist()
    alone = requests.take(requests.user == 2)
    alone = Requests(**{**vars(alone), "user": np.zeros(len(alone), np.int64)})
    again = sample(alone, user_rows=rows[2:3], seed=1, epoch=0, config=config)
    assert again.position.tolist() == draws[0].position[draws[0].user == 2].tolist()


def test_hashes_differ_in_every_key():
    values = [int(hash64(*keys)[0]) for keys in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)]]
    assert len(set(values)) == 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "rank"}, "task is 'rank'"),
        ({"split": "random"}, "split is 'random'"),
        ({"max_history": 0}, "max_history is 0: it must be at least 1"),
        ({"session_gap_seconds": 0}, "must be positive"),
        ({"negatives": "hard"}, "negatives is 'hard': it must be uniform, popularity or in_batch"),
        (
            {"negatives": "in_batch", "task": "impressions"},
            "negatives is in_batch: task impressions draws none, remove",
        ),
        (
            {"history_negatives": 4, "task": "impressions"},
            "history_negatives is 4: task impressions draws none, remove it",
        ),
        (
            {"history_negatives": 4, "negatives": "in_batch"},
            "history_negatives is 4: negatives in_batch allows none, remove it",
        ),
        ({"negatives": "popularity", "popularity_power": 1.5}, "popularity_power is 1.5: it must be from 0 to 1"),
        ({"popularity_power": 1.0}, "popularity_power is 1.0: it belongs to negatives popularity, not uniform"),
        ({"valid_from": "2024-01-01"}, "belong to split temporal"),
        ({"split": "temporal", "valid_from": 5}, "set requests.valid_from and"),
        ({"split": "temporal", "valid_from": 5, "test_from": 4}, "after"),
        ({"split": "temporal", "valid_from": "monday", "test_from": 4}, "'monday'.*write it as"),
    ],
)
def test_a_wrong_config_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        RequestConfig(**change)


def test_bounds_are_utc_unless_they_have_a_zone():
    config = RequestConfig(split="temporal", valid_from="1970-01-02", test_from="1970-01-02T03:00:00+01:00")
    assert config.bounds == (86_400_000, 93_600_000)


def test_training_begins_at_train_from_and_earlier_requests_stay_history():
    config = RequestConfig(
        split="temporal", train_from=2 * SECOND, valid_from=4 * SECOND, test_from=5 * SECOND, num_negatives=0
    )
    events = events_of([(5, 1), (6, 2), (7, 3), (8, 4), (9, 5)])
    every = list_requests(events, config)
    assert every.part.tolist() == [-1, 0, 0, 1, 2]
    train = of_part(every, "train", config)
    assert train.position.tolist() == [1, 2]
    first, last = carried(train, num_users=1, part="train", config=config)
    assert (first.tolist(), last.tolist()) == ([0], [2])


def test_replayed_share_of_earlier_requests_is_drawn_by_request_and_anew_for_each_bound():
    users = [[(int(item), 1 + place) for place, item in enumerate(row)] for row in np.arange(4000).reshape(40, 100)]

    def replayed(valid_from, share, events):
        config = RequestConfig(
            split="temporal", train_from=60 * SECOND, valid_from=valid_from * SECOND, test_from=100 * SECOND,
            replay_share=share,
        )  # fmt: skip
        every = list_requests(events, config)
        early = every.time < 60 * SECOND
        assert (every.part[~early] >= 0).all()
        return set(every.candidate[early & (every.part == 0)].tolist()), int(early.sum())

    events = events_of(*users)
    drawn, early = replayed(80, 0.25, events)
    # Binomial of 2,360: a standard deviation is 21.
    assert abs(len(drawn) - 0.25 * early) < 100
    assert replayed(80, 0.25, events_of(*users[::-1]))[0] == drawn
    assert drawn < replayed(80, 0.5, events)[0]
    other = replayed(81, 0.25, events)[0]
    assert len(other & drawn) < 0.5 * len(drawn)
    assert replayed(80, 0.0, events)[0] == set()
    assert len(replayed(80, 1.0, events)[0]) == early


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"train_from": 1}, "train_from belongs to split temporal"),
        ({"split": "temporal", "valid_from": 5, "test_from": 6, "train_from": 7}, "train_from 7 is after valid_from 5"),
        ({"split": "temporal", "valid_from": 5, "test_from": 6, "replay_share": 0.1}, "without train_from"),
        ({"split": "temporal", "valid_from": 5, "test_from": 6, "train_from": 1, "replay_share": 2}, "from 0 to 1"),
    ],
)
def test_windows_that_make_no_sense_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        RequestConfig(**fields)
