"""A Ray cluster of several nodes on this machine: each node its own processes and address, to be killed or cut off."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.support.commands import free_ports

RAY = str(Path(sys.executable).parent / "ray")
ADDRESS_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH")
START_SECONDS = 180.0


class Node:
    """`ray start --block` and all that it started."""

    def __init__(self, process: psutil.Popen, log: Path) -> None:
        self._process, self._log = process, log

    def wait_until_started(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in self._log.read_text():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.2)

    def processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return [self._process, *self._process.children(recursive=True)]
        return []

    def kill(self) -> None:
        """kill -9 of all of it at once, as where a machine loses its power."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


class Nodes:
    """A head that trains nothing and nodes of one CPU each; `environment` is what a driver needs to join."""

    def __init__(self, *, settings: dict[str, str] | None = None) -> None:
        """`settings`: environment variables of every node."""
        # Ray's sockets lie below this directory, and the path of a socket has 107 bytes at most.
        self._home = Path(tempfile.mkdtemp(prefix="sr", dir="/tmp"))
        self._nodes: list[Node] = []
        self.environment = {key: value for key, value in os.environ.items() if key not in ADDRESS_VARIABLES}
        self.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        # A node that refuses to be asked three times is dead after two seconds instead of fifteen.
        self.environment |= {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "3"}
        self.environment |= {"RAY_USAGE_STATS_ENABLED": "0", **(settings or {})}

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        for node in reversed(self._nodes):
            node.kill()
        shutil.rmtree(self._home, ignore_errors=True)

    def head(self, ip: str, port: int, *, dashboard: int | None = None, prefix: Sequence[str] = ()) -> Node:
        """Start the head node at `ip`, its job server at the port `dashboard`; `prefix` goes before the command."""
        jobs = (
            [f"--dashboard-host={ip}", f"--dashboard-port={dashboard}"] if dashboard else ["--include-dashboard=false"]
        )
        return self._start(ip, prefix, "--head", f"--port={port}", "--num-cpus=0", *jobs)

    def node(self, ip: str, address: str, *, prefix: Sequence[str] = ()) -> Node:
        """Start a node of one CPU that joins the head's `address`."""
        return self._start(ip, prefix, f"--address={address}", "--num-cpus=1")

    def _start(self, ip: str, prefix: Sequence[str], *options: str) -> Node:
        directory = self._home / str(len(self._nodes))
        directory.mkdir()
        command = [
            *(*prefix, RAY, "start", "--block", "--disable-usage-stats", f"--node-ip-address={ip}"),
            *("--object-store-memory=100000000", f"--temp-dir={directory}", *options),
            # Without an agent, whose port another cluster may have, a node takes no jobs.
            f"--dashboard-agent-listen-port={free_ports(1)[0]}",
        ]
        log = directory / "log"
        with log.open("w") as stream:
            process = psutil.Popen(
                command,
                env=self.environment,
                cwd=directory,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._nodes.append(Node(process, log))
        return self._nodes[-1]
