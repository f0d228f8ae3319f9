"""Arguments that are places: paths and URIs. A relative path depends on the directory in which a command runs.

Parsers declare such an argument with one of the types below, and `rewritten` reads a command line as its parsers would.
So no other module keeps a list of these arguments: cluster/submission.py uses `rewritten` to make them absolute.
"""

from __future__ import annotations

import argparse
import contextlib
import contextvars
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from jobs.host.yaml_text import as_written, parse_yaml

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


NAME = re.compile(r"\w[\w.-]*")
"""Names that become a part of a path (letters, digits, '.', '_', '-'): none leaves the folder that it is in."""


class Place(str):
    """A path, a pattern of paths, or a URI."""

    words: ClassVar[tuple[str, ...]] = ("null",)
    """Values that have a meaning of their own and are not places."""


class StatesPlace(Place):
    """The place of stored user states: a directory, or `auto` for the workspace's default directory."""

    words = (*Place.words, "auto")


class YamlFile(str):
    """A YAML file that a command reads, or the name of a YAML file in the package (a recipe, a leaderboard)."""


class Subject(str):
    """The argument of `solar evaluate`: a recipe (YamlFile), the directory of a checkpoint (Place) or a model's URI."""


Kind = type[Place] | type[YamlFile] | type[Subject]


_explained = contextvars.ContextVar("options have their help", default=True)


@contextlib.contextmanager
def options_explained(wanted: bool) -> Iterator[None]:
    """Whether parsers that are made inside have the help of their options. Reading it from the sources of all
    configuration classes takes a third of the time that a parser takes."""
    before = _explained.set(wanted)
    try:
        yield
    finally:
        _explained.reset(before)


def new_parser(command: str, *, description: str | None = None) -> ArgumentParser:
    """The parser of `solar COMMAND`: accepts the types above, raises instead of exiting, and uses the docstring of each
    configuration field as the help of its option, unless `options_explained` says otherwise."""
    from jsonargparse import ArgumentParser, set_loader, set_parsing_settings
    from jsonargparse._loaders_dumpers import get_yaml_default_loader
    from jsonargparse.typing import register_type
    from yaml import YAMLError

    for kind in (Place, StatesPlace, YamlFile, Subject):
        register_type(kind, serializer=str, deserializer=_reader_of(kind))
    set_parsing_settings(docstring_parse_attribute_docstrings=_explained.get())
    set_loader("yaml", parse_yaml, exceptions=(YAMLError,))
    # A text for a setting that is a number goes through a loader of jsonargparse that cannot be set (4.53): it reads
    # 1:30 as ninety.
    numbers = get_yaml_default_loader()
    numbers.yaml_implicit_resolvers = as_written(numbers.yaml_implicit_resolvers)
    return ArgumentParser(prog=f"solar {command}", description=description, exit_on_error=False)


def kind_of(action: argparse.Action) -> Kind | None:
    """The kind of place that an argument holds, directly or inside a union, list or tuple; None for other arguments."""
    if action.dest == "config":
        return YamlFile
    kinds = [kind for kind in _types_in(getattr(action, "_typehint", None) or action.type) if _is_kind(kind)]
    return kinds[0] if kinds else None


def place_keys(parsers: Sequence[argparse.ArgumentParser]) -> list[str]:
    """The dotted configuration keys (such as `data.shards`) whose value is a Place, in the parsers' order."""
    return [
        action.dest
        for parser in parsers
        for action in parser._actions
        if f"--{action.dest}" in action.option_strings and issubclass(kind_of(action) or str, Place)
    ]


def takes_option(parsers: Sequence[argparse.ArgumentParser], option: str) -> bool:
    """Whether one of the parsers has an option of this name (`--workspace`)."""
    return any(option in parser._option_string_actions for parser in parsers)


def rewritten(
    arguments: Sequence[str], parsers: Sequence[argparse.ArgumentParser], rewrite: Callable[[Kind, str, str], str]
) -> list[str]:
    """The arguments with each place replaced by `rewrite(kind, value, named)`; `named`: the option (`--data.shards`) or
    the name of the positional argument.

    Handles `--option VALUE`, `--option=VALUE`, options with several values, flags and positional arguments. An option
    that no parser knows is assumed to have one value: it is a setting of a model.
    """
    options = {name: action for parser in parsers for name, action in parser._option_string_actions.items()}
    positionals = [action for parser in parsers for action in parser._actions if not action.option_strings]
    found: list[str] = []
    waiting: tuple[argparse.Action | None, int] = (None, 0)  # the option whose values follow, and how many at most
    for argument in arguments:
        if _is_option(argument):
            name, equals, value = argument.partition("=")
            action = options.get(name)
            if equals:
                found.append(f"{name}={_one(action, value, rewrite)}")
                waiting = (None, 0)
            else:
                found.append(argument)
                waiting = (action, _most_values(action))
        elif waiting[1]:
            found.append(_one(waiting[0], argument, rewrite))
            waiting = (waiting[0], waiting[1] - 1)
        else:
            action = positionals[0] if positionals else None
            if action is not None and action.nargs not in ("+", "*"):
                positionals.pop(0)
            found.append(_one(action, argument, rewrite))
    return found


def _one(action: argparse.Action | None, value: str, rewrite: Callable[[Kind, str, str], str]) -> str:
    kind = kind_of(action) if action is not None else None
    if action is None or kind is None or value in getattr(kind, "words", ()):
        return value
    return rewrite(kind, value, action.option_strings[0] if action.option_strings else action.dest)


def _most_values(action: argparse.Action | None) -> int:
    """The maximum number of arguments after an option that are its values."""
    if action is None or action.nargs is None:
        return 1
    if isinstance(action.nargs, int):
        return action.nargs
    return 1 if action.nargs == "?" else 1 << 30


def _is_option(argument: str) -> bool:
    """Whether argparse would treat the argument as an option: -1 and -0.5 are values."""
    return argument.startswith("-") and len(argument) > 1 and not argument[1].isdigit() and argument[1] != "."


def _is_kind(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, (Place, YamlFile, Subject))


def _types_in(found: Any) -> Iterator[Any]:
    inner = typing.get_args(found)
    if not inner:
        yield found
    for each in inner:
        yield from _types_in(each)


def _reader_of(kind: type[str]) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        # An empty text would be the working directory, but is a variable of the shell that is not set.
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"Expected a path or URI. Got value: {value}")
        return kind(value)

    return read
