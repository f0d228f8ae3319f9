"""run, leaderboard, train, evaluate, register: the commands that take a recipe or a board of them; grow, which takes
what they wrote."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jobs.commands.arguments import capture, parse, recipe_config, usage_error
from jobs.host.console import Console


def run(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jobs.run import run as run_all

    config = recipe_config("run", arguments)
    if config is not None:
        capture(console, config.workspace, "run", verbose=verbose)
        run_all(config, console, verbose=verbose)
    return 0


def leaderboard(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jobs.config.reader import load_board
    from jobs.recipes import board_names
    from jobs.runs.leaderboard import Board
    from jobs.runs.leaderboard import leaderboard as run_board

    if {"-h", "--help"} & set(arguments):
        console.line(_board_parser().format_help())
        return 0
    if not arguments or arguments[0].startswith("-"):
        raise usage_error("leaderboard", f"name a board first: {', '.join(board_names())}, or a YAML file")
    options, overrides = _board_options(arguments[1:])
    name, rows = load_board(arguments[0], overrides, only=options["only"])
    board = Board(name=name, rows=rows, seeds=options["seeds"], part=options["part"])
    capture(console, board.protocol.workspace, "leaderboard", verbose=verbose)
    run_board(board, console, verbose=verbose)
    return 0


def _board_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="solar leaderboard",
        usage="solar leaderboard BOARD [--seeds N ...] [--only ROW ...] [--part test|valid] [SETTING VALUE ...]",
        epilog="Settings are those of `solar train --help`; they hold for every row that runs.",
        exit_on_error=False,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1], help="seeds of every row; the table has their mean"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="rows to run; without it all of the board")
    parser.add_argument("--part", choices=("test", "valid"), default="test", help="valid is for choosing settings")
    return parser


def _board_options(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """(seeds, only, part; everything else)."""
    parser = _board_parser()
    for fixed in ("--seed", "--name"):
        if any(argument.split("=")[0] == fixed for argument in arguments):
            raise usage_error("leaderboard", f"{fixed}: rows name their runs; seeds are --seeds 1 2 3")
    try:
        found, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise usage_error("leaderboard", str(error)) from error
    return vars(found), rest


def train(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jobs.runs.train import train as train_run

    flags = {"resume": "--resume" in arguments, "from_previous": "--from-previous" in arguments}
    config = recipe_config("train", [each for each in arguments if each not in ("--resume", "--from-previous")])
    if config is None:
        return 0
    capture(console, config.workspace, "train", verbose=verbose)
    trained = train_run(config, console, **flags, verbose=verbose)
    console.line(f"{'already there: ' if trained.reused else ''}{trained.checkpoint}")
    return 0


def grow(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jsonargparse import ArgumentParser

    from jobs.runs.grow import grow as grow_checkpoint

    parser = ArgumentParser(prog="solar grow", exit_on_error=False)
    parser.add_argument("checkpoint", type=str, help="a committed checkpoint, or a run's directory: its best one")
    parser.add_argument("--shards", type=str, required=True, help="sequence shards whose vocabulary has grown")
    parser.add_argument("--out", type=str, required=True, help="directory of the new checkpoint; must not be there")
    parsed = parse(parser, arguments)
    grown = grow_checkpoint(parsed.checkpoint, console, shards_dir=parsed.shards, out=parsed.out)
    console.line(f"{grown}")
    return 0


def evaluate(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jobs.run import evaluate_runs
    from jobs.runs.evaluate import evaluate as evaluate_systems
    from jobs.runs.result_tables import print_results
    from jobs.runs.run_dir import open_shards
    from jobs.runs.weights import find_subject, is_subject

    part, out, arguments = _evaluation_options(arguments)
    if arguments and is_subject(arguments[0]):
        subject = find_subject(arguments[0], arguments[1:])
        config = subject.config
        capture(console, config.workspace, "evaluate", verbose=verbose)
        directory = Path(out) if out else subject.directory(part)
        evaluated = evaluate_systems(
            config, [subject.system], console, shards=open_shards(config), part=part, directory=directory,
            verbose=verbose,
        )  # fmt: skip
    else:
        config = recipe_config("evaluate", arguments)
        if config is None:
            return 0
        if out:
            raise usage_error("evaluate", "--out is for a checkpoint or a registered model: a run has its own place")
        capture(console, config.workspace, "evaluate", verbose=verbose)
        evaluated = evaluate_runs(config, console, part=part, verbose=verbose)[1]
    print_results(config, console, evaluated)
    console.line(f"results      {evaluated.directory}")
    return 0


def _evaluation_options(arguments: list[str]) -> tuple[str, str | None, list[str]]:
    """(--part, --out, the other arguments)."""
    from argparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(prog="solar evaluate", add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--part", choices=("valid", "test"), default="test")
    parser.add_argument("--out", default=None)
    try:
        options, others = parser.parse_known_args(arguments)
    except ArgumentError as error:
        raise usage_error("evaluate", str(error)) from error
    return options.part, options.out, others


def register(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jobs.run import evaluate_runs
    from jobs.runs.register import register as register_run
    from jobs.runs.run_dir import require_finished

    config = recipe_config("register", arguments)
    if config is not None:
        capture(console, config.workspace, "register", verbose=verbose)
        require_finished(config.run_dir)
        trained, evaluated = evaluate_runs(config, console, verbose=verbose)
        registered = register_run(config, trained, evaluated, console)
        console.line(f"{'already there: ' if registered.reused else ''}{registered.uri} ({registered.alias})")
    return 0
