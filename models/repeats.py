"""What a history says of a candidate exactly, however long it is: how often and how lately the candidate itself occurs.

    repeat_M = MLP(log(1 + count in the latest w events) for each w, log(1 + events since), log(1 + hours since))
    repeat_M = b where the candidate occurs in the history, else 0             (what all items can be given at once)

A vector of a history, be it a mean or R interests, tells what its items are like, not which of thousands they were.
Where people come back to items that is the strongest signal there is (personal frequency of next-basket recommendation,
arXiv 2109.14233), and no item needs training for it. One sort of the batch's events and some binary searches a
candidate: O((N + M) log N), nothing of size N x M.
The letters are those of models/interface.py; X counts the arguments of the MLP.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.candidate_sets import CandidateSets
from models.history import MS_PER_HOUR
from models.interface import ModelInput

WINDOWS = (16, 128, 1024)
"""Latest events in which a candidate is counted, beside all that are read."""
HIDDEN = 16
NEVER = torch.iinfo(torch.int32).max
"""Beyond every position of a sequence."""


class RepeatScore(nn.Module):
    """One number per candidate, a part of its logit; the same for all that do not occur in their history."""

    def __init__(self, *, time_features: bool, latest: int | None = None) -> None:
        """latest: events of a history that are read; None = all."""
        super().__init__()
        self.time_features = time_features
        self.windows = (*(window for window in WINDOWS if latest is None or window < latest), latest)
        self.hidden = nn.Linear(len(self.windows) + 1 + time_features, HIDDEN)
        self.last = nn.Linear(HIDDEN, 1, bias=False)
        # A start without it: the model learns it where people come back.
        nn.init.zeros_(self.last.weight)

    def forward(self, inputs: ModelInput, *, candidates: CandidateSets) -> Tensor:
        found_MX = repeats(
            inputs, request_M=candidates.request_M, windows=self.windows, time_features=self.time_features
        )
        return self.last(torch.relu(self.hidden(found_MX.to(self.hidden.weight.dtype)))).squeeze(-1)


class RepeatBias(nn.Module):
    """b, one number: far below 0 where nobody comes back to an item, above it where people do."""

    def __init__(self) -> None:
        super().__init__()
        self.bias_1 = nn.Parameter(torch.zeros(1))

    def forward(self) -> Tensor:
        # Not the parameter itself: spread over ranks, it is whole in here alone.
        return self.bias_1.float() + 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeenItems:
    """Which of all items the histories of requests hold: U x I numbers, for models that score all items at once."""

    first_UI: Tensor
    """int32: where in its user's events an item stands first, from 0; NEVER where it does not."""
    user_B: Tensor
    """[B] int64."""
    position_B: Tensor
    """[B] int64: the first so many events of the user are the history."""

    @staticmethod
    def of_requests(inputs: ModelInput, *, first_item: int = 0) -> SeenItems:
        """Of all requests; items below `first_item` are left out."""
        device = inputs.event_item_N.device
        first_UI = first_places(inputs.event_item_N, inputs.event_offsets_U1, num_items=inputs.item_IC.shape[0])
        return SeenItems(
            first_UI=first_UI[:, first_item:],
            user_B=inputs.request_user_B.to(device, non_blocking=True),
            position_B=inputs.request_position_B.to(device, non_blocking=True),
        )

    def before(self, request_P: Tensor | slice) -> Tensor:
        """[P, I] bool: whether each item stands in the history of each of these requests."""
        return self.first_UI[self.user_B[request_P]] < self.position_B[request_P, None]


def first_places(event_item_N: Tensor, event_offsets_U1: Tensor, *, num_items: int) -> Tensor:
    """first_UI of `SeenItems`; the offsets are on the host."""
    device, num_users = event_item_N.device, event_offsets_U1.numel() - 1
    owner_N = torch.repeat_interleave(event_offsets_U1.diff())
    place_N = torch.arange(len(owner_N)) - event_offsets_U1[:-1][owner_N]
    place_N, row_N = place_N.int().to(device, non_blocking=True), (owner_N * num_items).to(device, non_blocking=True)
    never = torch.full((num_users * num_items,), NEVER, dtype=torch.int32, device=device)
    return never.scatter_reduce_(0, row_N + event_item_N, place_N, "amin").view(num_users, num_items)


def repeats(inputs: ModelInput, *, request_M: Tensor, windows: Sequence[int | None], time_features: bool) -> Tensor:
    """[M, X] float32: the arguments above, 0 for a candidate that does not occur in the last window or is no known
    item. windows: ascending; None, at the end, = all events."""
    item_M, device = inputs.candidate_item_M, inputs.candidate_item_M.device
    num_events = inputs.event_item_N.shape[0]
    start_B = inputs.event_offsets_U1[inputs.request_user_B]
    start_M, length_M = (
        value_B.to(device, non_blocking=True)[request_M] for value_B in (start_B, inputs.request_position_B)
    )
    # An item's events stand together and in order, and a user's are one range of rows: counting is subtraction.
    stride = num_events + 1
    key_N = torch.sort(inputs.event_item_N * stride + torch.arange(num_events, device=device)).values
    first_M = item_M * stride + start_M
    end_M = torch.searchsorted(key_N, first_M + length_M)
    known_M = item_M >= inputs.num_reserved
    counts = []
    for window in windows:
        older_M = 0 if window is None else (length_M - window).clamp_min(0)
        counts.append((end_M - torch.searchsorted(key_N, first_M + older_M)) * known_M)
    seen_M = counts[-1] > 0
    last_M = torch.where(seen_M, torch.cat([key_N.new_zeros(1), key_N])[end_M] - item_M * stride, 0)
    found = [*counts, torch.where(seen_M, start_M + length_M - 1 - last_M, 0)]
    if time_features:
        time_N1 = torch.cat([inputs.event_time_N, inputs.event_time_N.new_zeros(1)])
        since_M = (inputs.request_time_B[request_M] - time_N1[last_M]).clamp_min(0)
        found.append(torch.where(seen_M, since_M, 0) / MS_PER_HOUR)
    return torch.log1p(torch.stack([value_M.float() for value_M in found], 1))
