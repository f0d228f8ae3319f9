"""The sparse part: one TorchRec table for item ids and one per item feature, looked up once per step.

    items of the batch [7, 9]; genres of 7 = [2, 5], of 9 = []

    KeyedJaggedTensor   item    values [7, 9]   lengths [1, 1]
                        genres  values [2, 5]   lengths [2, 0]

An item occurs once in a look-up however many events and candidates name it; models/interface.py points into the rows
by index. jobs/training/parallel.py shards the collection over the ranks.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

ITEM_TABLE = "item"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableSpec:
    """One embedding table: `capacity` rows of `width` float32."""

    name: str
    capacity: int
    width: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ItemFeature:
    """The values of one item feature as rows of its own table.

    `offsets` [item rows + 1] int64 and `values` [all values] int64: item row i has values[offsets[i] : offsets[i + 1]].
    """

    name: str
    offsets: Tensor
    values: Tensor

    def of(self, item_rows_I: Tensor) -> tuple[Tensor, Tensor]:
        """(values, lengths_I) of the named items, item by item."""
        starts_I = self.offsets[item_rows_I]
        lengths_I = self.offsets[item_rows_I + 1] - starts_I
        ends_I = lengths_I.cumsum(0)
        within = torch.arange(int(lengths_I.sum())) - torch.repeat_interleave(ends_I - lengths_I, lengths_I)
        return self.values[torch.repeat_interleave(starts_I, lengths_I) + within], lengths_I


def embedding_collection(tables: Sequence[TableSpec], *, device: str = "meta") -> EmbeddingCollection:
    """Unsharded tables; on the meta device they cost nothing until they are sharded."""
    configs = [
        EmbeddingConfig(
            name=table.name,
            num_embeddings=table.capacity,
            embedding_dim=table.width,
            feature_names=[table.name],
            data_type=DataType.FP32,
        )
        for table in tables
    ]
    return EmbeddingCollection(tables=configs, device=torch.device(device))


def look_up_ids(item_rows_I: Tensor, features: Sequence[ItemFeature]) -> KeyedJaggedTensor:
    """The ids of one step for every table, as drawn above."""
    keys, values, lengths = [ITEM_TABLE], [item_rows_I], [torch.ones_like(item_rows_I)]
    for feature in features:
        feature_values, feature_lengths_I = feature.of(item_rows_I)
        keys.append(feature.name)
        values.append(feature_values)
        lengths.append(feature_lengths_I)
    return KeyedJaggedTensor.from_lengths_sync(keys=keys, values=torch.cat(values), lengths=torch.cat(lengths))


def pool_features(rows: Mapping[str, JaggedTensor], features: Sequence[ItemFeature]) -> tuple[Tensor, Tensor]:
    """(item_IC, features_IFC) of a finished look-up: feature rows averaged per item, zero where there are none."""
    item_IC = rows[ITEM_TABLE].values()
    if not features:
        return item_IC, item_IC.new_zeros(item_IC.shape[0], 0, item_IC.shape[1])
    pooled = []
    for feature in features:
        jagged = rows[feature.name]
        lengths_I = jagged.lengths()
        owner = torch.repeat_interleave(torch.arange(lengths_I.numel(), device=lengths_I.device), lengths_I)
        sum_IC = torch.zeros_like(item_IC).index_add(0, owner, jagged.values())
        pooled.append(sum_IC / lengths_I.clamp(min=1).unsqueeze(1))
    return item_IC, torch.stack(pooled, dim=1)


def initial_rows(table: str, *, seed: int, first: int, num_rows: int, width: int, std: float) -> Tensor:
    """[num_rows, width] float32 ~ N(0, std^2): rows `first`.. of a table, a function of (seed, table, row) alone.

    Any rank that owns a row, at any world size, and a table that grew later, start that row from the same values.
    Counter-based: splitmix64 of (seed, table, row, column) twice, then Box-Muller.
    """
    key = np.uint64(int.from_bytes(hashlib.blake2b(f"{seed}/{table}".encode(), digest_size=8).digest(), "little"))
    row = np.arange(first, first + num_rows, dtype=np.uint64)[:, None]
    column = np.arange(width, dtype=np.uint64)[None, :]
    with np.errstate(over="ignore"):
        counter = _splitmix64(_splitmix64(row ^ key) + column)
        first_uniform = (_splitmix64(counter) >> np.uint64(11)).astype(np.float64) + 0.5
        second_uniform = (_splitmix64(counter ^ np.uint64(0xA5A5A5A5A5A5A5A5)) >> np.uint64(11)).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log(first_uniform * 2.0**-53))
    normal = radius * np.cos(2.0 * np.pi * second_uniform * 2.0**-53)
    return torch.from_numpy((normal * std).astype(np.float32))


def _splitmix64(value: np.ndarray) -> np.ndarray:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
