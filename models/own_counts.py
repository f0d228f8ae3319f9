"""The user's own counts of a candidate, exact for any length of the history: how often it occurs, weighed by recency,
and which share of the history's labels is positive.

    own_M = sum of 2^(-age / DECAY_EVENTS) over the candidate's events in the history, age in events (the newest has 0)

The letters are those of models/interface.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.interface import DECAY_EVENTS, ModelInput
from models.repeats import Occurrences


def own_counts(inputs: ModelInput, *, request_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(own_M float32, age_M float32, seen_M bool) of every candidate; age_M: how many events ago it occurred last, from
    0. All are 0 for a candidate that is unknown or not in the history."""
    device, item_M = inputs.candidate_item_M.device, inputs.candidate_item_M
    seen = Occurrences.of(inputs)
    num_entries = seen.item_N.numel()
    if not num_entries:
        none_M = torch.zeros(item_M.shape, device=device)
        return none_M, none_M, none_M.bool()
    start_B, end_B, length_B = (
        value.to(device, non_blocking=True) for value in (seen.start_B, seen.end_B, seen.length_B)
    )
    # Sort the entries by item and place: an item's entries of one user are then one run.
    stride = num_entries + 1
    key_N, order_N = torch.sort(seen.item_N * stride + torch.arange(num_entries, device=device))
    weight_N, place_N, latest_N = _summed_runs(seen, order_N)
    last_M = torch.searchsorted(key_N, item_M * stride + end_B[request_M]) - 1
    found_M = (last_M >= 0) & (item_M >= inputs.num_reserved)
    last_M = last_M.clamp_min(0)
    found_M &= key_N[last_M] >= item_M * stride + start_B[request_M]
    end_M = length_B[request_M] - 1
    own_M = weight_N[last_M] * torch.exp2(-(end_M - place_N[last_M]) / DECAY_EVENTS)
    age_M = end_M - latest_N[last_M]
    return torch.where(found_M, own_M, 0.0).float(), torch.where(found_M, age_M, 0).float(), found_M


def _summed_runs(seen: Occurrences, order_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(weight_N, place_N, latest_N) of the entries in `order_N`: the sum over the entry and those of its user and item
    before it of their weights as of `place_N`, in float64, and the place in the history of the entry's last event.

    The sum doubles its reach with each pass. Every factor is that of two places, so that nothing is lost to the age of
    a history, as in a difference of two cumulated sums.
    """
    device, size_U = order_N.device, seen.first_U1.diff()
    first_N = torch.repeat_interleave(seen.first_U1[:-1], size_U).to(device, non_blocking=True)[order_N]
    item_N = seen.item_N[order_N]
    place_N = order_N - first_N if seen.decay_place_N is None else seen.decay_place_N[order_N]
    weight_N = torch.ones_like(place_N, dtype=torch.float64) if seen.decayed_N is None else seen.decayed_N[order_N]
    run_N = torch.cumsum(F.pad((item_N.diff() != 0) | (first_N.diff() != 0), (1, 0)), 0)
    step, longest = 1, int(size_U.max())
    while step < longest:
        is_same_N = run_N[step:] == run_N[:-step]
        faded_N = weight_N[:-step] * torch.exp2(-(place_N[step:] - place_N[:-step]) / DECAY_EVENTS)
        weight_N = weight_N + F.pad(torch.where(is_same_N, faded_N, 0.0), (step, 0))
        step *= 2
    return weight_N, place_N, order_N - first_N if seen.place_N is None else seen.place_N[order_N]


def label_counts(inputs: ModelInput) -> tuple[Tensor, Tensor]:
    """(known_B, positive_B) int64 on the device: events of each history whose label is known, and those with a positive
    one."""
    device = inputs.event_label_N.device
    start_B = inputs.event_offsets_U1[inputs.request_user_B].to(device)
    end_B = start_B + inputs.request_position_B.to(device)
    counts = []
    for has_N in (inputs.event_label_N > 0, inputs.event_label_N > 1):
        before_N1 = F.pad(has_N.long().cumsum(0), (1, 0))
        counts.append(before_N1[end_B] - before_N1[start_B])
    known_B, positive_B = counts
    if inputs.stored is not None:
        known_B = known_B.index_add(0, inputs.stored.request_S.to(device), inputs.stored.known_labels_S.to(device))
        positive_B = positive_B.index_add(
            0, inputs.stored.request_S.to(device), inputs.stored.positive_labels_S.to(device)
        )
    return known_B, positive_B
