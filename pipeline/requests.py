"""Users' sequences -> requests: which history asks for which candidates, in which part of the split. Pure numpy.

Task `next_item`, split `leave_one_out`, one user with events a b c d:

    request     history    positive    part
    0           -          a           train
    1           a          b           train
    2           a b        c           valid
    3           a b c      d           test

Task `impressions`: the events of one request_id (else of one session) are the candidates, with their labels; the
history is every event strictly before the first of them. Split `temporal`: the part follows from the request's time.
All draws come from a counter-based generator keyed by (seed, epoch, user, request), so they are the same however the
work is dealt.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from typing import Literal

import numpy as np

from pipeline.events import DataError
from pipeline.sequences import UserEvents, offsets_of, ranges
from pipeline.vocabulary import NUM_RESERVED

PARTS = ("train", "valid", "test")
_MIN_REQUESTS_TO_SPLIT = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestConfig:
    """What is asked, and which of it trains."""

    task: Literal["next_item", "impressions"] = "next_item"
    """next_item: each event is the positive; impressions: the events shown together are the candidates."""
    split: Literal["leave_one_out", "temporal"] = "leave_one_out"
    """leave_one_out: a user's last request tests, the last but one validates; temporal: by the request's time."""
    valid_from: str | int | None = None
    """temporal: first time of validation, ISO 8601 (UTC unless it has a zone) or milliseconds since 1970."""
    test_from: str | int | None = None
    """temporal: first time of the test."""
    max_history: int = 1024
    """Latest events of a user that training carries."""
    max_requests: int = 64
    """Training requests a user and epoch, a fresh sample each epoch."""
    num_negatives: int = 64
    """next_item: negatives drawn for each training request."""
    session_gap_seconds: int = 1800
    """impressions without request_id: a longer pause starts the next session."""
    min_history: int = 5
    """impressions: evaluation requests with a shorter history are skipped and counted."""

    def __post_init__(self) -> None:
        if self.task not in ("next_item", "impressions"):
            raise ValueError(f"requests.task is {self.task!r}: it must be next_item or impressions")
        if self.split not in ("leave_one_out", "temporal"):
            raise ValueError(f"requests.split is {self.split!r}: it must be leave_one_out or temporal")
        for name, least in (("max_history", 1), ("max_requests", 1), ("num_negatives", 0), ("min_history", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"requests.{name} is {getattr(self, name)}: it must be at least {least}")
        if self.session_gap_seconds <= 0:
            raise ValueError(f"requests.session_gap_seconds is {self.session_gap_seconds}: it must be positive")
        bounds = (self.valid_from, self.test_from)
        if self.split == "leave_one_out" and bounds != (None, None):
            raise ValueError("requests.valid_from and test_from belong to split temporal: set split or remove them")
        if self.split == "temporal":
            if None in bounds:
                raise ValueError("requests.split is temporal: set requests.valid_from and requests.test_from")
            if self.bounds[0] > self.bounds[1]:
                raise ValueError(f"requests.valid_from {self.valid_from} is after test_from {self.test_from}: swap")

    @property
    def bounds(self) -> tuple[int, int]:
        """temporal: (valid_from, test_from) in milliseconds since 1970 UTC."""
        return _milliseconds("valid_from", self.valid_from), _milliseconds("test_from", self.test_from)

    @property
    def counting_fingerprint(self) -> str:
        """Hash of the fields that decide how many requests there are."""
        fields = {"task": self.task, "split": self.split, "max_history": self.max_history}
        if self.split == "temporal":
            fields |= {"bounds": self.bounds}
        if self.task == "impressions":
            fields |= {"session_gap_seconds": self.session_gap_seconds, "min_history": self.min_history}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Requests:
    """Requests of some users, flat, by user and then by position: B requests, M candidates of all of them."""

    user: np.ndarray
    """[B] int64: place of the user in the UserEvents."""
    position: np.ndarray
    """[B] int64: how many of the user's events, from its first, are the history."""
    time: np.ndarray
    """[B] int64 milliseconds since 1970 UTC, zero where the log has an order only."""
    key: np.ndarray
    """[B] int64: tells a user's requests apart; the place of the request's first event in the user's sequence."""
    part: np.ndarray
    """[B] int8: place in PARTS."""
    offsets: np.ndarray
    """[B + 1] int64: request b has candidates offsets[b] : offsets[b + 1]."""
    candidate: np.ndarray
    """[M] int64 vocabulary rows."""
    label: np.ndarray
    """[M] float32."""

    def __len__(self) -> int:
        return len(self.user)

    def take(self, places: np.ndarray) -> Requests:
        """The requests at these places, in this order (a mask works too)."""
        places = np.flatnonzero(places) if places.dtype == bool else places
        lengths = np.diff(self.offsets)[places]
        candidates = ranges(self.offsets[places], lengths)
        return Requests(
            user=self.user[places],
            position=self.position[places],
            time=self.time[places],
            key=self.key[places],
            part=self.part[places],
            offsets=offsets_of(lengths),
            candidate=self.candidate[candidates],
            label=self.label[candidates],
        )


