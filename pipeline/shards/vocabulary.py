"""Raw item ids, feature values (of items and users) and action names <-> rows of embedding tables.

    table row   0         1         2      3      4    ...            size - 1      ... capacity - 1
                padding   unknown   item   item   item  (append-only)  newest item   unused, masked

Each ingest appends its new ids, sorted; a row never moves, so a table trained yesterday fits today. Tables have
`capacity` rows, which leaves room to grow without a change of shape. Saved as one Parquet file.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.events import DataError

NUM_RESERVED = 2
"""Rows 0 (padding) and 1 (unknown), which are not real values."""
UNKNOWN = 1
_FEW = 8
"""Binary search is used if the vocabulary has at least this many times as many ids as a look-up; else a hash table."""


def capacity_for(size: int) -> int:
    """Rows of a table for `size` used rows: the next power of two above 1.25 x size."""
    return 1 << max(2, int(1.25 * size).bit_length())


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Feature:
    """One categorical item feature, single- or multi-valued: the value rows of each item row."""

    names: tuple[str, ...]
    """Raw values; names[i] has row i + 2."""
    offsets: np.ndarray
    """[vocabulary size + 1] int64: item row r has values[offsets[r] : offsets[r + 1]]."""
    values: np.ndarray
    """int64 value rows."""

    @property
    def size(self) -> int:
        return len(self.names) + NUM_RESERVED

    @property
    def capacity(self) -> int:
        return capacity_for(self.size)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """Immutable; `grow` makes the next one."""

    items: pa.Array
    """Raw ids (int64 or large_string); items[i] has row i + 2."""
    actions: tuple[str, ...]
    """Action names; an action's code is its position here, and code 0, the name "", means no action."""
    features: dict[str, Feature]
    user_features: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """{user feature: its raw values}, features sorted by name; values[i] has row i + 2. Shards hold users' values."""

    @classmethod
    def empty(cls, item_type: str) -> Vocabulary:
        """`item_type`: "int64" or "string"."""
        return cls(items=pa.array([], _ARROW_TYPE[item_type]), actions=("",), features={})

    @property
    def item_type(self) -> str:
        return "int64" if self.items.type == pa.int64() else "string"

    @property
    def size(self) -> int:
        """Rows in use, padding and unknown included."""
        return len(self.items) + NUM_RESERVED

    @property
    def capacity(self) -> int:
        return capacity_for(self.size)

    @property
    def num_actions(self) -> int:
        """Action codes in use, "no action" included."""
        return len(self.actions)

    @functools.cached_property
    def is_featureless(self) -> np.ndarray:
        """[size] bool: table rows without a value of any feature; all of them if there are no features."""
        return sum((np.diff(f.offsets) for f in self.features.values()), np.zeros(self.size, np.int64)) == 0

    @property
    def num_featureless(self) -> int:
        """Number of items among them."""
        return int(self.is_featureless[NUM_RESERVED:].sum())

    @functools.cached_property
    def item_ranks(self) -> np.ndarray:
        """[size] int64: for each table row, the rank of its item in the sorted raw ids."""
        order = pl.Series(self.items, dtype=_POLARS_TYPE[self.item_type]).arg_sort().to_numpy() + NUM_RESERVED
        ranks = np.zeros(self.size, np.int64)
        ranks[order] = np.arange(NUM_RESERVED, self.size)
        return ranks

    @functools.cached_property
    def action_ranks(self) -> np.ndarray:
        """[num_actions] int64: for each code, the rank of its action in the sorted names; no action is first."""
        ranks = np.empty(self.num_actions, np.int64)
        ranks[pl.Series(self.actions, dtype=pl.String).arg_sort().to_numpy()] = np.arange(self.num_actions)
        return ranks

    def rows(self, raw_ids: pa.Array | pl.Series | np.ndarray | Iterable) -> np.ndarray:
        """int64 table rows of raw ids; 1 (unknown) for a null and for an id that the vocabulary does not have."""
        ids = _as_items(raw_ids, self.items.type)
        if len(ids) < len(self.items) // _FEW and self._searchable is not None:
            return self._rows_of_few(ids, *self._searchable)
        places = pc.index_in(ids, value_set=self.items)  # type: ignore[attr-defined]
        return np.asarray(pc.fill_null(places, UNKNOWN - NUM_RESERVED)).astype(np.int64) + NUM_RESERVED  # type: ignore[attr-defined]

    def _rows_of_few(self, ids: pa.Array, keys: np.ndarray, places: np.ndarray) -> np.ndarray:
        found = places[np.minimum(np.searchsorted(keys, _keys(ids)), len(keys) - 1)]
        is_same = pc.fill_null(pc.equal(self.items.take(pa.array(found)), ids), False)  # type: ignore[attr-defined]
        return np.where(np.asarray(is_same), found + NUM_RESERVED, UNKNOWN)

    @functools.cached_property
    def _searchable(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Sorted keys of the items, and the items' positions. Built once, whereas each call of pc.index_in builds a
        hash table of all items. None if two items have the same key.
        """
        keys = _keys(self.items)
        places = np.argsort(keys, kind="stable")
        keys = keys[places]
        return None if (keys[1:] == keys[:-1]).any() else (keys, places)

    def raw(self, rows: np.ndarray) -> pa.Array:
        """Raw ids of table rows; null for padding, unknown and unused rows."""
        places = np.asarray(rows, np.int64) - NUM_RESERVED
        outside = (places < 0) | (places >= len(self.items))
        return self.items.take(pa.array(places, mask=outside))

    def grow(self, items: Iterable, actions: Iterable[str] = ()) -> Vocabulary:
        """A vocabulary that also has these raw ids and actions; new ones are appended, sorted."""
        candidates = _as_items(items, self.items.type).unique().drop_null()
        fresh = candidates.filter(pc.invert(pc.is_in(candidates, value_set=self.items)))  # type: ignore[attr-defined]
        fresh = pl.Series(fresh, dtype=_POLARS_TYPE[self.item_type]).sort().to_arrow().cast(self.items.type)
        new_actions = set(actions) - set(self.actions)
        if not len(fresh) and not new_actions:
            return self
        features = {
            name: dataclasses.replace(
                feature, offsets=np.append(feature.offsets, np.full(len(fresh), feature.offsets[-1], np.int64))
            )
            for name, feature in self.features.items()
        }
        return Vocabulary(
            items=pa.concat_arrays([self.items, fresh]),
            actions=(*self.actions, *sorted(new_actions)),
            features=features,
            user_features=self.user_features,
        )

    def with_user_values(self, values: Mapping[str, Iterable[str]]) -> Vocabulary:
        """A vocabulary that also has these values of user features; new ones are appended, sorted."""
        found = dict(self.user_features)
        for name, raw in values.items():
            old = found.get(name, ())
            found[name] = (*old, *sorted(set(raw) - set(old)))
        return dataclasses.replace(self, user_features=dict(sorted(found.items())))

    def with_features(self, table: pl.DataFrame, *, only_featureless: bool = False) -> Vocabulary:
        """Take item features from a table of item_id and one string or list-of-strings column per feature.

        Items in the table get its values instead of their earlier ones, or with `only_featureless` only if they have
        none; ids that are not in the vocabulary are ignored; if an id occurs several times, its last line counts. New
        values are appended, sorted.
        """
        table = table.unique("item_id", keep="last", maintain_order=True)
        rows = self.rows(table["item_id"])
        known = rows >= NUM_RESERVED
        if only_featureless:
            known &= self.is_featureless[rows]
        features = dict(self.features)
        for name in table.columns:
            if name != "item_id":
                old = features.get(name) or Feature(
                    names=(), offsets=np.zeros(self.size + 1, np.int64), values=np.zeros(0, np.int64)
                )
                features[name] = _replace_values(old, rows[known], table[name].filter(pl.Series(known)))
        return dataclasses.replace(self, features=features)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hexadecimal hash of the content: equal for equal rows, values and order."""
        digest = hashlib.sha256(self.item_type.encode())
        raw = self.items.to_numpy(zero_copy_only=False)
        parts = [raw.tobytes() if self.item_type == "int64" else "\0".join(raw).encode()]
        parts.append(json.dumps(self.actions).encode())
        for name, feature in sorted(self.features.items()):
            parts += [name.encode(), json.dumps(feature.names).encode()]
            parts += [feature.offsets.astype("<i8").tobytes(), feature.values.astype("<i8").tobytes()]
        for name, values in self.user_features.items():
            parts += [f"user:{name}".encode(), json.dumps(values).encode()]
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()[:32]

    def entries(self) -> dict[str, pa.Array]:
        """{kind: raw values in row order, large_string}: "item" (decimal or string form), "action", "value:<item
        feature>", "user:<user feature>"."""
        return {
            "item": self.items.cast(pa.large_string()),
            "action": pa.array(self.actions, pa.large_string()),
            **{f"value:{n}": pa.array(f.names, pa.large_string()) for n, f in sorted(self.features.items())},
            **{f"user:{n}": pa.array(v, pa.large_string()) for n, v in self.user_features.items()},
        }

    def to_bytes(self) -> bytes:
        """The Parquet file: one line per item, action or feature value, in row order within its kind.

        Columns: kind and raw as in `entries`, and for each item feature a list of value rows, "feature:<feature>",
        which is empty except for items. The metadata names the user features.
        """
        kinds = self.entries()
        total = sum(map(len, kinds.values()))
        columns: dict[str, pa.Array] = {
            "kind": pa.array(np.repeat(list(kinds), [len(raw) for raw in kinds.values()]), pa.string()),
            "raw": pa.concat_arrays(list(kinds.values())),
        }
        for name, feature in sorted(self.features.items()):
            offsets = feature.offsets[NUM_RESERVED:]
            padded = np.append(offsets, np.full(total - len(self.items), offsets[-1], np.int64))
            columns[f"feature:{name}"] = pa.LargeListArray.from_arrays(padded, pa.array(feature.values, pa.int64()))
        metadata = {"item_type": self.item_type}
        if self.user_features:
            metadata["user_features"] = json.dumps(list(self.user_features))
        table = pa.table(columns).replace_schema_metadata(metadata)
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", store_schema=True)
        return sink.getvalue()

    def save(self, path: str) -> None:
        with open(path, "wb") as stream:
            stream.write(self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "vocabulary") -> Vocabulary:
        """The saved vocabulary. DataError, naming the file, when it is not one."""
        try:
            table = pq.read_table(io.BytesIO(data))
            metadata = table.schema.metadata or {}
            item_type, user_names = metadata[b"item_type"].decode(), json.loads(metadata.get(b"user_features", b"[]"))
            kinds, raw = pl.Series(table["kind"]), table["raw"].combine_chunks()
        except (pa.ArrowException, OSError, KeyError) as error:
            raise DataError(f"{name}: not a vocabulary file; prepare the data set again") from error
        of_kind = {kind: raw.filter(pa.array((kinds == kind).to_numpy())) for kind in kinds.unique()}
        num_items = len(of_kind.get("item", []))
        features = {}
        for column in table.column_names:
            if column.startswith("feature:"):
                lists = table[column].combine_chunks()
                offsets = np.asarray(lists.offsets)[: num_items + 1].astype(np.int64)
                feature = column.removeprefix("feature:")
                features[feature] = Feature(
                    names=tuple(of_kind.get(f"value:{feature}", pa.array([])).to_pylist()),
                    offsets=np.concatenate([np.zeros(NUM_RESERVED, np.int64), offsets]),
                    values=np.asarray(lists.values).astype(np.int64),
                )
        items = of_kind.get("item", pa.array([], pa.large_string())).cast(_ARROW_TYPE[item_type])
        users = {name: tuple(of_kind.get(f"user:{name}", pa.array([])).to_pylist()) for name in user_names}
        return cls(items=items, actions=tuple(of_kind["action"].to_pylist()), features=features, user_features=users)

    @classmethod
    def load(cls, path: str) -> Vocabulary:
        with open(path, "rb") as stream:
            return cls.from_bytes(stream.read(), name=path)


_ARROW_TYPE = {"int64": pa.int64(), "string": pa.large_string()}
_POLARS_TYPE = {"int64": pl.Int64(), "string": pl.String()}


def _as_items(raw_ids: pa.Array | pl.Series | np.ndarray | Iterable, item_type: pa.DataType) -> pa.Array:
    if isinstance(raw_ids, pl.Series):
        ids: Any = raw_ids.to_arrow()
    elif isinstance(raw_ids, pa.Array):
        ids = raw_ids
    else:
        values = raw_ids if isinstance(raw_ids, np.ndarray) else list(raw_ids)
        ids = pa.array(values) if len(values) else pa.array([], item_type)
    if ids.type == item_type:
        return ids
    if item_type == pa.int64() and not pa.types.is_integer(ids.type):
        # A string is an integer id only in its canonical decimal form: "007" is not the id 7.
        text = pl.Series(ids.cast(pa.large_string()), dtype=pl.String)
        number = text.cast(pl.Int64, strict=False)
        return number.set(number.cast(pl.String) != text, None).to_arrow()
    return ids.cast(item_type)


def _keys(ids: pa.Array) -> np.ndarray:
    """A number for each id, equal for equal ids in this process; arbitrary for a null."""
    if ids.type == pa.int64():
        return np.asarray(ids.fill_null(0))
    return pl.Series(ids, dtype=pl.String).hash().to_numpy()


def _replace_values(old: Feature, rows: np.ndarray, raw: pl.Series) -> Feature:
    """The feature with the values `raw` (strings or lists of strings, null = none) for item rows `rows`."""
    # Give every new value a row.
    lists = (
        raw if isinstance(raw.dtype, pl.List) else raw.cast(pl.String).to_frame("v").select(pl.concat_list("v"))["v"]
    )
    exploded = pl.DataFrame({"row": rows, "value": lists.cast(pl.List(pl.String))}).explode("value")
    exploded = exploded.filter(pl.col("value").is_not_null() & (pl.col("value") != ""))
    fresh = sorted(set(exploded["value"].unique().to_list()) - set(old.names))
    names = (*old.names, *fresh)
    codes = {name: place + NUM_RESERVED for place, name in enumerate(names)}
    new_rows = exploded["row"].to_numpy()
    new_values = exploded["value"].replace_strict(codes, return_dtype=pl.Int64).to_numpy()

    # Replace the values of these items, keep all others.
    num_rows = len(old.offsets) - 1
    kept_rows = np.repeat(np.arange(num_rows), np.diff(old.offsets))
    keep = ~np.isin(kept_rows, rows)
    all_rows = np.concatenate([kept_rows[keep], new_rows])
    all_values = np.concatenate([old.values[keep], new_values])
    # A stable sort: an item's values stay in the order of its line.
    order = np.argsort(all_rows, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(all_rows, minlength=num_rows))]).astype(np.int64)
    return Feature(names=names, offsets=offsets, values=all_values[order].astype(np.int64))
