"""Jagged candidate sets, and softmax attention from the candidates of a request to that request's own keys.

    request 0: c c c        sets of similar size are computed together as [b, T] (T at most twice the smallest set),
    request 1: c c c        so that one set of 4,000 among many of 20 does not pad them to 4,000
    request 2: c

A set has members and may have candidates that are none: padding rows, and candidates whose item is unknown.

This module has no parameters: under DeepSpeed ZeRO-3 every module with parameters must run once per forward, while the
loop over size groups runs as often as the local sets need. The letters are those of models/interface.py; S counts keys,
b the requests of a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.head_attention import attend_in_heads

MASKED_SCORE = -1e30
"""Score of a key that does not exist: finite, so that a row without any key gives equal weights and not NaN."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Members:
    """Which candidates of a group of sets are members."""

    present_bT: Tensor | None
    """[b, T] bool; None = all."""
    count_b: Tensor
    """[b] int64, host: number of members of each set."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CandidateSets:
    """The layout of the candidates of all requests, grouped by the size of their set."""

    num_requests: int
    """B."""
    uniform_size: int | None
    """T if every set has T candidates: then [M] viewed as [B, T] needs no copy, and there are no groups."""
    group_request: tuple[Tensor, ...]
    """Per group [b] int64: its requests."""
    group_row: tuple[Tensor, ...]
    """Per group [b, T] int64: rows of M; padding repeats the set's first row."""
    group_member: tuple[Tensor, ...]
    """Per group [b, T] bool: a real item, neither padding nor an unknown one."""
    group_count: tuple[Tensor, ...]
    """Per group [b] int64, host: number of members of each set."""
    num_members_B: Tensor
    """[B] int64, host: the same of all sets."""
    member_M: Tensor | None
    """[M] bool: a real item; None = all are."""
    place_M: Tensor
    """[M] int64: position of each candidate in the concatenated groups; empty if there are no groups."""
    request_M: Tensor
    """[M] int64: the request of each candidate."""

    @staticmethod
    def from_offsets(
        candidate_offsets_B1: Tensor,
        *,
        device: torch.device,
        member_M: Tensor | None = None,
        num_members_B: Tensor | None = None,
    ) -> CandidateSets:
        """The layout of the sets delimited by `candidate_offsets_B1` [B + 1] on the host; indices are on `device`.

        `member_M` [M] bool on the device, `num_members_B` [B] on the host: which candidates are real items, and how
        many; None = all.
        """
        # Group the requests by the size of their set, if sizes differ.
        size_B = candidate_offsets_B1.diff()
        num_members_B = size_B if num_members_B is None else num_members_B
        num_requests = size_B.numel()
        smallest, largest = (int(size_B.min()), int(size_B.max())) if num_requests else (0, 0)
        uniform = smallest if smallest == largest else None
        groups: list[tuple[Tensor, Tensor, Tensor]] = []
        if uniform is None:
            class_B = torch.ceil(torch.log2(size_B.double().clamp_min(1))).long()
            for size_class in torch.unique(class_B[size_B > 0]).tolist():
                request_b = torch.nonzero((class_B == size_class) & (size_B > 0)).squeeze(1)
                place_T = torch.arange(int(size_B[request_b].max()), device=size_B.device)
                present_bT = place_T < size_B[request_b, None]
                row_bT = candidate_offsets_B1[request_b, None] + torch.where(present_bT, place_T, 0)
                groups.append((request_b, row_bT, present_bT))
        requests, rows, presents = zip(*groups, strict=True) if groups else ((), (), ())
        # Find the position of each candidate in the concatenated groups, padding included.
        present = torch.cat([group.flatten() for group in presents]) if groups else torch.zeros(0, dtype=torch.bool)
        row = torch.cat([group.flatten() for group in rows]) if groups else torch.zeros(0, dtype=torch.long)
        place = torch.nonzero(present).squeeze(1)

        def move(index: Tensor) -> Tensor:
            return index.to(device, non_blocking=True)

        def members(row_bT: Tensor, present_bT: Tensor) -> Tensor:
            return move(present_bT) if member_M is None else move(present_bT) & member_M[move(row_bT)]

        return CandidateSets(
            num_requests=num_requests,
            uniform_size=uniform,
            group_request=tuple(map(move, requests)),
            group_row=tuple(map(move, rows)),
            group_member=tuple(map(members, rows, presents)),
            group_count=tuple(num_members_B[request_b] for request_b in requests),
            num_members_B=num_members_B,
            member_M=member_M,
            place_M=move(place[torch.argsort(row[place])]),
            request_M=move(torch.repeat_interleave(size_B)),
        )

    def map(self, compute: Callable[..., Tensor], value_MD: Tensor, *per_request: Tensor) -> Tensor:
        """result_MD of `compute(value_bTD, members, *per_request[b])`, which returns [b, T, D] per group."""
        if self.uniform_size is not None:
            layout = (self.num_requests, self.uniform_size)
            member_BT = None if self.member_M is None else self.member_M.view(layout)
            members = Members(present_bT=member_BT, count_b=self.num_members_B)
            return compute(value_MD.view(*layout, value_MD.shape[1]), members, *per_request).flatten(0, 1)
        results = []
        groups = zip(self.group_request, self.group_row, self.group_member, self.group_count, strict=True)
        for request_b, row_bT, member_bT, count_b in groups:
            members = Members(present_bT=member_bT, count_b=count_b)
            chosen = (gather_rows(tensor, request_b) for tensor in per_request)
            results.append(compute(gather_rows(value_MD, row_bT), members, *chosen).flatten(0, 1))
        return gather_rows(torch.cat(results), self.place_M)


