"""What a benchmark is made of: an operation, its cases, and the providers that compete on them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from benchmarks import networks, ops
from benchmarks.harness.machine import Work

NO_OPERATIONS = {
    "inputs",
    "models",
    "label_memory",
    "validation",
}  # every other file of benchmarks/ops and benchmarks/networks is one


class Unavailable(Exception):
    """A provider cannot run here; the message says why. It is listed as missing."""


class Oracle(Protocol):
    """Knows the right result for one set of inputs."""

    def disagreement(self, result: Any, error_factor: float) -> str | None:
        """What is wrong with ``result``; None if it is right. ``error_factor`` is that of the provider."""


@dataclass(frozen=True)
class Case:
    """A named shape.

    Args:
        name: unique within its operation.
        sizes: handed to the operation's ``make_inputs``.
        suites: which of "quick", "cpu" and "gpu" it belongs to.
        dtypes: names of the logits' dtypes to run it with.
    """

    name: str
    sizes: Mapping[str, Any]
    suites: tuple[str, ...]
    dtypes: tuple[str, ...] = ("float32",)


@dataclass(frozen=True)
class Provider:
    """One implementation of an operation.

    Args:
        name: as it stands in the tables.
        prepare: from the inputs to the call that is timed; conversions to the provider's own input format and
            compilation belong here. Raises Unavailable or ImportError where the provider cannot run.
        result: from what the call returned, and the inputs, to what the operation's oracle judges. Not timed.
        error_factor: how many times the reference's own rounding error it may be off; 2 is the library's budget. Peers
            that evaluate the same formula less carefully state a larger one.
        compiles: whether its first call compiles, so that neither its time nor its memory says anything.
        keeps_memory: whether its first call takes the memory that later ones use, so that it alone shows how much.
        partial: whether it does a part alone of what fastmask does, to show how a gain divides: charts and claims leave
            it out.
    """

    name: str
    prepare: Callable[[Any], Callable[[], Any]]
    result: Callable[[Any, Any], Any] = lambda raw, inputs: raw
    error_factor: float = 2.0
    compiles: bool = False
    keeps_memory: bool = False
    partial: bool = False


@dataclass(frozen=True)
class Operation:
    """What the providers compute, and how they are judged.

    Args:
        title: a line for the tables.
        cases: the shapes; each with every one of its dtypes is one table section.
        providers: in the order in which they take turns.
        baseline: the provider that the others are compared with: the field's code as users run it.
        make_inputs: (sizes of the case, dtype, device) to the one object that all providers read; seeded.
        oracle: from the inputs to the judge of the results.
        work: from the inputs to the least work that any implementation must do.
        name: that of its file; ``load_operations`` sets it.
    """

    title: str
    cases: tuple[Case, ...]
    providers: tuple[Provider, ...]
    baseline: str
    make_inputs: Callable[[Mapping[str, Any], torch.dtype, torch.device], Any]
    oracle: Callable[[Any], Oracle]
    work: Callable[[Any], Work]
    name: str = ""

    def __post_init__(self) -> None:
        for kind, names in (("case", [c.name for c in self.cases]), ("provider", [p.name for p in self.providers])):
            if len(set(names)) != len(names):
                raise ValueError(f"{self.title}: two {kind}s have the same name in {names}")
        if self.baseline not in [provider.name for provider in self.providers]:
            raise ValueError(f"{self.title}: the baseline {self.baseline!r} is none of its providers")


def load_operations() -> dict[str, Operation]:
    """The ``OPERATION`` of every operation's file, by name."""
    files = {file.name: package for package in (ops, networks) for file in pkgutil.iter_modules(package.__path__)}
    names = sorted(files.keys() - NO_OPERATIONS)
    modules = {name: importlib.import_module(f"{files[name].__name__}.{name}") for name in names}
    return {name: replace(module.OPERATION, name=name) for name, module in modules.items()}
