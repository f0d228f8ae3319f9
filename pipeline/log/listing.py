"""Lists the files of a path, directory or pattern, on a local disk or in any fsspec store.

Links are followed; each file and folder is listed once, however many links lead to it. Nothing is opened: what cannot
be read (a link to nothing, a FIFO) is listed with the reason. Hidden files and markers, whose names begin with . or _,
are not listed, nor is what lies in such folders: Spark and others keep incomplete files in folders such as _temporary.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import glob
import heapq
import os
import stat
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from pipeline.events import DataError
from pipeline.storage import locate

_HIDDEN = (".", "_")
_MAGIC = "*?["
_YOUNG_NANOSECONDS = 2 * 10**9
"""No disk in use has a coarser clock."""
_REMOTE_VERSIONS = ("ETag", "etag", "mtime", "last_modified", "LastModified", "modificationTime", "updated", "created")
"""What stores call the version or the time of a file, the first counts."""
_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listed:
    """A file, or what is in the place of one."""

    name: str
    """The directory's name and the path inside it."""
    url: str
    """Where to open it: an absolute path or a URL."""
    bytes: int = 0
    version: tuple[Any, ...] = ()
    """As from `version_of`."""
    is_young: bool = False
    """Its version may stay the same even if it changes once more: the clocks of disks are coarse, and some stores tell
    neither version nor time."""
    problem: str | None = None
    """Why it cannot be read."""
    is_again: bool = False
    """It is one more way to a file or folder that is listed already."""
    is_folder: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listing:
    """What a path stands for."""

    files: list[Listed]
    """Sorted by place."""
    is_single: bool
    """The path is that of a file, not of a directory or a pattern."""


def list_files(path: str) -> Listing:
    """The files behind a path, directory or pattern. A name that exists is taken as it is, even if it has the letters
    of a pattern. DataError: there is nothing."""
    fs, root = locate(path)
    root = root.rstrip("/") or root
    is_local = isinstance(fs, LocalFileSystem)
    if is_local and not _is_utf8(root):
        raise DataError(f"{shown(path)}: the name is not UTF-8; rename it")
    if os.path.lexists(root) if is_local else fs.exists(root):
        is_folder = os.path.isdir(root) if is_local else fs.isdir(root)
        top, starts = root if is_folder else os.path.dirname(root), [root]
    elif any(letter in root for letter in _MAGIC):
        is_folder = True
        top = root[: min(root.find(letter) for letter in _MAGIC if letter in root)].rpartition("/")[0]
        starts = []
    else:
        raise DataError(f"{path}: no such file or directory; check the path")
    above = top.rpartition("/")[0]
    pattern = None if starts else root[len(above) :].lstrip("/")
    found = _local(root, starts, above=above) if is_local else _remote(fs, root, starts, above=above)
    found = [file for file in found if not is_folder or not _is_hidden(file.name, pattern=pattern)]
    return Listing(files=sorted(found, key=lambda file: file.url), is_single=not is_folder)


def version_of(url: str) -> tuple[Any, ...] | None:
    """What tells one content of a file from the next: its size and, on a disk, inode and time of the last change; in a
    store ETag or time. None if the file is gone."""
    fs, path = locate(url)
    try:
        if isinstance(fs, LocalFileSystem):
            return _version(os.stat(path))
        fs.invalidate_cache()
        return _remote_version(fs.info(path))
    except FileNotFoundError:
        return None


def shown(name: str) -> str:
    """The name as text that can be printed and stored: other bytes than UTF-8 and control characters are escaped."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _is_utf8(name: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _is_hidden(name: str, *, pattern: str | None) -> bool:
    """The first part of a name is the directory that the user named. A pattern may name hidden files, too."""
    if pattern and any(part.startswith(_HIDDEN) for part in pattern.split("/")[1:]):
        return False
    return any(part.startswith(_HIDDEN) for part in name.split("/")[1:])


def _local(root: str, starts: list[str], *, above: str) -> list[Listed]:
    if starts:
        return _Walk(above).run(starts)
    before, has_deep, deep = root.partition("/**")
    found = _Walk(above).run(sorted(glob.glob(before)))
    if not has_deep:
        return found
    # glob would follow links for ever.
    depth = len(before.split("/"))
    wanted = f"**{deep}".split("/")
    return [file for file in found if file.is_folder or _matches(file.url.split("/")[depth:], wanted)]


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether the parts of a path match those of a pattern, in which ** stands for any number of parts."""
    if not pattern or pattern == ["**"]:
        return bool(pattern) or not parts
    if pattern[0] == "**":
        return any(_matches(parts[count:], pattern[1:]) for count in range(len(parts)))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


