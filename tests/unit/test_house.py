"""Where things live and how commands explain themselves: rules that would be broken one sound commit at a time."""

from __future__ import annotations

import argparse
import collections
from pathlib import Path

import pytest

from jobs.cli import COMMANDS
from jobs.config.run_config import SOURCES

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "models", "jobs")


def sources() -> list[Path]:
    return [path.relative_to(ROOT) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_jobs_has_rooms_and_few_files_beside_them():
    assert len(list((ROOT / "jobs").glob("*.py"))) <= 5


def test_no_two_files_have_one_name():
    """A file of commands/ is named after the room that it opens; that is a folder, not a file."""
    names = collections.Counter(path.name for path in sources() if path.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_unit_tests_lie_where_their_sources_lie():
    tests = ROOT / "tests" / "unit"
    rooms = {path.parent.relative_to(tests) for package in PACKAGES for path in (tests / package).rglob("test_*.py")}
    assert [str(room) for room in sorted(rooms) if not (ROOT / room).is_dir()] == []


def test_every_folder_says_what_it_is():
    packages = [path for path in sources() if path.name == "__init__.py"]
    assert [str(path) for path in packages if len((ROOT / path).read_text().strip()) < 30] == []


FIRST_ARGUMENTS = {"import": SOURCES, "jobs": ("list", "logs", "stop")}
"""What chooses the parsers of these commands."""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option(name):
    parsers = [
        parser
        for first in FIRST_ARGUMENTS.get(name, [None])
        for parser in COMMANDS[name].parsers([] if first is None else [first])
    ]
    assert parsers
    actions = [action for parser in parsers for action in parser._actions]
    silent = [action.dest for action in actions if action.help in (None, "", argparse.SUPPRESS)]
    assert silent == []
