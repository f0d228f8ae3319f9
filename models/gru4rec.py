"""GRU4Rec: a gated recurrent unit reads the events one after the other (arXiv 1511.06939).

    h_n = GRU(dropout(event row_n), h_{n-1})        state = W h_n + b

Published: the recurrence. The use of item rows both as inputs and in the logit, and the map back to their width, are
those of today's implementations (the authors' model reads one-hot items and has a separate output layer). Losses and
negatives are not part of the model but of the training.
The letters are those of models/interface.py and models/sequence_tower.py.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.interface import ModelInput
from models.sequence_settings import Gru4RecConfig
from models.sequence_tower import SequenceModel, Windows


class Gru4Rec(SequenceModel):
    """The tower. `num_features` is F, the number of item features of the tables."""

    def __init__(self, config: Gru4RecConfig, *, num_features: int = 0) -> None:
        super().__init__(config, num_features=num_features)
        self.dropout = nn.Dropout(config.dropout)
        self.recurrence = nn.GRU(config.width, config.hidden_width, num_layers=config.num_layers, batch_first=True)
        self.output = nn.Linear(config.hidden_width, config.width)

    def encode(self, vector_KTD: Tensor, *, windows: Windows, inputs: ModelInput) -> Tensor:
        hidden_KTX, _ = self.recurrence(self.dropout(vector_KTD))
        return self.output(hidden_KTX)
