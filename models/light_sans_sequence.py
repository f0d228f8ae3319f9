"""LightSANs: self-attention from items to R interests, with positions decoupled from items (SIGIR 2021).

    x = dropout(LN(event rows)),  p = LN(position)                                                  per layer:
    O_h = softmax_R(Q_h P(K)_h^T / sqrt(d)) P(V)_h + softmax_j(Q^p_h K^p_h^T / sqrt(d)) V_h
    P(K) = softmax_j(K Theta_K)^T K,   P(V) = softmax_j(V Theta_V)^T V                           R x D, before the heads
    x = LN(x + dropout(O W_O + b_O));  x = LN(x + MLP(x))                                           4 D, GELU

published  j runs over all L = max_length positions, including padding, and every prefix is a separate sample, read at
           its last event. A public implementation takes the item softmax over the queries; in the paper and here it is
           over the interests.
causal     j runs over the events up to n: every position has its own interests, from two running sums in float64. This
           form is ours.

models/light_sans.py uses the same pooling, read by candidates. The position part costs T x T in both forms.
The letters are those of models/interface.py and models/sequence_tower.py; R counts interests, d = D / H.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.interface import ModelInput
from models.sequence_settings import LightSansSequenceConfig
from models.sequence_tower import (
    Positions,
    SequenceModel,
    TransformerLayer,
    Windows,
    draw_weights,
)

LIGHT_SANS_NORM_EPS = 1e-12


class LightSansSequence(SequenceModel):
    """The tower. `num_features` is F, the number of item features of the tables."""

    def __init__(self, config: LightSansSequenceConfig, *, num_features: int = 0) -> None:
        super().__init__(config, num_features=num_features)
        self.causal = config.causal
        self.norm = nn.LayerNorm(config.width, eps=LIGHT_SANS_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.position = Positions(config)
        self.layers = nn.ModuleList(LightSansLayer(config) for _ in range(config.num_layers))
        self.apply(draw_weights)

    def encode(self, vector_KTD: Tensor, *, windows: Windows, inputs: ModelInput) -> Tensor:
        state_KTD = self.dropout(self.norm(vector_KTD))
        position_TD = self.position(vector_KTD.shape[1])
        for layer in self.layers:
            state_KTD = layer(state_KTD, position_TD)
        return state_KTD


class LightSansLayer(TransformerLayer):
    """Attention to interests and to positions, and a feed-forward network."""

    def __init__(self, config: LightSansSequenceConfig) -> None:
        super().__init__(config, norm_eps=LIGHT_SANS_NORM_EPS)
        width = config.width
        self.causal = config.causal
        self.query_key_value = nn.Linear(width, 3 * width)
        self.key_pool = nn.Linear(width, config.num_interests, bias=False)
        self.value_pool = nn.Linear(width, config.num_interests, bias=False)
        self.position_norm = nn.LayerNorm(width, eps=LIGHT_SANS_NORM_EPS)
        self.position_query_key = nn.Linear(width, 2 * width)

    def forward(self, state_KTD: Tensor, position_TD: Tensor) -> Tensor:
        # Attend to the interests.
        query_KTD, key_KTD, value_KTD = self.query_key_value(state_KTD).chunk(3, dim=2)
        pool = pooled_so_far if self.causal else pooled_over_all
        # [K, T or 1, R, D]: the interests that a position reads.
        key_KTRD = pool(self.key_pool(key_KTD), key_KTD)
        value_KTRD = pool(self.value_pool(value_KTD), value_KTD)
        scale = math.sqrt(state_KTD.shape[2] // self.num_heads)
        query_KTHd = self._heads(query_KTD)
        score_KTHR = (query_KTHd[:, :, :, None] * self._heads(key_KTRD).transpose(2, 3)).sum(4) / scale
        weight_KTHR = torch.softmax(score_KTHR, 3)
        found_KTHd = (weight_KTHR[..., None, :] @ self._heads(value_KTRD).transpose(2, 3)).squeeze(3)
        # Attend to the positions.
        query_THd, key_THd = (
            self._heads(side_TD) for side_TD in self.position_query_key(self.position_norm(position_TD)).chunk(2, dim=1)
        )
        score_HTT = torch.einsum("nhd,jhd->hnj", query_THd, key_THd) / scale
        if self.causal:
            later_TT = torch.ones_like(score_HTT[0], dtype=torch.bool).triu(1)
            score_HTT = score_HTT.masked_fill(later_TT, -torch.inf)
        placed_KTHd = torch.einsum("hnj,kjhd->knhd", torch.softmax(score_HTT, 2), self._heads(value_KTD))
        return self.finish(state_KTD, (found_KTHd + placed_KTHd).flatten(2))

    def _heads(self, value: Tensor) -> Tensor:
        return value.unflatten(-1, (self.num_heads, -1))


def pooled_over_all(score_KTR: Tensor, value_KTD: Tensor) -> Tensor:
    """interest_K1RD: the mean of the window's positions weighted by the softmax of each column of scores."""
    return (torch.softmax(score_KTR, 1).mT @ value_KTD)[:, None]


def pooled_so_far(score_KTR: Tensor, value_KTD: Tensor) -> Tensor:
    """interest_KTRD: for each position, the same mean over the positions up to it.

    Scores are taken relative to the window's largest. If all scores up to a position are 700 below it, float64
    underflows.
    """
    weight_KTR = (score_KTR.double() - score_KTR.detach().double().amax(1, keepdim=True)).exp()
    mass_KTR1 = weight_KTR.cumsum(1)[..., None].clamp_min(torch.finfo(torch.float64).tiny)
    sum_KTRD = (weight_KTR[..., None] * value_KTD.double()[:, :, None]).cumsum(1)
    return (sum_KTRD / mass_KTR1).to(value_KTD.dtype)
