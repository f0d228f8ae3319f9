"""JSON files that a process may die in the middle of writing: documents replaced as a whole, and one row per line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows, without half a line of a killed process; none where there is no file."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Replace the file as a whole; an OSError names it, and leaves the old one."""
    staged = path.with_suffix(".tmp")
    try:
        with staged.open("w") as stream:
            json.dump(document, stream, indent=1, sort_keys=True)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(staged, path)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
