"""Removing what no reader needs: old manifests, files that no kept manifest names, and what killed runs left."""

from __future__ import annotations

import dataclasses

from pipeline.events import DataError, NotNow
from pipeline.prepare.staging import other_runs
from pipeline.shards.manifest import manifest_name, manifest_numbers, read_manifest
from pipeline.shards.tombstones import KEY
from pipeline.storage import Store

_FOLDERS = ("shards", "keys", "index", "vocabulary", "requests", "tombstones")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collected:
    """What was removed."""

    manifests: list[int]
    files: int
    bytes: int


def collect(path: str, *, keep: int) -> Collected:
    """Keep the latest `keep` manifests and the files that they name; remove the rest.

    DataError: there is no data set. NotNow: another run may be writing. If interrupted, it leaves a valid data set,
    because a manifest is removed before its files.
    """
    store = Store(path)
    # List the files first: the list then cannot contain what a run that starts from now on writes.
    found = {name: store.size(name) for folder in _FOLDERS for name in _files(store, folder)}
    if runs := other_runs(path):
        raise NotNow(f"{path}: {runs[0]} belongs to a run that may still write; wait for its end, or remove it")
    numbers = manifest_numbers(store)
    if not numbers:
        raise DataError(f"{path}: no prepared data set there; check the path")
    kept = [read_manifest(path, number=number) for number in numbers[-keep:]]
    named = {entry["name"] for manifest in kept for entry in manifest.entries()}
    counted = {manifest.fingerprint[:16] for manifest in kept}
    for number in numbers[:-keep]:
        store.remove(manifest_name(number))
    garbage = [name for name in found if name not in named and name != KEY and not _is_count_cache(name, counted)]
    for name in garbage:
        store.remove(name)
    for name in store.names():
        if name.startswith(".scratch-"):
            store.remove(name)
    return Collected(manifests=numbers[:-keep], files=len(garbage), bytes=sum(found[name] for name in garbage))


def _files(store: Store, folder: str) -> list[str]:
    return [f"{folder}/{name}" for name in store.names(folder)]


def _is_count_cache(name: str, fingerprints: set[str]) -> bool:
    """Whether a file is a cache of request counts (request_index.py) for one of these manifests."""
    folder, _, leaf = name.partition("/")
    return folder == "requests" and leaf.partition("-")[0] in fingerprints
