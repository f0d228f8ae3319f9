"""The batch, which the loader yields and a training or evaluation step consumes.

    user 0: events  a b c d          requests at positions 3 and 4
    user 1: events  e f              one request at position 2

    event_offsets     [0, 4, 6]
    event_item        [a, b, c, d, e, f]
    request_user      [0, 0, 1]
    request_position  [3, 4, 2]       history of request 0 = a b c
    candidate_offsets [0, 3, 6, 9]
    candidate_item    [+ - -  + - -  + - -]
    candidate_label   [1 0 0  1 0 0  1 0 0]

A user's history is in the batch once, however many requests it serves. Nothing is padded. An empty batch (no users) is
legal: ranks without work in a step get one, so that every rank joins every collective.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's part of a global batch.

    U users, N events of all users, B requests, M candidates of all requests, G user features.
    """

    user: Tensor
    """[U] int64: the user's row in the shard index."""
    user_feature_lengths: Tensor
    """[U, G] int64: how many values a user has of each of the data set's user features; G may be 0."""
    user_feature_values: Tensor
    """[user_feature_lengths.sum()] int64: rows of the features' values, by user and then by feature."""
    event_offsets: Tensor
    """[U + 1] int64: user u owns events event_offsets[u] : event_offsets[u + 1], in total order."""
    event_item: Tensor
    """[N] int64: vocabulary row of the item (0 padding, 1 unknown)."""
    event_time: Tensor
    """[N] int64: milliseconds since 1970 UTC; all zero where the log has no times."""
    event_action: Tensor
    """[N] int64: action code, 0 where the log has no actions."""
    event_label: Tensor
    """[N] int64: 0 = no label known, 1 = label 0, 2 = label above 0; all zero where the log has no labels. A label
    counts as known from its event's time."""
    request_user: Tensor
    """[B] int64: index in U of the request's user; not decreasing."""
    request_position: Tensor
    """[B] int64: length of the history, which is the user's first events in this batch."""
    request_time: Tensor
    """[B] int64: milliseconds since 1970 UTC, zero where the log has no times."""
    request_key: Tensor
    """[B] int64: unique among a user's requests: the position of its first event in the user's whole sequence."""
    candidate_offsets: Tensor
    """[B + 1] int64: request b owns candidates candidate_offsets[b] : candidate_offsets[b + 1]."""
    candidate_item: Tensor
    """[M] int64: vocabulary rows. Task next_item: the positive first, then the negatives (none in evaluation)."""
    candidate_label: Tensor
    """[M] float32: 1 or 0."""
    num_global_requests: int
    """Requests of the whole global batch, over all ranks: the normaliser of every loss."""
    epoch: int = 0
    """The training epoch, which draws for a request depend on."""
    candidate_log_q: Tensor | None = None
    """[M] float32: log of the expected number of draws of a candidate as a negative of its request; None where nothing
    is drawn."""

    @property
    def num_users(self) -> int:
        return self.user.numel()

    @property
    def num_events(self) -> int:
        return self.event_item.numel()

    @property
    def num_requests(self) -> int:
        return self.request_user.numel()

    @property
    def num_candidates(self) -> int:
        return self.candidate_item.numel()

    def pinned(self) -> Batch:
        """The batch in page-locked memory, from which a GPU can copy while it computes."""
        tensors = {name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **tensors)

    def without_history(self) -> Batch:
        """The same requests with empty histories, for an ablation in evaluation."""
        return dataclasses.replace(self, request_position=torch.zeros_like(self.request_position))
