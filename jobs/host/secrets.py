"""Protection of secrets and of files: hide passwords in URIs, refuse files and directories that others may write."""

from __future__ import annotations

import re
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
