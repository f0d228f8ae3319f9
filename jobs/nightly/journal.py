"""What a night has done, in WORKSPACE/nightly/NAME/DATE: a file a step, created exclusively when the step is done.

    prepare.json  champion.json  train.json  evaluate.json  decision.json  register.json  states.json  night.json

A killed night goes on after its last file; of two processes that do the same step only one writes its file, and the
other learns of it. night.json ends the night.
"""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any

from pipeline.storage import Store

END = "night"


class TryLater(Exception):
    """Nothing that a user did wrong: the same command may succeed later. One line."""


class NoInput(TryLater):
    """The day's log is not there, or was refused."""


class Journal:
    """The steps of one night."""

    def __init__(self, root: Path, date: datetime.date) -> None:
        self.date = date
        self.directory = root / date.isoformat()
        self._store = Store(str(self.directory))

    def read(self, step: str) -> dict[str, Any] | None:
        """What a step left, None where it is not done."""
        file = self.directory / f"{step}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def write(self, step: str, document: dict[str, Any]) -> dict[str, Any]:
        """Note that a step is done. TryLater: another process noted it meanwhile."""
        # Not every reader of JSON knows NaN.
        content = (json.dumps(_plain(document), indent=1, sort_keys=True) + "\n").encode()
        if not self._store.create(f"{step}.json", content):
            raise TryLater(f"{self.directory}: another process did the step {step!r} of this night meanwhile")
        return json.loads(content)

    @property
    def ended(self) -> dict[str, Any] | None:
        return self.read(END)

    def start_over(self) -> None:
        """Set what there is of an unfinished night aside, under a name of its own."""
        number = 1
        while (aside := self.directory.with_name(f"{self.directory.name}.set-aside-{number}")).exists():
            number += 1
        self.directory.rename(aside)

    @property
    def attempt(self) -> int:
        """1, and one more for each time that the night started over."""
        return 1 + len(list(self.directory.parent.glob(f"{self.directory.name}.set-aside-*")))


def past_nights(root: Path) -> list[Journal]:
    """The nights that have ended, oldest first."""
    found = []
    for file in sorted(root.glob(f"????-??-??/{END}.json")):
        found.append(Journal(root, datetime.date.fromisoformat(file.parent.name)))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
