"""Softmax target attention over the whole history, which SVD-Attention approximates; costs O(events x candidates).

    O = softmax_n(Q k_n / sqrt(d) - slope_h age_n) v_n        over every event n before the request, per head h

After Deep Interest Network (arXiv 1706.06978) in the form of today's rankers: scaled dot products and a softmax instead
of DIN's activation unit. Recency enters as a learned decay per head (ALiBi, arXiv 2108.12409, with learned slopes); the
exact window over the latest events is the same as in every tower here. With `whole_history` off only the window is
left: DIN over the last W events. The letters are those of models/interface.py; P counts padding columns.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention_tower import AttentionTower
from models.candidate_sets import CandidateSets, start_as_similarity
from models.interface import ModelInput
from models.tower_settings import DinConfig

HALF_LIVES = (30.0, 300.0)
"""Age in events at which an event's weight is halved at the start of training; heads alternate between the two."""
DECAY_COLUMNS = 8
"""The decay takes one more column of queries and keys; kernels need a multiple of 8, so 8 columns are added."""


class Din(AttentionTower):
    """The tower. `num_features` is F, the number of item features of the tables."""

    def __init__(self, config: DinConfig, *, num_features: int) -> None:
        super().__init__(config, num_features=num_features)
        self.config = config
        if config.whole_history:
            self.key_value = nn.Linear(config.width, 2 * config.width, bias=False)
            start_as_similarity(self.key_value)
        if config.whole_history and config.decay:
            half_life_H = torch.tensor(HALF_LIVES).repeat(config.num_heads)[: config.num_heads]
            self.log_slope_H = nn.Parameter((math.log(2) / half_life_H).log())

    def read_history(
        self, query_MD: Tensor, *, event_ND: Tensor, inputs: ModelInput, candidates: CandidateSets
    ) -> Tensor | None:
        config = self.config
        if not config.whole_history:
            return None
        heads, head_width = config.num_heads, config.width // config.num_heads
        query_MHD = query_MD.unflatten(1, (heads, head_width))
        key_NHD, value_NHD = (
            side.unflatten(1, (heads, head_width)) for side in self.key_value(event_ND).chunk(2, dim=1)
        )
        if config.decay:
            # softmax(q k - slope age) = softmax(q k + slope place): so decay is a key column, not a bias per request.
            place_N = _place_from_the_end(inputs).to(event_ND, non_blocking=True)
            slope_H = self.log_slope_H.exp() * math.sqrt(head_width)
            query_MHD = _with_column(query_MHD, slope_H.to(query_MD.dtype).expand(query_MD.shape[0], heads))
            key_NHD = _with_column(key_NHD, place_N[:, None].expand(-1, heads))
            value_NHD = F.pad(value_NHD, (0, DECAY_COLUMNS))
        found_MHD = target_attention(
            query_MHD, key_NHD=key_NHD, value_NHD=value_NHD, inputs=inputs, scale=1 / math.sqrt(head_width)
        )
        return found_MHD[:, :, :head_width].flatten(1)


def target_attention(
    query_MHD: Tensor, *, key_NHD: Tensor, value_NHD: Tensor, inputs: ModelInput, scale: float
) -> Tensor:
    """out_MHD: every candidate's softmax attention to all events before its request; zero for an empty history.

    One fused attention per request over views of its user's events: no padding, no tensor of size N x M.
    """
    if not bool((inputs.request_position_B > 0).any()):
        # All histories are empty: return zeros that give zero gradients to keys and values too.
        return query_MHD * 0 + 0 * (key_NHD.sum() + value_NHD.sum())
    size_B = inputs.candidate_offsets_B1.diff().tolist()
    start_B = inputs.event_offsets_U1[inputs.request_user_B].tolist()
    found = []
    for query, start, length in zip(query_MHD.split(size_B), start_B, inputs.request_position_B.tolist(), strict=True):
        if length == 0:
            found.append(query * 0)
            continue
        key, value = key_NHD[start : start + length], value_NHD[start : start + length]
        mixed = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None], key.transpose(0, 1)[None], value.transpose(0, 1)[None], scale=scale
        )
        found.append(mixed[0].transpose(0, 1))
    return torch.cat(found)


def _place_from_the_end(inputs: ModelInput) -> Tensor:
    """[N]: minus the number of the user's later events. Only differences matter; small numbers keep precision."""
    length_U = inputs.event_offsets_U1.diff()
    end_N = torch.repeat_interleave(inputs.event_offsets_U1[1:], length_U)
    return torch.arange(end_N.numel()) - end_N + 1


def _with_column(value: Tensor, column: Tensor) -> Tensor:
    """[X, H, D] -> [X, H, D + P]: appends the column, then zeros."""
    return torch.cat([value, F.pad(column[:, :, None], (0, DECAY_COLUMNS - 1))], dim=2)
