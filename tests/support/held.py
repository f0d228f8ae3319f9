"""Commands that wait at given points until a test lets them go on: what the test does there is always in time.

    holds = Holds(tmp_path / "holds", 17)                                    # a training step; 0: before the first one
    command = Command("train", ..., holds=holds)                             # or a step of a night, by its name
    holds.wait(17, command)                                                  # it is there, and stays there
    holds.release(17)

A point holds once: after a restart, training passes it. Training that is held goes on, too, when it is asked to stop.

`python -m tests.support.held DIRECTORY COMMAND ...` is the command `solar` that looks into DIRECTORY for its holds.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from jobs.cluster.telemetry import Reporter

ROOT = Path(__file__).parents[2]
POLL_SECONDS = 0.05
WAIT_SECONDS = 600.0


class Ends(Protocol):
    """A process."""

    def ended(self) -> bool: ...

    def finish(self) -> object: ...


class Holds:
    """The points at which commands wait, as files in a directory."""

    def __init__(self, directory: Path, *points: int | str) -> None:
        directory.mkdir(parents=True)
        self.directory = directory
        for point in points:
            (directory / f"hold-{point}").touch()

    @property
    def program(self) -> list[str]:
        """What is started instead of `solar`."""
        return [sys.executable, "-m", "tests.support.held", str(self.directory)]

    def environment(self, values: dict[str, str] | None = None) -> dict[str, str]:
        """These variables (by default this process's) for the program: it finds the tests."""
        values = dict(os.environ if values is None else values)
        return values | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), values.get("PYTHONPATH", "")]))}

    def wait(self, point: int | str, process: Ends) -> None:
        """Until the command waits there."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not (self.directory / f"at-{point}").exists():
            assert not process.ended(), f"ended before {point}: {process.finish()}"
            assert time.monotonic() < deadline, f"{point} never came"
            time.sleep(POLL_SECONDS)

    def release(self, point: int | str) -> None:
        (self.directory / f"go-{point}").touch()


def begins(directory: Path, point: int | str) -> bool:
    """Whether the command has to wait at this point now; from now on it is known to be there."""
    due = (directory / f"hold-{point}").exists() and not (directory / f"at-{point}").exists()
    if due:
        (directory / f"at-{point}").touch()
    return due


def wait_at(directory: Path, point: int | str, *, unless: Callable[[], bool] = lambda: False) -> None:
    """Wait at this point if the command has to, and go on when the test says so or `unless` does."""
    if begins(directory, point):
        while not released(directory, point) and not unless():
            time.sleep(POLL_SECONDS)


def released(directory: Path, point: int | str) -> bool:
    return (directory / f"go-{point}").exists()


def train_worker(directory: Path, arguments: dict[str, Any]) -> None:
    """A training worker, with Ray or without, held where the directory says."""
    from jobs.runs import train

    reporter = HeldReporter(arguments["reporter"], directory, telemetry=arguments.get("telemetry"))
    reporter.hold(0)
    train._train_worker(arguments | {"reporter": reporter})


class HeldReporter:
    """Another reporter, with which rank 0 waits after a step; the other ranks wait for it in the next one."""

    def __init__(self, reporter: Reporter, directory: Path, *, telemetry: Any | None) -> None:
        """`telemetry`: the actor that says whether training is asked to stop; None = nobody asks."""
        import torch.distributed as dist

        self.should_stop = reporter.should_stop
        self._reporter, self._directory, self._telemetry = reporter, directory, telemetry
        self._is_first = dist.get_rank() == 0

    def row(self, kind: str, **values: Any) -> None:
        self._reporter.row(kind, **values)
        if kind == "step":
            self.hold(values["step"])

    def hold(self, step: int) -> None:
        if self._is_first:
            wait_at(self._directory, step, unless=self._asked_to_stop)

    def _asked_to_stop(self) -> bool:
        import ray

        return self._telemetry is not None and bool(ray.get(self._telemetry.push.remote([])))


def hold_training(directory: Path) -> None:
    """Let the workers that this process starts wait at the steps of training that the directory names."""
    from jobs.runs import train

    # By its name in the package: this module may be __main__.
    from tests.support import held

    train._train_worker = functools.partial(held.train_worker, directory)


def hold_nights(directory: Path) -> None:
    """Let the nights of this process wait at the beginning of the steps that the directory names."""
    from jobs.nightly.context import NightContext

    tell = NightContext.tell

    def tell_and_wait(self: NightContext, text: str) -> None:
        tell(self, text)
        # A step of a night is told by its name alone.
        if text.isidentifier():
            wait_at(directory, text)

    NightContext.tell = tell_and_wait


def main() -> None:
    from jobs import cli

    directory = Path(sys.argv[1])
    hold_training(directory)
    hold_nights(directory)
    cli.main(sys.argv[2:])


if __name__ == "__main__":
    main()
