"""Whether a vocabulary is the beginning of another, found from sizes and digests, without the first vocabulary itself.

    yesterday   item: a b c      beginnings   item: 3 entries, digest of a b c      today   item: a b c d e

Tables trained with the first vocabulary fit the second, row by row, only if every kind of entries begins the same.
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
    """{kind of `Vocabulary.entries`: {"entries": their number, "digest": hash of them in order}}; plain values."""
    return {kind: {"entries": len(raw), "digest": _digest(raw)} for kind, raw in vocabulary.entries().items()}


def first_difference(beginnings: Mapping[str, Mapping[str, Any]], vocabulary: Vocabulary) -> str | None:
    """Where the vocabulary does not begin with the one that `beginnings_of` described, in words; None if it does."""
    entries = vocabulary.entries()
    for kind, begun in beginnings.items():
        if kind not in entries:
            return f"{_name(kind)} no longer exist"
        number = begun["entries"]
        if len(entries[kind]) < number:
            return f"there are now {len(entries[kind])} {_name(kind)}, before there were {number}"
        if _digest(entries[kind].slice(0, number)) != begun["digest"]:
            return f"the first {number} {_name(kind)} have changed"
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
