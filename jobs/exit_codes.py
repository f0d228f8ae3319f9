"""Exit codes of `solar`, beside 0 and the 1 of an accident: schedulers and retries decide by them."""

MISTAKE = 2
"""The user's: no retry mends it."""
TRY_LATER = 75
"""As in sysexits.h: nothing is wrong, the same command may succeed later."""
INTERRUPTED = 130
"""Somebody stopped it; what was committed is still there."""
