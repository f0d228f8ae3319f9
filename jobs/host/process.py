"""What a process is given from outside: signals that are noted instead of raised, environment variables for a while."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def interrupt() -> None:
    raise KeyboardInterrupt


@contextmanager
def noted_signals(*, second: Callable[[], None] = interrupt) -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM arrived in the block; `second` is what a second one does. Elsewhere than in the main
    thread, which alone gets signals, none ever does."""
    seen: list[int] = []

    def handle(number: int, _frame: Any) -> None:
        seen.append(number)
        if len(seen) > 1:
            second()

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """These variables in the block, for this process and for what it starts; then they are as they were."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
