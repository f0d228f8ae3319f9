"""YAML as people write it: a date and a time of day are text, with and without quotes.

By itself YAML reads `2026-11-21` as a date and `14:00` as 840, sixty times fourteen; settings take both as text.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

_MOMENT = re.compile(r"(?:\d{4}-\d\d?-\d\d?(?:[Tt ].*)?|\d\d?:\d\d(?::\d\d(?:\.\d*)?)?)$")


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader`, for which whatever looks like a date or a time of day is text."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {
        first: [("tag:yaml.org,2002:str", _MOMENT), *known] if first.isdigit() else known
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. yaml.YAMLError: it is not valid YAML."""
    return yaml.load(text, Loader=_Loader)
