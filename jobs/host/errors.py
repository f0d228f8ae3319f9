"""How a command ends: the error class of a user's mistake, exit codes, and the wait before another try."""

from __future__ import annotations


class UserError(ValueError):
    """A user's mistake. The message is one line that names the key or file, the value and the fix; exit code 2.

    Packages define subclasses (CheckpointError). Errors in the data are `pipeline.events.DataError`, errors
    in a request to a registered model are the scorer's `RequestError`: those packages do not import this one.
    """


class TryLater(UserError):
    """Nothing is wrong, and the same command may succeed later: exit code 75."""


MISTAKE = 2
"""A user's mistake: a retry cannot succeed."""
NOT_FOUND = 3
"""`solar forget`: done, but some of the users are not in the data set."""
TRY_LATER = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command may succeed later."""
INTERRUPTED = 130
"""The command was stopped by Ctrl-C or SIGTERM; everything committed before remains."""
LONGEST_SECONDS = 3600.0
"""Upper limit of `wait_seconds`."""


def wait_seconds(tried: int, *, first: float) -> float:
    """Seconds to wait after `tried` failed tries: `first` after one, then doubled each time, at most an hour."""
    return min(first * 2.0 ** min(tried - 1, 32), LONGEST_SECONDS)
