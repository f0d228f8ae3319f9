"""The users who must remain forgotten, stored as keyed hashes so that their ids are not written down.

tombstones/key             32 random bytes, written once; without it no hash can be matched to a user id
tombstones/<hash>.parquet  BLAKE2b (RFC 7693, 16 bytes, keyed) of each id's decimal or string form, sorted
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import secrets
from collections.abc import Iterable
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from pipeline.events import DataError
from pipeline.shards.manifest import Manifest
from pipeline.shards.writer import write_bytes
from pipeline.storage import Store

KEY = "tombstones/key"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tombstones:
    """The forgotten users of a data set."""

    key: bytes
    hashes: frozenset[bytes]

    @classmethod
    def of(cls, path: str, manifest: Manifest | None) -> Tombstones | None:
        """The tombstones of a state; None if nobody was ever forgotten. DataError when they cannot be read."""
        if manifest is None or manifest.tombstones is None:
            return None
        store, entry = Store(path), manifest.tombstones
        try:
            key, table = store.read(KEY), pq.read_table(io.BytesIO(store.read(entry["name"])))
        except FileNotFoundError as error:
            raise DataError(
                f"{path}: {KEY} or {entry['name']} is missing, so forgotten users cannot be recognised; restore it"
            ) from error
        if store.checksum(entry["name"]) != entry["checksum"]:
            raise DataError(f"{path}: {entry['name']} is damaged (checksum differs); restore it")
        return cls(key=key, hashes=frozenset(table["user"].to_pylist()))

    @classmethod
    def empty(cls, path: str) -> Tombstones:
        """Tombstones of nobody. Creates the data set's key if it has none."""
        store = Store(path)
        store.create(KEY, secrets.token_bytes(32), private=True)
        return cls(key=store.read(KEY), hashes=frozenset())

    def with_users(self, users: Iterable[str]) -> Tombstones:
        """These tombstones and those of `users`, given by the decimal or string form of their ids."""
        return dataclasses.replace(self, hashes=self.hashes | {self._hash(user) for user in users})

    def write(self, path: str) -> dict[str, Any]:
        """Write the file; returns its entry for the manifest."""
        sink = io.BytesIO()
        pq.write_table(pl.DataFrame({"user": sorted(self.hashes)}).to_arrow(), sink)
        return write_bytes(path, sink.getvalue(), "tombstones/")

    def among(self, users: pl.Series) -> pl.Series:
        """[n] bool: which of these users are forgotten; ids may be integers or strings. False for a null."""
        distinct = users.unique().drop_nulls()
        found = [self.has(text) for text in distinct.cast(pl.String).to_list()]
        return users.replace_strict(distinct, pl.Series(found, dtype=pl.Boolean), default=False)

    def has(self, user: str) -> bool:
        """Whether the user with this id, in its decimal or string form, is forgotten."""
        return self._hash(user) in self.hashes

    def _hash(self, user: str) -> bytes:
        return hashlib.blake2b(user.encode(), digest_size=16, key=self.key).digest()
