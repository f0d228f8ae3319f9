"""Requests of one user at nearby positions: what they read of the history is nearly the same, and is read once.

    positions      0 .. 15 | 16 .. 31 | 32 .. 47          blocks of 16 positions
    requests       3 4 9   | 20 21    |                   block 0 has three requests, block 1 two

Where a user is asked at one position after the other, as in training, a block's requests share all keys of an
attention: with one key set for each request, gathering the keys and their gradients takes longer than the attention.
The letters are those of models/interface.py; G counts blocks, P the requests of a block, X = P T its candidates.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from models.candidate_sets import CandidateSets, gather_rows
from models.history import events_at, gap_bucket
from models.interface import ModelInput

LEAST_FILLED = 0.5
"""Blocks are used if at least this share of their places has a request: the others are computed for nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestBlocks:
    """The requests of a batch in blocks; all on the host."""

    request_GP: Tensor
    """[G, P] int64: the requests of each block; an empty place repeats the block's first request."""
    place_B: Tensor
    """[B] int64: the place of each request in the flattened [G, P]."""
    span: int
    """Positions of a block."""
    first_G: Tensor
    """[G] int64: the block's first position."""

    @staticmethod
    def of(inputs: ModelInput, *, span: int, candidates: CandidateSets) -> RequestBlocks | None:
        """Blocks of `span` positions; None where one key set for each request is cheaper: sets of different sizes, or
        positions that lie too far apart."""
        if not candidates.uniform_size or not candidates.num_requests or span < 2:
            return None
        user_B, block_B = inputs.request_user_B, inputs.request_position_B // span
        stride = int(block_B.max()) + 1
        key_G, group_B, count_G = torch.unique(user_B * stride + block_B, return_inverse=True, return_counts=True)
        most = int(count_G.max())
        if most < 2 or candidates.num_requests < LEAST_FILLED * key_G.numel() * most:
            return None
        by_group = torch.argsort(group_B, stable=True)
        start_G = count_G.cumsum(0) - count_G
        place_P = torch.arange(most)
        place_B = torch.empty_like(group_B)
        place_B[by_group] = (
            torch.arange(group_B.numel()) + (torch.arange(key_G.numel()) * most - start_G)[group_B[by_group]]
        )
        return RequestBlocks(
            request_GP=by_group[start_G[:, None] + torch.where(place_P < count_G[:, None], place_P, 0)],
            place_B=place_B,
            span=span,
            first_G=key_G % stride * span,
        )

    def recent_events(self, inputs: ModelInput, *, window: int) -> tuple[Tensor, Tensor, Tensor]:
        """The latest `window` events before some position of each block, oldest first: (event_GL, gap_GPL, place_GP).

        event_GL: [G, L] 1 + index into N, 0 = no event. gap_GPL: [G, P, L] bucket of the time from event to request.
        place_GP: [G, P] the request's position within its block. All on the device.
        """
        device = inputs.event_time_N.device
        place_GL = self.first_G[:, None] + torch.arange(-window, self.span - 1)
        event_GL, time_GL = events_at(inputs, user_G=self.of_first(inputs.request_user_B), place_GL=place_GL)
        request_time_GP = inputs.request_time_B[self.request_GP.to(device, non_blocking=True)]
        gap_GPL = gap_bucket(request_time_GP[:, :, None] - time_GL[:, None])
        place_GP = inputs.request_position_B[self.request_GP] - self.first_G[:, None]
        return event_GL, gap_GPL, place_GP.to(device, non_blocking=True)

    def of_first(self, value_B: Tensor) -> Tensor:
        """value_G: of the first request of each block."""
        return value_B[self.request_GP[:, 0].to(value_B.device, non_blocking=True)]

    def spread(self, value_MD: Tensor) -> Tensor:
        """value_GXD: the candidates' rows by block."""
        groups = self.request_GP.shape[0]
        request_GP = self.request_GP.to(value_MD.device, non_blocking=True)
        by_request = value_MD.unflatten(0, (self.place_B.numel(), -1))
        return gather_rows(by_request, request_GP).view(groups, -1, value_MD.shape[1])

    def collect(self, value_GXD: Tensor) -> Tensor:
        """value_MD: the opposite of `spread`."""
        by_place = value_GXD.view(self.request_GP.numel(), -1, value_GXD.shape[2])
        return gather_rows(by_place, self.place_B.to(value_GXD.device, non_blocking=True)).flatten(0, 1)
