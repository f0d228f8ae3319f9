"""submit, jobs: run any command as a job of a Ray cluster; list, follow and stop jobs."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs.commands.arguments import Command, Parsers, parse, usage_error
from jobs.host.console import Console, one_line
from jobs.host.errors import INTERRUPTED, MISTAKE, wait_seconds
from jobs.host.places import Place, new_parser

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

ADDRESS_HELP = (
    "URL of the cluster's dashboard, http://HOST:8265; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or this machine's"
)
SUBMIT_DESCRIPTION = """\
Run `solar COMMAND` as a job of a Ray cluster, print its log here and end with its exit code. Ctrl-C stops printing the
log; the job continues. The code and the YAML files that COMMAND names are uploaded, data is not: unless the cluster is
this machine, every path must be absolute and on a file system that all nodes mount, or a URI."""


def submit(arguments: list[str], console: Console, *, verbose: bool, commands: Mapping[str, Command]) -> int:
    """Run a command as a job, with retries; `commands`: all commands of `solar`, by name."""
    # Read our own options, which precede `--`, and the command after it.
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parsed = parse(submit_parser(), arguments[:split])
    _check_submission(parsed)
    command = arguments[split + 1 :]
    if command[:1] == ["solar"]:
        command.pop(0)
    _check_command(command, commands)
    _quiet(verbose)
    command += ["-v"] if verbose else []
    # Submit it until it succeeds, fails for good, or all tries are used up.
    for tried in range(1, parsed.retries + 2):
        last = tried > parsed.retries
        try:
            code, ended = _submit_once(command, commands[command[0]], parsed, console, tried=tried)
        except ConnectionError as error:
            if last:
                raise
            why = one_line(error)
        else:
            # No retry after a user's mistake or a stop by a user, nor if the job may still run (connection lost).
            if last or not ended or code in (0, MISTAKE, INTERRUPTED):
                return code
            why = f"exit code {code}"
        wait = wait_seconds(tried, first=60 * parsed.retry_minutes)
        console.error(f"solar: try {tried} of {parsed.retries + 1} failed ({why}); a new job in {wait:g} s")
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def submit_parser() -> ArgumentParser:
    """The parser of the arguments before `--`."""
    parser = new_parser("submit", description=SUBMIT_DESCRIPTION)
    parser.usage = "solar submit [options] -- COMMAND ..."
    parser.add_argument("--address", type=str | None, default=None, help=ADDRESS_HELP)
    parser.add_argument(
        "--workspace",
        type=Place | None,
        default=None,
        help="workspace of COMMAND; default: the one in COMMAND's YAML files, or ./workspace if all nodes of the "
        "cluster are this machine",
    )
    parser.add_argument("--detach", action="store_true", help="only submit: print the job's id and return")
    parser.add_argument(
        "--submission-id",
        type=str | None,
        default=None,
        help="the job's id: letters, digits, '.', '_', '-'; default: chosen by Ray",
    )
    parser.add_argument(
        "--stop-grace", type=int, default=60, help="seconds from SIGTERM to SIGKILL when the job is stopped; 0 or more"
    )
    parser.add_argument(
        "--driver-cpus", type=float, default=0, help="CPUs reserved for the driver, 0 or more; 0: it runs on the head"
    )
    parser.add_argument(
        "--python",
        type=str | None,
        default=None,
        help="the cluster's Python; default: `python`, or on this machine the Python that runs this command",
    )
    parser.add_argument(
        "--retries",
        type=int,
        default=0,
        help="number of new jobs after a failed one, from 0 to 100; none after exit code 2 or a stop",
    )
    parser.add_argument(
        "--retry-minutes",
        type=float,
        default=5.0,
        help="minutes before the first new job, above 0 and at most 60; doubled before each later one",
    )
    parser.add_argument(
        "--tag",
        action="append",
        type=str,
        default=[],
        metavar="KEY=VALUE",
        help="a tag, shown by `solar jobs list`; may be given several times",
    )
    return parser


def _check_command(command: list[str], commands: Mapping[str, Command]) -> None:
    if not command:
        raise usage_error("submit", "no command given: put it after --, such as solar submit -- run movielens-100k")
    jobs = [name for name, each in commands.items() if each.is_job]
    if command[0] not in jobs:
        raise usage_error("submit", f"{command[0]!r} cannot be a job: one of {', '.join(jobs)}")


def _check_submission(parsed: Any) -> None:
    if parsed.stop_grace < 0 or parsed.driver_cpus < 0:
        raise usage_error("submit", "--stop-grace and --driver-cpus must be 0 or more")
    if not 0 <= parsed.retries <= 100:
        raise usage_error("submit", f"--retries {parsed.retries}: must be from 0 to 100")
    if not 0 < parsed.retry_minutes <= 60:
        raise usage_error("submit", f"--retry-minutes {parsed.retry_minutes:g}: must be above 0 and at most 60")
    if parsed.detach and parsed.retries:
        raise usage_error("submit", "--retries: a detached command cannot retry: omit --detach")


def _submit_once(
    arguments: list[str], command: Command, parsed: Any, console: Console, *, tried: int
) -> tuple[int, bool]:
    """(exit code, whether the job has ended); a further try is a new job with the id ID-TRY."""
    from jobs.cluster.job_client import Cluster
    from jobs.cluster.job_text import read_tags
    from jobs.cluster.submission import submit as submit_job

    tags = read_tags(parsed.tag)
    cluster = Cluster(parsed.address)
    wanted = parsed.submission_id
    job_id, shown = submit_job(
        arguments,
        cluster,
        parsers=command.parsers(arguments[1:]),
        chosen_by=command.chosen_by,
        workspace=parsed.workspace,
        submission_id=f"{wanted}-{tried}" if wanted and tried > 1 else wanted,
        python=parsed.python,
        driver_cpus=parsed.driver_cpus,
        stop_grace_seconds=parsed.stop_grace,
        tags=tags,
    )
    console.line(f"job {job_id} on {cluster.shown}: {shown}")
    if parsed.detach:
        console.line(_next_commands(cluster, job_id))
        return 0, False
    return _followed(cluster, job_id, console)


def jobs(arguments: list[str], console: Console, *, verbose: bool) -> int:
    actions = {"list": _list, "logs": _logs, "stop": _stop}
    if not arguments or arguments[0] not in actions:
        if set(arguments) & {"-h", "--help"}:
            console.line("solar jobs list | logs ID [--follow] | stop ID, each with [--address http://HOST:8265]")
            return 0
        raise usage_error(f"jobs {arguments[0] if arguments else ''}".strip(), f"name one of {', '.join(actions)}")
    parsed = parse(_jobs_parser(arguments[0]), arguments[1:])
    _quiet(verbose)

    from jobs.cluster.job_client import Cluster

    return actions[arguments[0]](Cluster(parsed.address), parsed, console)


def jobs_parsers(arguments: Sequence[str]) -> Parsers:
    """The parser of the action that the first argument names."""
    return [_jobs_parser(arguments[0])] if arguments else []


def _jobs_parser(action: str) -> ArgumentParser:
    parser = new_parser(f"jobs {action}", description="The jobs of a Ray cluster.")
    if action != "list":
        parser.add_argument("id", type=str, help="the job's id, as `solar jobs list` shows it")
    if action == "logs":
        parser.add_argument("--follow", action="store_true", help="print the log to its end; exit with the job's code")
    parser.add_argument("--address", type=str | None, default=None, help=ADDRESS_HELP)
    return parser


def _list(cluster: Any, _parsed: Any, console: Console) -> int:
    from jobs.cluster.job_text import duration, shown_command, shown_tags

    found = cluster.jobs()
    if not found:
        console.line(f"no jobs on {cluster.shown}")
        return 0
    rows = []
    for job in found:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((job.start_time or 0) / 1000))
        rows.append((job.submission_id, str(job.status), started, duration(job), shown_command(job)))
    columns = ["id", "status", "started", "duration", "command"]
    if any(tags := [shown_tags(job.metadata) for job in found]):
        columns.insert(4, "tags")
        rows = [(*row[:4], of_job, row[4]) for row, of_job in zip(rows, tags, strict=True)]
    console.table(f"jobs on {cluster.shown}", columns, rows, text=("status", "tags", "command"))
    return 0


def _logs(cluster: Any, parsed: Any, console: Console) -> int:
    if parsed.follow:
        cluster.job(parsed.id)
        return _follow(cluster, parsed.id, console)
    console.line(cluster.logs(parsed.id).rstrip("\n"))
    return 0


def _stop(cluster: Any, parsed: Any, console: Console) -> int:
    cluster.stop(parsed.id, console)
    return 0


def _follow(cluster: Any, job_id: str, console: Console) -> int:
    return _followed(cluster, job_id, console)[0]


def _followed(cluster: Any, job_id: str, console: Console) -> tuple[int, bool]:
    """Print the job's log to its end; returns (exit code, whether the job has ended)."""
    from jobs.cluster.job_client import ConnectionLost
    from jobs.cluster.job_text import exit_code, outcome

    try:
        job = cluster.follow(job_id, console)
    except KeyboardInterrupt:
        console.error(f"\njob {job_id} continues; {_next_commands(cluster, job_id)}")
        return INTERRUPTED, False
    except ConnectionLost as error:
        console.error(
            f"solar: lost {cluster.shown} ({error}); job {job_id} may continue; {_next_commands(cluster, job_id)}"
        )
        return 1, False
    (console.line if exit_code(job) == 0 else console.error)(outcome(job))
    return exit_code(job), True


def _next_commands(cluster: Any, job_id: str) -> str:
    """The commands that follow and stop the job, for messages."""
    return (
        f"follow it: solar jobs logs {job_id} --follow --address {cluster.shown}; "
        f"stop it: solar jobs stop {job_id} --address {cluster.shown}"
    )


def _quiet(verbose: bool) -> None:
    """Silence Ray's client, which reports every upload on the terminal. Our own warnings are still shown."""
    if verbose:
        return
    from ray.job_submission import JobSubmissionClient  # its import sets the levels of Ray's loggers

    for name in ("ray", JobSubmissionClient.__module__):
        logging.getLogger(name).setLevel(logging.ERROR)
