"""Which command removed a state of a data set, and when: a run that still needs the state ends with this reason.

    removals/00000007.json    the manifests that one command removed, up to number 7

A record is written before the first file goes, so a reader that misses a file always finds it.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import socket
from collections.abc import Mapping

from pipeline.events import DataError
from pipeline.storage import Store

_FOLDER = "removals"
_NAME = re.compile(r"[0-9]{8}\.json")
_KEPT = 200
"""Latest records that are kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Removal:
    """One removal of states."""

    manifests: Mapping[int, str]
    """{number: fingerprint} of the removed manifests."""
    command: str
    """The command, such as `solar gc`."""
    host: str
    at: str
    """UTC, ISO 8601."""

    def __str__(self) -> str:
        return f"`{self.command}` on {self.host} removed it at {self.at}"


def record_removal(path: str, manifests: Mapping[int, str], *, command: str) -> None:
    """Record that the command is about to remove these manifests, {number: fingerprint}, at least one."""
    store = Store(path)
    removal = Removal(
        manifests=manifests, command=command, host=socket.gethostname(),
        at=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC",
    )  # fmt: skip
    content = (json.dumps(dataclasses.asdict(removal), indent=1) + "\n").encode()
    store.write(f"{_FOLDER}/{max(manifests):08d}.json", content)
    for name in _records(store)[:-_KEPT]:
        store.remove(f"{_FOLDER}/{name}")


def removals(path: str) -> list[Removal]:
    """The recorded removals, by the largest number that each removed. DataError: a record cannot be read."""
    store, found = Store(path), []
    for name in _records(store):
        if (removal := _read(store, name)) is None:
            raise DataError(
                f"{path}: {_FOLDER}/{name} is damaged: it says which states were removed; restore it from a copy, or "
                "remove it and the states in WORKSPACE/states"
            )
        found.append(removal)
    return found


def removal_of(path: str, number: int) -> Removal | None:
    """The latest recorded removal of the manifest with this number; None if no record that can be read has it."""
    store = Store(path)
    found = (_read(store, name) for name in reversed(_records(store)))
    return next((removal for removal in found if removal and number in removal.manifests), None)


def _records(store: Store) -> list[str]:
    """The names of the records, without the unfinished files of killed commands."""
    return [name for name in store.names(_FOLDER) if _NAME.fullmatch(name)]


def _read(store: Store, name: str) -> Removal | None:
    """The record in a file; None if it is damaged."""
    try:
        document = json.loads(store.read(f"{_FOLDER}/{name}"))
        manifests = {int(number): str(fingerprint) for number, fingerprint in document["manifests"].items()}
        return Removal(manifests=manifests, **{field: str(document[field]) for field in ("command", "host", "at")})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
