"""What subcommands share: recipes, options, and mistakes told in one line."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from jobs.host.console import Console, one_line
from jobs.recipes import recipe_names


def recipe_config(command: str, arguments: list[str]) -> Any | None:
    """The config of a command that takes a recipe; None after --help or --print_config."""
    from jobs.config.reader import config_parser, load_config

    if arguments and arguments[0] in ("-h", "--help"):
        config_parser(command, model="solar").print_help()
        return None
    if not arguments or arguments[0].startswith("-"):
        raise usage_error(command, f"name a recipe first: {', '.join(recipe_names())}, or a YAML file")
    flags = [argument for argument in arguments[1:] if argument == "--print_config"]
    config = load_config(command, arguments[0], [argument for argument in arguments[1:] if argument not in flags])
    if flags:
        import yaml

        print(yaml.safe_dump(config.as_dict(), sort_keys=False), end="")
        return None
    return config


def parse(parser: Any, arguments: list[str]) -> Any:
    from jsonargparse import ArgumentError

    from jobs.config.reader import explain
    from jobs.host.errors import UserError

    try:
        return parser.parse_args(arguments)
    except (ArgumentError, ValueError) as error:
        raise UserError(f"{parser.prog.removeprefix('solar ')}: {explain(error, parser)}") from error


def instantiate(parser: Any, parsed: Any) -> Any:
    from jobs.host.errors import UserError

    try:
        return parser.instantiate(parsed)
    except ValueError as error:
        raise UserError(f"{parser.prog.removeprefix('solar ')}: {one_line(error)}") from error


def usage_error(command: str, text: str) -> Exception:
    from jobs.host.errors import UserError

    return UserError(f"{command}: {text}")


def capture(console: Console, workspace: str, command: str, *, verbose: bool) -> None:
    from jobs.host.errors import UserError

    if verbose:
        return
    log = Path(workspace) / "logs" / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}.log"
    try:
        console.capture_libraries(log)
    except OSError as error:
        raise UserError(f"workspace={workspace}: {error.strerror}: name a directory that can be written") from error
