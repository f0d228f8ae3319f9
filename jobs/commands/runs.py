"""run, train, evaluate, register: commands with a recipe; leaderboard: with a board; grow: with a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jobs.commands.arguments import capture, parse, parse_known, read_recipe, recipe_parser, usage_error
from jobs.host.console import Console
from jobs.host.places import Place, Subject, YamlFile, new_parser
from jobs.recipes import recipe_names


def run(arguments: list[str], console: Console, *, verbose: bool) -> int:
    if (found := read_recipe(run_parser(), arguments)) is None:
        return 0

    from jobs.run import run as run_all

    _, config = found
    capture(console, config.workspace, "run", verbose=verbose)
    run_all(config, console, verbose=verbose)
    return 0


def run_parser() -> argparse.ArgumentParser:
    return recipe_parser(
        "run",
        description="Import, prepare, train, evaluate and register in one command. Existing results are reused: the "
        "same command continues after an interruption.",
    )


def train(arguments: list[str], console: Console, *, verbose: bool) -> int:
    if {"-h", "--help"} & set(arguments):
        print(train_parser().format_help())
        _print_settings()
        return 0
    if (found := read_recipe(train_parser(), arguments)) is None:
        return 0

    from jobs.runs.train import train as train_run

    options, config = found
    capture(console, config.workspace, "train", verbose=verbose)
    trained = train_run(config, console, resume=options.resume, from_previous=options.from_previous, verbose=verbose)
    console.line(f"{'already there: ' if trained.reused else ''}{trained.checkpoint}")
    return 0


def train_parser() -> argparse.ArgumentParser:
    parser = recipe_parser("train", usage="[--resume]", description="Sequence shards -> checkpoints and an MLflow run.")
    parser.add_argument("--resume", action="store_true", help="continue an unfinished run from its latest checkpoint")
    parser.add_argument(
        "--from-previous",
        action="store_true",
        help="like --resume, but rename damaged checkpoints and continue from the latest undamaged one",
    )
    return parser


def _print_settings() -> None:
    from jobs.config.reader import config_parser

    settings = config_parser("train", model="solar")
    settings.usage = argparse.SUPPRESS
    print("Settings (those of another model: --model.name NAME --print_config)\n")
    print(settings.format_help().lstrip(), end="")


def evaluate(arguments: list[str], console: Console, *, verbose: bool) -> int:
    parser = evaluate_parser()
    if arguments and _names_weights(arguments[0]) and not {"-h", "--help"} & set(arguments):
        options, settings = parse_known(parser, arguments)

        from jobs.runs.evaluate import evaluate as evaluate_systems
        from jobs.runs.run_dir import open_shards
        from jobs.runs.weights import find_subject

        subject = find_subject(options.recipe, settings)
        config = subject.config
        capture(console, config.workspace, "evaluate", verbose=verbose)
        evaluated = evaluate_systems(
            config,
            [subject.system],
            console,
            shards=open_shards(config),
            part=options.part,
            directory=Path(options.out) if options.out else subject.directory(options.part),
            verbose=verbose,
        )
    else:
        if (found := read_recipe(parser, arguments)) is None:
            return 0
        options, config = found
        if options.out:
            raise usage_error(
                "evaluate", "--out is for a checkpoint or a registered model: results of a run are in its directory"
            )

        from jobs.run import evaluate_runs

        capture(console, config.workspace, "evaluate", verbose=verbose)
        evaluated = evaluate_runs(config, console, part=options.part, verbose=verbose)[1]

    from jobs.runs.result_tables import print_results

    print_results(config, console, evaluated)
    console.line(f"results      {evaluated.directory}")
    return 0


def _names_weights(text: str) -> bool:
    """Whether a first argument names weights rather than a recipe; if it is both a directory and a recipe, it names the
    recipe."""
    return text.startswith("models:/") or (text not in recipe_names() and Path(text).is_dir())


def evaluate_parser() -> argparse.ArgumentParser:
    parser = recipe_parser(
        "evaluate",
        usage="[--part valid|test] [--out DIR]",
        description="A model -> its metrics and those of its baselines. RECIPE is the recipe of a trained run, the "
        "directory of a run (its best checkpoint) or of a checkpoint, or a registered model (models:/NAME@ALIAS or "
        "models:/NAME/VERSION).",
        subject=Subject,
    )
    parser.add_argument("--part", choices=("valid", "test"), default="test", help="part to evaluate; default: test")
    parser.add_argument(
        "--out",
        type=Place,
        default=None,
        metavar="DIR",
        help="directory for the results of a checkpoint or a registered model; default: WORKSPACE/evaluations/NAME",
    )
    return parser


def register(arguments: list[str], console: Console, *, verbose: bool) -> int:
    if (found := read_recipe(register_parser(), arguments)) is None:
        return 0

    from jobs.run import evaluate_runs
    from jobs.runs.register import register as register_run
    from jobs.runs.run_dir import require_finished, settled

    _, config = found
    capture(console, config.workspace, "register", verbose=verbose)
    require_finished(config.run_dir)
    config = settled(config)
    trained, evaluated = evaluate_runs(config, console, verbose=verbose)
    registered = register_run(config, trained, evaluated, console)
    console.line(f"{'already there: ' if registered.reused else ''}{registered.uri} ({registered.alias})")
    return 0


def register_parser() -> argparse.ArgumentParser:
    return recipe_parser("register", description="The best checkpoint of a finished run -> a version in the registry.")


def leaderboard(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jobs.config.reader import load_board
    from jobs.recipes import board_names

    parser = board_parser()
    if {"-h", "--help"} & set(arguments):
        console.line(parser.format_help())
        return 0
    if not arguments or arguments[0].startswith("-"):
        raise usage_error("leaderboard", f"name a board first: {', '.join(board_names())}, or a YAML file")
    for fixed in ("--seed", "--name"):
        if any(argument.split("=")[0] == fixed for argument in arguments):
            raise usage_error("leaderboard", f"{fixed}: runs are named by their rows; give seeds as --seeds 1 2 3")
    options, settings = parse_known(parser, arguments)
    name, rows = load_board(options.board, settings, only=options.only)

    from jobs.runs.leaderboard import Board
    from jobs.runs.leaderboard import leaderboard as run_board

    board = Board(name=name, rows=rows, seeds=options.seeds, part=options.part)
    capture(console, board.protocol.workspace, "leaderboard", verbose=verbose)
    run_board(board, console, verbose=verbose)
    return 0


def board_parser() -> argparse.ArgumentParser:
    from jobs.recipes import board_names

    parser = argparse.ArgumentParser(
        prog="solar leaderboard",
        usage="solar leaderboard BOARD [--seeds N ...] [--only ROW ...] [--part test|valid] [SETTING VALUE ...]",
        description="Many models on one data set under one protocol -> one table. Existing runs are reused.",
        epilog="Settings are those of `solar train --help`; they apply to every row that runs.",
        exit_on_error=False,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument(
        "board", type=YamlFile, metavar="BOARD", help=f"one of {', '.join(board_names())}, or the path of a YAML file"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[1],
        metavar="N",
        help="seeds with which every row is trained; the table shows means over them; default: 1",
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="ROW", help="rows to run; default: all rows of the board"
    )
    parser.add_argument(
        "--part",
        choices=("test", "valid"),
        default="test",
        help="part to evaluate; use valid to choose settings; default: test",
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this text")
    return parser


def grow(arguments: list[str], console: Console, *, verbose: bool) -> int:
    parsed = parse(grow_parser(), arguments)

    from jobs.runs.grow import grow as grow_checkpoint

    grown = grow_checkpoint(parsed.checkpoint, console, shards_dir=parsed.shards, out=parsed.out)
    console.line(f"{grown}")
    return 0


def grow_parser() -> Any:
    parser = new_parser(
        "grow", description="A checkpoint -> the same checkpoint with tables enlarged to the vocabulary of --shards."
    )
    parser.add_argument(
        "checkpoint", type=Place, help="a committed checkpoint, or a run's directory (its best checkpoint)"
    )
    parser.add_argument("--shards", type=Place, required=True, help="sequence shards whose vocabulary has grown")
    parser.add_argument("--out", type=Place, required=True, help="directory of the new checkpoint; must not exist")
    return parser
