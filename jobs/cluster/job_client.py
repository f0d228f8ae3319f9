"""Client of a Ray cluster's job server (the dashboard): connect, submit, follow, list, stop.

Every failure that a user can fix becomes a UserError or ConnectionError with a message of one line.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from jobs.cluster.job_text import COMMAND_KEY, shown_error
from jobs.host.console import Console
from jobs.host.errors import UserError
from jobs.host.secrets import redacted, refuse_open_token

LOCAL_DASHBOARD = "http://127.0.0.1:8265"
"""The default address of the dashboard of `ray start --head`."""
CONNECT_SECONDS, ANSWER_SECONDS = 10, 60
POLL_SECONDS = 1.0
PENDING_SECONDS = 10.0
"""If a job has not started after this time, a line says so, and another line after each further six times as long."""
SILENT_SECONDS = 60.0
"""If nothing is received for this time, the log stream is reopened: a connection can be lost without an error."""
LOST_SECONDS = 300.0
"""How long a cluster that does not answer is tried again before following a job gives up."""
NODES_SECONDS = 60.0
"""How long a dashboard that lists no node is asked again: one that has just started answers before it knows them."""
STOP_GRACE_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
"""Environment variable of a job with the seconds from SIGTERM to SIGKILL; read by Ray's job supervisor, which has the
job's environment."""
STOP_GRACE_SECONDS = 3
"""Ray's default value of that variable."""
RAY_LINES = re.compile(
    r"^(?:\S+ \S+\tINFO job_manager\.py:\d+ -- Runtime env is setting up\.|Running entrypoint for job .*)\n", re.M
)
"""The lines that Ray writes at the beginning of a job's log."""


class ConnectionLost(Exception):
    """The cluster stopped answering while a job was followed."""


