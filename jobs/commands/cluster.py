"""submit, jobs: any command as a job of a Ray cluster, and a look at the jobs there."""

from __future__ import annotations

import logging
import time
from typing import Any

from jobs.commands.arguments import parse, usage_error
from jobs.host.console import Console, one_line
from jobs.host.errors import INTERRUPTED, MISTAKE, wait_seconds

ADDRESS_HELP = (
    "the cluster's dashboard, http://HOST:8265; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or this machine's"
)
SUBMIT_DESCRIPTION = """\
Run `solar COMMAND` as a job of a Ray cluster; its log is followed here, its exit code is ours. Ctrl-C ends the
following, not the job. The code and the YAML files that COMMAND names are uploaded; data is not: on a cluster other
than this machine every path must be absolute and on a file system that all nodes mount (or a URI)."""


def submit(arguments: list[str], console: Console, *, verbose: bool) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = submit_parser()
    if split == len(arguments) and not set(arguments) & {"-h", "--help"}:
        raise usage_error("submit", "no command given: put it after --, such as solar submit -- run movielens-100k")
    parsed = parse(parser, arguments[:split])
    _check_submission(parsed)
    _quiet(verbose)
    command = [*arguments[split + 1 :], *(["-v"] if verbose else [])]
    for tried in range(1, parsed.retries + 2):
        last = tried > parsed.retries
        try:
            code, ended = _submit_once(command, parsed, console, tried=tried)
        except ConnectionError as error:
            if last:
                raise
            why = one_line(error)
        else:
            # Nothing mends a user's mistake, and who stopped a job wants no other. One that was lost may still go on.
            if last or not ended or code in (0, MISTAKE, INTERRUPTED):
                return code
            why = f"exit code {code}"
        wait = wait_seconds(tried, first=60 * parsed.retry_minutes)
        console.error(f"solar: try {tried} of {parsed.retries + 1} failed ({why}); a new job in {wait:g} s")
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def submit_parser() -> Any:
    """The parser of what stands before `--`."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="solar submit", exit_on_error=False, description=SUBMIT_DESCRIPTION)
    parser.usage = "solar submit [options] -- COMMAND ..."
    parser.add_argument("--address", type=str | None, default=None, help=ADDRESS_HELP)
    parser.add_argument(
        "--workspace",
        type=str | None,
        default=None,
        help="COMMAND's workspace; default: COMMAND's own, or ./workspace where the whole cluster is this machine",
    )
    parser.add_argument("--detach", action="store_true", help="print the job's id and return")
    parser.add_argument("--submission-id", type=str | None, default=None, help="the job's id; default: Ray's choice")
    parser.add_argument("--stop-grace", type=int, default=60, help="seconds from a stop's SIGTERM to SIGKILL")
    parser.add_argument("--driver-cpus", type=float, default=0, help="CPUs reserved for the driver; 0: on the head")
    parser.add_argument(
        "--python", type=str | None, default=None, help="the cluster's Python; default: `python`, or this one here"
    )
    parser.add_argument(
        "--retries", type=int, default=0, help="new jobs after one that failed, but for exit code 2; default: 0"
    )
    parser.add_argument(
        "--retry-minutes", type=float, default=5.0, help="before the first of them, then twice as long; default: 5"
    )
    parser.add_argument(
        "--tag",
        action="append",
        type=str,
        default=[],
        metavar="KEY=VALUE",
        help="shown by `solar jobs list`; repeatable",
    )
    return parser


def _check_submission(parsed: Any) -> None:
    if parsed.stop_grace < 0 or parsed.driver_cpus < 0:
        raise usage_error("submit", "--stop-grace and --driver-cpus must be 0 or more")
    if not 0 <= parsed.retries <= 100:
        raise usage_error("submit", f"--retries {parsed.retries}: must be from 0 to 100")
    if not 0 < parsed.retry_minutes <= 60:
        raise usage_error("submit", f"--retry-minutes {parsed.retry_minutes:g}: must be above 0 and at most 60")
    if parsed.detach and parsed.retries:
        raise usage_error("submit", "--retries: whoever does not wait cannot try again: leave --detach away")


def _submit_once(command: list[str], parsed: Any, console: Console, *, tried: int) -> tuple[int, bool]:
    """(exit code, whether the job has ended); each further try is a job with an id of its own."""
    from jobs.cluster.job_client import Cluster
    from jobs.cluster.job_text import read_tags
    from jobs.cluster.submission import submit as submit_job

    tags = read_tags(parsed.tag)
    cluster = Cluster(parsed.address)
    wanted = parsed.submission_id
    job_id, shown = submit_job(
        command,
        cluster,
        workspace=parsed.workspace,
        submission_id=f"{wanted}-{tried}" if wanted and tried > 1 else wanted,
        python=parsed.python,
        driver_cpus=parsed.driver_cpus,
        stop_grace_seconds=parsed.stop_grace,
        tags=tags,
    )
    console.line(f"job {job_id} on {cluster.shown}: {shown}")
    if parsed.detach:
        console.line(_how_to_go_on(cluster, job_id))
        return 0, False
    return _followed(cluster, job_id, console)


def jobs(arguments: list[str], console: Console, *, verbose: bool) -> int:
    from jsonargparse import ArgumentParser

    actions = {"list": _list, "logs": _logs, "stop": _stop}
    if not arguments or arguments[0] not in actions:
        if set(arguments) & {"-h", "--help"}:
            console.line("solar jobs list | logs ID [--follow] | stop ID, each with [--address http://HOST:8265]")
            return 0
        raise usage_error(f"jobs {arguments[0] if arguments else ''}".strip(), f"name one of {', '.join(actions)}")
    action = arguments[0]
    parser = ArgumentParser(prog=f"solar jobs {action}", exit_on_error=False)
    if action != "list":
        parser.add_argument("id", type=str, help="the job's id, as `solar jobs list` shows it")
    if action == "logs":
        parser.add_argument("--follow", action="store_true", help="to the end; the exit code is the job's")
    parser.add_argument("--address", type=str | None, default=None, help=ADDRESS_HELP)
    parsed = parse(parser, arguments[1:])
    _quiet(verbose)

    from jobs.cluster.job_client import Cluster

    return actions[action](Cluster(parsed.address), parsed, console)


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
    """(exit code, whether the job has ended)."""
    from jobs.cluster.job_client import ConnectionLost
    from jobs.cluster.job_text import exit_code, outcome

    try:
        job = cluster.follow(job_id, console)
    except KeyboardInterrupt:
        console.error(f"\njob {job_id} goes on; {_how_to_go_on(cluster, job_id)}")
        return INTERRUPTED, False
    except ConnectionLost as error:
        console.error(
            f"solar: lost {cluster.shown} ({error}); job {job_id} may go on; {_how_to_go_on(cluster, job_id)}"
        )
        return 1, False
    (console.line if exit_code(job) == 0 else console.error)(outcome(job))
    return exit_code(job), True


def _how_to_go_on(cluster: Any, job_id: str) -> str:
    return (
        f"follow it: solar jobs logs {job_id} --follow --address {cluster.shown}; "
        f"stop it: solar jobs stop {job_id} --address {cluster.shown}"
    )


def _quiet(verbose: bool) -> None:
    """Ray's client tells every upload on the terminal."""
    if not verbose:
        logging.disable(logging.WARNING)
