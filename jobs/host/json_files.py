"""JSON files that stay readable if a process dies while it writes: documents replaced atomically, and files with one
JSON row per line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of the file; incomplete lines of a killed process are skipped. Empty if there is no file."""
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
    """Replace the file atomically; an OSError names the file, whose old content is then unchanged."""
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
