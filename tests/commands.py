"""`solar ...` as a user runs it: a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SOLAR = str(Path(sys.executable).parent / "solar")


def solar(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run([SOLAR, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=600)


def refused(*arguments: str | Path, cwd: Path) -> str:
    """The one line of a command that ends with exit code 2."""
    done = solar(*arguments, cwd=cwd)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]
