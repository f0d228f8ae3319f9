"""A command run to its end while somebody looks where its processes listen."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil

from tests.support.commands import LIMIT_SECONDS, SOLAR

LOOK_SECONDS = 2.0
"""Each look reads every open file of every process: every half second took a minute of a whole run's computing."""


def run_and_look(*arguments: str | Path, cwd: Path) -> tuple[subprocess.CompletedProcess[str], set[tuple[str, str]]]:
    """(what the command ended with, {(name of a process, address that it listened on)}), of all its processes."""
    command, seen = [SOLAR, *map(str, arguments)], set()
    with (cwd / "out").open("w+") as out, (cwd / "errors").open("w+") as errors:
        process = subprocess.Popen(command, cwd=cwd, stdout=out, stderr=errors)
        started = psutil.Process(process.pid)
        until = time.monotonic() + LIMIT_SECONDS
        while process.poll() is None and time.monotonic() < until:
            seen |= _listening(started)
            time.sleep(LOOK_SECONDS)
        process.kill()
        code = process.wait()
        texts = [(stream.seek(0), stream.read())[1] for stream in (out, errors)]
    return subprocess.CompletedProcess(command, code, *texts), seen


def _listening(started: psutil.Process) -> set[tuple[str, str]]:
    """Processes may end while they are looked at."""
    found = set()
    try:
        processes = [started, *started.children(recursive=True)]
    except psutil.Error:
        return found
    for process in processes:
        try:
            sockets = [each for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN]
            found |= {(process.name(), each.laddr.ip.removeprefix("::ffff:")) for each in sockets}
        except psutil.Error:
            continue
    return found
