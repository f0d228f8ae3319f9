"""Frozen dataclasses <-> the JSON documents that hold them: a field is a key, and its value is converted too."""

from __future__ import annotations

import dataclasses
import datetime
import math
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def stored_with(field: str, make: Callable[[], Any] = lambda: None) -> Any:
    """A field with the default `make()` that is stored only in documents where `field`, often itself, is not None."""
    return dataclasses.field(default_factory=make, metadata={"stored_with": field})


def as_json(value: Any, *, finite: bool = False) -> Any:
    """Objects, lists and plain values; `finite`: null for numbers that not every reader of JSON knows (nan, inf)."""
    if dataclasses.is_dataclass(value):
        stored = [each for each in dataclasses.fields(value) if _is_stored(each, value)]
        return {each.name: as_json(getattr(value, each.name), finite=finite) for each in stored}
    if isinstance(value, Mapping):
        return {str(key): as_json(item, finite=finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item, finite=finite) for item in value]
    if isinstance(value, Path | datetime.date):
        return str(value)
    return None if finite and isinstance(value, float) and not math.isfinite(value) else value


def from_json(kind: type[T], document: Any) -> T:
    """The dataclass that `as_json` wrote. Other keys are ignored; ValueError names a key that is missing."""
    return _read(kind, document)


def _is_stored(field: dataclasses.Field, value: Any) -> bool:
    beside = field.metadata.get("stored_with")
    return beside is None or getattr(value, beside) is not None


def _read(kind: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, value)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        others = [each for each in inner if each is not types.NoneType]
        return value if value is None or len(others) > 1 else _read(others[0], value)
    if origin is tuple:
        return tuple(_read(inner[0], item) for item in value)
    if origin is list:
        return [_read(inner[0], item) for item in value]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {key: _read(inner[1], item) for key, item in value.items()}
    if kind is float and value is None:
        return math.nan
    return kind(value) if kind is Path else kind.fromisoformat(value) if kind is datetime.date else value


def _read_fields(kind: Any, document: Any) -> Any:
    hints, values = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        if field.name in document:
            values[field.name] = _read(hints[field.name], document[field.name])
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{kind.__name__}: the document has no {field.name!r}, it has {', '.join(document)}")
    return kind(**values)
