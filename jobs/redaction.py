"""What is printed, stored and logged of addresses: no passwords and no tokens."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit


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
