"""What a job carries beside its command: tags, which are Ray's metadata and which `solar jobs list` shows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from jobs.host.errors import UserError
from jobs.host.secrets import redacted

COMMAND_KEY = "solar_command"
"""Of a job's metadata: the command as the user gave it. The other keys are tags."""


def read_tags(given: Sequence[str]) -> dict[str, str]:
    """The tags of `--tag KEY=VALUE`; UserError where one is none, or holds a password."""
    tags = {}
    for text in given:
        key, _, value = text.partition("=")
        if not re.fullmatch(r"[\w.-]+", key) or key == COMMAND_KEY or not value:
            raise UserError(f"submit: --tag {redacted(text)}: must be KEY=VALUE, KEY of letters, digits, '.', '_', '-'")
        if redacted(value) != value:
            raise UserError(f"submit: --tag {redacted(text)}: a cluster shows its jobs' tags: leave the password away")
        if tags.get(key, value) != value:
            raise UserError(f"submit: --tag {text}: {key} is {tags[key]!r} already: give it once")
        tags[key] = value
    return tags


def shown_tags(metadata: Mapping[str, str] | None) -> str:
    """A job's tags, by key; no passwords."""
    tags = {key: value for key, value in (metadata or {}).items() if key != COMMAND_KEY}
    return redacted(" ".join(f"{key}={tags[key]}" for key in sorted(tags)))
