"""How a night of the simulated month is run: `solar nightly` as cron would start it, an MLflow server, a small disk."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests.support.commands import SOLAR, ForkedCommand, free_ports
from tests.support.held import Holds
from tests.support.interruptions import orphans

WAIT_SECONDS = 600.0


class NightProcess:
    """`solar nightly ...` in a process group of its own, its output in files that can be read while it runs."""

    def __init__(self, arguments: list[str], *, cwd: Path, output: Path, holds: Holds | None = None) -> None:
        """`holds`: the steps at whose beginning it waits."""
        program, environment = ([SOLAR], dict(os.environ)) if holds is None else (holds.program, holds.environment())
        self._output, self._errors = output.with_suffix(".out"), output.with_suffix(".err")
        output.parent.mkdir(parents=True, exist_ok=True)
        self._started = time.monotonic()
        with self._output.open("w") as out, self._errors.open("w") as errors:
            self._process = psutil.Popen(
                [*program, "nightly", *arguments], cwd=cwd, stdout=out, stderr=errors, start_new_session=True,
                env={**environment, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip

    @property
    def said(self) -> str:
        return self._output.read_text()

    @property
    def errors(self) -> list[str]:
        return self._errors.read_text().strip().splitlines()

    def ended(self) -> bool:
        return self._process.poll() is not None

    def wait_for(self, date: datetime.date, step: str) -> bool:
        """Until the step is announced; False where the command ended before."""
        announced = re.compile(rf"^night\s+{date} {step}$", re.MULTILINE)
        deadline = time.monotonic() + WAIT_SECONDS
        while not announced.search(self.said):
            if self._process.poll() is not None:
                return announced.search(self.said) is not None
            assert time.monotonic() < deadline, f"{step} of {date} never came"
            time.sleep(0.02)
        return True

    def wait_a_little(self, seconds: float) -> None:
        """So long, or until the command has ended."""
        with contextlib.suppress(psutil.TimeoutExpired):
            self._process.wait(seconds)

    def kill(self, *, group_alone: bool) -> list[str]:
        """kill -9 of its process group, or of all that it started; what still runs half a minute later."""
        family = [self._process, *self._process.children(recursive=True)] if self._process.poll() is None else []
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for process in [] if group_alone else reversed(family):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        return orphans(family)

    def finish(self) -> tuple[int, float]:
        """(exit code, seconds)."""
        try:
            code = self._process.wait(WAIT_SECONDS)
        except BaseException:
            self.kill(group_alone=False)
            raise
        return code, time.monotonic() - self._started


class NightWithoutRay:
    """The same as a fork without Ray."""

    def __init__(self, arguments: list[str], *, cwd: Path, output: Path, holds: Holds | None = None) -> None:
        output.mkdir(parents=True)
        self._started = time.monotonic()
        self._command = ForkedCommand("nightly", *arguments, cwd=cwd, output=output, holds=holds)

    @property
    def said(self) -> str:
        return self._command.out

    @property
    def errors(self) -> list[str]:
        return self._command.errors.strip().splitlines()

    def ended(self) -> bool:
        return self._command.ended()

    def kill(self) -> None:
        self._command.kill()

    def finish(self) -> tuple[int, float]:
        """(exit code, seconds)."""
        return self._command.finish(), time.monotonic() - self._started


class MlflowServer:
    """A tracking server on this machine, which can be away."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        [self._port] = free_ports(1)
        self._directory = directory
        self._process: psutil.Popen | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        command = [
            str(Path(sys.executable).parent / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(self._port),
            "--workers", "1", "--backend-store-uri", f"sqlite:///{self._directory / 'mlflow.db'}",
            "--artifacts-destination", str(self._directory / "artifacts"),
        ]  # fmt: skip
        with (self._directory / "server.log").open("a") as log:
            # Without its seven processes for evaluations of language models.
            environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            self._process = psutil.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        wait_until(self._answers, "MLflow's server")

    def stop(self) -> None:
        if self._process is not None:
            family = [*self._process.children(recursive=True), self._process]
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.terminate()
            _, alive = psutil.wait_procs(family, timeout=20)
            for process in alive:
                process.kill()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False


def can_mount() -> bool:
    """Whether this process may mount file systems: a full disk is then a real one."""
    return os.geteuid() == 0 and shutil.which("mount") is not None


@contextlib.contextmanager
def small_disk(directory: Path, *, kilobytes: int) -> Iterator[Callable[[], None]]:
    """A file system of so many kilobytes at `directory`; what is called frees it. What was written stays in the end."""
    directory.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "small", str(directory)], check=True)
    aside = directory.with_name(f"{directory.name}.aside")
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=1g", str(directory)], check=True) and None
        shutil.copytree(directory, aside, symlinks=True)
    finally:
        subprocess.run(["umount", str(directory)], check=True)
    directory.rmdir()
    aside.rename(directory)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.2)
