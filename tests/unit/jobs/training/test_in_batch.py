"""In-batch negatives follow the pool of all ranks, not the rank; the exchange itself runs in tests/distributed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from jobs.training import in_batch
from jobs.training.in_batch import InBatchNegatives
from pipeline.batches.batch import Batch
from pipeline.batches.requests import RequestConfig

REQUESTS = RequestConfig(negatives="in_batch", num_negatives=30)
COUNTS = np.array([0, 0, 40, 30, 20, 10, 5, 5])
POSITIVES = {70: [2, 3, 4], 10: [2, 2], 40: [5]}
"""User row -> the positives of its requests."""


def batch_of(users: list[int]) -> Batch:
    positives = [POSITIVES[user] for user in users]
    number = sum(map(len, positives))
    empty = torch.zeros(0, dtype=torch.int64)
    return Batch(
        user=torch.tensor(users, dtype=torch.int64),
        event_offsets=torch.zeros(len(users) + 1, dtype=torch.int64),
        event_item=empty,
        event_time=empty,
        event_action=empty,
        event_label=empty,
        request_user=torch.tensor([place for place, items in enumerate(positives) for _ in items], dtype=torch.int64),
        request_position=torch.zeros(number, dtype=torch.int64),
        request_time=torch.zeros(number, dtype=torch.int64),
        request_key=torch.tensor([place for items in positives for place in range(len(items))], dtype=torch.int64),
        user_feature_lengths=torch.zeros(len(users), 0, dtype=torch.int64),
        user_feature_values=empty,
        candidate_offsets=torch.arange(number + 1),
        candidate_item=torch.tensor([item for items in positives for item in items], dtype=torch.int64),
        candidate_label=torch.ones(number),
        num_global_requests=6,
        epoch=2,
    )


def completed(parts: list[Batch], monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], tuple[list, ...]]:
    """{(user, request): (items, labels, log q)} of a global batch that was dealt into these parts."""
    pool = torch.cat([part.candidate_item for part in parts])
    monkeypatch.setattr(in_batch, "gather_rows", lambda rows: pool)
    found = {}
    for part in parts:
        whole = InBatchNegatives(REQUESTS, item_counts=COUNTS, seed=1)(part)
        assert whole.candidate_log_q is not None
        for b in range(part.num_requests):
            own = slice(*whole.candidate_offsets[b : b + 2].tolist())
            columns = (whole.candidate_item, whole.candidate_label, whole.candidate_log_q)
            user = int(part.user[part.request_user[b]])
            found[user, int(part.request_key[b])] = tuple(column[own].tolist() for column in columns)
    return found


def test_requests_get_the_same_candidates_however_users_are_dealt(monkeypatch):
    alone = completed([batch_of([70, 10, 40])], monkeypatch)
    assert completed([batch_of([10]), batch_of([40, 70])], monkeypatch) == alone
    assert completed([batch_of([40]), batch_of([]), batch_of([10, 70])], monkeypatch) == alone
    assert len(alone) == 6


def test_negatives_are_other_positives_of_the_batch_with_the_log_q_of_the_long_run(monkeypatch):
    for items, labels, log_q in completed([batch_of([70, 10, 40])], monkeypatch).values():
        assert labels == [1.0] + 30 * [0.0]
        assert set(items[1:]) == {2, 3, 4, 5} - {items[0]}
        weight = COUNTS[items]
        np.testing.assert_allclose(np.exp(log_q), 30 * weight / (COUNTS.sum() - weight[0]), rtol=1e-6)


def test_batch_of_one_request_has_a_positive_alone(monkeypatch):
    assert completed([batch_of([40])], monkeypatch) == {(40, 0): ([5], [1.0], pytest.approx([np.log(30 * 10 / 100)]))}


def test_other_negatives_are_handed_on_untouched():
    requests = dataclasses.replace(REQUESTS, negatives="uniform")
    batch = batch_of([70, 10])
    assert InBatchNegatives(requests, item_counts=COUNTS, seed=1)(batch) is batch
