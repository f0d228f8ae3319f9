"""Tells people how a night went: a command of theirs and a webhook get the event.

An event holds `event` (promoted, refused, undecided, no_input or failed), model, date, version, reason and report (the
path of the night's report); what does not apply is None. Whatever fails here is told in a line, never raised: a night
does not fail because nobody could be told of it.
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

import requests

from jobs.host.secrets import redacted, scheme_and_host

EVENTS = ("promoted", "refused", "undecided", "no_input", "failed")
FACTS = ("event", "model", "date", "version", "reason", "report")
"""Keys that the command finds in its environment too: SOLAR_EVENT, SOLAR_MODEL and so on."""

URL_VARIABLE = "SOLAR_NOTIFY_URL"
"""Environment variable with the webhook's address, for where a recipe must not hold its token."""
FACT_LENGTH = 4000
"""A variable's value is cut there: the kernel starts no program with longer ones than 128 KiB."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NotifyConfig:
    """Who is told of a night's outcome."""

    command: str | None = None
    """Shell command that gets the event as JSON on its standard input and its facts as SOLAR_EVENT, SOLAR_MODEL ..."""
    url: str | None = None
    """Webhook, http or https, to which the event is posted as JSON; a token in it stays out of logs and records.
    Unset = SOLAR_NOTIFY_URL of the environment, if that is there."""
    command_seconds: float = 60.0
    """After so long the command is killed."""
    url_seconds: float = 10.0
    """How long the webhook may take to accept a connection, and again to answer."""

    def __post_init__(self) -> None:
        if self.url is not None and scheme_and_host(self.url) is None:
            raise ValueError("url is no web address: it must be as https://HOST/PATH")
        for name in ("command_seconds", "url_seconds"):
            if not 0 < getattr(self, name) <= 3600:
                raise ValueError(f"{name}={getattr(self, name):g}: must be above 0 and at most 3600")

    def recorded(self) -> NotifyConfig:
        """The same without what must not be stored: of the webhook only scheme and host."""
        return self if self.url is None else dataclasses.replace(self, url=scheme_and_host(self.url))


def notify(config: NotifyConfig, event: Mapping[str, Any], tell: Callable[[str], None]) -> None:
    """Hand the event to the command and to the webhook; what fails is told in one line each."""
    config = dataclasses.replace(config, url=_url(config, tell))
    for use, send in ((config.command, _run), (config.url, _post)):
        if use is None:
            continue
        try:
            problem = send(config, event)
        # An error's text may hold the whole address; no error of a notification may end what it tells of.
        except Exception as error:
            problem = f"{_target(config, send)}: {type(error).__name__}"
        if problem:
            tell(f"nobody was told of {event.get('event')!r}: {problem}")


def _url(config: NotifyConfig, tell: Callable[[str], None]) -> str | None:
    url = config.url or os.environ.get(URL_VARIABLE) or None
    if url is not None and scheme_and_host(url) is None:
        tell(f"{URL_VARIABLE} is no web address: it must be as https://HOST/PATH")
        return None
    return url


def _target(config: NotifyConfig, send: Callable[..., Any]) -> str:
    return f"notify.url {scheme_and_host(config.url or '')}" if send is _post else "notify.command"


def _run(config: NotifyConfig, event: Mapping[str, Any]) -> str | None:
    """What went wrong with the command, if anything."""
    assert config.command is not None
    facts = {f"SOLAR_{name.upper()}": str(event[name])[:FACT_LENGTH] for name in FACTS if event.get(name) is not None}
    # A file, not a pipe: what the command leaves running may keep a pipe open for ever.
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
        return f"notify.command ended with {process.returncode}{_last_line(errors)}"


def _last_line(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return f": {redacted(lines[-1])[:200]}" if lines else ""


def _post(config: NotifyConfig, event: Mapping[str, Any]) -> str | None:
    """What went wrong with the webhook, if anything."""
    assert config.url is not None
    shown = _target(config, _post)
    body, kind = json.dumps(event, default=str), {"Content-Type": "application/json"}
    try:
        # Followed to another host the event would go where nobody sent it; the answer's body is not read.
        with requests.post(
            config.url, data=body, headers=kind, timeout=config.url_seconds, allow_redirects=False, stream=True
        ) as answer:
            return None if answer.ok and not answer.is_redirect else f"{shown} answers {answer.status_code}"
    except requests.Timeout:
        return f"{shown} does not answer within {config.url_seconds:g} s (notify.url_seconds)"
    except requests.ConnectionError:
        return f"{shown} does not answer"
