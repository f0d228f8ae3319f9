"""Leases: which states of a data set are being read, so that `solar gc` keeps them.

    leases/00000003-HOST-PID-<8 hex digits>.json    manifest, host, pid, command, expires

A command holds a lease while it reads one state for long; a thread renews it. A lease ends when its command ends, when
its process is found dead on this machine, or at `expires`. Forgetting users does not wait for leases.

A lease that cannot be read (half a file, or one of another version) counts as held for as long as a new one would;
other files in the folder mean nothing and stay.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import json
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterator

from pipeline.shards.manifest import read_manifest
from pipeline.storage import Store, is_of_dead_process, owner

_FOLDER = "leases"
_NAME = re.compile(r"([0-9]{8})-(.+)-([0-9]+)-[0-9a-f]+\.json")
LEASE_SECONDS = 3 * 3600.0
"""A lease ends this long after its last renewal: longer than the clocks of two machines differ in practice. A command
that died on another machine keeps its state from `solar gc` for no longer than this."""
RENEW_SECONDS = 600.0
_REFUSALS = (errno.EROFS, errno.ENOSPC, errno.EDQUOT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lease:
    """A command that reads a state."""

    manifest: int
    """Number of the manifest that it reads."""
    host: str
    pid: int
    command: str
    """What it is, for messages."""
    expires: str
    """UTC, ISO 8601."""

    def __str__(self) -> str:
        return f"{self.command} (process {self.pid} on {self.host}) reads manifest {self.manifest}"

    @classmethod
    def read(cls, content: bytes) -> Lease:
        """A lease from the bytes of its file, which may have further fields. ValueError: it is none."""
        try:
            fields = json.loads(content)
            held = cls(**{field.name: fields[field.name] for field in dataclasses.fields(cls)})
            ends = datetime.datetime.fromisoformat(held.expires)
        except (TypeError, KeyError) as error:
            raise ValueError(f"no lease: {error!r}") from error
        if not isinstance(held.manifest, int) or ends.tzinfo is None:
            raise ValueError("no lease: it has no number, or no time in UTC")
        return held


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Unreadable(Lease):
    """What the name of a file tells whose content is no lease; `command` is that name."""

    def __str__(self) -> str:
        return (
            f"{self.command}, a lease of manifest {self.manifest} that cannot be read (remove it if process {self.pid} "
            f"on {self.host} has ended)"
        )


@contextlib.contextmanager
def lease(path: str, *, number: int, command: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold a lease on the manifest with this number during the block. DataError: it is not there any more.

    A data set that may not be written to, or whose disk is full, has no leases: `tell` then gets one line about it.
    """
    store, name = Store(path), f"{_FOLDER}/{number:08d}-{owner()}-{secrets.token_hex(4)}.json"
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_SECONDS):
            # Any error of the store: the next renewal may succeed, and until `expires` nothing is lost.
            with contextlib.suppress(Exception):
                _write(store, name, number, command)

    try:
        _write(store, name, number, command)
    except OSError as error:
        # An object store's refusal has no number.
        if not isinstance(error, PermissionError) and error.errno not in _REFUSALS:
            raise
        tell(f"{path}: no lease ({error.strerror or error}): `solar gc` may remove what is read here")
        yield
        return
    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        # Only now: `solar gc` may have removed the state before it could see the lease.
        read_manifest(path, number=number)
        yield
    finally:
        ended.set()
        thread.join()
        # Any error of the store: the lease expires by itself.
        with contextlib.suppress(Exception):
            store.remove(name)


def current_leases(path: str) -> list[Lease]:
    """The leases that have not ended, by manifest; the files of the others are removed."""
    store, found = Store(path), []
    now = datetime.datetime.now(datetime.UTC)
    for name in store.names(_FOLDER):
        # Others, such as the unfinished file of a lease that is being written, are no leases.
        if not (named := _NAME.fullmatch(name)):
            continue
        file = f"{_FOLDER}/{name}"
        try:
            held = _held_by(store, file, number=int(named[1]), host=named[2], pid=int(named[3]), now=now)
            is_over = datetime.datetime.fromisoformat(held.expires) <= now
            if is_over or is_of_dead_process(name, prefix=f"{named[1]}-"):
                store.remove(file)
            else:
                found.append(held)
        except FileNotFoundError:
            # It has ended since it was listed.
            continue
    return found


def _held_by(store: Store, file: str, *, number: int, host: str, pid: int, now: datetime.datetime) -> Lease:
    """The lease in a file; if it cannot be read, one that its name tells, with the life of a lease written then."""
    try:
        return Lease.read(store.read(file))
    except FileNotFoundError:
        raise
    except (ValueError, RecursionError, OSError):
        written = store.modified(file) or now
        expires = written + datetime.timedelta(seconds=LEASE_SECONDS)
        return _Unreadable(
            manifest=number, host=host, pid=pid, command=file, expires=expires.isoformat(timespec="seconds")
        )


def _write(store: Store, name: str, number: int, command: str) -> None:
    expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=LEASE_SECONDS)
    held = Lease(
        manifest=number, host=socket.gethostname(), pid=os.getpid(), command=command,
        expires=expires.isoformat(timespec="seconds"),
    )  # fmt: skip
    store.write(name, (json.dumps(dataclasses.asdict(held), indent=1) + "\n").encode(), durable=False)
