"""Candidates of one request attend to each other: permutation-equivariant, without positions or other requests.

Only real items are members of a set: padding, and candidates that the model does not know, neither attend nor are
attended to. In sets of up to `exact_up_to` members the softmax runs over the members; in larger sets it runs over the
set's principal components, with the same W_K and W_V (P = U^T C, so P W_K = U^T C W_K): O(T R) instead of O(T^2). The
two are different functions; the low-rank form for thousands of candidates follows SOLAR's set-aware claim, its details
are inferred.
The letters are those of models/interface.py; b counts the requests of a group, T the candidates of each.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.candidate_sets import CandidateSets, Members, attend_dense, mask_bias
from models.svd_attention import START_TEMPERATURE, Decomposition, Interests, interests_from_gram


class SetAttention(nn.Module):
    """out_MD from query, key and value projections of the candidates. The weights are parameters of this module, not of
    nn.Linear modules: they are used once per size group, and ZeRO-3 gathers a module's own parameters for its whole
    forward."""

    def __init__(self, width: int, *, num_heads: int, rank: int, exact_up_to: int) -> None:
        super().__init__()
        self.num_heads, self.rank, self.exact_up_to = num_heads, rank, exact_up_to
        self.weight_4DD = nn.Parameter(torch.empty(4, width, width))
        """Query, key, value, output."""
        self.log_temperature_2H = nn.Parameter(torch.zeros(2, num_heads))
        """Row 0 for the exact form, row 1 for the low-rank form."""
        nn.init.uniform_(self.weight_4DD, -1 / math.sqrt(width), 1 / math.sqrt(width))
        nn.init.constant_(self.log_temperature_2H[1], math.log(START_TEMPERATURE["softmax"]))

    def forward(self, candidate_MD: Tensor, *, candidates: CandidateSets) -> Tensor:
        head_width = candidate_MD.shape[1] // self.num_heads
        scale_2D = (self.log_temperature_2H.exp() / math.sqrt(head_width)).repeat_interleave(head_width, 1)

        def compute(candidate_bTD: Tensor, members: Members) -> Tensor:
            present_bT = members.present_bT
            if present_bT is None:
                present_bT = torch.ones(candidate_bTD.shape[:2], dtype=torch.bool, device=candidate_bTD.device)
            is_large_b = members.count_b > self.exact_up_to
            if not bool(is_large_b.any()):
                return self._exact(candidate_bTD, present_bT, scale_2D[0])
            if bool(is_large_b.all()):
                return self._low_rank(candidate_bTD, present_bT, scale_2D[1])
            # Each set has the form for its own size, whatever other sets are in its group.
            return torch.where(
                is_large_b.to(candidate_bTD.device, non_blocking=True)[:, None, None],
                self._low_rank(candidate_bTD, present_bT, scale_2D[1]),
                self._exact(candidate_bTD, present_bT, scale_2D[0]),
            )

        found_MD = F.linear(candidates.map(compute, candidate_MD), self.weight_4DD[3])
        return found_MD if candidates.member_M is None else found_MD * candidates.member_M[:, None]

    def _exact(self, candidate_bTD: Tensor, present_bT: Tensor, scale_D: Tensor) -> Tensor:
        return self._read(candidate_bTD, candidate_bTD * present_bT[:, :, None], present_bT, scale_D)

    def _low_rank(self, candidate_bTD: Tensor, present_bT: Tensor, scale_D: Tensor) -> Tensor:
        interests = set_interests(candidate_bTD * present_bT[:, :, None], present_bT=present_bT, rank=self.rank)
        return self._read(candidate_bTD, interests.interest_KRD.to(candidate_bTD.dtype), interests.valid_KR, scale_D)

    def _read(self, candidate_bTD: Tensor, seen_bSD: Tensor, valid_bS: Tensor, scale_D: Tensor) -> Tensor:
        query, key, value, _ = self.weight_4DD.unbind(0)
        return attend_dense(
            F.linear(candidate_bTD, query),
            key_bSD=F.linear(seen_bSD, key) * scale_D,
            value_bSD=F.linear(seen_bSD, value),
            bias_bHS=mask_bias(valid_bS, dtype=candidate_bTD.dtype)[:, None],
            num_heads=self.num_heads,
        )


def set_interests(candidate_bTD: Tensor, *, present_bT: Tensor, rank: int) -> Interests:
    """The principal components of each set; absent candidates are zero rows."""
    with torch.autocast(candidate_bTD.device.type, enabled=False):
        rows_bTD = candidate_bTD.double()
        return interests_from_gram(
            rows_bTD.mT @ rows_bTD,
            sum_KD=rows_bTD.sum(1),
            weight_K=present_bT.sum(1).double(),
            how=Decomposition(rank=rank),
        )
