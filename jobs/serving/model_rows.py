"""Rows of a data set's vocabulary -> rows of a registered model, whose vocabulary may be another."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from jobs.scorer.histories import UserFeature
from jobs.scorer.scorer import Scorer
from pipeline.shards.sequences import UserCodes
from pipeline.shards.vocabulary import NUM_RESERVED, Vocabulary


class ModelRows:
    """Items matched by raw id, actions and values of user features by name; what the model does not know becomes its
    unknown row, or no action."""

    def __init__(self, scorer: Scorer, vocabulary: Vocabulary) -> None:
        raw = vocabulary.raw(np.arange(NUM_RESERVED, vocabulary.size))
        self.item = np.concatenate([np.arange(NUM_RESERVED), scorer.rows(raw)])
        """[vocabulary size] the model's row of each row of the data set."""
        self.action = scorer.codes(pa.array(vocabulary.actions, pa.large_string()))
        """[actions] the model's code of each action code of the data set."""
        self._users = [
            (list(vocabulary.user_features).index(name), _value_rows(scorer, name, vocabulary.user_features[name]))
            if name in vocabulary.user_features
            else None
            for name in scorer.user_features
        ]

    def users(self, codes: UserCodes | None, *, known: np.ndarray) -> tuple[UserFeature, ...]:
        """The model's user features of requests [B]; `codes` are those of the data set for the `known` ones of them."""
        found = []
        for place_and_rows in self._users:
            lengths, row = np.zeros(len(known), np.int64), np.zeros(0, np.int64)
            if place_and_rows is not None and codes is not None:
                place, rows = place_and_rows
                cells = np.arange(codes.lengths.size) % codes.lengths.shape[1]
                lengths[known] = codes.lengths[:, place]
                row = rows[codes.values[np.repeat(cells, codes.lengths.ravel()) == place]]
            found.append(UserFeature(lengths=lengths, row=row))
        return tuple(found)


def _value_rows(scorer: Scorer, name: str, values: tuple[str, ...]) -> np.ndarray:
    """The model's row of each row of a data set's user feature."""
    return np.concatenate([np.arange(NUM_RESERVED), scorer.value_rows(name, pa.array(values, pa.large_string()))])
