"""Histories in a tower: events as vectors, and the recent events of a request.

    item vector + action + hour of day + weekday + gap to the previous event + time + label  --normalise-->  event_ND

All these parts are known when the event happens and do not depend on a request, so they may enter before the
decomposition, which serves every request. Features that depend on the request (how long ago, how many events ago)
belong only to the exact recent window.
The letters are those of models/interface.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.interface import NUM_LABEL_CODES, ModelInput

MS_PER_HOUR = 3_600_000
NUM_GAP_BUCKETS = 32
"""Buckets of a time gap: floor(log2(1 + seconds)); the last begins at 68 years."""
WAVE_DAYS = tuple(2.0**k for k in range(-2, 14))
"""Periods of the waves that encode absolute time: six hours to 22 years."""


class ItemEncoder(nn.Module):
    """item_ID = LayerNorm(W [item row, mean vector of each item feature]): item side features enter here."""

    def __init__(self, width: int, *, num_features: int, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.project = nn.Linear(width * (1 + num_features), width, bias=False)
        self.norm = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, item_IC: Tensor, features_IFC: Tensor) -> Tensor:
        rows = torch.cat([item_IC[:, None], features_IFC], 1).flatten(1)
        return self.norm(self.project(rows.to(self.project.weight.dtype)))


class EventEncoder(nn.Module):
    """event_ND: the item's vector, plus vectors for the event's action, time and label."""

    def __init__(
        self, width: int, *, num_actions: int, time_features: bool, absolute_time: bool, labels: bool, dropout: float
    ) -> None:
        super().__init__()
        self.num_actions = num_actions
        self.action = nn.Embedding(num_actions, width) if num_actions > 1 else None
        self.hour = nn.Embedding(24, width) if time_features else None
        self.weekday = nn.Embedding(7, width) if time_features else None
        self.gap = nn.Embedding(NUM_GAP_BUCKETS, width) if time_features else None
        self.waves = nn.Linear(2 * len(WAVE_DAYS), width, bias=False) if absolute_time else None
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        for embedding in (self.action, self.hour, self.weekday, self.gap):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.1)
        # Last: the weights above are the same draws with labels and without.
        self.label = nn.Embedding(NUM_LABEL_CODES, width) if labels else None
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.1)

    def forward(self, item_ID: Tensor, inputs: ModelInput) -> Tensor:
        event_ND = F.embedding(inputs.event_item_N, item_ID)
        if self.action is not None:
            event_ND = event_ND + self.action(inputs.event_action_N)
        if self.hour is not None and self.weekday is not None and self.gap is not None:
            hours_N = torch.div(inputs.event_time_N, MS_PER_HOUR, rounding_mode="floor")
            days_N = torch.div(hours_N, 24, rounding_mode="floor")
            event_ND = event_ND + self.hour(hours_N % 24) + self.weekday(days_N % 7)
            event_ND = event_ND + self.gap(previous_gap(inputs.event_time_N, inputs.event_offsets_U1))
        if self.waves is not None:
            event_ND = event_ND + self.waves(time_waves(inputs.event_time_N).to(event_ND.dtype))
        if self.label is not None:
            event_ND = event_ND + self.label(inputs.event_label_N)
        return self.dropout(self.norm(event_ND))


def time_waves(time_N: Tensor) -> Tensor:
    """[N, 2 waves] float32: sine and cosine of absolute time at every period of WAVE_DAYS.

    A bilinear form of the waves of two times can be any smooth function of their difference. With waves in the events
    before the decomposition and in the query, attention to interests can depend on age, although a Gram has no order.
    """
    days_W = torch.tensor(WAVE_DAYS, dtype=torch.float64, device=time_N.device)
    turns_NW = time_N[:, None].double() / (24 * MS_PER_HOUR) / days_W
    # Remove whole turns in float64: at twenty thousand days the precision of float32 is only minutes.
    phase_NW = ((turns_NW - turns_NW.floor()) * (2 * math.pi)).float()
    return torch.cat([phase_NW.sin(), phase_NW.cos()], 1)


def previous_gap(event_time_N: Tensor, event_offsets_U1: Tensor) -> Tensor:
    """[N] bucket of the time since the user's previous event; bucket 0 for the user's first event."""
    gap_N = torch.diff(event_time_N, prepend=event_time_N[:1])
    starts = event_offsets_U1[:-1][event_offsets_U1.diff() > 0]
    return gap_bucket(gap_N.index_fill(0, starts.to(gap_N.device, non_blocking=True), 0))


def recent_events(inputs: ModelInput, *, window: int) -> tuple[Tensor, Tensor]:
    """The latest `window` events before each request, oldest first: (event_BW, gap_BW).

    event_BW: [B, W] 1 + index into N, 0 = no event. gap_BW: [B, W] bucket of the time from event to request.
    """
    place_BW = inputs.request_position_B[:, None] + torch.arange(-window, 0)
    event_BW, time_BW = events_at(inputs, user_G=inputs.request_user_B, place_GL=place_BW)
    return event_BW, gap_bucket(inputs.request_time_B[:, None] - time_BW)


def events_at(inputs: ModelInput, *, user_G: Tensor, place_GL: Tensor) -> tuple[Tensor, Tensor]:
    """The events at these places of the users' histories, on the device: (event_GL, time_GL).

    event_GL: [G, L] 1 + index into N, 0 = the user has no event there. time_GL: [G, L] its time, 0 for no event.
    """
    start_G1, end_G1 = inputs.event_offsets_U1[user_G][:, None], inputs.event_offsets_U1[user_G + 1][:, None]
    event_GL = start_G1 + place_GL + 1
    event_GL = torch.where((place_GL >= 0) & (event_GL <= end_G1), event_GL, 0)
    event_GL = event_GL.to(inputs.event_time_N.device, non_blocking=True)
    time_N1 = torch.cat([inputs.event_time_N.new_zeros(1), inputs.event_time_N])
    return event_GL, time_N1[event_GL]


def gap_bucket(gap_ms: Tensor) -> Tensor:
    """floor(log2(1 + seconds)), at least 0, at most NUM_GAP_BUCKETS - 1."""
    seconds = gap_ms.clamp_min(0).double() / 1000
    return torch.log2(seconds + 1).long().clamp_max(NUM_GAP_BUCKETS - 1)
