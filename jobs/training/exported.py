"""A registered model's export on the evaluation side: tower, item rows, items, and how often each was trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from safetensors.torch import load_file
from torch import Tensor

from jobs.scorer import Scorer
from models.interface import Recommender
from pipeline.events import DataError
from pipeline.vocabulary import Vocabulary


class LoadedRows:
    """The item rows of a model that is whole in memory, behind the look-up of sharded tables."""

    def __init__(self, item_IC: Tensor, features_IFC: Tensor) -> None:
        self._item_IC, self._features_IFC = item_IC, features_IFC

    def look_up(self, item_rows_I: Tensor, /) -> tuple[Tensor, Tensor]:
        """(item_IC, features_IFC); not a collective."""
        return self._item_IC[item_rows_I], self._features_IFC[item_rows_I]


def load_export(directory: Path) -> tuple[Recommender, LoadedRows, Vocabulary, np.ndarray]:
    """(tower, item rows, vocabulary without features, [I] positives of its training requests)."""
    scorer = Scorer()
    scorer.load(directory)
    counts = directory / "item-counts.safetensors"
    if not counts.exists():
        raise DataError(f"{counts}: missing, the model was registered by an earlier version: register it again")
    items = pq.read_table(directory / "items.parquet", columns=["item_id"])["item_id"].combine_chunks()
    vocabulary = Vocabulary(items=items, actions=tuple(scorer.settings["actions"]), features={})
    return (
        scorer.tower,
        LoadedRows(scorer.item_IC, scorer.features_IFC),
        vocabulary,
        load_file(counts)["training_events"].numpy(),
    )
