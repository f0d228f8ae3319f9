"""What may happen to a text file while somebody reads it."""

from __future__ import annotations

import os
from pathlib import Path


def truncated(path: Path) -> None:
    """The first half of it stays."""
    os.truncate(path, path.stat().st_size // 2)


def grown(path: Path) -> None:
    """Its last line stands there once more."""
    line = path.read_text().splitlines()[-1]
    with path.open("a") as stream:
        stream.write(f"{line}\n")


def overwritten(path: Path) -> None:
    """In place, with as many bytes: user u is user w."""
    with path.open("r+b") as stream:
        content = stream.read().replace(b"u,", b"w,")
        stream.seek(0)
        stream.write(content)


def replaced(path: Path) -> None:
    """By another file of the same size and time."""
    other, status = path.with_name(f"{path.name}.new"), path.stat()
    other.write_bytes(path.read_bytes().replace(b"u,", b"w,"))
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


WAYS = [truncated, grown, overwritten, replaced]
