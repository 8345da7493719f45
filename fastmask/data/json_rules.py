"""Rules for what the fields of JSON annotations hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

MAX_SHOWN = 60  # characters of a wrong value


class Rule(NamedTuple):
    """What a field may hold.

    Attributes:
        holds: whether a value is right.
        expected: the same in words.
        optional: the field may be left out.
    """

    holds: Callable[[Any], bool]
    expected: str
    optional: bool = False


def field_faults(entry: Any, rules: Mapping[str, Rule]) -> list[str]:
    """What is wrong with the fields of an entry, each fault in words."""
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
    """A value as JSON has it, cut if it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def is_integer(value: Any) -> bool:
    """``value`` is an integer of JSON, which knows true and false besides."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any, least: float, greatest: float) -> bool:
    """``value`` is a number within limits; NaN is within none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= greatest
