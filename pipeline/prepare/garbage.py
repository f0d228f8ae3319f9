"""Removing what no reader needs: old manifests, files that none of the kept ones names, what killed runs left."""

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
    """Keep the latest `keep` manifests and what they name. DataError: nothing there, or another run is writing.

    Interrupted, it leaves a whole data set: a manifest goes before its files.
    """
    store = Store(path)
    # Listed before anything else is looked at: what a run that starts now writes is not in the list.
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
    garbage = [name for name in found if name not in named and name != KEY and not _counts(name, counted)]
    for name in garbage:
        store.remove(name)
    for name in store.names():
        if name.startswith(".scratch-"):
            store.remove(name)
    return Collected(manifests=numbers[:-keep], files=len(garbage), bytes=sum(found[name] for name in garbage))


def _files(store: Store, folder: str) -> list[str]:
    return [f"{folder}/{name}" for name in store.names(folder)]


def _counts(name: str, fingerprints: set[str]) -> bool:
    """Is it a cache of request counts (request_index.py) of one of these manifests?"""
    folder, _, leaf = name.partition("/")
    return folder == "requests" and leaf.partition("-")[0] in fingerprints
