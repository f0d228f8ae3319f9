"""Which files of a download are a public data set's events and tables, and which are left out."""

from __future__ import annotations

import dataclasses
import fnmatch
import re

from pipeline.events import DataError
from pipeline.log.inputs import AGAIN, FileFormat, Input, find_inputs, packed_copies, without_compression
from pipeline.log.listing import Listed, list_files
from pipeline.sources.files import ImportConfig, Reshape

_LINES, _LINE_BYTES = 20, 1 << 20
"""What is read of a file to see whether it has labels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """One way in which a data set is published."""

    events: tuple[str, ...]
    """Patterns of file names; every one must match. A file may be compressed."""
    config: ImportConfig
    not_events: tuple[str, ...] = ()
    """Patterns of file names that are left out, although one of `events` matches."""
    items: str | None = None
    """Pattern of the items tables, which are read if they exist; each part of a data set may have its own."""
    users: str | None = None
    """Pattern of the users table, which is read if it exists."""
    release: str | None = None
    """Expression whose first group tells, in the names of event files, which release a file belongs to."""
    label_sign: str | None = None
    """Expression that matches rows of an events file with labels, and no others; files without labels are left out."""
    reshape: Reshape | None = None
    """Rows as they are in the file -> one row per event, with a label."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A public data set."""

    source: str
    """Where its layout is documented."""
    layouts: tuple[Layout, ...]
    is_ranked: bool = False
    """The first layout whose files exist is read, because the others are parts of it; else there may be only one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedFiles:
    """What a download has."""

    layout: Layout
    events: list[Input]
    items: list[Input]
    users: list[Input]
    left_out: dict[str, str]
    """{name: why} of the download's other files."""


def find_published(name: str, published: Published, path: str) -> PublishedFiles:
    """The files of the data set `name` in its unpacked directory, or the file of its events and the tables beside it.

    DataError: there are no events, several releases, or files that cannot be read.
    """
    listing = list_files(path)
    files = [file for file in listing.files if not file.is_folder]
    beside = files
    if listing.is_single:
        folder = list_files(files[0].url.rpartition("/")[0])
        beside = [file for file in folder.files if file.url.rpartition("/")[0] == files[0].url.rpartition("/")[0]]
    found = [layout for layout in published.layouts if _event_files(files, layout)]
    if not found:
        wanted = " or ".join(" and ".join(layout.events) for layout in published.layouts)
        raise DataError(f"{path}: no {wanted} there; unpack {name} as published: {published.source}")
    _refuse_several_releases(path, files, found[:1] if published.is_ranked else found)

    # The files of the events, without those that have no labels.
    layout = found[0]
    events = _inputs(_event_files(files, layout), layout.config.files)
    unlabelled = [file for file in events if not _has_labels(file, layout)]
    if len(unlabelled) == len(events):
        raise DataError(f"{path}: no labels in {', '.join(file.name for file in events)}; name a part with labels")
    events = [file for file in events if file not in unlabelled]

    # The tables, and what is left.
    items = _inputs(_matching(beside, layout.items), layout.config.items.files)
    users = _inputs(_matching(beside, layout.users), layout.config.users.files)
    if len(users) > 1:
        raise DataError(f"{path}: several tables of users ({', '.join(file.name for file in users)}); keep one")
    read, bare = {file.url for file in (*events, *items, *users)}, {file.url for file in unlabelled}
    left_out = {
        file.name: AGAIN if file.is_again else "without labels" if file.url in bare else f"that {name} does not need"
        for file in files
        if file.url not in read
    }
    return PublishedFiles(layout=layout, events=events, items=items, users=users, left_out=left_out)


def _matching(files: list[Listed], pattern: str | None) -> list[Listed]:
    """Files with this pattern of names, which may be compressed."""
    if pattern is None:
        return []
    leaves = [(file, without_compression(file.name.rpartition("/")[2]).lower()) for file in files]
    return [file for file, leaf in leaves if fnmatch.fnmatchcase(leaf, pattern.lower()) and not file.is_again]


def _event_files(files: list[Listed], layout: Layout) -> list[Listed]:
    """The files of events; none if a pattern of the layout matches no file."""
    others = {file.url for pattern in layout.not_events for file in _matching(files, pattern)}
    found = [[file for file in _matching(files, each) if file.url not in others] for each in layout.events]
    return [file for matching in found for file in matching] if all(found) else []


def _refuse_several_releases(path: str, files: list[Listed], layouts: list[Layout]) -> None:
    releases: dict[str, str] = {}
    for number, layout in enumerate(layouts):
        for file in _event_files(files, layout):
            told = re.search(layout.release, file.name) if layout.release else None
            # A file whose name tells no release may belong to any of its layout.
            if told or len(layouts) > 1:
                releases.setdefault(f"{number} {told[1].lower() if told else ''}", file.name)
    names = list(releases.values())
    if copies := packed_copies(file.name for layout in layouts for file in _event_files(files, layout)):
        names = [*copies.values(), *copies]
    if len(names) > 1:
        raise DataError(
            f"{path}: holds several releases, or one release twice ({', '.join(names)}); name the directory or file of "
            "one of them"
        )


def _inputs(files: list[Listed], options: FileFormat) -> list[Input]:
    return [found for file in files for found in find_inputs(file.url, options=options)]


def _has_labels(file: Input, layout: Layout) -> bool:
    if layout.label_sign is None:
        return True
    with file.open() as stream:
        lines = [stream.readline(_LINE_BYTES).decode("utf-8", "replace") for _ in range(_LINES)]
    return not any(lines) or any(re.search(layout.label_sign, line) for line in lines)
