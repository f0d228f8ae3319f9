"""LinRec: self-attention without a softmax, normalised by row and by column (arXiv 2411.01537).

    x = dropout(LN(event rows + position))                                per layer:
    O_h = elu(Q) / |elu(Q)|_row (elu(K) / |elu(K)|_column)^T V / sqrt(d)
    x = LN(x + dropout(O W_O + b_O));  x = LN(x + MLP(x))                 4 D, GELU

published  the columns of K run over all L = max_length positions, including padding, and every prefix is a separate
           sample, read at its last event. The paper inserts this attention into other models; the layer around it and
           the 1/sqrt(d) are those of its public code.
causal     column norms and K^T V run over the events up to n: all prefixes of a window in one pass. This form is ours;
           the column norms at n are a vector that divides the query, which needs one more running sum.

The letters are those of models/interface.py and models/sequence_tower.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.interface import ModelInput
from models.running_attention import join_heads, running_attention, split_heads
from models.sequence_settings import LinRecConfig
from models.sequence_tower import (
    Positions,
    SequenceModel,
    TransformerLayer,
    Windows,
    draw_weights,
)

LINREC_NORM_EPS = 1e-12
LENGTH_EPS = 1e-6
"""Lower bound of the norm of a row or column in a division; the public code has no such bound."""


class LinRec(SequenceModel):
    """The tower. `num_features` is F, the number of item features of the tables."""

    def __init__(self, config: LinRecConfig, *, num_features: int = 0) -> None:
        super().__init__(config, num_features=num_features)
        self.causal = config.causal
        self.position = Positions(config)
        self.norm = nn.LayerNorm(config.width, eps=LINREC_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(LinRecLayer(config) for _ in range(config.num_layers))
        self.apply(draw_weights)

    def encode(self, vector_KTD: Tensor, *, windows: Windows, inputs: ModelInput) -> Tensor:
        state_KTD = self.dropout(self.norm(vector_KTD + self.position(vector_KTD.shape[1])))
        for layer in self.layers:
            state_KTD = layer(state_KTD)
        return state_KTD


class LinRecLayer(TransformerLayer):
    """Attention and feed-forward network, each followed by a residual sum and a norm."""

    def __init__(self, config: LinRecConfig) -> None:
        super().__init__(config, norm_eps=LINREC_NORM_EPS)
        self.causal = config.causal
        self.query_key_value = nn.Linear(config.width, 3 * config.width)

    def forward(self, state_KTD: Tensor) -> Tensor:
        # Sums over a history need more precision than bfloat16 has.
        sides_KTD = self.query_key_value(state_KTD).to(torch.promote_types(state_KTD.dtype, torch.float32))
        query_XTd, key_XTd, value_XTd = (
            split_heads(side_KTD, self.num_heads) for side_KTD in sides_KTD.chunk(3, dim=2)
        )
        query_XTd, key_XTd = F.normalize(F.elu(query_XTd), dim=2, eps=LENGTH_EPS), F.elu(key_XTd)
        if self.causal:
            length_XTd = (key_XTd.square().cumsum(1) + LENGTH_EPS**2).sqrt()
            found_XTd = running_attention(query_XTd / length_XTd, key_XTD=key_XTd, value_XTV=value_XTd)
        else:
            found_XTd = query_XTd @ (F.normalize(key_XTd, dim=1, eps=LENGTH_EPS).mT @ value_XTd)
        found_XTd = found_XTd / math.sqrt(value_XTd.shape[2])
        return self.finish(state_KTD, join_heads(found_XTd, self.num_heads).to(state_KTD.dtype))
