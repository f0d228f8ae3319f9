"""YAML as people write it, and nothing that misleads them.

- A date and a time of day are text, with and without quotes: by itself YAML reads `2026-11-21` as a date and `14:00` as
  840, sixty times fourteen.
- Digits after a leading zero are text: YAML reads `010` as 8. A setting that is a number reads such a text as ten.
- A key that stands twice is refused: YAML keeps the last one.
- So are aliases that contain themselves or expand without bound, and nesting that no setting has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import yaml

_TEXT = "tag:yaml.org,2002:str"
_MOMENT = re.compile(r"(?:\d{4}-\d\d?-\d\d?(?:[Tt ].*)?|[-+]?\d[\d_]*(?::\d\d?)+(?:\.\d*)?)$")
_LEADING_ZERO = re.compile(r"[-+]?0[\d_]+$")
_FIRST_OF_NUMBERS = frozenset("+-0123456789")
_MOST_LEVELS = 50
"""Settings have about six levels, and Python's own limit is some hundreds."""
_MOST_VALUES = 100_000
"""Keys and values with all aliases expanded; the largest board has about a thousand."""

Resolvers = Mapping[str, list[tuple[str, re.Pattern[str]]]]


def as_written(resolvers: Resolvers) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """The implicit resolvers of a loader, {first character: [(tag, pattern)]}, changed so that dates, times of day and
    digits after a leading zero are text."""
    texts = [(_TEXT, _MOMENT), (_TEXT, _LEADING_ZERO)]
    return {
        first: [*texts, *(each for each in known if each not in texts)] if first in _FIRST_OF_NUMBERS else known
        for first, known in resolvers.items()
    }


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar = as_written(yaml.SafeLoader.yaml_implicit_resolvers)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. yaml.YAMLError: it is not valid YAML, or misleads."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _refuse_what_misleads(root)
        return loader.construct_document(root)
    except RecursionError:
        raise yaml.YAMLError(f"nested more than {_MOST_LEVELS} levels deep") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        # What PyYAML raises for a value that its tag does not allow (`!!int x`), and Python for endless digits.
        raise yaml.YAMLError(f"a value does not fit its type: {error}") from error
    finally:
        loader.dispose()


def _refuse_what_misleads(root: yaml.Node) -> None:
    """Walk over all nodes, through aliases as if each were written out."""
    waiting, num_values = [(root, 1)], 0
    while waiting:
        node, level = waiting.pop()
        num_values += 1
        if level > _MOST_LEVELS:
            raise yaml.YAMLError(
                f"line {_line(node)}: nested more than {_MOST_LEVELS} levels deep, or an alias stands inside its anchor"
            )
        if num_values > _MOST_VALUES:
            raise yaml.YAMLError(f"line {_line(node)}: its aliases expand to more than {_MOST_VALUES:,} values")
        if isinstance(node, yaml.MappingNode):
            _refuse_doubled_keys(node)
        waiting += [(child, level + 1) for child in _children(node)]


def _refuse_doubled_keys(mapping: yaml.MappingNode) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in mapping.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        if (named := (key.tag, key.value)) in lines:
            raise yaml.YAMLError(
                f"line {_line(key)}: key {key.value!r} is in line {lines[named]} already: keep one of them"
            )
        lines[named] = _line(key)


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from (key, value)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
