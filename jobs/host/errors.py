"""What ends a command: a user's mistake in one line, exit codes, and how long to wait before another try."""

from __future__ import annotations


class UserError(ValueError):
    """A user's mistake, told in one line that names the key or file, the value and the fix; exit code 2.

    Rooms have kinds of their own below it (CheckpointError, RunInUse). Mistakes in the data are pipeline's DataError,
    those in what a registered model is asked the scorer's RequestError: neither imports this package.
    """


MISTAKE = 2
"""The user's: no retry mends it."""
TRY_LATER = 75
"""As in sysexits.h: nothing is wrong, the same command may succeed later."""
INTERRUPTED = 130
"""Somebody stopped it; what was committed is still there."""
LONGEST_SECONDS = 3600.0


def wait_seconds(tried: int, *, first: float) -> float:
    """After `tried` tries: `first` after one, then twice as long each time, an hour at most."""
    return min(first * 2.0 ** min(tried - 1, 32), LONGEST_SECONDS)
