"""Protection of secrets and of files: hide passwords in URIs, keep a file with a secret private, refuse files and
directories that others may write."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jobs.host.errors import UserError


def refuse_open_directory(path: Path) -> None:
    """UserError if everybody may write into the directory, unless it has the sticky bit (such as /tmp), which protects
    the files in it. A directory that does not exist yet is accepted.
    """
    if not path.exists():
        return
    mode = path.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise UserError(
            f"{path}: everybody may write there, and could change what is trained and registered: chmod o-w {path}"
        )


def refuse_open_token(file: Path) -> None:
    """UserError if users other than the owner may write the file with a cluster's token."""
    if file.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(
            f"{file}: others may write this token, and could send jobs to a cluster of theirs: chmod go-w {file}"
        )


def keep_private(file: Path, content: str) -> None:
    """Make a file that only its owner may read (mode 0600) in a directory of the owner alone (0700).

    A new file has the content and is born with that mode. An existing one keeps its content: it and its directory lose
    what others may do.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _close_to_others(file.parent)
    if not file.exists():
        staged = file.with_name(f".{file.name}-{secrets.token_hex(8)}")
        descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w") as stream:
                stream.write(content)
            # Of two processes at once one is first, and both find its whole content.
            with contextlib.suppress(FileExistsError):
                os.link(staged, file)
        finally:
            staged.unlink()
    _close_to_others(file)


def _close_to_others(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        path.chmod(mode & stat.S_IRWXU)


def redacted(value: Any) -> Any:
    """The value (text, or nested dicts and lists of text) with the passwords inside URIs replaced by ***."""
    if isinstance(value, dict):
        return {key: redacted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redacted(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\w+://[^/\s:@]*):[^/\s@]+@", r"\1:***@", value)
    return value


def scheme_and_host(url: str) -> str | None:
    """The part of a webhook's URL that may be shown: a token can be in the path or in the query. None if `url` is not a
    web address."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return None
    return f"{parts.scheme}://{parts.hostname}{port}"
