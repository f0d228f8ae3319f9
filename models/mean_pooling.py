"""Mean pooling, a baseline: a history is the mean of its items, regardless of their order and number, and of the
candidate.

    user_B = W mean(item rows of the history)        logit = <user_B, item> / sqrt(C) + popularity(item)

With a prior popularity is its part, and user_B starts at 0.

The letters are those of models/interface.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.interface import ModelInput, Recommender
from models.tower_settings import MeanPoolingConfig


class MeanPooling(Recommender):
    """The tower. `num_features` is F, the number of item features of the tables."""

    def __init__(self, config: MeanPoolingConfig, *, num_features: int) -> None:
        super().__init__()
        self.config = config
        self.item = nn.Linear(config.width * (1 + num_features), config.width, bias=False)
        self.norm = nn.LayerNorm(config.width)
        self.user = nn.Linear(config.width, config.width, bias=False)
        self.popularity = None if config.prior else nn.Linear(config.width, 1)
        if config.prior:
            nn.init.zeros_(self.user.weight)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, inputs: ModelInput) -> Tensor:
        rows = torch.cat([inputs.item_IC[:, None], inputs.features_IFC], 1).flatten(1)
        item_IC = self.norm(self.item(rows.to(self.item.weight.dtype)))
        user_BC = self.user(self.dropout(history_mean(item_IC, inputs)))
        request_M = torch.repeat_interleave(inputs.candidate_offsets_B1.diff()).to(item_IC.device, non_blocking=True)
        candidate_MC = F.embedding(inputs.candidate_item_M, item_IC)
        agreement_M = (F.embedding(request_M, user_BC) * candidate_MC).sum(-1) / math.sqrt(self.config.width)
        if self.popularity is None:
            return agreement_M.float()
        return (agreement_M + F.embedding(inputs.candidate_item_M, self.popularity(item_IC)).squeeze(-1)).float()


def history_mean(item_IC: Tensor, inputs: ModelInput) -> Tensor:
    """mean_BC of the items before each request, from one cumulative sum over all users; zero for an empty history.

    The sum is in float64: a history's sum is the difference of two of its rows, which contain all earlier users too.
    """
    sum_NC = F.embedding(inputs.event_item_N, item_IC).double().cumsum(0)
    sum_N1C = torch.cat([sum_NC.new_zeros(1, sum_NC.shape[1]), sum_NC])
    start_B = inputs.event_offsets_U1[inputs.request_user_B]
    stop_B, start_B, length_B = (
        index.to(item_IC.device, non_blocking=True)
        for index in (start_B + inputs.request_position_B, start_B, inputs.request_position_B.clamp_min(1))
    )
    total_BC = F.embedding(stop_B, sum_N1C) - F.embedding(start_B, sum_N1C)
    return (total_BC / length_B[:, None]).to(item_IC.dtype)