def attend(
    query_MD: Tensor,
    *,
    key_BSD: Tensor,
    value_BSD: Tensor,
    bias_BHS: Tensor,
    num_heads: int,
    candidates: CandidateSets,
) -> Tensor:
    """out_MD = softmax_S(Q_h K_h^T + bias) V_h, heads side by side; keys are already scaled.

    Keys that do not exist have bias MASKED_SCORE and value 0; a request without any key gets 0.
    """

    def compute(query_bTD: Tensor, _: Members, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return attend_dense(query_bTD, key_bSD=key, value_bSD=value, bias_bHS=bias, num_heads=num_heads)

    return candidates.map(compute, query_MD, key_BSD, value_BSD, bias_BHS)


def attend_dense(query_bTD: Tensor, *, key_bSD: Tensor, value_bSD: Tensor, bias_bHS: Tensor, num_heads: int) -> Tensor:
    """out_bTD: `attend` for requests with equally many candidates."""
    return attend_in_heads(
        query_bTD, key_GSD=key_bSD, value_GSD=value_bSD, bias_GPHS=bias_bHS[:, None], num_heads=num_heads
    )


def start_as_similarity(*linears: nn.Linear) -> None:
    """Set query, key, value and output maps to the identity: before training a candidate attends to similar events, and
    its score is its similarity to them."""
    for linear in linears:
        for part in linear.weight.data.split(linear.in_features):
            nn.init.eye_(part)


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """table[index] along the first axis; the table may have any further axes. The gradient of bfloat16 rows is summed
    in float32.

    It is an embedding look-up, whose backward on a CPU is 2.5x faster than that of index_select (104,000 rows of 64
    floats: 10 ms against 26 ms, one core).
    """
    wide = table.flatten(1).float() if table.dtype == torch.bfloat16 else table.flatten(1)
    return F.embedding(index, wide).to(table.dtype).view(*index.shape, *table.shape[1:])


def mask_bias(valid: Tensor, *, dtype: torch.dtype) -> Tensor:
    """0 where valid, MASKED_SCORE elsewhere, in the shape of `valid`."""
    return torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill(~valid, MASKED_SCORE)
