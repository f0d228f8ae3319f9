"""Which command removed a state of a data set, and when: a run that still needs the state ends with this reason.

    removals/00000007.json    the manifests that one command removed, up to number 7

A record is written before the first file goes, so a reader that misses a file always finds it.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import socket
from collections.abc import Mapping

from pipeline.storage import Store

_FOLDER = "removals"
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
    for name in store.names(_FOLDER)[:-_KEPT]:
        store.remove(f"{_FOLDER}/{name}")


def removals(path: str) -> list[Removal]:
    """The recorded removals, by the largest number that each removed."""
    store, found = Store(path), []
    for name in store.names(_FOLDER):
        document = json.loads(store.read(f"{_FOLDER}/{name}"))
        manifests = {int(number): fingerprint for number, fingerprint in document["manifests"].items()}
        found.append(Removal(**document | {"manifests": manifests}))
    return found


def removal_of(path: str, number: int) -> Removal | None:
    """The latest recorded removal of the manifest with this number; None if there is none."""
    return next((removal for removal in reversed(removals(path)) if number in removal.manifests), None)
