"""Rules for the fields of JSON annotations."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

MAX_SHOWN = 60  # characters of a wrong value in a message


class Rule(NamedTuple):
    """The rule for a field.

    Attributes:
        holds: whether a value is valid.
        expected: the valid values in words.
        optional: whether the field may be missing.
    """

    holds: Callable[[Any], bool]
    expected: str
    optional: bool = False


def field_faults(entry: Any, rules: Mapping[str, Rule]) -> list[str]:
    """The faults of an entry's fields, in words."""
    if not isinstance(entry, dict):
        return [f"{shown(entry)}; expected an object"]
    faults = []
    for key, rule in rules.items():
        if key not in entry:
            if not rule.optional:
                faults.append(f'no "{key}"')
        elif not rule.holds(entry[key]):
            faults.append(f'"{key}" is {shown(entry[key])}; expected {rule.expected}')
    return faults


def shown(value: Any) -> str:
    """A value as JSON, shortened if it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def is_integer(value: Any) -> bool:
    """Whether ``value`` is an integer, and not true or false."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any, least: float, greatest: float) -> bool:
    """Whether ``value`` is a number within the limits, and not NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= greatest
