"""How long to wait before something is tried again."""

from __future__ import annotations

LONGEST_SECONDS = 3600.0


def wait_seconds(tried: int, *, first: float) -> float:
    """After `tried` tries: `first` after one, then twice as long each time, an hour at most."""
    return min(first * 2.0 ** min(tried - 1, 32), LONGEST_SECONDS)
