"""What a night has done, in WORKSPACE/nightly/NAME/DATE: a file a step, created exclusively when the step is done.

    prepare.json  champion.json  train.json  evaluate.json  decision.json  register.json  states.json  night.json

steps.py says what each of them holds.

A killed night goes on after its last file; of two processes that do the same step only one writes its file, and the
other learns of it. night.json ends the night.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import TypeVar

from jobs.host.documents import as_json, from_json
from jobs.host.files import read_json
from jobs.nightly.steps import Document, Outcome
from pipeline.storage import Store

D = TypeVar("D", bound=Document)


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

    def file(self, kind: type[Document]) -> Path:
        """Where the document of a step is or will be."""
        return self.directory / f"{kind.STEP}.json"

    def read(self, kind: type[D]) -> D | None:
        """What a step left, None where it is not done."""
        file = self.file(kind)
        return from_json(kind, read_json(file)) if file.exists() else None

    def write(self, document: D) -> D:
        """Note that a step is done; what `read` returns from now on. TryLater: another process noted it meanwhile."""
        # Not every reader of JSON knows NaN.
        content = json.dumps(as_json(document, finite=True), indent=1, sort_keys=True) + "\n"
        if not self._store.create(f"{document.STEP}.json", content.encode()):
            raise TryLater(f"{self.directory}: another process did the step {document.STEP!r} of this night meanwhile")
        return from_json(type(document), json.loads(content))

    @property
    def ended(self) -> Outcome | None:
        return self.read(Outcome)

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
    for file in sorted(root.glob(f"????-??-??/{Outcome.STEP}.json")):
        found.append(Journal(root, datetime.date.fromisoformat(file.parent.name)))
    return found
