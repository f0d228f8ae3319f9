"""Users' sequences -> requests: a history, its candidates, and the part of the split. Pure numpy.

Task `next_item`, split `leave_one_out`, one user with events a b c d:

    request     history    positive    part
    0           -          a           train
    1           a          b           train
    2           a b        c           valid
    3           a b c      d           test

Task `impressions`: the events of one request_id (in a log without request ids: of one session) are the candidates, with
their labels; the history is every event strictly before the first of them. Split `temporal`: the part follows from the
request's time. sampling.py samples requests, negatives.py draws negatives.

In a log with labels `next_item` reads positives alone: shards are read with `least_label`, so that what was only shown
is an event of no sequence.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from typing import Any, Literal

import numpy as np

from pipeline.hashing import hash64
from pipeline.shards.sequences import UserEvents, offsets_of, ranges

PARTS = ("train", "valid", "test")
_MIN_REQUESTS_TO_SPLIT = 3
_DIGITS_OF_A_DATE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestConfig:
    """How requests are made from events, split into parts and sampled."""

    task: Literal["next_item", "impressions"] = "next_item"
    """next_item: each event is a positive; impressions: the events shown together are the candidates."""
    # Documents omit it where it is unset, as those that were stored before it existed.
    min_label: int | None = dataclasses.field(default=None, metadata={"stored_with": "min_label"})
    """next_item on a log with labels: the least label of the events that are read. 1 (also if unset): positives alone;
    what was only shown is no target and is in no history, count or popularity. 0: all events, for logs in which every
    event was the user's choice, such as ratings."""
    split: Literal["leave_one_out", "temporal"] = "leave_one_out"
    """leave_one_out: a user's last request is for the test, the last but one for validation; temporal: by the request's
    time."""
    valid_from: str | int | None = None
    """temporal: first time of validation, ISO 8601 (UTC unless it has a zone) or milliseconds since 1970."""
    test_from: str | int | None = None
    """temporal: first time of the test."""
    train_from: str | int | None = None
    """temporal: first time of training; events before it serve only as history, except in replayed requests. None = all
    requests before valid_from train."""
    replay_share: float = 0.0
    """temporal: share of the requests before train_from that train too; each valid_from draws other ones."""
    max_history: int = 1024
    """Most events of a user in a training batch: the latest ones."""
    max_requests: int = 64
    """Most training requests per user and epoch; each epoch draws a new sample."""
    num_negatives: int = 64
    """next_item: negatives drawn for each training request."""
    negatives: Literal["uniform", "popularity", "in_batch"] = "uniform"
    """next_item, the source of negatives. uniform: all items with equal probability; popularity: items by their number
    of training events; in_batch: the positives of the global batch, which are looked up anyway (for batches of many
    users). `training.log_q` corrects the loss for the choice."""
    popularity_power: float = 0.75
    """negatives=popularity: q ~ training events ** power, so an item without training events is never drawn. 0.75 as in
    word2vec (Mikolov et al., 2013): rare items still serve as negatives; 1 is the distribution of in_batch."""
    history_negatives: int = 0
    """next_item: number of additional negatives drawn from the request's own history; an item that is a candidate
    already is not added again. Where people come back to items, these are the items that a positive must beat. Needs
    `training.log_q`."""
    group: Literal["event", "request"] = "event"
    """next_item: event = each event is a request; request = all events of one request_id are one request (in a log
    without request ids: all events of one time)."""
    seen_items: Literal["removed", "kept"] = "removed"
    """next_item: whether items of the history compete in evaluation. removed also skips requests whose target is in the
    history."""
    max_eval_requests: int = 0
    """Most evaluation requests per user and part, always the same ones; 0 = all."""
    session_gap_seconds: int = 1800
    """impressions without request_id: a longer pause starts the next session."""
    min_history: int = 5
    """impressions: evaluation requests with a shorter history are skipped and counted."""

    def __post_init__(self) -> None:
        if self.task not in ("next_item", "impressions"):
            raise ValueError(f"requests.task is {self.task!r}: it must be next_item or impressions")
        self._check_negatives()
        self._check_min_label()
        if self.group not in ("event", "request"):
            raise ValueError(f"requests.group is {self.group!r}: it must be event or request")
        if self.seen_items not in ("removed", "kept"):
            raise ValueError(f"requests.seen_items is {self.seen_items!r}: it must be removed or kept")
        if self.split not in ("leave_one_out", "temporal"):
            raise ValueError(f"requests.split is {self.split!r}: it must be leave_one_out or temporal")
        for name, least in (
            ("max_history", 1),
            ("max_requests", 1),
            ("num_negatives", 0),
            ("history_negatives", 0),
            ("min_history", 0),
            ("max_eval_requests", 0),
        ):
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
        self._check_window()

    def _check_window(self) -> None:
        if not 0 <= self.replay_share <= 1:
            raise ValueError(f"requests.replay_share is {self.replay_share}: it must be from 0 to 1")
        if self.train_from is None:
            if self.replay_share:
                raise ValueError(
                    f"requests.replay_share is {self.replay_share}: without train_from all requests train; remove it"
                )
            return
        if self.split != "temporal":
            raise ValueError("requests.train_from belongs to split temporal: set split or remove it")
        if _milliseconds("train_from", self.train_from) > self.bounds[0]:
            raise ValueError(f"requests.train_from {self.train_from} is after valid_from {self.valid_from}: swap")

    def _check_negatives(self) -> None:
        if self.negatives not in ("uniform", "popularity", "in_batch"):
            raise ValueError(f"requests.negatives is {self.negatives!r}: it must be uniform, popularity or in_batch")
        if self.negatives != "uniform" and self.task == "impressions":
            raise ValueError(f"requests.negatives is {self.negatives}: task impressions draws none, remove it")
        if self.history_negatives and (self.task == "impressions" or self.negatives == "in_batch"):
            reason = "task impressions draws none" if self.task == "impressions" else "negatives in_batch allows none"
            raise ValueError(f"requests.history_negatives is {self.history_negatives}: {reason}, remove it")
        if not 0 <= self.popularity_power <= 1:
            raise ValueError(f"requests.popularity_power is {self.popularity_power}: it must be from 0 to 1")
        if self.popularity_power != RequestConfig.popularity_power and self.negatives != "popularity":
            raise ValueError(
                f"requests.popularity_power is {self.popularity_power}: it belongs to negatives popularity, not "
                f"{self.negatives}: set requests.negatives or remove it"
            )

    def _check_min_label(self) -> None:
        if self.min_label not in (None, 0, 1):
            raise ValueError(
                f"requests.min_label is {self.min_label}: it must be 1 or 0, the labels of event logs; numbers such as "
                "ratings become labels in the import (source.files.min_label)"
            )
        if self.min_label and self.task == "impressions":
            raise ValueError(f"requests.min_label is {self.min_label}: task impressions reads all events, remove it")

    @property
    def least_label(self) -> int:
        """The least label of the events that the task reads in a log with labels; 0 = it reads all events."""
        if self.task == "impressions":
            return 0
        return 1 if self.min_label is None else self.min_label

    @property
    def of_all_times(self) -> RequestConfig:
        """The same without `train_from`: all requests before `valid_from` train."""
        return dataclasses.replace(self, train_from=None, replay_share=0.0)

    @property
    def bounds(self) -> tuple[int, int]:
        """temporal: (valid_from, test_from) in milliseconds since 1970 UTC."""
        return _milliseconds("valid_from", self.valid_from), _milliseconds("test_from", self.test_from)

    @property
    def counting_fingerprint(self) -> str:
        """Hash of the fields that determine the number of requests."""
        fields: dict[str, Any] = {"task": self.task, "split": self.split, "max_history": self.max_history}
        fields |= {"max_eval_requests": self.max_eval_requests}
        if self.split == "temporal":
            fields |= {"bounds": self.bounds}
        if self.train_from is not None:
            fields |= {"train_from": _milliseconds("train_from", self.train_from), "replay_share": self.replay_share}
        if self.task == "impressions":
            fields |= {"session_gap_seconds": self.session_gap_seconds, "min_history": self.min_history}
        else:
            fields |= {"group": self.group}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Requests:
    """Requests of some users, flat, by user and then by position: B requests with M candidates in all."""

    user: np.ndarray
    """[B] int64: position of the user in the UserEvents."""
    position: np.ndarray
    """[B] int64: length of the history, which is the user's first events."""
    time: np.ndarray
    """[B] int64 milliseconds since 1970 UTC, zero where the log has no times."""
    key: np.ndarray
    """[B] int64: unique among a user's requests: the position of the request's first event in the user's sequence."""
    part: np.ndarray
    """[B] int8: index in PARTS; -1 = in no part."""
    offsets: np.ndarray
    """[B + 1] int64: request b has candidates offsets[b] : offsets[b + 1]."""
    candidate: np.ndarray
    """[M] int64 vocabulary rows."""
    label: np.ndarray
    """[M] float32."""

    def __len__(self) -> int:
        return len(self.user)

    def take(self, places: np.ndarray) -> Requests:
        """The requests at these places, in this order; `places` may also be a mask."""
        if places.dtype == bool:
            if places.all():
                return self
            places = np.flatnonzero(places)
        sizes = np.diff(self.offsets)
        lengths = sizes[places]
        candidates = places if (sizes == 1).all() else ranges(self.offsets[places], lengths)
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
    # Group events into requests, with the candidates of each.
    lengths = np.diff(events.offsets)
    user = np.repeat(np.arange(events.num_users), lengths)
    place = np.arange(len(user)) - events.offsets[:-1][user]
    request: Any
    member: Any
    if config.task == "impressions":
        request, member, offsets, label = _grouped(events, user, *_shown_together(events, user, config))
    elif config.group == "request":
        request, member, offsets, label = _grouped(events, user, *_positives_together(events, user))
    else:
        request = member = slice(None)
        offsets, label = np.arange(len(user) + 1), np.ones(len(user), np.float32)
    # End each history before the request's event, or, for groups and temporal splits, strictly before its time.
    is_before_event = config.task == "next_item" and config.group == "event" and config.split == "leave_one_out"
    position = place[request] if is_before_event else place[_first_of_equal(events, user)[request]]
    part = _split(user[request], events.time[request], config)
    if config.train_from is not None:
        first_candidate = events.item[member][offsets[:-1]]
        part = _windowed(part, events.time[request], place[request], first_candidate, config)
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