class _Walk:
    """Collects what lies below some places of the local disk. Links come last, so that a file has the name that it has
    without them."""

    def __init__(self, above: str) -> None:
        self._above = above
        self._found: list[Listed] = []
        self._folders: deque[str] = deque()
        self._links: list[str] = []
        self._starts: set[str] = set()
        self._seen: set[tuple[int, int]] = set()

    def run(self, starts: Iterable[str]) -> list[Listed]:
        self._starts = set(starts)
        for path in starts:
            self._take(path, is_link=os.path.islink(path))
        while self._folders or self._links:
            if self._folders:
                self._open(self._folders.popleft())
            else:
                self._visit(heapq.heappop(self._links))
        return self._found

    def _open(self, folder: str) -> None:
        try:
            with os.scandir(folder) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self._note(folder, problem=_why(error), is_folder=True)
            return
        for entry in inside:
            if not entry.name.startswith(_HIDDEN):
                self._take(entry.path, is_link=entry.is_symlink())

    def _take(self, path: str, *, is_link: bool) -> None:
        if is_link:
            heapq.heappush(self._links, path)
        else:
            self._visit(path)

    def _visit(self, path: str) -> None:
        """Note a file; a folder waits to be opened."""
        try:
            status = os.stat(path)
        except OSError as error:
            self._note(path, problem=_why(error))
            return
        kind, identity = stat.S_IFMT(status.st_mode), (status.st_dev, status.st_ino)
        is_folder = kind == stat.S_IFDIR
        if is_folder and path not in self._starts and os.path.islink(path) and _leads_up(path):
            self._note(path, problem="a link to a folder that it lies in", is_folder=True)
        elif identity in self._seen:
            self._note(path, is_again=True, is_folder=is_folder)
        elif is_folder:
            self._folders.append(path)
        elif kind != stat.S_IFREG:
            self._note(path, problem=_KINDS.get(kind, "no regular file"))
        elif not os.access(path, os.R_OK):
            self._note(path, problem="not readable by this user")
        else:
            is_young = time.time_ns() - status.st_mtime_ns < _YOUNG_NANOSECONDS
            self._note(path, bytes=status.st_size, version=_version(status), is_young=is_young)
        self._seen.add(identity)

    def _note(self, path: str, *, problem: str | None = None, **fields: Any) -> None:
        name = path[len(self._above) :].lstrip("/")
        if not _is_utf8(name):
            name, problem = shown(name), problem or "a name that is not UTF-8"
        self._found.append(Listed(name=name, url=path, problem=problem, **fields))


def _why(error: OSError) -> str:
    reasons = {FileNotFoundError: "a link to nothing", PermissionError: "not readable by this user"}
    return reasons.get(type(error), f"not readable: {error.strerror}")


def _leads_up(link: str) -> bool:
    """Whether a link leads to a folder above it."""
    place, target = os.path.realpath(os.path.dirname(link)), os.path.realpath(link)
    return os.path.commonpath([place, target]) == target


def _remote(fs: Any, root: str, starts: list[str], *, above: str) -> list[Listed]:
    found = {root: fs.info(root)} if starts else fs.glob(root, detail=True)
    files: dict[str, Any] = {}
    for path, info in found.items():
        files |= fs.find(path, detail=True) if info["type"] == "directory" else {path: info}
    return [
        Listed(
            name=path[len(above) :].lstrip("/"), url=fs.unstrip_protocol(path), bytes=int(info["size"] or 0),
            version=_remote_version(info), is_young=not any(info.get(key) for key in _REMOTE_VERSIONS),
        )
        for path, info in files.items()
        if info["type"] == "file"
    ]  # fmt: skip


def _version(status: os.stat_result) -> tuple[Any, ...]:
    return status.st_size, status.st_ino, status.st_mtime_ns


def _remote_version(info: Mapping[str, Any]) -> tuple[Any, ...]:
    # A listing and a request for one file put the same ETag into other quotes, and times into other units.
    told = next((str(info[key]).strip('"') for key in _REMOTE_VERSIONS if info.get(key)), None)
    return info["size"], told
