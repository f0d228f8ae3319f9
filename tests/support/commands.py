"""`solar ...` to its end: in a fork of a process that has imported everything, or as a user runs it.

A fork has a process, a working directory, an environment and output files of its own like any command, but imports
nothing anew and starts no Ray: what tasks and workers of a group do is done in the
fork, and by forked ranks. That takes a tenth of the computing of a command with Ray. Starting, watching and ending
Ray's processes is what tests of `solar_process`, of `Command` (interruptions.py) and of submitted jobs are for; with
SOLAR_TEST_RAY=1, as in `make soak`, every command is a process that starts Ray.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support import ranks
from tests.support.held import Holds, hold_nights, hold_training
from tests.support.serial import command_without_ray

SOLAR = str(Path(sys.executable).parent / "solar")
only_in_soak = pytest.mark.skipif(not os.environ.get("SOLAR_TEST_RAY"), reason="only in `make soak`")
"""For tests of minutes whose parts other tests cover."""
LIMIT_SECONDS = 600.0
"""For a command that ends; only a defect, or a machine that is far too busy, uses it up."""


def solar(
    *arguments: str | Path, cwd: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run it to its end in a fork; `environment`: instead of this process's."""
    if os.environ.get("SOLAR_TEST_RAY"):
        return solar_process(*arguments, cwd=cwd, environment=environment)
    with tempfile.TemporaryDirectory() as directory:
        command = ForkedCommand(*arguments, cwd=cwd, output=Path(directory), environment=environment)
        return subprocess.CompletedProcess(command.arguments, command.finish(), command.out, command.errors)


class ForkedCommand:
    """`solar ...` in a fork without Ray, with its output in files that can be read while it runs."""

    def __init__(
        self, *arguments: str | Path, cwd: Path, output: Path, environment: dict[str, str] | None = None,
        holds: Holds | None = None,
    ) -> None:  # fmt: skip
        """`output`: an existing directory; `environment`: instead of this process's; `holds`: the steps of a night at
        whose beginning it waits, and those of training after which it does."""
        self.arguments = [SOLAR, *map(str, arguments)]
        self._out, self._errors = output / "out", output / "errors"
        passed = (ranks.server_address(), environment or dict(os.environ), self.arguments, cwd, output)
        held = holds.directory if holds else None
        self._process = multiprocessing.get_context("forkserver").Process(target=_enter, args=(*passed, held))
        self._process.start()

    @property
    def out(self) -> str:
        return self._out.read_text() if self._out.exists() else ""

    @property
    def errors(self) -> str:
        return self._errors.read_text() if self._errors.exists() else ""

    def ended(self) -> bool:
        return self._process.exitcode is not None

    def kill(self) -> None:
        """kill -9 of the command alone, which must not have ranks then: they are no children of it."""
        self._process.kill()

    def finish(self) -> int:
        """Its exit code."""
        self._process.join(LIMIT_SECONDS)
        if self._process.exitcode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(self.arguments, LIMIT_SECONDS, self.out, self.errors)
        return self._process.exitcode


def solar_process(
    *arguments: str | Path, cwd: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run it to its end as a user does: a process that begins with nothing, and Ray."""
    return subprocess.run(
        [SOLAR, *map(str, arguments)],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS,
    )  # fmt: skip


def succeeded(*arguments: str | Path, cwd: Path) -> str:
    """The output of a command that must not fail."""
    done = solar(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(*arguments: str | Path, cwd: Path, code: int = 2) -> str:
    """The one line of a command that ends with this exit code: 2 is a user's mistake, 75 a run in use."""
    done = solar(*arguments, cwd=cwd)
    assert done.returncode == code, done.stdout + done.stderr
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


def _enter(
    server: str, environment: dict[str, str], arguments: list[str], directory: Path, output: Path, held: Path | None
) -> None:
    """In the fork: streams, directory and environment as a shell would give them, then the console script."""
    ranks.share_server(server)
    ranks.take_environment(environment)
    os.chdir(directory)
    for number, name in ((1, "out"), (2, "errors")):
        descriptor = os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
    sys.argv = arguments
    command_without_ray()
    if held is not None:
        hold_nights(held)
        hold_training(held)
    from jobs.cli import main

    code = 1
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not the interpreter's own end (see ranks.py).
        os._exit(code)
