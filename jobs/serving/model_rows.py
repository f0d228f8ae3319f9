"""Maps rows of a data set's vocabulary to rows of a registered model, which may have another vocabulary."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from jobs.scorer.histories import UserFeature
from jobs.scorer.scorer import Scorer
from pipeline.shards.sequences import UserCodes
from pipeline.shards.vocabulary import NUM_RESERVED, Vocabulary


class ModelRows:
    """The mapping: items are matched by raw id, actions and values of user features by name. Items and values that the
    model does not know get its unknown row, unknown actions code 0."""

    def __init__(self, scorer: Scorer, vocabulary: Vocabulary) -> None:
        raw = vocabulary.raw(np.arange(NUM_RESERVED, vocabulary.size))
        self.item = np.concatenate([np.arange(NUM_RESERVED), scorer.rows(raw)])
        """[vocabulary size] the model's row for each row of the data set."""
        self.action = scorer.codes(pa.array(vocabulary.actions, pa.large_string()))
        """[actions] the model's code for each action code of the data set."""
        self._users = [
            (list(vocabulary.user_features).index(name), _value_rows(scorer, name, vocabulary.user_features[name]))
            if name in vocabulary.user_features
            else None
            for name in scorer.user_features
        ]

    def users(self, codes: UserCodes | None, *, known: np.ndarray) -> tuple[UserFeature, ...]:
        """The model's user features of requests [B]; `codes`: the data set's codes for the requests in `known` [B]."""
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
    """The model's row for each row of a data set's user feature."""
    return np.concatenate([np.arange(NUM_RESERVED), scorer.value_rows(name, pa.array(values, pa.large_string()))])
