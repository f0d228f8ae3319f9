"""Is a vocabulary the beginning of another? Told by sizes and digests, which go where the vocabulary itself does not.

    yesterday   item: a b c      beginnings   item: 3 entries, digest of a b c      today   item: a b c d e

Tables that were trained under the one fit the other, row by row, only if all of its entries begin so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipeline.shards.vocabulary import Vocabulary

_ENTRIES_AT_ONCE = 1 << 16


def beginnings_of(vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """{kind of `Vocabulary.entries`: {"entries": their number, "digest": of them in order}}; plain values."""
    return {kind: {"entries": len(raw), "digest": _digest(raw)} for kind, raw in vocabulary.entries().items()}


def first_difference(beginnings: Mapping[str, Mapping[str, Any]], vocabulary: Vocabulary) -> str | None:
    """What of the vocabulary does not begin as `beginnings_of` said of another; None where all of it does."""
    entries = vocabulary.entries()
    for kind, begun in beginnings.items():
        if kind not in entries:
            return f"{_name(kind)} are not there any more"
        number = begun["entries"]
        if len(entries[kind]) < number:
            return f"there are {len(entries[kind])} {_name(kind)}, there were {number}"
        if _digest(entries[kind].slice(0, number)) != begun["digest"]:
            return f"the first {number} {_name(kind)} are others"
    return None


def _digest(values: pa.Array) -> str:
    digest = hashlib.sha256()
    for first in range(0, len(values), _ENTRIES_AT_ONCE):
        digest.update(json.dumps(values.slice(first, _ENTRIES_AT_ONCE).to_pylist()).encode())
    return digest.hexdigest()[:32]


def _name(kind: str) -> str:
    family, _, feature = kind.partition(":")
    if family in ("value", "user"):
        return f"values of {feature}" + (" of users" if family == "user" else "")
    return f"{family}s"
