"""The output that a user sees: messages, tables, and progress (bars on a terminal, plain lines elsewhere).

Third-party libraries (and the C++ processes that they start) write to file descriptors 1 and 2, whatever their log
level is. Without `-v` both descriptors are redirected to a log file, and only this console writes to the terminal.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import rich.console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

PLAIN_WIDTH = 160
PLAIN_LINE_SECONDS = 10.0
"""Without a terminal, a stage prints a line at its start and at its end, and in between at most one per this time."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 and C1 without tab and line feed, separators of lines, marks and overrides of direction, lone surrogates."""


def one_line(error: object) -> str:
    """The text of the error, without line breaks."""
    return " ".join(str(error).split())


def printable(text: str) -> str:
    """The text with each control character spelled out (\\x1b): stored texts and names of files may hold commands of a
    terminal, or marks that change the direction of writing. Line breaks and tabs stay."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Console:
    """The terminal (or the pipe) as it was when the command started."""

    def __init__(self) -> None:
        self.log: Path | None = None
        """The file that receives the libraries' output; None while it goes to the terminal."""
        self._out, self._err = sys.stdout, sys.stderr
        self._rich = _rich_console(self._out)

    def capture_libraries(self, log: Path) -> None:
        """Send file descriptors 1 and 2 of this process and its children to `log` from now on; not this console."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self._out.flush()
        sys.stderr.flush()
        self._out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
        self._err = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8")
        self._rich = _rich_console(self._out)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
        self.log = log

    def note(self, text: str) -> Path | None:
        """Write the text to the file of the libraries' output; the file's name, None if they write to the terminal."""
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as stream:
                stream.write(text)
        return self.log

    def drop_empty_log(self) -> None:
        """At the end of a command: remove the file of the libraries' output if they wrote nothing."""
        if self.log is not None and self.log.exists() and not self.log.stat().st_size:
            self.log.unlink()

    def error(self, text: str) -> None:
        """One line on the error stream."""
        print(printable(text), file=self._err, flush=True)

    def line(self, text: str = "") -> None:
        """One line of text, without interpretation of markup."""
        self._rich.print(printable(text), markup=False)

    def teller(self, title: str) -> Callable[[str], None]:
        """A function that prints a line which begins with the title, as those of a stage do."""
        return lambda text: self.line(f"{title:<12} {text}")

    def table(
        self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, text: Sequence[str] = ()
    ) -> None:
        """A table; the first column and the columns named in `text` are left-aligned, all others right-aligned."""
        table = Table(title=title, title_justify="left", title_style="bold")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 or column in text else "right", no_wrap=index == 0)
        for row in rows:
            # A cell such as [genres] is text, not markup.
            table.add_row(*(escape(printable(cell.replace("\n", " "))) for cell in row))
        self._rich.print(table)

    @contextmanager
    def stage(self, title: str) -> Iterator[Stage]:
        """Show the progress of the block; at its end print a line with its duration and the stage's `result`."""
        stage = Stage(title, self._rich) if self._rich.is_terminal else PlainStage(title, self._rich)
        stage.begin()
        try:
            yield stage
        except BaseException:
            stage.end("stopped")
            raise
        stage.end(stage.result)


def _rich_console(out: TextIO) -> rich.console.Console:
    # Without a terminal there is no window width to respect.
    width = None if out.isatty() else PLAIN_WIDTH
    return rich.console.Console(file=out, highlight=False, soft_wrap=True, width=width)


class Stage:
    """A progress bar on a terminal."""

    def __init__(self, title: str, console: rich.console.Console) -> None:
        self.result = ""
        """Text of the last line, after the duration."""
        self._title, self._console = title, console
        self._started = time.monotonic()
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def begin(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=32),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task(self._title, total=None, note="")
        self._progress.start()

    def update(self, done: float, total: float | None, note: str = "") -> None:
        """Move the bar to `done` of `total` (None: unknown)."""
        assert self._progress is not None
        assert self._task is not None
        self._progress.update(self._task, completed=done, total=total, note=note)

    def tell(self, text: str) -> None:
        """Print a permanent line above the bar."""
        self._console.print(printable(f"{self._title:<12} {text}"), markup=False)

    def end(self, result: str) -> None:
        if self._progress is not None:
            self._progress.stop()
        seconds = time.monotonic() - self._started
        self._console.print(printable(f"{self._title:<12} {seconds:6.1f} s  {result}"), markup=False)


class PlainStage(Stage):
    """Progress without a terminal: a line at most every PLAIN_LINE_SECONDS."""

    def begin(self) -> None:
        self._last = time.monotonic()
        self._console.print(f"{self._title:<12} ...", markup=False)

    def update(self, done: float, total: float | None, note: str = "") -> None:
        if time.monotonic() - self._last >= PLAIN_LINE_SECONDS:
            self._last = time.monotonic()
            share = f"{100 * done / total:3.0f} %" if total else ""
            self._console.print(f"{self._title:<12} {self._last - self._started:6.1f} s  {share}  {note}", markup=False)