def list_requests(events: UserEvents, config: RequestConfig) -> Requests:
    """Every request of every part; no cap is applied."""
    lengths = np.diff(events.offsets)
    user = np.repeat(np.arange(events.num_users), lengths)
    place = np.arange(len(user)) - events.offsets[:-1][user]
    first = _first_of_equal(events, user)
    if config.task == "next_item":
        request = np.arange(len(user))
        member, offsets = request, np.arange(len(user) + 1)
        label = np.ones(len(user), np.float32)
    else:
        request, member, offsets, label = _impressions(events, user, config)
    asks_at_event = config.task == "next_item" and config.split == "leave_one_out"
    position = place[request] if asks_at_event else place[first[request]]
    part = _split(user[request], events.time[request], config)
    return Requests(
        user=user[request],
        position=position,
        time=events.time[request],
        key=place[request],
        part=part,
        offsets=offsets,
        candidate=events.item[member],
        label=label,
    )


def of_part(requests: Requests, part: str, config: RequestConfig) -> tuple[Requests, int]:
    """The requests of a part under the caps that do not depend on the epoch, and how many evaluation requests were
    skipped for a history below min_history.

    Training keeps requests within the user's latest `max_history` events (see `carried`).
    """
    chosen = requests.take(requests.part == PARTS.index(part))
    if part != "train":
        if config.task != "impressions":
            return chosen, 0
        long_enough = chosen.position >= config.min_history
        return chosen.take(long_enough), int((~long_enough).sum())
    starts, _ = carried(chosen, num_users=int(requests.user.max(initial=-1)) + 1, part=part, config=config)
    return chosen.take(chosen.position >= starts[chosen.user]), 0


def carried(requests: Requests, *, num_users: int, part: str, config: RequestConfig) -> tuple[np.ndarray, np.ndarray]:
    """[num_users] first and last (exclusive) event that each user carries for these requests of one part.

    Training: the latest max_history events before the last request. Evaluation: from max_history events before the
    first request on, so that no history is shorter than it may be. A user without requests carries nothing.
    """
    last = np.zeros(num_users, np.int64)
    np.maximum.at(last, requests.user, requests.position)
    earliest = last.copy()
    if part != "train":
        np.minimum.at(earliest, requests.user, requests.position)
    return np.maximum(earliest - config.max_history, 0), last


def sample(requests: Requests, *, user_rows: np.ndarray, seed: int, epoch: int, config: RequestConfig) -> Requests:
    """At most max_requests training requests a user, drawn by (seed, epoch, user); their order is kept.

    user_rows: [U] int64, the index row of each user.
    """
    draw = hash64(seed, epoch, user_rows[requests.user], requests.key, np.uint64(1))
    order = np.lexsort((draw, requests.user))
    counts = np.bincount(requests.user, minlength=len(user_rows))
    rank = np.empty(len(requests), np.int64)
    rank[order] = np.arange(len(requests)) - np.repeat(offsets_of(counts)[:-1], counts)
    return requests.take(rank < config.max_requests)


