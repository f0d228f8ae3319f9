"""What a recommender is: the tensors it reads, the scores it returns, the letters of every shape.

    U users of the batch           N history events of all users (jagged)    B requests of all users
    M candidates of all requests   I distinct items of the batch             C width of an embedding table
    D model width                  H heads                                   R rank: interests of a history
    W recent events seen exactly   K checkpoints of a history                F item features
    T requests or events of one user, where a tensor is dense over them

A tensor's name ends with its shape: `query_MHD` is [M, H, D]; `1` means "plus one" (`event_offsets_U1` is [U + 1]).
Tables (models/embeddings.py) turn ids into rows; a tower (solar.py and its competitors) turns rows into scores and
imports torch alone, so that it runs where TorchRec does not.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelInput:
    """What a tower reads. Items are looked up once each; events and candidates point into them by index.

    What says where things are (event_offsets, request_user, request_position, candidate_offsets) is on the host, all
    else on the device: a tower plans on the host and never waits for the device to tell it a size.
    """

    item_IC: Tensor
    """[I, C] embedding rows of the distinct items of this batch, with the gradient of the look-up."""
    features_IFC: Tensor
    """[I, F, C] one vector per item feature: the mean of its values' rows, zero where an item has none."""
    event_offsets_U1: Tensor
    """[U + 1] int64, host: user u owns events event_offsets[u] : event_offsets[u + 1], in total order."""
    event_item_N: Tensor
    """[N] int64 index into I."""
    event_time_N: Tensor
    """[N] int64 milliseconds since 1970 UTC, zero where the log has an order only."""
    event_action_N: Tensor
    """[N] int64 action code, below `num_actions` of the model's config; 0 = none."""
    request_user_B: Tensor
    """[B] int64, host, not decreasing."""
    request_position_B: Tensor
    """[B] int64, host: the first so many events of the user are the history."""
    request_time_B: Tensor
    """[B] int64 milliseconds since 1970 UTC, zero where the log has an order only."""
    candidate_offsets_B1: Tensor
    """[B + 1] int64, host."""
    candidate_item_M: Tensor
    """[M] int64 index into I."""


class Recommender(nn.Module):
    """A tower. U, N, B, I or M may be 0: it then runs on empty tensors and returns an empty result with a gradient."""

    def forward(self, inputs: ModelInput) -> Tensor:
        """logits_M: one calibrated logit per candidate, float32 (sigmoid = probability of a positive label)."""
        raise NotImplementedError
