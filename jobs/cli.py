"""The command `solar`: one subcommand a job.

A user's mistake ends with one line on stderr and exit code 2; an interruption leaves a resumable state and exits 130;
anything else is a defect and shows its traceback.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from jobs.commands import cluster, data, nightly, serving, system, training
from jobs.commands import scheduling as schedule
from jobs.host.console import Console, one_line
from jobs.host.errors import INTERRUPTED, MISTAKE
from jobs.recipes import recipe_names

USAGE = """\
solar COMMAND ... [-v]

  run RECIPE            import, prepare, train, evaluate, register in one go; reuses what is there
  leaderboard BOARD     many models under one protocol -> one table (--seeds 1 2 3, --only ROW, --part valid)
  doctor [--json]       does everything work on this machine?
  import SOURCE         a public format -> event log (files, git, synthetic, movielens, kuairand, amazon-2023, mind,
                        taobao, yambda, recbole, movielens-100k)
  prepare               event log -> sequence shards; again with more events: merges
  compact DIR           shards: what later ingests brought, rewritten into the users' own files
  forget DIR            shards: users taken out for ever (--users FILE, --outputs FILE, --verify)
  gc DIR --keep N       shards: all but the latest N states removed
  migrate DIR           shards of the previous format made readable
  inspect DIR           what is in a shard directory or a checkpoint (--verify, --digest)
  train RECIPE          shards -> checkpoints and an MLflow run (--resume; --from-previous: past a damaged checkpoint)
  grow CHECKPOINT       the same checkpoint with tables as large as the vocabulary of --shards DIR now (--out DIR)
  evaluate SUBJECT      a run (RECIPE), a checkpoint or models:/NAME@ALIAS -> metrics (--part valid|test, --out DIR)
  register RECIPE       the run's best checkpoint -> MLflow registry
  score MODEL_URI       a registered model on Parquet requests -> scores and rankings (--states auto; --build-states)
  nightly RECIPE        a day's log -> a better champion or a reasoned refusal (--date D, --catch-up, --dry-run)
  promote, rollback, history MODEL    who the champion is (--version N --why TEXT), and every night's decision
  schedule RECIPE       a night whenever --cron "0 3 * * *" fires, or --emit cronjob|kuberay: manifests for a cluster
  submit -- COMMAND     any of these as a job of a Ray cluster, its log followed here
  jobs list|logs|stop   the jobs of a Ray cluster

RECIPE is one of {recipes}, or a YAML file.
Further configuration follows it: --config FILE, dotted overrides (--model.rank 8), --print_config.
-v shows what the libraries print. `solar COMMAND --help` lists the options.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    # SIGTERM (a scheduler's, a container's) ends a command as Ctrl-C does: leaving nothing half-written behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = run(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        print("solar: interrupted", file=sys.stderr)
        code = INTERRUPTED
    if code == INTERRUPTED:
        # Threads of Ray may be inside its C++ code: the ordinary end of Python can then crash (seen: SIGSEGV).
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
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else MISTAKE
    if arguments[0] not in COMMANDS:
        print(f"solar: unknown command {arguments[0]!r}: one of {', '.join(COMMANDS)}", file=sys.stderr)
        return MISTAKE
    return _guarded(COMMANDS[arguments[0]], arguments[1:], verbose=verbose)


def _guarded(command: Callable[..., int], arguments: list[str], *, verbose: bool) -> int:
    from jsonargparse import ArgumentError

    from jobs.cluster.failures import Interrupted, WorkerFailure
    from jobs.host.errors import UserError
    from pipeline.events import DataError

    console = Console()
    try:
        return command(arguments, console, verbose=verbose)
    except (UserError, DataError, ArgumentError, ConnectionError) as error:
        console.error(f"solar: {one_line(error)}")
        return MISTAKE
    except Interrupted:
        console.error(
            "solar: interrupted; the same command continues from the last checkpoint (`solar train` with --resume)"
        )
        return INTERRUPTED
    except KeyboardInterrupt:
        console.error("solar: interrupted; what was committed is still there")
        return INTERRUPTED
    except WorkerFailure as error:
        console.error(f"solar: a worker failed: {one_line(error)}" + ("" if verbose else f" (details: {console.log})"))
        return 1
    except SystemExit as end:
        # Ray replaces the handler of SIGTERM by one that exits with the signal's number.
        if end.code != signal.SIGTERM:
            raise
        console.error("solar: interrupted; what was committed is still there")
        return INTERRUPTED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            console.error(traceback.format_exc())
            return 1
        console.error(
            f"solar: {error.filename or 'disk'}: {error.strerror}: free some disk; what was committed is still there"
        )
        return MISTAKE
    except Exception:
        console.error(traceback.format_exc())
        return 1


COMMANDS: dict[str, Callable[..., int]] = {
    "run": training.run,
    "leaderboard": training.leaderboard,
    "doctor": system.doctor,
    "import": data.import_,
    "prepare": data.prepare,
    "inspect": data.inspect,
    "compact": data.compact,
    "forget": data.forget,
    "gc": data.gc,
    "migrate": data.migrate,
    "train": training.train,
    "grow": training.grow,
    "evaluate": training.evaluate,
    "register": training.register,
    "nightly": nightly.nightly,
    "promote": nightly.promote,
    "rollback": nightly.rollback,
    "history": nightly.history,
    "score": serving.score,
    "schedule": schedule.schedule,
    "submit": cluster.submit,
    "jobs": cluster.jobs,
}


def _usage() -> str:
    return USAGE.format(recipes=", ".join(recipe_names()))


if __name__ == "__main__":
    main()
