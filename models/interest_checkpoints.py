"""Interests of growing histories: one decomposition every few events, shared by all requests until the next one.

    user 0, every = 2    a b | c d | e        request at position 5 -> checkpoint 2 (a b c d)
                                              request at position 1 -> row 0, the empty history

This is the same in training (many requests of a user in one pass) and in serving (stored interests + latest events).
The interests do not contain the events since the checkpoint; exact attention over the latest events covers them.
A stored history also keeps its Gram: later events are added to it at each new checkpoint, so no event is lost.
The letters are those of models/interface.py; K counts the checkpoints that requests use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from models.interface import HistorySums, ModelInput
from models.prefixes import EXACT_EVENTS, Prefixes, weight_of
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

    Row 0 of the interests is the empty history: no interest is valid, and attention gives 0. An event weighs
    2^(-age / half_life), age in events, or 1 if half_life is 0. Offsets, users and positions are on the host. Grams are
    summed as models/prefixes.py describes; sums and decomposition never run under autocast.
    """
    found = _Checkpoints.of_requests(
        event_ND,
        event_offsets_U1=event_offsets_U1,
        request_user_B=request_user_B,
        request_position_B=request_position_B,
        every=every,
        how=how,
        half_life=half_life,
    )
    place_B = found.prefixes.place_B.to(event_ND.device, non_blocking=True)
    return Interests(**{name: _with_empty_history(value) for name, value in _tensors(found.interests)}), place_B


@torch.no_grad()
def history_sums(
    event_ND: Tensor, *, inputs: ModelInput, every: int, how: Decomposition, half_life: float
) -> HistorySums:
    """The interests of `checkpoint_interests`, and the Grams and sums from which they are computed, per request."""
    found = _Checkpoints.of_requests(
        event_ND,
        event_offsets_U1=inputs.event_offsets_U1,
        request_user_B=inputs.request_user_B,
        request_position_B=inputs.request_position_B,
        every=every,
        how=how,
        half_life=half_life,
    )
    return HistorySums(
        interest_BRD=_with_empty_history(found.interests.interest_KRD)[found.prefixes.place_B],
        gram_BDD=_with_empty_history(found.gram_KDD)[found.prefixes.place_B],
        sum_BD=_with_empty_history(found.sum_KD)[found.prefixes.place_B],
    )


@torch.no_grad()
def stored_interests(
    event_ND: Tensor, *, inputs: ModelInput, every: int, how: Decomposition, half_life: float
) -> Interests:
    """Interests (K = S) of the stored histories and the events since: the stored interests if there is no new
    checkpoint since, else those of the stored Gram plus the events up to the new checkpoint. They have neither a
    spectrum nor a gradient."""
    stored = inputs.stored
    assert stored is not None
    # Find the histories with a new checkpoint.
    first_S = inputs.event_offsets_U1[inputs.request_user_B[stored.request_S]]
    missing_S = stored.length_S - stored.kept_S
    then_S = stored.length_S // every * every
    now_S = (missing_S + inputs.request_position_B[stored.request_S]) // every * every
    interest_SRD = stored.interest_SRD.double()
    mean_SD = stored.sum_SD.double() / weight_of(then_S, half_life).clamp_min(1.0)[:, None]
    moved = torch.nonzero(now_S > then_S).flatten()
    if moved.numel():
        # Add the events between the two checkpoints to the stored sums, then decompose.
        grams, sums = [], []
        for s in moved.tolist():
            now, then, start = int(now_S[s]), int(then_S[s]), int(first_S[s] - missing_S[s])
            event_nD = event_ND[start + then : start + now].double()
            age_n = torch.arange(now - then - 1, -1, -1, dtype=torch.float64)
            weighted_nD = event_nD * torch.exp2(-age_n / half_life)[:, None] if half_life else event_nD
            decay = 2.0 ** (-(now - then) / half_life) if half_life else 1.0
            grams.append(stored.gram_SDD[s].double() * decay + weighted_nD.T @ event_nD)
            sums.append(stored.sum_SD[s].double() * decay + weighted_nD.sum(0))
        found = interests_from_gram(
            torch.stack(grams),
            sum_KD=torch.stack(sums),
            weight_K=weight_of(now_S[moved], half_life),
            how=how,
            single_K=(now_S[moved] > EXACT_EVENTS) & (event_ND.dtype != torch.float64),
        )
        interest_SRD = interest_SRD.index_copy(0, moved, found.interest_KRD)
        if found.mean_KD is not None:
            mean_SD = mean_SD.index_copy(0, moved, found.mean_KD)
    none_SR = interest_SRD.new_zeros(interest_SRD.shape[:2])
    return Interests(
        interest_KRD=interest_SRD,
        valid_KR=interest_SRD.abs().amax(-1) > 0,
        singular_KR=none_SR,
        energy_K=none_SR.sum(-1),
        mean_KD=mean_SD if how.with_mean else None,
    )


def joined_interests(parts: Sequence[Interests]) -> Interests:
    """The interests of all parts, concatenated."""
    return Interests(**{name: torch.cat([getattr(part, name) for part in parts]) for name, _ in _tensors(parts[0])})


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Checkpoints:
    """The checkpoints in use, with sums and interests at each."""

    prefixes: Prefixes
    gram_KDD: Tensor
    sum_KD: Tensor
    interests: Interests

    @staticmethod
    def of_requests(
        event_ND: Tensor,
        *,
        event_offsets_U1: Tensor,
        request_user_B: Tensor,
        request_position_B: Tensor,
        every: int,
        how: Decomposition,
        half_life: float,
    ) -> _Checkpoints:
        with torch.autocast(event_ND.device.type, enabled=False):
            prefixes = Prefixes.of_requests(
                event_offsets_U1, user_B=request_user_B, length_B=request_position_B // every * every
            )
            event_N1D = event_ND[:, None]
            # If U is treated as a constant, only one of the two factors of X^T X gets a gradient.
            left_N1D = event_N1D.detach() if how.gradient == "stop" else event_N1D
            gram_K1DD, sum_K1D = prefixes.outer_sums(left_N1D, event_N1D, half_life=half_life)
            if how.with_mean:
                # The sums that come with a Gram have no gradient; these have one.
                one_N11 = torch.ones_like(event_N1D[:, :, :1])
                sum_K1D = prefixes.outer_sums(one_N11, event_N1D, half_life=half_life)[0][:, :, 0]
            interests = interests_from_gram(
                gram_K1DD[:, 0],
                sum_KD=sum_K1D[:, 0],
                weight_K=prefixes.weight_K(half_life).to(event_ND.device, non_blocking=True),
                how=how,
                single_K=(prefixes.length_K > EXACT_EVENTS) & (event_ND.dtype != torch.float64),
            )
        return _Checkpoints(prefixes=prefixes, gram_KDD=gram_K1DD[:, 0], sum_KD=sum_K1D[:, 0], interests=interests)


def _tensors(interests: Interests) -> list[tuple[str, Tensor]]:
    """The fields that are there, by name."""
    fields = [(field.name, getattr(interests, field.name)) for field in dataclasses.fields(Interests)]
    return [(name, value) for name, value in fields if value is not None]


def _with_empty_history(value: Tensor) -> Tensor:
    """`value` with a row 0 for the history without events."""
    return torch.cat([value.new_zeros(1, *value.shape[1:]), value])
