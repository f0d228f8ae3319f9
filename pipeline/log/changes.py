"""Notices that files changed while they were read: what was read of them then belongs to no checksum."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.events import DataError
from pipeline.log.inputs import Input, checksum
from pipeline.log.listing import version_of

_AT_ONCE = 16
"""Requests to an object store."""


@contextlib.contextmanager
def unchanged(files: Sequence[tuple[Input, str]]) -> Iterator[None]:
    """In the block these files are read; each comes with the checksum that was taken after it was listed.

    DataError at the end of the block if one of them is no longer what was listed; also in place of an error of the
    block, which is then that of a file half old and half new.
    """
    try:
        yield
    except Exception as error:
        _refuse_changed(files, cause=error)
        raise
    _refuse_changed(files)


def _refuse_changed(files: Sequence[tuple[Input, str]], *, cause: Exception | None = None) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        is_changed = list(pool.map(lambda file: _is_changed(*file), files))
    names = [file.name for (file, _), changed in zip(files, is_changed, strict=True) if changed]
    if names:
        told = f"{names[0]} changed while it was read"
        if more := len(names) - 1:
            told = f"{names[0]} and {more:,} more file{'s' * (more > 1)} changed while they were read"
        raise DataError(f"{told}; nothing was written; run the same command again") from cause


def _is_changed(file: Input, value: str) -> bool:
    if version_of(file.url) != file.version:
        return True
    try:
        return file.is_young and checksum(file) != value
    except DataError:
        # It was there a moment ago.
        return True
