"""The journal of a night, in WORKSPACE/nightly/NAME/DATE: one file per step, created when the step is done.

    prepare.json  champion.json  train.json  evaluate.json  decision.json  register.json  states.json  night.json

steps.py defines the contents of each file.

A killed night continues after its last file. Files are created exclusively: if two processes do the same step, only one
can write its file, and the other gets TryLater. night.json ends the night.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import TypeVar

from jobs.host.documents import as_json, from_json
from jobs.host.json_files import read_json
from jobs.nightly.steps import Document, Outcome
from pipeline.storage import Store

D = TypeVar("D", bound=Document)


class TryLater(Exception):
    """Not a mistake of the user: the same command may succeed later. The message is one line."""


class NoInput(TryLater):
    """The day's log is missing or incomplete, or its ingest was refused."""


class Journal:
    """The documents of one night."""

    def __init__(self, root: Path, date: datetime.date) -> None:
        self.date = date
        self.directory = root / date.isoformat()
        self._store = Store(str(self.directory))

    def file(self, kind: type[Document]) -> Path:
        """Path of a step's document, which need not exist yet."""
        return self.directory / f"{kind.STEP}.json"

    def read(self, kind: type[D]) -> D | None:
        """The document of a step; None if the step is not done."""
        file = self.file(kind)
        return from_json(kind, read_json(file)) if file.exists() else None

    def write(self, document: D) -> D:
        """Store the document of a finished step; returns it as `read` will. TryLater: another process was first."""
        # `finite`: not every JSON reader accepts NaN.
        content = json.dumps(as_json(document, finite=True), indent=1, sort_keys=True) + "\n"
        if not self._store.create(f"{document.STEP}.json", content.encode()):
            raise TryLater(f"{self.directory}: another process did the step {document.STEP!r} of this night first")
        return from_json(type(document), json.loads(content))

    @property
    def ended(self) -> Outcome | None:
        return self.read(Outcome)

    def start_over(self) -> None:
        """Move the journal of an unfinished night aside, to DATE.set-aside-N; the night then begins anew."""
        number = 1
        while (aside := self.directory.with_name(f"{self.directory.name}.set-aside-{number}")).exists():
            number += 1
        self.directory.rename(aside)

    @property
    def attempt(self) -> int:
        """1 + the number of times that the night started over."""
        return 1 + len(list(self.directory.parent.glob(f"{self.directory.name}.set-aside-*")))


def past_nights(root: Path) -> list[Journal]:
    """The nights that have ended, oldest first."""
    found = []
    for file in sorted(root.glob(f"????-??-??/{Outcome.STEP}.json")):
        found.append(Journal(root, datetime.date.fromisoformat(file.parent.name)))
    return found
