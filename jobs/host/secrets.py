"""What must not leak and must not be forged: passwords in addresses, files that others could write."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jobs.host.errors import UserError


def refuse_open_directory(path: Path) -> None:
    """UserError where everybody may write into the directory; the sticky bit, as /tmp has it, protects what is there.

    A directory that is not there yet is nobody's.
    """
    if not path.exists():
        return
    mode = path.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise UserError(
            f"{path}: everybody may write there, and so decide what is trained and registered: chmod o-w {path}"
        )


def refuse_open_token(file: Path) -> None:
    """UserError where others than its owner may write the file of a cluster's token."""
    if file.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(f"{file}: others may write this token, and so choose whose cluster it is: chmod go-w {file}")


def redacted(value: Any) -> Any:
    """The value with the passwords inside its URIs replaced."""
    if isinstance(value, dict):
        return {key: redacted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redacted(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\w+://[^/\s:@]*):[^/\s@]+@", r"\1:***@", value)
    return value


def scheme_and_host(url: str) -> str | None:
    """All that can be told of a webhook, whose tokens stand in path or query. None where it is no web address."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return None
    return f"{parts.scheme}://{parts.hostname}{port}"
