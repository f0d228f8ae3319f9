"""nightly, promote, rollback, history: retraining every night, and which version is the champion."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import signal
from typing import TYPE_CHECKING, Any

from jobs.commands.arguments import capture, parse, read_recipe, recipe_parser
from jobs.host.console import Console, one_line
from jobs.host.errors import TRY_LATER
from jobs.host.places import Place, new_parser
from jobs.scheduling.night_process import SCHEDULED_VARIABLE

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def nightly(arguments: list[str], console: Console, *, verbose: bool) -> int:
    if (found := read_recipe(nightly_parser(), arguments)) is None:
        return 0

    from jobs.nightly.journal import TryLater
    from jobs.nightly.nights import NightlyOptions, plan_lines
    from jobs.nightly.nights import nightly as run_nights

    flags, config = found
    if SCHEDULED_VARIABLE in os.environ:
        # A background process of a shell ignores SIGINT, and so would the nights of a scheduler there, which stops them
        # with SIGINT: restore the default.
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


def nightly_parser() -> argparse.ArgumentParser:
    parser = recipe_parser(
        "nightly",
        usage="[--date D] [--catch-up] [--dry-run]",
        description="One night: ingest the day's log, train a challenger, compare it with the champion, register it, "
        "write the report. Exit code 75: nothing is wrong, try again later. Settings of the night itself: --nightly.*, "
        "--nightly.gate.* and --notify.*.",
    )
    parser.add_argument(
        "--date", type=_date, default=None, metavar="D",
        help="day of the log, such as 2026-11-21; default: the latest day that is over",
    )  # fmt: skip
    parser.add_argument("--catch-up", action="store_true", help="first do all days since the last night, in order")
    parser.add_argument("--dry-run", action="store_true", help="only print the plan")
    return parser


def _date(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date: write it like 2026-11-21") from None


def promote(arguments: list[str], console: Console, *, verbose: bool) -> int:
    parsed = parse(promote_parser(), arguments)

    from jobs.tracking.champions import promote_by_hand

    with _registry(parsed) as client, _in_turn(parsed, console):
        change = promote_by_hand(client, parsed.model, str(parsed.version), why=parsed.why)
    console.line(f"{parsed.model}: version {change.version} is the champion, before it was {change.before or 'none'}")
    return 0


def promote_parser() -> ArgumentParser:
    parser = _model_parser("promote", "Make any version of a registered model its champion.")
    parser.add_argument(
        "--version", type=int, required=True, metavar="N", help="number of the version to make the champion"
    )
    parser.add_argument("--why", type=str, required=True, metavar="TEXT", help="the reason, stored with the model")
    return parser


def rollback(arguments: list[str], console: Console, *, verbose: bool) -> int:
    parsed = parse(rollback_parser(), arguments)

    from jobs.tracking.champions import roll_back

    with _registry(parsed) as client, _in_turn(parsed, console):
        change = roll_back(client, parsed.model, why=parsed.why)
    console.line(f"{parsed.model}: version {change.version} is the champion again, instead of {change.before}")
    return 0


def rollback_parser() -> ArgumentParser:
    parser = _model_parser("rollback", "Make the previous champion the champion again.")
    parser.add_argument("--why", type=str, required=True, metavar="TEXT", help="the reason, stored with the model")
    return parser


def history(arguments: list[str], console: Console, *, verbose: bool) -> int:
    parsed = parse(history_parser(), arguments)

    from jobs.tracking.champions import changes, nights, require_model

    with _registry(parsed) as client:
        require_model(client, parsed.model)
        decided, changed = nights(client, parsed.model), changes(client, parsed.model)
    rows = [
        (date, night["verdict"], night.get("champion") or "-", _percent(night.get("relative")),
         _percent(night.get("low")), str(night.get("users", "-")), "; ".join(night["reasons"]))
        for date, night in decided.items()
    ]  # fmt: skip
    if rows:
        columns = ("night", "verdict", "champion", "difference", "bound", "users", "reasons")
        console.table(f"nights of {parsed.model}", columns, rows, text=("verdict", "reasons"))
    else:
        console.line(f"nights of {parsed.model}: none yet")
    rows = [(change.at[:19], change.version, change.before or "-", change.why) for change in changed]
    console.table(f"champions of {parsed.model}", ("since (UTC)", "version", "before", "why"), rows, text=("why",))
    return 0


def history_parser() -> ArgumentParser:
    return _model_parser("history", "Every night's decision and every change of the champion, with the reasons.")


def _percent(value: Any) -> str:
    return "-" if value is None else f"{value:+.2%}"


def _model_parser(command: str, description: str) -> ArgumentParser:
    parser = new_parser(command, description=description)
    parser.add_argument("model", type=str, help="the registered model's name, such as solar-shop")
    parser.add_argument("--workspace", type=Place, default="workspace", help="directory with the MLflow store")
    parser.add_argument(
        "--tracking.uri", type=Place | None, default=None, help="MLflow's tracking URI; default: the workspace's store"
    )
    return parser


def _registry(parsed: Any) -> Any:
    """A context manager with a client of the MLflow store that the command names."""
    from jobs.tracking.mlflow_runs import TrackingConfig
    from jobs.tracking.registry import open_registry

    return open_registry(TrackingConfig(uri=parsed.tracking.uri), parsed.workspace)


def _in_turn(parsed: Any, console: Console) -> Any:
    """A context manager in which no other command of the workspace changes its own registry; another registry is not
    locked."""
    from jobs.host.locks import in_turn
    from jobs.tracking.registry import registry_lock

    if parsed.tracking.uri is not None:
        return contextlib.nullcontext()
    return in_turn(registry_lock(parsed.workspace), tell=console.line)