def with_negatives(
    requests: Requests, *, user_rows: np.ndarray, seed: int, epoch: int, num_negatives: int, vocabulary_size: int
) -> Requests:
    """next_item: after each positive, negatives drawn uniformly from the real items except the positive itself."""
    num_items = vocabulary_size - NUM_RESERVED
    if num_negatives == 0:
        return requests
    if num_items < 2:
        raise DataError(f"the data set has {num_items} item: negatives need two; set requests.num_negatives to 0")
    draw = hash64(seed, epoch, user_rows[requests.user], requests.key, np.uint64(2))
    counter = np.arange(1, num_negatives + 1, dtype=np.uint64) * _GOLDEN
    # The high 32 bits times the range, shifted back, is a number below the range: no slow modulo, bias below 2^-32 n.
    bits = _mix(draw[:, None] + counter[None, :]) >> np.uint64(32)
    negative = ((bits * np.uint64(num_items - 1)) >> np.uint64(32)).astype(np.int64) + NUM_RESERVED
    positive = requests.candidate[:, None]
    negative += negative >= positive
    label = np.zeros((len(requests), num_negatives + 1), np.float32)
    label[:, 0] = 1
    return dataclasses.replace(
        requests,
        candidate=np.concatenate([positive, negative], axis=1).reshape(-1),
        label=label.reshape(-1),
        offsets=np.arange(len(requests) + 1, dtype=np.int64) * (num_negatives + 1),
    )


def hash64(*keys: int | np.ndarray | np.uint64) -> np.ndarray:
    """uint64 hash of the keys, element by element: splitmix64 (Steele et al., 2014) chained over them."""
    state = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            state = _mix(state + np.asarray(key).astype(np.uint64) * _GOLDEN + _GOLDEN)
    return state


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _first_of_equal(events: UserEvents, user: np.ndarray) -> np.ndarray:
    """[N]: the first event of the same user at the same time; what stands before it is strictly earlier."""
    starts = np.ones(len(user), bool)
    starts[1:] = (user[1:] != user[:-1]) | (events.before[1:] != events.before[:-1])
    return np.maximum.accumulate(np.where(starts, np.arange(len(user)), 0))


def _impressions(events: UserEvents, user: np.ndarray, config: RequestConfig) -> tuple[np.ndarray, ...]:
    """First event of each request, and its candidates: event, offsets, label. An item stands once in a request, as a
    positive when any of its events is one."""
    assert events.label is not None, "request_index.check_log refuses such a log"
    number = np.arange(len(user))
    if events.request is None:
        starts = np.ones(len(user), bool)
        starts[1:] = (user[1:] != user[:-1]) | (np.diff(events.time) > 1000 * config.session_gap_seconds)
        session, shown = np.cumsum(starts), number
    else:
        session, shown = events.request, number[events.request >= 0]
    # Sorting is stable: within (user, request) events stay in total order, and the first is the earliest.
    grouped = shown[np.lexsort((session[shown], user[shown]))]
    new = np.ones(len(grouped), bool)
    new[1:] = (user[grouped][1:] != user[grouped][:-1]) | (session[grouped][1:] != session[grouped][:-1])
    # Requests by the place of their first event, not by the arbitrary code of their id.
    first = grouped[new][np.cumsum(new) - 1]
    by_item = np.lexsort((grouped, events.item[grouped], first))
    item, start = events.item[grouped][by_item], first[by_item]
    distinct = np.ones(len(item), bool)
    distinct[1:] = (item[1:] != item[:-1]) | (start[1:] != start[:-1])
    edges = np.flatnonzero(distinct)
    label = np.maximum.reduceat(events.label[grouped][by_item], edges) if len(edges) else np.zeros(0, np.float32)
    member, start = grouped[by_item][edges], start[edges]
    order = np.lexsort((member, start))
    request, counts = np.unique(start, return_counts=True)
    return request, member[order], offsets_of(counts), label[order].astype(np.float32)


def _split(user: np.ndarray, time: np.ndarray, config: RequestConfig) -> np.ndarray:
    """[B] int8 place in PARTS; requests are sorted by user and, within a user, by time."""
    if config.split == "temporal":
        return np.searchsorted(np.array(config.bounds), time, side="right").astype(np.int8)
    counts = np.bincount(user)[user] if len(user) else user
    from_end = offsets_of(np.bincount(user))[1:][user] - 1 - np.arange(len(user)) if len(user) else user
    part = np.where(from_end == 0, 2, np.where(from_end == 1, 1, 0))
    return np.where(counts >= _MIN_REQUESTS_TO_SPLIT, part, 0).astype(np.int8)


def _milliseconds(name: str, value: str | int | None) -> int:
    if isinstance(value, int):
        return value
    try:
        moment = datetime.datetime.fromisoformat(str(value))
    except ValueError:
        raise ValueError(f"requests.{name} is {value!r}: write it as 2024-01-31 or 2024-01-31T12:00:00") from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
    return int(moment.timestamp() * 1000)
