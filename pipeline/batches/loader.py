"""Streams batches from sequence shards: reproducible, resumable at any batch, on any number of ranks.

A TrainLoader's state is two counters and fingerprints of the data and configuration; batch k of epoch e has the same
users, requests, negatives and order at every world size. Reads shards (shards/dataset.py) in the order of order.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch

from pipeline.batches import order
from pipeline.batches.batch import Batch
from pipeline.batches.history_negatives import expected_history_draws, with_history_negatives
from pipeline.batches.loader_config import LoaderConfig
from pipeline.batches.negatives import (
    Proposal,
    Uniform,
    Weighted,
    draw_keys,
    expected_draws,
    log_of_draws,
    with_negatives,
)
from pipeline.batches.request_index import PartCounts, check_log, part_counts, settings_on
from pipeline.batches.requests import RequestConfig, Requests, carried, list_requests, of_part
from pipeline.batches.sampling import evaluated, sample
from pipeline.events import DataError
from pipeline.hashing import hash64
from pipeline.shards.dataset import Shards
from pipeline.shards.sequences import UserCodes, UserEvents, offsets_of, ranges
from pipeline.shards.user_reader import UserReader

_T = TypeVar("_T")


class TrainLoader:
    """An endless stream of batches of training requests, epoch after epoch."""

    def __init__(
        self, data: Shards, *, requests: RequestConfig, loader: LoaderConfig, seed: int, rank: int = 0,
        world_size: int = 1, item_counts: np.ndarray | None = None, pin: bool = False,
    ) -> None:  # fmt: skip
        """`item_counts`: the result of `training_item_counts`, for negatives by popularity; None = counted here.
        `pin`: put batches into page-locked memory, for a GPU."""
        self._data, self._requests, self._loader, self._pin = data, requests, loader, pin
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._counts = part_counts(data, requests, "train")
        self._cost = _training_cost(self._counts, requests)
        self._epoch, self._batch = 0, 0
        self._plans: dict[int, _EpochPlan] = {}
        self._planning = threading.Lock()
        if not self._counts.requests.any():
            raise DataError(f"{data.path}: no training requests under this split; move requests.valid_from")
        self._proposal: Proposal = Uniform(data.vocabulary.size)
        if requests.negatives == "popularity":
            counts = training_item_counts(data, requests=requests) if item_counts is None else item_counts
            self._proposal = Weighted.popularity(counts, power=requests.popularity_power)

    def num_batches(self, epoch: int) -> int:
        return self._plan(epoch).num_batches

    def num_requests(self, epoch: int) -> int:
        """Requests of the epoch, over all ranks."""
        return int(np.minimum(self._counts.requests, self._requests.max_requests).sum())

    def __iter__(self) -> Generator[Batch, None, None]:
        """Batches from the cursor on, without end. A batch counts in the state as soon as it is yielded."""

        def batches() -> Iterator[tuple[int, int, Batch]]:
            epoch, start = self._epoch, self._batch
            while True:
                for number, batch in enumerate(self._build(epoch, start), start):
                    yield epoch, number, batch
                epoch, start = epoch + 1, 0

        with contextlib.closing(_prefetched(batches, self._loader.prefetch)) as built:
            for epoch, number, batch in built:
                last = number + 1 == self.num_batches(epoch)
                self._epoch, self._batch = (epoch + 1, 0) if last else (epoch, number + 1)
                yield batch

    def epoch(self, number: int, *, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from `start` on; does not move the cursor."""
        return _prefetched(lambda: self._build(number, start), self._loader.prefetch)

    def state_dict(self) -> dict[str, Any]:
        """Number of the next batch, and the fingerprint of the stream; can be stored as JSON."""
        return {"epoch": self._epoch, "batch": self._batch, "fingerprint": self._fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where another loader stopped, at any world size. DataError names what differs."""
        ours, theirs = self._fingerprint(), state["fingerprint"]
        if changed := [name for name in ours if ours[name] != theirs.get(name)]:
            raise DataError(
                f"{self._data.path}: cannot resume, {' and '.join(changed)} changed since the state was saved; "
                "undo the change or start a new run"
            )
        self._epoch, self._batch = int(state["epoch"]), int(state["batch"])

    def _fingerprint(self) -> dict[str, str]:
        """Fingerprints of everything that determines the batches; world size and prefetch do not."""
        loader = {"batch_events": self._loader.batch_events, "window_row_groups": self._loader.window_row_groups}
        return {
            "manifest": self._data.manifest.fingerprint,
            "requests config": _fingerprint(settings_on(self._data, self._requests)),
            "loader config": _fingerprint(loader),
            "seed": str(self._seed),
        }

    def _plan(self, epoch: int) -> _EpochPlan:
        with self._planning:
            if (plan := self._plans.get(epoch)) is None:
                users = order.epoch_order(
                    self._data.index.group, wanted=self._counts.requests > 0, seed=self._seed, epoch=epoch,
                    window_row_groups=self._loader.window_row_groups,
                )  # fmt: skip
                num_requests = np.minimum(self._counts.requests, self._requests.max_requests)
                plan = _EpochPlan(users, self._cost, num_requests, self._loader.batch_events)
                # Keep two plans: the consumer may still be in the epoch that the prefetching thread has left.
                self._plans = dict([*self._plans.items(), (epoch, plan)][-2:])
            return plan

    def _build(self, epoch: int, start: int) -> Iterator[Batch]:
        plan, keep = self._plan(epoch), 2 * self._loader.window_row_groups
        reader = UserReader(self._data, keep=keep, min_label=self._requests.least_label)
        for number in range(start, plan.num_batches):
            users = plan.users_of(number, rank=self._rank, world_size=self._world_size)
            events = reader.read(users)
            eligible = of_part(list_requests(events, self._requests), "train", self._requests)
            # Take the events of all eligible requests, not only of the sample: the plan's costs count all of them.
            window = carried(eligible, num_users=len(users), part="train", config=self._requests)
            chosen = sample(eligible, user_rows=users, seed=self._seed, epoch=epoch, config=self._requests)
            log_q = None
            if self._draws_negatives:
                chosen, log_q = self._with_negatives(chosen, events, users, epoch)
            batch = _batch(users, events, chosen, *window, num_global_requests=int(plan.num_requests[number]))
            batch = dataclasses.replace(batch, epoch=epoch, candidate_log_q=log_q)
            yield batch.pinned() if self._pin else batch

    @property
    def _draws_negatives(self) -> bool:
        config = self._requests
        drawn_here = config.task == "next_item" and config.negatives != "in_batch"
        return drawn_here and config.num_negatives + config.history_negatives > 0

    def _with_negatives(
        self, chosen: Requests, events: UserEvents, users: np.ndarray, epoch: int
    ) -> tuple[Requests, torch.Tensor]:
        """The requests with negatives after their positives, and the candidates' log_q."""
        # Draw negatives from the proposal.
        number = self._requests.num_negatives
        keys = draw_keys(seed=self._seed, epoch=epoch, user=users[chosen.user], request=chosen.key)
        drawn = with_negatives(
            chosen.candidate, chosen.offsets, keys=keys, proposal=self._proposal, num_negatives=number
        )
        if len(drawn.item) < len(chosen.candidate) + number * len(chosen):
            raise DataError(
                f"{self._data.path}: the positives of a training request are all {np.diff(chosen.offsets).max()} items "
                "from which its negatives could be drawn; set requests.num_negatives to 0"
            )
        # Add negatives from the history.
        from_history = self._requests.history_negatives
        if from_history:
            drawn = with_history_negatives(
                drawn, requests=chosen, events=events, keys=hash64(keys, np.uint64(4)), num_negatives=from_history
            )
        expected = expected_draws(drawn, proposal=self._proposal, num_negatives=number)
        if from_history:
            expected += expected_history_draws(drawn, requests=chosen, events=events, num_negatives=from_history)
        log_q = log_of_draws(expected)
        return dataclasses.replace(
            chosen, candidate=drawn.item, label=drawn.label, offsets=drawn.offsets
        ), torch.from_numpy(log_q)


class EvaluationLoader:
    """Passes over the requests of a part, in user order; every rank gets the same number of batches."""

    def __init__(
        self, data: Shards, *, requests: RequestConfig, part: str, batch_events: int, rank: int = 0,
        world_size: int = 1, limit: int | None = None,
    ) -> None:  # fmt: skip
        """`limit`: take users, always the same ones, spread over the data set, until they have this many requests."""
        if part not in ("valid", "test"):
            raise ValueError(f"part is {part!r}: it must be valid or test")
        self._data, self.requests, self._part = data, requests, part
        self._rank, self._world_size = rank, world_size
        counts = part_counts(data, requests, part)
        users = _evaluated_users(data, counts, limit)
        self._plan = _EpochPlan(users, counts.events + counts.candidates, counts.requests, batch_events)
        self.num_batches = self._plan.num_batches
        self.num_requests = int(counts.requests[users].sum())
        """Requests of the pass, over all ranks."""
        self.num_skipped = int(counts.skipped[users].sum() if limit is not None else counts.skipped.sum())
        """Requests that are left out because their history is too short: of all users, or of those taken."""

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        return _prefetched(self._build, 2)

    def _build(self) -> Iterator[Batch]:
        reader = UserReader(self._data, keep=2, min_label=self.requests.least_label)
        for number in range(self.num_batches):
            users = self._plan.users_of(number, rank=self._rank, world_size=self._world_size)
            events = reader.read(users)
            chosen = of_part(list_requests(events, self.requests), self._part, self.requests)
            chosen = evaluated(chosen, config=self.requests)
            window = carried(chosen, num_users=len(users), part=self._part, config=self.requests)
            yield _batch(users, events, chosen, *window, num_global_requests=int(self._plan.num_requests[number]))


def training_item_counts(data: Shards, *, requests: RequestConfig, groups: Iterable[int] | None = None) -> np.ndarray:
    """[vocabulary capacity] int64: how often each row is a positive of a training request, before any cap.

    `groups`: count only in these row groups.
    """
    return training_item_labels(data, requests=requests, groups=groups)[0]


def training_item_labels(
    data: Shards, *, requests: RequestConfig, groups: Iterable[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(positives, candidates), [vocabulary capacity] int64 each: how often each row is one in the training requests,
    before any cap and without drawn negatives. `groups`: count only in these row groups."""
    check_log(data, requests)
    positives, candidates = np.zeros((2, data.vocabulary.capacity), np.int64)
    for group in range(data.num_groups) if groups is None else groups:
        every = list_requests(data.read(group, min_label=requests.least_label), requests)
        train = every.take(every.part == 0)
        positives += np.bincount(train.candidate[train.label > 0], minlength=len(positives))
        candidates += np.bincount(train.candidate, minlength=len(candidates))
    return positives, candidates


class _EpochPlan:
    """The users of an epoch, cut into global batches."""

    def __init__(self, users: np.ndarray, cost: np.ndarray, num_requests: np.ndarray, batch_events: int) -> None:
        self._users, self._cost = users, cost[users]
        self._offsets = order.cut_batches(self._cost, batch_events=batch_events)
        self.num_batches = len(self._offsets) - 1
        self.num_requests = order.batch_totals(num_requests[users], self._offsets)

    def users_of(self, number: int, *, rank: int, world_size: int) -> np.ndarray:
        """The user rows of a batch that belong to this rank, in epoch order."""
        run = slice(int(self._offsets[number]), int(self._offsets[number + 1]))
        return self._users[run][order.deal(self._cost[run], world_size=world_size) == rank]


def _training_cost(counts: PartCounts, config: RequestConfig) -> np.ndarray:
    """[users] events plus candidates after the caps; an upper bound where the sample determines the candidates."""
    num_requests = np.minimum(counts.requests, config.max_requests)
    negatives = config.num_negatives + config.history_negatives if config.task == "next_item" else 0
    return counts.events + np.minimum(counts.candidates, num_requests * counts.largest) + num_requests * negatives


def _evaluated_users(data: Shards, counts: PartCounts, limit: int | None) -> np.ndarray:
    index = data.index
    users = np.flatnonzero(counts.requests)
    if limit is not None:
        if limit < len(users):
            # Each has a request, so the first `limit` users suffice: the others need no sorting.
            drawn = hash64(users)
            users = users[drawn <= np.partition(drawn, limit)[limit]]
        users = users[np.argsort(hash64(users), kind="stable")]
        users = users[: int(np.searchsorted(np.cumsum(counts.requests[users]), limit)) + 1]
    return users[np.lexsort((index.row[users], index.group[users]))]


def _batch(
    users: np.ndarray, events: UserEvents, chosen: Requests, start: np.ndarray, last: np.ndarray,
    *, num_global_requests: int,
) -> Batch:  # fmt: skip
    """Cut each user's events to start : last, and shift the requests' positions accordingly."""
    places = ranges(events.offsets[:-1] + start, last - start)
    codes = events.codes or UserCodes(lengths=np.zeros((len(users), 0), np.int64), values=np.zeros(0, np.int64))
    return Batch(
        user=_tensor(users),
        user_feature_lengths=_tensor(codes.lengths),
        user_feature_values=_tensor(codes.values),
        event_offsets=_tensor(offsets_of(last - start)),
        event_item=_tensor(events.item[places]),
        event_time=_tensor(events.time[places]),
        event_action=_tensor(events.action[places]),
        event_label=_tensor(events.label_code[places]),
        request_user=_tensor(chosen.user),
        request_position=_tensor(chosen.position - start[chosen.user]),
        request_time=_tensor(chosen.time),
        request_key=_tensor(chosen.key),
        candidate_offsets=_tensor(chosen.offsets),
        candidate_item=_tensor(chosen.candidate),
        candidate_label=torch.from_numpy(np.ascontiguousarray(chosen.label, np.float32)),
        num_global_requests=num_global_requests,
    )


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.int64))


def _fingerprint(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _prefetched(make: Callable[[], Iterator[_T]], ahead: int) -> Generator[_T, None, None]:
    """The items of `make()`, built by a thread at most `ahead` items in advance; its exceptions are raised here."""
    if ahead == 0:
        yield from make()
        return
    ready: queue.Queue[tuple[_T | None, BaseException | None]] = queue.Queue(ahead)
    stop = threading.Event()

    def hand_over(item: _T | None, error: BaseException | None) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((item, error), timeout=0.1)
                return

    def work() -> None:
        try:
            for item in make():
                hand_over(item, None)
                if stop.is_set():
                    return
            hand_over(None, StopIteration())
        except BaseException as error:
            hand_over(None, error)

    thread = threading.Thread(target=work, name="solar-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()