def of_part(requests: Requests, part: str, config: RequestConfig) -> Requests:
    """The requests of a part after the caps that do not depend on the epoch.

    Training keeps the requests within the user's latest `max_history` events (see `carried`), evaluation the requests
    that are not `too_short`.
    """
    wanted = requests.part == PARTS.index(part)
    if part != "train":
        return requests.take(wanted & ~too_short(requests, config))
    num_users = int(requests.user.max(initial=-1)) + 1
    starts = np.maximum(
        _last_position(requests.user[wanted], requests.position[wanted], num_users) - config.max_history, 0
    )
    return requests.take(wanted & (requests.position >= starts[requests.user]) if starts.any() else wanted)


def too_short(requests: Requests, config: RequestConfig) -> np.ndarray:
    """[B] evaluation requests left out because their history is shorter than min_history."""
    if config.task != "impressions":
        return np.zeros(len(requests), bool)
    return (requests.part != PARTS.index("train")) & (requests.position < config.min_history)


def carried(requests: Requests, *, num_users: int, part: str, config: RequestConfig) -> tuple[np.ndarray, np.ndarray]:
    """[num_users] first and last (exclusive) event that a batch holds of each user for these requests of one part.

    Training: the latest max_history events before the last request. Evaluation: from max_history events before the
    first request on, so that every request has its full history. For a user without requests: no events.
    """
    last = _last_position(requests.user, requests.position, num_users)
    earliest = last
    if part != "train":
        earliest = _last_position(requests.user[::-1], requests.position[::-1], num_users)
    return np.maximum(earliest - config.max_history, 0), last


