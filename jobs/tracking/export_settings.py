"""scorer.json and config.json of a registered version, checked when they are read: damage is told by file and key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.host.errors import UserError

_TYPES: Mapping[str, tuple[type, str]] = {
    "model": (dict, "an object"),
    "features": (list, "a list"),
    "actions": (list, "a list"),
    "first_item_row": (int, "an integer"),
    "max_history": (int, "an integer"),
    "log_columns": (list, "a list"),
    "user_features": (list, "a list"),
}
_LATER = ("user_features",)
"""Keys that exports of the first versions lack."""
_FIX = "restore the file, or register the model again"


def read_settings(directory: Path, *, uri: str) -> dict[str, Any]:
    """The settings in scorer.json. UserError: it is not the file that an export wrote."""
    file = directory / "scorer.json"
    settings = read_object(file, uri=uri)
    for key, (kind, told) in _TYPES.items():
        if key not in settings:
            if key in _LATER:
                continue
            raise UserError(f"{uri}: {file} has no key {key!r}: {_FIX}")
        if not isinstance(settings[key], kind) or isinstance(settings[key], bool):
            raise UserError(f"{uri}: {file}: {key!r} must be {told}, it is {json.dumps(settings[key])[:60]}: {_FIX}")
    if not isinstance(settings["model"].get("name"), str):
        raise UserError(f"{uri}: {file}: 'model' has no 'name': {_FIX}")
    return settings


def read_object(file: Path, *, uri: str) -> dict[str, Any]:
    """The object in a JSON file of an export. UserError: the file cannot be read, or holds something else."""
    try:
        found = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"{uri}: {file}: {error.strerror}: {_FIX}") from error
    except ValueError as error:
        raise UserError(f"{uri}: {file} is not valid JSON (damaged or cut off): {_FIX}") from error
    if not isinstance(found, dict):
        raise UserError(f"{uri}: {file} must hold an object, it holds {json.dumps(found)[:60]}: {_FIX}")
    return found
