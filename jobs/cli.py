"""The program `solar`: the list of its commands, and how a command ends.

A user's mistake ends with one line on stderr and exit code 2, what may succeed later as it is with one line and 75; an
interruption leaves a resumable state and ends with exit code 130; any other exception is a defect and shows its
traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence

from jobs.commands import cluster, data, nightly, runs, scheduling, serving, system
from jobs.commands.arguments import Command, plain, with_settings
from jobs.host.console import Console, one_line
from jobs.host.errors import INTERRUPTED, MISTAKE, TRY_LATER
from jobs.host.process import open_missing_streams
from jobs.recipes import recipe_names

USAGE = """\
solar COMMAND ... [-v]

{commands}

RECIPE is one of {recipes}, or a YAML file.
Settings follow it: --config FILE, dotted overrides (--model.rank 8), --print_config.
-v shows the output of libraries. `solar COMMAND --help` lists the options of a command.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    # SIGTERM (of a scheduler or container) ends a command in the same way as Ctrl-C, without incomplete files.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    open_missing_streams()
    try:
        code = run(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        print("solar: interrupted", file=sys.stderr)
        code = INTERRUPTED
    if code == INTERRUPTED:
        # Threads of Ray may be in its C++ code: Python's normal exit can then crash (observed: SIGSEGV).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command; returns its exit code."""
    from jobs.cluster.session import quiet_environment

    quiet_environment()
    verbose = any(flag in arguments for flag in ("-v", "--verbose"))
    arguments = [argument for argument in arguments if argument not in ("-v", "--verbose")]
    if (encoding := sys.getfilesystemencoding()) != "utf-8":
        # Python would read and write names of files in this encoding, Arrow in UTF-8.
        print(f"solar: names of files are {encoding} in this environment: set PYTHONUTF8=1", file=sys.stderr)
        return MISTAKE
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else MISTAKE
    if arguments[0] not in COMMANDS:
        print(f"solar: unknown command {arguments[0]!r}: one of {', '.join(COMMANDS)}", file=sys.stderr)
        return MISTAKE
    from jobs.host.places import options_explained

    with options_explained(bool({"-h", "--help"} & set(arguments))):
        return _guarded(COMMANDS[arguments[0]].run, arguments[1:], verbose=verbose)


def _guarded(command: Callable[..., int], arguments: list[str], *, verbose: bool) -> int:
    """Run a command; its exceptions become messages and exit codes."""
    from jsonargparse import ArgumentError

    from jobs.cluster.failures import WorkerFailure
    from jobs.host.errors import TryLater, UserError
    from pipeline.events import DataError, NotNow

    console = Console()
    try:
        return command(arguments, console, verbose=verbose)
    except (UserError, DataError, ArgumentError, ConnectionError) as error:
        console.error(f"solar: {one_line(error)}")
        return TRY_LATER if isinstance(error, (NotNow, TryLater)) else MISTAKE
    except KeyboardInterrupt as error:
        console.error(f"solar: interrupted; {_what_is_left(error)}")
        return INTERRUPTED
    except WorkerFailure as error:
        return _worker_failed(error, console)
    except SystemExit as end:
        # Ray replaces the handler of SIGTERM with one that exits with the signal's number.
        if end.code != signal.SIGTERM:
            raise
        console.error(f"solar: interrupted; {_what_is_left(end)}")
        return INTERRUPTED
    except Exception as error:
        return _ended_by(error, console)
    finally:
        console.drop_empty_log()


def _worker_failed(failure: Exception, console: Console) -> int:
    # The report of Ray, which is the cause of the error that is handled, has many lines.
    log = console.note(traceback.format_exc())
    console.error(f"solar: a worker failed: {one_line(failure)}" + (f" (details: {log})" if log else ""))
    return 1


def _what_is_left(end: BaseException) -> str:
    """With what the same command begins after an interruption."""
    has_checkpoint = getattr(end, "has_checkpoint", None)
    if has_checkpoint is None:
        return "what was committed is still there"
    if has_checkpoint:
        return "the same command continues from the last checkpoint (`solar train` with --resume)"
    return "the training had no checkpoint yet: the same command begins it again, with the data that is there"


def _ended_by(error: Exception, console: Console) -> int:
    """Say what ended a command beside a user's mistake: a refusal of the system or a locked database in one line, a
    defect with its traceback."""
    from jobs.cluster.failures import task_failure
    from jobs.tracking.unsent import is_locked
    from pipeline.events import NotNow
    from pipeline.system_errors import as_data_error

    if told := as_data_error(error):
        console.error(f"solar: {told}")
        return TRY_LATER if isinstance(told, NotNow) else MISTAKE
    if failure := task_failure(error):
        return _worker_failed(failure, console)
    if is_locked(error):
        console.error(
            f"solar: MLflow's database is locked by another program: end it, or try again later (exit code {TRY_LATER})"
        )
        return TRY_LATER
    console.error(traceback.format_exc())
    return 1


def _submit(arguments: list[str], console: Console, *, verbose: bool) -> int:
    return cluster.submit(arguments, console, verbose=verbose, commands=COMMANDS)


COMMANDS: Mapping[str, Command] = {
    "run": Command(
        run=runs.run,
        parsers=with_settings(runs.run_parser),
        usage="RECIPE",
        does="import, prepare, train, evaluate and register in one command; reuses existing results",
    ),
    "leaderboard": Command(
        run=runs.leaderboard,
        parsers=with_settings(runs.board_parser),
        usage="BOARD",
        does="many models under one protocol -> one table (--seeds 1 2 3, --only ROW, --part valid)",
    ),
    "doctor": Command(
        run=system.doctor,
        parsers=plain(system.doctor_parser),
        usage="[--json]",
        does="checks that everything works on this machine",
    ),
    "import": Command(
        run=data.import_,
        parsers=data.import_parsers,
        usage="SOURCE",
        does="a public format, or your own files -> event log",
        chosen_by=1,
    ),
    "prepare": Command(
        run=data.prepare,
        parsers=plain(data.prepare_parser),
        usage="--events E --out DIR",
        does="event log -> sequence shards; with existing shards: adds new events",
    ),
    "inspect": Command(
        run=data.inspect,
        parsers=plain(data.inspect_parser),
        usage="DIR",
        does="shows the contents of sequence shards or of a checkpoint (--verify, --digest)",
    ),
    "compact": Command(
        run=data.compact,
        parsers=plain(data.compact_parser),
        usage="DIR",
        does="shards: merges the files of all ingests",
    ),
    "forget": Command(
        run=data.forget,
        parsers=plain(data.forget_parser),
        usage="DIR --users FILE",
        does="shards and results: removes users permanently (--outputs FILE, --verify)",
    ),
    "gc": Command(
        run=data.gc,
        parsers=plain(data.gc_parser),
        usage="DIR --keep N",
        does="shards: removes all but the latest N manifests and their files",
    ),
    "train": Command(
        run=runs.train,
        parsers=with_settings(runs.train_parser),
        usage="RECIPE",
        does="shards -> checkpoints and an MLflow run (--resume; --from-previous: skips damaged checkpoints)",
    ),
    "grow": Command(
        run=runs.grow,
        parsers=plain(runs.grow_parser),
        usage="CHECKPOINT",
        does="the same checkpoint with tables enlarged to the vocabulary of --shards DIR (--out DIR)",
    ),
    "evaluate": Command(
        run=runs.evaluate,
        parsers=with_settings(runs.evaluate_parser),
        usage="SUBJECT",
        does="a run (RECIPE), a checkpoint or models:/NAME@ALIAS -> metrics (--part valid|test, --out DIR)",
    ),
    "register": Command(
        run=runs.register,
        parsers=with_settings(runs.register_parser),
        usage="RECIPE",
        does="the run's best checkpoint -> MLflow registry",
    ),
    "score": Command(
        run=serving.score,
        parsers=plain(serving.score_parser),
        usage="MODEL_URI",
        does="a registered model on Parquet requests -> scores and rankings (--states auto; --build-states)",
    ),
    "nightly": Command(
        run=nightly.nightly,
        parsers=with_settings(nightly.nightly_parser),
        usage="RECIPE",
        does="a day's log -> a better champion, or a refusal with reasons (--date D, --catch-up, --dry-run)",
    ),
    "promote": Command(
        run=nightly.promote,
        parsers=plain(nightly.promote_parser),
        usage="MODEL",
        does="make any version the champion (--version N --why TEXT)",
    ),
    "rollback": Command(
        run=nightly.rollback,
        parsers=plain(nightly.rollback_parser),
        usage="MODEL",
        does="make the previous champion the champion again (--why TEXT)",
    ),
    "history": Command(
        run=nightly.history,
        parsers=plain(nightly.history_parser),
        usage="MODEL",
        does="every night's decision and every change of the champion",
    ),
    "schedule": Command(
        run=scheduling.schedule,
        parsers=with_settings(scheduling.schedule_parser),
        usage="RECIPE",
        does='a night at the times of --cron "0 3 * * *", or --emit cronjob|kuberay: manifests for a cluster',
        is_job=False,
    ),
    "submit": Command(
        run=_submit,
        parsers=plain(cluster.submit_parser),
        usage="-- COMMAND",
        does="any of these commands as a job of a Ray cluster; prints its log here",
        is_job=False,
    ),
    "jobs": Command(
        run=cluster.jobs,
        parsers=cluster.jobs_parsers,
        usage="list|logs|stop",
        does="the jobs of a Ray cluster",
        chosen_by=1,
        is_job=False,
    ),
}
"""Every command, in the order of `solar --help`. No other file has a list of their names."""


def _usage() -> str:
    lines = [f"  {name} {command.usage:<{30 - len(name)}} {command.does}" for name, command in COMMANDS.items()]
    return USAGE.format(commands="\n".join(lines), recipes=", ".join(recipe_names()))


if __name__ == "__main__":
    main()
