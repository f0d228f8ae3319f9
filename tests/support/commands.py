"""`solar ...` as a user runs it: a process of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

SOLAR = str(Path(sys.executable).parent / "solar")


def solar(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run([SOLAR, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=600)


def succeeded(*arguments: str | Path, cwd: Path) -> str:
    """The output of a command that must not fail."""
    done = solar(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(*arguments: str | Path, cwd: Path) -> str:
    """The one line of a command that ends with exit code 2."""
    done = solar(*arguments, cwd=cwd)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens to."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [open_socket.getsockname()[1] for open_socket in sockets]
    for open_socket in sockets:
        open_socket.close()
    return ports
