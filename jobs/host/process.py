"""A process and its surroundings: its standard streams, signals recorded instead of raised, environment variables set
temporarily, and who else uses the machine's memory."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil

RAY_PREFIX = "ray::"
"""Ray renames its workers so, whichever cluster they belong to."""


def interrupt() -> None:
    raise KeyboardInterrupt


def open_missing_streams() -> None:
    """Where the caller closed a standard stream, /dev/null takes its place: the next file that is opened would get its
    number, and with it what Ray and other libraries write there."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


@contextmanager
def noted_signals(*, second: Callable[[], None] = interrupt) -> Iterator[Callable[[], bool]]:
    """Record SIGINT and SIGTERM during the block: yields a function that returns whether one has arrived. `second` runs
    at every further signal. Outside the main thread (Python delivers signals only there) it always returns False."""
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
    """Set environment variables during the block, for this process and its children; then restore the old ones."""
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


def largest_other_process() -> str | None:
    """The process with the most memory of this machine, such as `python (pid 7) with 18.0 GB`; None if it is this
    process, one that it started, or a worker of Ray."""
    sizes: list[tuple[int, psutil.Process]] = []
    for process in psutil.process_iter(["memory_info"]):
        if memory := process.info["memory_info"]:
            sizes.append((memory.rss, process))
    bytes_used, largest = max(sizes, key=lambda size: size[0])
    try:
        name = largest.name()
        ours = os.getpid() in (largest.pid, *(parent.pid for parent in largest.parents()))
        if ours or name.startswith(RAY_PREFIX):
            return None
    except psutil.Error:  # it has ended meanwhile
        return None
    return f"{name} (pid {largest.pid}) with {bytes_used / 1e9:.1f} GB"
