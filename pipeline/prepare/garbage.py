"""Removing what no reader needs: old manifests, files that no kept manifest names, and what killed runs left.

collect                   all but the latest states and those that a running command reads     (`solar gc`)
remove_forgotten_states   the states before `oldest`, which held forgotten users               (`solar forget`)
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence

from pipeline.events import DataError, NotNow
from pipeline.prepare.staging import other_runs, remove_leftovers
from pipeline.shards.leases import Lease, current_leases
from pipeline.shards.manifest import (
    Manifest,
    current_manifest,
    fingerprint_of,
    manifest_name,
    manifest_numbers,
    read_manifest,
)
from pipeline.shards.removals import record_removal, removal_of
from pipeline.shards.tombstones import KEY
from pipeline.storage import Store

_FOLDERS = ("shards", "keys", "index", "vocabulary", "requests", "tombstones")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collected:
    """What was removed, and what was kept for others."""

    manifests: list[int]
    files: int
    bytes: int
    held: Sequence[Lease] = ()
    """The leases for which a state was kept that is older than the ones to keep."""


def collect(path: str, *, keep: int, command: str = "solar gc") -> Collected:
    """Keep the latest `keep` manifests, those that a running command reads, and the files that they name; remove the
    rest.

    DataError: there is no data set. NotNow: another run may be writing. If interrupted, it leaves a valid data set,
    because a manifest is removed before its files.
    """
    store = Store(path)
    # List the files first: the list then cannot contain what a run that starts from now on writes.
    found = {}
    for name in [name for folder in _FOLDERS for name in _files(store, folder)]:
        # A file that a running command has finished since it was listed is not there any more under this name.
        with contextlib.suppress(FileNotFoundError):
            found[name] = store.size(name)
    refuse_other_runs(path)
    remove_forgotten_states(path)
    numbers = manifest_numbers(store)
    if not numbers:
        raise DataError(f"{path}: no prepared data set there; check the path")
    held = [lease for lease in current_leases(path) if lease.manifest in numbers[:-keep]]
    removed = [number for number in numbers[:-keep] if number not in {lease.manifest for lease in held}]
    kept = [read_manifest(path, number=number) for number in numbers if number not in removed]
    _remove_manifests(store, removed, command=command)
    garbage = [name for name in _unneeded(found, kept) if store.exists(name)]
    for name in garbage:
        store.remove(name)
    remove_leftovers(path)
    for name in store.unfinished():
        store.remove(name)
    return Collected(manifests=removed, files=len(garbage), bytes=sum(found[name] for name in garbage), held=held)


def remove_forgotten_states(path: str, *, command: str = "solar forget") -> None:
    """Remove the states before `oldest` of the current one, with all files that only they name; whoever reads them.

    The manifests go last: whatever ends this, the next command that changes the data set completes it. Does nothing if
    there are no such states.
    """
    store, current = Store(path), current_manifest(path)
    if current is None:
        return
    numbers = manifest_numbers(store)
    old = [number for number in numbers if number < current.oldest]
    if not old:
        return
    found = [name for folder in _FOLDERS for name in _files(store, folder)]
    if other_runs(path):
        # A file that no manifest names may be one that another run is writing.
        named = {entry["name"] for number in old for entry in read_manifest(path, number=number).entries()}
        found = [name for name in found if name in named or name.startswith("requests/")]
    kept = [read_manifest(path, number=number) for number in numbers if number >= current.oldest]
    if removal_of(path, old[-1]) is None:
        record_removal(path, _fingerprints(path, old), command=command)
    for name in _unneeded(found, kept):
        store.remove(name)
    for number in old:
        store.remove(manifest_name(number))


def refuse_other_runs(path: str) -> None:
    """NotNow: another run may be writing in the data set."""
    if runs := other_runs(path):
        raise NotNow(f"{path}: {runs[0]} belongs to a run that may still write; wait for its end, or remove it")


def _remove_manifests(store: Store, numbers: Sequence[int], *, command: str) -> None:
    if numbers:
        record_removal(store.root, _fingerprints(store.root, numbers), command=command)
    for number in numbers:
        store.remove(manifest_name(number))


def _fingerprints(path: str, numbers: Iterable[int]) -> dict[int, str]:
    return {number: fingerprint_of(Store(path).read(manifest_name(number))) for number in numbers}


def _files(store: Store, folder: str) -> list[str]:
    """All files of a folder, with the unfinished ones of killed commands."""
    return [f"{folder}/{name}" for name in store.names(folder) + store.unfinished(folder)]


def _unneeded(names: Iterable[str], kept: Sequence[Manifest]) -> list[str]:
    """The files, out of `names`, that none of these states needs."""
    named = {entry["name"] for manifest in kept for entry in manifest.entries()}
    counted = {manifest.fingerprint[:16] for manifest in kept}
    return [name for name in names if name not in named and name != KEY and not _is_count_cache(name, counted)]


def _is_count_cache(name: str, fingerprints: set[str]) -> bool:
    """Whether a file is a cache of request counts (request_index.py) for one of these manifests."""
    folder, _, leaf = name.partition("/")
    return folder == "requests" and leaf.partition("-")[0] in fingerprints
