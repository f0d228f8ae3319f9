"""Where files live: a directory on a local disk or in any fsspec store (s3://bucket/prefix), behind one interface.

It offers only what the commit protocol of shards/manifest.py needs: whole-file writes that no reader sees
half-written, and a create operation that exactly one of several racing writers wins.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import fsspec
import xxhash
from fsspec.implementations.local import LocalFileSystem

from pipeline.events import DataError

_CHUNK_BYTES = 8 << 20
_BUCKET = re.compile(r"[a-zA-Z0-9._-]{1,255}|arn:[^/]+")
SCRATCH = ".scratch-"
"""Prefix of an unfinished file, or of a folder for unfinished files, inside a local store; `owner` of the process that
made it follows."""


class Store:
    """One directory. Names are relative to it, with forward slashes."""

    def __init__(self, root: str) -> None:
        self.fs, path = locate(os.fspath(root))
        self.root = str(root)
        self.path = path.rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def join(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path

    def exists(self, name: str = "") -> bool:
        return self.fs.exists(self.join(name))

    def size(self, name: str) -> int:
        """Bytes; FileNotFoundError when absent."""
        self.fs.invalidate_cache()
        return int(self.fs.info(self.join(name))["size"])

    def modified(self, name: str) -> datetime.datetime | None:
        """When the file was last written, in UTC; None where the store does not tell. FileNotFoundError when absent."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.modified(self.join(name))
        except NotImplementedError:
            return None
        return found if found.tzinfo else found.replace(tzinfo=datetime.UTC)

    def names(self, folder: str = "") -> list[str]:
        """Sorted names of the files and folders directly in `folder`, without unfinished ones; empty when `folder` does
        not exist."""
        return [name for name in self._names(folder) if not name.startswith(SCRATCH)]

    def unfinished(self, folder: str = "") -> list[str]:
        """Sorted names of the unfinished files and folders directly in `folder`, of living and of dead processes."""
        return [name for name in self._names(folder) if name.startswith(SCRATCH)]

    def _names(self, folder: str) -> list[str]:
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.join(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)

    def open(self, name: str) -> IO[Any]:
        return self.fs.open(self.join(name), "rb")

    def read(self, name: str) -> bytes:
        return self.fs.cat_file(self.join(name))

    def checksum(self, name: str) -> str:
        """xxh3-128 of the file's bytes, in bounded memory."""
        with self.open(name) as stream:
            return checksum_stream(stream)

    def write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """Replace or create the file; a reader sees either the old bytes or all of the new ones.

        Files that may be lost in a power cut (staging) need not be `durable`.
        """
        if not self.is_local:
            self.fs.pipe_file(self.join(name), data)
            return
        target = Path(self.join(name))
        with _written_beside(target, data, durable=durable) as temporary:
            os.replace(temporary, target)
        if durable:
            sync(target.parent)

    def adopt(self, local_path: str, name: str) -> None:
        """Move a finished local file to `name`. A file already there has equal bytes: names contain a content hash."""
        local_file = Path(local_path)
        if not self.is_local:
            self.fs.put_file(str(local_file), self.join(name))
            local_file.unlink()
            return
        target = Path(self.join(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        sync(local_file)
        os.replace(local_file, target)
        sync(target.parent)

    def create(self, name: str, data: bytes, *, private: bool = False) -> bool:
        """Create the file with all its bytes; False when it exists already. Exactly one of several writers wins.

        `private`: on a local disk nobody but the owner can ever read it. A remote store has its own access rules.
        """
        if not self.is_local:
            try:
                self.fs.pipe_file(self.join(name), data, mode="create")
            except FileExistsError:
                # The file may be ours: a create request whose response was lost is retried, and finds its own file.
                return self.read(name) == data
            return True
        target = Path(self.join(name))
        try:
            with _written_beside(target, data, private=private) as temporary:
                # link, unlike rename, fails when the target exists, and publishes all bytes at once.
                os.link(temporary, target)
        except FileExistsError:
            return False
        sync(target.parent)
        return True

    def remove(self, folder: str) -> None:
        if self.fs.exists(self.join(folder)):
            self.fs.rm(self.join(folder), recursive=True)

    def scratch(self) -> tempfile.TemporaryDirectory[str]:
        """A local folder for unfinished files. In a local store it is inside the store, so `adopt` is a rename."""
        if not self.is_local:
            return tempfile.TemporaryDirectory(prefix="solar-")
        Path(self.path).mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{owner()}-", dir=self.path)

    def free_bytes(self) -> int | None:
        """Free disk space; None where there is no such limit (a remote store), or none is told."""
        if not self.is_local:
            return None
        folder = Path(self.path).absolute()
        while not folder.exists():
            folder = folder.parent
        usage = shutil.disk_usage(folder)
        return usage.free if usage.total else None


def locate(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URI, and the path in it.

    A path without :// is local, whatever else is in it: fsspec would take a name with :: for a chain of file systems.
    """
    protocol, scheme, rest = path.partition("://")
    if not scheme or protocol in ("file", "local"):
        return LocalFileSystem(), os.path.abspath(rest if scheme else os.path.expanduser(path))
    _refuse_wrong_uri(protocol, rest)
    try:
        if "::" in protocol:
            return fsspec.core.url_to_fs(path)
        options = fsspec.get_filesystem_class(protocol)._get_kwargs_from_urls(path)
        fs = fsspec.filesystem(protocol, **options)
    except ImportError as error:
        raise DataError(f"{path}: {' '.join(str(error).split())}; install it, or copy the files") from error
    return fs, fs._strip_protocol(path)


def _refuse_wrong_uri(protocol: str, rest: str) -> None:
    """DataError: a protocol that nobody knows, a user or a password, or what cannot be a bucket."""
    place = rest.partition("/")[0]
    hosts = [place, *(link.partition("://")[2].partition("/")[0] for link in rest.split("::")[1:])]
    for host in hosts:
        if "@" in host:
            raise DataError(
                f"{protocol}://...@{host.rpartition('@')[2]}: has a user or a password: remove it; credentials come "
                "from the environment"
            )
    last = protocol.rpartition("::")[2]
    if last not in fsspec.available_protocols():
        raise DataError(f"{protocol}://{rest}: unknown protocol {last!r}: write a path, or s3:// and a bucket")
    if last in ("s3", "s3a") and not _BUCKET.fullmatch(place):
        raise DataError(
            f"{protocol}://{rest}: {place!r} cannot be a bucket: its name has letters, digits, '.', '_' and '-' alone"
        )


def owner() -> str:
    """This process in the name of a file or folder: HOST-PID."""
    return f"{socket.gethostname()}-{os.getpid()}"


def is_of_dead_process(name: str, *, prefix: str) -> bool:
    """Whether a name of PREFIX, HOST-PID and more is that of a process of this machine that has ended."""
    ours = f"{prefix}{socket.gethostname()}-"
    pid = name.removeprefix(ours).partition("-")[0]
    return name.startswith(ours) and pid.isdigit() and not process_lives(int(pid))


def process_lives(pid: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def absolute(path: str) -> str:
    """The path as an absolute one, so that processes with another working directory find the same place."""
    return path if "://" in path else os.path.abspath(path)


def is_inside(name: str) -> bool:
    """Whether a name read from a file stays inside the directory; the file may come from an untrusted place."""
    return bool(name) and not name.startswith("/") and ".." not in name.split("/")


def adopt(store: Store, local: str, prefix: str) -> dict[str, Any]:
    """Move a finished local Parquet file into the store under a content hash; returns name, bytes and checksum."""
    folder, _, leaf = local.rpartition("/")
    scratch = Store(folder)
    checksum, size = scratch.checksum(leaf), scratch.size(leaf)
    name = f"{prefix}{checksum[:16]}.parquet"
    store.adopt(local, name)
    return {"name": name, "bytes": size, "checksum": checksum}


def checksum_stream(stream: IO[bytes]) -> str:
    """xxh3-128 of the rest of the stream, in hexadecimal."""
    digest = xxhash.xxh3_128()
    for chunk in _chunks(stream):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(stream: IO[bytes]) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK_BYTES):
        yield chunk


@contextlib.contextmanager
def _written_beside(target: Path, data: bytes, *, durable: bool = True, private: bool = False) -> Iterator[Path]:
    """An unfinished file with all the bytes, beside `target`; it is gone after the block. An OSError names `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = None
    try:
        # mkstemp creates the file for its owner alone.
        handle, temporary = tempfile.mkstemp(prefix=f"{SCRATCH}{owner()}-", dir=target.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        if not private:
            os.chmod(temporary, 0o644)
        yield Path(temporary)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a local file's bytes, or a directory's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
