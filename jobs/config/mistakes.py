"""What the parser refuses, as one plain line: the key, the value and what is allowed.

jsonargparse tells it in the words of Python (`typing.Literal`, `Union subtypes`). Its text gives the key and the value
alone; what is allowed follows from the type of the key's field.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from jobs.host.console import one_line
from jobs.host.places import Place
from models.zoo import MODELS

REFUSALS = (ArgumentError, ValueError, RecursionError)
"""What the parser raises for a value."""
_UNKNOWN = re.compile(
    r"unrecognized arguments: --([\w.\-]+)|does not accept option '([\w.]+)'|Key '([\w.]+)'|^Option '([\w.]+)' is not"
)
_WRONG = re.compile(r'Parser key "([\w.]+)".*\b(?:Got|Given) value: ?(.*)')
_NO_SECTION = re.compile(r"""Parser key "([\w.]+)": Unable to load config '(.*)' - """)
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}
_LONGEST = 80
"""Characters of a value that are shown."""


def explain(error: Exception, parser: ArgumentParser) -> str:
    """The line for an error of the parser; for an unknown key, with the most similar known key."""
    if isinstance(error, RecursionError):
        return "a value is nested too deep: no setting has more than a few levels"
    text = one_line(error)
    if unknown := _UNKNOWN.search(text):
        return _unknown_key(next(key for key in unknown.groups() if key), text, parser)
    if section := _NO_SECTION.match(text):
        return f"{section[1]}={shortened(section[2])}: must hold `key: value` lines"
    hints = _hints(parser)
    if (wrong := _WRONG.match(text)) and wrong[1] in hints:
        return f"{wrong[1]}={shortened(wrong[2])}: must be {_allowed(hints[wrong[1]], wrong[2])}"
    return text


def shortened(value: object) -> str:
    """The value as text, cut if it is long."""
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def empty_setting(parsed: Namespace, parser: ArgumentParser) -> str | None:
    """The line for the first setting that is null although it must have a value; None if all have one.

    The parser takes null, which is also what YAML reads from a key with nothing behind it, for a value of any type.
    """
    for dest, hint in _hints(parser).items():
        if hint is not None and parsed.get(dest, "") is None and types.NoneType not in _kinds(hint):
            allowed = " or ".join(_words(kind) for kind in _kinds(hint))
            return f"{dest} must be {allowed}, is empty: give it a value, or remove it"
    return None


def section_without_keys(values: Mapping[str, Any], parser: ArgumentParser) -> str | None:
    """The line for the first section of a YAML file, at any depth, that holds no settings; None if all do.

    The parser reads nothing of such a section.
    """
    fields = {action.dest for action in parser._actions if getattr(action, "_typehint", None)}
    sections = {dest[:dot] for dest in fields for dot in _dots(dest)} - fields
    for section in sorted(sections):
        held: Any = values
        for part in section.split("."):
            held = held.get(part, {})
            if not isinstance(held, dict):
                return f"{section} must hold `key: value` lines, holds {shortened(held)}"
    return None


def _dots(dest: str) -> list[int]:
    return [index for index, letter in enumerate(dest) if letter == "."]


def _unknown_key(key: str, text: str, parser: ArgumentParser) -> str:
    group = re.search(r"Group '([\w.]+)'", text)
    key = f"{group[1]}.{key}" if group and not key.startswith(f"{group[1]}.") else key
    known = [action.dest for action in parser._actions]
    near = difflib.get_close_matches(key, known, n=1)
    if others := _models_with(key):
        hint = f"a setting of {', '.join(others)} alone: set model.name, or remove it"
    elif near:
        hint = f"did you mean {near[0]}?"
    else:
        hint = f"see --{'print_config' if 'print_config' in known else 'help'} for the keys"
    return f"unknown key {key}: {hint}"


def _models_with(key: str) -> list[str]:
    """The models that have this setting, which the chosen model lacks."""
    section, _, name = key.partition(".")
    return [
        model
        for model, (config, _) in MODELS.items()
        if section == "model" and name in {field.name for field in dataclasses.fields(config)}
    ]


def _hints(parser: ArgumentParser) -> dict[str, Any]:
    """{key: type of its values}."""
    return {action.dest: getattr(action, "_typehint", None) or action.type for action in parser._actions}


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _allowed(hint: Any, value: str) -> str:
    """What a field of this type may hold, and how this value could have been meant."""
    kinds = _kinds(hint)
    allowed = " or ".join(_words(kind) for kind in kinds)
    names = [str(name) for kind in kinds if typing.get_origin(kind) is typing.Literal for name in typing.get_args(kind)]
    if near := difflib.get_close_matches(value, names, n=1):
        return f"{allowed}: did you mean {near[0]}?"
    if str in kinds and value[:1] not in ("[", "{"):
        return f"{allowed}: write it in quotes"
    if tuple[str, ...] in kinds and value[:1].isalpha():
        return f"{allowed}: write [{value}]"
    return allowed


def _words(kind: Any) -> str:
    """A type in plain words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " or ".join(map(str, inner))
    if origin is tuple:
        count = "" if inner[-1] is ... else f"{len(inner)} "
        return f"a list of {count}{_PLURALS.get(inner[0], 'paths')}"
    if isinstance(kind, type) and issubclass(kind, Place):
        return "a path or URI"
    if dataclasses.is_dataclass(kind):
        return f"`key: value` lines of {', '.join(field.name for field in dataclasses.fields(kind))}"
    return _WORDS.get(kind, "`key: value` lines")
