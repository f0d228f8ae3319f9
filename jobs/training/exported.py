"""Loads a registered model's export for evaluation: tower, item rows, items, and each item's number of training
positives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from safetensors.torch import load_file
from torch import Tensor

from jobs.scorer.checksums import DamagedModel
from jobs.scorer.histories import UserFeature
from jobs.scorer.scorer import Scorer, user_vectors
from models.embeddings import UserCodes
from models.interface import Recommender
from pipeline.events import DataError
from pipeline.shards.vocabulary import Vocabulary


class LoadedRows:
    """The rows of a model that is completely in memory, with the look-up interface of sharded tables."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def look_up(self, item_rows_I: Tensor, /) -> tuple[Tensor, Tensor]:
        """(item_IC, features_IFC); not a collective."""
        return self._scorer.item_IC[item_rows_I], self._scorer.features_IFC[item_rows_I]

    def look_up_with_users(self, item_rows_I: Tensor, users: UserCodes, /) -> tuple[Tensor, Tensor, Tensor]:
        """(item_IC, features_IFC, user_features_UGC); not a collective."""
        tables = self._scorer.user_tables
        found = [users.of(place) for place in range(len(tables))]
        features = tuple(UserFeature(lengths=lengths.numpy(), row=row.numpy()) for row, lengths in found)
        num_users = users.lengths_UG.shape[0]
        item_IC, features_IFC = self.look_up(item_rows_I)
        return item_IC, features_IFC, user_vectors(tables, features, num_users=num_users, like=item_IC)


def load_export(directory: Path) -> tuple[Recommender, LoadedRows, Vocabulary, np.ndarray]:
    """(tower, rows, vocabulary without item features, [I] how often each item is a positive of a training request).

    DataError: a file is damaged, or an earlier version registered the model without what is needed here."""
    scorer = Scorer()
    try:
        scorer.load(directory)
    except DamagedModel as error:
        raise DataError(str(error)) from error
    counts = directory / "item-counts.safetensors"
    if not counts.exists():
        raise DataError(f"{counts}: missing, the model was registered by an earlier version: register it again")
    items = pq.read_table(directory / "items.parquet", columns=["item_id"])["item_id"].combine_chunks()
    vocabulary = Vocabulary(
        items=items,
        actions=tuple(scorer.settings["actions"]),
        features={},
        user_features={name: tuple(values) for name, values in scorer.user_values.items()},
    )
    return scorer.tower, LoadedRows(scorer), vocabulary, load_file(counts)["training_events"].numpy()
