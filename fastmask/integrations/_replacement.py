"""How one class takes the place of another: the state of patched modules, and the classes that they get.

A patched module is an instance of a class that is made for it. Its bases are, in this order, the module's own class if
that is a subclass of the known one, the replacement, and the known class. So a method that a subclass overrides stays,
calls of ``super()`` in it reach the replacement, and ``isinstance`` holds as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

STATE = "_fastmask_patch"


_classes: dict[tuple[type, type, type], type[nn.Module]] = {}


@dataclass(frozen=True)
class Options:
    """The options of ``patch``.

    Args:
        fix: whether known defects are corrected.
        ignore_void: whether void pixels are left out of costs and losses.
    """

    fix: bool = False
    ignore_void: bool = False


@dataclass(frozen=True)
class Patched:
    """The state of a patched module.

    Args:
        original: its own class.
        known: that class or the base of it that fastmask knows.
        replacement: what takes the place of ``known``.
        options: of ``patch``.
    """

    original: type[nn.Module]
    known: type[nn.Module]
    replacement: type[Replacement]
    options: Options


class Found(NamedTuple):
    """A module to replace; see :class:`Patched`."""

    module: nn.Module
    known: type[nn.Module]
    replacement: type[Replacement]

    @staticmethod
    def of_patched(module: nn.Module) -> Found:
        """What took the place of a patched module."""
        state: Patched = vars(module)[STATE]
        return Found(module, state.known, state.replacement)

    def overridden(self) -> list[str]:
        """The methods of the known class that the module's own class, a subclass, defines anew."""
        own = original_class(self.module)
        methods = (name for name, value in vars(self.known).items() if callable(value) and not name.startswith("__"))
        return [name for name in methods if getattr(own, name) is not getattr(self.known, name)]


class Replacement:
    """Base of the classes that take the place of another library's."""

    reads_masks = True  # whether what it replaces always or never compares masks
    matcher_class: type[Replacement] | None = None  # what takes the place of a criterion's matcher

    @classmethod
    def replacements(cls, module: nn.Module, known: type[nn.Module]) -> Iterator[Found]:
        """What to replace for ``module``, an instance of ``known``.

        Raises:
            TypeError: the module has been altered so that fastmask does not know what it computes.
        """
        yield Found(module, known, cls)

    @classmethod
    def compares_masks(cls, module: nn.Module) -> bool:
        """Whether ``module``, patched or not, compares masks, so that void pixels can be left out."""
        return cls.reads_masks


def replace(found: Found, options: Options) -> None:
    """Gives a module its replacement; one that has it gets the options."""
    module, known, replacement = found
    original = original_class(module)
    module.__class__ = _patched_class(original, known, replacement)
    vars(module)[STATE] = Patched(original, known, replacement, options)


def is_patched(module: nn.Module) -> bool:
    """Whether ``module`` is patched."""
    return STATE in vars(module)


def options_of(module: nn.Module) -> Options:
    """The options that ``module`` is patched with; none of them if it is not patched."""
    state = vars(module).get(STATE)
    return Options() if state is None else state.options


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that ``module`` has, or had before it was patched."""
    state = vars(module).get(STATE)
    return type(module) if state is None else state.original


def _patched_class(
    original: type[nn.Module], known: type[nn.Module], replacement: type[Replacement]
) -> type[nn.Module]:
    """The class of patched modules, always the same one."""
    bases = original, known, replacement
    if bases not in _classes:
        _classes[bases] = _make_class(*bases)
    return _classes[bases]


def _make_class(original: type[nn.Module], known: type[nn.Module], replacement: type[Replacement]) -> type[nn.Module]:
    # transformers writes the name of a model's class to its configuration, and finds hooks by the class as a string.
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__reduce_ex__": _reduce}
    patched = type(original.__name__, (replacement, known), names)
    return patched if original is known else type(original.__name__, (original, patched), names)


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """How to copy or pickle a patched module: as its own class does, except that no name leads to its present class."""
    state: Patched = vars(self)[STATE]
    reduced: Any = state.original.__reduce_ex__(self, protocol)
    return _empty, (state.original, state.known, state.replacement), *reduced[2:]


def _empty(original: type[nn.Module], known: type[nn.Module], replacement: type[Replacement]) -> nn.Module:
    """A module of the class that takes the place of ``original``, without its contents."""
    cls = _patched_class(original, known, replacement)
    return cls.__new__(cls)
