"""What the operating system or an object store refused (a full disk, a place that cannot be written, no credentials),
as one line with the way out."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from pipeline.events import DataError, NotNow

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FREE_DISK = "free some disk; what was committed is still there"
_WAYS_OUT = {
    errno.ENOSPC: _FREE_DISK,
    errno.EDQUOT: _FREE_DISK,
    errno.EFBIG: f"raise the limit of file sizes (`ulimit -f`), or {_FREE_DISK}",
    errno.EACCES: "name another place, or change its permissions",
    errno.EPERM: "name another place, or change its permissions",
    errno.EROFS: "name a place that can be written",
    errno.ENOTDIR: "a part of this path is a file: name another place",
    errno.EISDIR: "name a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "nothing can be created there: name another place",
    errno.ELOOP: "mend the links, or name another place",
}
_TEXTS = {
    "No space left on device": errno.ENOSPC,
    "database or disk is full": errno.ENOSPC,
    "(os error 28)": errno.ENOSPC,
    "(os error 122)": errno.EDQUOT,
    "(os error 27)": errno.EFBIG,
}
"""How libraries with errors of their own (safetensors, polars, SQLite) say it."""
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")
_NO_WAY = ("EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError")


def refusal(error: BaseException, *, place: str | None = None) -> str | None:
    """The line for an error of which the system's refusal is the cause; None for every other error.

    `place`: what was being written, for errors that name no file.
    """
    found = _refused(error)
    if found is None:
        return None
    number, file = found
    return f"{file or place or 'disk'}: {os.strerror(number)}: {_WAYS_OUT[number]}"


def as_data_error(error: BaseException, *, place: str | None = None) -> DataError | None:
    """`refusal` as an error: NotNow if no more can be stored, DataError for other refusals, None for other errors."""
    line, found = refusal(error, place=place), _refused(error)
    if line is None or found is None:
        return _of_store(error)
    return NotNow(line) if found[0] in _FULL else DataError(line)


def _of_store(error: BaseException) -> DataError | None:
    """The line for what an object store, or the way to it, refuses."""
    for cause in causes(error):
        line = f"object store: {' '.join(str(cause).split())}"
        # By names: the libraries of stores are imported only where one is used.
        if type(cause).__name__ in _NO_CREDENTIALS:
            return DataError(f"{line}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
        if type(cause).__name__ in _NO_WAY:
            return NotNow(f"{line}: check AWS_ENDPOINT_URL and the network, and try again")
        # Of a disk it has a number.
        if isinstance(cause, PermissionError) and cause.errno is None:
            return DataError(f"{line}: check the credentials and what they may do")
    return None


@contextlib.contextmanager
def storing(place: str) -> Iterator[None]:
    """In the block, what the system refuses is raised as by `as_data_error`; `place` is what the block writes."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        if (told := as_data_error(error, place=place)) is None:
            raise
        raise told from error


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, then what it was raised from or wraps, innermost last."""
    current: BaseException | None = error
    while current is not None:
        yield current
        inner = getattr(current, "cause", None)  # Ray's wrappers
        current = inner if isinstance(inner, BaseException) else current.__cause__


def _refused(error: BaseException) -> tuple[int, str | None] | None:
    """(the system's error number, the file that the error names)."""
    for cause in causes(error):
        if isinstance(cause, OSError):
            number = errno.ENOTDIR if _is_no_directory(cause) else cause.errno
            if number in _WAYS_OUT and (number != errno.ENOENT or _is_of_the_kernel(cause)):
                return number, _file_of(cause)
        else:
            number = next((number for text, number in _TEXTS.items() if text in str(cause)), None)
            if number is not None:
                return number, None
    return None


def _is_no_directory(error: OSError) -> bool:
    """Whether a directory was to be made where a file is."""
    return error.errno == errno.EEXIST and error.filename is not None and os.path.isfile(error.filename)


def _is_of_the_kernel(error: OSError) -> bool:
    """Whether the file would lie in a file system that stores nothing, such as /proc: there, to create one is to find
    none. Anywhere else, that a file is missing is no refusal."""
    if error.filename is None:
        return False
    try:
        return os.statvfs(os.path.dirname(os.path.abspath(os.fsdecode(error.filename)))).f_blocks == 0
    except OSError:
        return False


def _file_of(error: OSError) -> str | None:
    """The file, which pyarrow names only in its text."""
    if error.filename is not None:
        return os.fsdecode(error.filename)
    named = re.search(r"local file '([^']+)'", str(error))
    return named[1] if named else None
