"""Interests of growing histories: one decomposition every few events, shared by all requests until the next.

    user 0, every = 2    a b | c d | e        request at position 5 -> checkpoint 2 (a b c d)
                                              request at position 1 -> row 0, the empty history

The same in training (many requests of a user in one pass) and in serving (stored interests + latest events). What a
request misses, the events since its checkpoint, is what exact attention over the latest events is for.
The letters are those of models/interface.py; K counts the checkpoints that requests use.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from models.prefixes import EXACT_EVENTS, Prefixes
from models.svd_attention import Decomposition, Interests, interests_from_gram, reference_interests


def reference_checkpoint_interests(
    event_ND: Tensor,
    *,
    event_offsets_U1: Tensor,
    request_user_B: Tensor,
    request_position_B: Tensor,
    rank: int,
    every: int,
    half_life: float = 0.0,
) -> Tensor:
    """interest_BRD: per request, the interests of the user's events before the last checkpoint at or before it."""
    rows = []
    for user, position in zip(request_user_B.tolist(), request_position_B.tolist(), strict=True):
        start = int(event_offsets_U1[user])
        history_ND = event_ND[start : start + position // every * every]
        rows.append(reference_interests(history_ND, rank=rank, half_life=half_life))
    return torch.stack(rows) if rows else event_ND.new_zeros(0, rank, event_ND.shape[-1], dtype=torch.float64)


def checkpoint_interests(
    event_ND: Tensor,
    *,
    event_offsets_U1: Tensor,
    request_user_B: Tensor,
    request_position_B: Tensor,
    every: int,
    how: Decomposition,
    half_life: float = 0.0,
) -> tuple[Interests, Tensor]:
    """Interests at the checkpoints (every `every` events of a user) that some request uses, and checkpoint_B.

    Row 0 of the interests is the empty history: nothing valid, whose attention is 0. An event weighs
    2^(-age / half_life), age in events; 1 where half_life is 0. Offsets, users and positions are on the host.
    The Gram's chunks, sums and decomposition are as models/prefixes.py says, never under autocast.
    """
    with torch.autocast(event_ND.device.type, enabled=False):
        prefixes = Prefixes.of_requests(
            event_offsets_U1, user_B=request_user_B, length_B=request_position_B // every * every
        )
        event_N1D = event_ND[:, None]
        # An estimator that holds U constant differentiates one of the two factors of X^T X.
        left_N1D = event_N1D.detach() if how.gradient == "stop" else event_N1D
        gram_K1DD, sum_K1D = prefixes.outer_sums(left_N1D, event_N1D, half_life=half_life)
        interests = interests_from_gram(
            gram_K1DD[:, 0],
            sum_KD=sum_K1D[:, 0],
            weight_K=prefixes.weight_K(half_life).to(event_ND.device, non_blocking=True),
            how=how,
            single_K=(prefixes.length_K > EXACT_EVENTS) & (event_ND.dtype != torch.float64),
        )
    return _with_empty_history(interests), prefixes.place_B.to(event_ND.device, non_blocking=True)


def _with_empty_history(interests: Interests) -> Interests:
    """The same with a row 0 that is the history without events."""

    def prepend(value: Tensor) -> Tensor:
        return torch.cat([value.new_zeros(1, *value.shape[1:]), value])

    return Interests(**{field.name: prepend(getattr(interests, field.name)) for field in dataclasses.fields(interests)})
