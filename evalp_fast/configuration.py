"""Configuration dataclasses from JSON, with an error for every key that nobody would read."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
    """A (nested) dataclass from JSON values, as `dataclasses.asdict` wrote them; lists become tuples.

    Raises:
        TypeError: for an unknown or a missing key, naming it.
        ValueError: from the dataclass, for a value out of its range.
    """
    hints = typing.get_type_hints(kind)
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise TypeError(f"unknown key {key!r} for {kind.__name__}; known: {', '.join(sorted(known))}")
    converted: dict[str, Any] = {}
    for key, value in values.items():
        nested = [t for t in (hints[key], *typing.get_args(hints[key])) if dataclasses.is_dataclass(t)]
        if nested and isinstance(value, Mapping):
            converted[key] = from_dict(nested[0], value)  # type: ignore[arg-type]
        else:
            converted[key] = tuple(value) if isinstance(value, list) else value
    for key in sorted(known - values.keys()):
        raise TypeError(f"missing key {key!r} for {kind.__name__}")
    return kind(**converted)
