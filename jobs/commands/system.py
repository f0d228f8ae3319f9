"""doctor: checks that everything works on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.commands.arguments import parse
from jobs.host.console import Console
from jobs.host.places import new_parser

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def doctor(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jobs.doctor import doctor

    return doctor(console, as_json=parse(doctor_parser(), arguments).json)


def doctor_parser() -> ArgumentParser:
    parser = new_parser(
        "doctor", description="Checks this machine; one line per check: ok, or the fix. Exit code 1 if a check fails."
    )
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    return parser
