"""A job as text: its command, its tags, its duration and its outcome; without passwords."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence

from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.job_submission import JobStatus

from jobs.host.console import one_line
from jobs.host.errors import INTERRUPTED, UserError
from jobs.host.secrets import redacted

COMMAND_KEY = "solar_command"
"""The key in a job's metadata for the command, as the user gave it. All other keys are tags."""


def exit_code(job: JobDetails) -> int:
    """The job's exit code; 130 if it was stopped, 128 + n after signal n, 1 if its driver never ran."""
    if job.status == JobStatus.SUCCEEDED:
        return 0
    if job.status == JobStatus.STOPPED:
        return INTERRUPTED
    code = job.driver_exit_code
    if code is None:
        return 1
    return code if code >= 0 else 128 - code


def outcome(job: JobDetails) -> str:
    """The outcome of a job that has ended, in one line."""
    took = f"after {duration(job)}"
    if job.status == JobStatus.SUCCEEDED:
        return f"job {job.submission_id} succeeded {took}"
    if job.status == JobStatus.STOPPED:
        return f"job {job.submission_id} was stopped {took}"
    code = job.driver_exit_code
    if code is None:
        return f"job {job.submission_id} failed {took}: {shown_error(job.message)}"
    if code < 0:
        return f"job {job.submission_id} was killed by signal {-code} {took} (9: often the node's memory ran out)"
    hint = ": no such program on the cluster: name its Python with --python" if code in (126, 127) else ""
    return f"job {job.submission_id} ended with exit code {code} {took}{hint}"


def duration(job: JobDetails) -> str:
    """Hours, minutes and seconds from the job's start to its end, or until now."""
    if not job.start_time:
        return ""
    seconds = max(0, round((job.end_time or time.time() * 1000) / 1000 - job.start_time / 1000))
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def shown_command(job: JobDetails) -> str:
    """The command as the user gave it, else the entrypoint that another tool submitted; without passwords."""
    return redacted((job.metadata or {}).get(COMMAND_KEY) or job.entrypoint)


def shown_error(text: object) -> str:
    """The text on one line, without passwords, at most 500 characters."""
    return redacted(one_line(text or ""))[:500]


def read_tags(given: Sequence[str]) -> dict[str, str]:
    """The tags of `--tag KEY=VALUE`; UserError for another form, a password, or two values for one key."""
    tags = {}
    for text in given:
        key, _, value = text.partition("=")
        if not re.fullmatch(r"[\w.-]+", key) or key == COMMAND_KEY or not value:
            raise UserError(f"submit: --tag {redacted(text)}: must be KEY=VALUE, KEY of letters, digits, '.', '_', '-'")
        if redacted(value) != value:
            raise UserError(f"submit: --tag {redacted(text)}: a cluster shows its jobs' tags: omit the password")
        if tags.get(key, value) != value:
            raise UserError(f"submit: --tag {text}: {key} is {tags[key]!r} already: give it once")
        tags[key] = value
    return tags


def shown_tags(metadata: Mapping[str, str] | None) -> str:
    """A job's tags, sorted by key; without passwords."""
    tags = {key: value for key, value in (metadata or {}).items() if key != COMMAND_KEY}
    return redacted(" ".join(f"{key}={tags[key]}" for key in sorted(tags)))
