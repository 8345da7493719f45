"""One table of names for both directions between a foreign checkpoint and a model of ours."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmask.models.weight_files import key_problems, listed


@dataclass(frozen=True)
class NameRule:
    """Names that belong together: joined along their first dimension, our tensors equal the foreign ones.

    Args:
        own: a regular expression for the whole of one of our names.
        foreign: the foreign names, with ``\\1`` for its first group; none if the foreign model has no such tensor and
            ours does not use it.
        partners: further names of ours that are joined with the first.
    """

    own: str
    foreign: tuple[str, ...]
    partners: tuple[str, ...] = ()


def rename(own: str, foreign: str) -> NameRule:
    """One tensor under two names."""
    return NameRule(own, (foreign,))


@dataclass(frozen=True)
class NameGroup:
    own: tuple[str, ...]
    foreign: tuple[str, ...]


def groups_of(own_names: Iterable[str], rules: Sequence[NameRule]) -> list[NameGroup]:
    """Every one of our names in its group, by the first rule that matches.

    Raises:
        ValueError: names that no rule knows, which the foreign format cannot hold; the message lists them.
    """
    groups: list[NameGroup] = []
    done: set[str] = set()
    unknown: list[str] = []
    for name in own_names:
        if name in done:
            continue
        for rule in rules:
            if match := re.fullmatch(rule.own, name):
                own = (name, *(match.expand(partner) for partner in rule.partners))
                groups.append(NameGroup(own, tuple(match.expand(template) for template in rule.foreign)))
                done.update(own)
                break
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"the format has no names for {listed(unknown)}")
    return groups


def to_foreign(weights: Mapping[str, Tensor], rules: Sequence[NameRule]) -> dict[str, Tensor]:
    """Our weights under the foreign names."""
    result: dict[str, Tensor] = {}
    for group in groups_of(weights, rules):
        if group.foreign:
            joined = torch.cat([weights[name] for name in group.own]) if len(group.own) > 1 else weights[group.own[0]]
            result.update(zip(group.foreign, _split(joined, len(group.foreign)), strict=True))
    return result


def to_own(
    weights: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    rules: Sequence[NameRule],
    *,
    ignored: str = "",
    replaceable: str = "",
    source: str = "the checkpoint",
) -> dict[str, Tensor]:
    """Foreign weights under our names, whole: what the foreign model lacks keeps the value that it has in ``own``.

    Args:
        weights: of the foreign model.
        own: the state of ours, with the needed names and shapes.
        rules: of the names.
        ignored: a regular expression for foreign names that carry nothing to be loaded.
        replaceable: a regular expression for names of ours that keep their value, with a warning, where shapes differ.
        source: of the foreign weights, for errors.

    Raises:
        ValueError: foreign names that are missing, unexpected or behind a prefix, or shapes that differ; the message
            says which.
    """
    groups = groups_of(own, rules)
    expected = {name for group in groups for name in group.foreign}
    found = {name for name in weights if name in expected or not re.fullmatch(ignored, name)}
    if problems := key_problems(expected, found):
        raise ValueError(f"{source} does not fit the model; {problems}")
    result, kept, wrong = dict(own), [], []
    for group in groups:
        if not group.foreign:
            continue
        foreign = [weights[name] for name in group.foreign]
        joined = torch.cat(foreign) if len(foreign) > 1 else foreign[0]
        for name, part in zip(group.own, _split(joined, len(group.own)), strict=True):
            if part.shape == own[name].shape:
                result[name] = part.to(own[name].dtype)
            elif re.fullmatch(replaceable, name):
                kept.append(name)
            else:
                wrong.append(f"{' + '.join(group.foreign)} of shape {tuple(part.shape)} for {tuple(own[name].shape)}")
    if wrong:
        raise ValueError(f"{source} does not fit the model; it has {'; '.join(wrong)}")
    if kept:
        warnings.warn(f"not loaded from {source}, but started at random: {', '.join(kept)}", stacklevel=3)
    return result


def _split(tensor: Tensor, parts: int) -> tuple[Tensor, ...]:
    return (tensor,) if parts == 1 else tensor.chunk(parts)
