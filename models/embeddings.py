"""The sparse part: one TorchRec table for item ids and one for each item or user feature, looked up once per step.

    items of the batch [7, 9]; genres of 7 = [2, 5], of 9 = []; one user, with gender 3

    KeyedJaggedTensor   item         values [7, 9]   lengths [1, 1, 0]
                        genres       values [2, 5]   lengths [2, 0, 0]
                        user-gender  values [3]      lengths [0, 0, 1]

An item occurs once in a look-up, however many events and candidates refer to it; a ModelInput (models/interface.py)
refers to the rows by index. jobs/training/tables.py shards the collection over the ranks.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchrec.modules.embedding_modules import EmbeddingCollection
    from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

ITEM_TABLE = "item"
USER_TABLE = "user-"
"""Prefix of the name of a user feature's table."""


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
        """(values, lengths_I) of these items, item by item."""
        starts_I = self.offsets[item_rows_I]
        lengths_I = self.offsets[item_rows_I + 1] - starts_I
        ends_I = lengths_I.cumsum(0)
        within = torch.arange(int(lengths_I.sum())) - torch.repeat_interleave(ends_I - lengths_I, lengths_I)
        return self.values[torch.repeat_interleave(starts_I, lengths_I) + within], lengths_I


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserCodes:
    """The feature values of U users: rows of G tables, any number per user and feature."""

    lengths_UG: Tensor
    """[U, G] int64."""
    values: Tensor
    """[lengths_UG.sum()] int64, by user and then by feature."""

    @classmethod
    def of_nobody(cls, num_features: int) -> UserCodes:
        """The codes of zero users, with `num_features` features."""
        none = torch.zeros(0, dtype=torch.int64)
        return cls(lengths_UG=none.new_zeros(0, num_features), values=none)

    def of(self, feature: int) -> tuple[Tensor, Tensor]:
        """(values, lengths_U) of one feature, user by user."""
        cells = torch.arange(self.lengths_UG.numel(), device=self.values.device) % max(1, self.lengths_UG.shape[1])
        mine = torch.repeat_interleave(cells, self.lengths_UG.flatten()) == feature
        return self.values[mine], self.lengths_UG[:, feature]


def embedding_collection(tables: Sequence[TableSpec], *, device: str = "meta") -> EmbeddingCollection:
    """Unsharded tables; on the meta device they take no memory until they are sharded."""
    # Imported here because most commands only read a configuration, and TorchRec takes 2.5 s to import.
    from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
    from torchrec.modules.embedding_modules import EmbeddingCollection

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


class EmbeddingCollections(nn.Module):
    """Unsharded tables of any widths: one TorchRec collection per width, since a collection's tables have one width."""

    def __init__(self, tables: Sequence[TableSpec], *, device: str = "meta") -> None:
        super().__init__()
        self._of_width: dict[str, list[TableSpec]] = {}
        for table in tables:
            self._of_width.setdefault(str(table.width), []).append(table)
        self.collections = nn.ModuleDict(
            {width: embedding_collection(same_width, device=device) for width, same_width in self._of_width.items()}
        )

    def parts(self, ids: KeyedJaggedTensor) -> Iterator[tuple[Any, KeyedJaggedTensor]]:
        """(collection, the ids of its tables) for each collection, sharded or not."""
        places = {table: place for place, table in enumerate(ids.keys())}
        for width, same_width in self._of_width.items():
            mine = [places[table.name] for table in same_width]
            yield self.collections[width], ids if len(mine) == len(places) else ids.permute(mine)


def look_up_ids(
    item_rows_I: Tensor,
    features: Sequence[ItemFeature],
    *,
    user_tables: Sequence[str] = (),
    users: UserCodes | None = None,
) -> KeyedJaggedTensor:
    """The ids of one step for every table, as drawn above; `user_tables` names the tables of the columns of `users`."""
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    if users is None or not user_tables:
        users = UserCodes.of_nobody(len(user_tables))
    num_items, num_users = item_rows_I.numel(), users.lengths_UG.shape[0]
    keys, values = [ITEM_TABLE], [item_rows_I]
    lengths = [torch.ones_like(item_rows_I), item_rows_I.new_zeros(num_users)]
    for feature in features:
        feature_values, feature_lengths_I = feature.of(item_rows_I)
        keys.append(feature.name)
        values.append(feature_values)
        lengths += [feature_lengths_I, item_rows_I.new_zeros(num_users)]
    for place, table in enumerate(user_tables):
        user_values, lengths_U = users.of(place)
        keys.append(table)
        values.append(user_values)
        lengths += [item_rows_I.new_zeros(num_items), lengths_U]
    return KeyedJaggedTensor.from_lengths_sync(keys=keys, values=torch.cat(values), lengths=torch.cat(lengths))


def pool_features(rows: Mapping[str, JaggedTensor], features: Sequence[ItemFeature]) -> tuple[Tensor, Tensor]:
    """(item_IC, features_IFC) of a finished look-up: feature rows averaged per item, zero where there are none.

    Rows of a table narrower than C are padded with zeros, which do not change the result of a tower's linear map.
    """
    item_IC = rows[ITEM_TABLE].values()
    num_items = item_IC.shape[0]
    return item_IC, _mean_rows(rows, [f.name for f in features], first=0, num=num_items, like=item_IC)


def pool_user_features(rows: Mapping[str, JaggedTensor], user_tables: Sequence[str]) -> Tensor:
    """user_features_UGC of the same look-up."""
    item_IC = rows[ITEM_TABLE].values()
    num_users = rows[ITEM_TABLE].lengths().numel() - item_IC.shape[0]
    return _mean_rows(rows, user_tables, first=item_IC.shape[0], num=num_users, like=item_IC)


def _mean_rows(
    rows: Mapping[str, JaggedTensor], tables: Sequence[str], *, first: int, num: int, like: Tensor
) -> Tensor:
    """[num, tables, C]: the mean row of each table for `num` entries of the look-up from `first` on."""
    if not tables:
        return like.new_zeros(num, 0, like.shape[1])
    pooled = []
    for table in tables:
        lengths = rows[table].lengths()[first : first + num]
        owner = torch.repeat_interleave(torch.arange(num, device=lengths.device), lengths)
        values = rows[table].values()
        total = like.new_zeros(num, values.shape[1]).index_add(0, owner, values)
        pooled.append(F.pad(total / lengths.clamp(min=1).unsqueeze(1), (0, like.shape[1] - values.shape[1])))
    return torch.stack(pooled, dim=1)


def initial_rows(table: str, *, seed: int, first: int, num_rows: int, width: int, std: float) -> Tensor:
    """[num_rows, width] float32 ~ N(0, std^2): rows `first`.. of a table, a function of only (seed, table, row).

    A row starts with the same values at any world size, on whichever rank owns it, and also in a table that grew later.
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
