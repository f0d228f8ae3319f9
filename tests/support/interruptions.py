"""Commands that are killed: start one as a user does, follow it, end a process of it, compare what two runs learned."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from jobs.host.json_files import read_rows
from jobs.training.checkpoint import latest_checkpoint, read_state
from tests.support.commands import SOLAR
from tests.support.held import Holds

WAIT_SECONDS = 600.0
"""For a moment that must come; only a defect (or a machine that is far too busy) uses it up."""


class Command:
    """`solar ...` in a process group of its own."""

    def __init__(
        self,
        *arguments: str | Path,
        cwd: Path,
        environment: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
        holds: Holds | None = None,
    ) -> None:
        """`environment`: instead of this process's; `prefix` goes before the command; `holds`: where it waits."""
        if holds is not None:
            environment = holds.environment(environment)
        self._process = psutil.Popen(
            [*prefix, *(holds.program if holds else [SOLAR]), *map(str, arguments)],
            cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self) -> bool:
        return self._process.poll() is not None

    def finish(self, *, within: float = WAIT_SECONDS) -> tuple[int, str, str]:
        """Wait for the end: exit code, stdout, stderr."""
        out, errors = self._process.communicate(timeout=within)
        return self._process.returncode, out, errors

    def family(self) -> list[psutil.Process]:
        """The command and all that it started."""
        try:
            return [self._process, *self._process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def workers(self) -> list[psutil.Process]:
        """The training workers, in the order of their start."""
        return [process for process in self.family() if _title(process).startswith("ray::RayTrainWorker")]

    def wait_for_step(self, run_dir: Path, step: int) -> int:
        """Return once telemetry.jsonl has this step (or the command ended); the latest step."""
        deadline = time.monotonic() + WAIT_SECONDS
        while (latest := latest_step(run_dir)) < step and not self.ended():
            assert time.monotonic() < deadline, f"step {step} never came"
            time.sleep(0.05)
        return latest

    def send(self, number: int, *, group: bool = False) -> None:
        """A signal to the command, or to its process group as a terminal's Ctrl-C."""
        if group:
            os.killpg(self.pid, number)
        else:
            self._process.send_signal(number)

    def end(self, victim: str) -> None:
        """kill -9 of the `command` alone or of `everything` it started, or a signal by its name: SIGINT as a terminal's
        Ctrl-C reaches the whole group, SIGTERM, as `kill` or a container sends it, only the command."""
        if victim == "command":
            self.send(signal.SIGKILL)
        elif victim == "everything":
            self.kill_all()
        else:
            self.send(SIGNALS[victim], group=victim == "SIGINT")

    def kill_all(self) -> None:
        """kill -9 of the command and of everything it started, at once."""
        for process in reversed(self.family()):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue


def latest_step(run_dir: Path) -> int:
    """The last step that telemetry.jsonl tells of."""
    steps = [row["step"] for row in telemetry(run_dir) if row["kind"] == "step"]
    return steps[-1] if steps else 0


def telemetry(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of telemetry.jsonl."""
    return read_rows(run_dir / "telemetry.jsonl")


def orphans(family: list[psutil.Process], *, within: float = 120.0) -> list[str]:
    """What still runs of a command's processes `within` seconds after it ended; an idle machine needs two.

    Ray's two agents of a node look for their raylet once a minute and write nothing: they are not counted.
    """
    agents = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    deadline = time.monotonic() + within
    while True:
        _, alive = psutil.wait_procs(family, timeout=0.2)
        left = [title for title in map(_title, alive) if title and title not in agents]
        if not left or time.monotonic() > deadline:
            return left


def learned(run_dir: Path) -> dict[str, Any]:
    """Everything that two equal runs must share: weights, optimizer rows and moments, and the best validation."""
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None, run_dir
    state = read_state(checkpoint, checksums=True)["train_state"]
    files = sorted(checkpoint.glob("*.safetensors"))
    tensors = {f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}
    return tensors | {name: state[name] for name in ("step", "finished", "best_metric", "best_step", "loader")}


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """The names whose values are not bit-equal."""
    names = sorted(expected.keys() | found.keys())
    return [name for name in names if not _equal(expected.get(name), found.get(name))]


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return torch.equal(left, right)
    return bool(left == right)


def _title(process: psutil.Process) -> str:
    try:
        return (process.cmdline() or [process.name()])[0]
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


SIGNALS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM}
