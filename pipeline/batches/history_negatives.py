"""Hard negatives of next_item requests: items of the request's own history. Pure numpy.

Where people come back to items, a positive competes above all with items from its user's history, and a uniform draw
from the catalogue hardly ever takes one of these.
"""

from __future__ import annotations

import numpy as np

from pipeline.batches.negatives import Candidates
from pipeline.batches.requests import Requests
from pipeline.batches.sampling import draws_below
from pipeline.shards.sequences import UserEvents, offsets_of


def with_history_negatives(
    drawn: Candidates, *, requests: Requests, events: UserEvents, keys: np.ndarray, num_negatives: int
) -> Candidates:
    """The candidates and, after them, items from `num_negatives` places of each request's history, drawn by keys [B].

    An item that is a candidate already is not added again, so a request gets at most `num_negatives` of them, and none
    if its history is empty.
    """
    num_requests, sizes = len(requests), np.diff(drawn.offsets)
    place = draws_below(requests.position, keys=keys, count=num_negatives)
    request = np.broadcast_to(np.arange(num_requests)[:, None], place.shape)
    exists = requests.position[request] > 0
    item = np.concatenate([drawn.item, events.item[(events.offsets[requests.user][:, None] + place)[exists]]])
    request = np.concatenate([np.repeat(np.arange(num_requests), sizes), request[exists]])
    # The sort is stable: among equal items of a request the first is kept, and so is every earlier candidate.
    order = np.lexsort((item, request))
    again = np.zeros(len(item), bool)
    again[order[1:]] = (item[order[1:]] == item[order[:-1]]) & (request[order[1:]] == request[order[:-1]])
    again[: len(drawn.item)] = False
    order = np.argsort(request, kind="stable")
    order = order[~again[order]]
    label = np.concatenate([drawn.label, np.zeros(len(item) - len(drawn.item), np.float32)])
    offsets = offsets_of(np.bincount(request[order], minlength=num_requests))
    return Candidates(item=item[order], label=label[order], offsets=offsets)


def expected_history_draws(
    candidates: Candidates, *, requests: Requests, events: UserEvents, num_negatives: int
) -> np.ndarray:
    """[M] float64: probability that `num_negatives` draws from the history add the item, 1 - (1 - its share)^n.

    A positive, which is never added, gets the value that another item of its share would have.
    """
    request = np.repeat(np.arange(len(requests)), np.diff(candidates.offsets))
    length = requests.position[request]
    count = count_before(events, user=requests.user[request], item=candidates.item, position=length)
    return 1.0 - (1.0 - count / np.maximum(length, 1)) ** num_negatives


def count_before(events: UserEvents, *, user: np.ndarray, item: np.ndarray, position: np.ndarray) -> np.ndarray:
    """[M] how many of the user's first `position` events have the item."""
    # Sorted by item and row, an item's events within a user are one run: the count is a difference of two positions.
    stride = np.int64(len(events.item) + 1)
    known = np.sort(events.item * stride + np.arange(len(events.item)))
    first = item * stride + events.offsets[user]
    return np.searchsorted(known, first + position) - np.searchsorted(known, first)
