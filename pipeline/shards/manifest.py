"""The manifest: the list of a data set's files, and the one file whose creation commits a state of the data set.

`manifests/00000001.json`, `00000002.json`, ...: the largest number is the current data set; there is no pointer and no
lock. A commit creates the next number exclusively, so of two racing writers one wins and the other gets an error. The
content of a manifest does not depend on the clock, the machine or the path of the directory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from pipeline.events import DataError, NotNow
from pipeline.shards.removals import removal_of
from pipeline.storage import Store, is_inside

FORMAT_VERSION = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """One committed state of a data set."""

    number: int
    """Its number in the series, from 1."""
    format_version: int = FORMAT_VERSION
    schema: dict[str, Any]
    """columns (the log's canonical names) and the type of each id column; kept_label: "largest" in a log with labels:
    the label that an event has if it was read with several. Absent where an earlier version, which kept the smallest,
    began the data set."""
    config: dict[str, Any]
    """The part of PrepareConfig that must not change during the life of the data set."""
    counts: dict[str, Any]
    """Rows over all ingests: read = accepted + duplicate + conflicting + the sum of rejected, {reason: rows}.

    conflicting: events that were read with both labels, each counted once; absent in a log without labels and in a
    manifest of an earlier version, which counted them as duplicates."""
    users: int
    items: int
    """Distinct raw items with an event."""
    time_range: list[int] | None
    """First and last event, milliseconds since 1970 UTC; None where the log has no times."""
    files: list[dict[str, Any]]
    """The shard files by bucket, oldest first within a bucket; later ones are laid over earlier ones (layers.py).

    name, bytes, checksum, bucket; groups: the group within the bucket of each row group; rows: number of users;
    events: number of events; accepted: how many of them count as accepted; unchecked: how many of the accepted ones
    are too old to be looked up among earlier events; keys: name, bytes, checksum of the key file (event_keys.py)."""
    vocabulary: dict[str, Any]
    """name, bytes, checksum, fingerprint; features (of items) and featureless (number of items without a value of any),
    which are absent without features and in manifests of an earlier version."""
    index: dict[str, Any]
    """name, bytes, checksum."""
    inputs: list[dict[str, Any]]
    """name, bytes, checksum, edges (checksum of the file's start and end), modified (when it was last written;
    absent in manifests of an earlier version) and kind (events, items or users) of every ingested file, in order."""
    parent: str | None
    """Fingerprint of the previous manifest; None for the first."""
    tombstones: dict[str, Any] | None = None
    """name, bytes, checksum of the file of forgotten users (tombstones.py); None = nobody was ever forgotten."""
    oldest: int = 1
    """Number of the first state that may still be read: earlier states held users who were forgotten since."""
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    """{name: why} of the log's files that the latest ingest did not read."""

    @property
    def has_time(self) -> bool:
        return "timestamp" in self.schema["columns"]

    @property
    def has_labels(self) -> bool:
        return "label" in self.schema["columns"]

    @property
    def conflicting(self) -> int:
        """Number of events that are known to have been read with both labels."""
        return self.counts.get("conflicting", 0)

    @property
    def num_unsettled(self) -> int:
        """Duplicates of a data set that an earlier version began: it kept the smaller label of rows that differ in it,
        and did not count them apart, so each of these may have lost a larger label."""
        is_older = self.has_labels and "kept_label" not in self.schema
        return self.counts["duplicate"] if is_older else 0

    @property
    def fingerprint(self) -> str:
        """Hexadecimal hash of the manifest's bytes."""
        return fingerprint_of(self.to_bytes())

    def entries(self) -> list[dict[str, Any]]:
        """Every file that belongs to this state: shard files, their keys, vocabulary, index and tombstones."""
        stones = [self.tombstones] if self.tombstones else []
        return [*self.files, *(file["keys"] for file in self.files), self.vocabulary, self.index, *stones]

    def to_bytes(self) -> bytes:
        fields = dataclasses.asdict(self)
        # Omitted when empty: a manifest from before the field existed keeps its bytes.
        if not self.left_out:
            del fields["left_out"]
        return (json.dumps(fields, indent=1, sort_keys=True) + "\n").encode()


def fingerprint_of(content: bytes) -> str:
    """Fingerprint of a manifest from its stored bytes."""
    return hashlib.sha256(content).hexdigest()[:32]


def current_manifest(path: str) -> Manifest | None:
    """The current state of the data set in a directory; None when nothing was ever committed there."""
    numbers = manifest_numbers(Store(path))
    return read_manifest(path, number=numbers[-1]) if numbers else None


def read_manifest(path: str, *, number: int) -> Manifest:
    """The committed state with this number. DataError when it is absent, damaged or of another format version."""
    store, name = Store(path), manifest_name(number)
    try:
        fields = json.loads(store.read(name))
    except FileNotFoundError:
        why = why_removed(path, number=number) or f"there are {manifest_numbers(store) or 'none'}"
        raise DataError(f"{path}: no {name}; {why}") from None
    except ValueError:
        raise DataError(f"{path}: {name} is damaged; restore it or prepare into a new directory") from None
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path}: {name} has format version {version}, this program reads {FORMAT_VERSION}; prepare into a new "
            "directory"
        )
    try:
        found = Manifest(**fields)
    except TypeError as error:
        raise DataError(f"{path}: {name} is damaged ({error}); prepare into a new directory") from error
    if outside := [entry["name"] for entry in found.entries() if "name" in entry and not is_inside(entry["name"])]:
        raise DataError(f"{path}: {name} names {outside[0]!r}, outside its directory; restore it from a copy")
    return found


def why_removed(path: str, *, number: int) -> str | None:
    """Which command removed a state, when, and why; None if it is still there, or if nobody recorded its removal."""
    current, removal = current_manifest(path), removal_of(path, number)
    told = [str(removal)] if removal and not Store(path).exists(manifest_name(number)) else []
    if current is not None and number < current.oldest:
        told.append(f"it held users who were forgotten with manifest {current.oldest}")
    return "; ".join([*told, "start a new run"]) if told else None


def commit(path: str, manifest: Manifest) -> None:
    """Make the manifest the current state. NotNow when another writer committed this number first."""
    if not Store(path).create(manifest_name(manifest.number), manifest.to_bytes()):
        raise NotNow(
            f"{path}: another prepare committed manifest {manifest.number} first, and its data is kept; "
            "run prepare again to add yours"
        )


def manifest_name(number: int) -> str:
    """Path of the manifest with this number inside its data set."""
    return f"manifests/{number:08d}.json"


def manifest_numbers(store: Store) -> list[int]:
    """The committed numbers, ascending."""
    stems = [name.removesuffix(".json") for name in store.names("manifests") if name.endswith(".json")]
    return sorted(int(stem) for stem in stems if len(stem) == 8 and stem.isdigit())
