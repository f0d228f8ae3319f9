"""run, train, evaluate, register: the commands that take a recipe."""

from __future__ import annotations

from jobs.commands.arguments import capture, recipe_config
from jobs.console import Console


def run(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jobs.run import run as run_all

    config = recipe_config("run", arguments)
    if config is not None:
        capture(console, config.workspace, "run", verbose=verbose)
        run_all(config, console, verbose=verbose)
    return 0


def train(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jobs.train import train as train_run

    resume = "--resume" in arguments
    config = recipe_config("train", [argument for argument in arguments if argument != "--resume"])
    if config is None:
        return 0
    capture(console, config.workspace, "train", verbose=verbose)
    trained = train_run(config, console, resume=resume, verbose=verbose)
    console.line(f"{'already there: ' if trained.reused else ''}{trained.checkpoint}")
    return 0


def evaluate(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jobs.run import evaluate_runs, print_results

    config = recipe_config("evaluate", arguments)
    if config is not None:
        capture(console, config.workspace, "evaluate", verbose=verbose)
        print_results(config, console, evaluate_runs(config, console, verbose=verbose)[1])
    return 0


def register(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jobs.register import register as register_run
    from jobs.run import evaluate_runs
    from jobs.train import require_finished

    config = recipe_config("register", arguments)
    if config is not None:
        capture(console, config.workspace, "register", verbose=verbose)
        require_finished(config.run_dir)
        trained, evaluated = evaluate_runs(config, console, verbose=verbose)
        registered = register_run(config, trained, evaluated, console)
        console.line(f"{'already there: ' if registered.reused else ''}{registered.uri} ({registered.alias})")
    return 0