def _last_position(user: np.ndarray, position: np.ndarray, num_users: int) -> np.ndarray:
    """[num_users] position of each user's last request in the given order; 0 for a user without requests."""
    last = np.zeros(num_users, np.int64)
    # For a repeated index numpy keeps the last value.
    last[user] = position
    return last


def _first_of_equal(events: UserEvents, user: np.ndarray) -> np.ndarray:
    """[N]: for each event the user's first event at the same time; events before that one are strictly earlier."""
    starts = np.ones(len(user), bool)
    starts[1:] = (user[1:] != user[:-1]) | (events.before[1:] != events.before[:-1])
    return np.maximum.accumulate(np.where(starts, np.arange(len(user)), 0))


def _shown_together(
    events: UserEvents, user: np.ndarray, config: RequestConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """impressions: (group of each event, the events that belong to a group, label of each event)."""
    assert events.label is not None, "request_index.check_log refuses such a log"
    number = np.arange(len(user))
    if events.request is not None:
        return events.request, number[events.request >= 0], events.label
    starts = np.ones(len(user), bool)
    starts[1:] = (user[1:] != user[:-1]) | (np.diff(events.time) > 1000 * config.session_gap_seconds)
    return np.cumsum(starts), number, events.label


def _positives_together(events: UserEvents, user: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """next_item: the same for requests with several positives; an event without request id is a group of its own."""
    number = np.arange(len(user))
    if events.request is None:
        group = _first_of_equal(events, user)
    else:
        group = np.where(events.request >= 0, events.request, number + events.request.max(initial=0) + 1)
    return group, number, np.ones(len(number), np.float32)


def _grouped(
    events: UserEvents, user: np.ndarray, group: np.ndarray, shown: np.ndarray, label: np.ndarray
) -> tuple[np.ndarray, ...]:
    """(first event of each request, then for the candidates: event, offsets, label). An item occurs once in a request,
    and is a positive if any of its events is one."""
    # The sort is stable: within (user, group) events stay in total order, and the first is the earliest.
    grouped = shown[np.lexsort((group[shown], user[shown]))]
    new = np.ones(len(grouped), bool)
    new[1:] = (user[grouped][1:] != user[grouped][:-1]) | (group[grouped][1:] != group[grouped][:-1])
    # Identify a request by its first event, not by the arbitrary code of its id.
    first = grouped[new][np.cumsum(new) - 1]
    by_item = np.lexsort((grouped, events.item[grouped], first))
    item, start = events.item[grouped][by_item], first[by_item]
    distinct = np.ones(len(item), bool)
    distinct[1:] = (item[1:] != item[:-1]) | (start[1:] != start[:-1])
    edges = np.flatnonzero(distinct)
    chosen = np.maximum.reduceat(label[grouped][by_item], edges) if len(edges) else np.zeros(0, np.float32)
    member, start = grouped[by_item][edges], start[edges]
    order = np.lexsort((member, start))
    request, counts = np.unique(start, return_counts=True)
    return request, member[order], offsets_of(counts), chosen[order].astype(np.float32)


def _split(user: np.ndarray, time: np.ndarray, config: RequestConfig) -> np.ndarray:
    """[B] int8 index in PARTS; requests are sorted by user and, within a user, by time."""
    if config.split == "temporal":
        return np.searchsorted(np.array(config.bounds), time, side="right").astype(np.int8)
    part, counts = np.zeros(len(user), np.int8), np.bincount(user)
    ends = np.cumsum(counts)[counts >= _MIN_REQUESTS_TO_SPLIT]
    part[ends - 1], part[ends - 2] = PARTS.index("test"), PARTS.index("valid")
    return part


def _windowed(
    part: np.ndarray, time: np.ndarray, key: np.ndarray, candidate: np.ndarray, config: RequestConfig
) -> np.ndarray:
    """[B] `part`, with -1 for training requests before train_from that are not replayed."""
    early = (part == PARTS.index("train")) & (time < _milliseconds("train_from", config.train_from))
    # Keyed by the request's content, so that the draw does not depend on the order in which users are read.
    draw = hash64(config.bounds[0], time, key, candidate, np.uint64(4)) >> np.uint64(11)
    replayed = draw < np.uint64(config.replay_share * 2**53)
    return np.where(early & ~replayed, np.int8(-1), part)


def _milliseconds(name: str, value: str | int | None) -> int:
    # 20240131 is a date, also without quotes in YAML; other numbers are milliseconds, from a command line as text.
    digits = len(str(value))
    if (isinstance(value, int) and digits != _DIGITS_OF_A_DATE) or (
        str(value).isdigit() and digits > _DIGITS_OF_A_DATE
    ):
        return int(value)  # type: ignore[arg-type]
    try:
        moment = datetime.datetime.fromisoformat(str(value))
    except ValueError:
        raise ValueError(f"requests.{name} is {value!r}: write it as 2024-01-31 or 2024-01-31T12:00:00") from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
    return int(moment.timestamp() * 1000)
