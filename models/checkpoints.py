"""Interests of growing histories: one decomposition every few events, shared by all requests until the next.

    user 0, every = 2    a b | c d | e        request at position 5 -> checkpoint 2 (a b c d)
                                              request at position 1 -> row 0, the empty history

The same in training (many requests of a user in one pass) and in serving (stored interests + latest events). What a
request misses, the events since its checkpoint, is what exact attention over the latest events is for.
The letters are those of models/interface.py; K counts the checkpoints that requests use, G chunks of E events.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from models.svd_attention import GRADIENT_EPS, Interests, interests_from_gram, reference_interests

CHUNK_EVENTS = 128
"""Events whose Gram is computed in one product, at most."""


def reference_checkpoint_interests(
    event_ND: Tensor,
    *,
    event_offsets_U1: Tensor,
    request_user_B: Tensor,
    request_position_B: Tensor,
    rank: int,
    every: int,
) -> Tensor:
    """interest_BRD: per request, the interests of the user's events before the last checkpoint at or before it."""
    rows = []
    for user, position in zip(request_user_B.tolist(), request_position_B.tolist(), strict=True):
        start = int(event_offsets_U1[user])
        rows.append(reference_interests(event_ND[start : start + position // every * every], rank=rank))
    return torch.stack(rows) if rows else event_ND.new_zeros(0, rank, event_ND.shape[-1], dtype=torch.float64)


def checkpoint_interests(
    event_ND: Tensor,
    *,
    event_offsets_U1: Tensor,
    request_user_B: Tensor,
    request_position_B: Tensor,
    rank: int,
    every: int,
    gram_dtype: torch.dtype = torch.float64,
    gradient_eps: float = GRADIENT_EPS,
) -> tuple[Interests, Tensor]:
    """Interests at the checkpoints (every `every` events of a user) that some request uses, and checkpoint_B.

    Row 0 of the interests is the empty history: nothing valid, whose attention is 0.
    The running Gram is the cumulative sum of chunk Grams X_G^T X_G: nothing of size N x M, no event twice, no padding
    beyond a user's last chunk. Gram and decomposition run in `gram_dtype`, never under autocast.
    """
    used, checkpoint_B = _used_checkpoints(request_user_B, request_position_B // every, num_events=event_ND.shape[0])
    with torch.autocast(event_ND.device.type, enabled=False):
        gram_KDD, sum_KD = _span_grams(
            event_ND, event_offsets_U1=event_offsets_U1, used=used, every=every, gram_dtype=gram_dtype
        )
        interests = interests_from_gram(
            _running_sum(gram_KDD, rank_K=used.rank_K),
            sum_KD=_running_sum(sum_KD, rank_K=used.rank_K),
            count_K=(used.number_K * every).to(gram_dtype),
            rank=rank,
            gradient_eps=gradient_eps,
        )
    return _with_empty_history(interests), checkpoint_B


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Checkpoints:
    """The K checkpoints that some request uses, by user, then by number."""

    user_K: Tensor
    number_K: Tensor
    """Complete groups of `every` events before the checkpoint, at least 1."""
    previous_K: Tensor
    """The same of the user's previous used checkpoint, or 0: between the two lies the checkpoint's span."""
    rank_K: Tensor
    """Used checkpoints of the same user before this one."""


def _used_checkpoints(user_B: Tensor, number_B: Tensor, *, num_events: int) -> tuple[_Checkpoints, Tensor]:
    """The checkpoints in use, and checkpoint_B: 1 + the place of a request's own, 0 for the empty history."""
    stride = num_events + 1
    key_K, inverse = torch.unique((user_B * stride + number_B)[number_B > 0], return_inverse=True)
    user_K, number_K = key_K // stride, key_K % stride
    place_K = torch.arange(key_K.numel(), device=key_K.device)
    joins_K = torch.zeros_like(place_K, dtype=torch.bool)
    joins_K[1:] = user_K[1:] == user_K[:-1]
    start_K = torch.where(joins_K, 0, place_K)
    used = _Checkpoints(
        user_K=user_K,
        number_K=number_K,
        previous_K=torch.where(joins_K, number_K.roll(1), 0),
        rank_K=place_K - (start_K.cummax(0).values if key_K.numel() else start_K),
    )
    return used, torch.zeros_like(number_B).masked_scatter(number_B > 0, inverse + 1)


def _span_grams(
    event_ND: Tensor, *, event_offsets_U1: Tensor, used: _Checkpoints, every: int, gram_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """gram_KDD and sum_KD of the events between each used checkpoint and the user's previous one.

    A span is cut into chunks of equally many events; only its last chunk is padded. Chunks are as long as the mean span
    allows, up to CHUNK_EVENTS: their Grams take CHUNK_EVENTS / D times less memory than the events.
    """
    length_K = used.number_K - used.previous_K
    num_spans, width = length_K.numel(), event_ND.shape[1]
    mean_length = int(length_K.sum()) // max(num_spans, 1)
    chunk = max(1, min(mean_length, CHUNK_EVENTS // every))
    count_K = (length_K + chunk - 1) // chunk
    span_G = torch.repeat_interleave(count_K)
    chunk_G = torch.arange(span_G.numel(), device=span_G.device) - (count_K.cumsum(0) - count_K)[span_G]
    place_GE = torch.arange(chunk * every, device=span_G.device)
    place_GE = ((used.previous_K[span_G] + chunk_G * chunk) * every)[:, None] + place_GE
    inside_GE = place_GE < (used.number_K[span_G] * every)[:, None]
    row_GE = event_offsets_U1[used.user_K[span_G]][:, None] + torch.where(inside_GE, place_GE, 0)
    event_GED = F.embedding(row_GE, event_ND).to(gram_dtype).masked_fill(~inside_GE[:, :, None], 0.0)
    gram_KDD = event_GED.new_zeros(num_spans, width, width).index_add(0, span_G, event_GED.mT @ event_GED)
    return gram_KDD, event_GED.new_zeros(num_spans, width).index_add(0, span_G, event_GED.sum(1))


def _running_sum(value: Tensor, *, rank_K: Tensor) -> Tensor:
    """Cumulative sum along the first axis that starts anew where rank_K is 0, in log2 steps and without a difference:
    a user's sum never holds another user's rounding error."""
    step, longest = 1, int(rank_K.max()) if rank_K.numel() else 0
    while step <= longest:
        shifted = torch.cat([torch.zeros_like(value[:step]), value[:-step]])
        joins = (rank_K >= step).view(-1, *[1] * (value.dim() - 1))
        value = value + torch.where(joins, shifted, 0.0)
        step *= 2
    return value


def _with_empty_history(interests: Interests) -> Interests:
    """The same with a row 0 that is the history without events."""

    def prepend(value: Tensor) -> Tensor:
        return torch.cat([value.new_zeros(1, *value.shape[1:]), value])

    return Interests(**{field.name: prepend(getattr(interests, field.name)) for field in dataclasses.fields(interests)})
