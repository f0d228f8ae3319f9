"""Notifications about the outcome of a night: a user-defined command and a webhook receive the event.

An event holds `event` (promoted, refused, undecided, no_input or failed), model, date, version, reason and report (the
path of the night's report); a key that does not apply is None. Every failure here is reported in one line and never
raised: a night does not fail because its notification failed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from typing import IO, Any

from jobs.host.secrets import redacted, scheme_and_host

EVENTS = ("promoted", "refused", "undecided", "no_input", "failed")
FACTS = ("event", "model", "date", "version", "reason", "report")
"""Keys of an event that the command also gets as environment variables: SOLAR_EVENT, SOLAR_MODEL and so on."""

URL_VARIABLE = "SOLAR_NOTIFY_URL"
"""Environment variable with the webhook's URL, for setups in which a recipe must not contain its token."""
FACT_LENGTH = 4000
"""Longer values of these variables are cut: the kernel starts no program with a variable longer than 128 KiB."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NotifyConfig:
    """Where the outcome of a night is sent."""

    command: str | None = None
    """Shell command that gets the event as JSON on its standard input, and its values in the environment variables
    SOLAR_EVENT, SOLAR_MODEL, SOLAR_DATE, SOLAR_VERSION, SOLAR_REASON and SOLAR_REPORT. Unset = none."""
    url: str | None = None
    """URL of a webhook (http or https) to which the event is posted as JSON; a token in it stays out of logs and
    records. Unset = the environment variable SOLAR_NOTIFY_URL, if set."""
    command_seconds: float = 60.0
    """The command is killed after this many seconds; above 0, at most 3600."""
    url_seconds: float = 10.0
    """Most seconds that the webhook may take to accept the connection, and again to answer; above 0, at most 3600."""

    def __post_init__(self) -> None:
        if self.url is not None and scheme_and_host(self.url) is None:
            raise ValueError("url is not a web address: it must have the form https://HOST/PATH")
        for name in ("command_seconds", "url_seconds"):
            if not 0 < getattr(self, name) <= 3600:
                raise ValueError(f"{name}={getattr(self, name):g}: must be above 0 and at most 3600")

    def recorded(self) -> NotifyConfig:
        """This configuration as it may be stored: only scheme and host of the webhook's URL, which may hold a token."""
        return self if self.url is None else dataclasses.replace(self, url=scheme_and_host(self.url))


def notify(config: NotifyConfig, event: Mapping[str, Any], tell: Callable[[str], None]) -> None:
    """Send the event to the command and to the webhook; each failure is reported to `tell` in one line."""
    config = dataclasses.replace(config, url=_url(config, tell))
    for use, send in ((config.command, _run), (config.url, _post)):
        if use is None:
            continue
        try:
            problem = send(config, event)
        # Only the error's type: its text may hold the whole URL. No failed notification may end the night itself.
        except Exception as error:
            problem = f"{_target(config, send)}: {type(error).__name__}"
        if problem:
            tell(f"notification of {event.get('event')!r} failed: {problem}")


def _url(config: NotifyConfig, tell: Callable[[str], None]) -> str | None:
    url = config.url or os.environ.get(URL_VARIABLE) or None
    if url is not None and scheme_and_host(url) is None:
        tell(f"{URL_VARIABLE} is not a web address: it must have the form https://HOST/PATH")
        return None
    return url


def _target(config: NotifyConfig, send: Callable[..., Any]) -> str:
    return f"notify.url {scheme_and_host(config.url or '')}" if send is _post else "notify.command"


def _run(config: NotifyConfig, event: Mapping[str, Any]) -> str | None:
    """Run the command; returns what went wrong, or None."""
    assert config.command is not None
    facts = {f"SOLAR_{name.upper()}": str(event[name])[:FACT_LENGTH] for name in FACTS if event.get(name) is not None}
    # A file, not a pipe: a process that the command leaves running may keep a pipe open for ever.
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            config.command,
            shell=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=os.environ | facts,
            start_new_session=True,
        )
        try:
            process.communicate(json.dumps(event, default=str).encode(), timeout=config.command_seconds)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return f"notify.command did not end within {config.command_seconds:g} s (notify.command_seconds)"
            raise
        if process.returncode == 0:
            return None
        return f"notify.command ended with exit code {process.returncode}{_last_line(errors)}"


def _last_line(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return f": {redacted(lines[-1])[:200]}" if lines else ""


def _post(config: NotifyConfig, event: Mapping[str, Any]) -> str | None:
    """Post to the webhook; returns what went wrong, or None."""
    import requests

    assert config.url is not None
    shown = _target(config, _post)
    body, kind = json.dumps(event, default=str), {"Content-Type": "application/json"}
    try:
        # No redirects: the event must not reach a host that the user did not name. The answer's body is not read.
        with requests.post(
            config.url, data=body, headers=kind, timeout=config.url_seconds, allow_redirects=False, stream=True
        ) as answer:
            return None if answer.ok and not answer.is_redirect else f"{shown} answers with status {answer.status_code}"
    except requests.Timeout:
        return f"{shown} does not answer within {config.url_seconds:g} s (notify.url_seconds)"
    except requests.ConnectionError:
        return f"{shown} does not answer"
