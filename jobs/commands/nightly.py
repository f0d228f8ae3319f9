"""nightly, promote, rollback, history: retraining by day, and who the champion is."""

from __future__ import annotations

import argparse
import datetime
import os
import signal
from typing import Any

from jobs.commands.arguments import capture, parse, recipe_config, usage_error
from jobs.host.console import Console, one_line
from jobs.host.errors import TRY_LATER
from jobs.scheduling.night_process import SCHEDULED_VARIABLE


def nightly(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jobs.nightly.journal import TryLater
    from jobs.nightly.nights import NightlyOptions, plan_lines
    from jobs.nightly.nights import nightly as run_nights

    if {"-h", "--help"} & set(arguments):
        console.line(_night_parser().format_help())
        return 0
    flags, others = _night_options(arguments)
    config = recipe_config("nightly", others)
    if config is None:
        return 0
    if SCHEDULED_VARIABLE in os.environ:
        # A scheduler in the background of a shell ignores Ctrl-C, and so would its nights, which it stops that way.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    options = NightlyOptions(date=flags.date, catch_up=flags.catch_up)
    capture(console, config.workspace, "nightly", verbose=verbose)
    try:
        if flags.dry_run:
            for line in plan_lines(config, options):
                console.line(line)
        else:
            run_nights(config, options, console, verbose=verbose)
    except TryLater as error:
        console.error(f"solar: {one_line(error)} (exit code {TRY_LATER}: try again later)")
        return TRY_LATER
    return 0


def _night_options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    try:
        return _night_parser().parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise usage_error("nightly", f"{error} (a date is written 2026-11-21)") from error


def _night_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="solar nightly",
        usage="solar nightly RECIPE [--date D] [--catch-up] [--dry-run] [SETTING VALUE ...]",
        description="One night: the day's log, a challenger, the gate, the registry, the report. Exit code 75: nothing "
        "is wrong, try again later.",
        epilog="Settings are those of `solar train --help`; a night's own are --nightly.*, --nightly.gate.* and "
        "--notify.*.",
        add_help=False,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--date", type=datetime.date.fromisoformat, default=None, metavar="D",
        help="day of the log, as 2026-11-21; default: the latest that is over",
    )  # fmt: skip
    parser.add_argument("--catch-up", action="store_true", help="the days since the last night first, in order")
    parser.add_argument("--dry-run", action="store_true", help="tell the plan, do nothing")
    return parser


def promote(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jobs.tracking.champions import promote_by_hand

    parser = _model_parser("promote")
    parser.add_argument("--version", type=int, required=True, help="the version that shall serve")
    parser.add_argument("--why", type=str, required=True, help="the reason, kept with the model")
    parsed = parse(parser, arguments)
    with _registry(parsed) as client:
        change = promote_by_hand(client, parsed.model, str(parsed.version), why=parsed.why)
    console.line(f"{parsed.model}: version {change.version} is the champion, before it was {change.before or 'none'}")
    return 0


def rollback(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jobs.tracking.champions import roll_back

    parser = _model_parser("rollback")
    parser.add_argument("--why", type=str, required=True, help="the reason, kept with the model")
    parsed = parse(parser, arguments)
    with _registry(parsed) as client:
        change = roll_back(client, parsed.model, why=parsed.why)
    console.line(f"{parsed.model}: version {change.version} is the champion again, instead of {change.before}")
    return 0


def history(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jobs.tracking.champions import changes, nights, require_model

    parsed = parse(_model_parser("history"), arguments)
    with _registry(parsed) as client:
        require_model(client, parsed.model)
        decided, changed = nights(client, parsed.model), changes(client, parsed.model)
    rows = [
        (date, told["verdict"], told.get("champion") or "-", _percent(told.get("relative")), _percent(told.get("low")),
         str(told.get("users", "-")), "; ".join(told["reasons"]))
        for date, told in decided.items()
    ]  # fmt: skip
    columns = ("night", "verdict", "champion", "difference", "bound", "users", "reasons")
    console.table(f"nights of {parsed.model}", columns, rows, text=("verdict", "reasons"))
    rows = [(change.at[:19], change.version, change.before or "-", change.why) for change in changed]
    console.table(f"champions of {parsed.model}", ("since (UTC)", "version", "before", "why"), rows, text=("why",))
    return 0


def _percent(value: Any) -> str:
    return "-" if value is None else f"{value:+.2%}"


def _model_parser(command: str) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=f"solar {command}", exit_on_error=False)
    parser.add_argument("model", type=str, help="the registered model's name, as solar-shop")
    parser.add_argument("--workspace", type=str, default="workspace", help="directory of the MLflow store")
    parser.add_argument("--tracking.uri", type=str | None, default=None, help="MLflow; default: the workspace's store")
    return parser


def _registry(parsed: Any) -> Any:
    """The client of the store that a command names; a store that does not answer is one line."""
    from jobs.tracking.registry import open_registry
    from jobs.tracking.runs import TrackingConfig

    return open_registry(TrackingConfig(uri=parsed.tracking.uri), parsed.workspace)
