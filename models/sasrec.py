"""SASRec: causal softmax self-attention (arXiv 1808.09781), in the form that its implementations share.

    x = dropout(sqrt(D) event rows + position)                     per layer:
    q = LN(x);  x = q + W_O softmax_causal(W_Q q (W_K x)^T / sqrt(d)) W_V x
    h = LN(x);  x = h + FFN(h),  FFN = W_2 ReLU(W_1 h), D units        state = LN(x)

Published: queries are normalised, keys and values are not, and residuals start from the normalised vectors. The output
map W_O is that of common PyTorch code; the authors' code has none. Positions count from the window's start (in the
authors' code from its end, which makes a state depend on where the window stops), so later events do not change a
state.
The letters are those of models/interface.py and models/sequence_tower.py.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from models.interface import ModelInput
from models.sequence_settings import SasRecConfig
from models.sequence_tower import FeedForward, Positions, SequenceModel, Windows, draw_weights

SASREC_NORM_EPS = 1e-8


class SasRec(SequenceModel):
    """The tower. `num_features` is F, the number of item features of the tables."""

    def __init__(self, config: SasRecConfig, *, num_features: int = 0) -> None:
        super().__init__(config, num_features=num_features)
        self.position = Positions(config)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(SasRecLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width, eps=SASREC_NORM_EPS)
        self.apply(draw_weights)

    def encode(self, vector_KTD: Tensor, *, windows: Windows, inputs: ModelInput) -> Tensor:
        num_positions, width = vector_KTD.shape[1:]
        state_KTD = self.dropout(vector_KTD * math.sqrt(width) + self.position(num_positions))
        for layer in self.layers:
            state_KTD = layer(state_KTD)
        return self.norm(state_KTD)


class SasRecLayer(nn.Module):
    """Attention and feed-forward network."""

    def __init__(self, config: SasRecConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.query_norm = nn.LayerNorm(width, eps=SASREC_NORM_EPS)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=SASREC_NORM_EPS)
        self.mlp = FeedForward(width, hidden=width, activation=nn.ReLU(), dropout=config.dropout)

    def forward(self, state_KTD: Tensor) -> Tensor:
        normed_KTD = self.query_norm(state_KTD)
        query_KHTd, key_KHTd, value_KHTd = (
            side_KTD.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for side_KTD in (self.query(normed_KTD), *self.key_value(state_KTD).chunk(2, dim=2))
        )
        found_KHTd = F.scaled_dot_product_attention(
            query_KHTd, key_KHTd, value_KHTd, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        state_KTD = normed_KTD + self.output(found_KHTd.transpose(1, 2).flatten(2))
        hidden_KTD = self.mlp_norm(state_KTD)
        return hidden_KTD + self.mlp(hidden_KTD)
