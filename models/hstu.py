"""HSTU: pointwise attention, gate and transformation in one block (arXiv 2402.17152, section 3).

    [U, V, Q, K] = SiLU(W_1 LN(x))
    A[n, j] = SiLU(Q_n . K_j + position bias(n - j) + time bias(t_n - t_j)) / L        j <= n, per head
    x += W_2 dropout(LN(A V) * U) + b_2

There is no softmax, so the output keeps how much of the history matches a query, not only which part. L is max_length
for any number of events. From the authors' public code for MovieLens: norms without weights, biases shared by the
heads, time buckets of log(seconds) / 0.301 up to 128, and absolute positions at the input (the paper has only the
relative bias; `absolute_positions` switches them off). Differences: here t_n is the time of event n, there that of the
next event, which a state must not know here; here the result is layer-normalised, there the result and the items are
scaled to length 1 and the logit is divided by 0.05.
The letters are those of models/interface.py and models/sequence_tower.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.interface import ModelInput
from models.sequence_settings import HstuConfig
from models.sequence_tower import INITIAL_STD, Positions, SequenceModel, Windows

HSTU_NORM_EPS = 1e-6
NUM_TIME_BUCKETS = 129
LOG_SECONDS_PER_BUCKET = 0.301
MS_PER_SECOND = 1000


class Hstu(SequenceModel):
    """The tower. `num_features` is F, the number of item features of the tables."""

    def __init__(self, config: HstuConfig, *, num_features: int = 0) -> None:
        super().__init__(config, num_features=num_features)
        self.config = config
        self.position = Positions(config) if config.absolute_positions else None
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(HstuLayer(config) for _ in range(config.num_layers))

    def encode(self, vector_KTD: Tensor, *, windows: Windows, inputs: ModelInput) -> Tensor:
        num_positions, width = vector_KTD.shape[1:]
        state_KTD = vector_KTD * math.sqrt(width)
        if self.position is not None:
            state_KTD = state_KTD + self.position(num_positions)
        state_KTD = self.dropout(state_KTD)
        bucket_KTT = time_buckets(windows.times(inputs)) if self.config.time_bias else None
        for layer in self.layers:
            state_KTD = layer(state_KTD, bucket_KTT)
        return F.layer_norm(state_KTD, (width,), eps=HSTU_NORM_EPS)


class HstuLayer(nn.Module):
    """One block of HSTU."""

    def __init__(self, config: HstuConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads, self.max_length = config.num_heads, config.max_length
        self.sides = nn.Linear(width, 4 * width, bias=False)
        nn.init.normal_(self.sides.weight, std=INITIAL_STD)
        self.output = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.output.weight)
        self.dropout = nn.Dropout(config.dropout)
        self.position_L = nn.Parameter(torch.randn(config.max_length) * INITIAL_STD)
        self.time = nn.Parameter(torch.randn(NUM_TIME_BUCKETS) * INITIAL_STD) if config.time_bias else None

    def forward(self, state_KTD: Tensor, bucket_KTT: Tensor | None) -> Tensor:
        num_positions, width = state_KTD.shape[1:]
        normed_KTD = F.layer_norm(state_KTD, (width,), eps=HSTU_NORM_EPS)
        gate_KTD, value_KTD, query_KTD, key_KTD = F.silu(self.sides(normed_KTD)).chunk(4, dim=2)
        value_KHTd, query_KHTd, key_KHTd = (
            side_KTD.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for side_KTD in (value_KTD, query_KTD, key_KTD)
        )
        place_T = torch.arange(num_positions, device=state_KTD.device)
        age_TT = place_T[:, None] - place_T
        bias_KTT = self.position_L[age_TT.clamp_min(0)][None]
        if self.time is not None and bucket_KTT is not None:
            bias_KTT = bias_KTT + F.embedding(bucket_KTT, self.time[:, None]).squeeze(-1)
        score_KHTT = query_KHTd @ key_KHTd.mT + bias_KTT[:, None]
        weight_KHTT = (F.silu(score_KHTT) / self.max_length).tril()
        found_KTD = (weight_KHTT @ value_KHTd).transpose(1, 2).flatten(2)
        found_KTD = F.layer_norm(found_KTD, (width,), eps=HSTU_NORM_EPS)
        return state_KTD + self.output(self.dropout(found_KTD * gate_KTD))


def time_buckets(time_KT: Tensor) -> Tensor:
    """[K, T, T] int64: the bucket of t_n - t_j; times are milliseconds."""
    seconds_KTT = ((time_KT[:, :, None] - time_KT[:, None, :]).abs() / MS_PER_SECOND).clamp_min(1)
    return (seconds_KTT.log() / LOG_SECONDS_PER_BUCKET).long().clamp_max(NUM_TIME_BUCKETS - 1)