class _Client(JobSubmissionClient):
    """Ray's client with time limits; without them it waits for ever for a host that drops packets."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        return super()._do_request(method, endpoint, timeout=(CONNECT_SECONDS, ANSWER_SECONDS), **options)


def choose_address(given: str | None, environment: Mapping[str, str]) -> str:
    """The dashboard's URL: --address, else RAY_API_SERVER_ADDRESS, else RAY_ADDRESS, else this machine's."""
    origins = {
        "--address": given,
        "RAY_API_SERVER_ADDRESS": environment.get("RAY_API_SERVER_ADDRESS"),
        "RAY_ADDRESS": environment.get("RAY_ADDRESS"),
    }
    origin, address = next(((key, value) for key, value in origins.items() if value), ("", LOCAL_DASHBOARD))
    if address in ("auto", "local"):
        return LOCAL_DASHBOARD
    if not re.match(r"https?://[^/\s]+", address):
        host = re.sub(r"^\w+://|:\d+$", "", address)
        raise UserError(
            f"{origin}={redacted(address)}: must be the URL of the cluster's dashboard: give --address "
            f"http://{host}:8265"
        )
    return address.rstrip("/")


def auth_headers(environment: Mapping[str, str], home: Path) -> dict[str, str]:
    """HTTP headers with the cluster's token, which is read from the places where Ray's own tools look for it; {} if
    there is no token. UserError: others may write the token's file.

    Headers are needed because Ray's client itself sends the token only if RAY_AUTH_MODE=token is set, too.
    """
    token = environment.get("RAY_AUTH_TOKEN", "").strip()
    if not token:
        named = environment.get("RAY_AUTH_TOKEN_PATH")
        file = Path(named) if named else home / ".ray" / "auth_token"
        if named and not file.is_file():
            raise UserError(
                f"RAY_AUTH_TOKEN_PATH={named}: no such file: give the path of the file with the cluster's token"
            )
        if file.is_file():
            refuse_open_token(file)
            token = file.read_text().strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


class Cluster:
    """A connection to the job server at an address."""

    def __init__(self, address: str | None) -> None:
        """Connect; UserError or ConnectionError if the cluster cannot run our jobs."""
        import ray

        self._default = not (address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS"))
        self.address = choose_address(address, os.environ)
        headers = auth_headers(os.environ, Path.home())
        self._has_token = bool(headers)
        with self._explained(), _without_addresses():
            self._client = _Client(self.address, headers=headers)
        there = self._client._server_ray_version
        if there != ray.__version__:
            raise UserError(
                f"{self.shown}: runs Ray {there}, but this environment has Ray {ray.__version__}: "
                "use the same version on both sides (ours is in pyproject.toml)"
            )

    @property
    def shown(self) -> str:
        """The address without a password."""
        return redacted(self.address)

    def on_this_machine(self) -> bool:
        """Whether every node of the cluster is this machine, that is, the socket of its raylet is a file here."""
        deadline = time.monotonic() + NODES_SECONDS
        while not (sockets := self._raylet_sockets()) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return bool(sockets) and all(Path(socket).is_socket() for socket in sockets)

    def _raylet_sockets(self) -> list[str]:
        """The raylet sockets of all live nodes that the dashboard lists."""
        with self._explained():
            response = self._client._do_request("GET", "/nodes?view=summary")
        if response.status_code != 200:
            return []
        nodes = [node["raylet"] for node in response.json()["data"]["summary"]]
        return [node.get("rayletSocketName", "") for node in nodes if node.get("state") == "ALIVE"]

    def submit(
        self,
        *,
        entrypoint: str,
        runtime_env: dict[str, Any],
        submission_id: str | None,
        command: str,
        driver_cpus: float,
        tags: Mapping[str, str],
    ) -> str:
        """Upload and submit; returns the job's id."""
        if submission_id is not None:
            if not re.fullmatch(r"\w[\w.-]*", submission_id):
                raise UserError(f"--submission-id {submission_id}: must be letters, digits, '.', '_' and '-'")
            if submission_id in (job.submission_id for job in self.jobs()):
                raise UserError(f"--submission-id {submission_id}: the cluster has a job with this id: choose another")
        with self._explained():
            return self._client.submit_job(
                entrypoint=entrypoint,
                runtime_env=runtime_env,
                submission_id=submission_id,
                metadata={**tags, COMMAND_KEY: command},
                entrypoint_num_cpus=driver_cpus or None,
            )

    def jobs(self) -> list[JobDetails]:
        """The submitted jobs, latest first."""
        with self._explained():
            jobs = [job for job in self._client.list_jobs() if job.submission_id]
        return sorted(jobs, key=lambda job: -(job.start_time or 0))

    def job(self, job_id: str) -> JobDetails:
        with self._explained(job_id):
            return self._client.get_job_info(job_id)

    def logs(self, job_id: str) -> str:
        """The output of the job so far."""
        self.job(job_id)
        with self._explained(job_id):
            return RAY_LINES.sub("", self._client.get_job_logs(job_id))

    def stop(self, job_id: str, console: Console) -> JobDetails:
        """Request that a job stops, and wait until it has ended."""
        job = self.job(job_id)
        if job.status.is_terminal():
            console.line(f"job {job_id} has already ended: {job.status.lower()}")
            return job
        with self._explained(job_id):
            self._client.stop_job(job_id)
        seconds = int((job.runtime_env or {}).get("env_vars", {}).get(STOP_GRACE_VARIABLE, STOP_GRACE_SECONDS))
        console.line(f"job {job_id} is asked to stop; after {seconds} s it is killed")
        requested = time.monotonic()
        while not job.status.is_terminal():
            waited = time.monotonic() - requested
            if job.status == JobStatus.PENDING and waited > PENDING_SECONDS:
                console.line(f"job {job_id} has not started; Ray will not start it: {shown_error(job.message)}")
                return job
            if waited > seconds + ANSWER_SECONDS:
                raise ConnectionError(f"job {job_id} has not ended, it is {job.status}: try again, or check its node")
            time.sleep(POLL_SECONDS)
            job = self.job(job_id)
        last = [line for line in self.logs(job_id).splitlines() if line.strip()][-1:]
        console.line("\n".join([*last, f"job {job_id} has ended: {job.status.lower()}"]))
        return job

    def follow(self, job_id: str, console: Console) -> JobDetails:
        """Print the job's log until it ends; ConnectionLost if the cluster does not answer for LOST_SECONDS."""
        last_answer, reported = time.monotonic(), False
        log, pending = LogTail(self._client, job_id), Pending(console)
        while True:
            try:
                job = self.job(job_id)
                last_answer, reported = time.monotonic(), False
                if job.status == JobStatus.PENDING:
                    pending.tell(job)
                else:
                    asyncio.run(log.print())
                    # The end of the log stream does not mean that the job has ended (ray-project/ray#57002, #60665).
                    job = self.job(job_id)
                    if job.status.is_terminal():
                        return job
            except (OSError, aiohttp.ClientError, RuntimeError) as error:
                if time.monotonic() - last_answer > LOST_SECONDS:
                    raise ConnectionLost(shown_error(error)) from error
                if not reported:
                    reported = True
                    console.error(f"{self.shown} does not answer; trying for {LOST_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)

    @contextmanager
    def _explained(self, job_id: str = "") -> Iterator[None]:
        try:
            yield
        except (AuthenticationError, requests.RequestException, ConnectionError, RuntimeError, KeyError) as error:
            named = f"job {job_id}" if job_id else ""
            raise explained(
                error, address=self.shown, has_token=self._has_token, default=self._default, named=named
            ) from error


def explained(error: Exception, *, address: str, has_token: bool, default: bool, named: str = "") -> Exception:
    """An error of Ray's client as an error with a message of one line; `named`: the job that the request was about."""
    if isinstance(error, AuthenticationError):
        why = "refuses this token" if has_token else "requires a token, and there is none here"
        return UserError(
            f"{address}: {why}: `ray get-auth-token` prints it on the cluster's head node; store it in "
            "~/.ray/auth_token, or set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        )
    if isinstance(error, KeyError | requests.exceptions.JSONDecodeError):
        return UserError(f"{address}: is not a Ray dashboard: give --address http://HOST:8265")
    if isinstance(error, requests.exceptions.HTTPError) and error.response is not None:
        code = error.response.status_code
        return UserError(
            f"{address}: answers with status {code}, is not a Ray dashboard: give --address http://HOST:8265"
        )
    if isinstance(error, requests.exceptions.RequestException | ConnectionError):
        why = "no --address given, and no Ray dashboard on this machine" if default else "does not answer"
        fix = "give --address http://HOST:8265, or start a cluster with `ray start --head`"
        return ConnectionError(f"{address}: {why}: {fix}")
    text = str(error)
    if named and "status code 404" in text:
        return UserError(f"{named}: {address} has no job with this id: `solar jobs list` shows the ids")
    if "returned 404" in text:
        return UserError(f"{address}: is not a Ray dashboard: give --address http://HOST:8265")
    lines = [line for line in text.splitlines() if line.strip()]
    # A server error (5xx) may be temporary: following a job tries again after a ConnectionError.
    kind = ConnectionError if "status code 5" in text else UserError
    return kind(f"{address}: {redacted(lines[-1] if lines else type(error).__name__)}")


@contextmanager
def _without_addresses() -> Iterator[None]:
    """Unset two variables during the block, because Ray's client prefers them to the address that it is given."""
    there = {name: os.environ.pop(name, None) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in there.items() if value is not None})


class LogTail:
    """Prints a job's log on standard output, each character once, however often the stream is reopened."""

    def __init__(self, client: JobSubmissionClient, job_id: str) -> None:
        self._client, self._job_id = client, job_id
        self._printed = 0

    async def print(self) -> None:
        """Print new output until the stream ends, or nothing comes for SILENT_SECONDS."""
        stream: Any = self._client.tail_job_logs(self._job_id)
        seen = 0
        try:
            while True:
                text = await asyncio.wait_for(anext(stream), SILENT_SECONDS)
                fresh = text[max(0, self._printed - seen) :]
                seen += len(text)
                self._printed = max(self._printed, seen)
                sys.stdout.write(RAY_LINES.sub("", fresh))
                sys.stdout.flush()
        except (StopAsyncIteration, TimeoutError):
            return
        finally:
            await stream.aclose()


class Pending:
    """Prints from time to time why a job has not started."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._since, self._next = time.monotonic(), PENDING_SECONDS

    def tell(self, job: JobDetails) -> None:
        waited = time.monotonic() - self._since
        if waited >= self._next:
            self._next = waited + 6 * PENDING_SECONDS
            self._console.line(f"waiting for {waited:.0f} s: {shown_error(job.message)}")
