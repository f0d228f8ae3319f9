"""Repeats: how often and how recently the candidate itself occurs in its history, exact for any length.

    repeat_M = MLP(log(1 + count in the latest w events) for each w, log(1 + events since), log(1 + hours since))
    repeat_M = b where the candidate occurs in the history, else 0           (a form that can score all items at once)

A vector of a history, whether a mean or R interests, tells what its items are like, but not which items they are. Where
people come back to items, repeats are the strongest signal (personal frequency in next-basket recommendation, arXiv
2109.14233), and they need no training per item. The cost is one sort of the batch's events and a few binary searches
per candidate: O((N + M) log N), with no tensor of size N x M.
The letters are those of models/interface.py; X counts the arguments of the MLP.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.candidate_sets import CandidateSets
from models.history import MS_PER_HOUR
from models.interface import ModelInput

WINDOWS = (16, 128, 1024)
"""Windows of latest events in which a candidate is counted, in addition to the window of all events read."""
HIDDEN = 16
NEVER = torch.iinfo(torch.int32).max
"""Larger than every position in a sequence."""


class RepeatScore(nn.Module):
    """One number per candidate, added to its logit; the same for all candidates that are not in their history."""

    def __init__(self, *, time_features: bool, latest: int | None = None, adds: bool = False) -> None:
        """latest: number of latest events of a history that are read; None = all. adds: the score is added to a prior,
        and is 0 for candidates that are not in their history."""
        super().__init__()
        self.adds = adds
        self.time_features = time_features
        self.windows = (*(window for window in WINDOWS if latest is None or window < latest), latest)
        self.hidden = nn.Linear(len(self.windows) + 1 + time_features, HIDDEN)
        self.last = nn.Linear(HIDDEN, 1, bias=False)
        # Start at zero; training learns the score where people come back to items.
        nn.init.zeros_(self.last.weight)

    def forward(self, inputs: ModelInput, *, candidates: CandidateSets) -> Tensor:
        found_MX = repeats(
            inputs, request_M=candidates.request_M, windows=self.windows, time_features=self.time_features
        )
        score_M = self.last(torch.relu(self.hidden(found_MX.to(self.hidden.weight.dtype)))).squeeze(-1)
        return score_M * (found_MX[:, len(self.windows) - 1] > 0) if self.adds else score_M


class LearnedNumber(nn.Module):
    """b, one learned number: added to the logits of the items in the history (far below 0 where nobody comes back to
    items, above 0 where people do), or to all logits."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.bias_1 = nn.Parameter(torch.full((1,), float(start)))

    def forward(self) -> Tensor:
        # Return a copy: if the parameter is sharded over ranks, it is complete only inside this forward.
        return self.bias_1.float() + 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeenItems:
    """Which items are in the histories of requests: U x I numbers, for models that score all items at once."""

    first_UI: Tensor
    """int32: position of the item's first occurrence in the user's events, from 0; NEVER if it does not occur."""
    user_B: Tensor
    """[B] int64 index in U."""
    position_B: Tensor
    """[B] int64: length of the history, which is the user's first events."""

    @staticmethod
    def of_requests(inputs: ModelInput, *, first_item: int = 0) -> SeenItems:
        """The seen items of all requests; items below `first_item` are omitted."""
        device = inputs.event_item_N.device
        first_UI = first_places(inputs.event_item_N, inputs.event_offsets_U1, num_items=inputs.item_IC.shape[0])
        return SeenItems(
            first_UI=first_UI[:, first_item:],
            user_B=inputs.request_user_B.to(device, non_blocking=True),
            position_B=inputs.request_position_B.to(device, non_blocking=True),
        )

    def before(self, request_P: Tensor | slice) -> Tensor:
        """[P, I] bool: whether each item is in the history of each of these requests."""
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
    """[M, X] float32: the arguments of the MLP; 0 for a candidate that is unknown or does not occur in the last window.
    windows: ascending; None, as the last one, = all events."""
    item_M, device = inputs.candidate_item_M, inputs.candidate_item_M.device
    seen = Occurrences.of(inputs)
    num_events = seen.item_N.shape[0]
    start_M, end_M, length_M = (
        value_B.to(device, non_blocking=True)[request_M] for value_B in (seen.start_B, seen.end_B, seen.length_B)
    )
    # Sort the entries by item and row. An item's entries within a user are then one run, and the count in a window is
    # the difference of two positions.
    stride = num_events + 1
    key_N, order_N = torch.sort(seen.item_N * stride + torch.arange(num_events, device=device))
    until_M = torch.searchsorted(key_N, item_M * stride + end_M)
    before_N1 = None if seen.count_N is None else F.pad(seen.count_N[order_N].cumsum(0), (1, 0))
    known_M = item_M >= inputs.num_reserved
    counts = []
    for window in windows:
        # All events inside a window (not None) are given, so each has its own entry.
        first_M = start_M if window is None else torch.maximum(start_M, end_M - window)
        from_M = torch.searchsorted(key_N, item_M * stride + first_M)
        found_M = until_M - from_M if before_N1 is None else before_N1[until_M] - before_N1[from_M]
        counts.append(found_M * known_M)
    # Find the last occurrence.
    seen_M = counts[-1] > 0
    last_M = torch.where(seen_M, torch.cat([key_N.new_zeros(1), key_N])[until_M] - item_M * stride, 0)
    place_M = last_M - start_M if seen.place_N is None else F.pad(seen.place_N, (0, 1))[last_M]
    found = [*counts, torch.where(seen_M, length_M - 1 - place_M, 0)]
    if time_features:
        since_M = (inputs.request_time_B[request_M] - F.pad(seen.time_N, (0, 1))[last_M]).clamp_min(0)
        found.append(torch.where(seen_M, since_M, 0) / MS_PER_HOUR)
    return torch.log1p(torch.stack([value_M.float() for value_M in found], 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Occurrences:
    """Occurrences of items in the histories, by user and then by time. Every given event is an entry; for a stored
    history, entries for the distinct items of the events that are not given precede them."""

    item_N: Tensor
    time_N: Tensor
    count_N: Tensor | None
    """How many events an entry stands for; None = one each."""
    place_N: Tensor | None
    """Position of the entry in the complete history; None = its position among the user's entries."""
    start_B: Tensor
    """First entry of each request's history; on the host, like the next two fields."""
    end_B: Tensor
    """Last entry of each request's history, plus one."""
    length_B: Tensor
    """Number of events of the complete history."""
    first_U1: Tensor
    """[U + 1] int64, host: user u has the entries first_U1[u] : first_U1[u + 1]."""
    decayed_N: Tensor | None = None
    """[N] float64: sum of the entry's events, decayed to `decay_place_N`; None = 1 each."""
    decay_place_N: Tensor | None = None
    """[N] int64: the place in the history to which `decayed_N` is decayed; None = that of the entry."""

    @staticmethod
    def of(inputs: ModelInput) -> Occurrences:
        """The occurrences of a batch, with or without stored histories."""
        return Occurrences.of_given(inputs) if inputs.stored is None else Occurrences.of_stored(inputs)

    @staticmethod
    def of_given(inputs: ModelInput) -> Occurrences:
        start_B = inputs.event_offsets_U1[inputs.request_user_B]
        return Occurrences(
            item_N=inputs.event_item_N,
            time_N=inputs.event_time_N,
            count_N=None,
            place_N=None,
            start_B=start_B,
            end_B=start_B + inputs.request_position_B,
            length_B=inputs.request_position_B,
            first_U1=inputs.event_offsets_U1,
        )

    @staticmethod
    def of_stored(inputs: ModelInput) -> Occurrences:
        """The occurrences of a batch with stored histories; only users with one have additional entries."""
        stored, offsets_U1 = inputs.stored, inputs.event_offsets_U1
        assert stored is not None
        # Find the first entry of each user.
        user_S = inputs.request_user_B[stored.request_S]
        older_U, missing_U = torch.zeros(2, offsets_U1.numel() - 1, dtype=torch.int64)
        older_U[user_S] = stored.older_offsets_S1.diff()
        missing_U[user_S] = stored.length_S - stored.kept_S
        given_U = offsets_U1.diff()
        start_U = F.pad((older_U + given_U).cumsum(0), (1, 0))[:-1]
        # Order the entries: a user's older items, then the given events.
        owner_N = torch.repeat_interleave(given_U)
        place_n = torch.arange(owner_N.numel()) - offsets_U1[:-1][owner_N]
        owner_E = user_S[torch.repeat_interleave(stored.older_offsets_S1.diff())]
        length_E = stored.length_S[torch.repeat_interleave(stored.older_offsets_S1.diff())]
        rank_E = torch.arange(owner_E.numel()) - stored.older_offsets_S1[:-1].repeat_interleave(
            stored.older_offsets_S1.diff()
        )
        to = torch.cat([(start_U + older_U)[owner_N] + place_n, start_U[owner_E] + rank_E])
        by_place_E = torch.argsort(to)

        def in_order(given_N: Tensor, older_E: Tensor) -> Tensor:
            return torch.cat([given_N, older_E])[by_place_E]

        start_B = start_U[inputs.request_user_B]
        position_B = inputs.request_position_B
        return Occurrences(
            item_N=in_order(inputs.event_item_N, stored.older_item_E),
            time_N=in_order(inputs.event_time_N, stored.older_time_E),
            count_N=in_order(torch.ones_like(place_n), stored.older_count_E),
            place_N=in_order(missing_U[owner_N] + place_n, stored.older_place_E),
            start_B=start_B,
            end_B=start_B + older_U[inputs.request_user_B] + position_B,
            length_B=missing_U[inputs.request_user_B] + position_B,
            first_U1=F.pad((older_U + given_U).cumsum(0), (1, 0)),
            decayed_N=in_order(torch.ones_like(place_n).double(), stored.older_decayed_E.double()),
            decay_place_N=in_order(missing_U[owner_N] + place_n, length_E - 1),
        )
