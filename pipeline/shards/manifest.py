"""The manifest: what a data set consists of, and the one file whose creation makes it exist.

`manifests/00000001.json`, `00000002.json`, ...: the largest number is the current data set; there is no pointer and no
lock. A commit creates the next number exclusively, so of two racing writers one wins and the other is told so. Nothing
in a manifest depends on the clock, on the machine, or on where the directory lies.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from pipeline.events import DataError, NotNow
from pipeline.storage import Store, is_inside

FORMAT_VERSION = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """One committed state of a data set."""

    number: int
    """Its place in the series, from 1."""
    format_version: int = FORMAT_VERSION
    schema: dict[str, Any]
    """columns (canonical names there are) and the type of each id column."""
    config: dict[str, Any]
    """The part of PrepareConfig that must stay the same as long as the data set lives."""
    counts: dict[str, Any]
    """Rows over all ingests: read = accepted + duplicate + the sum of rejected, {reason: rows}."""
    users: int
    items: int
    """Distinct raw items with an event."""
    time_range: list[int] | None
    """First and last event, milliseconds since 1970 UTC; None where the log has an order only."""
    files: list[dict[str, Any]]
    """The shard files by bucket, those of a bucket as they came; later ones are laid over earlier ones (layers.py).

    name, bytes, checksum, bucket; groups: which of the bucket's groups each row group belongs to; rows (users);
    events; accepted: of them, counted as such; unchecked: of these, too old to be looked for among the earlier ones;
    keys: name, bytes, checksum of the file that finds them (event_keys.py)."""
    vocabulary: dict[str, Any]
    """name, bytes, checksum, fingerprint."""
    index: dict[str, Any]
    """name, bytes, checksum."""
    inputs: list[dict[str, Any]]
    """name, bytes, checksum, edges (checksum of its ends), kind (events, items or users) of everything ingested, in
    order."""
    parent: str | None
    """Fingerprint of the manifest this one grew from."""
    tombstones: dict[str, Any] | None = None
    """name, bytes, checksum of the file of users who are forgotten (tombstones.py); None = nobody ever was."""
    oldest: int = 1
    """Number of the first state that may still be read: those before held users who were forgotten."""

    @property
    def has_time(self) -> bool:
        return "timestamp" in self.schema["columns"]

    @property
    def fingerprint(self) -> str:
        """Hexadecimal hash of the manifest's bytes."""
        return fingerprint_of(self.to_bytes())

    def entries(self) -> list[dict[str, Any]]:
        """Every file that belongs to this state: shard files, their keys, vocabulary, index and tombstones."""
        stones = [self.tombstones] if self.tombstones else []
        return [*self.files, *(file["keys"] for file in self.files), self.vocabulary, self.index, *stones]

    def to_bytes(self) -> bytes:
        return (json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n").encode()


def fingerprint_of(content: bytes) -> str:
    """Of a manifest as it is stored."""
    return hashlib.sha256(content).hexdigest()[:32]


def current_manifest(path: str) -> Manifest | None:
    """The data set in a directory as it stands now; None when nothing was ever committed there."""
    numbers = manifest_numbers(Store(path))
    return read_manifest(path, number=numbers[-1]) if numbers else None


def read_manifest(path: str, *, number: int) -> Manifest:
    """A certain committed state. DataError when it is absent, damaged or of another format version."""
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
        fix = f"run `solar migrate {path}`" if version == 1 else "prepare into a new directory"
        raise DataError(f"{path}: {name} has format version {version}, this program reads {FORMAT_VERSION}; {fix}")
    try:
        found = Manifest(**fields)
    except TypeError as error:
        raise DataError(f"{path}: {name} is damaged ({error}); prepare into a new directory") from error
    if outside := [entry["name"] for entry in found.entries() if "name" in entry and not is_inside(entry["name"])]:
        raise DataError(f"{path}: {name} names {outside[0]!r}, outside of its directory; restore it from a copy")
    return found


def why_removed(path: str, *, number: int) -> str | None:
    """Why a state is not there any more, where the present one knows it."""
    current = current_manifest(path)
    if current is None or number >= current.oldest:
        return None
    return f"it held users who were forgotten with manifest {current.oldest}; start a new run"


def commit(path: str, manifest: Manifest) -> None:
    """Make the data set exist. DataError when another writer took this number first: its state stands."""
    if not Store(path).create(manifest_name(manifest.number), manifest.to_bytes()):
        raise NotNow(
            f"{path}: another prepare committed manifest {manifest.number} first and stands; "
            "run prepare again to add to it"
        )


def manifest_name(number: int) -> str:
    """Where the manifest of this number stands in its data set."""
    return f"manifests/{number:08d}.json"


def manifest_numbers(store: Store) -> list[int]:
    """The committed numbers, ascending."""
    stems = [name.removesuffix(".json") for name in store.names("manifests") if name.endswith(".json")]
    return sorted(int(stem) for stem in stems if len(stem) == 8 and stem.isdigit())
