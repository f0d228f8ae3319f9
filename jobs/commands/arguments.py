"""Shared by all subcommands: the description of a command, parsers of recipes and settings, and errors in one line.

A command reads its arguments first and imports what it runs afterwards: help and mistakes then take a second, not the
four of torch and MLflow.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.host.console import Console, one_line
from jobs.host.errors import UserError
from jobs.host.places import YamlFile
from jobs.recipes import recipe_names

if TYPE_CHECKING:
    from jobs.config.run_config import RunConfig

Parsers = Sequence[argparse.ArgumentParser]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """One command of `solar`."""

    run: Callable[..., int]
    """`run(arguments, console, verbose=...)` -> the exit code."""
    parsers: Callable[[Sequence[str]], Parsers]
    """`parsers(arguments)` -> the parsers of its arguments: one, or one of its own options and one of the settings."""
    usage: str
    """Its most important arguments, for `solar --help`."""
    does: str
    """Its line in `solar --help`."""
    chosen_by: int = 0
    """Number of first arguments that choose the parser and are not read by it (1 for `import SOURCE`)."""
    is_job: bool = True
    """Whether `solar submit` may run it on a cluster."""


def recipe_parser(command: str, *, usage: str = "", description: str, subject: type[str] = YamlFile) -> Any:
    """The parser of a recipe and of a command's own options; all other arguments are settings (see `config_parser`)."""
    parser = argparse.ArgumentParser(
        prog=f"solar {command}",
        usage=" ".join(filter(None, [f"solar {command} RECIPE", usage, "[SETTING VALUE ...]"])),
        description=description,
        epilog="Settings: dotted keys of the recipe, such as --model.rank 8, and --config FILE with further ones; "
        "`solar train --help` lists them all.",
        exit_on_error=False,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument(
        "recipe", type=subject, metavar="RECIPE", help=f"one of {', '.join(recipe_names())}, or the path of a YAML file"
    )
    parser.add_argument("--print_config", action="store_true", help="only print the resolved settings")
    parser.add_argument("-h", "--help", action="store_true", help="show this text")
    return parser


def plain(parser: Callable[[], argparse.ArgumentParser]) -> Callable[[Sequence[str]], Parsers]:
    """The parsers of a command without settings."""
    return lambda arguments: [parser()]


def with_settings(parser: Callable[[], argparse.ArgumentParser]) -> Callable[[Sequence[str]], Parsers]:
    """The parsers of a command with options of its own and the settings of a recipe. They lack settings that only other
    models than SOLAR have: each of these has one value, and none is a place."""

    def parsers(arguments: Sequence[str]) -> Parsers:
        from jobs.config.reader import config_parser

        return [own := parser(), config_parser(own.prog.removeprefix("solar "), model="solar")]

    return parsers


def read_options(own: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, list[str]] | None:
    """(own options, settings); None after --help. UserError: no recipe is named, or an option is wrong."""
    command = own.prog.removeprefix("solar ")
    if {"-h", "--help"} & set(arguments):
        print(own.format_help(), end="")
        return None
    if not arguments or arguments[0].startswith("-"):
        raise usage_error(command, f"name a recipe first: {', '.join(recipe_names())}, or a YAML file")
    return parse_known(own, arguments)


def parse_known(own: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(own options, settings). UserError: an option is wrong."""
    try:
        return own.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise usage_error(own.prog.removeprefix("solar "), str(error)) from error


def read_recipe(own: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, RunConfig] | None:
    """(own options, the resolved configuration); None after --help or --print_config."""
    from jobs.config.reader import load_config

    if (found := read_options(own, arguments)) is None:
        return None
    options, settings = found
    config = load_config(own.prog.removeprefix("solar "), options.recipe, settings)
    if options.print_config:
        import yaml

        print(yaml.safe_dump(config.as_dict(), sort_keys=False), end="")
        return None
    return options, config


def parse(parser: Any, arguments: list[str]) -> Any:
    """The arguments, parsed by a jsonargparse parser. UserError: one line with the key, the value and the fix."""
    from jobs.config.mistakes import REFUSALS, explain

    try:
        return parser.parse_args(arguments)
    except REFUSALS as error:
        if missing := re.search(r"arguments? (?:is|are) required: (.*)", one_line(error)):
            raise usage_error(parser.prog.removeprefix("solar "), _missing(parser, missing[1])) from error
        raise UserError(f"{parser.prog.removeprefix('solar ')}: {explain(error, parser)}") from error


def _missing(parser: Any, names: str) -> str:
    """`--why TEXT is missing: the reason`, for names of required arguments as argparse lists them."""
    wanted = {name.strip(" -\"'") for name in names.split(",")}
    actions = [action for action in parser._actions if action.dest in wanted]
    shown = [" ".join([*action.option_strings[-1:], action.metavar or action.dest.upper()]) for action in actions]
    if len(actions) != 1:
        return f"{', '.join(shown) or names} are missing"
    return f"{shown[0]} is missing: {actions[0].help}"


def instantiate(parser: Any, parsed: Any) -> Any:
    """The parsed arguments with their sections as dataclasses. UserError: a value breaks a section's rule."""
    try:
        return parser.instantiate(parsed)
    except ValueError as error:
        raise UserError(f"{parser.prog.removeprefix('solar ')}: {one_line(error)}") from error


def usage_error(command: str, text: str) -> UserError:
    """The error for a mistake in a command's arguments."""
    return UserError(f"{command}: {text}")


def capture(console: Console, workspace: str, command: str, *, verbose: bool) -> None:
    """Send the output of libraries to a file in WORKSPACE/logs, unless `verbose`; no other command writes to it."""
    if verbose:
        return
    log = Path(workspace) / "logs" / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    try:
        console.capture_libraries(log)
    except OSError as error:
        raise UserError(f"workspace={workspace}: {error.strerror}: name a writable directory") from error
